"""The one folder a run leaves: resolved config, environment, metrics, checkpoints."""

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_jax.config import ConfigError, Problem, to_dict
from moe_jax.config.schema import RunConfig

CHECKPOINTS = "checkpoints"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "moe_jax")
# A resumed run may change these and stay the same run: where it runs, how long, what it writes.
_FREE_SECTIONS = ("deployment",)
_FREE_TRAIN_FIELDS = (
    "steps", "run_dir", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints",
    "resume", "state_checksum", "zero_params",
)  # fmt: skip


@contextlib.contextmanager
def locked_run_dir(run_dir: str) -> Iterator[Path]:
    """The run folder, made if need be, held by this process alone until the block ends.

    The lock is the operating system's, so a killed process leaves none behind.
    Raises ConfigError when the path is no folder, cannot be written, or another process trains in it.
    """
    folder = Path(run_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        fix = "name a folder that can be made and written"
        raise ConfigError(Problem("train.run_dir", run_dir, f"cannot be used: {error}", fix)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fix = "wait for it, or use another folder"
            problem = Problem("train.run_dir", run_dir, "is in use by another training process", fix)
            raise ConfigError(problem) from None
        yield folder


def check_same_run(saved: Mapping[str, Any], cfg: RunConfig, where: Path) -> None:
    """Refuse to go on from a checkpoint with another model, data or optimisation than it was made with.

    saved: the config in the checkpoint (``to_dict``). Free to change: the deployment, and how long to train
    and what to write. Raises ConfigError that lists every field that differs.
    """
    differences = []
    for section, fields in to_dict(cfg).items():
        for name, value in fields.items():
            free = section in _FREE_SECTIONS or (section == "train" and name in _FREE_TRAIN_FIELDS)
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
            earlier = 1 + sum(1 for _ in folder.glob(f"{path.stem}.*{path.suffix}"))
            path.rename(folder / f"{path.stem}.{earlier}{path.suffix}")
        path.write_text(text, encoding="utf-8")


def _environment() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    return {
        "command": sys.argv,
        "python": sys.version,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
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
