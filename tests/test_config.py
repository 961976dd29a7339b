"""How values reach a config: files, names, overrides, the command line; and how a config is written out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_jax.config import (
    ConfigError,
    DeploymentConfig,
    ModelConfig,
    Problem,
    RunConfig,
    check_data,
    check_deployment,
    check_model,
    check_run,
    check_train,
    from_dict,
    load_model,
    load_run,
    mesh_label,
    parse_deployment,
    to_dict,
)
from moe_jax.config.cli import NoOptions, RunRequest, parse_run
from moe_jax.config.errors import did_you_mean
from moe_jax.config.fields import SECTIONS, all_fields, walk
from moe_jax.config.render import to_yaml
from moe_jax.config.yaml_file import parse_yaml

REPOSITORY = Path(__file__).parents[1]
FILES = sorted((REPOSITORY / "configs").glob("*/*.yaml"))
DEPLOYMENTS = {
    "single": ("single", 1),
    "ep16": ("ep16", 16),
    "ep8": ("ep8", 8),
    "tp8pp2": ("pp2tp8", 16),
    "ep16pp16": ("pp16ep16", 256),
    "ep8tp2": ("ep8tp2", 16),
    "pp4ep4": ("pp4ep4", 16),
    "dp2ep4tp2": ("dp2ep4tp2", 16),
    "pp2ep4tp2": ("pp2ep4tp2", 16),
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def parse(*argv: str) -> RunRequest[NoOptions]:
    return parse_run(list(argv), NoOptions, prog="train.py", description="Train.")


# The files under configs/.


def test_every_file_opens_with_a_comment_that_says_what_it_is_for():
    assert len(FILES) == 3 + 3 + len(DEPLOYMENTS)
    for path in FILES:
        first = path.read_text().splitlines()[0]
        assert first.startswith("# "), path
        assert len(first) > 20, path
    for path in (REPOSITORY / "configs/runs").glob("*.yaml"):
        for label in ("# Command:  python scripts/train.py", "# Time: ", "# Result: "):
            assert label in path.read_text(), f"{path} lacks {label}"


@pytest.mark.parametrize("run", ["tiny", "small", "paper"])
def test_the_run_files_are_good(run):
    check_run(load_run(run).config)


@pytest.mark.parametrize("deployment", [name for name, (_, devices) in DEPLOYMENTS.items() if devices <= 16])
@pytest.mark.parametrize("run", ["tiny", "small", "paper"])
def test_every_run_fits_every_deployment_of_up_to_16_devices(run, deployment):
    assert load_run(run, deployment=deployment).config.deployment.name == deployment


def test_the_paper_model_fits_one_expert_of_one_layer_per_device():
    deployment = load_run("paper", deployment="ep16pp16").config.deployment
    assert (deployment.num_devices, deployment.pipe, deployment.expert) == (256, 16, 16)


def test_the_paper_model_is_the_paper_s():
    model = load_model("paper")
    expected = {"num_layers": 16, "num_experts": 16, "d_model": 4096, "expert_hidden": 16384, "num_heads": 32}
    assert {name: getattr(model, name) for name in expected} == expected
    assert model.compute_dtype == "bfloat16"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_named_deployments(name):
    label, devices = DEPLOYMENTS[name]
    deployment = parse_deployment(name)
    assert (deployment.name, mesh_label(deployment), deployment.num_devices) == (name, label, devices)
    assert {path.stem for path in FILES if path.parent.name == "deployments"} == set(DEPLOYMENTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pipe=2,expert=4,tensor=2", DeploymentConfig("pp2ep4tp2", pipe=2, expert=4, tensor=2)),
        (" tensor = 8 , pipe=2 ", DeploymentConfig("pp2tp8", pipe=2, tensor=8)),
        ("data=1", DeploymentConfig("single")),
        ("expert=016", DeploymentConfig("ep16", expert=16)),
        ("configs/deployments/ep16.yaml", DeploymentConfig("ep16", expert=16)),
    ],
)
def test_deployments_by_sizes_and_by_path(text, expected):
    assert parse_deployment(text) == expected


def test_names_are_found_in_the_current_folder_first_then_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_model("tiny").d_model == 64
    (tmp_path / "configs/models").mkdir(parents=True)
    (tmp_path / "configs/models/tiny.yaml").write_text("d_model: 32\n")
    assert load_model("tiny").d_model == 32
    with pytest.raises(ConfigError) as refused:
        load_model("huge")
    assert "configs/models and " in str(refused.value)
    assert str(REPOSITORY / "configs/models") in str(refused.value)


# Which source wins, and what is said about it.


def write(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_later_sources_win_and_are_named(tmp_path):
    model = write(tmp_path / "m.yaml", {"num_layers": 2, "d_model": 128, "num_heads": 4, "vocab_size": 272})
    run = write(
        tmp_path / "r.yaml",
        {"model": {"num_heads": 8, "top_k": 1}, "train": {"seed": 1, "steps": 30, "learning_rate": 1}},
    )
    request = parse("--config", run, "--model", model, "--train.steps", "40", "--model.top-k", "3")
    got = {field: (value, request.resolved.provenance[field]) for field, value in walk(request.config)}
    assert got["model.num_layers"] == (2, model)
    assert got["model.d_model"] == (128, model)
    assert got["model.num_heads"] == (8, run)
    assert got["model.top_k"] == (3, "command line")
    assert got["train.seed"] == (1, run)
    assert got["train.steps"] == (40, "command line")
    assert got["train.batch_size"] == (16, "default")
    assert got["train.learning_rate"] == (1.0, run)
    assert isinstance(got["train.learning_rate"][0], float)
    assert list(request.resolved.provenance) == list(all_fields())


def test_the_command_line_s_model_replaces_the_one_the_run_file_names():
    request = parse("--config", "tiny", "--model", "small")
    assert request.config.model == load_model("small")
    assert request.resolved.provenance["model.d_model"] == "configs/models/small.yaml"


def test_a_deployment_replaces_the_run_file_s_as_a_whole(tmp_path):
    run = write(tmp_path / "r.yaml", {"model": "tiny", "deployment": {"tensor": 2, "num_microbatches": 4}})
    assert load_run(run).config.deployment == DeploymentConfig("tp2", tensor=2, num_microbatches=4)
    assert load_run(run, deployment="ep16").config.deployment == DeploymentConfig("ep16", expert=16)


def test_a_value_on_the_command_line_is_named_even_if_it_is_the_default():
    assert (
        parse("--config", "tiny", "--train.adam-b1=0.9").resolved.provenance["train.adam_b1"]
        == "command line"
    )


@pytest.mark.smoke
def test_the_documented_commands():
    config = parse("--config", "configs/runs/tiny.yaml", "--deployment", "ep16", "--train.steps", "50").config
    assert (config.deployment.name, config.deployment.expert, config.train.steps) == ("ep16", 16, 50)
    config = parse("--config", "tiny", "--deployment", "pipe=2,expert=4,tensor=2").config
    assert (config.deployment.name, config.deployment.num_devices) == ("pp2ep4tp2", 16)


def test_a_mesh_changed_after_it_was_named_gets_the_name_of_its_sizes():
    changed = parse("--config", "tiny", "--deployment", "ep16", "--deployment.expert", "8")
    assert changed.config.deployment.name == "ep8"
    assert changed.resolved.provenance["deployment.name"] == "the mesh's sizes"
    kept = parse("--config", "tiny", "--deployment", "ep16", "--deployment.num-microbatches", "1")
    assert kept.config.deployment.name == "ep16"
    named = parse("--config", "tiny", "--deployment.expert", "8", "--deployment.name", "mine")
    assert named.config.deployment.name == "mine"


def test_overrides_from_python():
    resolved = load_run("tiny", overrides={"train.steps": 40, "data.paths": ["a"]})
    assert (resolved.config.train.steps, resolved.config.data.paths) == (40, ("a",))
    with pytest.raises(ConfigError, match=r"train.stps = 4 \(command line\): no such field"):
        load_run("tiny", overrides={"train.stps": 4})


# YAML.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5", 0.5), ("3.", 3.0), ("1_0.5", 10.5),
        ("32_000_000", 32_000_000), ("-5", -5), ("+5", 5), ("0", 0), ("5", 5),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("-.inf", float("-inf")),
        ("no", "no"), ("on", "on"), ("y", "y"), ("010", "010"), ("0x10", "0x10"), ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"), ("1e", "1e"), ("e5", "e5"), ("'5'", "5"), ("None", "None"),
        ("<<", "<<"),
    ],
)  # fmt: skip
def test_plain_scalars_are_what_they_look_like(text, value):
    got = parse_yaml(f"x: {text}")["x"]
    assert got == value
    assert type(got) is type(value)


def test_json_is_read_too(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(load_run("tiny").config), indent=2))
    assert load_run(str(path)).config == load_run("tiny").config


# Writing a config out.


@pytest.mark.smoke
def test_to_dict_and_back_is_the_same_and_survives_json():
    for run in ("tiny", "small", "paper"):
        config = load_run(run, overrides={"data.paths": ["a", "b"], "model.head_dim": 128}).config
        again = from_dict(json.loads(json.dumps(to_dict(config))))
        assert again == config
        assert to_dict(again) == to_dict(config)
        assert isinstance(again.data.paths, tuple)


def test_a_config_from_before_a_field_existed_takes_its_default():
    values = to_dict(load_run("tiny").config)
    del values["model"]["tie_embeddings"]
    assert from_dict(values) == load_run("tiny").config


def test_print_config_shows_every_value_and_its_source_and_loads_again(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        parse("--config", "tiny", "--deployment", "ep16", "--train.steps", "50", "--print-config")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    lines = {tuple(line.split("#", 1)[0].split()): line.rpartition("# ")[2] for line in text.splitlines()}
    assert lines["steps:", "50"] == "command line"
    assert lines["expert:", "16"] == "configs/deployments/ep16.yaml"
    assert lines["d_model:", "64"] == "configs/models/tiny.yaml"
    assert lines["batch_size:", "16"] == "configs/runs/tiny.yaml"
    assert lines["adam_b1:", "0.9"] == "default"
    assert len(lines) == len(all_fields()) + len(SECTIONS)
    (tmp_path / "printed.yaml").write_text(text)
    again = load_run(str(tmp_path / "printed.yaml")).config
    assert again == load_run("tiny", deployment="ep16", overrides={"train.steps": 50}).config


@pytest.mark.parametrize(
    "text", ["a b", "a: b", "a #b", "#b", "no", "1e-3", "null", "- a", "'q'", '"', "\\n", "日本😀", "*x"]
)
def test_any_text_is_printed_so_that_it_loads_again(text, tmp_path):
    resolved = load_run("tiny", overrides={"train.run_dir": text, "data.paths": [text, "b"]})
    (tmp_path / "printed.yaml").write_text(to_yaml(resolved))
    assert load_run(str(tmp_path / "printed.yaml")).config == resolved.config


# Checks one by one, as other parts of the package call them.


def test_the_small_checks_accept_the_default_configs():
    config = RunConfig()
    check_model(config.model)
    check_deployment(config.model, config.deployment)
    check_train(config.train)
    check_data(config.data, config.model)


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (lambda c: check_model(dataclasses.replace(c.model, top_k=99)), "model.top_k = 99"),
        (lambda c: check_deployment(c.model, DeploymentConfig(expert=5)), "deployment.expert = 5"),
        (
            lambda c: check_deployment(dataclasses.replace(c.model, top_k=99), c.deployment),
            "model.top_k = 99",
        ),
        (lambda c: check_train(dataclasses.replace(c.train, warmup_steps=999)), "train.warmup_steps = 999"),
        (lambda c: check_data(dataclasses.replace(c.data, tokenizer="x"), c.model), "data.tokenizer = 'x'"),
        (lambda c: check_data(c.data, dataclasses.replace(c.model, vocab_size=5)), "model.vocab_size = 5"),
        (lambda c: check_model(ModelConfig(num_layers=True)), "model.num_layers = True"),
        (lambda c: check_train(dataclasses.replace(c.train, learning_rate=float("nan"))), "= nan"),
    ],
)
def test_the_small_checks_refuse(check, says):
    with pytest.raises(ConfigError) as refused:
        check(RunConfig())
    assert says in str(refused.value)


def test_all_problems_are_kept_and_counted_in_one_line():
    config = load_run("tiny").config
    bad = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=0, seed=-1, log_every=0))
    with pytest.raises(ConfigError) as refused:
        check_run(bad)
    assert [p.field for p in refused.value.problems if isinstance(p, Problem)] == [
        "train.steps", "train.seed", "train.log_every",
    ]  # fmt: skip
    assert str(refused.value).startswith("train.steps = 0: must be at least 1")
    assert str(refused.value).endswith("(and 2 more in train.seed, train.log_every)")


def test_sizes_that_are_suggested_do_divide():
    model = ModelConfig(num_heads=24, d_model=96, expert_hidden=40, vocab_size=280)
    for tensor, suggested in [(3, "2 or 4"), (5, "4 or 8"), (6, "4 or 8"), (16, "8,")]:
        with pytest.raises(ConfigError, match=f"use deployment.tensor {suggested}"):
            check_deployment(model, DeploymentConfig(tensor=tensor))
    for tensor in (2, 4, 8):
        check_deployment(model, DeploymentConfig(tensor=tensor))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("train.stps", "train.steps"),
        ("steps", "train.steps"),
        ("data.top_k", "model.top_k"),
        ("lr", "train.learning_rate"),
        ("layers", "model.num_layers"),
        ("TOP_K", "model.top_k"),
        ("quux", ""),
    ],
)
def test_near_names(name, nearest):
    assert did_you_mean(name, all_fields()) == (f"did you mean {nearest}?" if nearest else "")
