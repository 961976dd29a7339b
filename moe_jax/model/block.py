"""One decoder block, and the seams at which a deployment stitches in its own mechanisms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.schema import ModelConfig
from moe_jax.model.attention import attention
from moe_jax.model.cache import LayerCache
from moe_jax.model.dispatch import local_exchange
from moe_jax.model.moe import Exchange, MoeStats, moe
from moe_jax.model.norm import rms_norm


def _all_here(x: jax.Array) -> jax.Array:
    return x


@dataclass(frozen=True)
class Seams:
    """What changes when a block is spread out; the defaults are one device's."""

    exchange: Exchange = local_exchange
    """Brings rows to experts and back."""
    sum_parts: Callable[[jax.Array], jax.Array] = _all_here
    """Adds up the outputs of all parts of the heads or of the hidden width."""


class BlockStats(NamedTuple):
    """What one block reports. Whatever a program does not use of it costs nothing: the compiler drops it."""

    moe: MoeStats
    attention_bad: jax.Array
    """int32: values of the attention's output that are not finite."""
    moe_bad: jax.Array
    """int32: values of the MoE's output that are not finite."""


def _count_bad(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)


def block(
    params: dict, x_BLD: jax.Array, cfg: ModelConfig, seams: Seams, cache: LayerCache | None = None
) -> tuple[jax.Array, BlockStats, LayerCache | None]:
    """Pre-norm block: x += attention(norm(x)); x += moe(norm(x)). One layer's params, no layers dim."""
    with jax.named_scope("attention"):
        h_BLD = rms_norm(params["attention_norm"]["scale"], x_BLD, cfg.norm_eps)
        h_BLD, cache = attention(params["attention"], h_BLD, cfg, cache)
        attention_BLD = seams.sum_parts(h_BLD)
        x_BLD = x_BLD + attention_BLD
    with jax.named_scope("moe"):
        h_BLD = rms_norm(params["moe_norm"]["scale"], x_BLD, cfg.norm_eps)
        h_BLD, stats = moe(params, h_BLD, cfg, seams.exchange)
        moe_BLD = seams.sum_parts(h_BLD)
        x_BLD = x_BLD + moe_BLD
    return x_BLD, BlockStats(stats, _count_bad(attention_BLD), _count_bad(moe_BLD)), cache
