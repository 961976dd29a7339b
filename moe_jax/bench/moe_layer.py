"""The MoE layer of a deployment beside the bare matrix products of the same rows on one device."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.bench.timing import interleaved_medians_s
from moe_jax.config.schema import DeploymentConfig, ModelConfig
from moe_jax.deployments import Deployment, create
from moe_jax.deployments.rules import BATCH_AXES
from moe_jax.model.experts import ACTIVATIONS, experts
from moe_jax.model.moe import moe
from moe_jax.model.router import route
from moe_jax.ops.grouped_matmul import RowBlocks

_BATCH = PartitionSpec(BATCH_AXES)
REFERENCE = "bare GEMMs, one device"


def measure_moe_layer(
    cfg: ModelConfig, config: DeploymentConfig, num_tokens: int, repeats: int
) -> tuple[dict[str, float], int]:
    """Median seconds by name, forward, and the rounds the exchange took; random tokens, fresh weights.

    ``bare GEMMs``: the two products and the activation over all num_tokens x top_k rows as one dense matrix
    each, one device. Then the whole layer in the deployment, and its parts: the parts are programs of their
    own and need not add up to the layer.
    """
    dep = create(cfg, config)
    layer = jax.tree.map(lambda w: w[0], dep.init_params(0)["blocks"])
    x_BLD = _on_mesh(dep, (dep.axes.size(*BATCH_AXES), num_tokens // dep.axes.size(*BATCH_AXES), cfg.d_model))
    exchange = dep.program.seams().exchange
    weights = {name: layer[name] for name in ("router", "experts")}
    specs = {
        name: jax.tree.map(_without_layers, dep.specs(at_rest=False)["blocks"][name]) for name in weights
    }

    def whole(params, x_BLD):
        y_BLD, stats = moe(params, x_BLD, cfg, exchange)
        return dep.axes.sum(y_BLD, "tensor"), stats.rounds[None]

    run = jax.jit(dep.shard_map(whole, (specs, _BATCH), (_BATCH, _BATCH)))
    functions = {REFERENCE: _bare(cfg, num_tokens), "MoE layer": partial(run, weights, x_BLD)}
    functions |= _parts(dep, weights, specs, x_BLD)
    rounds = int(jnp.max(run(weights, x_BLD)[1]))
    return interleaved_medians_s(functions, repeats), rounds


def _without_layers(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*spec[1:])


def _on_mesh(dep: Deployment, shape: tuple[int, ...]) -> jax.Array:
    x = jax.random.normal(jax.random.key(1), shape, jnp.dtype(dep.model_config.compute_dtype))
    return jax.device_put(x, NamedSharding(dep.mesh, _BATCH))


def _bare(cfg: ModelConfig, num_tokens: int) -> Callable[[], jax.Array]:
    dtype = jnp.dtype(cfg.compute_dtype)
    keys = jax.random.split(jax.random.key(2), 3)
    x_RD = jax.random.normal(keys[0], (num_tokens * cfg.top_k, cfg.d_model), dtype)
    w_DF = jax.random.normal(keys[1], (cfg.d_model, cfg.expert_hidden), dtype)
    w_FD = jax.random.normal(keys[2], (cfg.expert_hidden, cfg.d_model), dtype)
    act = ACTIVATIONS[cfg.activation]
    run = jax.jit(lambda x_RD, w_DF, w_FD: act(x_RD @ w_DF) @ w_FD)
    return partial(run, x_RD, w_DF, w_FD)


def _parts(dep: Deployment, weights: dict, specs: dict, x_BLD: jax.Array) -> dict[str, Callable[[], object]]:
    """The layer's stages, each alone: routing, the layer with idle experts, the experts on balanced rows."""
    cfg, exchange = dep.model_config, dep.program.seams().exchange

    def routing(params, x_BLD):
        chosen = route(params["router"]["w"], x_BLD.reshape(-1, cfg.d_model), cfg)
        return chosen.weights_TK, chosen.expert_ids_TK

    def moving(params, x_BLD):
        x_TD = x_BLD.reshape(-1, cfg.d_model)
        r = route(params["router"]["w"], x_TD, cfg)
        args = x_TD, r.expert_ids_TK, r.weights_TK, r.tokens_per_expert_E
        return exchange(*args, lambda rows: rows.x_XRD)[0].reshape(x_BLD.shape)

    def only_experts(params, x_BLD):
        held = params["experts"]["w_up"].shape[0]
        rows = x_BLD.size // cfg.d_model * cfg.top_k * dep.axes.size("expert") // cfg.num_experts
        x_XRD = jnp.broadcast_to(x_BLD.reshape(-1, cfg.d_model)[:1][None], (held, rows, cfg.d_model))
        return experts(params["experts"], cfg, RowBlocks(x_XRD, None, None))

    outputs = {
        "routing": (routing, (_BATCH, _BATCH)),
        "routing and exchange, experts idle": (moving, _BATCH),
        "experts on balanced rows": (only_experts, PartitionSpec("expert")),
    }
    return {
        name: partial(jax.jit(dep.shard_map(f, (specs, _BATCH), out)), weights, x_BLD)
        for name, (f, out) in outputs.items()
    }
