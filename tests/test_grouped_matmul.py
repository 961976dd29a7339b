"""Products of blocks of rows against a loop over single rows, and the work that the program holds."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moe_jax.ops.grouped_matmul import RowBlocks, grouped_matmul

E, R, I, O = 4, 3, 5, 6  # noqa: E741
# Blocks of each expert, uneven; those behind the used ones lie there for no distribution in particular.
LAYOUTS = {
    "uneven": ([0, 0, 0, 1, 2, 2, 3], 7),
    "expert 2 gets none": ([0, 0, 1, 3, 3, 3, 3], 5),
    "all to the last": ([3, 3, 3, 3, 3, 3, 3], 6),
    "none used": ([3, 3, 3, 3, 3, 3, 3], 0),
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def by_rows(x, w, dy, expert_X, num_used) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, dx and dw, one row at a time."""
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for i in range(num_used):
        for r in range(x.shape[1]):
            e = expert_X[i]
            y[i, r] = x[i, r] @ w[e]
            dx[i, r] = w[e] @ dy[i, r]
            dw[e] += np.outer(x[i, r], dy[i, r])
    return y, dx, dw


def by_blocks(expert_X: jax.Array | None, num_used: jax.Array | None) -> Callable:
    def product(x_XRI, w_EIO):
        return grouped_matmul(x_XRI, w_EIO, RowBlocks(x_XRI, expert_X, num_used))

    return product


@jax.jit
def with_gradients(x, w, dy, expert_X, num_used):
    y, back = jax.vjp(by_blocks(expert_X, num_used), x, w)
    return y, *back(dy)


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_equal_single_rows(name):
    expert_X, num_used = LAYOUTS[name]
    x, w, dy = normal(1, 7, R, I), normal(2, E, I, O), normal(3, 7, R, O)
    got = with_gradients(x, w, dy, jnp.array(expert_X, jnp.int32), jnp.int32(num_used))
    for g, e in zip(got, by_rows(x, w, dy, expert_X, num_used), strict=True):
        assert g.dtype == jnp.float64
        np.testing.assert_allclose(g, e, rtol=0, atol=1e-12)


def test_blocks_behind_the_used_ones_are_not_touched():
    """Whatever lies there, even NaN, the result and the gradients are zeros."""
    expert_X, num_used = LAYOUTS["expert 2 gets none"]
    x, w, dy = normal(1, 7, R, I), normal(2, E, I, O), normal(3, 7, R, O)
    x[num_used:], dy[num_used:] = np.nan, np.nan
    y, dx, dw = with_gradients(x, w, dy, jnp.array(expert_X, jnp.int32), jnp.int32(num_used))
    assert not y[num_used:].any()
    assert not dx[num_used:].any()
    assert not dw[2].any()
    np.testing.assert_allclose(dw, by_rows(x, w, dy, expert_X, num_used)[2], rtol=0, atol=1e-12)


def test_a_block_per_expert_equals_single_rows():
    """The layout without indices: block i is expert i's."""
    x, w, dy = normal(1, E, R, I), normal(2, E, I, O), normal(3, E, R, O)
    got = with_gradients(x, w, dy, None, None)
    for g, e in zip(got, by_rows(x, w, dy, range(E), E), strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["blocks", "block per expert"])
def test_gradients_equal_numerical_ones(layout):
    expert_X, num_used = (jnp.array([0, 2, 2, 3], jnp.int32), jnp.int32(3))
    f = by_blocks(expert_X, num_used) if layout == "blocks" else by_blocks(None, None)
    args = jnp.asarray(normal(1, 4, 2, 3)), jnp.asarray(normal(2, E, 3, 2))
    check_grads(jax.jit(f), args, order=1, modes=["rev"])


@pytest.mark.parametrize("layout", ["blocks", "block per expert"])
def test_bfloat16_stays_bfloat16(layout):
    x, w, dy = (jnp.asarray(normal(s, *shape), jnp.bfloat16) for s, shape in
                ((1, (E, R, I)), (2, (E, I, O)), (3, (E, R, O))))  # fmt: skip
    expert_X, num_used = (
        (jnp.arange(E, dtype=jnp.int32), jnp.int32(E)) if layout == "blocks" else (None, None)
    )
    got = with_gradients(x, w, dy, expert_X, num_used)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    for g, e in zip(got, by_rows(x, w, dy, range(E), E), strict=True):
        assert g.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(g, np.float64), e, rtol=2**-7, atol=2**-6)


def test_weight_gradients_of_many_blocks_add_up_in_float32():
    """300 blocks of one row each add 1: bfloat16 sums stop at 256, where the next number is 258."""
    x = jnp.ones((300, 1, 1), jnp.bfloat16)
    w = jnp.ones((1, 1, 1), jnp.bfloat16)
    _, _, dw = with_gradients(x, w, x, jnp.zeros(300, jnp.int32), jnp.int32(300))
    assert dw.dtype == jnp.bfloat16
    assert dw.tolist() == [[[300.0]]]


def dots(compiled: jax.stages.Compiled) -> list[list[int]]:
    """The shape of every product in a compiled program, its sizes in ascending order."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* dot\(", compiled.as_text() or "")
    return sorted(sorted(int(size) for size in shape.split(",")) for shape in found)


def test_the_program_multiplies_one_block_at_a_time():
    """One product per loop step, of one block with one expert; E-fold work would show an E in some shape."""
    num_experts, blocks, rows, inner, outer = 13, 11, 8, 17, 19
    x, w = jnp.zeros((blocks, rows, inner)), jnp.zeros((num_experts, inner, outer))
    layout = jnp.zeros(blocks, jnp.int32), jnp.int32(1)
    forward = jax.jit(lambda x, w, expert_X, num_used: by_blocks(expert_X, num_used)(x, w))
    assert dots(forward.lower(x, w, *layout).compile()) == [[rows, outer]]
    both = with_gradients.lower(x, w, jnp.zeros((blocks, rows, outer)), *layout).compile()
    assert dots(both) == [[rows, inner], [rows, outer], [inner, outer]]


def test_a_block_per_expert_is_one_batched_product():
    num_experts, rows, inner, outer = 13, 8, 17, 19
    x, w = jnp.zeros((num_experts, rows, inner)), jnp.zeros((num_experts, inner, outer))
    assert dots(jax.jit(by_blocks(None, None)).lower(x, w).compile()) == [[rows, num_experts, outer]]
