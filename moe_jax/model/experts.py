"""The experts' MLPs, applied to blocks of rows, and the shared expert, applied to every token."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config.schema import ModelConfig
from moe_jax.model.params import normal
from moe_jax.ops.grouped_matmul import RowBlocks, grouped_matmul

ACTIVATIONS = {"gelu": lambda x: jax.nn.gelu(x, approximate=True), "silu": jax.nn.silu, "relu": jax.nn.relu}


class Experts(nnx.Module):
    """Declares every layer's experts: up [N, E, D, F], gate alike when gated, down [N, E, F, D]."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        n, e, d, f = cfg.num_layers, cfg.num_experts, cfg.d_model, cfg.expert_hidden
        up_names, dtype = ("layers", "experts", "embed", "mlp"), cfg.param_dtype
        self.w_up = normal(rngs, (n, e, d, f), up_names, cfg.init_std, dtype)
        if cfg.expert_type == "gated":
            self.w_gate = normal(rngs, (n, e, d, f), up_names, cfg.init_std, dtype)
        down_names = ("layers", "experts", "mlp", "embed")
        self.w_down = normal(rngs, (n, e, f, d), down_names, cfg.init_std / math.sqrt(2 * n), dtype)


class SharedExpert(nnx.Module):
    """Declares the shared experts as one MLP: up [N, D, F'], gate alike when gated, down [N, F', D]."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        n, d, f = cfg.num_layers, cfg.d_model, cfg.num_shared_experts * cfg.expert_hidden
        up_names, dtype = ("layers", "embed", "mlp"), cfg.param_dtype
        self.w_up = normal(rngs, (n, d, f), up_names, cfg.init_std, dtype)
        if cfg.expert_type == "gated":
            self.w_gate = normal(rngs, (n, d, f), up_names, cfg.init_std, dtype)
        self.w_down = normal(
            rngs, (n, f, d), ("layers", "mlp", "embed"), cfg.init_std / math.sqrt(2 * n), dtype
        )


def _mlp(params: dict, cfg: ModelConfig, x: jax.Array, matmul) -> jax.Array:
    """down(act(up x)) or down(act(gate x) * up x); matmul(x, w) multiplies in whatever layout x has."""
    act, up = ACTIVATIONS[cfg.activation], matmul(x, params["w_up"])
    hidden = act(matmul(x, params["w_gate"])) * up if "w_gate" in params else act(up)
    return matmul(hidden, params["w_down"])


def experts(params: dict, cfg: ModelConfig, rows: RowBlocks) -> jax.Array:
    """Each block of rows through its expert: rows.x_XRD -> [X, R, D]; rows of zeros stay zeros."""
    with jax.named_scope("experts"):
        return _mlp(params, cfg, rows.x_XRD, lambda x_XRI, w_EIO: grouped_matmul(x_XRI, w_EIO, rows))


def shared_expert(params: dict, cfg: ModelConfig, x_TD: jax.Array) -> jax.Array:
    """The MLP that every token passes through: [T, D] -> [T, D]."""
    with jax.named_scope("shared_expert"):
        return _mlp(params, cfg, x_TD, lambda x_TI, w_IO: jnp.einsum("TI,IO->TO", x_TI, w_IO))
