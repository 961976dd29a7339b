"""The KV cache: keys and values of the positions seen so far, for one layer or stacked for all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """One layer's keys and values; positions from ``length`` on are not yet written."""

    k_BSGA: jax.Array
    v_BSGA: jax.Array
    length: jax.Array
    """int32 scalar: positions held, the same for all sequences."""

    def append(self, k_BLGA: jax.Array, v_BLGA: jax.Array) -> "LayerCache":
        """Write L further positions; the caller sees to it that length + L <= S."""
        zero = jnp.zeros_like(self.length)
        start = (zero, self.length, zero, zero)
        k = jax.lax.dynamic_update_slice(self.k_BSGA, k_BLGA.astype(self.k_BSGA.dtype), start)
        v = jax.lax.dynamic_update_slice(self.v_BSGA, v_BLGA.astype(self.v_BSGA.dtype), start)
        return LayerCache(k, v, self.length + k_BLGA.shape[1])


class Cache(NamedTuple):
    """All layers' keys and values, stacked."""

    k_NBSGA: jax.Array
    v_NBSGA: jax.Array
    length: jax.Array
    """int32 scalar: positions held."""
