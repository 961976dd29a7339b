"""Random configs: a good one passes; broken in exactly one place it is refused, and the field is named."""

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import pytest
from config_tools import as_json_yaml, changed, load_train_main, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.config import ConfigError, check_run, from_dict, to_dict
from moe_jax.config.fields import all_fields
from moe_jax.config.ranges import RANGES

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def train_main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    return load_train_main(monkeypatch)


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
