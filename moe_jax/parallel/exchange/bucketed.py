"""The bucketed exchange: dropless, in bounded memory, by plain all-to-alls of a fixed size.

Rows are sorted by expert. In each round every device sends each expert at most ``bucket_rows`` rows; the
experts run, the rows come back and are added up at home. Balanced routing takes one round. What does not fit
goes in further rounds, as many as any routing can need, each under a condition on the most that any device of
the axis needs: unbalanced routing costs time, never memory, and nothing is dropped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.ops.grouped_matmul import RowBlocks
from moe_jax.ops.rows import RowOrder, Slots, make_slots, sort_rows, sum_rows, take_rows


def default_bucket_rows(num_tokens: int, top_k: int, num_experts: int) -> int:
    """Rows per (source, expert) that a round carries: the mean load and four standard deviations of it.

    For uniformly random routing the load of an expert is near Poisson, so that one round nearly always does.
    num_tokens: of one source. A multiple of 8, unless capped by the num_tokens that one expert can get.
    """
    mean = num_tokens * top_k / num_experts
    return min(num_tokens, 8 * math.ceil((mean + 4 * math.sqrt(mean)) / 8))


def max_rounds(num_tokens: int, bucket_rows: int) -> int:
    """Rounds that suffice for any routing: a token's choices differ, so an expert gets at most num_tokens."""
    return -(-num_tokens // bucket_rows)


@dataclass(frozen=True)
class BucketedExchange:
    """Exchange over the mesh axis ``axis``, for use inside a shard_map over it.

    The experts are split evenly over the axis in order; rows of the call are this device's own tokens.
    See moe_jax.model.moe.Exchange for the call.
    """

    axis: str
    axis_size: int
    bucket_rows: int | None = None
    """None: default_bucket_rows."""

    def __call__(
        self,
        x_TD: jax.Array,
        expert_ids_TK: jax.Array,
        weights_TK: jax.Array,
        rows_per_expert_E: jax.Array,
        apply_experts: Callable[[RowBlocks], jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Dispatch, experts and combine in rounds; returns (y_TD in x's dtype, int32 rounds)."""
        num_tokens, top_k = expert_ids_TK.shape
        bucket_rows = self.rows_per_bucket(num_tokens, top_k, rows_per_expert_E.shape[0])
        order = sort_rows(expert_ids_TK, rows_per_expert_E)

        def one_round(index: jax.Array | int) -> jax.Array:
            receipt = _round_slots(order, expert_ids_TK, rows_per_expert_E, bucket_rows, index)
            with jax.named_scope("dispatch"):
                rows = self.dispatch(x_TD, receipt, rows_per_expert_E.shape[0])
            y_XRD = apply_experts(rows)
            with jax.named_scope("combine"):
                return self.combine(y_XRD, weights_TK, receipt)

        y_TD = one_round(0)  # outside of any condition, so that it can overlap with other work
        limit = max_rounds(num_tokens, bucket_rows)
        if limit == 1:
            return y_TD.astype(x_TD.dtype), jnp.int32(1)
        most_rows = jax.lax.pmax(jnp.max(rows_per_expert_E), self.axis)
        rounds = jnp.maximum(1, -(-most_rows // bucket_rows)).astype(jnp.int32)
        y_TD = self._further_rounds(one_round, y_TD, rounds, limit)
        return y_TD.astype(x_TD.dtype), rounds

    def rows_per_bucket(self, num_tokens: int, top_k: int, num_experts: int) -> int:
        """Rows of one (source, expert) bucket for this many tokens on a source."""
        return min(num_tokens, self.bucket_rows or default_bucket_rows(num_tokens, top_k, num_experts))

    def dispatch(self, x_TD: jax.Array, receipt: Slots, num_experts: int) -> RowBlocks:
        """Send this round's buckets; returns the rows received, one block per local expert."""
        rows_SD = take_rows(x_TD, receipt)
        local_experts, dim = num_experts // self.axis_size, x_TD.shape[1]
        bucket_rows = rows_SD.shape[0] // num_experts
        received = self._all_to_all(rows_SD).reshape(self.axis_size, local_experts, bucket_rows, dim)
        x_XRD = jnp.swapaxes(received, 0, 1).reshape(local_experts, self.axis_size * bucket_rows, dim)
        return RowBlocks(x_XRD, None, None)

    def combine(self, y_XRD: jax.Array, weights_TK: jax.Array, receipt: Slots) -> jax.Array:
        """Return the rows to their sources; weigh and add them up there: [T, D], at least float32."""
        local_experts, rows, dim = y_XRD.shape
        y = jnp.swapaxes(y_XRD.reshape(local_experts, self.axis_size, rows // self.axis_size, dim), 0, 1)
        return sum_rows(self._all_to_all(y.reshape(-1, dim)), weights_TK, receipt)

    def _all_to_all(self, rows_SD: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(rows_SD, self.axis, split_axis=0, concat_axis=0, tiled=True)

    def _further_rounds(self, one_round, y_TD: jax.Array, rounds: jax.Array, limit: int) -> jax.Array:
        """Add rounds 1 .. rounds-1, of at most limit; the count is equal on the whole axis."""

        # The condition is inside of what is recomputed: outside of it, the backward pass would keep a copy of
        # the tokens and the experts' weights for each round.
        @jax.checkpoint
        def round_or_zeros(index):
            return jax.lax.cond(index < rounds, one_round, lambda _: jnp.zeros_like(y_TD), index)

        def body(y_TD, index):
            return y_TD + round_or_zeros(index), None

        def all_rounds(y_TD):
            return jax.lax.scan(body, y_TD, jnp.arange(1, limit, dtype=jnp.int32))[0]

        # An outer condition too: without it the backward pass would add zero weight gradients per round.
        return jax.lax.cond(rounds > 1, all_rounds, lambda y: y, y_TD)


def _round_slots(
    order: RowOrder,
    expert_ids_TK: jax.Array,
    rows_per_expert_E: jax.Array,
    bucket_rows: int,
    index: jax.Array | int,
) -> Slots:
    """The slots of round ``index``: a bucket per expert, holding its rows of rank index * bucket_rows on."""
    first_rank = index * bucket_rows
    rank_EC = first_rank + jnp.arange(bucket_rows, dtype=jnp.int32)[None, :]
    filled_EC = rank_EC < rows_per_expert_E.astype(jnp.int32)[:, None]
    position_EC = order.start_E[:, None] + rank_EC
    rank_TK = order.rank_TK - first_rank
    present_TK = (rank_TK >= 0) & (rank_TK < bucket_rows)
    slot_TK = expert_ids_TK * bucket_rows + rank_TK
    return make_slots(order, position_EC.reshape(-1), filled_EC.reshape(-1), slot_TK, present_TK)
