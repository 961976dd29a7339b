"""One checkpoint, to be read: its meta, its weights, or the whole state, onto any mesh."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from moe_jax.checkpoint import layout
from moe_jax.checkpoint.errors import RECOVER, as_checkpoint_error
from moe_jax.checkpoint.leaves import Leaf, check_fit
from moe_jax.checkpoint.manifest import check_files, read_manifest


def open_checkpoint(path: str | Path, step: int | None = None) -> "Checkpoint":
    """The checkpoint at `path`: a run folder, its checkpoints folder, or one step folder.

    Among several, `step` picks one; None means the newest complete one.

    Raises:
        CheckpointError: nothing there, no complete checkpoint, not this step, damaged, or a newer format.
    """
    return Checkpoint(layout.find_checkpoint(path, step))


class Checkpoint:
    """A committed step folder. No array is read before a restore."""

    def __init__(self, path: Path):
        """Reads the manifest of `path`; raises CheckpointError if it is damaged or of a newer format."""
        self.path = path.resolve()
        self._manifest = read_manifest(path)

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self._manifest["step"]

    @property
    def meta(self) -> dict[str, Any]:
        """What :meth:`CheckpointStore.save` was given as meta, as JSON values."""
        return self._manifest["meta"]

    @property
    def made_by(self) -> dict[str, Any]:
        """Versions, devices and time (UTC) of the save."""
        return self._manifest["made_by"]

    @property
    def leaves(self) -> dict[str, Leaf]:
        """Shape and dtype of every array by name, as in ``params/embed/table``."""
        return self._manifest["leaves"]

    def restore(self, abstract_state: Any) -> Any:
        """The whole state, bit for bit as it was saved.

        `abstract_state` is the state's tree with jax.ShapeDtypeStructs for arrays; their shardings say where
        each array goes, whatever mesh it was saved from. Shapes and dtypes must be those of the checkpoint.

        Raises:
            CheckpointError: the trees do not fit (found before any data is read), or damaged files.
        """
        check_fit(self.leaves, abstract_state, str(self.path))
        rest = {name: value for name, value in abstract_state.items() if name != layout.PARAMS}
        wanted = {layout.PARAMS: abstract_state[layout.PARAMS]} | ({layout.TRAINING: rest} if rest else {})
        read = self._read(wanted)
        state = {layout.PARAMS: read[layout.PARAMS], **read.get(layout.TRAINING, {})}
        return {name: state[name] for name in abstract_state}

    def restore_params(self, abstract_params: Any) -> Any:
        """The weights alone, as :meth:`restore`; the optimizer state is not read from disk."""
        saved = {name: leaf for name, leaf in self.leaves.items() if name.split("/")[0] == layout.PARAMS}
        check_fit(saved, {layout.PARAMS: abstract_params}, str(self.path))
        return self._read({layout.PARAMS: abstract_params})[layout.PARAMS]

    def _read(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """The trees of some items, by item name."""
        # Before orbax: it takes changed bytes for values, and of missing ones it complains by the page.
        with as_checkpoint_error(f"{self.path} cannot be read", RECOVER):
            check_files(self.path, self._manifest, wanted)
            with ocp.StandardCheckpointer() as checkpointer:
                return {item: checkpointer.restore(self.path / item, tree) for item, tree in wanted.items()}
