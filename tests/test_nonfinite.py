"""A step that is not finite stops the run before its update, and is told by step, tensor and layer."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from run_tools import compiled_once, small_run, train, write_text

from moe_jax.checkpoint import CheckpointStore
from moe_jax.checkpoint.layout import list_steps
from moe_jax.train import loop
from moe_jax.train.data import TrainData
from moe_jax.train.metrics import read_metrics
from moe_jax.train.step import State, Trainer

GOOD_STEPS = 4
BAD_STEP = GOOD_STEPS + 1
# Steps 5 to 8 are all under way when the save after step 8 waits for them and finds that step 5 is bad.
FIELDS = {"train.steps": 12, "train.checkpoint_every": GOOD_STEPS}
Poison = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def nan_in_a_weight(params: dict) -> None:
    params["blocks"]["router"]["w"][1, 3, 5] = np.nan


def attention_overflows(params: dict) -> None:
    params["blocks"]["attention"]["w_v"][0] = 1e30
    params["blocks"]["attention"]["w_o"][0] = 1e30


def router_overflows(params: dict) -> None:
    params["blocks"]["router"]["w"][1] *= 1e22  # the logits are finite, the square in the z-loss is not


def moe_overflows(params: dict) -> None:
    params["blocks"]["experts"]["w_up"][1] *= 1e3
    params["blocks"]["experts"]["w_down"][1] = 1e38


def logits_overflow(params: dict) -> None:
    params["head"]["w"][...] = 1e38


def backward_overflows(params: dict) -> None:
    """gelu(0) is 0 and its slope 1/2: huge w_down after a zero w_up show in the backward pass only."""
    params["embed"]["table"] *= 1e-6
    params["head"]["w"] *= 1e4
    params["blocks"]["experts"]["w_up"][1] = 0
    params["blocks"]["experts"]["w_down"][1] = 1e38


def squares_overflow(params: dict) -> None:
    params["blocks"]["experts"]["w_up"][1] = 0
    params["blocks"]["experts"]["w_down"][1] = 1e28


CASES = [
    (nan_in_a_weight, "in the weights themselves: blocks/router/w (layer 1)."),
    (attention_overflows, "in the forward pass: the output of attention in layer 0."),
    (router_overflows, "in the forward pass: the output of router in layer 1."),
    (moe_overflows, "in the forward pass: the output of moe in layer 1."),
    (logits_overflow, "in the loss, after finite blocks: cross_entropy, loss."),
    (backward_overflows, "in the backward pass: the gradient of blocks/experts/w_up in layer 1."),
    (squares_overflow, "in the gradient norm: gradients are finite, their squares not; the largest is of "
                       "blocks/experts/w_up (layer 1)."),
]  # fmt: skip


class PoisonedSteps:
    """Stands in for Trainer.step: changes the weights before step BAD_STEP, and remembers the states."""

    def __init__(self, poison: Poison):
        self.poison, self.step, self.num_calls = poison, Trainer.step, 0
        self.before: dict[str, Any] = {}
        self.newest: State = {}

    def __call__(self, trainer: Trainer, state: State, batch: dict) -> tuple[State, dict]:
        if self.num_calls == GOOD_STEPS:
            params = jax.tree.map(np.array, state["params"])
            self.poison(params)
            placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state["params"])
            state = {**state, "params": placed}
            self.before = jax.tree.map(np.array, state)
        self.num_calls += 1
        self.newest, metrics = self.step(trainer, state, batch)
        return self.newest, metrics


def poisoned_run(monkeypatch, text: Path, folder: Path, deployment: str, poison: Poison, **fields: Any):
    steps = PoisonedSteps(poison)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda trainer, state, batch: steps(trainer, state, batch))
        code = train(small_run(text, folder, deployment, FIELDS | fields))
    return code, steps


def assert_nothing_changed(steps: PoisonedSteps) -> None:
    assert steps.num_calls > BAD_STEP + 1, "no step was under way behind the bad one"
    assert int(steps.newest["halted_at"]) == GOOD_STEPS
    unchanged = {name: steps.newest[name] for name in ("params", "opt", "step")}
    jax.tree.map(
        lambda new, old: np.testing.assert_array_equal(np.asarray(new), old),
        unchanged,
        {name: steps.before[name] for name in unchanged},
    )


@pytest.mark.parametrize("deployment", ["ep16", "pipe=2,tensor=8", "single"])
@pytest.mark.parametrize(("poison", "place"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_bad_step_is_named_and_changes_nothing(
    text, tmp_path, monkeypatch, capsys, deployment, poison, place
):
    code, steps = poisoned_run(monkeypatch, text, tmp_path, deployment, poison)
    assert code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: step {BAD_STEP} is not finite")
    assert place in last
    assert f"Last good checkpoint: step {GOOD_STEPS} in {tmp_path}/checkpoints." in last
    assert "learning_rate" in last
    assert list_steps(tmp_path / "checkpoints") == [GOOD_STEPS]

    records = read_metrics(tmp_path)
    assert list(records) == list(range(1, BAD_STEP + 1))
    assert records[BAD_STEP]["finite"] is False
    assert not np.isfinite([float(records[BAD_STEP][name]) for name in ("loss", "grad_norm")]).all()

    assert_nothing_changed(steps)


def infinite_embedding_of_zero(params: dict) -> None:
    params["embed"]["table"][0] = np.inf  # no text holds byte 0, so this stays unseen


def test_steps_behind_a_bad_one_do_not_train_on(text, tmp_path, monkeypatch, capsys):
    """Only the batch of one step is bad here: those under way behind it are good, and must change nothing."""
    batch = TrainData.batch

    def bad_batch(self: TrainData, step: int) -> dict[str, np.ndarray]:
        made = batch(self, step)
        if step == GOOD_STEPS:
            made["ids_BL"][0, 0] = 0
        return made

    monkeypatch.setattr(TrainData, "batch", bad_batch)
    code, steps = poisoned_run(monkeypatch, text, tmp_path, "ep16", infinite_embedding_of_zero)
    assert code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: step {BAD_STEP} is not finite")
    assert "in the weights themselves: embed/table." in last
    assert list_steps(tmp_path / "checkpoints") == [GOOD_STEPS]
    assert_nothing_changed(steps)


def test_a_save_under_way_is_waited_for_before_it_is_named(text, tmp_path, monkeypatch, capsys):
    write, diagnose, diagnosed = CheckpointStore._write_pending_manifest, loop.diagnose, threading.Event()

    def write_late(store: CheckpointStore) -> None:
        assert diagnosed.wait(120)
        time.sleep(0.5)
        write(store)

    def diagnose_and_tell(*arguments: Any) -> str:
        try:
            return diagnose(*arguments)
        finally:
            diagnosed.set()

    monkeypatch.setattr(CheckpointStore, "_write_pending_manifest", write_late)
    monkeypatch.setattr(loop, "diagnose", diagnose_and_tell)
    fields = {"train.checkpoint_every": 4, "train.steps": BAD_STEP}
    code, _ = poisoned_run(monkeypatch, text, tmp_path, "single", nan_in_a_weight, **fields)
    assert code == 1
    assert f"Last good checkpoint: step {GOOD_STEPS} in" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_without_a_good_step_says_so(text, tmp_path, monkeypatch, capsys):
    init = Trainer.init_state

    def bad_init(trainer: Trainer) -> State:
        state = init(trainer)
        table = state["params"]["embed"]["table"]
        state["params"]["embed"]["table"] = table.at[ord("l"), 0].set(np.inf)
        return state

    monkeypatch.setattr(Trainer, "init_state", bad_init)
    assert train(small_run(text, tmp_path, "single", {"train.accumulation_steps": 2})) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: step 1 is not finite")
    assert "in the weights themselves: embed/table." in last
    assert "none was saved yet" in last
    assert list_steps(tmp_path / "checkpoints") == []
