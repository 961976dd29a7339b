"""Generation with a KV cache, in any deployment: one prefill of the prompts, then a decode step per token."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moe_jax.deployments import Deployment
from moe_jax.deployments.rules import BATCH_AXES
from moe_jax.model.cache import Cache

# Cache lengths are rounded up to this many positions, so that near lengths share one compiled program.
_CACHE_STEP = 64
_CACHE_SPEC = PartitionSpec("pipe", BATCH_AXES, None, "tensor", None)


class Generator:
    """Compiled prefill and decode steps of one deployment. Its weights are given with each call."""

    def __init__(self, deployment: Deployment):
        self.deployment = deployment
        specs = Cache(_CACHE_SPEC, _CACHE_SPEC, PartitionSpec())  # pyright: ignore[reportArgumentType]
        batch = PartitionSpec(BATCH_AXES)
        run = deployment.shard_map(
            deployment.program.cached_logits,
            (deployment.specs(at_rest=False), batch, specs),
            (PartitionSpec(BATCH_AXES), specs),
        )

        def step(params, ids_BL, cache, sampling):
            logits_BV, cache = run(params, ids_BL, cache)
            return sample(logits_BV, cache.length, **sampling), cache

        # The cache is updated in place: its buffers are given up with each call.
        self._step = jax.jit(step, donate_argnums=2)
        self._cache_sharding = deployment.sharding(_CACHE_SPEC)

    def stream(
        self, params: dict, ids_BL: np.ndarray, max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[np.ndarray]:
        """Yield max_new_tokens arrays int32 [B], the next token of each sequence.

        params: as multiplied, in the layout of use. ids_BL: int32 prompts of equal length. temperature 0
        takes the most likely token; above 0 it samples, each sequence by (seed, its index, position) alone,
        so that neither the deployment nor the rest of the batch changes what a sequence draws.
        """
        num_sequences, length = ids_BL.shape
        padding = -num_sequences % self.deployment.axes.size(*BATCH_AXES)
        padded = np.pad(ids_BL, ((0, padding), (0, 0)), mode="wrap")
        ids = self.deployment.place_batch({"ids": padded})["ids"]
        cache = self._empty_cache(len(padded), length + max_new_tokens)
        sampling = {"temperature": np.float32(temperature), "seed": np.uint32(seed)}
        for _ in range(max_new_tokens):
            next_B, cache = self._step(params, ids, cache, sampling)
            ids = next_B[:, None]
            yield np.asarray(next_B)[:num_sequences]

    def _empty_cache(self, num_sequences: int, num_positions: int) -> Cache:
        cfg = self.deployment.model_config
        rounded = -(-num_positions // _CACHE_STEP) * _CACHE_STEP
        kv_heads, width = cfg.num_kv_heads or cfg.num_heads, cfg.head_dim or cfg.d_model // cfg.num_heads
        shape = (cfg.num_layers, num_sequences, rounded, kv_heads, width)
        make = jax.jit(
            partial(jnp.zeros, shape, jnp.dtype(cfg.compute_dtype)), out_shardings=self._cache_sharding
        )
        length = jax.device_put(jnp.int32(0), self.deployment.sharding(PartitionSpec()))
        return Cache(make(), make(), length)


def sample(
    logits_BV: jax.Array, position: jax.Array, *, temperature: jax.Array, seed: jax.Array
) -> jax.Array:
    """Next token ids int32 [B]: the largest logit at temperature 0, else drawn from softmax(logits / it)."""
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.key(seed), position)
    keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(logits_BV.shape[0]))
    scale = jnp.maximum(temperature, jnp.float32(1e-6)).astype(logits_BV.dtype)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV / scale).astype(jnp.int32)
    return jnp.where(temperature > 0, drawn_B, greedy_B)
