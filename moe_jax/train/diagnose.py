"""Where a loss or gradient that is not finite began: the tensor and the layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moe_jax.deployments.program import gather_params
from moe_jax.deployments.rules import BATCH_AXES
from moe_jax.parallel.mesh import AXES
from moe_jax.train.step import Trainer

_LAYERS = PartitionSpec("pipe")


def diagnose(trainer: Trainer, params: dict, batch: dict[str, np.ndarray]) -> str:
    """Run the batch again with probes and say in one phrase where the first bad value is.

    params: at rest, as they were when the step failed (a failed step leaves them unchanged). The order of
    blame is the order of computation: weights, then the forward pass from the first layer on, then the loss,
    then the backward pass from the last layer on.
    """
    probes = _probe_program(trainer)
    bad = None
    for index in range(trainer.cfg.accumulation_steps):
        found = jax.device_get(probes(params, _slice(trainer, batch, index)))
        bad = bad or _blame(found, trainer.deployment.model_config.num_layers)
    return bad or "nowhere: every value is finite when computed again, which points at the hardware"


def _slice(trainer: Trainer, batch: dict[str, np.ndarray], index: int) -> dict[str, jax.Array]:
    slices = trainer.cfg.accumulation_steps
    one = {name: array.reshape(slices, -1, array.shape[-1])[index] for name, array in batch.items()}
    return trainer.deployment.place_batch(one)


def _probe_program(trainer: Trainer) -> Any:
    """Jitted (params at rest, batch) -> counts of bad values by place, and the loss terms."""
    dep = trainer.deployment
    rest = dep.specs(at_rest=True)

    def by_layer(tree: dict) -> dict:
        """Bad values of each parameter: by layer for the blocks' ones [N], else one number."""

        def count(leaf, first_dim):
            return jnp.sum(~jnp.isfinite(leaf), axis=tuple(range(first_dim, leaf.ndim)), dtype=jnp.int32)

        blocks = jax.tree.map(lambda leaf: count(leaf, 1), tree["blocks"])
        others = jax.tree.map(lambda leaf: count(leaf, 0), {k: v for k, v in tree.items() if k != "blocks"})
        own_layers = dep.axes.sum(blocks, *(axis for axis in AXES if axis != "pipe"))
        return {"blocks": own_layers, **dep.axes.sum(others, *AXES)}

    def probe(params, batch):
        used = gather_params(params, dep.layouts, dep.axes, dep.model_config)
        loss, grads, (share, stats) = dep.local_gradients(used, batch)
        outputs = {"attention": stats.attention_bad, "moe": stats.moe_bad}
        outputs = dep.axes.sum(jax.tree.map(lambda a: jnp.sum(a, axis=0), outputs), *BATCH_AXES)
        terms = dep.axes.sum({"loss": loss, **share._asdict()}, *AXES)
        return {"weights": by_layer(params), "outputs": outputs, "terms": terms, "gradients": by_layer(grads)}

    by_param = {name: _LAYERS if name == "blocks" else PartitionSpec() for name in dep.shapes}
    out = {"weights": by_param, "outputs": _LAYERS, "terms": PartitionSpec(), "gradients": by_param}
    batch_specs = {"ids_BL": PartitionSpec(BATCH_AXES), "targets_BL": PartitionSpec(BATCH_AXES)}
    return jax.jit(dep.shard_map(probe, (rest, batch_specs), out))


def _blame(found: dict, num_layers: int) -> str | None:
    """The first bad place in the order of computation, None if all is finite."""
    if weights := _bad_parameters(found["weights"]):
        return f"in the weights themselves: {', '.join(weights)}"
    for layer in range(num_layers):
        for part in ("attention", "moe"):
            if found["outputs"][part][layer]:
                return f"in the forward pass: the output of {part} in layer {layer}"
    if bad_terms := [name for name, value in found["terms"].items() if not np.isfinite(value)]:
        return f"in the loss, after finite blocks: {', '.join(bad_terms)}"
    for name in ("head", "final_norm"):
        if name in found["gradients"] and (grads := _bad_parameters({name: found["gradients"][name]})):
            return f"in the backward pass: the gradient of {', '.join(grads)}"
    for layer in reversed(range(num_layers)):
        of_layer = jax.tree.map(lambda counts, i=layer: counts[i], found["gradients"]["blocks"])
        if grads := _bad_parameters({"blocks": of_layer}):
            return f"in the backward pass: the gradient of {', '.join(grads)} in layer {layer}"
    if grads := _bad_parameters(found["gradients"]):
        return f"in the backward pass: the gradient of {', '.join(grads)}"
    return None


def _bad_parameters(counts: dict) -> list[str]:
    """Names of parameters with bad values, with the first such layer where there are layers."""
    names = []
    for path, count in jax.tree_util.tree_leaves_with_path(counts):
        if np.any(count):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            names.append(
                f"{name} (layer {int(np.argmax(np.asarray(count) > 0))})" if np.ndim(count) else name
            )
    return names
