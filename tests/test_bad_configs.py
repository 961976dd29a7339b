"""Every bad config is refused: exit code 2, one last line naming field, value and fix; nothing runs."""

import contextlib
import copy
import functools
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from bad_config_cases import ARGUMENTS, DEPLOYMENTS, INF, NAN, TEXTS, VALUES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.config import ConfigError, check_run, from_dict, load_run, parse_deployment, to_dict
from moe_jax.config.cli import run_script
from moe_jax.config.fields import all_fields
from moe_jax.config.ranges import RANGES

REPOSITORY = Path(__file__).parents[1]
TRAIN = REPOSITORY / "scripts" / "train.py"


@pytest.fixture
def train_main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """scripts/train.py's main, in the repository's folder, with a training loop that must not be reached."""

    def run(*_: object) -> int:
        raise AssertionError("a bad config got as far as the training loop")

    loop = types.ModuleType("moe_jax.train.loop")
    loop.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moe_jax.train.loop", loop)
    monkeypatch.chdir(REPOSITORY)
    spec = importlib.util.spec_from_file_location("train_script", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.main


def refusal(main: Callable[[list[str]], int], argv: list[str]) -> str:
    """The last line of stderr of a command line that must be refused."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_script(main, argv)
    assert code == 2
    assert out.getvalue() == ""
    return checked_line(err.getvalue())


def checked_line(stderr: str) -> str:
    lines = stderr.splitlines()
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], stderr
    assert "Traceback" not in stderr
    assert len(lines[-1]) < 700, "no one reads a line this long"
    return lines[-1]


@functools.cache
def tiny() -> dict[str, Any]:
    return to_dict(load_run(str(REPOSITORY / "configs/runs/tiny.yaml")).config)


def changed(values: dict[str, Any]) -> dict[str, Any]:
    """The tiny run as nested dicts, with some fields changed."""
    run = copy.deepcopy(tiny())
    for field, value in values.items():
        section, _, name = field.partition(".")
        run[section][name] = value
    return run


def as_json_yaml(value: Any) -> str:
    """JSON, which is YAML, but for NaN and the infinities."""
    return json.dumps(value).replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")


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


# Random configs: a good one, broken in exactly one place.


@st.composite
def good_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config that must pass, as nested dicts; sizes are built up from the mesh, so all of them divide."""
    size = st.sampled_from([1, 2, 3, 4, 8])
    pipe, data, expert, tensor = draw(size), draw(size), draw(size), draw(size)
    few = st.integers(1, 4)
    kv_heads = tensor * draw(few)
    heads = kv_heads * draw(few)
    head_dim = 2 * draw(few)
    experts = max(2, expert * draw(few))
    microbatches, accumulation = draw(few), draw(few)
    run = changed({})
    run["model"] |= {
        "num_layers": pipe * draw(few),
        "num_heads": heads,
        "num_kv_heads": draw(st.sampled_from([None, kv_heads])),
        "head_dim": (explicit := draw(st.sampled_from([None, head_dim]))),
        "d_model": heads * head_dim if explicit is None else draw(st.integers(1, 100)),
        "num_experts": experts if experts % expert == 0 else 2 * expert,
        "top_k": draw(st.integers(1, 2)),
        "expert_hidden": tensor * draw(few),
        "num_shared_experts": draw(st.integers(0, 3)),
        "vocab_size": tensor * draw(st.integers(272, 300)),
    }
    run["deployment"] |= {"name": "mesh", "pipe": pipe, "data": data, "expert": expert, "tensor": tensor}
    run["deployment"] |= {
        "num_microbatches": microbatches,
        "exchange": draw(st.sampled_from(["auto", "bucketed"])),
    }
    run["train"] |= {
        "batch_size": data * expert * microbatches * accumulation * draw(few),
        "accumulation_steps": accumulation,
        "learning_rate": draw(st.floats(1e-6, 1)),
        "adam_b2": draw(st.floats(0, 0.9999)),
        "steps": draw(st.integers(20, 10**6)),
        "seed": draw(st.integers(0, 2**31 - 1)),
    }
    run["data"] |= {"seq_len": pipe * draw(st.integers(1, 50))}
    return run


@st.composite
def broken_configs(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """A config with exactly one fault, and the field that the error must name."""
    run = draw(good_configs())
    kind = draw(st.sampled_from(["range", "type", "choice", "unknown", "missing", "divide"]))
    fields = all_fields()
    if kind == "range":
        field = draw(st.sampled_from(sorted(RANGES)))
        value = draw(outside(field))
    elif kind == "type":
        field = draw(st.sampled_from(sorted(fields)))
        value = draw(st.sampled_from([value for value in WRONG if not acceptable(value, fields[field])]))
    elif kind == "choice":
        field = draw(st.sampled_from([name for name, hint in fields.items() if get_origin(hint) is Literal]))
        value = draw(st.text(max_size=12).filter(lambda text: text not in get_args(fields[field])))
    elif kind == "unknown":
        section = draw(st.sampled_from(sorted(run)))
        name = draw(
            st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1).filter(lambda name: name not in run[section])
        )
        field, value = f"{section}.{name}", draw(st.integers())
    elif kind == "missing":
        field = draw(st.sampled_from(sorted(run)))
        del run[field]
        return run, field
    else:
        field, value = draw(indivisible(run))
    section, _, name = field.partition(".")
    run[section][name] = value
    return run, field


WRONG: list[Any] = ["", "5", "true", "x" * 500, True, False, None, 1.5, 7, [], [1], {}, {"a": 1}]


def acceptable(value: Any, hint: Any) -> bool:
    """Whether a value of WRONG has the type of a field, said independently of the code under test."""
    if value is None:
        return type(None) in get_args(hint)
    if isinstance(value, list):
        return get_origin(hint) is tuple and not value
    if isinstance(value, dict):
        return False
    names = str(hint)
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, str):
        return hint is str
    return "float" in names if isinstance(value, float) else "int" in names or "float" in names


def outside(field: str) -> st.SearchStrategy[Any]:
    """Numbers of the field's type outside its range, NaN and infinities among them."""
    limits = RANGES[field]
    if all_fields()[field] is float:
        below = st.floats(max_value=float(limits.low), exclude_max=not limits.open_low, allow_nan=False)
        above = st.floats(min_value=float(limits.high), exclude_min=True, allow_nan=False)
        return st.one_of(below, above, st.sampled_from([NAN, INF, -INF]))
    return st.one_of(st.integers(max_value=int(limits.low) - 1), st.integers(min_value=int(limits.high) + 1))


@st.composite
def indivisible(draw: st.DrawFn, run: dict[str, Any]) -> tuple[str, Any]:
    """A size that does not fit the others of a good run, and its field."""
    model, deployment = run["model"], run["deployment"]
    primes = st.sampled_from([101, 103, 107])
    options: list[tuple[str, Any]] = [
        ("model.top_k", model["num_experts"] + draw(st.integers(1, 5))),
        ("model.num_kv_heads", model["num_heads"] + draw(st.integers(1, 5))),
        ("model.head_dim", 2 * draw(st.integers(1, 50)) + 1),
        ("model.vocab_size", draw(st.integers(2, 271))),
        ("deployment.pipe", draw(primes)),
        ("deployment.tensor", draw(primes)),
        ("deployment.expert", draw(primes)),
        ("train.warmup_steps", run["train"]["steps"] + draw(st.integers(1, 5))),
    ]
    parts = deployment["data"] * deployment["expert"] * deployment["num_microbatches"]
    if parts > 1:
        options.append(("train.batch_size", run["train"]["batch_size"] + draw(st.integers(1, parts - 1))))
    return draw(st.sampled_from(options))


def read(run: dict[str, Any]) -> None:
    check_run(from_dict(run))


@given(good_configs())
@settings(max_examples=300, deadline=None)
def test_good_random_configs_pass(run):
    read(run)
    assert to_dict(from_dict(run)) == run


@given(broken_configs())
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_configs_with_one_fault_are_refused_by_name(case):
    run, field = case
    with pytest.raises(ConfigError) as refused:
        read(run)
    line = str(refused.value)
    assert field in line
    assert "\n" not in line


@given(case=broken_configs())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_random_configs_with_one_fault_do_not_run(case, train_main, tmp_path):
    run, field = case
    run_file = tmp_path / "run.yaml"
    run_file.write_text(as_json_yaml(run))
    if field in run or "." in field:  # a run file may leave out a section; a stored config may not
        assert field in refusal(train_main, ["--config", str(run_file)])
