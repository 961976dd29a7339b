"""The training step: one program per device, from master weights at rest to master weights at rest."""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jax.stages import Wrapped

from moe_jax.config.schema import TrainConfig
from moe_jax.deployments import Deployment
from moe_jax.deployments.program import gather_params, sum_gradients
from moe_jax.deployments.rules import BATCH_AXES
from moe_jax.parallel.mesh import AXES
from moe_jax.train.optimizer import learning_rate_schedule, make_optimizer

State = dict[str, Any]
"""{"params", "opt", "step": int32, steps done, "halted_at": int32, the step that was not finite, else -1}.

Once halted_at is set no further step changes the state: steps are dispatched ahead of the host, and those
already under way when a bad one is noticed must not train on.
"""

# [accumulation slice, sequence, position]: slices are cut from the global batch, so that they hold the same
# sequences on every mesh.
_BATCH_SPEC = PartitionSpec(None, BATCH_AXES)


class Trainer:
    """Compiles and runs the training step of one deployment."""

    def __init__(self, deployment: Deployment, cfg: TrainConfig):
        self.deployment, self.cfg = deployment, cfg
        self.optimizer = make_optimizer(cfg)
        self.schedule = learning_rate_schedule(cfg)

    # ---- state -------------------------------------------------------------------------------------------

    def make_state(self, key: jax.Array) -> State:
        """A fresh state from a key; to be jitted with out_shardings, so that no part exists unsharded."""
        params = self.deployment.make_params(key)
        opt = self.optimizer.init(params)
        return {"params": params, "opt": opt, "step": jnp.int32(0), "halted_at": jnp.int32(-1)}

    @cached_property
    def state_specs(self) -> State:
        """PartitionSpecs of the state: the optimizer's moments lie as the parameters do at rest."""
        params = self.deployment.specs(at_rest=True)
        opt = optax.tree.map_params(
            self.optimizer,
            lambda _, spec: spec,
            jax.eval_shape(self.optimizer.init, self.deployment.shapes),
            params,
            transform_non_params=lambda _: PartitionSpec(),
        )
        return {"params": params, "opt": opt, "step": PartitionSpec(), "halted_at": PartitionSpec()}

    def init_state(self) -> State:
        """Fresh weights from cfg.seed and an empty optimizer state, each device making its own parts."""
        shardings = jax.tree.map(self.deployment.sharding, self.state_specs)
        return jax.jit(self.make_state, out_shardings=shardings)(jax.random.key(self.cfg.seed))

    def abstract_state(self) -> State:
        """The state as ShapeDtypeStructs with shardings: what to restore a checkpoint into."""
        shapes = jax.eval_shape(self.make_state, jax.random.key(0))
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=self.deployment.sharding(spec)
            ),
            shapes,
            self.state_specs,
        )

    # ---- steps -------------------------------------------------------------------------------------------

    def place(self, batch: dict[str, np.ndarray], slices: int | None = None) -> dict[str, jax.Array]:
        """Host arrays [B, L] onto the devices as [slices, B / slices, L]; slices: accumulation_steps."""
        slices = slices or self.cfg.accumulation_steps
        num_sequences = len(batch["ids_BL"])
        if num_sequences % slices:
            raise ValueError(
                f"the batch has {num_sequences} sequences; it must be a multiple of {slices} slices"
            )
        self.deployment.check_num_sequences(num_sequences // slices)
        sharding, shape = self.deployment.sharding(_BATCH_SPEC), (slices, -1)
        placed = {}
        for name, array in batch.items():
            sliced = array.reshape(*shape, array.shape[-1])
            placed[name] = jax.make_array_from_callback(sliced.shape, sharding, sliced.__getitem__)
        return placed

    def step(self, state: State, batch: dict[str, np.ndarray]) -> tuple[State, dict[str, jax.Array]]:
        """One optimizer step on a batch of train.batch_size sequences; the given state is donated.

        Returns the new state and metrics, small arrays not yet waited for: loss, cross_entropy,
        balance_loss, z_loss, grad_norm (before clipping), learning_rate, finite (bool),
        tokens_per_expert_NE, rounds_N, and state_checksum (uint32) if the config asks for it.
        """
        return self.step_program(state, self.place(batch))

    def evaluate(self, params: dict, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Loss terms of a batch, parameters at rest; changes nothing."""
        return self.evaluate_program(params, self.place(batch, slices=1))

    @cached_property
    def step_program(self) -> Wrapped:
        """The jitted function of (state, placed batch) behind step."""
        batch = {"ids_BL": _BATCH_SPEC, "targets_BL": _BATCH_SPEC}
        layers = PartitionSpec("pipe")
        metrics = dict.fromkeys(self._scalar_metrics(), PartitionSpec())
        metrics |= {"tokens_per_expert_NE": layers, "rounds_N": layers}
        f = self.deployment.shard_map(
            self._local_step, (self.state_specs, batch), (self.state_specs, metrics)
        )
        return jax.jit(f, donate_argnums=0)

    @cached_property
    def evaluate_program(self) -> Wrapped:
        """The jitted function of (params at rest, placed batch) behind evaluate."""
        batch = {"ids_BL": _BATCH_SPEC, "targets_BL": _BATCH_SPEC}
        params = self.deployment.specs(at_rest=True)
        return jax.jit(self.deployment.shard_map(self._local_evaluate, (params, batch), PartitionSpec()))

    def _scalar_metrics(self) -> list[str]:
        names = ["loss", "cross_entropy", "balance_loss", "z_loss", "grad_norm", "learning_rate", "finite"]
        return [*names, "state_checksum"] if self.cfg.state_checksum else names

    def _local_evaluate(self, params: dict, batch: dict) -> dict:
        dep = self.deployment
        used = gather_params(params, dep.layouts, dep.axes, dep.model_config)
        ids_BL, targets_BL = batch["ids_BL"][0], batch["targets_BL"][0]
        num_tokens = ids_BL.size * dep.axes.size(*BATCH_AXES)
        loss, (share, _) = dep.program.loss_share(used, ids_BL, targets_BL, num_tokens)
        return dep.axes.sum({"loss": loss, **share._asdict()}, *AXES)

    def _local_step(self, state: State, batch: dict) -> tuple[State, dict]:
        dep, params = self.deployment, state["params"]
        terms, grads, counts_NE, rounds_N = self._accumulate(params, batch)
        terms = dep.axes.sum(terms, *AXES)
        grads = sum_gradients(grads, dep.layouts, dep.axes)
        grad_norm = self._global_norm(grads)
        finite = jnp.isfinite(terms["loss"]) & jnp.isfinite(grad_norm)
        if self.cfg.clip_norm:
            scale = jnp.minimum(1.0, self.cfg.clip_norm / (grad_norm + 1e-12))
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        healthy = finite & (state["halted_at"] < 0)
        new_state = self._update(state, grads, healthy, finite)
        metrics = {
            **terms,
            "grad_norm": grad_norm,
            "learning_rate": self.schedule(state["step"]),
            "finite": healthy,
            "tokens_per_expert_NE": counts_NE,
            "rounds_N": dep.axes.max(rounds_N, *BATCH_AXES),
        }
        if self.cfg.state_checksum:
            metrics["state_checksum"] = self._checksum(new_state)
        return new_state, metrics

    def _accumulate(self, params: dict, batch: dict) -> tuple[dict, dict, jax.Array, jax.Array]:
        """This device's shares of the loss terms and parts of the gradients, averaged over the slices."""
        dep, num_slices = self.deployment, self.cfg.accumulation_steps
        used = gather_params(params, dep.layouts, dep.axes, dep.model_config)

        def one_slice(slice_BL: dict) -> tuple:
            loss, grads, (share, stats) = dep.local_gradients(used, slice_BL)
            terms = {"loss": loss, **share._asdict()}
            return terms, grads, stats.moe.tokens_per_expert_E, jnp.max(stats.moe.rounds, axis=0)

        if num_slices == 1:
            return one_slice(jax.tree.map(lambda a: a[0], batch))

        def add(carry: tuple, slice_BL: dict) -> tuple:
            terms, grads, counts_NE, rounds_N = one_slice(slice_BL)
            summed = jax.tree.map(jnp.add, carry[:3], (terms, grads, counts_NE))
            return (*summed, jnp.maximum(carry[3], rounds_N)), None

        shapes = jax.eval_shape(one_slice, jax.tree.map(lambda a: a[0], batch))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (terms, grads, counts_NE, rounds_N), _ = jax.lax.scan(add, zeros, batch)
        terms, grads = jax.tree.map(lambda a: a / num_slices, (terms, grads))
        return terms, grads, counts_NE, rounds_N

    def _global_norm(self, grads: dict) -> jax.Array:
        """Norm over all devices' parts; a part that several devices hold counts once."""

        def share(grad: jax.Array, layout) -> jax.Array:
            return jnp.sum(grad * grad) / self.deployment.axes.size(*layout.sum_axes)

        shares = jax.tree.leaves(jax.tree.map(share, grads, self.deployment.layouts))
        return jnp.sqrt(self.deployment.axes.sum(sum(shares), *AXES))

    def _update(self, state: State, grads: dict, healthy: jax.Array, finite: jax.Array) -> State:
        updates, opt = self.optimizer.update(grads, state["opt"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt": opt, "step": state["step"] + 1}
        old = {name: state[name] for name in new}
        new = jax.tree.map(lambda a, b: jnp.where(healthy, a, b), new, old)
        halted_now = ~finite & (state["halted_at"] < 0)
        return {**new, "halted_at": jnp.where(halted_now, state["step"], state["halted_at"])}

    def _checksum(self, state: State) -> jax.Array:
        """Bits of the whole state folded to a uint32: integer sums, so that no order matters."""
        axes, total = self.deployment.axes, jnp.uint32(0)
        for leaf in jax.tree.leaves(state):
            bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32)
            bits = bits.reshape(-1).astype(jnp.uint32)
            # Odd multipliers by place: a permutation of the values changes the sum.
            total = total * jnp.uint32(31) + jnp.sum(
                bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32
            )
        return axes.sum(total, *AXES)
