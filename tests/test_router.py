"""The router and its losses, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moe_jax.config.schema import ModelConfig
from moe_jax.model.losses import balance_loss, z_loss
from moe_jax.model.router import Routing, route


def config(**changes) -> ModelConfig:
    return ModelConfig(num_experts=4, top_k=2, **changes)


# Three tokens and the router's probabilities of four experts. With the router matrix the identity the token
# itself is the logits: the logs of the probabilities plus a shift, which is their logsumexp.
PROBS_TE = np.array([[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.125, 0.25], [0.25, 0.25, 0.25, 0.25]])
SHIFT_T = np.array([0.5, -1.0, 2.0])
X_TD = np.log(PROBS_TE) + SHIFT_T[:, None]


routed = jax.jit(route, static_argnums=2)


def by_hand(**changes) -> Routing:
    return routed(np.eye(4), X_TD, config(**changes))


def test_choices_and_sums_by_hand():
    routing = by_hand()
    # Token 2 finds all experts equal, and takes the two lowest.
    assert routing.expert_ids_TK.tolist() == [[0, 1], [1, 3], [0, 1]]
    assert routing.tokens_per_expert_E.tolist() == [2, 3, 0, 1]
    weights_TK = [[2 / 3, 1 / 3], [2 / 3, 1 / 3], [1 / 2, 1 / 2]]
    np.testing.assert_allclose(routing.weights_TK, weights_TK, rtol=0, atol=1e-12)
    np.testing.assert_allclose(routing.prob_sum_E, [0.875, 1.0, 0.5, 0.625], rtol=0, atol=1e-12)
    np.testing.assert_allclose(routing.z_sum, 0.25 + 1.0 + 4.0, rtol=0, atol=1e-12)
    assert routing.expert_ids_TK.dtype == routing.tokens_per_expert_E.dtype == jnp.int32


def test_weights_that_are_not_renormalised_are_the_probabilities():
    routing = by_hand(renormalize_top_k=False)
    weights_TK = [[0.5, 0.25], [0.5, 0.25], [0.25, 0.25]]
    np.testing.assert_allclose(routing.weights_TK, weights_TK, rtol=0, atol=1e-12)


def test_ties_go_to_the_lowest_experts():
    """Best first, and among equals the lower index: 2 beats all, then 0 and 3 tie."""
    logits_TE = np.array([[1.0, 0.0, 3.0, 1.0], [0.0, 5.0, 5.0, 5.0], [-1.0, -1.0, -1.0, -1.0]])
    routing = routed(np.eye(4), logits_TE, config())
    assert routing.expert_ids_TK.tolist() == [[2, 0], [1, 2], [0, 1]]


def test_every_expert_can_be_chosen():
    """top_k of all experts: each token goes to each expert once, with its probability."""
    cfg = ModelConfig(num_experts=4, top_k=4)
    routing = routed(np.eye(4), X_TD, cfg)
    assert routing.tokens_per_expert_E.tolist() == [3, 3, 3, 3]
    assert routing.expert_ids_TK.tolist() == [[0, 1, 2, 3], [1, 3, 0, 2], [0, 1, 2, 3]]
    np.testing.assert_allclose(routing.weights_TK, -np.sort(-PROBS_TE), rtol=0, atol=1e-12)


def test_huge_logits_do_not_overflow():
    routing = routed(np.eye(4), np.array([[1000.0, 900.0, -1000.0, 0.0]]), config())
    assert routing.expert_ids_TK.tolist() == [[0, 1]]
    np.testing.assert_allclose(routing.weights_TK, [[1.0, 0.0]], rtol=0, atol=1e-12)
    np.testing.assert_allclose(routing.z_sum, 1e6, rtol=1e-12)


def test_bfloat16_activations_are_routed_in_float32():
    """Expert 1's logit is larger by 2^-12, which bfloat16 (8 bits) would round away, leaving a tie."""
    w_DE = jnp.array([[1.0, 1.0 + 2.0**-12, 0.0, 0.0]], jnp.float32)
    routing = routed(w_DE, jnp.ones((1, 1), jnp.bfloat16), config())
    assert routing.expert_ids_TK.tolist() == [[1, 0]]
    assert routing.weights_TK.dtype == routing.prob_sum_E.dtype == routing.z_sum.dtype == jnp.float32


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients_equal_numerical_ones(renormalize):
    """Of what is differentiable: weights, probability sums and z sum; the choice is constant near by."""
    rng = np.random.default_rng(0)

    def differentiable(w_DE, x_TD):
        routing = route(w_DE, x_TD, config(renormalize_top_k=renormalize))
        return routing.weights_TK, routing.prob_sum_E, routing.z_sum

    args = jnp.asarray(rng.standard_normal((5, 4))), jnp.asarray(rng.standard_normal((6, 5)))
    check_grads(jax.jit(differentiable), args, order=1, modes=["rev"], eps=1e-5)


def test_the_balance_loss_has_a_gradient_through_probabilities_only():
    """d loss / d prob_sum_e = E / (k T^2) count_e, and none through the counts, even as floats."""
    counts_E, prob_sum_E = jnp.array([2.0, 3.0, 0.0, 1.0]), jnp.array([0.875, 1.0, 0.5, 0.625])
    d_counts, d_probs = jax.grad(lambda c, p: balance_loss(c, p, 3, 2), argnums=(0, 1))(counts_E, prob_sum_E)
    assert not d_counts.any()
    np.testing.assert_allclose(d_probs, 4 / (2 * 3**2) * counts_E, rtol=0, atol=1e-12)


def test_balance_loss_by_hand():
    """Of the three tokens above: 4 / (2 * 9) * (2 * 0.875 + 3 * 1 + 0 + 0.625) = 43 / 36."""
    routing = by_hand()
    loss = balance_loss(routing.tokens_per_expert_E, routing.prob_sum_E, num_tokens=3, top_k=2)
    assert float(loss) == pytest.approx(43 / 36, abs=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss_is_one_at_balance_and_e_over_k_at_collapse(top_k):
    num_experts, tokens = 8, 16
    # Layer 0 is balanced. In layer 1 all tokens go to the same top_k experts, with equal probability.
    counts_NE, prob_sum_NE = np.zeros((2, num_experts), np.int32), np.zeros((2, num_experts))
    counts_NE[0], prob_sum_NE[0] = top_k * tokens / num_experts, tokens / num_experts
    counts_NE[1, :top_k], prob_sum_NE[1, :top_k] = tokens, tokens / top_k
    loss_N = balance_loss(jnp.asarray(counts_NE), jnp.asarray(prob_sum_NE), tokens, top_k)
    np.testing.assert_allclose(loss_N, [1.0, num_experts / top_k], rtol=0, atol=1e-12)


def test_losses_of_parts_add_up():
    """Counts of all tokens with the probability and z sums of each part; a mean of part means is another
    number, which is why the router reports sums."""
    rng = np.random.default_rng(1)
    w_DE, x_TD = rng.standard_normal((5, 4)), rng.standard_normal((12, 5))
    whole, *parts = (routed(w_DE, part, config()) for part in (x_TD, x_TD[:6], x_TD[6:]))
    counts_E = parts[0].tokens_per_expert_E + parts[1].tokens_per_expert_E
    np.testing.assert_array_equal(counts_E, whole.tokens_per_expert_E)

    def balance(counts_E, routing, num_tokens=12) -> float:
        return float(balance_loss(counts_E, routing.prob_sum_E, num_tokens, 2))

    expected = balance(counts_E, whole)
    assert sum(balance(counts_E, part) for part in parts) == pytest.approx(expected, abs=1e-12)
    mean_of_means = sum(balance(part.tokens_per_expert_E, part, 6) for part in parts) / 2
    assert abs(mean_of_means - expected) > 1e-3
    z = [float(z_loss(part.z_sum, 12)) for part in (whole, *parts)]
    assert z[1] + z[2] == pytest.approx(z[0], abs=1e-12)


def test_z_loss_is_the_mean_square_of_logsumexp():
    logits_TE = np.random.default_rng(2).standard_normal((7, 4))
    routing = routed(np.eye(4), logits_TE, config())
    lse_T = [math.log(sum(math.exp(v) for v in row)) for row in logits_TE]
    assert float(z_loss(routing.z_sum, 7)) == pytest.approx(sum(v * v for v in lse_T) / 7, abs=1e-12)
