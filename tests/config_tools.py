"""What the tests of bad configs share: a training script that must not train, and what a refusal is."""

import contextlib
import copy
import functools
import importlib.util
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import load_run, to_dict
from moe_jax.config.cli import run_script

REPOSITORY = Path(__file__).parents[1]
TRAIN = REPOSITORY / "scripts" / "train.py"


def load_train_main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
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
