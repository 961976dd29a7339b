"""Which device holds which experts of which layers: read from arrays' shardings, not from any config."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import jax
from jax.sharding import Mesh

# Dims of each expert matrix: w_up and w_gate [N, E, D, F], w_down [N, E, F, D].
_DIMS = {
    "w_up": ("layers", "experts", "width", "hidden"),
    "w_gate": ("layers", "experts", "width", "hidden"),
    "w_down": ("layers", "experts", "hidden", "width"),
}
Span = tuple[int, int]
"""First index, and one past the last."""


class PlacementError(ValueError):
    """Expert weights that do not lie as promised; the message names a device and what it holds."""


@dataclass(frozen=True)
class Held:
    """The part of the experts' weights that one device holds: a block, as a range of each dim."""

    device: int
    """Place of the device in the mesh, counted in the order of its axes."""
    coordinates: tuple[int, ...]
    """Its place on each mesh axis."""
    layers: Span
    experts: Span
    hidden: Span
    """Part of the experts' hidden width."""
    width: Span
    """Part of the model width; all of it unless the weights are held at rest."""


@dataclass(frozen=True)
class Placement:
    """Where the experts of a model lie."""

    axes: dict[str, int]
    """Mesh axis -> size."""
    num_layers: int
    num_experts: int
    expert_hidden: int
    d_model: int
    held: tuple[Held, ...]
    """One entry for each device of the mesh, in its order."""

    def is_whole(self, held: Held) -> bool:
        """Whether a device has all of each expert that it holds a part of."""
        return held.hidden == (0, self.expert_hidden) and held.width == (0, self.d_model)


def expert_placement(params: dict, mesh: Mesh) -> Placement:
    """What each device of `mesh` has of ``params["blocks"]["experts"]``.

    The leaves are arrays, or their descriptions with shardings; no values are read. All matrices of the
    experts must be cut alike.
    Raises PlacementError if they are not, or if an array does not lie on the devices of the mesh.
    """
    matrices = params["blocks"]["experts"]
    spans = {name: _spans(name, array, mesh) for name, array in matrices.items()}
    shape = dict(zip(_DIMS["w_up"], matrices["w_up"].shape, strict=True))
    held = []
    for index in range(mesh.devices.size):
        by_matrix = {name: by_device[index] for name, by_device in spans.items()}
        first = by_matrix["w_up"]
        for name, other in by_matrix.items():
            if other != first:
                raise PlacementError(
                    f"device {index} holds {_describe(first)} of w_up, but {_describe(other)} of {name}; the "
                    f"matrices of an expert must be cut alike"
                )
        coordinates = tuple(int(i) for i in _coordinates(index, tuple(mesh.shape.values())))
        held.append(Held(index, coordinates, **first))
    return Placement(
        axes=dict(mesh.shape),
        num_layers=shape["layers"],
        num_experts=shape["experts"],
        expert_hidden=shape["hidden"],
        d_model=shape["width"],
        held=tuple(held),
    )


def check_one_expert_per_device(placement: Placement) -> None:
    """Refuse a placement in which a device holds more, or less, than one whole expert of each of its layers.

    Every expert of every layer must be held, and all by equally many devices. Raises PlacementError.
    """
    for held in placement.held:
        if held.experts[1] - held.experts[0] != 1 or not placement.is_whole(held):
            raise PlacementError(
                f"device {held.device} holds {_describe(_ranges(held))}, not one whole expert per layer"
            )
    copies = {(n, e): 0 for n in range(placement.num_layers) for e in range(placement.num_experts)}
    for held in placement.held:
        for layer in range(*held.layers):
            copies[layer, held.experts[0]] += 1
    if len(set(copies.values())) > 1:
        few, many = min(copies, key=lambda at: copies[at]), max(copies, key=lambda at: copies[at])
        raise PlacementError(
            f"expert {few[1]} of layer {few[0]} is held by {copies[few]} devices, and expert {many[1]} of "
            f"layer {many[0]} by {copies[many]}; all must be held by equally many"
        )


@dataclass(frozen=True)
class Row:
    """Devices with the same layers, as text; `experts` and `hidden` go by device unless all are alike."""

    devices: str
    layers: str
    experts: str
    hidden: str


def placement_rows(placement: Placement) -> list[Row]:
    """The placement as a table, device x layer -> experts; devices with the same layers share a row.

    Nothing is left out: where the devices of a row hold different experts, these are listed in the order of
    the devices, as in ``0 | 1 | 2``; equal neighbours as in ``2 devices: 0-3``, what recurs as in
    ``8 times: 0-31 | 32-63``.
    """
    rows = []
    by_layers = sorted(placement.held, key=lambda held: held.layers)
    for layers, group in groupby(by_layers, key=lambda held: held.layers):
        members = list(group)
        rows.append(
            Row(
                devices=_numbers(held.device for held in members),
                layers=span_text(layers, placement.num_layers),
                experts=_by_device([span_text(held.experts, placement.num_experts) for held in members]),
                hidden=_by_device([_part_text(held, placement) for held in members]),
            )
        )
    return rows


def span_text(span: Span, size: int | None = None) -> str:
    """A span in words: ``3``, ``0-3``, or ``all 16`` for the whole of a dim whose size is given."""
    if size is not None and size > 1 and span == (0, size):
        return f"all {size}"
    return str(span[0]) if span[1] - span[0] == 1 else f"{span[0]}-{span[1] - 1}"


def _spans(name: str, array: jax.Array, mesh: Mesh) -> list[dict[str, Span]]:
    """For every device of the mesh, the block of one matrix that it holds, by name of the dim."""
    index_of = array.sharding.devices_indices_map(array.shape)
    if set(index_of) != set(mesh.devices.flat):
        raise PlacementError(
            f"{name} lies on {len(index_of)} devices, not on the {mesh.devices.size} of the mesh"
        )
    spans = []
    for device in mesh.devices.flat:
        bounds = [part.indices(size)[:2] for part, size in zip(index_of[device], array.shape, strict=True)]
        block = dict(zip(_DIMS[name], bounds, strict=True))
        spans.append({dim: block[dim] for dim in _DIMS["w_up"]})
    return spans


def _coordinates(index: int, sizes: Sequence[int]) -> list[int]:
    """Place on each axis of the device at `index`, the last axis counting fastest."""
    places = []
    for size in reversed(sizes):
        index, place = divmod(index, size)
        places.append(place)
    return places[::-1]


def _ranges(held: Held) -> dict[str, Span]:
    return {name: getattr(held, name) for name in _DIMS["w_up"]}


def _describe(spans: dict[str, Span]) -> str:
    return ", ".join(f"{name} {span_text(span)}" for name, span in spans.items())


def _part_text(held: Held, placement: Placement) -> str:
    text = span_text(held.hidden, placement.expert_hidden)
    if held.width != (0, placement.d_model):
        text += f" x width {span_text(held.width)}"
    return text


def _numbers(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs shortened: ``0-3, 8-11``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _by_device(texts: list[str]) -> str:
    if len(set(texts)) == 1:
        return texts[0]
    for period in range(2, len(texts) // 2 + 1):
        if texts == texts[:period] * (len(texts) // period):
            return f"{len(texts) // period} times: {_by_device(texts[:period])}"
    runs = [(text, len(list(run))) for text, run in groupby(texts)]
    return " | ".join(text if count == 1 else f"{count} devices: {text}" for text, count in runs)
