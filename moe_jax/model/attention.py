"""Causal self-attention with rotary positions and grouped key/value heads."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config.schema import ModelConfig
from moe_jax.model.cache import LayerCache
from moe_jax.model.params import normal
from moe_jax.ops import attention as attention_ops
from moe_jax.ops.dtypes import at_least_float32


class Attention(nnx.Module):
    """Declares the four projections of every layer, stacked."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        width = cfg.head_dim or cfg.d_model // cfg.num_heads
        kv_heads = cfg.num_kv_heads or cfg.num_heads
        n, d, dtype = cfg.num_layers, cfg.d_model, cfg.param_dtype
        q_names, kv_names = (
            ("layers", "embed", "heads", "head_width"),
            ("layers", "embed", "kv_heads", "head_width"),
        )
        self.w_q = normal(rngs, (n, d, cfg.num_heads, width), q_names, cfg.init_std, dtype)
        self.w_k = normal(rngs, (n, d, kv_heads, width), kv_names, cfg.init_std, dtype)
        self.w_v = normal(rngs, (n, d, kv_heads, width), kv_names, cfg.init_std, dtype)
        o_names = ("layers", "heads", "head_width", "embed")
        o_std = cfg.init_std / math.sqrt(2 * n)
        self.w_o = normal(rngs, (n, cfg.num_heads, width, d), o_names, o_std, dtype)


def rotate(x_BLHA: jax.Array, positions_L: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), pairing dims i and i + A/2; at least float32 inside."""
    dtype = at_least_float32(x_BLHA.dtype)
    half = x_BLHA.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions_L.astype(dtype)[:, None] * frequency[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    first, second = x_BLHA[..., :half].astype(dtype), x_BLHA[..., half:].astype(dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BLHA.dtype)


def attention(
    params: dict, x_BLD: jax.Array, cfg: ModelConfig, cache: LayerCache | None = None
) -> tuple[jax.Array, LayerCache | None]:
    """Attend over the given heads: [B, L, D] -> [B, L, D], and the cache with this call's keys and values.

    The heads are those that the weights hold, all or a part; over the parts the results add up. Without a
    cache the positions are 0 .. L-1; with one they follow the positions it holds already.
    """
    length = x_BLD.shape[1]
    start = jnp.int32(0) if cache is None else cache.length
    positions_L = start + jnp.arange(length, dtype=jnp.int32)
    q_BLHA = rotate(jnp.einsum("BLD,DHA->BLHA", x_BLD, params["w_q"]), positions_L, cfg.rope_theta)
    k_BLGA = rotate(jnp.einsum("BLD,DGA->BLGA", x_BLD, params["w_k"]), positions_L, cfg.rope_theta)
    v_BLGA = jnp.einsum("BLD,DGA->BLGA", x_BLD, params["w_v"])
    if cache is None:
        o_BLHA = attention_ops.attention(q_BLHA, k_BLGA, v_BLGA, implementation=cfg.attention)
    else:
        cache = cache.append(k_BLGA, v_BLGA)
        o_BLHA = attention_ops.cached_attention(q_BLHA, cache.k_BSGA, cache.v_BSGA, start)
    return jnp.einsum("BLHA,HAD->BLD", o_BLHA, params["w_o"]), cache
