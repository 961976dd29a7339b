"""Dispatch and combine where every expert is at hand: sort rows by expert, run them, put them back."""

import jax
import jax.numpy as jnp

from moe_jax.model.moe import ApplyExperts
from moe_jax.ops.grouped_matmul import RowBlocks
from moe_jax.ops.rows import Slots, block_slots, sort_rows, sum_rows, take_rows

# Rows of one product of the grouped GEMM: large enough that a product outweighs its loop step, small enough
# that the last, partly filled block of each expert costs little.
_MIN_BLOCK_ROWS, _MAX_BLOCK_ROWS = 8, 256


def _block_rows(num_rows: int, num_experts: int) -> int:
    """About half the mean rows of an expert, as a power of two within the limits."""
    half_mean = max(1, num_rows // (2 * num_experts))
    return min(_MAX_BLOCK_ROWS, max(_MIN_BLOCK_ROWS, 1 << (half_mean.bit_length() - 1)))


def dispatch(
    x_TD: jax.Array, expert_ids_TK: jax.Array, rows_per_expert_E: jax.Array
) -> tuple[RowBlocks, Slots]:
    """Copy every token to its experts' blocks; the receipt says where each row went."""
    num_experts = rows_per_expert_E.shape[0]
    block_rows = _block_rows(expert_ids_TK.size, num_experts)
    order = sort_rows(expert_ids_TK, rows_per_expert_E)
    slots, expert_X, num_used = block_slots(order, expert_ids_TK, rows_per_expert_E, block_rows)
    rows_SD = take_rows(x_TD, slots)
    return RowBlocks(rows_SD.reshape(-1, block_rows, x_TD.shape[1]), expert_X, num_used), slots


def combine(y_XRD: jax.Array, weights_TK: jax.Array, receipt: Slots) -> jax.Array:
    """Weigh the experts' outputs and add them up by token: [X, R, D] -> [T, D], >= float32."""
    return sum_rows(y_XRD.reshape(-1, y_XRD.shape[-1]), weights_TK, receipt)


def local_exchange(
    x_TD: jax.Array,
    expert_ids_TK: jax.Array,
    weights_TK: jax.Array,
    rows_per_expert_E: jax.Array,
    apply_experts: ApplyExperts,
) -> tuple[jax.Array, jax.Array]:
    """The exchange of one device (see model.moe.Exchange): dropless, always one round."""
    with jax.named_scope("dispatch"):
        rows, receipt = dispatch(x_TD, expert_ids_TK, rows_per_expert_E)
    y_XRD = apply_experts(rows)
    with jax.named_scope("combine"):
        return combine(y_XRD, weights_TK, receipt).astype(x_TD.dtype), jnp.int32(1)
