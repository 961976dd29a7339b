"""Moving rows between token order and expert order, with gathers only.

A row is one (token, choice) pair; slots are places in a buffer of rows. Both directions of the map are
kept (slot -> row, row -> slot), so that the transpose of each gather is again a gather: no scatter-add,
which is slow on CPU and sums in no fixed order on GPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops.dtypes import at_least_float32


class RowOrder(NamedTuple):
    """Rows sorted by expert, in token order within an expert."""

    row_of_position_R: jax.Array
    """int32: the row at each sorted position."""
    rank_TK: jax.Array
    """int32: each row's place among the rows of its expert."""
    start_E: jax.Array
    """int32: sorted position of each expert's first row."""


class Slots(NamedTuple):
    """The receipt of a dispatch: where each row lies in a buffer of S slots; all that combine needs."""

    token_of_slot_S: jax.Array
    """int32: the token whose copy a slot holds; any valid token where the slot is empty."""
    choice_of_slot_S: jax.Array
    """int32: which of the token's K choices it is."""
    filled_S: jax.Array
    """bool: whether the slot holds a row."""
    slot_of_row_TK: jax.Array
    """int32: the slot of each row; any valid slot where the row is not in the buffer."""
    present_TK: jax.Array
    """bool: whether the row is in the buffer."""


def sort_rows(expert_ids_TK: jax.Array, rows_per_expert_E: jax.Array) -> RowOrder:
    """Stable sort of all rows by expert id."""
    expert_R = expert_ids_TK.reshape(-1)
    row_of_position_R = jnp.argsort(expert_R, stable=True).astype(jnp.int32)
    start_E = (jnp.cumsum(rows_per_expert_E) - rows_per_expert_E).astype(jnp.int32)
    places_R = jnp.arange(expert_R.shape[0], dtype=jnp.int32)
    position_of_row_R = jnp.zeros_like(places_R).at[row_of_position_R].set(places_R, unique_indices=True)
    return RowOrder(
        row_of_position_R, (position_of_row_R - start_E[expert_R]).reshape(expert_ids_TK.shape), start_E
    )


def make_slots(
    order: RowOrder, position_S: jax.Array, filled_S: jax.Array, slot_TK: jax.Array, present_TK: jax.Array
) -> Slots:
    """Slots from the sorted position each slot takes its row from and the slot each row goes to."""
    num_rows, top_k = order.row_of_position_R.shape[0], slot_TK.shape[1]
    row_S = order.row_of_position_R[jnp.clip(position_S, 0, num_rows - 1)]
    slot_TK = jnp.clip(slot_TK, 0, position_S.shape[0] - 1)
    return Slots(row_S // top_k, row_S % top_k, filled_S, slot_TK, present_TK)


@jax.custom_vjp
def take_rows(x_TD: jax.Array, slots: Slots) -> jax.Array:
    """Copy each token into its slots: [T, D] -> [S, D]; empty slots are zeros."""
    rows_SD = x_TD.at[slots.token_of_slot_S].get(mode="promise_in_bounds")
    return jnp.where(slots.filled_S[:, None], rows_SD, jnp.zeros((), x_TD.dtype))


def _take_rows_fwd(x_TD, slots):
    return take_rows(x_TD, slots), slots


def _take_rows_bwd(slots, d_rows_SD):
    return _gather_back(d_rows_SD, slots, None).astype(d_rows_SD.dtype), None


@jax.custom_vjp
def sum_rows(rows_SD: jax.Array, weights_TK: jax.Array, slots: Slots) -> jax.Array:
    """Weigh the rows present and add them up by token: [S, D] -> [T, D] in at least float32."""
    return _gather_back(rows_SD, slots, weights_TK)


def _sum_rows_fwd(rows_SD, weights_TK, slots):
    return sum_rows(rows_SD, weights_TK, slots), (rows_SD, weights_TK, slots)


def _sum_rows_bwd(residuals, dy_TD):
    rows_SD, weights_TK, slots = residuals
    weight_S = weights_TK.at[slots.token_of_slot_S, slots.choice_of_slot_S].get(mode="promise_in_bounds")
    dy_SD = dy_TD.at[slots.token_of_slot_S].get(mode="promise_in_bounds")
    dtype = at_least_float32(dy_TD.dtype, weights_TK.dtype)
    weight_S = jnp.where(slots.filled_S, weight_S, jnp.zeros((), weights_TK.dtype))
    d_rows_SD = (dy_SD.astype(dtype) * weight_S.astype(dtype)[:, None]).astype(rows_SD.dtype)
    # The product is formed by slot, where both factors are at hand, and only its sum goes back by row.
    d_weight_S = jnp.sum(dy_SD.astype(dtype) * rows_SD.astype(dtype), axis=1)
    d_weight_TK = d_weight_S.at[slots.slot_of_row_TK].get(mode="promise_in_bounds")
    d_weight_TK = jnp.where(slots.present_TK, d_weight_TK, jnp.zeros((), dtype))
    return d_rows_SD, d_weight_TK.astype(weights_TK.dtype), None


def _gather_back(rows_SD: jax.Array, slots: Slots, weights_TK: jax.Array | None) -> jax.Array:
    """Sum over a token's choices of its row (times its weight); accumulated in at least float32."""
    dtype = at_least_float32(rows_SD.dtype)
    num_tokens, top_k = slots.present_TK.shape
    total_TD = jnp.zeros((num_tokens, rows_SD.shape[1]), dtype)
    for k in range(top_k):  # unrolled: one pass over [T, D] each, no [T, K, D] buffer
        rows_TD = rows_SD.at[slots.slot_of_row_TK[:, k]].get(mode="promise_in_bounds").astype(dtype)
        if weights_TK is not None:
            rows_TD = rows_TD * weights_TK[:, k, None].astype(dtype)
        total_TD = total_TD + jnp.where(slots.present_TK[:, k, None], rows_TD, jnp.zeros((), dtype))
    return total_TD


take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)
sum_rows.defvjp(_sum_rows_fwd, _sum_rows_bwd)


def block_slots(
    order: RowOrder, expert_ids_TK: jax.Array, rows_per_expert_E: jax.Array, block_rows: int
) -> tuple[Slots, jax.Array, jax.Array]:
    """Slots in blocks of block_rows, each block of one expert: all rows present, experts one after another.

    Returns (slots, expert_of_block_X, num_used_blocks). The number of blocks is static: enough for any
    distribution of the rows over the experts.
    """
    num_rows, num_experts = order.row_of_position_R.shape[0], rows_per_expert_E.shape[0]
    num_blocks = -(-num_rows // block_rows) + min(num_experts, num_rows)
    blocks_E = -(-rows_per_expert_E // block_rows)
    block_end_E = jnp.cumsum(blocks_E).astype(jnp.int32)
    block_start_E = block_end_E - blocks_E.astype(jnp.int32)
    block_X = jnp.arange(num_blocks, dtype=jnp.int32)
    expert_X = jnp.searchsorted(block_end_E, block_X, side="right").astype(jnp.int32)
    expert_X = jnp.minimum(expert_X, num_experts - 1)  # blocks past the last used one
    rank_XR = (block_X - block_start_E[expert_X])[:, None] * block_rows + jnp.arange(
        block_rows, dtype=jnp.int32
    )[None]
    filled_XR = rank_XR < rows_per_expert_E.astype(jnp.int32)[expert_X][:, None]
    position_XR = order.start_E[expert_X][:, None] + rank_XR
    slot_TK = block_start_E[expert_ids_TK] * block_rows + order.rank_TK
    present_TK = jnp.ones(expert_ids_TK.shape, bool)
    slots = make_slots(order, position_XR.reshape(-1), filled_XR.reshape(-1), slot_TK, present_TK)
    return slots, expert_X, block_end_E[-1]
