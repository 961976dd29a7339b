"""Routers: which experts a token goes to, with what weight, and the sums its losses are made of."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config.schema import ModelConfig
from moe_jax.model.params import normal
from moe_jax.ops.dtypes import at_least_float32


class Router(nnx.Module):
    """Declares the router matrix [N, D, E]."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        shape, names = (cfg.num_layers, cfg.d_model, cfg.num_experts), ("layers", "embed", "router_experts")
        self.w = normal(rngs, shape, names, cfg.init_std, cfg.param_dtype)


class Routing(NamedTuple):
    """A router's decision for T tokens, and sums over those tokens.

    Sums and not means: shards and microbatches add theirs up before a loss is formed, so that the loss is
    the same on every mesh (a mean of shard means is another number, as both factors of the balance loss
    vary by shard).
    """

    expert_ids_TK: jax.Array
    """int32, the chosen experts, best first."""
    weights_TK: jax.Array
    """At least float32; what each chosen expert's output is multiplied by."""
    tokens_per_expert_E: jax.Array
    """int32 counts of (token, choice) pairs."""
    prob_sum_E: jax.Array
    """Sum over tokens of the router's probability of each expert."""
    z_sum: jax.Array
    """Sum over tokens of logsumexp(router logits)^2."""


def softmax_topk(logits_TE: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax over all experts, then the top-k (Shazeer et al. 2017; Switch; Mixtral when renormalised).

    Returns (expert_ids_TK, weights_TK, probs_TE). Among equal values the lower expert index comes first.
    """
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    weights_TK, expert_ids_TK = jax.lax.top_k(probs_TE, cfg.top_k)
    if cfg.renormalize_top_k:
        weights_TK = weights_TK / jnp.sum(weights_TK, axis=-1, keepdims=True)
    return expert_ids_TK, weights_TK, probs_TE


ROUTERS: dict[str, Callable[[jax.Array, ModelConfig], tuple[jax.Array, jax.Array, jax.Array]]] = {
    "softmax_topk": softmax_topk,
}


def route(w_DE: jax.Array, x_TD: jax.Array, cfg: ModelConfig) -> Routing:
    """Choose cfg.top_k experts for each token [T, D] with the router cfg.router; at least float32 inside."""
    dtype = at_least_float32(x_TD.dtype)
    # Highest precision: a TF32 product would let near ties fall differently from one device kind to another.
    logits_TE = jnp.einsum("TD,DE->TE", x_TD.astype(dtype), w_DE.astype(dtype), precision="highest")
    expert_ids_TK, weights_TK, probs_TE = ROUTERS[cfg.router](logits_TE, cfg)
    z_T = jax.nn.logsumexp(logits_TE, axis=-1)
    counts_E = jnp.zeros((w_DE.shape[1],), jnp.int32).at[expert_ids_TK.reshape(-1)].add(1)
    return Routing(expert_ids_TK, weights_TK, counts_E, jnp.sum(probs_TE, axis=0), jnp.sum(z_T * z_T))
