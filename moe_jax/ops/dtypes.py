"""Dtypes to accumulate in."""

import jax.numpy as jnp


def at_least_float32(*dtypes) -> jnp.dtype:
    """float64 if any of the floating dtypes is, else float32."""
    return jnp.dtype(jnp.float64 if any(jnp.dtype(d) == jnp.float64 for d in dtypes) else jnp.float32)
