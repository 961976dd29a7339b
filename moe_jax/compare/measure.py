"""One deployment, measured: what it computes on a batch, what its programs move and hold, how fast."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint.leaves import named_leaves
from moe_jax.config.schema import DeploymentConfig, ModelConfig
from moe_jax.deployments import Deployment, create
from moe_jax.deployments.placement import Placement, expert_placement
from moe_jax.infer.generate import Generator
from moe_jax.model.transformer import cast_for_compute
from moe_jax.plan.hlo import KindSummary, collectives, summary

NUM_PROMPTS, PROMPT_TOKENS = 4, 64
"""At most so many sequences of a batch, and of their tokens, are prompts for generation."""


@dataclass(frozen=True)
class Work:
    """What every deployment of a comparison is given."""

    model: ModelConfig
    load: Callable[[Deployment, bool], dict]
    """(deployment, at rest) -> the parameters in its layout at rest or of use, in model.param_dtype."""
    batch: dict[str, np.ndarray]
    """ids_BL and targets_BL, int32 [B, L]; every deployment can cut it evenly."""
    num_generated: int = 0
    """Tokens to generate after each prompt; prompts are the beginnings of a few sequences of the batch."""
    temperature: float = 0.0
    """Of the generation; 0 takes the most likely tokens."""
    repeats: int = 3
    """Timed runs of each program, after one to warm up."""
    zero_params: bool = True
    """As in the run's train config: what the weights at rest are split over."""


@dataclass(frozen=True)
class ProgramCost:
    """One compiled program: its time here, and what it moves and holds on each device."""

    time_s: float
    """Median of the timed runs."""
    tokens_per_s: float
    """Tokens of the whole batch over time_s."""
    collectives: dict[str, KindSummary]
    """By kind, from the compiled program; bytes are per device and run."""
    temporary_bytes: int | None
    """Most that a device holds besides inputs and results; None where the backend does not say."""


@dataclass(frozen=True)
class Measurement:
    """All numbers of one deployment that are small."""

    deployment: DeploymentConfig
    num_devices: int
    terms: dict[str, float]
    """loss, and its terms cross_entropy, balance_loss, z_loss (not yet weighted)."""
    forward: ProgramCost
    """ids to logits, weights in use."""
    gradients: ProgramCost
    """ids and targets to loss and gradients, weights at rest."""
    in_use_bytes: int
    """Weights of the fullest device as they are multiplied."""
    at_rest_bytes: int
    """Weights of the fullest device as training holds them (master weights, without optimizer state)."""
    rounds_N: list[int]
    """Rounds that each layer's exchange took."""
    tokens_per_expert_NE: list[list[int]]
    """Times each expert was chosen."""
    placement: Placement
    """Where the experts lie in use, from the arrays' shardings."""


@dataclass(frozen=True)
class Outputs:
    """What a deployment computed."""

    terms: dict[str, float]
    logits_BLV: Any
    """Array, at least float32."""
    gradients: dict[str, Any]
    """Arrays by the parameter's name, as in blocks/router/w."""
    experts_NTK: np.ndarray
    """Chosen experts of every layer and token, sorted by id."""
    generated_BL: np.ndarray | None
    """Prompts and what was generated after them, int32; None if nothing was asked for."""

    def on_host(self) -> "Outputs":
        """The same as numpy arrays, so that no device memory is held."""
        gradients = {name: np.asarray(array) for name, array in self.gradients.items()}
        return Outputs(
            self.terms, np.asarray(self.logits_BLV), gradients, self.experts_NTK, self.generated_BL
        )


def measure(config: DeploymentConfig, work: Work) -> tuple[Measurement, Outputs]:
    """Lay the model out, run the batch forward and backward, generate; every program is compiled once.

    Raises ConfigError when there are too few devices.
    """
    deployment = create(work.model, config, zero_params=work.zero_params)
    batch = deployment.place_batch(work.batch)
    num_tokens = work.batch["ids_BL"].size
    # One after the other, so that the weights lie on the devices only once.
    params = work.load(deployment, True)
    at_rest_bytes = device_bytes(params)
    call = deployment.loss_and_gradients_program
    (terms, grads, routing), gradients = _run(call, (params, batch), num_tokens, work.repeats)
    del params
    params = _as_multiplied(work.load(deployment, False), work.model)
    logits_TV, forward = _run(deployment.logits_program, (params, batch["ids_BL"]), num_tokens, work.repeats)
    terms = {name: float(value) for name, value in sorted(terms.items())}
    measurement = Measurement(
        deployment=config,
        num_devices=config.num_devices,
        terms=terms,
        forward=forward,
        gradients=gradients,
        in_use_bytes=device_bytes(params),
        at_rest_bytes=at_rest_bytes,
        rounds_N=np.asarray(routing["rounds_N"]).tolist(),
        tokens_per_expert_NE=np.asarray(routing["tokens_per_expert_NE"]).tolist(),
        placement=expert_placement(params, deployment.mesh),
    )
    outputs = Outputs(
        terms,
        logits_TV.reshape(*work.batch["ids_BL"].shape, -1),
        named_leaves(grads),
        np.sort(np.asarray(routing["expert_ids_NTK"]), axis=-1),
        _generate(deployment, params, work),
    )
    return measurement, outputs


def device_bytes(params: dict) -> int:
    """Bytes of the parameters' parts on the device that holds most."""
    held: dict[Any, int] = {}
    for array in jax.tree.leaves(params):
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            spans = (part.indices(size) for part, size in zip(index, array.shape, strict=True))
            size = math.prod(stop - start for start, stop, _ in spans)
            held[device] = held.get(device, 0) + size * array.dtype.itemsize
    return max(held.values())


def _as_multiplied(params: dict, model: ModelConfig) -> dict:
    shardings = jax.tree.map(lambda array: array.sharding, params)
    return jax.jit(partial(cast_for_compute, cfg=model), out_shardings=shardings)(params)


def _run(call: Any, arguments: tuple, num_tokens: int, repeats: int) -> tuple[Any, ProgramCost]:
    """Compile a jitted function once, run it, and read its cost; its result is that of the last run."""
    compiled = call.lower(*arguments).compile()
    times_s, result = [], None
    for _ in range(1 + repeats):
        result = None  # two results at a time may be too large
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        times_s.append(time.perf_counter() - start)
    time_s = median(times_s[1:])
    memory = compiled.memory_analysis()
    return result, ProgramCost(
        time_s=time_s,
        tokens_per_s=num_tokens / time_s,
        collectives=summary(collectives(compiled.as_text())),
        temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


def _generate(deployment: Deployment, params: dict, work: Work) -> np.ndarray | None:
    if not work.num_generated:
        return None
    prompts_BL = work.batch["ids_BL"][:NUM_PROMPTS, :PROMPT_TOKENS]
    stream = Generator(deployment).stream(params, prompts_BL, work.num_generated, work.temperature, 0)
    return np.concatenate([prompts_BL, np.stack(list(stream), axis=1)], axis=1)
