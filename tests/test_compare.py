"""The comparison of deployments, end to end on a tiny model, and its control: a difference must be found."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoint, CheckpointStore, open_checkpoint
from moe_jax.compare.options import CompareOptions, check_options
from moe_jax.compare.run import in_dtype, run
from moe_jax.config import ConfigError, DataConfig, ModelConfig, RunConfig, parse_deployment, to_dict
from moe_jax.deployments import create
from moe_jax.train.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(
    num_layers=2, d_model=32, num_heads=8, num_experts=16, expert_hidden=64, vocab_size=272,
    compute_dtype="float32", remat="none",
)  # fmt: skip
SEQUENCES, SEQ_LEN = 16, 24
NUM_TOKENS = SEQUENCES * SEQ_LEN


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it: a checkpoint and metrics, here of an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(400)))
    data = DataConfig(paths=(str(folder / "text.txt"),), seq_len=SEQ_LEN, held_out_fraction=0.2)
    config = RunConfig(model=MODEL, deployment=parse_deployment("ep16"), data=data)
    params = create(MODEL, config.deployment).init_params(seed=1, at_rest=True)
    meta = {"config": to_dict(config), "tokenizer": ByteTokenizer().to_json()}
    with CheckpointStore(folder / "checkpoints") as store:
        store.save(7, {"params": params, "step": jax.numpy.int32(7)}, meta)
    for name, offset in (("", 0.0), ("other", 0.01)):
        (folder / name).mkdir(exist_ok=True)
        records = [
            {"kind": "train", "step": step, "run": 1, "loss": 5 - 0.1 * step + offset} for step in range(1, 8)
        ]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def _options(run_dir: Path, *deployments: str, **more) -> CompareOptions:
    return CompareOptions(
        checkpoint=str(run_dir), deployments=deployments, sequences=SEQUENCES, repeats=1, **more
    )


@dataclass(frozen=True)
class Compared:
    """What one comparison left behind."""

    code: int
    printed: str
    json: dict
    html: str


@pytest.fixture(scope="module")
def compared(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    out = tmp_path_factory.mktemp("out")
    options = _options(
        run_dir, "single", "ep16", "tp8pp2", generate=3, json=str(out / "c.json"), html=str(out / "c.html"),
        runs=(str(run_dir), str(run_dir / "other")),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, (out / "printed").open("w") as printed:
        patch.setattr(sys, "stdout", printed)
        code = run(options, check_options(options))
    content = json.loads((out / "c.json").read_text(), parse_constant=_refuse)
    return Compared(code, (out / "printed").read_text(), content, (out / "c.html").read_text())


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def _of(compared: Compared, name: str) -> dict:
    entries = {entry["measurement"]["deployment"]["name"]: entry for entry in compared.json["entries"]}
    return entries[name]


def test_deployments_agree(compared: Compared) -> None:
    assert compared.code == 0
    assert compared.json["equal"] is True
    assert compared.printed.splitlines()[-1].startswith("EQUAL: ep16, tp8pp2 computed what single did")
    assert _of(compared, "single")["difference"] is None
    for name in ("ep16", "tp8pp2"):
        found = _of(compared, name)["difference"]
        assert set(found["terms"]) == {"loss", "cross_entropy", "balance_loss", "z_loss"}
        assert max(found["terms"].values()) < 1e-5
        assert found["max_logit_relative"] < 1e-5
        assert len(found["gradients"]) == 12
        assert max(found["gradients"].values()) < 1e-5
        assert found["experts_equal"] == found["text_equal"] == 1
        # Programs that round in another order are never equal in every bit: something was compared.
        assert max(found["gradients"].values()) > 0


def test_json_holds_what_each_deployment_did(compared: Compared) -> None:
    assert compared.json["format_version"] == 1
    assert compared.json["step"] == 7
    assert (compared.json["num_sequences"], compared.json["seq_len"]) == (SEQUENCES, SEQ_LEN)
    for entry in compared.json["entries"]:
        found = entry["measurement"]
        assert np.shape(found["tokens_per_expert_NE"]) == (2, 16)
        assert np.sum(found["tokens_per_expert_NE"], axis=1).tolist() == [NUM_TOKENS * MODEL.top_k] * 2
        assert len(found["rounds_N"]) == 2
        assert min(found["rounds_N"]) >= 1
        for program in ("forward", "gradients"):
            cost = found[program]
            assert cost["tokens_per_s"] == pytest.approx(NUM_TOKENS / cost["time_s"])
            assert cost["temporary_bytes"] > 0
        assert entry["failures"] == []
        assert np.shape(entry["prompt_ids"]) == (4, SEQ_LEN)
        assert np.shape(entry["generated_ids"]) == (4, 3)
    assert _of(compared, "single")["forward_speed"] == 1
    reference, other = _of(compared, "single")["measurement"], _of(compared, "tp8pp2")
    ratio = other["measurement"]["forward"]["tokens_per_s"] / reference["forward"]["tokens_per_s"]
    assert other["forward_speed"] == pytest.approx(ratio)


def test_bytes_of_weights_are_those_of_the_shards(compared: Compared) -> None:
    shapes = create(MODEL, parse_deployment("single")).shapes
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    experts = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes["blocks"]["experts"]))
    single, ep16, tp8pp2 = (_of(compared, name)["measurement"] for name in ("single", "ep16", "tp8pp2"))
    assert single["in_use_bytes"] == single["at_rest_bytes"] == total
    assert ep16["in_use_bytes"] == total - experts * 15 // 16
    assert ep16["at_rest_bytes"] < ep16["in_use_bytes"]  # attention and embedding are split too
    parts = jax.tree_util.tree_map_with_path(_tp8pp2_parts, shapes)
    expected = jax.tree.map(lambda leaf, cut: leaf.size * 4 // cut, shapes, parts)
    assert tp8pp2["in_use_bytes"] == tp8pp2["at_rest_bytes"] == sum(jax.tree.leaves(expected))


def _tp8pp2_parts(path: tuple, leaf: jax.ShapeDtypeStruct) -> int:
    """Devices that share a parameter: layers go over 2 stages; all but norms and router over 8 devices."""
    names = {entry.key for entry in path}
    return (2 if "blocks" in names else 1) * (1 if names & {"scale", "router"} else 8)


def test_collectives_are_those_of_the_compiled_programs(compared: Compared) -> None:
    single, ep16, tp8pp2 = (_of(compared, name)["measurement"] for name in ("single", "ep16", "tp8pp2"))
    assert single["forward"]["collectives"] == single["gradients"]["collectives"] == {}
    forward, gradients = ep16["forward"]["collectives"], ep16["gradients"]["collectives"]
    assert forward["all-to-all"]["count"] == 2 * MODEL.num_layers  # dispatch and combine
    assert gradients["all-to-all"]["count"] == 4 * MODEL.num_layers
    assert "all-gather" not in forward
    assert "collective-permute" in tp8pp2["forward"]["collectives"]
    assert "all-to-all" not in tp8pp2["forward"]["collectives"]


def test_tables_are_printed(compared: Compared) -> None:
    for text in ("max |logit difference|", "exchange rounds", "forward: all-to-all", "0 | 1 | 2 | 3 | 4 "):
        assert text in compared.printed


Restore = Callable[[Checkpoint, dict], dict]


def _perturbing(restore: Restore) -> Restore:
    """Restores as asked, but with one weight of expert 3 off where there are 16 devices."""

    def restore_off(checkpoint: Checkpoint, abstract: dict) -> dict:
        params = restore(checkpoint, abstract)
        matrix = params["blocks"]["experts"]["w_down"]
        if len(matrix.sharding.device_set) == 16:
            changed = np.array(matrix)
            changed[1, 3, 0, 0] += 0.05
            params["blocks"]["experts"]["w_down"] = jax.device_put(changed, matrix.sharding)
        return params

    return restore_off


def test_one_wrong_weight_is_found(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Checkpoint, "restore_params", _perturbing(Checkpoint.restore_params))
    options = _options(run_dir, "single", "ep16", generate=0, json=str(tmp_path / "c.json"))
    assert run(options, check_options(options)) == 1
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["equal"] is False
    lines = content["entries"][1]["failures"]
    assert any(line.startswith("ep16: logits differ from single by ") for line in lines)
    assert any(line.startswith("ep16: gradients of ") for line in lines)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith(f"DIFFERENT: {len(lines)} checks of single against ep16 failed")
    assert [line for line in printed if line.startswith("failed: ")] == [f"failed: {line}" for line in lines]


def test_weights_are_widened_after_they_are_restored(run_dir: Path) -> None:
    from moe_jax.compare.run import _loader

    checkpoint, wide = open_checkpoint(run_dir), in_dtype(MODEL, "float64")
    for at_rest in (False, True):
        deployment = create(wide, parse_deployment("ep16"))
        params = _loader(checkpoint, MODEL, wide)(deployment, at_rest)
        stored = _loader(checkpoint, MODEL, MODEL)(create(MODEL, deployment.config), at_rest)
        for leaf, old, spec in zip(
            *map(jax.tree.leaves, (params, stored, deployment.specs(at_rest))), strict=True
        ):
            assert leaf.dtype == "float64"
            assert leaf.sharding.spec == spec
            np.testing.assert_array_equal(leaf, old)


def test_dtype_changes_no_more_than_it_must() -> None:
    stored = replace(MODEL, compute_dtype="bfloat16", attention="cudnn")
    assert in_dtype(stored, None) is stored
    assert in_dtype(stored, "bfloat16") == stored
    assert in_dtype(stored, "float32") == replace(stored, compute_dtype="float32", attention="auto")
    wide = in_dtype(stored, "float64")
    assert (wide.compute_dtype, wide.param_dtype) == ("float64", "float64")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "/nowhere/at/all"}, r"^checkpoint: /nowhere/at/all: does not exist"),
        ({"deployments": ("single", "expert=32")}, r"^deployment.expert = 32: must divide model.num_experts"),
        ({"sequences": 24}, r"^sequences = 24: must be a multiple of .* = 16 of ep16; use 16"),
        ({"seq_len": 100_000}, r"the held-out text has .*; or compare on --tokens random$"),
        ({"html": "c.html", "runs": ("/",)}, r"^runs: .*No such file.*metrics.jsonl"),
    ],
)
def test_what_cannot_be_compared_is_refused(run_dir: Path, changes: dict, message: str) -> None:
    options = replace(_options(run_dir, "single", "ep16"), **changes)
    with pytest.raises(ConfigError, match=message):
        run(options, check_options(options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"deployments": ("single", "ep17")},
            r"^deployment = 'ep17': no such file or name; .*did you mean ep16",
        ),
        ({"deployments": ("single",)}, r"^deployments = \['single'\]: must be two or more"),
        ({"deployments": ("ep16", "single", "expert=16")}, r"name one deployment twice \(ep16\)"),
        ({"sequences": 0}, r"^sequences = 0: must be at least 1"),
        ({"generate": -1}, r"^generate = -1: must be at least 0"),
        ({"tolerance": float("nan")}, r"^tolerance = nan: must be a finite number"),
        ({"json": "/nowhere/c.json"}, r"^json = '/nowhere/c.json': lies in a folder that does not exist"),
        ({"html": "/"}, r"^html = '/': is a folder"),
        ({"runs": (".",)}, r"^runs = \['.'\]: are for the report only"),
        ({"runs": ("/nowhere",), "html": "c.html"}, r"^runs = '/nowhere': is no folder"),
    ],
)
def test_bad_options_are_refused(changes: dict, message: str) -> None:
    options = replace(_options(Path("run"), "single", "ep16"), **changes)
    with pytest.raises(ConfigError, match=message):
        check_options(options)


def _script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/compare.py"), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


def test_script_refuses_before_jax_is_loaded() -> None:
    done = _script("--checkpoint", "run", "--deployments", "single", "ep61", "--sequences", "16")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: deployment = 'ep61': no such file or name")
    assert "Traceback" not in done.stderr
    assert "emulated" not in done.stderr


def test_script_refuses_a_missing_checkpoint() -> None:
    done = _script("--checkpoint", "nowhere", "--deployments", "single", "ep16")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: checkpoint: nowhere: does not exist")
