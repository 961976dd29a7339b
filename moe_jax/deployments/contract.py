"""The collective contract: what a deployment declares its programs will move, and what the compiled ones do.

A sharding rule that silently misses an axis still computes the right numbers, only slowly. So every
deployment declares its collectives from sizes alone, and tests hold the compiled program to it: kinds, counts
and bytes, no more and no less.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config.schema import TrainConfig
from moe_jax.deployments.deployment import Deployment
from moe_jax.deployments.program import LOSS_CHUNK_TOKENS
from moe_jax.deployments.rules import BATCH_AXES
from moe_jax.model.transformer import compute_dtypes
from moe_jax.parallel.exchange.bucketed import BucketedExchange, max_rounds
from moe_jax.parallel.mesh import AXES
from moe_jax.plan.hlo import Collective, collectives


@dataclass(frozen=True)
class Declared:
    """One collective of the program, as written; bytes are what a device puts into one execution."""

    kind: str
    axes: tuple[str, ...]
    count: int
    operand_bytes: int
    why: str
    conditional: bool = False
    """Runs only if routing is unbalanced: count is the most that any routing needs."""


class Tally(NamedTuple):
    """Executions and bytes put in by a device, of one kind over one set of axes, in one run of a program.

    An all-reduce counts its arrays, as the compiler merges small ones into one instruction.
    """

    executions: int
    operand_bytes: int


Key = tuple[str, tuple[str, ...], bool]
"""(kind, mesh axes, conditional)."""


def tally_declared(declared: Iterable[Declared]) -> dict[Key, Tally]:
    """Sum what was declared; collectives over axes of size 1 must not be among them."""
    totals: dict[Key, Tally] = {}
    for one in declared:
        if one.count:
            key = (one.kind, one.axes, one.conditional)
            old = totals.get(key, Tally(0, 0))
            totals[key] = Tally(old.executions + one.count, old.operand_bytes + one.count * one.operand_bytes)
    return totals


def tally_compiled(hlo_text: str, mesh: Mesh) -> dict[Key, Tally]:
    """Sum what the compiled program holds, with each collective's groups told as mesh axes."""
    totals: dict[Key, Tally] = {}
    for one in collectives(hlo_text):
        key = (one.kind, _axes_of(one, mesh), one.conditional)
        count = one.count * (one.num_operands if one.kind == "all-reduce" else 1)
        old = totals.get(key, Tally(0, 0))
        totals[key] = Tally(old.executions + count, old.operand_bytes + one.count * one.operand_bytes)
    return totals


def _axes_of(one: Collective, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ; ("?",) if it is no such set."""
    places = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    if one.kind == "collective-permute":
        moves = {
            tuple(np.argwhere(places == b)[0] - np.argwhere(places == a)[0])
            for a, b in one.source_target_pairs
        }
        moved = {axis for move in moves for axis, distance in zip(AXES, move, strict=True) if distance}
        return tuple(axis for axis in AXES if axis in moved)
    groups = {frozenset(group) for group in one.groups}
    large = [axis for axis in AXES if mesh.shape[axis] > 1]
    for axes in (axes for n in range(len(large) + 1) for axes in combinations(large, n)):
        dims = [AXES.index(axis) for axis in axes]
        moved = np.moveaxis(places, dims, range(-len(dims), 0)) if dims else places[..., None]
        size = int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))
        if groups == {frozenset(group) for group in moved.reshape(-1, size).tolist()}:
            return axes
    return ("?",)


def declare_forward(dep: Deployment, num_sequences: int, seq_len: int) -> list[Declared]:
    """The collectives of Deployment.logits on [num_sequences, seq_len]."""
    return _Sizes(dep, num_sequences, seq_len).forward()


def declare_step(dep: Deployment, cfg: TrainConfig, seq_len: int) -> list[Declared]:
    """The collectives of Trainer.step on [cfg.batch_size, seq_len]."""
    sizes = _Sizes(dep, cfg.batch_size // cfg.accumulation_steps, seq_len)
    slices = cfg.accumulation_steps
    passes = [*sizes.forward(), *sizes.loss(), *sizes.backward()]
    repeated = [
        Declared(d.kind, d.axes, d.count * slices, d.operand_bytes, d.why, d.conditional) for d in passes
    ]
    return [*repeated, *sizes.parameters(), *sizes.metrics(cfg)]


class _Sizes:
    """The sizes that a pass over ``num_sequences`` sequences gives its collectives."""

    def __init__(self, dep: Deployment, num_sequences: int, seq_len: int):
        self.dep, cfg, mesh = dep, dep.model_config, dep.axes
        self.pipe, microbatches = mesh.size("pipe"), dep.config.num_microbatches
        self.layers = cfg.num_layers // self.pipe
        self.ticks = microbatches + self.pipe - 1 if self.pipe > 1 else microbatches
        self.tokens = num_sequences * seq_len // mesh.size(*BATCH_AXES)
        self.microbatch_tokens = self.tokens // microbatches
        self.item_bytes = jnp.dtype(cfg.compute_dtype).itemsize
        self.stat_bytes = max(4, self.item_bytes)
        self.hidden_bytes = self.tokens * cfg.d_model * self.item_bytes
        self.recompute = int(cfg.remat != "none")

    def _declare(
        self, kind: str, axes: tuple[str, ...], count: int, operand_bytes: int, why: str
    ) -> list[Declared]:
        present = self.dep.axes.present(*axes)
        return [Declared(kind, present, count, operand_bytes, why)] if present else []

    def _tensor_sums(self, times_attention: int, times_moe: int) -> list[Declared]:
        one = self.microbatch_tokens * self.dep.model_config.d_model * self.item_bytes
        visits = self.layers * self.ticks
        return [
            *self._declare("all-reduce", ("tensor",), visits * times_attention, one, "sum of heads' outputs"),
            *self._declare(
                "all-reduce", ("tensor",), visits * times_moe, one, "sum of hidden parts' outputs"
            ),
        ]

    def _exchange(self, times: int, times_further: int, times_rounds: int) -> list[Declared]:
        """times: all-to-alls of the first round per layer visit; times_further: of each further round."""
        cfg, exchange = self.dep.model_config, self.dep.program.seams().exchange
        if not isinstance(exchange, BucketedExchange):
            return []
        bucket_rows = exchange.rows_per_bucket(self.microbatch_tokens, cfg.top_k, cfg.num_experts)
        further = max_rounds(self.microbatch_tokens, bucket_rows) - 1
        visits, buffer_bytes = (
            self.layers * self.ticks,
            cfg.num_experts * bucket_rows * cfg.d_model * self.item_bytes,
        )
        needed = visits * times_rounds if further else 0
        return [
            Declared("all-to-all", ("expert",), visits * times, buffer_bytes, "dispatch and combine"),
            Declared(
                "all-to-all", ("expert",), visits * times_further * further, buffer_bytes, "more rounds", True
            ),
            Declared("all-reduce", ("expert",), needed, 4, "rounds needed"),
        ]

    def forward(self) -> list[Declared]:
        tick_bytes = self.hidden_bytes * self.microbatch_tokens // self.tokens
        return [
            *self._declare("all-reduce", ("tensor",), 1, self.hidden_bytes, "embedding parts"),
            *self._tensor_sums(1, 1),
            *self._exchange(2, 2, 1),
            *self._declare("collective-permute", ("pipe",), self.ticks, tick_bytes, "to the next stage"),
            *self._declare("reduce-scatter", ("pipe",), 1, self.hidden_bytes, "tokens to all stages' logits"),
        ]

    def loss(self) -> list[Declared]:
        """Forward and backward of the cross-entropy over the vocabulary's parts, and the load counts."""
        tokens = self.tokens // self.pipe
        chunk = min(tokens, LOSS_CHUNK_TOKENS)
        chunks, one = math.ceil(tokens / chunk), chunk * self.stat_bytes
        counts_bytes = self.layers * self.dep.model_config.num_experts * 4
        return [
            *self._declare("all-reduce", ("tensor",), chunks, one, "softmax shift"),
            *self._declare("all-reduce", ("tensor",), 2 * chunks, 2 * one, "softmax sums, and backward"),
            *self._declare("all-reduce", BATCH_AXES, 1, counts_bytes, "tokens per expert"),
        ]

    def backward(self) -> list[Declared]:
        tick_bytes = self.hidden_bytes * self.microbatch_tokens // self.tokens
        again = self.recompute
        return [
            *self._declare("all-reduce", ("tensor",), 1, self.hidden_bytes, "embedding parts, backward"),
            *self._tensor_sums(1 + again, 1),
            # A further round is always recomputed: its two all-to-alls again, and both backward.
            *self._exchange(2 + 2 * again, 4, again),
            *self._declare("collective-permute", ("pipe",), self.ticks, tick_bytes, "to the stage before"),
            *self._declare(
                "all-gather", ("pipe",), 1, self.hidden_bytes // self.pipe, "logits' tokens, backward"
            ),
        ]

    def parameters(self) -> list[Declared]:
        """Weights gathered from rest, gradients summed back to it."""
        out = []
        leaves = zip(
            jax.tree.leaves(self.dep.shapes),
            jax.tree.leaves(compute_dtypes(self.dep.shapes, self.dep.model_config)),
            jax.tree.leaves(self.dep.layouts),
            strict=True,
        )
        for shape, dtype, layout in leaves:
            parts = self.dep.sharding(layout.rest_spec).shard_shape(layout.shape)
            rest_size = math.prod(parts)
            size = rest_size * self.dep.axes.size(*layout.rest_axes)
            if layout.rest_axes:
                axes = layout.rest_axes
                out += self._declare("all-gather", axes, 1, rest_size * dtype.itemsize, "weights from rest")
                out += self._declare(
                    "reduce-scatter", axes, 1, size * shape.dtype.itemsize, "gradients to rest"
                )
            out += self._declare(
                "all-reduce", layout.sum_axes, 1, rest_size * shape.dtype.itemsize, "gradients"
            )
        return out

    def metrics(self, cfg: TrainConfig) -> list[Declared]:
        return [
            *self._declare("all-reduce", AXES, 5, self.stat_bytes, "loss terms and gradient norm"),
            *self._declare("all-reduce", AXES, int(cfg.state_checksum), 4, "state checksum"),
            *self._declare("all-reduce", BATCH_AXES, 1, self.layers * 4, "rounds used"),
        ]
