"""A pipeline over one mesh axis, for any stage function: GPipe's schedule (Huang et al. 2019)."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Aux = TypeVar("Aux")


def pipeline(
    stage: Callable[[jax.Array], tuple[jax.Array, Aux]], x_M: jax.Array, axis: str, num_stages: int
) -> tuple[jax.Array, Aux]:
    """Run every microbatch through all stages, for use inside a shard_map over ``axis``.

    stage: this device's stage, microbatch -> (microbatch of the same shape and dtype, aux tree).
    x_M: [M, ...] the microbatches. They enter on the first stage; on the others only the first one is used,
    as what their idle ticks work on.
    Returns (y_M, aux_M): y_M [M, ...] holds the results on the LAST stage and is meaningless on the others;
    aux_M holds each device's own stage's aux for every microbatch.

    M + num_stages - 1 ticks, each ending in one permute; in the ticks in which a stage has no microbatch it
    works on values whose results are dropped: those of a microbatch, as a router sends zeros all one way. The
    bubble is (num_stages - 1) / M of the useful time.
    """
    num_microbatches = x_M.shape[0]
    if num_stages == 1:
        if num_microbatches == 1:  # no loop around the only microbatch: the compiler can overlap across it
            return jax.tree.map(lambda a: a[None], stage(x_M[0]))
        return jax.lax.map(stage, x_M)
    index = jax.lax.axis_index(axis)
    to_next = [(i, i + 1) for i in range(num_stages - 1)]

    def tick(received, t):
        first = jax.lax.dynamic_index_in_dim(x_M, jnp.minimum(t, num_microbatches - 1), keepdims=False)
        y, aux = stage(jnp.where(index == 0, first, received))
        return jax.lax.ppermute(y, axis, to_next), (y, aux)

    ticks = jnp.arange(num_microbatches + num_stages - 1, dtype=jnp.int32)
    _, (y_ticks, aux_ticks) = jax.lax.scan(tick, x_M[0], ticks)
    # Stage s meets microbatch m in tick m + s.
    aux_M = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index, num_microbatches), aux_ticks)
    return y_ticks[num_stages - 1 :], aux_M


def pipeline_with_state(
    stage: Callable[[jax.Array, Aux], tuple[jax.Array, Aux]],
    x: jax.Array,
    state: Aux,
    axis: str,
    num_stages: int,
) -> tuple[jax.Array, Aux]:
    """One microbatch through all stages, each with a state of its own that it reads and updates.

    As pipeline with M = 1, for steps that carry a cache: stage(x, state) -> (y, state). The result is valid
    on the last stage only. Only the tick in which a stage meets the microbatch changes its state.
    """
    if num_stages == 1:
        return stage(x, state)
    index = jax.lax.axis_index(axis)
    to_next = [(i, i + 1) for i in range(num_stages - 1)]

    def tick(carry, t):
        received, state = carry
        # The whole stage is skipped out of turn: the state is not touched and no bubble is computed.
        y, state = jax.lax.cond(t == index, stage, lambda x, state: (x, state), received, state)
        return (jax.lax.ppermute(y, axis, to_next), state), y

    ticks = jnp.arange(num_stages, dtype=jnp.int32)
    (_, state), y_ticks = jax.lax.scan(tick, (x, state), ticks)
    return y_ticks[-1], state
