"""The oracle itself: its gradients, its equations on cases worked out by hand, and the forced routings."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import (
    activation,
    balanced_ids,
    force_routing,
    oracle_expert_ids,
    oracle_grads,
    oracle_logits,
    oracle_loss,
    random_params,
    rms,
    rotate,
)

from moe_jax.config.schema import ModelConfig

CFG = ModelConfig(
    num_layers=4,
    d_model=16,
    num_heads=8,
    num_experts=16,
    expert_hidden=8,
    vocab_size=37,
    balance_loss_weight=0.3,
    z_loss_weight=0.05,
)
SMALL = dataclasses.replace(CFG, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=4)


def token_ids(cfg: ModelConfig, seed: int, batch: int = 16, length: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, length), dtype=np.int32)


def at(tree: Any, path: tuple[Any, ...]) -> np.ndarray:
    for key in path:
        tree = tree[key.key]
    return tree


@pytest.mark.parametrize(
    "cfg",
    [
        SMALL,
        dataclasses.replace(SMALL, expert_type="gated", activation="silu", num_shared_experts=2, head_dim=6),
        dataclasses.replace(SMALL, activation="relu", tie_embeddings=True, top_k=3, renormalize_top_k=False),
    ],
    ids=["mlp", "gated_shared", "tied_relu"],
)
def test_gradients_equal_central_differences(cfg: ModelConfig) -> None:
    params = random_params(cfg, seed=1)
    ids, targets = token_ids(cfg, 2, batch=2), token_ids(cfg, 3, batch=2)
    grads = oracle_grads(params, ids, targets, cfg)
    rng = np.random.default_rng(4)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert len(leaves) == len(jax.tree.leaves(grads))
    for path, _ in leaves:
        # the steepest of a few entries, so that no leaf is judged by an entry whose gradient is zero
        grad = np.asarray(at(grads, path))
        flat = max(rng.integers(0, grad.size, 20), key=lambda i: abs(grad.flat[i]))
        losses = []
        for sign in (1, -1):
            moved = jax.tree.map(np.copy, params)
            at(moved, path).flat[flat] += sign * 1e-5
            losses.append(float(oracle_loss(moved, ids, targets, cfg)[0]))
        numeric = (losses[0] - losses[1]) / 2e-5
        assert abs(numeric) > 1e-6, path
        np.testing.assert_allclose(grad.flat[flat], numeric, rtol=2e-5, err_msg=str(path))


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    ids, targets = token_ids(CFG, 2), token_ids(CFG, 3)
    params = random_params(CFG, seed=1)
    loss, parts = oracle_loss(params, ids, targets, CFG)
    logits = np.asarray(oracle_logits(params, ids, CFG))
    log_prob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    cross_entropy = -np.take_along_axis(log_prob, targets[:, :, None], axis=-1).mean()
    np.testing.assert_allclose(parts["cross_entropy"], cross_entropy, rtol=1e-12)
    expected = cross_entropy + 0.3 * parts["balance_loss"] + 0.05 * parts["z_loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_counts_equal_the_chosen_experts() -> None:
    ids = token_ids(CFG, 2)
    params = random_params(CFG, seed=1)
    chosen_NBLK = oracle_expert_ids(params, ids, CFG)
    assert chosen_NBLK.shape == (4, 16, 8, 2)
    assert (chosen_NBLK[..., 0] != chosen_NBLK[..., 1]).all()
    counts = oracle_loss(params, ids, ids, CFG)[1]["tokens_per_expert_NE"]
    np.testing.assert_array_equal(counts, [np.bincount(c.ravel(), minlength=16) for c in chosen_NBLK])
    assert len(np.unique(chosen_NBLK)) == 16  # random weights use every expert


def test_a_blind_router_chooses_the_lowest_experts_and_is_balanced_in_probability() -> None:
    params = random_params(CFG, seed=1)
    params["blocks"]["router"]["w"][...] = 0.0
    ids = token_ids(CFG, 2)
    assert (oracle_expert_ids(params, ids, CFG) == np.array([0, 1])).all()
    parts = oracle_loss(params, ids, ids, CFG)[1]
    # equal probabilities: sum_e C_e P_e = (K T) (T / E) whatever the counts are
    np.testing.assert_allclose(parts["balance_loss"], 1.0, rtol=1e-12)
    np.testing.assert_allclose(parts["z_loss"], np.log(16) ** 2, rtol=1e-12)


def test_logits_are_causal() -> None:
    params = random_params(CFG, seed=1)
    ids = token_ids(CFG, 2)
    changed = ids.copy()
    changed[:, 5] = (changed[:, 5] + 1) % CFG.vocab_size
    before, after = (np.asarray(oracle_logits(params, i, CFG)) for i in (ids, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after).max(axis=-1)[:, 5:] > 1e-3).all()


def test_rotary_turns_each_pair_by_its_own_angle() -> None:
    unit_LA = np.zeros((3, 6))
    unit_LA[:, 1] = 1.0
    turned_LA = np.asarray(rotate(jnp.asarray(unit_LA), theta=8.0))  # pair 1 of 3: angle position * 8^(-2/6)
    angle_L = np.arange(3) * 0.5
    expected_LA = np.zeros((3, 6))
    expected_LA[:, 1], expected_LA[:, 4] = np.cos(angle_L), np.sin(angle_L)
    np.testing.assert_allclose(turned_LA, expected_LA, atol=1e-15)


def test_rms_and_activations_have_known_values() -> None:
    cfg = dataclasses.replace(CFG, d_model=2, norm_eps=0.5)
    got = rms(jnp.array([[3.0, 4.0]]), jnp.array([1.0, 2.0]), cfg)
    np.testing.assert_allclose(got, [[3 / 13**0.5, 8 / 13**0.5]], rtol=1e-14)
    for name, value in (("gelu", 0.8411919906), ("silu", 0.7310585786), ("relu", 1.0)):
        np.testing.assert_allclose(activation(jnp.array(1.0), name), value, rtol=1e-9)
    for name, value in (("gelu", -0.1588080094), ("silu", -0.2689414214), ("relu", 0.0)):
        np.testing.assert_allclose(activation(jnp.array(-1.0), name), value, rtol=1e-9)


def test_query_heads_share_key_value_heads_in_order() -> None:
    params = random_params(SMALL, seed=1)
    params["blocks"]["attention"]["w_v"][:, :, 1] = 0.0  # kv head 1 of 2 carries nothing: query heads 2 and 3
    ids = token_ids(SMALL, 2, batch=2)
    base = np.asarray(oracle_logits(params, ids, SMALL))
    changed_by_head = []
    for head in range(4):
        moved = jax.tree.map(np.copy, params)
        moved["blocks"]["attention"]["w_o"][:, head] *= 2.0
        changed_by_head.append(bool(np.abs(np.asarray(oracle_logits(moved, ids, SMALL)) - base).max() > 1e-3))
    assert changed_by_head == [True, True, False, False]


@pytest.mark.parametrize("expert", [0, 9])
@pytest.mark.parametrize("kind", ["one_expert", "same_experts", "empty_expert"])
def test_forced_routing_holds_on_random_ids(kind: str, expert: int) -> None:
    params = force_routing(random_params(CFG, seed=1), CFG, kind, expert)
    for seed in range(3):
        chosen_NBLK = oracle_expert_ids(params, token_ids(CFG, seed), CFG)
        if kind == "one_expert":
            assert (chosen_NBLK[..., 0] == expert).all()
            assert len(np.unique(chosen_NBLK[..., 1])) == 15  # the second choices go everywhere else
        elif kind == "same_experts":
            assert (np.sort(chosen_NBLK, axis=-1) == [expert, expert + 1]).all()
        else:
            assert (chosen_NBLK != expert).all()
            assert all(len(np.unique(layer)) == 15 for layer in chosen_NBLK)


def test_balanced_routing_loads_every_expert_equally() -> None:
    params = force_routing(random_params(CFG, seed=1), CFG, "balanced")
    ids = balanced_ids(CFG, batch_size=16, seq_len=8)
    parts = oracle_loss(params, ids, ids, CFG)[1]
    np.testing.assert_array_equal(parts["tokens_per_expert_NE"], np.full((4, 16), 2 * 128 // 16))
    first_NBL = oracle_expert_ids(params, ids, CFG)[..., 0]
    np.testing.assert_array_equal(first_NBL, (ids[None] + np.arange(4)[:, None, None]) % 16)


@pytest.mark.parametrize("kind", ["balanced", "one_expert", "same_experts", "empty_expert"])
def test_forced_routing_keeps_every_gradient_alive(kind: str) -> None:
    params = force_routing(random_params(CFG, seed=1), CFG, kind)
    grads = oracle_grads(params, token_ids(CFG, 2), token_ids(CFG, 3), CFG)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(grad).max() > 1e-4, path
