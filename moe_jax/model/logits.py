"""Hidden vectors to logits, and the cross-entropy, over a vocabulary that may be held in parts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config.schema import ModelConfig
from moe_jax.model.params import normal
from moe_jax.ops.dtypes import at_least_float32


class Head(nnx.Module):
    """Declares the output projection [D, V] (absent when the embedding table serves as it)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        shape = (cfg.d_model, cfg.vocab_size)
        self.w = normal(rngs, shape, ("embed", "vocab"), cfg.init_std, cfg.param_dtype)


def head_matrix(params: dict) -> jax.Array:
    """The output projection [D, V]: the head's own, or the transposed embedding table when tied."""
    return params["head"]["w"] if "head" in params else params["embed"]["table"].T


def logits(w_DV: jax.Array, x_TD: jax.Array) -> jax.Array:
    """Logits [T, V], accumulated and returned in at least float32."""
    dtype = at_least_float32(x_TD.dtype)
    return jnp.einsum("TD,DV->TV", x_TD, w_DV, preferred_element_type=dtype)


class SoftmaxParts(NamedTuple):
    """What a slice of the vocabulary contributes to log softmax at the targets; all [T], >= float32."""

    shift: jax.Array
    """The number subtracted before exponentiating; the same for all slices."""
    exp_sum: jax.Array
    """Sum of exp(logit - shift) over the slice."""
    target: jax.Array
    """Logit of the target minus shift, 0 when the target lies in another slice."""


def softmax_parts(
    logits_TV: jax.Array, targets_T: jax.Array, first_id: jax.Array | int, shift_T: jax.Array
) -> SoftmaxParts:
    """One slice's share of the cross-entropy; exp_sum and target of the slices add up."""
    local_T = targets_T - first_id
    inside_T = (local_T >= 0) & (local_T < logits_TV.shape[1])
    shifted_TV = logits_TV - shift_T[:, None]
    picked_T = jnp.take_along_axis(shifted_TV, jnp.where(inside_T, local_T, 0)[:, None], axis=1)[:, 0]
    zero = jnp.zeros((), logits_TV.dtype)
    return SoftmaxParts(shift_T, jnp.sum(jnp.exp(shifted_TV), axis=1), jnp.where(inside_T, picked_T, zero))


def cross_entropy(parts: SoftmaxParts) -> jax.Array:
    """Negative log-likelihood of each target, in nats [T], from parts summed over all slices."""
    return jnp.log(parts.exp_sum) - parts.target
