"""Exact causal attention without an L x L buffer (FlashAttention-2, Dao 2023), with and without a KV cache.

Shape letters besides those of :mod:`moe_jax.model`: P = H / G query heads that share a key/value head,
C blocks, Q queries of one block, U keys of one block.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops.dtypes import at_least_float32


def attention(
    q_BLHA: jax.Array,
    k_BLGA: jax.Array,
    v_BLGA: jax.Array,
    *,
    implementation: Literal["auto", "blockwise", "cudnn"] = "auto",
    block: int = 256,
) -> jax.Array:
    """Causal attention by the chosen algorithm: [B, L, H, A] in q's dtype, differentiable.

    ``blockwise`` is :func:`causal_attention` and runs everywhere. ``cudnn`` is cuDNN's fused kernel, for
    bfloat16 or float16 on an NVIDIA GPU. ``auto`` chooses cudnn if this process's default device is an NVIDIA
    GPU and the kernel takes the arrays. The choice falls when the function is traced: name the implementation
    when you compile for a device that this process does not have, or for one that is not its default.
    """
    if implementation == "auto":
        implementation = "cudnn" if _cudnn_runs_here(q_BLHA) else "blockwise"
    if implementation == "cudnn":
        if not _cudnn_takes(q_BLHA):
            raise ValueError(
                f"attention: implementation 'cudnn' got heads of width {q_BLHA.shape[-1]} in {q_BLHA.dtype}; "
                "it takes bfloat16 or float16 and widths that 8 divides, up to 256. Use 'blockwise', or "
                "compute in bfloat16."
            )
        return jax.nn.dot_product_attention(q_BLHA, k_BLGA, v_BLGA, is_causal=True, implementation="cudnn")
    if implementation != "blockwise":
        raise ValueError(
            f"attention: implementation {implementation!r} is not known; use 'auto', 'blockwise' or 'cudnn'."
        )
    return causal_attention(q_BLHA, k_BLGA, v_BLGA, block=block)


def causal_attention(
    q_BLHA: jax.Array, k_BLGA: jax.Array, v_BLGA: jax.Array, *, block: int = 256
) -> jax.Array:
    """softmax(q k^T / sqrt(A) + causal mask) v, by blocks of ``block`` tokens: [B, L, H, A] in q's dtype.

    Query head h reads key/value head h // (H / G). The softmax runs in at least float32. Any length; beyond
    arrays of the inputs' size the largest buffer is [B, H, block, block], forward and backward (reverse mode
    only). Sequences of one block take no loop at all. Raises ValueError for shapes that do not fit together.
    """
    _check_shapes(q_BLHA, k_BLGA, v_BLGA)
    if k_BLGA.shape[1] != q_BLHA.shape[1]:
        raise ValueError(f"causal_attention: {q_BLHA.shape[1]} queries but {k_BLGA.shape[1]} keys.")
    return _causal(q_BLHA, k_BLGA, v_BLGA, min(block, q_BLHA.shape[1]))


def cached_attention(
    q_BLHA: jax.Array,
    k_BSGA: jax.Array,
    v_BSGA: jax.Array,
    first_position: jax.Array | int,
    *,
    block: int = 256,
) -> jax.Array:
    """Attend to a KV cache: query i, at position first_position + i, sees the cache up to that position.

    ``first_position``: int32, one for all sequences or [B], at least 0; first_position + L must not pass S.
    What the cache holds behind a query's own position must be finite and has no effect; the time goes with
    the positions seen, not with S. Result: [B, L, H, A] in q's dtype, which the cache's may differ from.
    Beyond arrays of the queries' size the largest buffer is [B, H, min(L, block), block]. No gradient.
    """
    _check_shapes(q_BLHA, k_BSGA, v_BSGA)
    batch, length = q_BLHA.shape[:2]
    first_B = jnp.broadcast_to(jnp.asarray(first_position, jnp.int32), (batch,))
    if length <= block:
        q_BGPQA = _group(q_BLHA, k_BSGA.shape[2])
        return _ungroup(_attend_cache(q_BGPQA, k_BSGA, v_BSGA, first_B, block))
    q_CBGPQA = _split(_group(q_BLHA, k_BSGA.shape[2]), block)
    first_CB = first_B[None, :] + jnp.arange(q_CBGPQA.shape[0], dtype=jnp.int32)[:, None] * block
    o_CBGPQA = jax.lax.map(lambda q: _attend_cache(q[0], k_BSGA, v_BSGA, q[1], block), (q_CBGPQA, first_CB))
    return _ungroup(_join(o_CBGPQA, length))


def _cudnn_takes(q_BLHA: jax.Array) -> bool:
    width = q_BLHA.shape[-1]
    return q_BLHA.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 256


def _cudnn_runs_here(q_BLHA: jax.Array) -> bool:
    # Heads wider than 128 need a Hopper GPU or newer: only on request.
    return (
        _cudnn_takes(q_BLHA)
        and q_BLHA.shape[-1] <= 128
        and jax.default_backend() == "gpu"
        and jax.local_devices()[0].device_kind.startswith("NVIDIA")
    )


def _check_shapes(q_BLHA: jax.Array, k_BSGA: jax.Array, v_BSGA: jax.Array) -> None:
    batch, _, heads, width = q_BLHA.shape
    kv_batch, _, kv_heads, kv_width = k_BSGA.shape
    if k_BSGA.shape != v_BSGA.shape or (kv_batch, kv_width) != (batch, width) or heads % kv_heads:
        raise ValueError(
            f"attention: queries {q_BLHA.shape}, keys {k_BSGA.shape}, values {v_BSGA.shape}; keys and values "
            "must both be [batch, positions, key/value heads, width] with the queries' batch and width, and "
            "a number of heads that divides the queries'."
        )


# Layout. Inside, heads come before positions, so that a block of one head is one contiguous matrix.


def _group(x_BLHA: jax.Array, kv_heads: int) -> jax.Array:
    """[B, L, H, A] -> [B, G, P, L, A]."""
    batch, length, heads, width = x_BLHA.shape
    x_BHLA = jnp.swapaxes(x_BLHA, 1, 2)
    return x_BHLA.reshape(batch, kv_heads, heads // kv_heads, length, width)


def _ungroup(x_BGPLA: jax.Array) -> jax.Array:
    """[B, G, P, L, A] -> [B, L, H, A]."""
    batch, kv_heads, shared, length, width = x_BGPLA.shape
    return jnp.swapaxes(x_BGPLA.reshape(batch, kv_heads * shared, length, width), 1, 2)


def _split(x: jax.Array, block: int) -> jax.Array:
    """[..., L, A] -> [C, ..., block, A], zeros behind the end."""
    *lead, length, width = x.shape
    num_blocks = -(-length // block)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, num_blocks * block - length), (0, 0)])
    return jnp.moveaxis(x.reshape(*lead, num_blocks, block, width), -3, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    """[C, ..., block, A] -> [..., length, A]."""
    x = jnp.moveaxis(x, 0, -3)
    *lead, num_blocks, block, width = x.shape
    return x.reshape(*lead, num_blocks * block, width)[..., :length, :]


# One block of queries against one block of keys.


class _Softmax(NamedTuple):
    """A softmax-weighted sum over the keys seen so far; out and total are relative to exp(top)."""

    top_BGPQ1: jax.Array
    total_BGPQ1: jax.Array
    out_BGPQA: jax.Array

    def result(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """The weighted mean in ``dtype``, and the log of the sum of exponentials [B, G, P, Q, 1]."""
        out = (self.out_BGPQA / self.total_BGPQ1).astype(dtype)
        return out, self.top_BGPQ1 + jnp.log(self.total_BGPQ1)


def _scores(q_BGPQA: jax.Array, k_BGUA: jax.Array) -> jax.Array:
    accumulate = at_least_float32(q_BGPQA.dtype)
    scores = jnp.einsum("BGPQA,BGUA->BGPQU", q_BGPQA, k_BGUA, preferred_element_type=accumulate)
    return scores * (1.0 / math.sqrt(q_BGPQA.shape[-1]))


def _weigh(weight_BGPQU: jax.Array, v_BGUA: jax.Array) -> jax.Array:
    weight_BGPQU, dtype = weight_BGPQU.astype(v_BGUA.dtype), weight_BGPQU.dtype
    return jnp.einsum("BGPQU,BGUA->BGPQA", weight_BGPQU, v_BGUA, preferred_element_type=dtype)


def _begin(scores_BGPQU: jax.Array, v_BGUA: jax.Array) -> _Softmax:
    top = jnp.max(scores_BGPQU, axis=-1, keepdims=True)
    weight = jnp.exp(scores_BGPQU - top)
    return _Softmax(top, jnp.sum(weight, axis=-1, keepdims=True), _weigh(weight, v_BGUA))


def _extend(seen: _Softmax, scores_BGPQU: jax.Array, v_BGUA: jax.Array) -> _Softmax:
    top = jnp.maximum(seen.top_BGPQ1, jnp.max(scores_BGPQU, axis=-1, keepdims=True))
    weight = jnp.exp(scores_BGPQU - top)
    shrink = jnp.exp(seen.top_BGPQ1 - top)
    total = seen.total_BGPQ1 * shrink + jnp.sum(weight, axis=-1, keepdims=True)
    return _Softmax(top, total, seen.out_BGPQA * shrink + _weigh(weight, v_BGUA))


def _causal_mask(scores_BGPQU: jax.Array) -> jax.Array:
    """Hide later keys in a block on the diagonal."""
    return jnp.where(jnp.tri(*scores_BGPQU.shape[-2:], dtype=bool)[None, None, None], scores_BGPQU, -jnp.inf)


# Training: forward saves the output and the log-sum-exp, backward computes each block's weights again.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _causal(q_BLHA: jax.Array, k_BLGA: jax.Array, v_BLGA: jax.Array, block: int) -> jax.Array:
    return _causal_forward(q_BLHA, k_BLGA, v_BLGA, block)[0]


def _blocks(q_BLHA: jax.Array, k_BLGA: jax.Array, v_BLGA: jax.Array, block: int) -> tuple[jax.Array, ...]:
    kv_heads = k_BLGA.shape[2]
    q_CBGPQA = _split(_group(q_BLHA, kv_heads), block)
    return q_CBGPQA, _split(jnp.swapaxes(k_BLGA, 1, 2), block), _split(jnp.swapaxes(v_BLGA, 1, 2), block)


def _causal_forward(q_BLHA: jax.Array, k_BLGA: jax.Array, v_BLGA: jax.Array, block: int) -> tuple:
    # Keys behind the end are zeros, and the causal mask hides them from every real query.
    q_CBGPQA, k_CBGUA, v_CBGUA = _blocks(q_BLHA, k_BLGA, v_BLGA, block)

    def attend(i: jax.Array, q_BGPQA: jax.Array) -> tuple[jax.Array, jax.Array]:
        diagonal = _begin(_causal_mask(_scores(q_BGPQA, k_CBGUA[i])), v_CBGUA[i])
        seen = jax.lax.fori_loop(
            0, i, lambda j, seen: _extend(seen, _scores(q_BGPQA, k_CBGUA[j]), v_CBGUA[j]), diagonal
        )
        return seen.result(q_BLHA.dtype)

    if q_CBGPQA.shape[0] == 1:
        o, lse = _begin(_causal_mask(_scores(q_CBGPQA[0], k_CBGUA[0])), v_CBGUA[0]).result(q_BLHA.dtype)
        o_CBGPQA, lse_CBGPQ1 = o[None], lse[None]
    else:
        index_C = jnp.arange(q_CBGPQA.shape[0], dtype=jnp.int32)
        o_CBGPQA, lse_CBGPQ1 = jax.lax.map(lambda x: attend(*x), (index_C, q_CBGPQA))
    o_BLHA = _ungroup(_join(o_CBGPQA, q_BLHA.shape[1]))
    return o_BLHA, (q_BLHA, k_BLGA, v_BLGA, o_BLHA, lse_CBGPQ1)


def _block_grads(
    q: jax.Array, do: jax.Array, lse: jax.Array, delta: jax.Array, k: jax.Array, v: jax.Array, mask: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dq, dk, dv) of one block of queries and one of keys, accumulated in lse's dtype."""
    scores = _scores(q, k)
    weight = jnp.exp((_causal_mask(scores) if mask else scores) - lse)
    d_weight = jnp.einsum("BGPQA,BGUA->BGPQU", do, v, preferred_element_type=lse.dtype)
    d_scores = (weight * (d_weight - delta) * (1.0 / math.sqrt(q.shape[-1]))).astype(q.dtype)
    weight = weight.astype(do.dtype)
    dv = jnp.einsum("BGPQU,BGPQA->BGUA", weight, do, preferred_element_type=lse.dtype)
    dk = jnp.einsum("BGPQU,BGPQA->BGUA", d_scores, q, preferred_element_type=lse.dtype)
    dq = jnp.einsum("BGPQU,BGUA->BGPQA", d_scores, k, preferred_element_type=lse.dtype)
    return dq, dk, dv


def _causal_backward(block: int, saved: tuple, do_BLHA: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BLHA, k_BLGA, v_BLGA, o_BLHA, lse_CBGPQ1 = saved
    q_CBGPQA, k_CBGUA, v_CBGUA = _blocks(q_BLHA, k_BLGA, v_BLGA, block)
    length, kv_heads, dtype = q_BLHA.shape[1], k_BLGA.shape[2], lse_CBGPQ1.dtype
    # do is zero behind the end, and so are the gradients of and through padded queries.
    do_CBGPQA = _split(_group(do_BLHA, kv_heads), block)
    delta_BLH1 = jnp.sum(do_BLHA.astype(dtype) * o_BLHA.astype(dtype), axis=-1, keepdims=True)
    delta_CBGPQ1 = _split(_group(delta_BLH1, kv_heads), block)

    def grads(i: jax.Array, k_BGUA: jax.Array, v_BGUA: jax.Array, mask: bool) -> tuple:
        rows = (q_CBGPQA[i], do_CBGPQA[i], lse_CBGPQ1[i], delta_CBGPQ1[i])
        return _block_grads(*rows, k_BGUA, v_BGUA, mask)

    def of_keys(dq_CBGPQA: jax.Array, x: tuple) -> tuple:
        j, k_BGUA, v_BGUA = x

        def add(i: jax.Array, sums: tuple) -> tuple:
            dq_CBGPQA, dk_BGUA, dv_BGUA = sums
            dq, dk, dv = grads(i, k_BGUA, v_BGUA, mask=False)
            return dq_CBGPQA.at[i].add(dq), dk_BGUA + dk, dv_BGUA + dv

        dq, dk_BGUA, dv_BGUA = grads(j, k_BGUA, v_BGUA, mask=True)
        sums = (dq_CBGPQA.at[j].add(dq), dk_BGUA, dv_BGUA)
        dq_CBGPQA, dk_BGUA, dv_BGUA = jax.lax.fori_loop(j + 1, q_CBGPQA.shape[0], add, sums)
        return dq_CBGPQA, (dk_BGUA.astype(k_BLGA.dtype), dv_BGUA.astype(v_BLGA.dtype))

    if q_CBGPQA.shape[0] == 1:
        dq_CBGPQA, dk_CBGUA, dv_CBGUA = (
            d[None] for d in grads(jnp.int32(0), k_CBGUA[0], v_CBGUA[0], mask=True)
        )
    else:
        index_C = jnp.arange(q_CBGPQA.shape[0], dtype=jnp.int32)
        dq_CBGPQA, (dk_CBGUA, dv_CBGUA) = jax.lax.scan(
            of_keys, jnp.zeros(q_CBGPQA.shape, dtype), (index_C, k_CBGUA, v_CBGUA)
        )
    dq_BLHA = _ungroup(_join(dq_CBGPQA, length)).astype(q_BLHA.dtype)
    dk_BLGA = jnp.swapaxes(_join(dk_CBGUA, length), 1, 2).astype(k_BLGA.dtype)
    dv_BLGA = jnp.swapaxes(_join(dv_CBGUA, length), 1, 2).astype(v_BLGA.dtype)
    return dq_BLHA, dk_BLGA, dv_BLGA


_causal.defvjp(_causal_forward, _causal_backward)


# Inference.


def _attend_cache(
    q_BGPQA: jax.Array, k_BSGA: jax.Array, v_BSGA: jax.Array, first_B: jax.Array, block: int
) -> jax.Array:
    """One block of queries against as many cache blocks as the last of them sees: [B, G, P, Q, A]."""
    queries, cache_length = q_BGPQA.shape[-2], k_BSGA.shape[1]
    block = min(block, cache_length)
    position_BQ = first_B[:, None] + jnp.arange(queries, dtype=jnp.int32)[None, :]

    def scores_and_values(j: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The last block starts early instead of passing the end: no padded copy of the cache is ever made.
        start = jnp.minimum(j * block, cache_length - block)
        k_BUGA, v_BUGA = (
            jax.lax.dynamic_slice_in_dim(x, start, block, axis=1).astype(q_BGPQA.dtype)
            for x in (k_BSGA, v_BSGA)
        )
        key_U = start + jnp.arange(block, dtype=jnp.int32)
        seen_BQU = (key_U >= j * block)[None, None, :] & (key_U[None, None, :] <= position_BQ[:, :, None])
        scores_BGPQU = _scores(q_BGPQA, jnp.swapaxes(k_BUGA, 1, 2))
        return jnp.where(seen_BQU[:, None, None], scores_BGPQU, -jnp.inf), jnp.swapaxes(v_BUGA, 1, 2)

    seen = _begin(*scores_and_values(jnp.int32(0)))  # position 0 is seen by all: no row is without a maximum
    if block < cache_length:
        num_blocks = jnp.minimum(jnp.max(first_B) + queries - 1, cache_length - 1) // block + 1
        seen = jax.lax.fori_loop(1, num_blocks, lambda j, seen: _extend(seen, *scores_and_values(j)), seen)
    return seen.result(q_BGPQA.dtype)[0]
