"""Every bad config is refused: exit code 2, one last line naming field, value and fix; nothing runs."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest
from bad_config_cases import ARGUMENTS, DEPLOYMENTS, TEXTS, VALUES
from config_tools import REPOSITORY, TRAIN, as_json_yaml, changed, checked_line, load_train_main, refusal

from moe_jax.config import ConfigError, from_dict, load_run, parse_deployment
from moe_jax.config.cli import run_script
from moe_jax.config.fields import all_fields


@pytest.fixture
def train_main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    return load_train_main(monkeypatch)


def test_there_are_enough_cases():
    assert len(VALUES) + len(TEXTS) + len(ARGUMENTS) + len(DEPLOYMENTS) >= 250
    numbers_and_choices = {name for name, hint in all_fields().items() if hint is not bool}
    assert numbers_and_choices <= {field for values, _, _ in VALUES for field in values}


@pytest.mark.parametrize(("values", "named", "says"), VALUES, ids=[str(case[0]) for case in VALUES])
def test_a_bad_value_in_a_run_file(values, named, says, tmp_path):
    def main(argv: list[str]) -> int:
        raise AssertionError(f"accepted: {load_run(argv[0]).config}")

    run_file = tmp_path / "run.yaml"
    run_file.write_text(as_json_yaml(changed(values)))
    line = refusal(main, [str(run_file)])
    assert line.startswith(f"error: {named}")
    assert says in line
    assert str(run_file) in line, "the file that holds the value is named"


@pytest.mark.parametrize(("text", "says"), TEXTS, ids=[case[0][:40] for case in TEXTS])
def test_a_bad_run_file(text, says, train_main, tmp_path):
    run_file = tmp_path / "run.yaml"
    run_file.write_text(text)
    line = refusal(train_main, ["--config", str(run_file)])
    assert says in line.replace(f"{tmp_path}/", "")


def test_a_run_file_that_is_no_text(train_main, tmp_path):
    (run_file := tmp_path / "run.yaml").write_bytes(b"model: tiny\n# caf\xe9\n")
    assert f"{run_file}: byte 17 is not UTF-8" in refusal(train_main, ["--config", str(run_file)])


@pytest.mark.parametrize(("arguments", "says"), ARGUMENTS, ids=[case[0] for case in ARGUMENTS])
def test_bad_arguments(arguments, says, train_main):
    assert says in refusal(train_main, ["--config", "tiny", *arguments.split(" ")])


def test_no_run_named(train_main):
    assert "use --config with a file or one of: paper, small, tiny" in refusal(
        train_main, ["--train.steps", "5"]
    )


@pytest.mark.parametrize(("text", "says"), DEPLOYMENTS)
def test_a_bad_deployment(text, says, train_main):
    assert says in refusal(train_main, ["--config", "tiny", f"--deployment={text}"])
    with pytest.raises(ConfigError) as refused:
        parse_deployment(text)
    assert says in str(refused.value)


def test_debug_shows_the_traceback_before_the_line(train_main, capsys):
    assert run_script(train_main, ["--config", "tiny", "--train.steps", "-5", "--debug"]) == 2
    stderr = capsys.readouterr().err
    assert "Traceback (most recent call last)" in stderr
    assert stderr.splitlines()[-1].startswith("error: train.steps = -5")


def test_an_error_that_is_not_the_users_passes_through():
    def main(argv: list[str]) -> int:
        raise ZeroDivisionError(argv)

    with pytest.raises(ZeroDivisionError):
        run_script(main, [])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (None, "config = None: must be a mapping"),
        ([], "config = []: must be a mapping"),
        ({}, "model = None: this section is missing"),
        ({"model": {}, "deployment": {}, "train": {}}, "data = None: this section is missing"),
        ({"model": {}, "deployment": {}, "train": {}, "data": {}, "serve": {}}, "serve = {}: no such field"),
        ({"model": {"num_layers": "4"}, "deployment": {}, "train": {}, "data": {}}, "model.num_layers = '4'"),
        (
            {"model": {"num_layer": 4}, "deployment": {}, "train": {}, "data": {}},
            "did you mean model.num_layers",
        ),
        ({"model": {5: 4}, "deployment": {}, "train": {}, "data": {}}, "model.5 = 4: no such field"),
    ],
)
def test_a_bad_dict(values, says):
    with pytest.raises(ConfigError) as refused:
        from_dict(values, "config.json")
    assert says in str(refused.value).replace(" (config.json)", "")
    assert "config.json" in str(refused.value)


# A real process: no device is emulated for it and it must not even import jax before it refuses.
PROCESSES: list[tuple[list[str], dict[str, str], str]] = [
    (["--config", "tiny", "--train.stps", "3"], {}, "did you mean --train.steps?"),
    (["--config", "tiny", "--train.steps", "x"], {}, "train.steps = 'x'"),
    (["--config", "paper", "--deployment", "expert=5"], {}, "deployment.expert = 5"),
    (["--config", "paper", "--deployment", "tensor=6"], {}, "deployment.tensor = 6"),
    (["--config", "paper", "--deployment", "pipe=3"], {}, "deployment.pipe = 3"),
    (["--config", "tiny", "--deployment", "tp8pp2", "--train.batch-size", "18"], {}, "train.batch_size = 18"),
    (["--config", "tiny", "--model.top-k", "17"], {}, "model.top_k = 17"),
    (["--config", "tini"], {}, "did you mean tiny?"),
    (
        ["--config", "tiny", "--deployment", "ep16"],
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        "deployment.num_devices = 16: must be at most 8",
    ),
    (
        ["--config", "tiny", "--deployment", "expert=16,tensor=8,data=16", "--train.batch-size", "256"],
        {},
        "deployment.num_devices = 2048: must be at most 1024 (emulated CPU devices)",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "environment", "says"), PROCESSES, ids=[" ".join(case[0]) for case in PROCESSES]
)
def test_a_process_is_refused_in_time_without_jax(arguments, environment, says):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(TRAIN), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert says in checked_line("\n".join(said))
    assert done.stdout == ""
    assert imports
    assert not [line for line in imports if line.rpartition("|")[2].strip() == "jax"]
    # Processor time, since on a busy machine the clock also counts what others do.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 2
