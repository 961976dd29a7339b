"""Metrics: every line whole and strict, whatever was killed; the newest life of a run counts."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from moe_jax.train import metrics
from moe_jax.train.metrics import (
    MetricsWriter,
    ProgressDisplay,
    read_all_metrics,
    read_metrics,
    worst_over_mean,
)

LOADS_NE = np.array([[4, 4, 4, 4], [1, 9, 3, 3]])


def _strict(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_record_is_one_line_of_strict_json_with_its_numbers_as_they_were(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        values = {"loss": np.float32(0.1), "finite": np.bool_(False), "loads": LOADS_NE, "name": 3}
        writer.write("train", 7, values | {"worst": np.float64("nan"), "most": np.array([-np.inf, 2.0])})
        # Flushed at once: a kill after this moment loses nothing.
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = _strict(line)
    assert record == {
        "kind": "train", "step": 7, "run": 1, "loss": float(np.float32(0.1)), "finite": False,
        "loads": LOADS_NE.tolist(), "name": 3, "worst": "NaN", "most": ["-Infinity", 2.0],
    }  # fmt: skip
    assert np.isnan(float(record["worst"]))
    assert float(record["most"][0]) == -np.inf
    assert read_metrics(tmp_path) == {7: record}


@pytest.mark.parametrize(
    "torn", ['{"kind": "train", "st', "\0\0\0", '{"kind": "train", "step": 3, "run": 1}', "é"[:1]]
)
def test_half_a_line_that_a_kill_left_is_passed_over_and_then_cut_off(torn, tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, {"loss": 1.0})
        writer.write("train", 2, {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn.encode())
    assert list(read_metrics(tmp_path)) == [1, 2]
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 2, {"loss": 2.5})
    records = [_strict(line) for line in path.read_text().splitlines()]
    assert [(record["step"], record["run"], record["loss"]) for record in records] == [
        (1, 1, 1.0), (2, 1, 2.0), (2, 2, 2.5),
    ]  # fmt: skip
    assert [record["loss"] for record in read_metrics(tmp_path).values()] == [1.0, 2.5]


def test_only_a_torn_line_in_the_file_counts_as_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind"')
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, {"loss": 1.0})
    assert [record["run"] for record in read_all_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"step": 1}', ""])
def test_a_whole_line_that_is_no_record_is_named(line, tmp_path):
    good = '{"kind": "train", "step": 1, "run": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(f"{good}{line}\n{good}")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not a record"):
        read_metrics(tmp_path)


def test_what_a_killed_life_reported_beyond_its_successors_beginning_does_not_count(tmp_path):
    lives = [(1, 8), (5, 7), (3, 5)]  # each resumes from a checkpoint before the step that follows
    for number, (first, last) in enumerate(lives, start=1):
        with MetricsWriter(tmp_path) as writer:
            for step in range(first, last + 1):
                writer.write("train", step, {"loss": number + step / 100})
                writer.write("eval", step, {"loss": -1.0})
    found = read_metrics(tmp_path)
    assert {step: record["run"] for step, record in found.items()} == {1: 1, 2: 1, 3: 3, 4: 3, 5: 3}
    assert {record["kind"] for record in found.values()} == {"train"}
    assert list(read_metrics(tmp_path, "eval")) == [1, 2, 3, 4, 5]
    assert len(list(read_all_metrics(tmp_path))) == 2 * (8 + 3 + 3)  # yet nothing is thrown away


def _events(folder) -> list[Any]:
    """Events of all TensorBoard files in `folder`, in the order written."""
    event_type = getattr(event_pb2, "Event")  # noqa: B009 (made at run time; unknown to type checkers)
    events = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.suffix):
        data, start = path.read_bytes(), 0
        while start < len(data):
            size_bytes = int.from_bytes(data[start : start + 8], "little")
            events.append(event_type.FromString(data[start + 12 : start + 12 + size_bytes]))
            start += 12 + size_bytes + 4  # length and its checksum, the event, its checksum
    return events


def test_tensorboard_gets_the_scalars_and_forgets_what_is_done_again(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 4, {"loss": 1.5, "loads": LOADS_NE})
        writer.write("eval", 5, {"loss": 2.5})
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 5, {"loss": 3.5})
    events = _events(tmp_path)
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(4, "train/loss", 1.5), (5, "eval/loss", 2.5), (5, "train/loss", 3.5)]
    restarts = [event.step for event in events if event.session_log.status == 1]
    assert restarts[-1] == 5


def test_a_kill_at_any_moment_leaves_a_file_that_reads(tmp_path):
    code = (
        "import sys, itertools; from pathlib import Path\n"
        "from moe_jax.train.metrics import MetricsWriter\n"
        "writer = MetricsWriter(Path(sys.argv[1]))\n"
        "for step in itertools.count(1):\n"
        "    writer.write('train', step, {'loss': 1.0, 'loads': [0.5] * 400})\n"
        "    if step == 300: print('go', flush=True)\n"
    )
    found = {}
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "go\n"
            process.kill()
        found = read_metrics(tmp_path)
        assert list(found) == list(range(1, len(found) + 1))
        assert len(found) >= 300
    assert found[1]["run"] == 3


def test_the_worst_expert_over_the_mean():
    assert worst_over_mean(LOADS_NE[:1]) == 1.0
    assert worst_over_mean(LOADS_NE) == 9 / 4
    assert worst_over_mean(np.zeros((2, 4))) == 0.0


def test_without_a_terminal_progress_is_a_line_per_report(capsys):
    with ProgressDisplay(total_steps=20, done_steps=0) as display:
        for step in (9, 10):
            values = {"loss": np.float32(1.25), "tokens_per_expert_NE": LOADS_NE}
            display.step(step, values, tokens_per_s=12345.6, report=step == 10)
        display.say("saved [bold]step[/bold] 10")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 10/20  loss 1.2500  12,346 tokens/s  balance 2.25",
        "saved [bold]step[/bold] 10",
    ]


def test_on_a_terminal_progress_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(
        metrics, "Console", lambda **kwargs: Console(force_terminal=True, width=140, **kwargs)
    )
    from rich.console import Console

    with ProgressDisplay(total_steps=20, done_steps=5) as display:
        display.step(10, {"loss": 1.25, "tokens_per_expert_NE": LOADS_NE}, tokens_per_s=12345.6, report=True)
    err = capsys.readouterr().err
    assert "10/20" in err
    assert "balance 2.25" in err
    assert "step 10/20" not in err
