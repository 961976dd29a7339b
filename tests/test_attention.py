"""Blockwise attention against the definition, in values, gradients, memory and the places it must work in."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

from moe_jax.ops import attention as attention_ops
from moe_jax.ops.attention import attention, cached_attention, causal_attention


def plain_attention(q_BLHA: Any, k_BSGA: Any, v_BSGA: Any, xp: Any = jnp) -> Any:
    """The definition, with the whole score matrix; the last query is at the last of the S positions."""
    length, cache_length = q_BLHA.shape[1], k_BSGA.shape[1]
    repeats = q_BLHA.shape[2] // k_BSGA.shape[2]
    k_BSHA, v_BSHA = xp.repeat(k_BSGA, repeats, axis=2), xp.repeat(v_BSGA, repeats, axis=2)
    scores_BHLS = xp.einsum("BLHA,BSHA->BHLS", q_BLHA, k_BSHA) / math.sqrt(q_BLHA.shape[-1])
    seen_LS = np.tri(length, cache_length, cache_length - length, dtype=bool)
    scores_BHLS = xp.where(seen_LS[None, None], scores_BHLS, -np.inf)
    weight_BHLS = xp.exp(scores_BHLS - scores_BHLS.max(axis=-1, keepdims=True))
    weight_BHLS = weight_BHLS / weight_BHLS.sum(axis=-1, keepdims=True)
    return xp.einsum("BHLS,BSHA->BLHA", weight_BHLS, v_BSHA)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def qkv(
    length: int, heads: int = 4, kv_heads: int = 2, batch: int = 2, width: int = 8
) -> tuple[np.ndarray, ...]:
    kv_shape = (batch, length, kv_heads, width)
    return normal(1, batch, length, heads, width), 2.0 * normal(2, *kv_shape), normal(3, *kv_shape)


def with_grads(f: Callable) -> Callable:
    """(q, k, v, do) -> output and the gradients of sum(output * do)."""

    def run(q: Any, k: Any, v: Any, do: Any) -> tuple:
        o, back = jax.vjp(f, q, k, v)
        return (o, *back(do))

    return jax.jit(run)


def temp_bytes(f: Callable, *args: Any) -> int:
    analysis = jax.jit(f).lower(*args).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    """Largest difference over largest value (over 1 where all are smaller) of each array of two trees."""
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        g, e = np.asarray(g, np.float64), np.asarray(e, np.float64)
        assert g.shape == e.shape
        assert np.abs(g - e).max() <= tolerance * max(1.0, np.abs(e).max())


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 511, 513, 1000])
def test_values_and_gradients_equal_the_definition_at_any_length(length: int) -> None:
    args = (*qkv(length), normal(4, 2, length, 4, 8))
    blockwise = with_grads(lambda q, k, v: causal_attention(q, k, v, block=64))(*args)
    assert_close(blockwise, with_grads(plain_attention)(*args), 1e-12)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 3), (6, 1)])
def test_every_grouping_of_heads(heads: int, kv_heads: int) -> None:
    args = (*qkv(50, heads, kv_heads), normal(4, 2, 50, heads, 8))
    blockwise = with_grads(lambda q, k, v: causal_attention(q, k, v, block=16))(*args)
    assert_close(blockwise, with_grads(plain_attention)(*args), 1e-12)


@pytest.mark.parametrize("length", [3, 7])
def test_gradients_equal_numerical_ones(length: int) -> None:
    f = jax.jit(lambda q, k, v: causal_attention(q, k, v, block=3))
    check_grads(f, qkv(length), order=1, modes=["rev"])


def test_scores_far_apart_do_not_overflow() -> None:
    q, k, v = qkv(40)
    args = (300.0 * q, k, v, normal(4, 2, 40, 4, 8))
    blockwise = with_grads(lambda q, k, v: causal_attention(q, k, v, block=16))(*args)
    assert_close(blockwise, with_grads(plain_attention)(*args), 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 3e-2)])
def test_narrow_dtypes_keep_their_dtype_and_accumulate_in_float32(dtype: str, tolerance: float) -> None:
    args = tuple(jnp.asarray(x, dtype) for x in (*qkv(200), normal(4, 2, 200, 4, 8)))
    got = with_grads(lambda q, k, v: causal_attention(q, k, v, block=64))(*args)
    assert {str(x.dtype) for x in got} == {dtype}
    wide = [np.asarray(x, np.float64) for x in args]
    assert_close(got, with_grads(plain_attention)(*wide), tolerance)
    f = with_grads(lambda q, k, v: causal_attention(q, k, v, block=64))
    assert not re.search(r"f64\[\d", str(jax.make_jaxpr(f)(*args)))  # scalar constants may be


def test_ten_thousand_tokens_need_no_square_buffer() -> None:
    x = jax.ShapeDtypeStruct((1, 10_000, 8, 64), jnp.float32)  # 20 MB; one head's scores would be 400 MB
    assert temp_bytes(causal_attention, x, x, x) < 150e6
    assert temp_bytes(with_grads(causal_attention), x, x, x, x) < 250e6
    assert temp_bytes(cached_attention, x, x, x, jnp.int32(0)) < 150e6


def test_under_shard_map_scan_and_checkpoint() -> None:
    """Heads and sequences over 16 devices, two layers scanned, each recomputed: the same as plain code."""
    q, k, v = qkv(37, heads=8, kv_heads=4, batch=4)

    def two_layers(f: Callable) -> Callable:
        def loss(q: Any, k: Any, v: Any) -> jax.Array:
            layer = jax.checkpoint(lambda x, _: (x + f(x, k, v), None))
            return jax.lax.scan(layer, q, None, length=2)[0]

        return loss

    mesh = Mesh(np.array(jax.devices()).reshape(4, 4), ("data", "tensor"))
    spec = PartitionSpec("data", None, "tensor", None)
    sharded = jax.shard_map(
        with_grads(two_layers(lambda *x: causal_attention(*x, block=16))),
        mesh=mesh,
        in_specs=(spec,) * 4,
        out_specs=(spec,) * 4,
        check_vma=False,
    )
    args = (q, k, v, normal(4, *q.shape))
    assert_close(jax.jit(sharded)(*args), with_grads(two_layers(plain_attention))(*args), 1e-12)


@pytest.mark.parametrize(
    ("length", "cache_length"), [(1, 20), (1, 200), (5, 200), (70, 200), (70, 70), (150, 199)]
)
def test_a_cache_gives_what_the_whole_sequence_gives(length: int, cache_length: int) -> None:
    """Every sequence at a position of its own; what lies behind it in the cache is noise without effect."""
    q = normal(1, 4, length, 4, 8)
    k, v = normal(2, 4, cache_length, 2, 8), normal(3, 4, cache_length, 2, 8)
    spare = cache_length - length
    first = [0, spare // 3, spare // 2, spare]
    attend = jax.jit(lambda *x: cached_attention(*x, block=64))
    for noise in (1.0, 1e30):
        for b, position in enumerate(first):
            k[b, position + length :] *= noise
            v[b, position + length :] *= noise
        got = attend(q, k, v, np.array(first, np.int32))
        for b, position in enumerate(first):
            seen = slice(0, position + length)
            expected = plain_attention(q[b : b + 1], k[b : b + 1, seen], v[b : b + 1, seen], xp=np)
            assert_close(got[b : b + 1], expected, 1e-12)


def test_prefill_and_steps_equal_one_pass() -> None:
    q, k, v = (jnp.asarray(x) for x in qkv(90))
    whole = jax.jit(lambda *x: causal_attention(*x, block=32))(q, k, v)
    step = jax.jit(lambda q, first: cached_attention(q, k, v, first, block=32))
    pieces = [step(q[:, :70], jnp.int32(0))] + [step(q[:, i : i + 1], jnp.int32(i)) for i in range(70, 90)]
    assert_close(jnp.concatenate(pieces, axis=1), whole, 1e-12)


def test_blocks_behind_the_queries_are_not_read() -> None:
    q, k, v = qkv(256)
    k[:, 128:], v[:, 128:] = np.nan, np.nan
    expected = plain_attention(q[:, 90:128], k[:, :128], v[:, :128], xp=np)
    got = jax.jit(lambda q, k, v: cached_attention(q, k, v, 90, block=64))(q[:, 90:128], k, v)
    assert_close(got, expected, 1e-12)


def test_a_narrower_cache_is_read_in_the_queries_dtype() -> None:
    q, k, v = (jnp.asarray(x, jnp.float32) for x in qkv(20))
    k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    got = jax.jit(lambda q, k, v: cached_attention(q, k, v, 0, block=8))(q, k, v)
    assert got.dtype == jnp.float32
    assert_close(got, plain_attention(*(np.asarray(x, np.float64) for x in (q, k, v)), xp=np), 3e-6)


def test_cudnn_is_asked_for_the_same_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: the call that would reach cuDNN is answered by its plain implementation."""
    asked = []
    plain = jax.nn.dot_product_attention

    def answer(*args: jax.Array, implementation: str, **options: Any) -> jax.Array:
        asked.append(implementation)
        with jax.numpy_dtype_promotion("standard"):
            return plain(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    args = tuple(jnp.asarray(x, jnp.bfloat16) for x in qkv(30))
    blockwise = attention(*args, implementation="blockwise", block=16)
    assert asked == []
    assert_close(attention(*args, implementation="cudnn"), blockwise, 2e-2)
    assert asked == ["cudnn"]


def test_auto_takes_cudnn_on_an_nvidia_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **options: asked.append(options) or a[0])
    args = tuple(jnp.asarray(x, jnp.bfloat16) for x in qkv(6))
    attention(*args)
    assert asked == []

    class Gpu:
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
    attention(*args)
    assert len(asked) == 1
    attention(*(x.astype(jnp.float32) for x in args))  # cuDNN has no float32 kernel
    Gpu.device_kind = "AMD Instinct MI300X"
    attention(*args)
    assert len(asked) == 1


def test_what_cannot_be_computed_is_refused() -> None:
    q, k, v = (jnp.asarray(x) for x in qkv(6))
    with pytest.raises(ValueError, match="'cudnn' got heads of width 8 in float64"):
        attention(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match="'flash' is not known; use 'auto', 'blockwise' or 'cudnn'"):
        attention(q, k, v, implementation="flash")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="6 queries but 5 keys"):
        causal_attention(q, k[:, :5], v[:, :5])
    for bad_k, bad_v in ((k[:1], v[:1]), (k, v[:, :5]), (k[..., :4], v[..., :4]), (q[:, :, :3], q[:, :, :3])):
        with pytest.raises(ValueError, match="number of heads that divides"):
            causal_attention(q, bad_k, bad_v)
        with pytest.raises(ValueError, match="number of heads that divides"):
            attention_ops.cached_attention(q, bad_k, bad_v, 0)
