"""The one folder a run leaves: resolved config, environment, metrics, checkpoints."""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import moe_jax
from moe_jax.config import ConfigError, Problem, to_dict
from moe_jax.config.schema import RunConfig

CHECKPOINTS = "checkpoints"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# A resumed run may change these and stay the same run: where it runs, how its math is done, how long, what it
# writes; and what names the text, which is compared by its content.
_FREE_FIELDS = {
    "deployment": None,  # all
    "model": {"remat", "attention"},
    "data": {"paths", "tokenizer", "held_out_fraction", "max_bytes"},
    "train": {
        *("steps", "run_dir", "log_every", "eval_every", "eval_batches", "checkpoint_every"),
        *("keep_checkpoints", "resume", "state_checksum", "zero_params"),
    },
}


@contextlib.contextmanager
def locked_run_dir(run_dir: str) -> Iterator[Path]:
    """The run folder, made if need be, held by this process alone until the block ends.

    The lock is the operating system's, so a killed process leaves none behind.
    Raises ConfigError when the path is no folder, cannot be written, or another process trains in it.
    """
    folder = Path(run_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        fix = "name a folder that can be made and written"
        raise ConfigError(Problem("train.run_dir", run_dir, f"cannot be used: {error}", fix)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            fix = "wait for it, or use another folder"
            problem = Problem("train.run_dir", run_dir, f"is being trained in by {holder}", fix)
            raise ConfigError(problem) from None
        lock.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
        yield folder


def check_same_run(saved: Mapping[str, Any], cfg: RunConfig, where: Path) -> None:
    """Refuse to go on from a checkpoint with another model, data or optimisation than it was made with.

    saved: the config in the checkpoint (``to_dict``). Free to change: the deployment, how the same math is
    done, how long to train and what to write; the text itself is compared by :func:`check_same_text`. Raises
    ConfigError that lists every field that differs.
    """
    differences = []
    for section, fields in to_dict(cfg).items():
        for name, value in fields.items():
            free = _FREE_FIELDS[section] is None or name in _FREE_FIELDS[section]
            old = saved.get(section, {}).get(name, value)
            if not free and old != value:
                differences.append(f"{section}.{name}: {old!r} -> {value!r}")
    if differences:
        raise ConfigError(
            f"train.run_dir: the checkpoints in {where} belong to another run ({'; '.join(differences)}); "
            f"use another train.run_dir, or the fields as they were"
        )


def write_run_files(folder: Path, config_text: str) -> None:
    """Write config.yaml and environment.json; a resumed run keeps its earlier ones under numbered names."""
    for name, text in {
        "config.yaml": config_text,
        "environment.json": json.dumps(_environment(), indent=2) + "\n",
    }.items():
        path = folder / name
        if path.exists():
            numbers = (number for number in range(1, sys.maxsize) if not _numbered(path, number).exists())
            shutil.copyfile(path, _numbered(path, next(numbers)))
        whole = path.with_name(f"{name}.tmp")
        whole.write_text(text, encoding="utf-8")
        whole.replace(path)  # at no moment is there none, or half of one


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _environment() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    return {
        "command": sys.argv,
        "python": sys.version,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES} | {"moe_jax": moe_jax.__version__},
        "devices": {"count": len(devices), "kind": devices[0].device_kind, "platform": devices[0].platform},
        "environment": {key: os.environ[key] for key in ("XLA_FLAGS", "JAX_PLATFORMS") if key in os.environ},
        "git": _git(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the checkout the package runs from, and whether files differ from it; None outside of one."""
    try:
        commit, status = (
            subprocess.run(
                ["git", *arguments],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "modified": bool(status)}
