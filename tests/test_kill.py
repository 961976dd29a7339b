"""kill -9 at random moments of training: the next process goes on from the newest checkpoint, bit for bit."""

import json
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import pytest
from run_tools import num_records, signature, small_run, start_script, write_text

from moe_jax.checkpoint import open_checkpoint
from moe_jax.checkpoint.layout import UNFINISHED_MARK, list_steps
from moe_jax.config import ResolvedRun
from moe_jax.deployments import create
from moe_jax.train.metrics import read_all_metrics
from moe_jax.train.step import Trainer

FIELDS = {"train.steps": 24, "train.keep_checkpoints": 2}
LIFE_LIMIT_S = 240


@dataclass
class Killer:
    """Runs scripts/train.py again and again over one folder after another, and kills it as told."""

    resolved: Callable[[Path], ResolvedRun]
    """The run in a folder."""
    work: Path
    """Where the folders of runs and their logs go."""
    compiled: Path
    """Where processes keep compiled programs for one another."""
    random: random.Random
    startup_s: float = 10.0
    """How long a process takes until its first steps are reported; measured by the newest that got there."""
    seen: list[str] = field(default_factory=list)
    """What each killed process was doing, as far as its folder tells."""

    def log(self, folder: Path) -> Path:
        return self.work / f"{folder.name}.log"

    def live(self, folder: Path, moment: str | None) -> None:
        """One process on the folder, killed at the moment, or left to its end; checks where it began."""
        newest, written = newest_step(folder), num_records(folder)
        cache = None if moment == "compile" else self.compiled
        process = start_script(self.resolved(folder), self.log(folder), cache)
        try:
            killed = moment is not None and self.wait_for(moment, process, folder, written)
            if killed:
                process.kill()
            code = process.wait(LIFE_LIMIT_S)
        finally:
            process.kill()
        log = self.log(folder).read_text(encoding="utf-8")
        assert code == (-signal.SIGKILL if killed else 0), log
        begin = re.search(r"devices, (fresh weights|resumed from step (\d+));", log)
        if begin:
            assert begin[2] == (None if newest is None else str(newest)), log
        records = list(read_all_metrics(folder))[written:] if num_records(folder) > written else []
        if records:
            assert records[0]["step"] == (newest or 0) + 1
        if killed:
            self.seen.append(doing(folder, log, bool(records)))

    def wait_for(self, moment: str, process: subprocess.Popen, folder: Path, written: int) -> bool:
        """Sleep until the moment, plus a random while; False if the process had come to its end before."""
        log, steps = self.log(folder), self.random.randint(1, 8)
        happened = {
            "start": lambda: True,
            "compile": lambda: " devices, " in log.read_text(encoding="utf-8", errors="replace"),
            "step": lambda: num_records(folder) >= written + steps,
            "commit": lambda: len(list_steps(folder / "checkpoints")) == FIELDS["train.keep_checkpoints"],
            "save": lambda: any(folder.glob(f"checkpoints/*{UNFINISHED_MARK}*")),
        }[moment]
        more_s = {"start": self.startup_s, "compile": 2.0, "step": 0.1, "commit": 0.1, "save": 0.02}[moment]
        started = time.monotonic()
        while not happened():
            if process.poll() is not None:
                return False
            assert time.monotonic() < started + LIFE_LIMIT_S, log.read_text(encoding="utf-8")
            time.sleep(0.002)
        if moment == "step":
            self.startup_s = time.monotonic() - started
        until = time.monotonic() + self.random.uniform(0, more_s)
        while time.monotonic() < until:
            if process.poll() is not None:
                return False
            time.sleep(0.005)
        return process.poll() is None


def newest_step(folder: Path) -> int | None:
    return max(list_steps(folder / "checkpoints"), default=None)


def doing(folder: Path, log: str, stepped: bool) -> str:
    """What a process had come to when it was killed."""
    if " devices, " not in log:
        return "starting"  # imports, reading the text, restoring
    if any(folder.glob(f"checkpoints/*{UNFINISHED_MARK}*")):
        return "saving"  # what earlier lives had left was cleared away before
    return "stepping" if stepped else "compiling"


def state_of(resolved: ResolvedRun, folder: Path) -> dict:
    """The newest saved state of a run, whole."""
    cfg = resolved.config
    trainer = Trainer(create(cfg.model, cfg.deployment), cfg.train)
    return jax.device_get(open_checkpoint(folder).restore(trainer.abstract_state()))


def check_against(killer: Killer, folder: Path, undisturbed: Path) -> None:
    """Every step of every life, and the weights in the end, are those of the run that was left alone."""
    expected = signature(undisturbed)
    for record in read_all_metrics(folder):
        found = (record["loss"], record["grad_norm"], record["state_checksum"])
        assert found == expected[record["step"]], (folder, record)
    assert signature(folder) == expected
    assert list_steps(folder / "checkpoints") == list_steps(undisturbed / "checkpoints")
    jax.tree.map(
        np.testing.assert_array_equal,
        state_of(killer.resolved(folder), folder),
        state_of(killer.resolved(undisturbed), undisturbed),
    )
    leftover = [path.name for path in (folder / "checkpoints").iterdir() if not path.name.isdigit()]
    assert leftover == [], "what killed saves left is cleared away"
    json.loads((folder / "environment.json").read_text())


def kill_again_and_again(
    tmp_path: Path, compiled: Path, deployment: str, moments: list[str], seed: int
) -> list[str]:
    """Kill at each of the moments; a run that is complete is checked, and the next one begins afresh."""
    text = write_text(tmp_path)

    def resolved(folder: Path) -> ResolvedRun:
        return small_run(text, folder, deployment, FIELDS)

    killer = Killer(resolved, tmp_path, compiled, random.Random(seed))
    undisturbed, numbers = tmp_path / "undisturbed", iter(range(1000))
    killer.live(undisturbed, None)  # fills the cache of compiled programs
    folder = tmp_path / f"run{next(numbers)}"
    while len(killer.seen) < len(moments):
        killer.live(folder, moments[len(killer.seen)])
        if newest_step(folder) == FIELDS["train.steps"]:
            check_against(killer, folder, undisturbed)
            folder = tmp_path / f"run{next(numbers)}"
    killer.live(folder, None)
    check_against(killer, folder, undisturbed)
    return killer.seen


@pytest.mark.timeout(900)
def test_two_kills(tmp_path, tmp_path_factory):
    compiled = tmp_path_factory.getbasetemp() / "compiled-by-scripts"
    seen = kill_again_and_again(tmp_path, compiled, "ep16", ["commit", "save"], seed=0)
    assert len(seen) == 2
    assert "saving" in seen


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("deployment", ["ep16", "tp8pp2"])
def test_twenty_five_kills(tmp_path, deployment):
    moments = ["start"] * 9 + ["compile"] * 2 + ["step"] * 5 + ["commit"] * 2 + ["save"] * 6
    random.Random(deployment).shuffle(moments)
    # The first one measures how long a start takes, by which the random delays of the others are drawn.
    seen = kill_again_and_again(tmp_path, tmp_path / "compiled", deployment, ["step", *moments], seed=1)
    assert len(seen) == 25
    assert {"starting", "compiling", "stepping", "saving"} <= set(seen), seen
