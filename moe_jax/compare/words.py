"""A comparison in words: the rows that both the printed table and the report show."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe_jax.compare.comparison import Comparison, Entry
from moe_jax.compare.measure import ProgramCost
from moe_jax.config import mesh_label
from moe_jax.plan.hlo import KindSummary
from moe_jax.train.tokenizer import Tokenizer

PROGRAMS = {"forward": "forward", "gradients": "loss + gradients"}
"""Field of a Measurement -> name of the program."""


@dataclass(frozen=True)
class TableRow:
    """One line of the comparison: what is compared, and a cell for each deployment."""

    label: str
    cells: list[str]


def summary_rows(comparison: Comparison) -> list[TableRow]:
    """Results, speed, memory and routing of each deployment."""
    rows: list[tuple[str, Callable[[Entry], str]]] = [
        ("mesh", _mesh),
        ("loss", lambda entry: f"{entry.measurement.terms['loss']:.7f}"),
        ("  relative difference", lambda entry: _difference(entry, lambda d: f"{max(d.terms.values()):.1e}")),
        ("max |logit difference|", lambda entry: _difference(entry, lambda d: f"{d.max_logit:.1e}")),
        ("  over largest |logit|", lambda entry: _difference(entry, lambda d: f"{d.max_logit_relative:.1e}")),
        ("gradients, relative difference", lambda e: _difference(e, lambda d: f"{d.worst_gradient[1]:.1e}")),
        ("  largest in", lambda entry: _difference(entry, lambda d: d.worst_gradient[0])),
        ("chosen experts equal", lambda entry: _difference(entry, lambda d: share(d.experts_equal))),
        ("generated text equal", lambda entry: _difference(entry, lambda d: _text_equal(d.text_equal))),
        ("forward, tokens/s", lambda e: _speed(e.measurement.forward, e.forward_speed)),
        ("loss + gradients, tokens/s", lambda e: _speed(e.measurement.gradients, e.gradients_speed)),
        ("weights a device, in use", lambda entry: size(entry.measurement.in_use_bytes)),
        ("  at rest (master weights)", lambda entry: size(entry.measurement.at_rest_bytes)),
        ("peak temporaries, forward", lambda entry: _temporary(entry.measurement.forward)),
        ("  loss + gradients", lambda entry: _temporary(entry.measurement.gradients)),
        ("exchange rounds, by layer", lambda entry: _runs(entry.measurement.rounds_N)),
        ("expert load worst / mean, by layer", _load),
    ]
    return [TableRow(label, [cell(entry) for entry in comparison.entries]) for label, cell in rows]


def collective_rows(comparison: Comparison) -> list[TableRow]:
    """For each program and kind of collective: how often, and the bytes a device sends."""
    rows = []
    for field, program in PROGRAMS.items():
        costs: list[ProgramCost] = [getattr(entry.measurement, field) for entry in comparison.entries]
        kinds = dict.fromkeys(kind for cost in costs for kind in cost.collectives)
        for kind in kinds:
            rows.append(
                TableRow(f"{program}: {kind}", [_collective(cost.collectives.get(kind)) for cost in costs])
            )
        totals = [sum(one.sent_bytes for one in cost.collectives.values()) for cost in costs]
        rows.append(TableRow(f"{program}: sent in all, at least", [size(total) for total in totals]))
    return rows


def generated_texts(entry: Entry, tokenizer: Tokenizer | None) -> list[tuple[str, str]]:
    """Each prompt and what the deployment generated after it: as text, or as ids without a tokenizer."""

    def text(ids: list[int]) -> str:
        return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(np.asarray(ids))

    pairs = zip(entry.prompt_ids, entry.generated_ids, strict=True)
    return [(text(prompt), text(generated)) for prompt, generated in pairs]


def size(num_bytes: float) -> str:
    """Bytes in decimal units: ``1.05 MB``."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
    return f"{num_bytes / 1000:.3g} TB"


def share(value: float) -> str:
    """A share in percent that is 100% only when all is equal, and 0% only when nothing is."""
    if value in (0, 1):
        return f"{value:.0%}"
    return f"{min(max(100 * value, 0.001), 99.999):.5g}%"


def _mesh(entry: Entry) -> str:
    count = entry.measurement.num_devices
    return f"{mesh_label(entry.measurement.deployment)}, {count} device{'s' if count > 1 else ''}"


def _difference(entry: Entry, text: Callable) -> str:
    return "reference" if entry.difference is None else text(entry.difference)


def _text_equal(value: float | None) -> str:
    return "not generated" if value is None else share(value)


def _speed(cost: ProgramCost, ratio: float) -> str:
    return f"{cost.tokens_per_s:,.0f} ({ratio:.2f}x)"


def _temporary(cost: ProgramCost) -> str:
    return "unknown" if cost.temporary_bytes is None else size(cost.temporary_bytes)


def _runs(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))


def _load(entry: Entry) -> str:
    counts_NE = np.asarray(entry.measurement.tokens_per_expert_NE)
    return " ".join(f"{ratio:.2f}" for ratio in counts_NE.max(axis=1) / counts_NE.mean(axis=1))


def _collective(found: KindSummary | None) -> str:
    if found is None:
        return "-"
    more = "" if found.trips_known else " or more"
    text = f"{found.count} x, {size(found.sent_bytes)}{more}" if found.count else ""
    if found.conditional_count:
        limit = f"up to {found.conditional_count} x, {size(found.conditional_sent_bytes)}, if needed"
        text = f"{text}; {limit}" if text else limit
    return text
