"""The folder of a run: who may write it, what is written first, and what may change on resume."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import moe_jax
from moe_jax.config import ConfigError, from_dict, to_dict
from moe_jax.config.schema import DataConfig, DeploymentConfig, ModelConfig, RunConfig, TrainConfig
from moe_jax.train.rundir import check_same_run, locked_run_dir, write_run_files

_HOLDER = """
import sys
from moe_jax.train.rundir import locked_run_dir
with locked_run_dir(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(run_dir: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    run_dir = tmp_path / "some/run"
    with _holder(run_dir) as holder:
        with (
            pytest.raises(
                ConfigError, match=rf"train\.run_dir = .*trained in by process {holder.pid} on .*wait for it"
            ),
            locked_run_dir(str(run_dir)),
        ):
            pass
        holder.kill()
        holder.wait()
        # The kill released it; and who holds it now is told.
        with locked_run_dir(str(run_dir)) as folder:
            assert folder == run_dir
            assert f"process {holder.pid} " not in (run_dir / "lock").read_text()
            with pytest.raises(ConfigError, match="is being trained in"), locked_run_dir(str(run_dir)):
                pass
    with locked_run_dir(str(run_dir)):
        pass


def test_paths_that_can_be_no_run_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "locked/lock").mkdir(parents=True)
    for path in ("file", "file/below", "locked"):
        with (
            pytest.raises(ConfigError, match=rf"train\.run_dir = .*{path}.* cannot be used.*name a folder"),
            locked_run_dir(str(tmp_path / path)),
        ):
            pass
    assert (tmp_path / "file").read_text() == "precious"


def test_config_and_environment_are_written_and_earlier_ones_kept(tmp_path):
    for text in ("first", "second", "third"):
        write_run_files(tmp_path, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.1.yaml", "config.2.yaml", "config.yaml",
        "environment.1.json", "environment.2.json", "environment.json",
    ]  # fmt: skip
    texts = [(tmp_path / f"config{number}.yaml").read_text() for number in (".1", ".2", "")]
    assert texts == ["first", "second", "third"]


def test_the_environment_says_what_ran_where(tmp_path):
    write_run_files(tmp_path, "")
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert set(environment["packages"]) >= {"jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "moe_jax"}
    assert environment["packages"]["moe_jax"] == moe_jax.__version__
    assert environment["devices"] == {"count": 16, "kind": jax.devices()[0].device_kind, "platform": "cpu"}
    assert environment["command"] == sys.argv
    assert environment["python"] == sys.version
    root = Path(moe_jax.__file__).parents[1]
    if (root / ".git").exists():
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        assert environment["git"]["commit"] == commit.stdout.strip()
        assert environment["git"]["modified"] in (True, False)
    else:
        assert environment["git"] is None


BASE = RunConfig(ModelConfig(), DeploymentConfig(), TrainConfig(), DataConfig())


def _check(section: str, name: str, value: object):
    changed = dataclasses.replace(getattr(BASE, section), **{name: value})
    saved = json.loads(json.dumps(to_dict(BASE)))  # as a checkpoint holds it
    check_same_run(saved, dataclasses.replace(BASE, **{section: changed}), Path("runs/x/checkpoints"))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("train", "steps", 999),
        ("train", "log_every", 1),
        ("train", "checkpoint_every", 7),
        ("train", "keep_checkpoints", 9),
        ("train", "run_dir", "elsewhere"),
        ("train", "zero_params", False),
        ("deployment", "expert", 16),
        ("deployment", "name", "ep16"),
        ("model", "remat", "none"),
        ("model", "attention", "blockwise"),
        ("data", "paths", ("moved/text",)),
        ("data", "tokenizer", "moved/tokenizer.json"),
    ],
)
def test_a_resumed_run_may_change_where_and_how_long(section, name, value):
    _check(section, name, value)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "d_model", 64),
        ("model", "top_k", 1),
        ("model", "tie_embeddings", True),
        ("model", "param_dtype", "float64"),
        ("model", "compute_dtype", "float32"),
        ("model", "balance_loss_weight", 0.5),
        ("train", "batch_size", 8),
        ("train", "seed", 1),
        ("train", "learning_rate", 1e-4),
        ("train", "accumulation_steps", 2),
        ("data", "seq_len", 64),
    ],
)
def test_a_resumed_run_may_not_change_model_order_or_optimisation(section, name, value):
    old = getattr(getattr(BASE, section), name)
    with pytest.raises(ConfigError) as caught:
        _check(section, name, value)
    assert f"{section}.{name}: {old!r} -> {value!r}" in str(caught.value)
    assert "use another train.run_dir" in str(caught.value)


def test_every_field_that_differs_is_listed_and_new_fields_are_no_difference():
    changed = dataclasses.replace(
        BASE,
        model=dataclasses.replace(BASE.model, d_model=64, num_experts=4),
        train=dataclasses.replace(BASE.train, seed=5, steps=9),
    )
    saved = to_dict(BASE)
    del saved["model"]["activation"]  # a checkpoint from before the field existed
    with pytest.raises(ConfigError) as caught:
        check_same_run(saved, changed, Path("checkpoints"))
    for line in ("model.d_model: 4096 -> 64", "model.num_experts: 16 -> 4", "train.seed: 0 -> 5"):
        assert line in str(caught.value)
    assert "steps" not in str(caught.value)
    assert "activation" not in str(caught.value)
    assert from_dict(saved) == BASE
