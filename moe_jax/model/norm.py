"""RMSNorm (Zhang and Sennrich 2019, eq. 4)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.model.params import weight
from moe_jax.ops.dtypes import at_least_float32


class Norm(nnx.Module):
    """Declares the scale of one RMSNorm, or of one for every layer when num_layers is given."""

    def __init__(self, d_model: int, dtype, num_layers: int | None = None):
        layers, names = ((), ()) if num_layers is None else ((num_layers,), ("layers",))
        self.scale = weight(jnp.ones((*layers, d_model), dtype), (*names, "embed"))


def rms_norm(scale_D: jax.Array, x_BLD: jax.Array, eps: float) -> jax.Array:
    """Divide by the root mean square and scale; statistics in at least float32, result in x's dtype."""
    dtype = at_least_float32(x_BLD.dtype)
    x = x_BLD.astype(dtype)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * inverse_rms * scale_D.astype(dtype)[None, None, :]).astype(x_BLD.dtype)
