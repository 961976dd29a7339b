"""Training runs from start to end: what they leave, how they go on, and what they refuse."""

import hashlib
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from run_tools import NUM_STEPS, compiled_once, copy_run, signature, small_run, train, write_text

from moe_jax.checkpoint import open_checkpoint
from moe_jax.checkpoint.layout import list_steps
from moe_jax.config import ConfigError, load_run, to_dict
from moe_jax.train.data import TrainData
from moe_jax.train.metrics import read_metrics
from moe_jax.train.rundir import locked_run_dir
from moe_jax.train.tokenizer import tokenizer_of_checkpoint

BOTH = ["ep16", "pipe=2,tensor=8"]
EVAL = {"train.eval_every": 3, "train.eval_batches": 1}


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory) -> dict[str, Path]:
    """Folders of runs that nothing disturbed, by deployment."""
    folders = {name: tmp_path_factory.mktemp("straight") / "run" for name in BOTH}
    for name, folder in folders.items():
        assert train(small_run(text, folder, name, EVAL)) == 0
    return folders


def steps_in(folder: Path) -> list[int]:
    return list_steps(folder / "checkpoints")


def content(folder: Path) -> dict[str, str]:
    """Digest of every file of a run folder but the lock, which every process that asks for it writes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_leaves_one_folder(text, straight):
    folder = straight["ep16"]
    names = {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "lock"}
    assert {path.name for path in folder.iterdir()} == names
    assert load_run(str(folder / "config.yaml")).config == small_run(text, folder, "ep16", EVAL).config
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["devices"]["count"] == 16
    (events,) = (folder / "tensorboard").iterdir()
    assert all(tag in events.read_bytes() for tag in (b"train/loss", b"train/tokens_per_s", b"eval/loss"))
    assert steps_in(folder) == [3, 6]


def test_metrics_tell_every_step(straight):
    folder = straight["ep16"]
    records = read_metrics(folder)
    assert list(records) == list(range(1, NUM_STEPS + 1))
    losses = [record["loss"] for record in records.values()]
    assert losses[-1] < losses[0] - 0.1
    for record in records.values():
        terms = record["cross_entropy"] + 0.01 * record["balance_loss"] + 0.001 * record["z_loss"]
        assert record["loss"] == pytest.approx(terms, rel=1e-6)
        loads = np.asarray(record["tokens_per_expert_NE"])
        assert loads.sum(axis=1).tolist() == [16 * 16 * 2] * 2  # batch x length x top-k, in both layers
        assert record["expert_load_worst_over_mean"] == pytest.approx((loads.max(axis=1) / 32).max())
        assert record["finite"] is True
        assert record["tokens_per_s"] > 0
    held_out = read_metrics(folder, "eval")
    assert list(held_out) == [3, 6]
    assert held_out[6]["loss"] < held_out[3]["loss"]


@pytest.mark.parametrize("deployment", BOTH)
def test_a_killed_run_goes_on_bit_for_bit(text, straight, tmp_path, deployment):
    folder = copy_run(straight[deployment], tmp_path / "run", newest_step=3)
    assert train(small_run(text, folder, deployment, EVAL)) == 0
    records = read_metrics(folder)
    assert [record["run"] for record in records.values()] == [1, 1, 1, 2, 2, 2]
    assert signature(folder) == signature(straight[deployment])
    assert read_metrics(folder, "eval")[6]["loss"] == read_metrics(straight[deployment], "eval")[6]["loss"]
    assert steps_in(folder) == [3, 6]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("deployment", BOTH)
def test_a_signal_saves_and_the_next_run_goes_on_bit_for_bit(
    text, straight, tmp_path, monkeypatch, deployment, sent
):
    folder = tmp_path / "run"
    batch = TrainData.batch

    def batch_and_signal(self: TrainData, step: int):
        if step == 3:
            os.kill(os.getpid(), sent)
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainData, "batch", batch_and_signal)
        assert train(small_run(text, folder, deployment, EVAL)) == 128 + sent
    assert steps_in(folder) == [3, 4]  # the step that it came in is finished
    assert list(signature(folder)) == [1, 2, 3, 4]
    assert train(small_run(text, folder, deployment, EVAL)) == 0
    assert signature(folder) == signature(straight[deployment])


@pytest.mark.parametrize(("saved_by", "continued_by"), [BOTH, BOTH[::-1]])
def test_a_run_goes_on_in_another_deployment(text, straight, tmp_path, saved_by, continued_by):
    folder = copy_run(straight[saved_by], tmp_path / "run", newest_step=3)
    assert train(small_run(text, folder, continued_by, EVAL)) == 0
    expected, continued = (
        np.asarray([values[:2] for values in signature(path).values()])
        for path in (straight[saved_by], folder)
    )
    np.testing.assert_allclose(continued, expected, rtol=1e-5)
    earlier = load_run(str(folder / "config.1.yaml")).config  # kept, as it made the first steps
    assert earlier.deployment.num_devices == 16
    assert load_run(str(folder / "config.yaml")).config.deployment != earlier.deployment


def test_the_checkpoint_tells_the_whole_run(text, straight):
    meta = open_checkpoint(straight["ep16"]).meta
    assert meta["config"] == to_dict(small_run(text, straight["ep16"], "ep16", EVAL).config)
    assert meta["data_position"] == {"next_batch": NUM_STEPS, "seed": 0}
    assert meta["tokenizer"] == {"type": "bytes", "vocab_size": 272}


def test_a_complete_run_changes_nothing(text, straight, tmp_path):
    folder = copy_run(straight["ep16"], tmp_path / "run", NUM_STEPS)
    before = content(folder)
    assert train(small_run(text, folder, "ep16", EVAL)) == 0
    after = content(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    # environment.json is written again too, with the same text unless the checkout changed meanwhile
    assert changed - {"environment.json"} == {"config.yaml", "config.1.yaml", "environment.1.json"}


OTHER_RUNS = [
    ({"train.resume": False}, ["train.run_dir", "step 6", "resume"]),
    ({"model.d_model": 64, "train.seed": 1}, ["model.d_model: 32 -> 64", "train.seed: 0 -> 1"]),
    ({"data.seq_len": 8}, ["data.seq_len: 16 -> 8"]),
    ({"data.held_out_fraction": 0.2}, ["data: the text is not what the checkpoint was trained on"]),
]


@pytest.mark.parametrize(("fields", "said"), OTHER_RUNS)
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(text, straight, fields, said):
    before = content(straight["ep16"])
    with pytest.raises(ConfigError) as caught:
        train(small_run(text, straight["ep16"], "ep16", EVAL | fields))
    assert all(words in str(caught.value) for words in said), caught.value
    assert content(straight["ep16"]) == before


def test_a_folder_in_use_is_refused(text, straight):
    before = content(straight["ep16"])
    with locked_run_dir(str(straight["ep16"])), pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        train(small_run(text, straight["ep16"], "ep16", EVAL))
    assert content(straight["ep16"]) == before


def test_a_damaged_checkpoint_ends_the_run_with_a_line(text, straight, tmp_path, capsys):
    folder = copy_run(straight["ep16"], tmp_path / "run", newest_step=3)
    files = (path for path in (folder / "checkpoints/3/params").rglob("*") if path.is_file())
    data = max(files, key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    assert train(small_run(text, folder, "ep16", EVAL)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "damaged" in last


def test_only_the_newest_checkpoints_stay(text, tmp_path):
    fields = {"train.checkpoint_every": 1, "train.keep_checkpoints": 2}
    assert train(small_run(text, tmp_path, "single", fields)) == 0
    assert steps_in(tmp_path) == [5, 6]


def test_accumulation_gives_the_loss_of_one_batch(text, straight, tmp_path):
    run = small_run(text, tmp_path, "pipe=2,tensor=8", EVAL | {"train.accumulation_steps": 2})
    assert train(run) == 0
    one, two = read_metrics(straight["pipe=2,tensor=8"]), read_metrics(tmp_path)
    for name in ("cross_entropy", "z_loss"):
        assert two[1][name] == pytest.approx(one[1][name], rel=1e-5)
    assert two[1]["tokens_per_expert_NE"] == one[1]["tokens_per_expert_NE"]
    # The balance loss is formed per slice, so gradients and later steps are near, not equal.
    for step in one:
        for name in ("cross_entropy", "grad_norm"):
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-2), (name, step)


def test_the_tokenizer_file_is_kept_in_the_folder(text, tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"line": 0, "holds": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    made.save(str(path))
    folder = tmp_path / "run"
    run = small_run(text, folder, "single", {"data.tokenizer": str(path)})
    assert train(run) == 0
    path.unlink()
    found = tokenizer_of_checkpoint(open_checkpoint(folder).meta["tokenizer"], folder)
    assert found.encode("line x holds").tolist() == [0, 2, 1]
