"""From logical dim names to mesh axes: which part of each array a device holds."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh, PartitionSpec

from moe_jax.config.errors import ConfigError

Rules = Mapping[str, tuple[str, ...]]
"""Logical dim name -> mesh axes that split it (none: the dim is whole everywhere)."""

# Below this an array's parts are too small to be worth a collective of their own.
_MIN_ZERO_ELEMENTS = 8192


def partition_spec(
    label: str, names: tuple[str, ...], shape: tuple[int, ...], rules: Rules, mesh: Mesh
) -> PartitionSpec:
    """The PartitionSpec of one array. Axes of size 1 are left out.

    Raises ConfigError for a logical name that the rules lack, a mesh axis used twice, and a size that its
    axes do not divide, naming ``label``.
    """
    assert len(names) == len(shape), (label, names, shape)
    entries, used = [], {}
    for name, size in zip(names, shape, strict=True):
        if name not in rules:
            raise ConfigError(
                f"{label}: no sharding rule for the dim {name!r}; the rules know {', '.join(rules)}"
            )
        axes = tuple(axis for axis in rules[name] if mesh.shape[axis] > 1)
        for axis in axes:
            if axis in used:
                raise ConfigError(
                    f"{label}: the rules put the mesh axis {axis!r} on two dims, {used[axis]!r} and {name!r};"
                    f" an axis can split one dim of an array"
                )
            used[axis] = name
        parts = int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))
        if size % parts:
            raise ConfigError(
                f"{label}: the dim {name!r} of size {size} cannot be cut in {parts} over {' x '.join(axes)};"
                f" choose a size that {parts} divides, or a smaller axis"
            )
        entries.append(_entry(axes))
    return PartitionSpec(*entries)


def _entry(axes: tuple[str, ...]) -> tuple[str, ...] | str | None:
    return axes if len(axes) > 1 else next(iter(axes), None)


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """Mesh axes a spec uses."""
    entries = [(entry,) if isinstance(entry, str) else (entry or ()) for entry in spec]
    return tuple(axis for entry in entries for axis in entry)


@dataclass(frozen=True)
class LeafLayout:
    """How one parameter lies on the mesh, in use and at rest."""

    shape: tuple[int, ...]
    spec: PartitionSpec
    """In use: as the model math wants it."""
    rest_spec: PartitionSpec
    """At rest (master weights, optimizer state): split further over the axes that merely replicate it."""
    rest_dim: int | None
    """The dim that is split further, None if none is."""
    rest_axes: tuple[str, ...]
    """The axes that split it."""
    sum_axes: tuple[str, ...]
    """Axes, besides rest_axes, over which parts of the gradient are summed."""


def leaf_layout(
    label: str,
    names: tuple[str, ...],
    shape: tuple[int, ...],
    rules: Rules,
    mesh: Mesh,
    rest_axes: tuple[str, ...],
) -> LeafLayout:
    """Layout of one parameter; at rest it is split over those of ``rest_axes`` that replicate it in use.

    This is ZeRO's sharding of optimizer state (Rajbhandari et al. 2020, stage 1). Arrays too small, and
    arrays with no whole dim that the axes divide, stay replicated.
    """
    spec = partition_spec(label, names, shape, rules, mesh)
    replicated = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in axes_of(spec))
    extra = tuple(axis for axis in rest_axes if axis in replicated)
    dim = _rest_dim(spec, shape, int(np.prod([mesh.shape[axis] for axis in extra], dtype=int)))
    if not extra or dim is None:
        return LeafLayout(shape, spec, spec, None, (), replicated)
    entries = [*spec]
    entries[dim] = _entry(extra)
    rest = tuple(axis for axis in replicated if axis not in extra)
    return LeafLayout(shape, spec, PartitionSpec(*entries), dim, extra, rest)


def _rest_dim(spec: PartitionSpec, shape: tuple[int, ...], parts: int) -> int | None:
    """The largest whole dim that ``parts`` divides; the later one among equals."""
    if int(np.prod(shape)) < _MIN_ZERO_ELEMENTS:
        return None
    whole = [d for d, size in enumerate(shape) if spec[d] is None and size % parts == 0]
    return max(whole, key=lambda d: (shape[d], d), default=None)
