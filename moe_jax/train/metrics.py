"""What a run reports: JSON lines and TensorBoard files, and a line or a bar for people."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` and their numbers to TensorBoard; one record, one flushed line.

    A record is {"kind": "train" | "eval", "step": int, "run": int, ...}; run counts the processes that have
    written to the folder, from 1. JSON has no NaN and no infinity: such numbers are written as the strings
    "NaN", "Infinity", "-Infinity", which float() reads. A resumed run appends; steps that an earlier life had
    reported come again, and readers take the newest (:func:`read_metrics`).
    """

    def __init__(self, folder: Path):
        """Opens the file in ``folder``; half a line that a kill left at its end is cut off."""
        self._folder = folder
        path = folder / METRICS_FILE
        self._run = 1
        if path.exists():
            _cut_torn_line(path)
            self._run += max((record["run"] for record in read_all_metrics(folder)), default=0)
        self._file = path.open("a", encoding="utf-8")
        self._board: SummaryWriter | None = None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one record; values are numbers or (nested lists of) arrays."""
        record = {"kind": kind, "step": step, "run": self._run}
        record |= {name: _json_value(value) for name, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is None:
            # purge_step: TensorBoard forgets what an earlier life had shown from this step on.
            # The suffix: files are named by the second, and two lives may share one.
            folder, suffix = str(self._folder / "tensorboard"), f".{self._run}"
            self._board = SummaryWriter(folder, purge_step=step, flush_secs=10, filename_suffix=suffix)
        for name, value in values.items():
            if np.ndim(value) == 0:
                self._board.add_scalar(f"{kind}/{name}", float(value), step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _cut_torn_line(path: Path) -> None:
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _json_value(value: Any) -> Any:
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_all_metrics(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Every record of a run folder, in the order written; a last line that is not whole is passed over.

    Raises:
        ValueError: another line that is no record, named by its number.
        FileNotFoundError: the folder holds no metrics.
    """
    path = Path(folder) / METRICS_FILE
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return  # being written, or torn by a kill
            record = _parse(line)
            if record is None:
                raise ValueError(f"{path}: line {number} is not a record of metrics; remove it")
            yield record


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"kind", "step", "run"} <= record.keys() else None


def read_metrics(folder: str | Path, kind: str = "train") -> dict[int, dict[str, Any]]:
    """Step -> the newest record of that kind, ascending.

    What a life that was killed had reported beyond the step its successor began at is left out.
    """
    newest: dict[int, dict[str, Any]] = {}
    run = 0
    for record in read_all_metrics(folder):
        if record["run"] > run:
            run = record["run"]
            newest = {step: old for step, old in newest.items() if step < record["step"]}
        if record["kind"] == kind:
            newest[record["step"]] = record
    return dict(sorted(newest.items()))


def worst_over_mean(tokens_per_expert_NE: np.ndarray) -> float:
    """The load of the busiest expert over the mean, in the worst layer; 1 is perfect balance."""
    load = np.asarray(tokens_per_expert_NE, np.float64)
    return float(np.max(load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-30)))


class ProgressDisplay:
    """A bar with loss, tokens/s and balance on a terminal; where there is none, a line per report."""

    def __init__(self, total_steps: int, done_steps: int):
        self._console = Console(stderr=True)
        self._total = total_steps
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            "training", total=total_steps, completed=done_steps, status="compiling"
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int, values: Mapping[str, Any], tokens_per_s: float, report: bool) -> None:
        """Show a step's numbers; without a terminal only if ``report``."""
        status = (
            f"loss {float(values['loss']):.4f}  {tokens_per_s:,.0f} tokens/s  "
            f"balance {worst_over_mean(values['tokens_per_expert_NE']):.2f}"
        )
        self._bar.update(self._task, completed=step, status=status)
        if report and not self._console.is_terminal:
            self._console.print(f"step {step}/{self._total}  {status}", soft_wrap=True, highlight=False)

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
