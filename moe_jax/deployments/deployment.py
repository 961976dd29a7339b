"""A deployment: one model on one mesh."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped

from moe_jax.config.schema import DeploymentConfig, ModelConfig
from moe_jax.deployments.program import Program, gather_params, sum_gradients
from moe_jax.deployments.rules import BATCH_AXES, RULES
from moe_jax.model.transformer import Transformer, logical_names, param_tree
from moe_jax.parallel.mesh import AXES, Axes, make_mesh
from moe_jax.parallel.sharding import leaf_layout

BATCH_SPEC = PartitionSpec(BATCH_AXES)


@dataclass(frozen=True, eq=False)
class Deployment:
    """One model on one mesh: layouts of its parameters, and the per-device program. Make it with create()."""

    model_config: ModelConfig
    config: DeploymentConfig
    mesh: Mesh
    shapes: dict
    """Parameter tree of ShapeDtypeStructs (whole arrays)."""
    layouts: dict
    """Parameter tree of LeafLayouts."""

    @cached_property
    def axes(self) -> Axes:
        """Collectives over this mesh."""
        return Axes(self.mesh)

    @cached_property
    def program(self) -> Program:
        """The per-device steps."""
        return Program(self.model_config, self.config, self.axes)

    def specs(self, at_rest: bool) -> dict:
        """Parameter tree of PartitionSpecs: as training holds them (at_rest), or as the math uses them."""
        return jax.tree.map(lambda layout: layout.rest_spec if at_rest else layout.spec, self.layouts)

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """The spec on this mesh."""
        return NamedSharding(self.mesh, spec)

    def abstract_params(self, at_rest: bool = False) -> dict:
        """Parameter tree of ShapeDtypeStructs with shardings, for restoring and for compiling."""
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding(spec)),
            self.shapes,
            self.specs(at_rest),
        )

    def init_params(self, seed: int, at_rest: bool = False) -> dict:
        """Fresh parameters, the same on every mesh for one seed; each device makes only its own parts."""
        shardings = jax.tree.map(self.sharding, self.specs(at_rest))
        return jax.jit(self.make_params, out_shardings=shardings)(jax.random.key(seed))

    def make_params(self, key: jax.Array) -> dict:
        """The parameter tree from a key; to be jitted with out_shardings."""
        return param_tree(Transformer(self.model_config, nnx.Rngs(params=key)))

    def shard_map(self, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """f on every device's parts. check_vma is off: see deployments.program."""
        return jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def place_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Host arrays [B, L] onto the devices, sequences split over data and expert."""
        return {
            name: jax.make_array_from_callback(
                array.shape, self.sharding(BATCH_SPEC), lambda i, a=array: a[i]
            )
            for name, array in batch.items()
        }

    @cached_property
    def batch_multiple(self) -> int:
        """Numbers of sequences that divide evenly: over data and expert, microbatches, and pipe stages."""
        return self.axes.size(*BATCH_AXES) * self.config.num_microbatches * self.config.pipe

    def logits(self, params: dict, ids_BL: np.ndarray | jax.Array) -> jax.Array:
        """Logits [B, L, V] of int32 ids [B, L]; any B (padded to batch_multiple and cut again)."""
        ids_BL = np.asarray(ids_BL, np.int32)
        num_sequences, length = ids_BL.shape
        padding = -num_sequences % self.batch_multiple
        # Copies of real sequences: rows of equal ids would all be routed alike, in as many rounds.
        padded = np.pad(ids_BL, ((0, padding), (0, 0)), mode="wrap")
        logits_TV = self.logits_program(params, self.place_batch({"ids": padded})["ids"])
        return logits_TV.reshape(len(padded), length, -1)[:num_sequences]

    @cached_property
    def logits_program(self) -> Wrapped:
        """The jitted function of (params in use, placed ids) to logits [B L, V] behind logits."""
        out = PartitionSpec((*BATCH_AXES, "pipe"), "tensor")
        return jax.jit(self.shard_map(self.program.logits, (self.specs(at_rest=False), BATCH_SPEC), out))

    def loss_and_gradients(self, params: dict, batch: dict[str, np.ndarray]) -> tuple[dict, dict, dict]:
        """Loss terms, gradients and routing of one batch; params at rest.

        batch: ids_BL and targets_BL, int32 [B, L], B a multiple of data x expert x microbatches.
        Returns (terms: loss, cross_entropy, balance_loss, z_loss; gradients as the parameters at rest;
        routing: tokens_per_expert_NE, rounds_N, expert_ids_NTK).
        """
        self.check_num_sequences(len(batch["ids_BL"]))
        return self.loss_and_gradients_program(params, self.place_batch(batch))

    def check_num_sequences(self, num_sequences: int) -> None:
        """Raise ValueError if a training batch of so many sequences cannot be cut evenly."""
        multiple = self.axes.size(*BATCH_AXES) * self.config.num_microbatches
        if num_sequences == 0 or num_sequences % multiple:
            raise ValueError(
                f"the batch has {num_sequences} sequences; it must be a multiple of {multiple} "
                f"(data x expert x num_microbatches) under {self.config.name}"
            )

    @cached_property
    def loss_and_gradients_program(self) -> Wrapped:
        """The jitted function of (params at rest, placed batch) behind loss_and_gradients."""
        rest = self.specs(at_rest=True)
        batch_specs = {"ids_BL": BATCH_SPEC, "targets_BL": BATCH_SPEC}
        routing = {
            "tokens_per_expert_NE": PartitionSpec("pipe"),
            "rounds_N": PartitionSpec("pipe"),
            "expert_ids_NTK": PartitionSpec("pipe", BATCH_AXES),
        }

        def f(params, batch):
            used = gather_params(params, self.layouts, self.axes, self.model_config)
            loss, grads, (share, stats) = self.local_gradients(used, batch)
            terms = self.axes.sum({"loss": loss, **share._asdict()}, *AXES)
            ids_MNTK = stats.moe.expert_ids_TK
            flat_NTK = jnp.swapaxes(ids_MNTK, 0, 1).reshape(ids_MNTK.shape[1], -1, ids_MNTK.shape[3])
            return (
                terms,
                sum_gradients(grads, self.layouts, self.axes),
                {
                    "tokens_per_expert_NE": stats.moe.tokens_per_expert_E,
                    "rounds_N": self.axes.max(jnp.max(stats.moe.rounds, axis=0), *BATCH_AXES),
                    "expert_ids_NTK": flat_NTK,
                },
            )

        return jax.jit(self.shard_map(f, (rest, batch_specs), (PartitionSpec(), rest, routing)))

    def local_gradients(self, used: dict, batch: dict) -> tuple[jax.Array, dict, tuple]:
        """On one device: (loss share, this device's parts of the gradients, (LossShare, BlockStats)).

        used: parameters as multiplied (gather_params). The gradients are in the parameters' stored dtype and
        not yet summed over devices.
        """
        num_tokens = batch["ids_BL"].size * self.axes.size(*BATCH_AXES)
        grad = jax.value_and_grad(self.program.loss_share, has_aux=True)
        (loss, aux), grads = grad(used, batch["ids_BL"], batch["targets_BL"], num_tokens)
        grads = jax.tree.map(lambda g, shape: g.astype(shape.dtype), grads, self.shapes)
        return loss, grads, aux


def create(
    model_config: ModelConfig,
    config: DeploymentConfig,
    devices: Sequence | None = None,
    zero_params: bool = True,
) -> Deployment:
    """Lay a model out on a mesh over the first devices needed (default: jax.devices()).

    zero_params: split parameters at rest over the data and expert axes where these replicate them.
    Raises ConfigError when there are too few devices or a size does not divide. Allocates nothing.
    """
    mesh = make_mesh({axis: getattr(config, axis) for axis in AXES}, devices)
    shapes, names = logical_names(model_config)
    rest_axes = BATCH_AXES if zero_params else ()

    def layout(path, shape, names):
        return leaf_layout(
            jax.tree_util.keystr(path, simple=True, separator="/"), names, shape.shape, RULES, mesh, rest_axes
        )

    layouts = jax.tree_util.tree_map_with_path(
        lambda path, shape, names: layout(path, shape, names),
        shapes,
        names,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return Deployment(model_config, config, mesh, shapes, layouts)
