"""What the tests of training runs share: a model small enough for seconds, and a text of their own."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from moe_jax.config import ResolvedRun, load_run
from moe_jax.config.render import to_yaml
from moe_jax.train.loop import run
from moe_jax.train.metrics import METRICS_FILE, read_metrics

REPOSITORY = Path(__file__).parents[1]
NUM_STEPS = 6
SMALL = {
    "model.num_layers": 2,
    "model.d_model": 32,
    "model.num_heads": 8,
    "model.num_experts": 16,
    "model.expert_hidden": 16,
    "model.vocab_size": 272,
    "model.compute_dtype": "float32",
    "train.steps": NUM_STEPS,
    "train.batch_size": 16,
    "train.warmup_steps": 2,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.checkpoint_every": 3,
    "train.keep_checkpoints": 9,
    "train.state_checksum": True,
    "data.seq_len": 16,
    "data.held_out_fraction": 0.1,
}


def write_text(folder: Path) -> Path:
    """A text of some 10,000 bytes in which there is something to learn."""
    path = folder / "text.txt"
    path.write_text("".join(f"line {i} holds {i * i % 97}\n" for i in range(500)), encoding="utf-8")
    return path


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Runs inside share compiled programs through `folder`: every run makes its own, most are the same."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def small_run(text: Path, folder: Path, deployment: str, fields: dict[str, Any] | None = None) -> ResolvedRun:
    """A run of the small model over `text` in `folder`, with other `fields` ("train.steps": 3) set."""
    own = {"data.paths": [str(text)], "train.run_dir": str(folder)}
    return load_run(None, None, deployment, SMALL | own | (fields or {}))


def copy_run(source: Path, target: Path, newest_step: int) -> Path:
    """A copy of a run folder as it was when `newest_step` had just been saved, metrics of later steps inside.

    That is what a run that was killed leaves: it reports steps before it has saved them.
    """
    shutil.copytree(source, target)
    for step in (target / "checkpoints").iterdir():
        if int(step.name) > newest_step:
            shutil.rmtree(step)
    return target


def train(resolved: ResolvedRun) -> int:
    """Run it in this process; its exit code."""
    return run(resolved.config, resolved.provenance)


def signature(folder: Path) -> dict[int, tuple[float, float, int]]:
    """(loss, gradient norm, checksum of the state) by step, exactly as computed."""
    return {
        step: (record["loss"], record["grad_norm"], record["state_checksum"])
        for step, record in read_metrics(folder).items()
    }


def num_records(folder: Path) -> int:
    """Whole lines of metrics."""
    path = folder / METRICS_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def start_script(resolved: ResolvedRun, log: Path, compiled: Path | None) -> subprocess.Popen:
    """scripts/train.py as a process of its own, its output in `log`, compiled programs kept in `compiled`."""
    config = log.with_suffix(".yaml")
    config.write_text(to_yaml(resolved), encoding="utf-8")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, str(REPOSITORY / "scripts/train.py"), "--config", str(config)],
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(cache if compiled else {})},
        )
