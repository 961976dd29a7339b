"""The model's parts by themselves, and the properties that join them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.config.schema import DeploymentConfig, ModelConfig
from moe_jax.deployments import create, program
from moe_jax.deployments.program import Program
from moe_jax.model.attention import attention, rotate
from moe_jax.model.block import Seams
from moe_jax.model.cache import Cache
from moe_jax.model.dispatch import local_exchange
from moe_jax.model.embed import embed
from moe_jax.model.logits import SoftmaxParts, cross_entropy, logits, softmax_parts
from moe_jax.model.moe import moe
from moe_jax.model.norm import rms_norm
from moe_jax.model.transformer import Transformer, cast_for_compute, run_blocks, run_blocks_cached
from moe_jax.parallel.mesh import Axes, make_mesh

CFG = ModelConfig(
    num_layers=3, d_model=12, num_heads=4, num_kv_heads=2, head_dim=6, num_experts=4, expert_hidden=8,
    expert_type="gated", activation="silu", num_shared_experts=1, vocab_size=20, remat="none",
    param_dtype="float64", compute_dtype="float64",
)  # fmt: skip
PARAMS = oracle.random_params(CFG, seed=3)
LAYER = jax.tree.map(lambda leaf: np.asarray(leaf)[0], PARAMS["blocks"])


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


close = partial(np.testing.assert_allclose, rtol=0, atol=1e-12)


# ---- norm ------------------------------------------------------------------------------------------------


def test_rms_norm_equals_its_definition():
    scale_D, x_BLD = normal(1, 5), 3.0 * normal(2, 2, 3, 5)
    expected = [[v / np.sqrt((v @ v) / 5 + 0.1) * scale_D for v in sequence] for sequence in x_BLD]
    close(jax.jit(rms_norm)(scale_D, x_BLD, 0.1), expected)


def test_rms_norm_of_bfloat16_rounds_once():
    """Each value is the exact one rounded to bfloat16, which no chain of bfloat16 operations gives."""
    x_BLD, scale_D = normal(1, 2, 3, 64).astype(jnp.bfloat16), normal(2, 64).astype(np.float32)
    wide_BLD = x_BLD.astype(np.float64)
    exact_BLD = (
        wide_BLD / np.sqrt(np.mean(wide_BLD**2, -1, keepdims=True) + 1e-6) * scale_D.astype(np.float64)
    )
    got_BLD = jax.jit(rms_norm)(scale_D, x_BLD, 1e-6)
    assert got_BLD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got_BLD, exact_BLD.astype(jnp.bfloat16))


# ---- rotary and attention --------------------------------------------------------------------------------


def test_rotary_turns_pairs_by_hand():
    """A = 4, theta 100: at position 3 dims 0 and 2 turn by 3, dims 1 and 3 by 3 / 10."""
    x_BLHA = np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    got = jax.jit(rotate)(x_BLHA, np.array([3], np.int32), 100.0).reshape(-1)
    first, second = (1 + 3j) * np.exp(3j), (2 + 4j) * np.exp(0.3j)
    close(got, [first.real, second.real, first.imag, second.imag])


def test_rotated_products_depend_on_the_distance_only():
    q_BLHA, k_BLHA = (np.repeat(normal(seed, 1, 1, 1, 6), 40, axis=1) for seed in (1, 2))
    turn, positions_L = jax.jit(rotate), np.arange(40, dtype=np.int32)
    q_LA, k_LA = (np.asarray(turn(x, positions_L, 10000.0))[0, :, 0] for x in (q_BLHA, k_BLHA))
    scores_LL = q_LA @ k_LA.T
    for distance in range(-39, 40):
        close(np.ptp(np.diagonal(scores_LL, distance)), 0.0)
    assert np.ptp(scores_LL[0]) > 0.1  # and on nothing less
    close(np.linalg.norm(q_LA, axis=1), np.linalg.norm(q_BLHA[0, 0]))


def attend(params, x_BLD) -> jax.Array:
    return jax.jit(lambda params, x: attention(params, x, CFG)[0])(params, x_BLD)


def test_attention_does_not_see_later_positions():
    x_BLD = normal(1, 2, 7, 12)
    before = attend(LAYER["attention"], x_BLD)
    changed = x_BLD.copy()
    changed[1, 4] += 1.0
    difference_BL = np.abs(attend(LAYER["attention"], changed) - before).max(-1)
    assert not difference_BL[0].any()  # nor other sequences
    assert not difference_BL[1, :4].any()
    assert (difference_BL[1, 4:] > 1e-6).all()


def test_parts_of_the_heads_add_up():
    """Two parts, each a key/value head with its two query heads: what a tensor axis of 2 holds."""
    w, x_BLD = LAYER["attention"], normal(2, 2, 7, 12)
    parts = [
        {"w_q": w["w_q"][:, 2 * i : 2 * i + 2], "w_k": w["w_k"][:, i : i + 1], "w_v": w["w_v"][:, i : i + 1],
         "w_o": w["w_o"][2 * i : 2 * i + 2]}
        for i in range(2)
    ]  # fmt: skip
    close(sum(attend(part, x_BLD) for part in parts), attend(w, x_BLD))


# ---- mixture of experts ----------------------------------------------------------------------------------


def test_parts_of_the_hidden_width_add_up():
    """Routed and shared experts cut in half along their hidden width; the router is whole in both."""
    x_BLD = normal(3, 2, 5, 12)
    layer = jax.jit(lambda params, x: moe(params, x, CFG, local_exchange)[0])
    whole = {name: LAYER[name] for name in ("router", "experts", "shared")}
    halves = []
    for half in (slice(None, 4), slice(4, None)):
        cut = {
            name: {"w_up": w["w_up"][..., half], "w_gate": w["w_gate"][..., half],
                   "w_down": w["w_down"][..., half, :]}
            for name, w in whole.items() if name != "router"
        }  # fmt: skip
        halves.append(layer({**cut, "router": whole["router"]}, x_BLD))
    close(halves[0] + halves[1], layer(whole, x_BLD))


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("expert_type", ["mlp", "gated"])
def test_moe_equals_every_token_through_its_experts(expert_type, activation):
    cfg = replace(CFG, expert_type=expert_type, activation=activation)
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[0], oracle.random_params(cfg, seed=4)["blocks"])
    x_BLD = normal(4, 2, 5, 12)
    got, stats = jax.jit(lambda params, x: moe(params, x, cfg, local_exchange))(params, x_BLD)

    def act(v):
        if activation == "relu":
            return np.maximum(v, 0)
        if activation == "silu":
            return v / (1 + np.exp(-v))
        return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))

    def mlp(w, x):
        hidden = act(x @ w["w_gate"]) * (x @ w["w_up"]) if expert_type == "gated" else act(x @ w["w_up"])
        return hidden @ w["w_down"]

    expected, counts_E = [], np.zeros(4, int)
    for x in x_BLD.reshape(-1, 12):
        p = np.exp(x @ params["router"]["w"])
        p /= p.sum()
        chosen = np.argsort(-p, kind="stable")[:2]
        counts_E[chosen] += 1
        routed = sum(
            p[e] / p[chosen].sum() * mlp({name: w[e] for name, w in params["experts"].items()}, x)
            for e in chosen
        )
        expected.append(routed + mlp(params["shared"], x))
    close(got.reshape(-1, 12), expected)
    assert stats.tokens_per_expert_E.tolist() == counts_E.tolist()
    assert stats.rounds == 1


# ---- embedding, logits, cross-entropy --------------------------------------------------------------------


def test_parts_of_the_table_add_up_to_the_look_up():
    table_VD, ids_BL = normal(1, 12, 3), np.array([[0, 3, 4, 11], [7, 8, 5, 3]], np.int32)
    look_up = jax.jit(embed)
    np.testing.assert_array_equal(look_up(table_VD, ids_BL), table_VD[ids_BL])
    parts = [look_up(table_VD[first : first + 4], ids_BL, np.int32(first)) for first in (0, 4, 8)]
    np.testing.assert_array_equal(sum(parts), table_VD[ids_BL])
    # An id lies in one part and is zero in the others.
    assert [np.flatnonzero(np.asarray(part)[0].any(-1)).tolist() for part in parts] == [[0, 1], [2], [3]]


def test_embedding_gradient_adds_up_repeated_ids():
    ids_BL, d_BLD = np.array([[2, 0, 2], [2, 5, 0]], np.int32), normal(2, 2, 3, 4)
    got = jax.jit(lambda table, d: jax.vjp(lambda t: embed(t, jnp.asarray(ids_BL)), table)[1](d)[0])(
        normal(1, 6, 4), d_BLD
    )
    expected = np.zeros((6, 4))
    for place in np.ndindex(2, 3):
        expected[ids_BL[place]] += d_BLD[place]
    close(got, expected)


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_parts_of_the_vocabulary_add_up_to_log_softmax(num_parts):
    logits_TV = (
        5.0 * normal(1, 6, 20) + 300.0
    )  # exp(300) is past float64's largest square root: a shift is due
    targets_T = jnp.array([0, 3, 4, 9, 15, 19], jnp.int32)
    width = 20 // num_parts

    @jax.jit
    def both(logits_TV, d_T):
        def ours(logits_TV):
            shift_T = jax.lax.stop_gradient(logits_TV.max(axis=1))
            slices = [slice(first, first + width) for first in range(0, 20, width)]
            parts = [softmax_parts(logits_TV[:, s], targets_T, s.start, shift_T) for s in slices]
            sums = jax.tree.map(lambda *values: sum(values), *[part[1:] for part in parts])
            return cross_entropy(SoftmaxParts(shift_T, *sums))

        def plain(logits_TV):
            return -jax.nn.log_softmax(logits_TV)[np.arange(6), targets_T]

        return [(value, back(d_T)) for value, back in (jax.vjp(f, logits_TV) for f in (ours, plain))]

    ours, plain = both(logits_TV, normal(2, 6))
    close(ours[0], plain[0])
    close(ours[1], plain[1])
    close(ours[0], [np.log(np.exp(v - v[t]).sum()) for v, t in zip(logits_TV, targets_T, strict=True)])


def test_bfloat16_logits_are_float32():
    """A sum of 300 products of 1: bfloat16 would round the odd 301 to 300 or 302."""
    x_TD = np.ones((1, 301), jnp.bfloat16)
    got = jax.jit(logits)(np.ones((301, 1), jnp.bfloat16), x_TD)
    assert got.dtype == jnp.float32
    assert got.tolist() == [[301.0]]


@pytest.mark.parametrize("chunk", [1, 7, 16, 4096])
def test_loss_in_chunks_equals_the_loss_at_once(monkeypatch, chunk):
    """16 tokens, a vocabulary of 20 split over two devices; 7 does not divide: the last chunk is padded."""
    monkeypatch.setattr(program, "LOSS_CHUNK_TOKENS", chunk)
    axes = Axes(make_mesh({"pipe": 1, "data": 1, "expert": 1, "tensor": 2}))
    steps = Program(CFG, DeploymentConfig(tensor=2), axes)

    def share_and_gradients(w_DV, scale_D, x_TD, targets_T):
        def share(w_DV, scale_D, x_TD):
            params = {"final_norm": {"scale": scale_D}, "head": {"w": w_DV}}
            return steps._nll_sum(params, x_TD, targets_T) / 2  # both devices hold the same sum

        loss, (dw_DV, *rest) = jax.value_and_grad(share, argnums=(0, 1, 2))(w_DV, scale_D, x_TD)
        return *axes.sum((loss, *rest), "tensor"), dw_DV

    def at_once(w_DV, scale_D, x_TD):
        normed_TD = x_TD / jnp.sqrt(jnp.mean(x_TD**2, axis=1, keepdims=True) + CFG.norm_eps) * scale_D[None]
        return -jnp.sum(jax.nn.log_softmax(normed_TD @ w_DV)[np.arange(16), targets_T])

    split = PartitionSpec(None, "tensor")
    chunked = jax.shard_map(
        share_and_gradients, mesh=make_mesh(axes.sizes), check_vma=False,
        in_specs=(split, PartitionSpec(), PartitionSpec(), PartitionSpec()),
        out_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(), split),
    )  # fmt: skip
    targets_T = np.random.default_rng(0).integers(0, 20, 16).astype(np.int32)
    args = normal(1, 12, 20), normal(2, 12), normal(3, 16, 12)
    loss, d_scale_D, dx_TD, dw_DV = jax.jit(chunked)(*args, targets_T)
    expected, grads = jax.jit(jax.value_and_grad(at_once, argnums=(0, 1, 2)))(*args)
    for got, want in zip((loss, dw_DV, d_scale_D, dx_TD), (expected, *grads), strict=True):
        close(got, want)


# ---- the stack of blocks ---------------------------------------------------------------------------------


def run_stack(blocks, x_BLD, cfg=CFG):
    return run_blocks(blocks, x_BLD, cfg, Seams())[0]


@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 3, 1]])
def test_cached_run_equals_the_full_run(steps):
    """Prompt and continuation in any steps: each gives the same outputs as one run over all positions."""
    x_BLD = normal(5, 2, 9, 12)
    shape = (3, 2, 12, 2, 6)  # N, B, S, G, A: three positions more than are used
    cache, outputs = Cache(jnp.zeros(shape), jnp.zeros(shape), jnp.int32(0)), []
    step = jax.jit(lambda blocks, x, cache: run_blocks_cached(blocks, x, CFG, Seams(), cache))
    for end, length in zip(np.cumsum(steps).tolist(), steps, strict=True):
        y_BLD, cache = step(PARAMS["blocks"], x_BLD[:, end - length : end], cache)
        assert int(cache.length) == end
        outputs.append(y_BLD)
    close(np.concatenate(outputs, axis=1), jax.jit(run_stack)(PARAMS["blocks"], x_BLD))
    assert not np.asarray(cache.k_NBSGA)[:, :, 9:].any()


def test_remat_changes_memory_and_not_the_gradients():
    cfg = replace(CFG, num_heads=2, expert_hidden=40, expert_type="mlp", num_shared_experts=0)
    blocks = oracle.random_params(cfg, seed=5)["blocks"]
    x_BLD, grads, memory_bytes = normal(6, 4, 64, 12), {}, {}
    for remat in ("none", "dots", "block"):
        run_with = partial(run_stack, cfg=replace(cfg, remat=remat))
        gradient = jax.grad(lambda blocks, x, run=run_with: jnp.sum(jnp.sin(run(blocks, x))))
        compiled = jax.jit(gradient).lower(blocks, x_BLD).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        grads[remat], memory_bytes[remat] = compiled(blocks, x_BLD), analysis.temp_size_in_bytes
    for remat in ("dots", "block"):
        for a, b in zip(jax.tree.leaves(grads[remat]), jax.tree.leaves(grads["none"]), strict=True):
            close(a, b, atol=1e-11)
    assert memory_bytes["block"] < memory_bytes["dots"] < memory_bytes["none"]


# ---- the whole model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_model_called_equals_its_single_deployment(tie_embeddings):
    cfg, ids_BL = replace(CFG, tie_embeddings=tie_embeddings), np.arange(14, dtype=np.int32).reshape(2, 7)
    params = jax.tree.map(jnp.asarray, oracle.random_params(cfg, seed=7))
    model = nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0)))
    nnx.update(model, params)
    got = nnx.jit(lambda model, ids: model(ids))(model, ids_BL)
    assert got.shape == (2, 7, 20)
    assert np.ptp(got) > 0.1
    close(got, create(cfg, DeploymentConfig()).logits(params, ids_BL))


def test_compute_dtype_spares_the_router_and_the_norms():
    cast = cast_for_compute(PARAMS, replace(CFG, compute_dtype="bfloat16"))
    narrow = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(cast)
        if leaf.dtype == jnp.bfloat16
    }
    kept = {"blocks/router/w", "blocks/attention_norm/scale", "blocks/moe_norm/scale", "final_norm/scale"}
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(cast)
    }
    assert names - narrow == kept


def test_embedding_gradient_of_bfloat16_is_added_up_in_float32():
    ids_BL = jnp.zeros((1, 300), jnp.int32)
    table_VD = jnp.zeros((2, 1), jnp.bfloat16)
    d_VD = jax.jit(jax.grad(lambda t: jnp.sum(embed(t, ids_BL).astype(jnp.float32))))(table_VD)
    assert d_VD.astype(jnp.float32).tolist() == [[300.0], [0.0]]
