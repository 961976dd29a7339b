"""How checkpoints lie on disk; found without jax or orbax.

A run's checkpoints folder holds one folder per step, named by the number of optimizer steps done::

    checkpoints/200/params/       weights, in orbax's format
    checkpoints/200/training/     optimizer state and counters, in orbax's format (weights-only ones lack it)
    checkpoints/200/moe_jax.json  the manifest

A step is written under another name and renamed when it is whole, its manifest included; so a folder that is
named by a number and has all the files of its manifest is a checkpoint, whatever was killed and when.
"""

import logging
from pathlib import Path

from moe_jax.checkpoint import manifest
from moe_jax.checkpoint.errors import CheckpointError

PARAMS, TRAINING = "params", "training"
UNFINISHED_MARK = ".orbax-checkpoint-tmp"
_LOG = logging.getLogger(__name__)
_GIVE = "give a run folder, its checkpoints folder, or one step in it"


def list_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in `directory`, ascending; [] if it does not exist."""
    return sorted(int(folder.name) for folder in step_folders(directory) if is_complete(folder))


def step_folders(directory: Path) -> list[Path]:
    """Folders in `directory` that are named as steps, complete or not, ascending; [] if it does not exist."""
    if not directory.is_dir():
        return []
    folders = [path for path in directory.iterdir() if _is_step_name(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name))


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a committed checkpoint, none of whose files was taken away or cut since.

    One with a damaged manifest counts: that is to be told when it is read, not to be passed over.
    """
    if UNFINISHED_MARK in folder.name or not (folder / manifest.NAME).is_file():
        return False
    try:
        return not manifest.missing_files(folder, manifest.read_manifest(folder))
    except CheckpointError:
        return True


def find_checkpoint(path: str | Path, step: int | None = None) -> Path:
    """The step folder that `path` means: a run folder, its checkpoints folder, or a step folder itself.

    `step` picks one; None means the newest.

    Raises:
        CheckpointError: nothing there, no complete checkpoint, or not this step.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path}: {'is a file' if path.exists() else 'does not exist'}; {_GIVE}")
    if is_complete(path):
        found = manifest.read_manifest(path)["step"]
        if step not in (None, found):
            raise CheckpointError(f"{path}: is step {found}, not step {step}; give the folder above it")
        return path
    if any((path / part).exists() for part in (PARAMS, manifest.NAME)):
        raise CheckpointError(f"{path}: is not a whole checkpoint; give another step, or the folder above it")
    return _find_step(path / "checkpoints" if (path / "checkpoints").is_dir() else path, step)


def _find_step(directory: Path, step: int | None) -> Path:
    steps = list_steps(directory)
    broken = [entry.name for entry in step_folders(directory) if int(entry.name) not in steps]
    broken += sorted(entry.name for entry in directory.iterdir() if UNFINISHED_MARK in entry.name)
    also = f" (incomplete: {', '.join(broken)})" if broken else ""
    if not steps:
        raise CheckpointError(f"{directory}: holds no complete checkpoint{also}; give a run that saved one")
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{directory}: holds no step {step}; it holds {', '.join(map(str, steps))}{also}"
        )
    newest = max(int(folder.name) for folder in step_folders(directory))
    if step is None and newest != steps[-1]:
        _LOG.warning("%s/%s lacks files; taking step %s instead", directory, newest, steps[-1])
    return directory / str(steps[-1] if step is None else step)


def _is_step_name(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name
