"""The report and the verdict, on comparisons made by hand: no model runs here."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moe_jax.compare.comparison import Comparison, Entry, to_json
from moe_jax.compare.curves import Curve, read_curves
from moe_jax.compare.difference import (
    TOLERANCES,
    Difference,
    difference,
    failures,
    relative_difference,
)
from moe_jax.compare.figures import collective_bytes
from moe_jax.compare.measure import Measurement, Outputs, ProgramCost
from moe_jax.compare.report import render_report
from moe_jax.compare.table import print_comparison
from moe_jax.compare.words import share, size
from moe_jax.config import ConfigError, DeploymentConfig, ModelConfig, parse_deployment
from moe_jax.deployments.placement import Held, Placement
from moe_jax.plan.hlo import KindSummary
from moe_jax.train.tokenizer import ByteTokenizer

MODEL = ModelConfig(num_layers=4, d_model=32, num_heads=8, num_experts=16, expert_hidden=64, vocab_size=272)
FLOAT32 = TOLERANCES["float32"]
EQUAL = Difference({"loss": 0.0, "z_loss": 1e-7}, 1e-6, 1e-7, (3, 2, 1), {"a/w": 1e-7, "b/w": 0.0}, 1.0, 1.0)
VOID = {"meta", "br", "hr", "img", "input", "link"}


def _placement(deployment: DeploymentConfig, num_layers: int = 4) -> Placement:
    """The blocks that a deployment's sizes imply."""
    sizes = {axis: getattr(deployment, axis) for axis in ("pipe", "data", "expert", "tensor")}
    held = []
    for device in range(deployment.num_devices):
        place = tuple(int(i) for i in np.unravel_index(device, tuple(sizes.values())))

        def span(axis: str, total: int, place: tuple = place) -> tuple[int, int]:
            index, part = place[list(sizes).index(axis)], total // sizes[axis]
            return index * part, (index + 1) * part

        spans = (span("pipe", num_layers), span("expert", 16), span("tensor", 64), (0, 32))
        held.append(Held(device, place, *spans))
    return Placement(sizes, num_layers, 16, 64, 32, tuple(held))


def _measurement(name: str, load: int = 8) -> Measurement:
    deployment = parse_deployment(name)
    sent = {"all-reduce": KindSummary(count=2, operand_bytes=10, sent_bytes=2e6)}
    if deployment.expert > 1:
        sent["all-to-all"] = KindSummary(4, 10, 1e6, conditional_count=9, conditional_sent_bytes=3e6)
    cost = ProgramCost(0.5, 4096.0, {} if name == "single" else sent, 10**6)
    counts = [[load] * 8 + [16 - load] * 8 for _ in range(4)]
    terms = {"loss": 5.0, "z_loss": 0.1}
    placement = _placement(deployment)
    return Measurement(
        deployment, deployment.num_devices, terms, cost, cost, 1000, 500, [1, 2, 1, 1], counts, placement
    )


def _comparison(*names: str, found: Difference = EQUAL) -> Comparison:
    entries = []
    for name in names or ("single", "ep16", "tp8pp2"):
        measurement, other = _measurement(name), found if entries else None
        lines = failures(measurement, other, FLOAT32, "single")
        entries.append(Entry(measurement, other, 1.0, 0.5, lines, [[60, 98, 62]], [[60, 47, 98, 62]]))
    return Comparison("runs/a", 7, MODEL, "held-out", 16, 128, "16 devices", FLOAT32, entries)


CURVES = [Curve("a", [1, 2, 3], [5.0, 4.5, 4.2]), Curve("b", [2, 3, 4], [4.5, 4.3, 4.0])]


class _Page(HTMLParser):
    """Checks the nesting of a page and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.figures: dict[str, list[str]] = {}  # id -> its lines of text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = dict(attrs)
        self.ids += [value for name, value in attrs if name == "id" and value]
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            self.references += [values[name] or ""] if name in values else []
        if tag == "figure":
            self.figures[values["id"] or ""] = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "svg" in self.open and "style" not in self.open and data.strip():
            self.figures[list(self.figures)[-1]].append(data.strip())


def test_report_is_whole_and_needs_nothing_else() -> None:
    text = render_report(_comparison(), CURVES, ByteTokenizer())
    page = _Page(text)
    assert list(page.figures) == ["figure-loss", "figure-load", "figure-placement", "figure-bytes"]
    assert page.tags["svg"] == 4
    assert page.tags["figcaption"] == 4
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == page.tags["image"] == 0
    assert [one for one in page.references if not one.startswith("#")] == []
    assert {one[1:] for one in page.references} <= set(page.ids)
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"' <]+", text)) == {
        "http://www.w3.org/2000/svg",  # names of XML namespaces: nothing is fetched
        "http://www.w3.org/1999/xlink",
    }
    assert {found.strip('"') for found in re.findall(r"url\(([^)]*)\)", text)} <= {f"#{i}" for i in page.ids}


def test_figures_show_the_numbers() -> None:
    figures = _Page(render_report(_comparison(), CURVES, None)).figures
    assert {"a", "b", "optimizer step", "training loss (nats a token)"} <= set(figures["figure-loss"])
    placement = figures["figure-placement"]
    assert [line for line in placement if line.startswith("expert ")] == [f"expert {i}" for i in range(16)]
    assert placement.count("experts 0-15") == 1
    assert placement.count("experts 0-15, 1/8") == 16
    assert "single, ep16, tp8pp2" in figures["figure-load"]  # equal counts: one panel
    sent = figures["figure-bytes"]
    assert "MB sent per device and run" in sent
    for program in ("forward", "loss + gradients"):
        labels = sent[: sent.index(program)][-5:]  # over the bars of single, ep16 and tp8pp2
        assert labels == ["0 B", "3 MB", "(+ 3 MB", "at most)", "2 MB"]
    assert {"all-reduce", "all-to-all"} <= set(sent)


def test_bars_are_as_high_as_the_bytes() -> None:
    svg = collective_bytes(_comparison())
    heights: dict[str, list[float]] = {"#0072b2": [], "#e69f00": []}  # of the first two kinds
    for path, colour in re.findall(r'<path d="([^"]+)" clip-path[^>]*style="fill: (#\w+)"', svg):
        y = [float(number) for number in re.findall(r"[ML] \S+ (\S+)", path)]
        heights[colour].append(max(y) - min(y))
    unit = heights["#0072b2"][1] / 2
    assert unit > 10
    for start in (0, 3):  # a bar for single, ep16, tp8pp2 in each panel; MB
        assert heights["#0072b2"][start : start + 3] == pytest.approx([0, 2 * unit, 2 * unit], abs=0.01)
        assert heights["#e69f00"][start : start + 3] == pytest.approx([0, unit, 0], abs=0.01)


def test_load_that_differs_has_a_panel_of_its_own() -> None:
    same = _comparison("single", "ep16")
    other = replace(same.entries[1], measurement=_measurement("ep16", load=3))
    page = _Page(render_report(replace(same, entries=[same.entries[0], other]), [], None))
    assert {"single", "ep16"} <= set(page.figures["figure-load"])


def test_report_without_curves_leaves_their_figure_out() -> None:
    page = _Page(render_report(_comparison(), [], None))
    assert list(page.figures) == ["figure-load", "figure-placement", "figure-bytes"]


@pytest.mark.parametrize(
    "names", [("single", "expert=16,data=16"), ("ep16", "ep8tp2", "pp4ep4", "dp2ep4tp2", "ep8")]
)
def test_report_of_many_devices_or_deployments(names: tuple[str, ...]) -> None:
    page = _Page(render_report(_comparison(*names), CURVES[:1], None))
    assert len(page.figures) == 4


@pytest.mark.parametrize(
    ("name", "num_layers", "words"),
    [("pp4ep4", 4, "experts 12-15"), ("pipe=8", 16, "0-15"), ("pipe=16", 16, None)],
)
def test_words_in_the_placement_fit_their_cells(name: str, num_layers: int, words: str | None) -> None:
    (entry,) = _comparison(name).entries
    placement = _placement(entry.measurement.deployment, num_layers)
    entry = replace(entry, measurement=replace(entry.measurement, placement=placement))
    lines = _Page(render_report(replace(_comparison(), entries=[entry]), [], None)).figures[
        "figure-placement"
    ]
    ranges = Counter(line for line in lines if "-" in line)
    assert ranges[words or ""] == (placement.axes["pipe"] if words else 0)
    assert words or not ranges


def test_generated_text_is_escaped_and_equal_text_shown_once() -> None:
    text = render_report(_comparison(), [], ByteTokenizer())
    assert "<strong>&lt;/b&gt;</strong>" in text
    assert text.count("&lt;/b&gt;") == 1
    _Page(text)


def test_a_failed_comparison_says_so_everywhere(capsys: pytest.CaptureFixture) -> None:
    wrong = replace(EQUAL, max_logit_relative=0.5, gradients={"a/w": 1e-7, "b/w": math.nan})
    comparison = _comparison("single", "ep16", found=wrong)
    expected = [
        "ep16: logits differ from single by 5.0e-01 of the largest, allowed 1.0e-05 (most in sequence 3, "
        "position 2, token id 1)",
        "ep16: gradients of 1 of 2 parameters differ from single, most b/w by nan of its largest, "
        "allowed 1.0e-05",
    ]
    assert comparison.failures == expected
    page = render_report(comparison, [], None)
    assert "DIFFERENT: 2 checks of single against ep16 failed" in page
    assert all(line in page for line in expected)
    print_comparison(comparison, None)
    printed = capsys.readouterr().out
    assert printed.endswith("DIFFERENT: 2 checks of single against ep16 failed\n")
    assert all(f"failed: {line}\n" in printed for line in expected)
    content = json.loads(json.dumps(to_json(comparison), allow_nan=False))
    assert content["equal"] is False
    assert content["entries"][1]["difference"]["gradients"] == {"a/w": 1e-7, "b/w": None}


@pytest.mark.parametrize(
    ("changes", "tolerance", "message"),
    [
        ({}, FLOAT32, ""),
        ({"terms": {"loss": 2e-5}}, FLOAT32, "ep16: loss differs from single by 2.0e-05, allowed 1.0e-05"),
        ({"terms": {"loss": math.nan}}, FLOAT32, "ep16: loss differs from single by nan"),
        ({"text_equal": 0.75}, FLOAT32, "ep16: generated text equals that of single for 75% of the prompts"),
        ({"text_equal": 0.75}, TOLERANCES["bfloat16"], ""),
        ({"max_logit_relative": 0.3}, TOLERANCES["bfloat16"], ""),
        ({"max_logit_relative": 0.6}, TOLERANCES["bfloat16"], "ep16: logits differ"),
        ({"gradients": {"a/w": 1e-9}}, TOLERANCES["float64"], "ep16: gradients of 1 of 1 parameters"),
        ({"experts_equal": 0.9}, FLOAT32, ""),
    ],
)
def test_each_difference_is_held_to_its_tolerance(changes: dict, tolerance, message: str) -> None:
    base = (
        EQUAL if tolerance is not TOLERANCES["float64"] else replace(EQUAL, terms={}, max_logit_relative=0.0)
    )
    lines = failures(_measurement("ep16"), replace(base, **changes), tolerance, "single")
    assert len(lines) == bool(message)
    assert all(line.startswith(message) for line in lines)


def test_few_other_choices_point_to_near_ties() -> None:
    wrong = replace(EQUAL, max_logit_relative=0.1, experts_equal=0.999)
    (line,) = failures(_measurement("ep16"), wrong, FLOAT32, "single")
    assert "; 0.10% of the choices of experts differ, perhaps near ties that rounding tipped: " in line
    (line,) = failures(_measurement("ep16"), replace(wrong, experts_equal=0.5), FLOAT32, "single")
    assert "near ties" not in line


def test_a_broken_promise_of_one_expert_a_device_fails() -> None:
    good = _measurement("ep16")
    assert failures(good, None, FLOAT32, "ep16") == []
    held = good.placement.held
    bad = replace(good.placement, held=(replace(held[0], experts=(0, 2)), *held[1:]))
    (line,) = failures(replace(good, placement=bad), None, FLOAT32, "ep16")
    assert line.startswith("ep16: device 0 holds layers 0-3, experts 0-1, ")
    assert failures(_measurement("ep8tp2"), EQUAL, FLOAT32, "ep16") == []  # promises no such thing


def test_a_reference_that_is_not_finite_fails() -> None:
    bad = replace(_measurement("single"), terms={"loss": math.nan})
    assert failures(bad, None, FLOAT32, "single") == ["single: the loss is nan"]


def _outputs(**changes) -> Outputs:
    base = Outputs(
        terms={"loss": 2.0},
        logits_BLV=np.arange(24.0).reshape(2, 3, 4),
        gradients={"a/w": np.array([1.0, -4.0]), "b/w": np.zeros(3)},
        experts_NTK=np.arange(24).reshape(2, 6, 2),
        generated_BL=np.array([[1, 2], [3, 4]]),
    )
    return replace(base, **changes)


def test_difference_finds_what_and_where() -> None:
    logits, experts = np.arange(24.0).reshape(2, 3, 4), np.arange(24).reshape(2, 6, 2)
    logits[1, 2, 0] -= 0.5
    experts[1, 3, 0] = 99
    found = difference(
        _outputs(
            terms={"loss": 2.02},
            logits_BLV=logits,
            gradients={"a/w": np.array([1.0, -4.2]), "b/w": np.zeros(3)},
            experts_NTK=experts,
            generated_BL=np.array([[1, 2], [3, 5]]),
        ),
        _outputs(),
    )
    assert found.terms["loss"] == pytest.approx(0.01)
    assert found.max_logit == 0.5
    assert found.max_logit_relative == pytest.approx(0.5 / 23)
    assert found.max_logit_at == (1, 2, 0)
    assert found.gradients == {"a/w": pytest.approx(0.05), "b/w": 0.0}
    assert found.worst_gradient[0] == "a/w"
    assert found.experts_equal == pytest.approx(11 / 12)
    assert found.text_equal == 0.5
    same = difference(_outputs(), _outputs())
    assert (same.max_logit, same.experts_equal, same.text_equal) == (0.0, 1.0, 1.0)
    assert difference(_outputs(generated_BL=None), _outputs(generated_BL=None)).text_equal is None


def test_relative_difference_of_odd_arrays() -> None:
    assert relative_difference(np.zeros(2), np.zeros(2)) == 0
    assert relative_difference(np.array([0.0, 1e-30]), np.zeros(2)) == math.inf
    assert math.isnan(relative_difference(np.array([1.0, math.nan]), np.ones(2)))
    assert math.isnan(relative_difference(np.ones(2), np.array([1.0, math.inf])))
    assert relative_difference(np.array([-1.0, 3.0]), np.array([-4.0, 3.0])) == 0.75


def test_curves_come_from_the_training_records_only(tmp_path: Path) -> None:
    records = [
        {"kind": "train", "step": 1, "run": 1, "loss": 5.0},
        {"kind": "eval", "step": 1, "run": 1, "loss": 9.0},
        {"kind": "train", "step": 2, "run": 1, "loss": "NaN"},
        {"kind": "train", "step": 3, "run": 1, "loss": 4.0},
    ]
    for name in ("x/a", "y/a"):
        (tmp_path / name).mkdir(parents=True)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "metrics.jsonl").write_text(text + '{"kind": "tr')
    curves = read_curves([tmp_path / "x/a", tmp_path / "y/a"])
    assert curves == [Curve("x/a", [1, 3], [5.0, 4.0]), Curve("y/a", [1, 3], [5.0, 4.0])]
    (tmp_path / "x/a/metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"runs: .*x/a has logged no training loss"):
        read_curves([tmp_path / "x/a"])
    (tmp_path / "x/a/metrics.jsonl").write_text("not json\n")
    with pytest.raises(ConfigError, match=r"runs: .*line 1 is not a record"):
        read_curves([tmp_path / "x/a"])


def test_equal_runs_are_called_equal() -> None:
    text = render_report(_comparison(), [CURVES[0], replace(CURVES[0], label="c")], None)
    assert "c: equal at all shared steps" in _Page(text).figures["figure-loss"]


def test_numbers_in_words() -> None:
    assert [size(n) for n in (0, 999, 1000, 12_345, 999_600, 2.5e9, 7e13)] == [
        "0 B", "999 B", "1 kB", "12.3 kB", "1 MB", "2.5 GB", "70 TB",
    ]  # fmt: skip
    assert [share(x) for x in (0, 0.5, 0.999999999, 1e-9, 1)] == ["0%", "50%", "99.999%", "0.001%", "100%"]
