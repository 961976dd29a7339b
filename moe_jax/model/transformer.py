"""The whole model: its parameters, and the run through a stack of blocks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config.schema import ModelConfig
from moe_jax.model.attention import Attention
from moe_jax.model.block import BlockStats, Seams, block
from moe_jax.model.cache import Cache, LayerCache
from moe_jax.model.embed import Embed, embed
from moe_jax.model.experts import Experts, SharedExpert
from moe_jax.model.logits import Head, head_matrix, logits
from moe_jax.model.norm import Norm, rms_norm
from moe_jax.model.router import Router


class Blocks(nnx.Module):
    """Declares all layers' parameters, stacked on a leading layers dim."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = Norm(cfg.d_model, cfg.param_dtype, cfg.num_layers)
        self.attention = Attention(cfg, rngs)
        self.moe_norm = Norm(cfg.d_model, cfg.param_dtype, cfg.num_layers)
        self.router = Router(cfg, rngs)
        self.experts = Experts(cfg, rngs)
        if cfg.num_shared_experts:
            self.shared = SharedExpert(cfg, rngs)


class Transformer(nnx.Module):
    """Declares every parameter of the model; ``model(ids_BL)`` runs it on one device."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = Embed(cfg, rngs)
        self.blocks = Blocks(cfg, rngs)
        self.final_norm = Norm(cfg.d_model, cfg.param_dtype)
        if not cfg.tie_embeddings:
            self.head = Head(cfg, rngs)

    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        """Logits [B, L, V] in at least float32."""
        params = cast_for_compute(param_tree(self), self.cfg)
        x_BLD = embed(params["embed"]["table"], ids_BL)
        x_BLD, _ = run_blocks(params["blocks"], x_BLD, self.cfg, Seams())
        x_BLD = rms_norm(params["final_norm"]["scale"], x_BLD, self.cfg.norm_eps)
        logits_TV = logits(head_matrix(params), x_BLD.reshape(-1, x_BLD.shape[-1]))
        return logits_TV.reshape(*ids_BL.shape, -1)


def param_tree(model: Transformer) -> dict:
    """The parameters as a plain nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def logical_names(cfg: ModelConfig) -> tuple[dict, dict]:
    """The parameter tree twice, nothing allocated: as ShapeDtypeStructs, and as tuples of logical names."""
    model = nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    shapes, names = {}, {}
    for path, variable in flat:
        for tree, leaf in ((shapes, variable.get_value()), (names, variable.get_metadata("names"))):
            for key in path[:-1]:
                tree = tree.setdefault(key, {})
            tree[path[-1]] = leaf
    return shapes, names


# Kept in the stored dtype: the router decides, and a norm's scale is as small as it is sensitive.
_KEPT_DTYPE = ("router", "attention_norm", "moe_norm", "final_norm")


def compute_dtypes(params: dict, cfg: ModelConfig) -> dict:
    """The dtype each parameter is multiplied in: the compute dtype, but for the router and the norms."""

    def dtype(path, leaf) -> jnp.dtype:
        kept = any(getattr(key, "key", None) in _KEPT_DTYPE for key in path)
        return leaf.dtype if kept else jnp.dtype(cfg.compute_dtype)

    return jax.tree_util.tree_map_with_path(dtype, params)


def cast_for_compute(params: dict, cfg: ModelConfig) -> dict:
    """Parameters in the dtypes they are multiplied in."""
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, compute_dtypes(params, cfg))


_REMAT_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}


def run_blocks(
    blocks: dict, x_BLD: jax.Array, cfg: ModelConfig, seams: Seams
) -> tuple[jax.Array, BlockStats]:
    """Through every block given (all or a run of them): [B, L, D] -> same, and stats with a layers dim."""

    def body(x_BLD, layer):
        x_BLD, stats, _ = block(layer, x_BLD, cfg, seams)
        return x_BLD, stats

    if cfg.remat != "none":
        # prevent_cse is for code outside of a scan; inside it only hinders the compiler.
        body = jax.checkpoint(body, policy=_REMAT_POLICIES[cfg.remat], prevent_cse=False)
    return jax.lax.scan(body, x_BLD, blocks)


def run_blocks_cached(
    blocks: dict, x_BLD: jax.Array, cfg: ModelConfig, seams: Seams, cache: Cache
) -> tuple[jax.Array, Cache]:
    """As run_blocks, for the positions that follow those in the cache; returns it with them added."""

    class Carry(NamedTuple):
        x_BLD: jax.Array
        k_NBSGA: jax.Array
        v_NBSGA: jax.Array

    def body(carry, layer_and_index):
        layer, index = layer_and_index
        k, v = (jax.lax.dynamic_index_in_dim(c, index, keepdims=False) for c in carry[1:])
        x_BLD, _, new = block(layer, carry.x_BLD, cfg, seams, LayerCache(k, v, cache.length))
        assert new is not None
        k = jax.lax.dynamic_update_index_in_dim(carry.k_NBSGA, new.k_BSGA, index, 0)
        v = jax.lax.dynamic_update_index_in_dim(carry.v_NBSGA, new.v_BSGA, index, 0)
        return Carry(x_BLD, k, v), None

    indices_N = jnp.arange(cache.k_NBSGA.shape[0], dtype=jnp.int32)
    carry, _ = jax.lax.scan(body, Carry(x_BLD, cache.k_NBSGA, cache.v_NBSGA), (blocks, indices_N))
    return carry.x_BLD, Cache(carry.k_NBSGA, carry.v_NBSGA, cache.length + x_BLD.shape[1])
