"""A comparison from its options to its files: what scripts/compare.py does once devices are there."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from moe_jax.compare.comparison import Comparison, compare_deployments, to_json
from moe_jax.compare.curves import Curve, read_curves
from moe_jax.compare.difference import TOLERANCES, Tolerance
from moe_jax.compare.measure import Work
from moe_jax.compare.options import CompareOptions, check_batch
from moe_jax.compare.report import write_report
from moe_jax.compare.table import print_comparison
from moe_jax.compare.tokens import held_out_batch, random_batch
from moe_jax.config import ConfigError, DeploymentConfig, ModelConfig, RunConfig, check_deployment, from_dict
from moe_jax.deployments import Deployment
from moe_jax.train.data import Batch
from moe_jax.train.metrics import METRICS_FILE
from moe_jax.train.tokenizer import Tokenizer, tokenizer_of_checkpoint


@dataclass(frozen=True)
class _Inputs:
    """What is read before anything is computed."""

    checkpoint: Checkpoint
    run: RunConfig
    model: ModelConfig
    """That of the run, in the dtype that was asked for."""
    batch: Batch
    tokenizer: Tokenizer | None
    """None for random tokens, which mean nothing as text."""
    curves: list[Curve]


def run(options: CompareOptions, deployments: list[DeploymentConfig]) -> int:
    """Compare, print, and write the files that are asked for; 0 if all deployments agree, else 1.

    float32 and float64 products are exact to their dtype, also where a GPU would take TF32 by default. A
    float64 comparison switches jax to 64-bit mode. Raises ConfigError for a checkpoint that is not there or
    does not fit a deployment, before anything is compiled.
    """
    inputs = _read_inputs(options, deployments)
    model, tolerance = inputs.model, _tolerance(inputs.model, options.tolerance)
    if model.param_dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    work = Work(
        model=model,
        load=_loader(inputs.checkpoint, inputs.run.model, model),
        batch=inputs.batch,
        num_generated=options.generate,
        temperature=options.temperature,
        repeats=options.repeats,
        zero_params=inputs.run.train.zero_params,
    )
    with jax.default_matmul_precision("highest"):
        entries = compare_deployments(deployments, work, tolerance, _announce)
    num_sequences, seq_len = inputs.batch["ids_BL"].shape
    comparison = Comparison(
        checkpoint=str(inputs.checkpoint.path),
        step=inputs.checkpoint.step,
        model=model,
        tokens=options.tokens,
        num_sequences=num_sequences,
        seq_len=seq_len,
        machine=_machine(),
        tolerance=tolerance,
        entries=entries,
    )
    print_comparison(comparison, inputs.tokenizer)
    _write(options, comparison, inputs)
    return 1 if comparison.failures else 0


def _read_inputs(options: CompareOptions, deployments: list[DeploymentConfig]) -> _Inputs:
    try:
        checkpoint = open_checkpoint(options.checkpoint)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint: {error}") from error
    config = from_dict(_meta(checkpoint, "config"))
    model = in_dtype(config.model, options.dtype)
    for deployment in deployments:
        check_deployment(model, deployment)
    seq_len = options.seq_len or config.data.seq_len
    check_batch(deployments, options.sequences, seq_len)
    curves = _curves(options, checkpoint)
    if options.tokens == "random":
        batch, tokenizer = random_batch(model.vocab_size, options.sequences, seq_len), None
    else:
        tokenizer = tokenizer_of_checkpoint(_meta(checkpoint, "tokenizer"), _run_dir(checkpoint))
        batch = held_out_batch(config, tokenizer, options.sequences, seq_len)
    return _Inputs(checkpoint, config, model, batch, tokenizer, curves)


def in_dtype(model: ModelConfig, dtype: str | None) -> ModelConfig:
    """The model computing in `dtype`, its weights held no narrower than that; None leaves it as it is."""
    if dtype is None:
        return model
    by_width = ("bfloat16", "float32", "float64")
    widest = by_width[max(by_width.index(dtype), by_width.index(model.param_dtype))]
    fits = model.attention != "cudnn" or dtype == "bfloat16"
    attention = model.attention if fits else "auto"
    return replace(model, compute_dtype=dtype, param_dtype=widest, attention=attention)


def _meta(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    try:
        return checkpoint.meta[name]
    except KeyError:
        reason = f"its meta has no {name}, so it is not from a training run; give the folder of one"
        raise ConfigError(f"checkpoint: {checkpoint.path}: {reason}") from None


def _run_dir(checkpoint: Checkpoint) -> Path:
    """The folder of the run that wrote a checkpoint, <run>/checkpoints/<step>."""
    return checkpoint.path.parent.parent


def _curves(options: CompareOptions, checkpoint: Checkpoint) -> list[Curve]:
    """Those of the run itself unless others are named; read early, so that a bad file costs no work."""
    if options.html is None:
        return []
    own = _run_dir(checkpoint)
    default = [own] if (own / METRICS_FILE).is_file() else []
    return read_curves([Path(run).expanduser() for run in options.runs] or default)


def _tolerance(model: ModelConfig, given: float | None) -> Tolerance:
    tolerance = TOLERANCES[model.compute_dtype]
    return tolerance if given is None else replace(tolerance, loss=given, logits=given, gradients=given)


def _loader(
    checkpoint: Checkpoint, stored: ModelConfig, model: ModelConfig
) -> Callable[[Deployment, bool], dict]:
    """Restores the weights into a deployment's own layout, and widens them if the model asks for it."""
    stored_dtype, dtype = jnp.dtype(stored.param_dtype), jnp.dtype(model.param_dtype)

    def load(deployment: Deployment, at_rest: bool) -> dict:
        wanted = deployment.abstract_params(at_rest=at_rest)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        as_stored = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, stored_dtype, sharding=leaf.sharding), wanted
        )
        try:
            params = checkpoint.restore_params(as_stored)
        except CheckpointError as error:
            raise ConfigError(f"checkpoint: {error}") from error
        if stored_dtype == dtype:
            return params
        widen = jax.jit(
            lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree), out_shardings=shardings
        )
        return widen(params)

    return load


def _machine() -> str:
    devices = jax.devices()
    return f"{len(devices)} devices of kind {devices[0].device_kind}, jax {jax.__version__}"


def _announce(name: str) -> None:
    print(f"running {name}", file=sys.stderr, flush=True)


def _write(options: CompareOptions, comparison: Comparison, inputs: _Inputs) -> None:
    if options.json:
        text = json.dumps(to_json(comparison), indent=1, allow_nan=False)
        Path(options.json).expanduser().write_text(text + "\n", encoding="utf-8")
        print(f"results: {options.json}", file=sys.stderr)
    if options.html:
        write_report(Path(options.html).expanduser(), comparison, inputs.curves, inputs.tokenizer)
        print(f"report: {options.html}", file=sys.stderr)
