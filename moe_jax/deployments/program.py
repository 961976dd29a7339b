"""The per-device program: the model's steps, stitched together over the mesh axes.

Everything here runs inside one shard_map over the whole mesh, with check_vma off: each collective is then a
plain linear map of all devices' values, and its transpose is exact. A loss is a *share*: what this device
contributes, so that the sum over all devices is the loss; differentiating the share gives each device its
part of the gradient, and parts are summed once, at the end (``sum_gradients``).
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config.schema import DeploymentConfig, ModelConfig
from moe_jax.deployments.rules import BATCH_AXES
from moe_jax.model.block import BlockStats, Seams
from moe_jax.model.cache import Cache
from moe_jax.model.dispatch import local_exchange
from moe_jax.model.embed import embed
from moe_jax.model.logits import SoftmaxParts, cross_entropy, head_matrix, logits, softmax_parts
from moe_jax.model.losses import balance_loss, z_loss
from moe_jax.model.norm import rms_norm
from moe_jax.model.transformer import cast_for_compute, run_blocks, run_blocks_cached
from moe_jax.parallel.exchange.bucketed import BucketedExchange
from moe_jax.parallel.mesh import Axes
from moe_jax.parallel.pipeline import pipeline, pipeline_with_state
from moe_jax.parallel.sharding import LeafLayout

LOSS_CHUNK_TOKENS = 4096
"""Tokens whose logits exist at one time in the loss; more go chunk by chunk."""


class LossShare(NamedTuple):
    """This device's share of each term; summed over all devices they are the terms. >= float32 scalars."""

    cross_entropy: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array


@dataclass(frozen=True)
class Program:
    """The steps of one deployment on one device. All arrays are this device's parts."""

    model: ModelConfig
    deployment: DeploymentConfig
    axes: Axes

    def seams(self) -> Seams:
        """How this deployment spreads a block: the exchange over expert, sums over tensor."""
        size = self.axes.size("expert")
        bucketed = size > 1 or self.deployment.exchange == "bucketed"
        wide = BucketedExchange("expert", size, self.deployment.bucket_rows)
        exchange = wide if bucketed else local_exchange
        return Seams(exchange, lambda x: self.axes.sum(x, "tensor"))

    def embed(self, params: dict, ids_BL: jax.Array) -> jax.Array:
        """Look up tokens in a vocabulary split over tensor: [B, L] -> [B, L, D]."""
        table_VD = params["embed"]["table"]
        first_id = self.axes.index("tensor") * table_VD.shape[0]
        with jax.named_scope("embed"):
            return self.axes.sum(embed(table_VD, ids_BL, first_id), "tensor")

    def hidden(self, params: dict, ids_BL: jax.Array) -> tuple[jax.Array, BlockStats]:
        """Through all blocks: ids [B, L] -> (this pipe stage's share of the tokens [T / pipe, D], stats).

        The last stage's result is cut into equal parts, one per stage, so that the output projection is
        computed once and by all. Stats: this stage's layers, with leading dims [M, N].
        """
        num_stages, microbatches = self.axes.size("pipe"), self.deployment.num_microbatches
        x_BLD = self.embed(params, ids_BL)
        x_MBLD = x_BLD.reshape(microbatches, -1, *x_BLD.shape[1:])
        seams = self.seams()
        y_MBLD, stats = pipeline(
            lambda x_BLD: run_blocks(params["blocks"], x_BLD, self.model, seams), x_MBLD, "pipe", num_stages
        )
        return self._spread(y_MBLD.reshape(-1, y_MBLD.shape[-1])), stats

    def _spread(self, y_TD: jax.Array) -> jax.Array:
        """Cut the last stage's tokens into one part per stage: [T, D] -> [T / pipe, D]."""
        is_last = self.axes.index("pipe") == self.axes.size("pipe") - 1
        if self.axes.size("pipe") > 1:
            y_TD = jnp.where(is_last, y_TD, jnp.zeros((), y_TD.dtype))
        return self.axes.scatter_sum(y_TD, 0, "pipe")

    def _own_tokens(self, values_BL: jax.Array) -> jax.Array:
        """The tokens that _spread gives this stage: [B, L] -> [T / pipe]."""
        num_tokens = values_BL.size // self.axes.size("pipe")
        first = self.axes.index("pipe") * num_tokens
        return jax.lax.dynamic_slice_in_dim(values_BL.reshape(-1), first, num_tokens)

    def logits(self, params: dict, ids_BL: jax.Array) -> jax.Array:
        """Logits of this stage's tokens over this device's part of the vocabulary: [T / pipe, V / tensor]."""
        params = cast_for_compute(params, self.model)
        x_TD, _ = self.hidden(params, ids_BL)
        return self._logits(params, x_TD)

    def _logits(self, params: dict, x_TD: jax.Array) -> jax.Array:
        with jax.named_scope("logits"):
            x_TD = rms_norm(params["final_norm"]["scale"], x_TD[None], self.model.norm_eps)[0]
            return logits(head_matrix(params), x_TD)

    def loss_share(
        self, params: dict, ids_BL: jax.Array, targets_BL: jax.Array, num_tokens: int
    ) -> tuple[jax.Array, tuple[LossShare, BlockStats]]:
        """This device's share of the loss over ``num_tokens`` tokens of all devices, its terms, and stats."""
        x_TD, stats = self.hidden(params, ids_BL)
        nll_sum = self._nll_sum(params, x_TD, self._own_tokens(targets_BL))
        routing = stats.moe
        counts_NE = self.axes.sum(jnp.sum(routing.tokens_per_expert_E, axis=0, dtype=jnp.int32), *BATCH_AXES)
        cfg, scale = self.model, 1 / (self.axes.size("tensor") * self.model.num_layers)
        balance_N = balance_loss(counts_NE, jnp.sum(routing.prob_sum_E, axis=0), num_tokens, cfg.top_k)
        z_N = z_loss(jnp.sum(routing.z_sum, axis=0), num_tokens)
        # Every tensor device holds these same values; each contributes its fraction.
        share = LossShare(
            nll_sum / (self.axes.size("tensor") * num_tokens),
            jnp.sum(balance_N) * scale,
            jnp.sum(z_N) * scale,
        )
        terms = (share.balance_loss, cfg.balance_loss_weight), (share.z_loss, cfg.z_loss_weight)
        loss = share.cross_entropy
        for term, weight in terms:
            loss = loss + weight * term.astype(loss.dtype)
        return loss, (share, stats._replace(moe=routing._replace(tokens_per_expert_E=counts_NE)))

    def _nll_sum(self, params: dict, x_TD: jax.Array, targets_T: jax.Array) -> jax.Array:
        """Sum of the cross-entropy over tokens, in chunks whose logits are recomputed backward."""
        num_tokens, dim = x_TD.shape
        chunk = min(num_tokens, LOSS_CHUNK_TOKENS)
        num_chunks = -(-num_tokens // chunk)
        padding = num_chunks * chunk - num_tokens
        x_TD = jnp.pad(x_TD, ((0, padding), (0, 0))).reshape(num_chunks, chunk, dim)
        targets_T = jnp.pad(targets_T, (0, padding), constant_values=-1).reshape(num_chunks, chunk)

        # Only the logits are recomputed: the small sums over the vocabulary's parts are kept.
        kept = jax.checkpoint_policies.save_only_these_names("softmax_shift", "softmax_sums")

        @partial(jax.checkpoint, policy=kept)
        def chunk_nll(x_TD, targets_T):
            nll_T = self._token_nll(self._logits(params, x_TD), targets_T)
            return jnp.sum(jnp.where(targets_T >= 0, nll_T, jnp.zeros((), nll_T.dtype)))

        if num_chunks == 1:
            return chunk_nll(x_TD[0], targets_T[0])
        return jnp.sum(jax.lax.map(lambda chunk: chunk_nll(*chunk), (x_TD, targets_T)))

    def _token_nll(self, logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
        """Cross-entropy per token, the vocabulary split over tensor: one max and one sum of small arrays."""
        first_id = self.axes.index("tensor") * logits_TV.shape[1]
        shift_T = self.axes.max(jax.lax.stop_gradient(jnp.max(logits_TV, axis=1)), "tensor")
        parts = softmax_parts(logits_TV, targets_T, first_id, checkpoint_name(shift_T, "softmax_shift"))
        sums = self.axes.sum(jnp.stack([parts.exp_sum, parts.target]), "tensor")
        sums = checkpoint_name(sums, "softmax_sums")
        return cross_entropy(SoftmaxParts(parts.shift, sums[0], sums[1]))

    def cached_logits(self, params: dict, ids_BL: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits [B, V] after the last of the given positions, which follow those in the cache.

        params: as multiplied (cast_for_compute). The logits are whole and the same on all pipe and tensor
        devices.
        """
        seams, num_stages = self.seams(), self.axes.size("pipe")
        x_BLD, cache = pipeline_with_state(
            lambda x, cache: run_blocks_cached(params["blocks"], x, self.model, seams, cache),
            self.embed(params, ids_BL),
            cache,
            "pipe",
            num_stages,
        )
        x_BD = x_BLD[:, -1]
        if num_stages > 1:
            is_last = self.axes.index("pipe") == num_stages - 1
            x_BD = self.axes.sum(jnp.where(is_last, x_BD, jnp.zeros((), x_BD.dtype)), "pipe")
        return self.axes.gather(self._logits(params, x_BD), 1, "tensor"), cache


def gather_params(params: dict, layouts: dict, axes: Axes, cfg: ModelConfig) -> dict:
    """Parameters as multiplied, from parameters at rest: cast, then gathered over their rest_axes."""

    def gather(leaf: jax.Array, layout: LeafLayout) -> jax.Array:
        return leaf if layout.rest_dim is None else axes.gather(leaf, layout.rest_dim, *layout.rest_axes)

    return jax.tree.map(gather, cast_for_compute(params, cfg), layouts)


def sum_gradients(grads: dict, layouts: dict, axes: Axes) -> dict:
    """Sum the devices' parts of each gradient; the result lies as the parameters do at rest."""

    def scatter(grad: jax.Array, layout: LeafLayout) -> jax.Array:
        return grad if layout.rest_dim is None else axes.scatter_sum(grad, layout.rest_dim, *layout.rest_axes)

    leaves, treedef = jax.tree.flatten(jax.tree.map(scatter, grads, layouts))
    flat_layouts = treedef.flatten_up_to(layouts)
    # One all-reduce per set of axes, over all parameters that need it.
    for sum_axes in dict.fromkeys(layout.sum_axes for layout in flat_layouts):
        members = [i for i, layout in enumerate(flat_layouts) if layout.sum_axes == sum_axes]
        for i, total in zip(members, axes.sum([leaves[i] for i in members], *sum_axes), strict=True):
            leaves[i] = total
    return treedef.unflatten(leaves)
