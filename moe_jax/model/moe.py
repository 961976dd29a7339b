"""The mixture-of-experts layer: router -> dispatch -> experts -> combine."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax

from moe_jax.config.schema import ModelConfig
from moe_jax.model.experts import experts, shared_expert
from moe_jax.model.router import route
from moe_jax.ops.grouped_matmul import RowBlocks

ApplyExperts = Callable[[RowBlocks], jax.Array]


class Exchange(Protocol):
    """Brings rows to their experts and the results back: the whole of dispatch, experts, combine."""

    def __call__(
        self,
        x_TD: jax.Array,
        expert_ids_TK: jax.Array,
        weights_TK: jax.Array,
        rows_per_expert_E: jax.Array,
        apply_experts: ApplyExperts,
    ) -> tuple[jax.Array, jax.Array]:
        """Return (y_TD = sum over k of weight * expert(x), int32 scalar: rounds it took).

        rows_per_expert counts the choices in expert_ids_TK, over all experts. apply_experts runs the
        experts held here on blocks of rows.
        """
        ...


class MoeStats(NamedTuple):
    """What one MoE layer reports; the sums are over the tokens of the call. See router.Routing."""

    tokens_per_expert_E: jax.Array
    prob_sum_E: jax.Array
    z_sum: jax.Array
    rounds: jax.Array
    expert_ids_TK: jax.Array


def moe(params: dict, x_BLD: jax.Array, cfg: ModelConfig, exchange: Exchange) -> tuple[jax.Array, MoeStats]:
    """Route each token, run its experts through the exchange, add the shared expert: [B, L, D] -> same.

    params: "router", "experts" and, if the model has one, "shared". The experts' hidden width may be a
    part of the whole; over the parts the results add up (each part weighs its own output).
    """
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    with jax.named_scope("router"):
        routing = route(params["router"]["w"], x_TD, cfg)
    apply_experts = partial(experts, params["experts"], cfg)
    y_TD, rounds = exchange(
        x_TD, routing.expert_ids_TK, routing.weights_TK, routing.tokens_per_expert_E, apply_experts
    )
    if "shared" in params:
        y_TD = y_TD + shared_expert(params["shared"], cfg, x_TD)
    stats = MoeStats(
        routing.tokens_per_expert_E, routing.prob_sum_E, routing.z_sum, rounds, routing.expert_ids_TK
    )
    return y_TD.reshape(x_BLD.shape), stats
