"""A comparison as one HTML page that needs nothing else: styles and figures are inside."""

from dataclasses import dataclass
from pathlib import Path

import jinja2

from moe_jax.compare import figures
from moe_jax.compare.comparison import Comparison
from moe_jax.compare.curves import Curve
from moe_jax.compare.template import PAGE
from moe_jax.compare.words import collective_rows, generated_texts, summary_rows
from moe_jax.deployments.placement import placement_rows
from moe_jax.train.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Figure:
    name: str
    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class _Text:
    names: str
    prompt: str
    generated: str


_SPEED_NOTE = """Speeds are medians of this run on this machine; in brackets the ratio to the first column.
Emulated devices share the machine's cores, so their speed says nothing of real ones. Bytes are per device."""
_CURVES = """Mean loss of each optimizer step as the runs logged it; later runs are dashed, so that equal
curves show both. With several runs the lower panel gives how far each lies from the first (log scale; no
point where they are equal)."""
_LOAD = """Times each expert was chosen in this batch, over the mean of its layer: 1 (white) is perfect
balance. Deployments with the same counts share a panel."""
_PLACEMENT = """Which device holds which experts of which layers, read from the shardings of the arrays in
use. A colour is an expert (the first of several), grey is all of them; a fraction is the part of each
expert's hidden width that is held."""
_BYTES = """What a device sends to others in one run of each compiled program. In brackets: what it would send
in addition if every bucket of the exchange overflowed; none of it while routing is balanced."""


def write_report(
    path: Path, comparison: Comparison, curves: list[Curve], tokenizer: Tokenizer | None
) -> None:
    """Write the page; without curves it has no figure of them."""
    path.write_text(render_report(comparison, curves, tokenizer), encoding="utf-8")


def render_report(comparison: Comparison, curves: list[Curve], tokenizer: Tokenizer | None) -> str:
    """The page's text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    names = [entry.name for entry in comparison.entries]
    return environment.from_string(PAGE).render(
        title=" against ".join((names[0], " and ".join(names[1:]))),
        about=_about(comparison),
        verdict=comparison.verdict(),
        failures=comparison.failures,
        names=names,
        summary=summary_rows(comparison),
        collectives=collective_rows(comparison),
        placement=[
            (entry.name, row)
            for entry in comparison.entries
            for row in placement_rows(entry.measurement.placement)
        ],
        figures=_figures(comparison, curves),
        texts=_texts(comparison, tokenizer),
        speed_note=_SPEED_NOTE,
    )


def _figures(comparison: Comparison, curves: list[Curve]) -> list[_Figure]:
    drawn = [
        _Figure("load", "Expert load by layer", figures.expert_load(comparison), _LOAD),
        _Figure("placement", "Placement of the experts", figures.placement_grid(comparison), _PLACEMENT),
        _Figure("bytes", "Bytes by collective", figures.collective_bytes(comparison), _BYTES),
    ]
    if curves:
        drawn.insert(0, _Figure("loss", "Loss curves", figures.loss_curves(curves), _CURVES))
    return drawn


def _about(comparison: Comparison) -> str:
    model = comparison.model
    return (
        f"Checkpoint {comparison.checkpoint}, step {comparison.step}: {model.num_layers} layers of "
        f"{model.num_experts} experts, top-{model.top_k}, width {model.d_model}, in {model.compute_dtype}. "
        f"Batch: {comparison.num_sequences} sequences of {comparison.seq_len} {comparison.tokens} tokens. "
        f"{comparison.machine}."
    )


def _texts(comparison: Comparison, tokenizer: Tokenizer | None) -> list[_Text]:
    """By prompt, each continuation once, with the names of the deployments that gave it."""
    names_of: dict[tuple[int, str, str], list[str]] = {}
    for entry in comparison.entries:
        for index, (prompt, generated) in enumerate(generated_texts(entry, tokenizer)):
            names_of.setdefault((index, prompt, generated), []).append(entry.name)
    return [
        _Text(", ".join(names), prompt, generated)
        for (_, prompt, generated), names in sorted(names_of.items())
    ]
