"""A run's checkpoints: saved in the background, committed atomically, the newest few kept."""

import contextlib
import datetime
import importlib.metadata
import logging
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

import moe_jax
from moe_jax.checkpoint import layout
from moe_jax.checkpoint.errors import CheckpointError, as_checkpoint_error
from moe_jax.checkpoint.leaves import describe_leaves
from moe_jax.checkpoint.manifest import Manifest, draft_manifest, write_manifest
from moe_jax.checkpoint.reader import Checkpoint, open_checkpoint

_LOG = logging.getLogger(__name__)
# Orbax renames a step into this folder before its files go, so that no half-deleted step is ever seen.
_DELETED = ".deleted"


class CheckpointStore:
    """The checkpoints folder of one run, for the one process that writes it.

    To read a checkpoint of any run, also one that is being trained, use
    :func:`moe_jax.checkpoint.open_checkpoint`.
    """

    def __init__(self, directory: str | Path, keep: int = 3):
        """Opens `directory`, made if it does not exist, and clears what killed saves left in it.

        `keep` is how many of the newest checkpoints stay. Folders of steps that lack parts are set aside
        under another name, with a warning in the log.

        Raises:
            CheckpointError: the folder cannot be made or written.
        """
        assert keep >= 1, "the newest checkpoint is never deleted"
        self.directory = Path(directory).expanduser().resolve()
        with _writing(f"{self.directory} cannot be used"):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear()
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                    todelete_subdir=_DELETED,
                    cleanup_tmp_directories=True,
                    # Called in the background when all arrays are on disk, before the step gets its name.
                    async_options=ocp.options.AsyncOptions(
                        post_finalization_callback=self._write_pending_manifest,
                        # Else a folder that cannot be made leaves threads behind that wait for minutes.
                        create_directories_asynchronously=False,
                    ),
                ),
            )
        self._newest = self.latest_step()
        self._pending: Manifest | None = None

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Saves `state` as `step`, in the background.

        `state` is a dict of trees of jax.Arrays, "params" among them (or alone: weights only); `meta` is
        JSON (config, data identity, tokenizer). When this returns all arrays are out of the devices' hands,
        so they may be donated. The checkpoint is there once a later save, wait or close has returned; a save
        that is still under way is waited for.

        Raises:
            CheckpointError: a step that is not after the newest one, a leaf that cannot be saved, meta that
                is not JSON, or writing failed (this save, or the one before).
        """
        if layout.PARAMS not in state:
            raise CheckpointError(f"step {step}: the state has no {layout.PARAMS}; it has {sorted(state)}")
        if step < 0 or (self._newest is not None and step <= self._newest):
            raise CheckpointError(
                f"step {step}: cannot be saved in {self.directory}, whose newest step is {self._newest}; "
                "delete later steps, or use another train.run_dir"
            )
        self.wait()
        rest = {name: value for name, value in state.items() if name != layout.PARAMS}
        items = {layout.PARAMS: state[layout.PARAMS]} | ({layout.TRAINING: rest} if rest else {})
        self._pending = draft_manifest(step, items, describe_leaves(state), _made_by(), meta)
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with _writing(f"{self.directory}: step {step} cannot be saved"):
            self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)
        self._newest = step

    def wait(self) -> None:
        """Returns when the save under way, if any, is committed; raises CheckpointError if it failed."""
        with _writing(f"{self.directory}: step {self._newest} could not be saved"):
            self._manager.wait_until_finished()
        self._remove_deleted()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; a save under way is not among them."""
        return layout.list_steps(self.directory)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def open(self, step: int) -> Checkpoint:
        """The checkpoint of `step`; raises CheckpointError if there is none."""
        return open_checkpoint(self.directory, step)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The whole state of `step`; see :meth:`Checkpoint.restore`."""
        return self.open(step).restore(abstract_state)

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The weights of `step` alone; see :meth:`Checkpoint.restore_params`."""
        return self.open(step).restore_params(abstract_params)

    def meta(self, step: int) -> dict[str, Any]:
        """The meta that `step` was saved with."""
        return self.open(step).meta

    def close(self) -> None:
        """Waits for the save under way and ends the background threads; raises as :meth:`wait`."""
        try:
            self.wait()
        finally:
            with _writing(f"{self.directory}: step {self._newest} could not be saved"):
                self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # What ended the block comes first; a failed save then has been reported or follows from it.
        with contextlib.suppress(CheckpointError) if kind else contextlib.nullcontext():
            self.close()

    def _clear(self) -> None:
        if jax.process_index() != 0:
            return
        self._remove_deleted()
        for folder in layout.step_folders(self.directory):
            if not layout.is_complete(folder):
                aside = next(
                    path
                    for number in range(1, 1_000_000)
                    if not (path := folder.with_name(f"{folder.name}.incomplete-{number}")).exists()
                )
                folder.rename(aside)
                _LOG.warning("%s lacks parts of a checkpoint; set aside as %s", folder, aside.name)

    def _write_pending_manifest(self) -> None:
        draft = self._pending
        assert draft is not None
        (unfinished,) = self.directory.glob(f"{draft['step']}{layout.UNFINISHED_MARK}*")
        write_manifest(unfinished, draft)

    def _remove_deleted(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / _DELETED, ignore_errors=True)


def _made_by() -> dict[str, object]:
    devices = jax.devices()
    return {
        "moe_jax": moe_jax.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "orbax-checkpoint")},
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _writing(what: str) -> contextlib.AbstractContextManager[None]:
    return as_checkpoint_error(what, "look for a full disk or missing permissions")
