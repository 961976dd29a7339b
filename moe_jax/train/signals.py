"""SIGINT and SIGTERM as a request to stop, not as a death."""

import os
import signal
import threading
from types import FrameType
from typing import Self


class StopRequest:
    """Context manager: the first SIGINT or SIGTERM inside it sets ``signal``; a second one ends the process.

    So a run can finish its step, save and leave, and a person who presses Ctrl-C twice still gets out at once
    (nothing is flushed then; files and checkpoints are made to survive that). Python delivers signals to the
    main thread only: in another thread this changes nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that came, None while none did."""
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        # os.write, as print may not be called from within itself, and a signal may come in the middle of it.
        os.write(
            2, f"\n{self.signal.name}: finishing this step and saving; again to leave at once\n".encode()
        )

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 128 + its number; 0 if none came."""
        return 128 + self.signal if self.signal else 0
