"""Where a loss or gradient that is not finite began: the tensor and the layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moe_jax.deployments.program import gather_params, sum_gradients
from moe_jax.deployments.rules import BATCH_AXES
from moe_jax.parallel.mesh import AXES
from moe_jax.train.step import Trainer

_LAYERS = PartitionSpec("pipe")
# Parts of a block as the backward pass comes to them.
_BACKWARD_ORDER = ("shared", "experts", "router", "moe_norm", "attention", "attention_norm")


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

    def by_layer(value, *trees: dict) -> dict:
        """Sums of value(leaf, dims) over each parameter: by layer for the blocks' ones [N], else scalar."""

        def values(first_dim, *parts):
            return jax.tree.map(
                lambda *leaves: value(*leaves, tuple(range(first_dim, leaves[0].ndim))), *parts
            )

        others = [{k: v for k, v in tree.items() if k != "blocks"} for tree in trees]
        own_layers = values(1, *(tree["blocks"] for tree in trees))
        own_layers = dep.axes.sum(own_layers, *(axis for axis in AXES if axis != "pipe"))
        return {"blocks": own_layers, **dep.axes.sum(values(0, *others), *AXES)}

    def bad(leaf, dims):
        return jnp.sum(~jnp.isfinite(leaf), axis=dims, dtype=jnp.int32)

    def squares(leaf, layout, dims):
        return jnp.sum(leaf * leaf, axis=dims) / dep.axes.size(*layout.sum_axes)

    def probe(params, batch):
        used = gather_params(params, dep.layouts, dep.axes, dep.model_config)
        loss, grads, (share, stats) = dep.local_gradients(used, batch)
        router_bad_MN = bad(stats.moe.prob_sum_E, -1) + bad(stats.moe.z_sum, ())
        outputs = {"attention": stats.attention_bad, "router": router_bad_MN, "moe": stats.moe_bad}
        summed = sum_gradients(grads, dep.layouts, dep.axes)
        return {
            "weights": by_layer(bad, params),
            "outputs": dep.axes.sum(jax.tree.map(lambda a: jnp.sum(a, axis=0), outputs), *BATCH_AXES),
            "terms": dep.axes.sum({"loss": loss, **share._asdict()}, *AXES),
            "gradients": by_layer(bad, grads),
            "squares": by_layer(squares, summed, dep.layouts),
        }

    by_param = {name: _LAYERS if name == "blocks" else PartitionSpec() for name in dep.shapes}
    out = {"weights": by_param, "outputs": _LAYERS, "terms": PartitionSpec()}
    out |= {"gradients": by_param, "squares": by_param}
    batch_specs = {"ids_BL": PartitionSpec(BATCH_AXES), "targets_BL": PartitionSpec(BATCH_AXES)}
    return jax.jit(dep.shard_map(probe, (rest, batch_specs), out))


def _blame(found: dict, num_layers: int) -> str | None:
    """The first bad place in the order of computation, None if all is finite."""
    if weights := _bad_parameters(found["weights"]):
        return f"in the weights themselves: {', '.join(weights)}"
    for layer in range(num_layers):
        for part in ("attention", "router", "moe"):
            if found["outputs"][part][layer]:
                return f"in the forward pass: the output of {part} in layer {layer}"
    if bad_terms := [name for name, value in found["terms"].items() if not np.isfinite(value)]:
        return f"in the loss, after finite blocks: {', '.join(bad_terms)}"
    for name in ("head", "final_norm"):
        if name in found["gradients"] and (grads := _bad_parameters({name: found["gradients"][name]})):
            return f"in the backward pass: the gradient of {', '.join(grads)}"
    blocks = found["gradients"]["blocks"]
    for layer in reversed(range(num_layers)):
        for part in (name for name in _BACKWARD_ORDER if name in blocks):
            of_layer = jax.tree.map(lambda counts, i=layer: counts[i], blocks[part])
            if grads := _bad_parameters({"blocks": {part: of_layer}}):
                return f"in the backward pass: the gradient of {', '.join(grads)} in layer {layer}"
    if grads := _bad_parameters(found["gradients"]):
        return f"in the backward pass: the gradient of {', '.join(grads)}"
    return _blame_norm(found["squares"])


def _blame_norm(squares: dict) -> str | None:
    """The largest of gradients that are finite, but so large that the sum of their squares is not."""
    leaves = {_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(squares)}
    total = sum(float(np.sum(leaf, dtype=np.float64)) for leaf in leaves.values())
    if total <= min(float(jnp.finfo(leaf.dtype).max) for leaf in leaves.values()):
        return None
    name, largest = max(leaves.items(), key=lambda item: np.max(item[1]))
    layer = f" (layer {int(np.argmax(largest))})" if largest.ndim else ""
    return f"in the gradient norm: gradients are finite, their squares not; the largest is of {name}{layer}"


def _bad_parameters(counts: dict) -> list[str]:
    """Names of parameters with bad values, with the first such layer where there are layers."""
    names = []
    for path, count in jax.tree_util.tree_leaves_with_path(counts):
        if np.any(count):
            layer = f" (layer {int(np.argmax(np.asarray(count) > 0))})" if np.ndim(count) else ""
            names.append(_name(path) + layer)
    return names


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
