"""How parameters are declared: an array and the logical name of each of its dims.

Logical names: layers, embed, vocab, heads, kv_heads, head_width, experts, mlp. A deployment's rule table
maps them to where the parts are held; None-like dims (embed, head_width) are never split by it.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def weight(value: jax.Array, names: tuple[str, ...]) -> nnx.Param:
    """An nnx parameter that carries the logical name of each dim as metadata ``names``."""
    assert value.ndim == len(names), (value.shape, names)
    # A key of our own: flax's sharding keys place the array eagerly and want a mesh, declaring must not.
    return nnx.Param(value, names=names)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], names: tuple[str, ...], std: float, dtype) -> nnx.Param:
    """A weight drawn from N(0, std^2)."""
    dtype = jnp.dtype(dtype)
    return weight(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(std, dtype), names)
