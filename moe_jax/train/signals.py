"""SIGINT and SIGTERM as a request to stop, not as a death."""

import signal
from types import FrameType
from typing import Self


class StopRequest:
    """Context manager: the first SIGINT or SIGTERM inside it sets ``signal``; a second one acts as usual.

    So a run can finish its step, save and leave, and a person who presses Ctrl-C twice still gets out.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that came, None while none did."""

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 128 + its number; 0 if none came."""
        return 128 + self.signal if self.signal else 0
