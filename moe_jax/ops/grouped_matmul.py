"""Products of blocks of rows with one matrix per expert."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops.dtypes import at_least_float32


class RowBlocks(NamedTuple):
    """Blocks of R rows, each block for one expert; rows that hold no token are zeros."""

    x_XRD: jax.Array
    expert_of_block_X: jax.Array | None
    """int32, ascending; None: block i belongs to expert i and there are as many blocks as experts."""
    num_used_blocks: jax.Array | None
    """int32 scalar: blocks from here on hold no rows and are skipped (their results are zeros)."""


def grouped_matmul(x_XRI: jax.Array, w_EIO: jax.Array, blocks: RowBlocks) -> jax.Array:
    """x[i] @ w[expert of block i] for every block: [X, R, I] x [E, I, O] -> [X, R, O] in x's dtype.

    The work is that of the blocks used, never E times it (what lax.ragged_dot does on CPU). ``blocks`` gives
    the layout only; its rows are not read.
    """
    if blocks.expert_of_block_X is None:
        return jnp.einsum("EXI,EIO->EXO", x_XRI, w_EIO)
    assert blocks.num_used_blocks is not None
    return _blockwise(x_XRI, w_EIO, blocks.expert_of_block_X, blocks.num_used_blocks)


def _expert(w_EIO: jax.Array, expert: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(w_EIO, expert, keepdims=False)


@jax.custom_vjp
def _blockwise(x_XRI, w_EIO, expert_of_block_X, num_used_blocks):
    """A loop over the used blocks, one dense product each."""

    def body(i, y_XRO):
        y_RO = _expert(x_XRI, i) @ _expert(w_EIO, expert_of_block_X[i])
        return jax.lax.dynamic_update_index_in_dim(y_XRO, y_RO, i, 0)

    y_XRO = jnp.zeros((*x_XRI.shape[:2], w_EIO.shape[2]), x_XRI.dtype)
    return jax.lax.fori_loop(0, num_used_blocks, body, y_XRO)


def _blockwise_fwd(x_XRI, w_EIO, expert_of_block_X, num_used_blocks):
    y_XRO = _blockwise(x_XRI, w_EIO, expert_of_block_X, num_used_blocks)
    return y_XRO, (x_XRI, w_EIO, expert_of_block_X, num_used_blocks)


def _blockwise_bwd(residuals, dy_XRO):
    x_XRI, w_EIO, expert_of_block_X, num_used_blocks = residuals
    acc_dtype = at_least_float32(w_EIO.dtype)
    product = partial(jnp.einsum, preferred_element_type=acc_dtype)

    def body(i, carry):
        dx_XRI, dw_EIO = carry
        expert, dy_RO = expert_of_block_X[i], _expert(dy_XRO, i)
        dx_RI = jnp.einsum("RO,IO->RI", dy_RO, _expert(w_EIO, expert))
        dw_IO = _expert(dw_EIO, expert) + product("RI,RO->IO", _expert(x_XRI, i), dy_RO)
        dx_XRI = jax.lax.dynamic_update_index_in_dim(dx_XRI, dx_RI, i, 0)
        return dx_XRI, jax.lax.dynamic_update_index_in_dim(dw_EIO, dw_IO, expert, 0)

    zeros = jnp.zeros_like(x_XRI), jnp.zeros(w_EIO.shape, acc_dtype)
    dx_XRI, dw_EIO = jax.lax.fori_loop(0, num_used_blocks, body, zeros)
    return dx_XRI, dw_EIO.astype(w_EIO.dtype), None, None


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)
