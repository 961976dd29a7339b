"""Token ids to vectors."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config.schema import ModelConfig
from moe_jax.model.params import normal
from moe_jax.ops.dtypes import at_least_float32


class Embed(nnx.Module):
    """Declares the embedding table [V, D]."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        shape = (cfg.vocab_size, cfg.d_model)
        self.table = normal(rngs, shape, ("vocab", "embed"), cfg.init_std, cfg.param_dtype)


def embed(table_VD: jax.Array, ids_BL: jax.Array, first_id: jax.Array | int = 0) -> jax.Array:
    """Rows of a table that holds the ids first_id .. first_id + V - 1; an id outside gives zeros.

    With the whole table (first_id 0) this is the plain look-up; over the parts of a split table the
    results add up to it. ids: int32 [B, L]; returns [B, L, D] in the table's dtype. The table's gradient is
    added up in at least float32: a frequent id's many small terms would be lost in bfloat16.
    """
    local_BL = ids_BL - first_id
    inside_BL = (local_BL >= 0) & (local_BL < table_VD.shape[0])
    x_BLD = (
        table_VD.astype(at_least_float32(table_VD.dtype))
        .at[jnp.where(inside_BL, local_BL, 0)]
        .get(mode="promise_in_bounds")
    )
    return jnp.where(inside_BL[:, :, None], x_BLD, jnp.zeros((), x_BLD.dtype)).astype(table_VD.dtype)
