"""The report's figures, as SVG to be put into an HTML page: no links, no scripts, no fonts to load."""

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax.compare.comparison import Comparison, Entry
from moe_jax.compare.curves import Curve
from moe_jax.compare.words import PROGRAMS, size
from moe_jax.deployments.placement import Held, Placement, span_text
from moe_jax.plan.hlo import KINDS

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": "#8a8f98",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",  # the page's
    "text.color": "#1c2430",
    "axes.labelcolor": "#1c2430",
    "xtick.color": "#3c4450",
    "ytick.color": "#3c4450",
}
# Okabe and Ito's colours, which people with colour-blindness can tell apart.
_COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#b8a600"]
_ROW_INCHES, _MAX_GRID_INCHES, _MIN_TEXT_INCHES = 0.21, 16.0, 0.12
_PANELS_A_ROW, _PANEL_INCHES, _LETTER_INCHES = 3, 2.9, 0.05


def loss_curves(curves: list[Curve]) -> str:
    """Training loss by step, runs over each other; below it, how far each lies from the first."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 4.6 if len(curves) > 1 else 3.2), layout="constrained")
        panels = figure.subplots(2 if len(curves) > 1 else 1, 1, sharex=True, squeeze=False)[:, 0]
        for index, curve in enumerate(curves):
            # Later runs are thinner and dashed, so that equal ones do not hide each other.
            width, dashes = max(1.2, 3.5 - 1.3 * index), "-" if index == 0 else (0, (4, 1 + index))
            panels[0].plot(
                curve.steps, curve.losses, color=_colour(index), lw=width, ls=dashes, label=curve.label
            )
        panels[0].set_ylabel("training loss (nats a token)")
        panels[0].legend(frameon=False)
        if len(curves) > 1:
            _plot_gaps(panels[1], curves)
        panels[-1].set_xlabel("optimizer step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        for panel in panels:
            panel.grid(axis="y", color="#e3e6ea", lw=0.8)
        return _svg(figure, "loss")


def expert_load(comparison: Comparison) -> str:
    """How often each expert of each layer was chosen, over the mean of the layer."""
    groups: dict[str, list[str]] = {}
    loads: dict[str, np.ndarray] = {}
    for entry in comparison.entries:
        counts_NE = np.asarray(entry.measurement.tokens_per_expert_NE, float)
        load_NE = counts_NE / counts_NE.mean(axis=1, keepdims=True)
        groups.setdefault(str(counts_NE.tolist()), []).append(entry.name)
        loads[str(counts_NE.tolist())] = load_NE
    highest = max(1.5, *(float(load_NE.max()) for load_NE in loads.values()))
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=highest)
    num_layers, num_experts = next(iter(loads.values())).shape
    with matplotlib.rc_context(_STYLE):
        height = len(loads) * (1.2 + min(8.0, 0.28 * num_layers))
        figure = Figure(figsize=(9.6, height), layout="constrained")
        panels = figure.subplots(len(loads), 1, squeeze=False)[:, 0]
        for panel, (key, load_NE) in zip(panels, loads.items(), strict=True):
            mesh = panel.pcolormesh(load_NE, cmap="RdBu_r", norm=norm, edgecolor="white", lw=0.6)
            panel.set_title(", ".join(groups[key]), loc="left")
            panel.invert_yaxis()
            panel.set(xlabel="expert", ylabel="layer")
            _index_ticks(panel, num_experts, num_layers)
            bar = figure.colorbar(
                mesh,
                ax=panel,
                label="load / mean of the layer",
                ticks=[0, 0.5, 1, (1 + highest) / 2, highest],
                format="{x:.1f}",
            )
            assert bar.solids is not None, "a colour bar of filled cells"
            bar.solids.set(rasterized=False, edgecolor="face")  # by default it is a bitmap
        return _svg(figure, "load")


def placement_grid(comparison: Comparison) -> str:
    """For each deployment, device x layer: the experts that are held there."""
    entries = comparison.entries
    num_columns = min(_PANELS_A_ROW, len(entries))
    num_rows = -(-len(entries) // num_columns)
    num_devices = max(entry.measurement.num_devices for entry in entries)
    inches = min(_MAX_GRID_INCHES, _ROW_INCHES * max(4, num_devices))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, num_rows * (inches + 0.9)), layout="constrained")
        panels = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
        for panel, entry in zip(panels.flat, entries, strict=False):
            _plot_placement(panel, entry, with_text=inches / num_devices >= _MIN_TEXT_INCHES)
            _index_ticks(panel, entry.measurement.placement.num_layers, num_devices)
            panel.set_ylim(num_devices, 0)
        for panel in panels.flat[len(entries) :]:
            panel.set_axis_off()
        for row in panels:
            row[0].set_ylabel("device")
        return _svg(figure, "placement")


def collective_bytes(comparison: Comparison) -> str:
    """Bytes that a device sends in one run of each program, by kind of collective, stacked."""
    costs = [[getattr(entry.measurement, field) for entry in comparison.entries] for field in PROGRAMS]
    used = {kind for row in costs for cost in row for kind in cost.collectives}
    kinds = [kind for kind in KINDS if kind in used]
    names = [entry.name for entry in comparison.entries]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        panels = figure.subplots(1, len(PROGRAMS), squeeze=False)[0]
        for panel, program, row in zip(panels, PROGRAMS.values(), costs, strict=True):
            bottom = np.zeros(len(names))
            for index, kind in enumerate(kinds):
                sent_mb = np.array([_sent_mb(cost.collectives, kind) for cost in row])
                panel.bar(names, sent_mb, 0.6, bottom=bottom, color=_colour(index), label=kind)
                bottom += sent_mb
            for place, (cost, top) in enumerate(zip(row, bottom, strict=True)):
                panel.annotate(
                    _bar_text(cost.collectives), (place, top), (0, 3), textcoords="offset points",
                    ha="center", va="bottom", fontsize=8,
                )  # fmt: skip
            panel.set_title(program, loc="left")
            panel.set_ylabel("MB sent per device and run")
            panel.set_ylim(0, max(1e-9, float(bottom.max())) * 1.3)
            panel.grid(axis="y", color="#e3e6ea", lw=0.8)
            panel.set_axisbelow(True)
            if sum(map(len, names)) > 40:
                panel.tick_params(axis="x", rotation=30)
        if kinds:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=len(kinds), frameon=False)
        return _svg(figure, "bytes")


def _plot_gaps(panel: Axes, curves: list[Curve]) -> None:
    first = dict(zip(curves[0].steps, curves[0].losses, strict=True))
    notes = []
    for index, curve in enumerate(curves[1:], start=1):
        shared = [
            (step, abs(loss - first[step]))
            for step, loss in zip(curve.steps, curve.losses, strict=True)
            if step in first
        ]
        different = [(step, gap) for step, gap in shared if gap > 0]
        if different:
            panel.plot(*zip(*different, strict=True), ".-", ms=3, lw=1, color=_colour(index))
            panel.set_yscale("log")
        else:
            notes.append(f"{curve.label}: {'equal at all shared steps' if shared else 'no step in common'}")
    panel.set_ylabel(f"|difference| from\n{curves[0].label}")
    panel.text(0.01, 0.95, "\n".join(notes), transform=panel.transAxes, va="top")


def _plot_placement(panel: Axes, entry: Entry, with_text: bool) -> None:
    placement = entry.measurement.placement
    colours = matplotlib.colormaps["rainbow"](np.linspace(0, 1, placement.num_experts))
    for held in placement.held:
        first, last = held.layers
        whole = held.experts == (0, placement.num_experts)
        # Light enough for dark text; one colour for each expert, grey where a device has all of them.
        colour = "#d5dbe3" if whole else 0.45 * colours[held.experts[0]] + 0.55
        panel.barh(held.device + 0.5, last - first, 1.0, left=first, color=colour, edgecolor="white", lw=0.8)
        for layer in range(first + 1, last):
            panel.plot([layer, layer], [held.device, held.device + 1], color="white", lw=0.8)
        if with_text:
            where = ((first + last) / 2, held.device + 0.5)
            # A patch of the cell's colour keeps the lines between layers out of the words.
            patch = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
            text = _held_text(held, placement, _PANEL_INCHES * (last - first) / placement.num_layers)
            panel.text(*where, text, ha="center", va="center", fontsize=7, bbox=patch)
    panel.set_title(entry.name, loc="left")
    panel.set_xlabel("layer")
    panel.set_xlim(0, placement.num_layers)
    panel.spines[["left", "bottom"]].set_visible(False)


def _held_text(held: Held, placement: Placement, inches: float) -> str:
    """The longest way to say what is held that fits into the cell."""
    first, last = held.experts
    numbers, part = span_text(held.experts), ""
    if held.hidden != (0, placement.expert_hidden):
        part = f", 1/{placement.expert_hidden // (held.hidden[1] - held.hidden[0])}"
    words = f"expert{'s' if last - first > 1 else ''} {numbers}{part}"
    for text in (words, numbers + part):
        if len(text) * _LETTER_INCHES <= inches:
            return text
    return ""


def _index_ticks(panel: Axes, num_x: int, num_y: int) -> None:
    """Ticks in the middle of cells, named by their index, as many as can be read."""
    for axis, count, most in ((panel.xaxis, num_x, 16), (panel.yaxis, num_y, 32)):
        shown = range(0, count, -(-count // most))
        axis.set_ticks([index + 0.5 for index in shown], [str(index) for index in shown])
        axis.set_tick_params(length=0)


def _sent_mb(found: dict, kind: str) -> float:
    return found[kind].sent_bytes / 1e6 if kind in found else 0.0


def _bar_text(found: dict) -> str:
    certain = sum(one.sent_bytes for one in found.values())
    more = sum(one.conditional_sent_bytes for one in found.values())
    return size(certain) + (f"\n(+ {size(more)}\nat most)" if more else "")


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element; `name` keeps its ids apart from those of other figures in one page."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same ids every time
        figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'"#([^"]+)"', rf'"#{name}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
