"""The collectives a compiled XLA program executes: kind, how often, how many bytes, among which devices.

This reads what the compiler made of a program, not what was asked of it, so it shows collectives that the
partitioner added, and dtypes that a backend widened (XLA:CPU moves bf16 as f32).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from moe_jax.plan.hlo_text import ArrayShape, HloError, Instruction, Module, parse_module
from moe_jax.plan.replica_groups import Groups, parse_groups, parse_lists

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)


@dataclass(frozen=True)
class Collective:
    """One collective instruction, at one place it is reached from; bytes are per device and execution."""

    kind: str
    """One of :data:`KINDS`; a start/done pair is one collective."""
    count: int
    """Executions in one run of the program, trip counts of the loops around it multiplied in."""
    conditional: bool
    """Inside a branch of a conditional: it runs at most `count` times."""
    trips_known: bool
    """False when a loop around it has no known trip count: it is counted as one, `count` is a lower bound."""
    dtype: str
    """XLA's name of the dtype moved; several joined by "+"."""
    num_operands: int
    """Arrays a device puts in: several where the compiler merged collectives into one, and in the form of
    all-to-all that has one array for each peer."""
    operand_bytes: int
    """What a device puts in. ragged-all-to-all: the whole rows buffer, filled or not."""
    result_bytes: int
    """What a device gets out."""
    sent_bytes: float
    """What a device sends to others by a ring (reductions, gathers) or pairwise (exchanges).
    ragged-all-to-all: as if the rows buffer were full and spread evenly. collective-permute: what each
    sending device sends."""
    group_size: int
    """Devices that take part together (the largest group); collective-permute: all that send or receive."""
    groups: Groups
    """Devices by group, as positions in the device assignment; empty for collective-permute."""
    source_target_pairs: tuple[tuple[int, int], ...]
    """(sender, receiver) pairs of a collective-permute; empty for all else."""
    op_name: str
    """Where in the jax program it came from, "" if the compiler made it."""


@dataclass(frozen=True)
class KindSummary:
    """All collectives of one kind. Bytes are per device and run of the program: executions times bytes."""

    count: int = 0
    """Executions outside of conditionals."""
    operand_bytes: int = 0
    """Bytes a device puts in, outside of conditionals."""
    sent_bytes: float = 0.0
    """Bytes a device sends, outside of conditionals."""
    conditional_count: int = 0
    """Executions inside conditionals, at most."""
    conditional_operand_bytes: int = 0
    """Bytes a device puts in, inside conditionals, at most."""
    conditional_sent_bytes: float = 0.0
    """Bytes a device sends, inside conditionals, at most."""
    trips_known: bool = True
    """False when a loop with an unknown trip count was counted once."""


def collectives(hlo_text: str | None) -> list[Collective]:
    """Read the collectives out of ``jax.jit(f).lower(...).compile().as_text()``, in program order.

    Raises :class:`~moe_jax.plan.hlo_text.HloError` on text it cannot read in full, on None (what jax gives
    for a backend without text), and on point-to-point ``send`` between devices, which it cannot count.
    """
    if hlo_text is None:
        raise HloError("the compiled program has no text: its backend does not give any")
    walk = _Walk(parse_module(hlo_text))
    walk.visit(walk.module.entry, _Context())
    return walk.found


def summary(found: Iterable[Collective]) -> dict[str, KindSummary]:
    """Add up collectives by kind; kinds that do not occur are left out."""
    totals: dict[str, KindSummary] = {}
    for one in sorted(found, key=lambda one: KINDS.index(one.kind)):
        total = totals.get(one.kind, KindSummary())
        prefix = "conditional_" if one.conditional else ""
        added = {
            "count": one.count,
            "operand_bytes": one.count * one.operand_bytes,
            "sent_bytes": one.count * one.sent_bytes,
        }
        changes = {prefix + name: getattr(total, prefix + name) + value for name, value in added.items()}
        totals[one.kind] = replace(total, **changes, trips_known=total.trips_known and one.trips_known)
    return totals


@dataclass(frozen=True)
class _Context:
    """How often, and how surely, a computation runs."""

    count: int = 1
    conditional: bool = False
    trips_known: bool = True


class _Walk:
    """Goes through a program as it would run and collects what it meets."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.found: list[Collective] = []
        self._holding: dict[str, bool] = {}

    def visit(self, computation: str, context: _Context) -> None:
        body = self._body(computation)
        for instruction in body.values():
            kind = _kind(instruction)
            if kind is not None:
                self.found.append(_collective(kind, instruction, body, self.module.num_devices, context))
            for callee, callee_context in _callees(instruction, context):
                if self._holds_collectives(callee):
                    self.visit(callee, callee_context)

    def _holds_collectives(self, computation: str) -> bool:
        """Whether there is anything to count in a computation or below it (most fusions hold nothing)."""
        if computation not in self._holding:
            self._holding[computation] = any(
                _kind(instruction) is not None
                or any(self._holds_collectives(callee) for callee, _ in _callees(instruction, _Context()))
                for instruction in self._body(computation).values()
            )
        return self._holding[computation]

    def _body(self, computation: str) -> dict[str, Instruction]:
        try:
            return self.module.computations[computation]
        except KeyError:
            raise HloError(f"the program calls computation {computation!r} but does not hold it") from None


_CALLED = ("to_apply", "calls", "called_computations")
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_TRIP_COUNT = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')


def _callees(instruction: Instruction, context: _Context) -> list[tuple[str, _Context]]:
    """The computations an instruction runs, and how often if it is itself met in `context`."""
    if instruction.opcode == "while":
        trips = _TRIP_COUNT.search(instruction.attributes.get("backend_config", ""))
        if trips is None:
            once = replace(context, trips_known=False)
            return [*_named(instruction, ("condition",), once), *_named(instruction, ("body",), once)]
        num_trips = int(trips[1])
        tests = replace(context, count=context.count * (num_trips + 1))  # the last test ends the loop
        rounds = replace(context, count=context.count * num_trips)
        return [*_named(instruction, ("condition",), tests), *_named(instruction, ("body",), rounds)]
    if instruction.opcode == "conditional":
        return _named(instruction, _BRANCHES, replace(context, conditional=True))
    if instruction.opcode in ("async-update", "async-done"):
        return []  # they may name again what their async-start runs
    return _named(instruction, _CALLED, context)


def _named(
    instruction: Instruction, attributes: tuple[str, ...], context: _Context
) -> list[tuple[str, _Context]]:
    lists = (instruction.attributes.get(attribute, "").strip("{}") for attribute in attributes)
    return [
        (name.strip().lstrip("%"), context) for names in lists for name in names.split(",") if name.strip()
    ]


def _kind(instruction: Instruction) -> str | None:
    """The kind of collective an instruction begins, None if it begins none."""
    opcode = instruction.opcode
    if opcode == "send" and instruction.attributes.get("is_host_transfer") != "true":
        raise HloError(
            f"cannot count point-to-point transfers ({instruction.name!r} is a send between devices)"
        )
    kind = opcode.removesuffix("-start")
    if kind == "collective-broadcast":
        raise HloError(f"cannot count a collective-broadcast ({instruction.name!r})")
    return kind if kind in KINDS else None


def _collective(
    kind: str, instruction: Instruction, body: dict[str, Instruction], num_devices: int, context: _Context
) -> Collective:
    missing = [name for name in instruction.operands if name not in body]
    if missing:
        raise HloError(
            f"{kind} {instruction.name!r} has operands {missing} that its computation does not hold"
        )
    operands = [shape for name in instruction.operands for shape in body[name].shapes]
    results = list(instruction.shapes)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        results = results[len(operands) : 2 * len(operands)]  # (operands, results, scratch of the backend)
    if kind == "ragged-all-to-all":
        operands, results = operands[:1], results[:1]  # the others: result buffer, offsets, sizes
    pairs: tuple[tuple[int, int], ...] = ()
    groups: Groups = ()
    if kind == "collective-permute":
        pairs = tuple(
            (source, target) for source, target in parse_lists(instruction.attributes["source_target_pairs"])
        )
        group_size = len({device for pair in pairs for device in pair})
    else:
        groups = parse_groups(_groups_text(instruction), num_devices)
        group_size = max(len(group) for group in groups)
    if kind != "ragged-all-to-all":
        _check_sizes(kind, instruction, operands, results, group_size)
    operand_bytes = sum(shape.num_bytes for shape in operands)
    result_bytes = sum(shape.num_bytes for shape in results)
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.attributes.get("metadata", ""))
    return Collective(
        kind=kind,
        count=context.count,
        conditional=context.conditional,
        trips_known=context.trips_known,
        dtype="+".join(sorted({shape.dtype for shape in operands})),
        num_operands=len(operands),
        operand_bytes=operand_bytes,
        result_bytes=result_bytes,
        sent_bytes=_sent_bytes(kind, operand_bytes, result_bytes, group_size, pairs),
        group_size=group_size,
        groups=groups,
        source_target_pairs=pairs,
        op_name=op_name[1] if op_name else "",
    )


def _groups_text(instruction: Instruction) -> str:
    """The whole replica_groups attribute; its mesh form holds a comma, and so was cut in two."""
    text = instruction.attributes.get("replica_groups", "{}")
    if text.startswith("mesh[") and "device_ids" in instruction.attributes:
        text += f", device_ids={instruction.attributes['device_ids']}"
    return text


def _sent_bytes(
    kind: str, operand_bytes: int, result_bytes: int, group_size: int, pairs: tuple[tuple[int, int], ...]
) -> float:
    others = group_size - 1
    if kind == "collective-permute":
        return float(operand_bytes) if any(source != target for source, target in pairs) else 0.0
    if kind == "all-gather":
        return float(others * operand_bytes)
    if kind == "all-reduce":  # reduce-scatter, then all-gather; on TPU bf16 may enter and f32 sums travel
        return 2 * others * result_bytes / group_size
    return others * operand_bytes / group_size


def _check_sizes(
    kind: str,
    instruction: Instruction,
    operands: list[ArrayShape],
    results: list[ArrayShape],
    group_size: int,
) -> None:
    """Refuse shapes that contradict the kind and group: something was then not read right."""
    put_in = sum(shape.num_elements for shape in operands)
    got_out = sum(shape.num_elements for shape in results)
    expected = {"all-gather": put_in * group_size, "reduce-scatter": put_in / group_size}.get(kind, put_in)
    if got_out != expected:
        raise HloError(
            f"{kind} {instruction.name!r} among {group_size} devices turns {put_in} elements into {got_out}; "
            f"expected {expected}"
        )
