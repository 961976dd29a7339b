"""The command line made from the config dataclasses, and scripts with options of their own."""

import ast
import dataclasses
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import moe_jax.config.schema as schema
from moe_jax.config import load_run
from moe_jax.config.cli import NoOptions, RunRequest, parse_options, parse_run, run_script
from moe_jax.config.fields import SECTIONS, all_fields, walk
from moe_jax.config.ranges import RANGES

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def parse(*argv: str) -> RunRequest[NoOptions]:
    return parse_run(list(argv), NoOptions, prog="train.py", description="Train.")


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--model.top-k", "3"], "model.top_k", 3),
        (["--model.top_k", "3"], "model.top_k", 3),
        (["--model.top-k=3"], "model.top_k", 3),
        (["--train.no-resume"], "train.resume", False),
        (["--train.no_resume"], "train.resume", False),
        (["--train.state-checksum"], "train.state_checksum", True),
        (["--data.paths", "a", "b c"], "data.paths", ("a", "b c")),
        (["--data.paths"], "data.paths", ()),
        (["--model.head-dim", "16"], "model.head_dim", 16),
        (["--model.head-dim", "None"], "model.head_dim", None),
        (["--train.learning-rate", "1e-3"], "train.learning_rate", 1e-3),
        (["--train.steps", "30", "--train.steps", "40"], "train.steps", 40),
        (["--deployment.num-microbatches", "2"], "deployment.num_microbatches", 2),
        (["--model.activation", "silu"], "model.activation", "silu"),
    ],
)
def test_fields_on_the_command_line(arguments, field, value):
    request = parse("--config", "configs/runs/tiny.yaml", *arguments)
    assert dict(walk(request.config))[field] == value
    changed = {name for name, source in request.resolved.provenance.items() if source == "command line"}
    assert changed == {field}


def help_text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*argv, "--help")
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.smoke
def test_help_explains_every_field_with_its_default(capsys):
    text = help_text(capsys)
    for section, kind in SECTIONS.items():
        docs = attribute_docs(kind)
        for field in dataclasses.fields(kind):
            flag = f"--{section}.{field.name.replace('_', '-')}"
            assert flag in text
            explained = text[text.index(f"{flag} ") if f"{flag} " in text else text.index(flag) :]
            assert docs[field.name][:40] in explained[:400]
            assert "(default: " in explained[:700]
    for flag in ("--config", "--model", "--deployment", "--print-config", "--debug"):
        assert f"{flag} " in text


def attribute_docs(kind: type) -> dict[str, str]:
    """The docstring below each field, in one line."""
    classes = [node for node in ast.parse(inspect.getsource(schema)).body if isinstance(node, ast.ClassDef)]
    (body,) = (node.body for node in classes if node.name == kind.__name__)
    docs = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            docs[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


def test_every_field_is_documented_and_every_number_has_a_range():
    for section, kind in SECTIONS.items():
        assert set(attribute_docs(kind)) == {field.name for field in dataclasses.fields(kind)}, section
    numbers = {name for name, hint in all_fields().items() if {int, float} & {hint, *get_args(hint)}}
    assert set(RANGES) == numbers
    assert len(numbers) > 35


def test_help_shows_the_defaults_of_the_named_files(capsys):
    assert "--model.d-model INT Width of the residual stream. (default: 64)" in help_text(
        capsys, "--config", "tiny"
    )


def test_help_does_not_import_jax():
    code = (
        "import sys; from moe_jax.config.cli import NoOptions, parse_run\n"
        "try: parse_run(['--help'], NoOptions, prog='x', description='')\n"
        "finally: print('jax' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert "--train.steps" in done.stdout


def test_a_reader_that_leaves_early_is_no_error():
    train = f"{sys.executable} {REPOSITORY / 'scripts' / 'train.py'} --config tiny"
    for argument in ("--help", "--print-config"):
        done = subprocess.run(
            ["bash", "-c", f"{train} {argument} | true; echo ${{PIPESTATUS[0]}}"],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.stdout, done.stderr) == ("0\n", "")


@dataclasses.dataclass(frozen=True)
class Greeting:
    """Options of a script of its own."""

    name: str
    """Whom to greet."""
    times: int = 1
    """How often."""


def greet(argv: list[str]) -> int:
    options = parse_options(argv, Greeting, prog="greet", description="Greet.")
    print(f"hello {options.name} " * options.times)
    return 0


def test_a_script_with_its_own_options(capsys):
    assert run_script(greet, ["--name", "you", "--times", "2"]) == 0
    assert capsys.readouterr().out == "hello you hello you \n"
    for argv, says in [
        ([], "error: Missing from greet: --name STR Whom to greet. (required)"),
        (["--name", "you", "--times", "x"], "error: Error parsing --times: invalid literal for int()"),
        (["--nmae", "you"], "error: --nmae = 'you' (command line): no such option; did you mean --name?"),
        (
            ["--name", "you", "--tmies", "2"],
            "error: --tmies = '2' (command line): no such option; did you mean --times?",
        ),
    ]:
        assert run_script(greet, argv) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert says in lines[0]


def test_a_run_script_with_its_own_options():
    request = parse_run(["--config", "tiny", "--name", "you"], Greeting, prog="x", description="")
    assert request.options == Greeting("you")
    assert request.config == load_run("tiny").config
