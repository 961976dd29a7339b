"""Which devices take part in a collective together, from each of the ways XLA writes it.

Devices are numbered by their position in the program's device assignment (0 to N-1), not by hardware id.
"""

import re
from itertools import pairwise
from math import prod

import numpy as np

from moe_jax.plan.hlo_text import HloError

Groups = tuple[tuple[int, ...], ...]


def parse_groups(text: str, num_devices: int) -> Groups:
    """Groups of devices, in the order written, from a ``replica_groups`` attribute.

    Reads ``{{0,1},{2,3}}``; ``{}`` (all `num_devices` in one group); the iota forms ``[2,8]<=[16]`` and
    ``[8,2]<=[2,8]T(1,0)``; and the mesh form ``mesh['a'=2,'b'=8], device_ids=(...) {'b','a':(2)4}``.
    Raises :class:`HloError` on anything else.
    """
    if text.startswith("{"):
        return parse_lists(text) or (tuple(range(num_devices)),)
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if match := _IOTA.fullmatch(text):
        return _rows(_iota(match["source"], match["order"]).reshape(_integers(match["shape"])))
    raise HloError(f"unknown form of replica_groups: {text!r}")


def parse_lists(text: str) -> Groups:
    """``{{0,1},{2,3}}``, as written for replica groups and for source-target pairs."""
    if not re.fullmatch(r"\{[\d,{}\s]*\}", text):
        raise HloError(f"not a list of lists of devices: {text!r}")
    return tuple(_integers(group) for group in re.findall(r"\{([\d,\s]*)\}", text[1:-1]))


_IOTA = re.compile(r"\[(?P<shape>[\d,]+)\]<=\[(?P<source>[\d,]+)\](T\((?P<order>[\d,]+)\))?")
_MESH = re.compile(r"mesh\[(?P<sizes>[^\]]*)\](, device_ids=\((?P<devices>.*)\))? \{(?P<axes>[^}]*)\}")
_MESH_IOTA = re.compile(r"\[(?P<source>[\d,]+)\](T\((?P<order>[\d,]+)\))?")
_AXIS = re.compile(r"['\"](?P<name>[^'\"]*)['\"](:\((?P<before>\d+)\)(?P<size>\d+))?")


def _mesh_groups(text: str) -> Groups:
    """Groups over named axes, or over a factor ``:(before)size`` of one, of a mesh of devices."""
    match = _MESH.fullmatch(text)
    if match is None:
        raise HloError(f"unknown form of replica_groups: {text!r}")
    sizes = {name: int(size) for name, size in re.findall(r"['\"]([^'\"]*)['\"]=(\d+)", match["sizes"])}
    axes = list(_AXIS.finditer(match["axes"]))
    if any(axis["name"] not in sizes for axis in axes):
        raise HloError(f"replica_groups over an axis that its mesh does not have: {text!r}")
    factors = {name: _factors(size, [a for a in axes if a["name"] == name]) for name, size in sizes.items()}
    # One dim per factor, named (axis, product of the factors before it in that axis).
    names = [(name, before) for name in sizes for before, _ in factors[name]]
    devices = _mesh_devices(match["devices"], prod(sizes.values()))
    devices = devices.reshape([size for name in sizes for _, size in factors[name]])
    grouped = []
    for axis in axes:
        first = int(axis["before"] or 1)
        last = first * int(axis["size"] or sizes[axis["name"]])
        grouped += [
            i for i, (name, before) in enumerate(names) if name == axis["name"] and first <= before < last
        ]
    others = [i for i in range(len(names)) if i not in grouped]
    group_size = prod(devices.shape[i] for i in grouped)
    return _rows(devices.transpose([*others, *grouped]).reshape(-1, group_size))


def _factors(axis_size: int, parts: list[re.Match[str]]) -> list[tuple[int, int]]:
    """Cut an axis where the named parts of it begin and end: (product of sizes before, size), major first."""
    cuts = {1, axis_size}
    for part in parts:
        if part["size"]:
            cuts |= {int(part["before"]), int(part["before"]) * int(part["size"])}
    bounds = sorted(cuts)
    return [(low, high // low) for low, high in pairwise(bounds)] or [(1, 1)]


def _mesh_devices(text: str | None, num_devices: int) -> np.ndarray:
    """The mesh's devices, flat: none given means in order; else an iota form or the list itself."""
    if text is None:
        return np.arange(num_devices)
    if match := _MESH_IOTA.fullmatch(text):
        return _iota(match["source"], match["order"]).reshape(-1)
    return np.array(_integers(text))


def _iota(source: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... laid out by `source`, its dims permuted by `order`."""
    dims = _integers(source)
    return np.arange(prod(dims)).reshape(dims).transpose(_integers(order) if order else None)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())


def _rows(devices: np.ndarray) -> Groups:
    return tuple(tuple(int(device) for device in row) for row in devices)
