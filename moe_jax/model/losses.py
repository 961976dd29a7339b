"""The router's two auxiliary losses, from sums over all tokens."""

import jax
import jax.numpy as jnp


def balance_loss(
    tokens_per_expert_NE: jax.Array, prob_sum_NE: jax.Array, num_tokens: int, top_k: int
) -> jax.Array:
    """Load-balance loss of each layer [N] (Switch Transformer, eq. 4-6, generalised to top-k).

    E / (k T^2) * sum_e count_e * prob_sum_e, which is 1 at perfect balance for any k. The counts are over
    all T tokens; prob_sum may be over a part of them: as the loss is linear in it, the parts' losses add
    up to the whole. Counts have no gradient.
    """
    num_experts = prob_sum_NE.shape[-1]
    counts_NE = jax.lax.stop_gradient(tokens_per_expert_NE.astype(prob_sum_NE.dtype))
    return jnp.sum(counts_NE * prob_sum_NE, axis=-1) * (num_experts / (top_k * num_tokens**2))


def z_loss(z_sum_N: jax.Array, num_tokens: int) -> jax.Array:
    """Router z-loss of each layer [N] (ST-MoE, eq. 5): mean over tokens of logsumexp^2; parts add up."""
    return z_sum_N / num_tokens
