"""Whether a config can run at all: types, ranges, and sizes that must divide one another.

Nothing is built or traced here, so a refusal takes milliseconds. Each ``check_*`` raises one ConfigError that
holds every problem found; the first is in its message.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from moe_jax.config.errors import ConfigError, Problem, did_you_mean
from moe_jax.config.fields import SECTIONS, Section, mesh_label, section_fields, type_problem
from moe_jax.config.ranges import RANGES
from moe_jax.config.schema import DataConfig, DeploymentConfig, ModelConfig, RunConfig, TrainConfig

BYTE_VOCAB_SIZE = 272
"""Token ids of the byte tokenizer: 256 bytes and 16 specials."""


def check_run(cfg: RunConfig, sources: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError unless `cfg` can be built and trained, given enough devices and text.

    `sources` (dotted field -> where its value came from) is named in the message.
    """
    own = [p for section in SECTIONS for p in _section_problems(section, getattr(cfg, section))]
    problems = own or [
        *_model_problems(cfg.model),
        *_deployment_problems(cfg.model, cfg.deployment),
        *_train_problems(cfg.train),
        *_data_problems(cfg.data, cfg.model),
    ]
    _refuse(problems or list(_batch_problems(cfg)), sources)


def check_model(model: ModelConfig) -> None:
    """Raise ConfigError unless the model's sizes and dtypes fit together."""
    _refuse(_section_problems("model", model) or list(_model_problems(model)))


def check_deployment(model: ModelConfig, deployment: DeploymentConfig) -> None:
    """Raise ConfigError unless `model` can be split over the mesh of `deployment`."""
    own = [*_section_problems("model", model), *_section_problems("deployment", deployment)]
    _refuse(own or [*_model_problems(model), *_deployment_problems(model, deployment)])


def check_train(train: TrainConfig) -> None:
    """Raise ConfigError unless the optimisation's own numbers make sense together."""
    _refuse(_section_problems("train", train) or list(_train_problems(train)))


def check_data(data: DataConfig, model: ModelConfig) -> None:
    """Raise ConfigError unless the text's settings make sense and `model` has an id for every token.

    No file is opened here; the data loader does that.
    """
    own = [*_section_problems("data", data), *_section_problems("model", model)]
    _refuse(own or list(_data_problems(data, model)))


def _refuse(problems: list[Problem], sources: Mapping[str, str] | None = None) -> None:
    if problems:
        named = [replace(p, source=(sources or {}).get(p.field, "")) for p in problems]
        raise ConfigError(*named)


def _section_problems(section: str, part: Section) -> list[Problem]:
    """What is wrong with single fields: type, then range, then unprintable text."""
    assert isinstance(part, SECTIONS[section]), f"{section} is a {type(part).__name__}"
    hints = section_fields(section)
    defaults = {field.name: field.default for field in fields(part)}
    checked = (
        _field_problem(f"{section}.{name}", getattr(part, name), hint, defaults[name])
        for name, hint in hints.items()
    )
    return [problem for problem in checked if problem]


def _field_problem(field: str, value: Any, hint: Any, default: object) -> Problem | None:
    if problem := type_problem(field, value, hint):
        return problem
    if field in RANGES:
        return None if value is None else _range_problem(field, value, default)
    texts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    if all(text.strip() and text.isprintable() for text in texts):
        return None
    return Problem(field, value, "must be text that is not empty and can be printed", f"e.g. {default!r}")


def _range_problem(field: str, value: float, default: object) -> Problem | None:
    limits = RANGES[field]
    if value in limits:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return Problem(field, value, f"must be finite, {limits}", f"e.g. {default}")
    nearest = limits.low if value <= limits.low else limits.high
    fix = f"the nearest is {nearest:,}" if nearest in limits else f"e.g. {default}"
    return Problem(field, value, f"must be {limits}", fix)


def _nearest_divisors(total: int, size: int) -> str:
    """The divisors of `total` just below and just above `size`, as words."""
    small = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
    divisors = sorted({*small, *(total // n for n in small)})
    below = [n for n in divisors if n < size][-1:]
    return " or ".join(f"{n}" for n in below + [n for n in divisors if n > size][:1])


def _nearest_multiples(size: int, total: int) -> str:
    """The multiples of `size` just below and just above `total`, as words."""
    below = total // size * size
    return " or ".join(str(n) for n in (below, below + size) if n)


def _divides(field: str, size: int, total_field: str, total: int, others: int = 0) -> Iterator[Problem]:
    """A problem unless `size` divides `total`; the sizes to use instead divide `others` too."""
    if total % size:
        sizes = _nearest_divisors(math.gcd(total, others), size)
        fix = f"use {field} {sizes}, or {total_field} {_nearest_multiples(size, total)}"
        yield Problem(field, size, f"must divide {total_field} = {total}", fix)


def _head_dim(model: ModelConfig) -> int:
    return model.d_model // model.num_heads if model.head_dim is None else model.head_dim


def _model_problems(model: ModelConfig) -> Iterator[Problem]:
    if model.top_k > model.num_experts:
        allowed = f"must be at most model.num_experts = {model.num_experts}"
        yield Problem("model.top_k", model.top_k, allowed, f"use {model.num_experts} or fewer")
    if model.num_kv_heads is not None:
        yield from _divides("model.num_kv_heads", model.num_kv_heads, "model.num_heads", model.num_heads)
    if model.head_dim is None:
        yield from _divides("model.num_heads", model.num_heads, "model.d_model", model.d_model)
    if (model.head_dim is not None or model.d_model % model.num_heads == 0) and _head_dim(model) % 2:
        if model.head_dim is None:
            fix = f"use model.d_model {_nearest_multiples(2 * model.num_heads, model.d_model)}"
            allowed = "must be even (d_model / num_heads; rotary embedding turns pairs)"
        else:
            fix = f"use {model.head_dim + 1}"
            allowed = "must be even (rotary embedding turns pairs)"
        yield Problem("model.head_dim", _head_dim(model), allowed, fix)
    if model.compute_dtype == "float64" and model.param_dtype != "float64":
        fix = "use model.param_dtype float64, or model.compute_dtype float32"
        allowed = f"must be no wider than model.param_dtype = {model.param_dtype}"
        yield Problem("model.compute_dtype", model.compute_dtype, allowed, fix)
    if model.attention == "cudnn" and model.compute_dtype != "bfloat16":
        allowed = f"cannot compute in model.compute_dtype = {model.compute_dtype}; cuDNN needs bfloat16"
        yield Problem("model.attention", "cudnn", allowed, "use model.attention auto or blockwise")


def _deployment_problems(model: ModelConfig, deployment: DeploymentConfig) -> Iterator[Problem]:
    pipe, expert, tensor = deployment.pipe, deployment.expert, deployment.tensor
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", deployment.name):
        allowed = "must be 1 to 64 letters, digits, '-', '_' or '.' (it becomes part of file names)"
        yield Problem("deployment.name", deployment.name, allowed, f"use {mesh_label(deployment)}")
    yield from _divides("deployment.pipe", pipe, "model.num_layers", model.num_layers)
    yield from _divides("deployment.expert", expert, "model.num_experts", model.num_experts)
    split_by_tensor = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads or 0,  # 0: as num_heads, which is in the row above
        "model.expert_hidden": model.expert_hidden,
        "model.vocab_size": model.vocab_size,
    }
    for field, total in split_by_tensor.items():
        yield from _divides("deployment.tensor", tensor, field, total, math.gcd(*split_by_tensor.values()))
    if deployment.exchange == "local" and expert > 1:
        allowed = f"needs deployment.expert = 1, not {expert}: rows must cross the expert axis"
        yield Problem("deployment.exchange", "local", allowed, "use auto or bucketed")
    bucketed = deployment.exchange == "bucketed" or (deployment.exchange == "auto" and expert > 1)
    if deployment.bucket_rows is not None and not bucketed:
        allowed = "is used by the bucketed exchange only, and this deployment's is local"
        fix = "leave it null, or use deployment.exchange bucketed"
        yield Problem("deployment.bucket_rows", deployment.bucket_rows, allowed, fix)


def _train_problems(train: TrainConfig) -> Iterator[Problem]:
    if train.warmup_steps > train.steps:
        allowed = f"must be at most train.steps = {train.steps}"
        yield Problem("train.warmup_steps", train.warmup_steps, allowed, f"use {train.steps // 10}")
    slices = train.accumulation_steps
    yield from _divides("train.accumulation_steps", slices, "train.batch_size", train.batch_size)


def _data_problems(data: DataConfig, model: ModelConfig) -> Iterator[Problem]:
    if data.tokenizer == "bytes":
        if model.vocab_size < BYTE_VOCAB_SIZE:
            allowed = f"must be at least {BYTE_VOCAB_SIZE} with data.tokenizer bytes (256 bytes, 16 specials)"
            yield Problem("model.vocab_size", model.vocab_size, allowed, f"use {BYTE_VOCAB_SIZE}")
    elif not data.tokenizer.endswith(".json"):
        allowed = "must be bytes, or the path of a tokenizer.json"
        yield Problem("data.tokenizer", data.tokenizer, allowed, did_you_mean(data.tokenizer, ["bytes"]))


def _batch_problems(cfg: RunConfig) -> Iterator[Problem]:
    """Whether one optimizer step's batch can be cut into equal parts for every device and microbatch."""
    deployment, train = cfg.deployment, cfg.train
    cuts = {
        "deployment.data": deployment.data,
        "deployment.expert": deployment.expert,
        "train.accumulation_steps": train.accumulation_steps,
        "deployment.num_microbatches": deployment.num_microbatches,
    }
    parts = math.prod(cuts.values())
    if train.batch_size % parts:
        names = " * ".join(f"{field} ({size})" for field, size in cuts.items() if size > 1)
        fix = f"use train.batch_size {_nearest_multiples(parts, train.batch_size)}"
        if deployment.num_microbatches > 1:
            fix += ", or fewer deployment.num_microbatches"
        allowed = f"must be a multiple of {names} = {parts}"
        yield Problem("train.batch_size", train.batch_size, allowed, fix)
        return
    group_batch = train.batch_size // (train.accumulation_steps * deployment.data * deployment.expert)
    if group_batch * cfg.data.seq_len % deployment.pipe:
        allowed = (
            f"must divide the {group_batch * cfg.data.seq_len} tokens of a device group "
            f"({group_batch} sequences of data.seq_len = {cfg.data.seq_len}), whose logits the stages share"
        )
        fix = f"use data.seq_len {_nearest_multiples(deployment.pipe, cfg.data.seq_len)}"
        yield Problem("deployment.pipe", deployment.pipe, allowed, fix)
