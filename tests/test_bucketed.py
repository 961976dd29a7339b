"""The bucketed exchange against a simulation of it in numpy, and against every expert on every token."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from moe_jax.ops.grouped_matmul import RowBlocks, grouped_matmul
from moe_jax.parallel.exchange.bucketed import BucketedExchange, default_bucket_rows, max_rounds
from moe_jax.plan.hlo import collectives

T, K, D, F = 10, 2, 3, 4  # tokens of one device, choices, widths


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def apply_experts(w_up_EDF, w_down_EFD, rows: RowBlocks) -> jax.Array:
    """Not zero at zero: what comes back from empty places in a bucket must not count."""
    return grouped_matmul(jnp.cos(grouped_matmul(rows.x_XRD, w_up_EDF, rows)), w_down_EFD, rows)


def exchange(num_devices: int, bucket_rows: int | None):
    """The exchange on a mesh of its axis alone; tokens and experts are split over it."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("expert",))
    exchange = BucketedExchange("expert", num_devices, bucket_rows)

    def f(x_TD, ids_TK, weights_TK, w_up_EDF, w_down_EFD):
        counts_E = jnp.zeros(num_devices * w_up_EDF.shape[0], jnp.int32).at[ids_TK.reshape(-1)].add(1)
        y_TD, rounds = exchange(
            x_TD, ids_TK, weights_TK, counts_E, lambda rows: apply_experts(w_up_EDF, w_down_EFD, rows)
        )
        return y_TD, rounds[None]

    spec = PartitionSpec("expert")
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


@cache
def with_gradients(num_devices: int, bucket_rows: int | None):
    """(x, ids, weights, w_up, w_down, dy) -> y, rounds on each device, and four gradients."""

    @jax.jit
    def run(x_TD, ids_TK, weights_TK, w_up_EDF, w_down_EFD, dy_TD):
        f = exchange(num_devices, bucket_rows)
        y_TD, back, rounds = jax.vjp(
            lambda x, *rest: f(x, ids_TK, *rest), x_TD, weights_TK, w_up_EDF, w_down_EFD, has_aux=True
        )
        return y_TD, rounds, *back(dy_TD)

    return run


@jax.jit
def every_expert_on_every_token(x_TD, ids_TK, weights_TK, w_up_EDF, w_down_EFD, dy_TD):
    """y and the gradients, from a dense product and the weight (or 0) of each expert for each token."""

    def f(x_TD, weights_TK, w_up_EDF, w_down_EFD):
        chosen_TKE = jax.nn.one_hot(ids_TK, w_up_EDF.shape[0], dtype=x_TD.dtype)
        hidden_TEF = jnp.cos(jnp.einsum("TD,EDF->TEF", x_TD, w_up_EDF))
        return jnp.einsum("TKE,TK,TEF,EFD->TD", chosen_TKE, weights_TK, hidden_TEF, w_down_EFD)

    y_TD, back = jax.vjp(f, x_TD, weights_TK, w_up_EDF, w_down_EFD)
    return y_TD, *back(dy_TD)


def simulate(x_TD, ids_TK, weights_TK, w_up_EDF, w_down_EFD, num_devices: int, bucket_rows: int):
    """Letters in boxes: each source holds a queue per expert and posts bucket_rows of it a round."""
    per_device = len(x_TD) // num_devices
    queues = {
        (d, e): [(t, k) for t, k in np.argwhere(ids_TK == e) if t // per_device == d]
        for d in range(num_devices)
        for e in range(len(w_up_EDF))
    }
    y_TD, rounds = np.zeros_like(x_TD), 0
    while rounds == 0 or any(queues.values()):
        rounds += 1
        for (_, e), queue in queues.items():
            posted, queue[:] = queue[:bucket_rows], queue[bucket_rows:]
            for t, k in posted:
                y_TD[t] += weights_TK[t, k] * (np.cos(x_TD[t] @ w_up_EDF[e]) @ w_down_EFD[e])
    return y_TD, rounds


def route(routing: str, num_devices: int, num_experts: int) -> np.ndarray:
    """Two different experts for each token, int32 [num_devices * T, 2]."""
    rng = np.random.default_rng(5)
    scores_TE = rng.standard_normal((num_devices * T, num_experts))
    if routing == "all to expert 2":
        scores_TE[:, 2] = 9.0
    if routing == "none to expert 1":
        scores_TE[:, 1] = -9.0
    if routing == "the last device's to expert 0":  # the others have nothing to send in the further rounds
        scores_TE[:] = np.tile(np.eye(num_experts) * 9.0, (num_devices * T // num_experts + 1, 1))[
            : num_devices * T
        ]
        scores_TE[-T:, 0] = 10.0
    if routing == "the same two":
        scores_TE[:, [1, 3]] = 9.0
    return np.argsort(-scores_TE, axis=1, kind="stable")[:, :K].astype(np.int32)


ROUTINGS = ("random", "all to expert 2", "none to expert 1", "the last device's to expert 0", "the same two")


@pytest.mark.parametrize(
    ("num_devices", "num_experts", "bucket_rows"),
    [(4, 4, 1), (4, 4, 3), (4, 4, 8), (4, 4, 10), (4, 4, 99), (4, 4, None), (4, 12, 3), (16, 16, 4)],
)
def test_exchange_equals_the_simulation_and_the_dense_product(num_devices, num_experts, bucket_rows):
    tokens, experts = num_devices * T, (num_experts, D, F)
    x_TD, weights_TK, dy_TD = normal(1, tokens, D), normal(2, tokens, K), normal(3, tokens, D)
    w_up_EDF, w_down_EFD = normal(4, *experts), normal(5, num_experts, F, D)
    carried = min(T, bucket_rows or default_bucket_rows(T, K, num_experts))
    for routing in ROUTINGS:
        ids_TK = route(routing, num_devices, num_experts)
        args = x_TD, ids_TK, weights_TK, w_up_EDF, w_down_EFD
        y_TD, rounds, *grads = with_gradients(num_devices, bucket_rows)(*args, dy_TD)
        simulated_TD, simulated_rounds = simulate(*args, num_devices, carried)
        assert rounds.tolist() == [simulated_rounds] * num_devices, routing
        assert simulated_rounds <= max_rounds(T, carried)
        np.testing.assert_allclose(y_TD, simulated_TD, rtol=0, atol=1e-12, err_msg=routing)
        dense_TD, *dense_grads = every_expert_on_every_token(*args, dy_TD)
        np.testing.assert_allclose(y_TD, dense_TD, rtol=0, atol=1e-12, err_msg=routing)
        for g, e in zip(grads, dense_grads, strict=True):
            assert g.dtype == jnp.float64
            np.testing.assert_allclose(g, e, rtol=0, atol=1e-12, err_msg=routing)


def test_the_cases_take_one_round_some_and_the_most():
    """So that the test above covers what it should."""

    def rounds(routing: str, num_devices: int, num_experts: int, bucket_rows: int) -> int:
        ids_NTK = route(routing, num_devices, num_experts).reshape(num_devices, -1)
        most = max(np.bincount(ids_R, minlength=num_experts).max() for ids_R in ids_NTK)
        return -(-most // bucket_rows)

    assert [rounds(routing, 4, 4, 3) for routing in ROUTINGS] == [3, 4, 3, 4, 4]
    assert [rounds(routing, 4, 4, 10) for routing in ROUTINGS] == [1] * 5
    assert rounds("random", 16, 16, 4) == 2
    assert rounds("the last device's to expert 0", 16, 16, 4) == 3
    assert rounds("all to expert 2", 4, 12, 3) == 4


def abstract(num_devices: int, num_experts: int, tokens: int, width: int) -> list[jax.ShapeDtypeStruct]:
    """Arguments of the exchange, float32."""
    weights = (num_experts, width, width)
    shapes = (tokens * num_devices, width), (tokens * num_devices, K), weights, weights
    x, w, up, down = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return [x, jax.ShapeDtypeStruct(w.shape, jnp.int32), w, up, down]


@pytest.mark.parametrize(("bucket_rows", "limit"), [(4, 3), (9, 2), (10, 1)])
def test_rounds_in_the_program_are_bounded(bucket_rows, limit):
    """One pair of all-to-alls in any case, and one pair per further round that any routing can need."""
    program = jax.jit(exchange(4, bucket_rows)).lower(*abstract(4, 4, T, D)).compile()
    found = [c for c in collectives(program.as_text()) if c.kind == "all-to-all"]
    assert all(c.trips_known for c in found)
    assert sum(c.count for c in found if not c.conditional) == 2
    assert sum(c.count for c in found if c.conditional) == 2 * (limit - 1)
    assert max_rounds(T, bucket_rows) == limit


def temp_bytes(bucket_rows: int) -> int:
    program = jax.jit(exchange(4, bucket_rows)).lower(*abstract(4, 16, 64, 32)).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_memory_goes_with_the_bucket_not_with_the_worst_routing():
    """One program serves every routing, so its buffers are those of the worst one. With small buckets they
    are far from a buffer for all 64 tokens of each of 4 sources to each of 4 local experts."""
    worst = 4 * 4 * 64 * 32 * 4
    assert temp_bytes(4) < worst / 3
    assert temp_bytes(64) > worst


def test_bfloat16_rows_give_bfloat16():
    run = jax.eval_shape(
        exchange(4, 4), *(jax.ShapeDtypeStruct(a.shape, jnp.bfloat16 if a.dtype == jnp.float32 else a.dtype)
                          for a in abstract(4, 4, T, D))
    )  # fmt: skip
    assert [a.dtype for a in run] == [jnp.bfloat16, jnp.int32]


@given(st.integers(1, 10_000), st.integers(1, 256), st.data())
def test_default_bucket_rows(num_tokens, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    rows = default_bucket_rows(num_tokens, top_k, num_experts)
    assert 1 <= rows <= num_tokens  # an expert can get no more than every token
    assert rows % 8 == 0 or rows == num_tokens
    # Balanced routing fits, with room of four standard deviations, and little is sent for nothing.
    mean = num_tokens * top_k / num_experts
    assert rows == num_tokens or rows >= mean + 4 * mean**0.5
    assert rows < mean + 4 * mean**0.5 + 8
    assert default_bucket_rows(num_tokens + 1, top_k, num_experts) >= rows


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_max_rounds_is_just_enough(num_tokens, bucket_rows):
    rounds = max_rounds(num_tokens, bucket_rows)
    assert (rounds - 1) * bucket_rows < num_tokens <= rounds * bucket_rows


def test_random_routing_nearly_always_takes_one_round():
    """16 sources of 512 tokens, top-2 of 16 experts: of 200 draws at most two need a second round."""
    rng, rows = np.random.default_rng(0), default_bucket_rows(512, 2, 16)
    scores = rng.random((200, 16, 512, 16), np.float32)
    ids = np.argpartition(-scores, 2, axis=-1)[..., :2].reshape(200, 16, -1)
    most = [max(np.bincount(source, minlength=16).max() for source in draw) for draw in ids]
    assert sum(m > rows for m in most) <= 2
    assert rows < 2 * 512 * 2 / 16  # and not by carrying anything that could come


def gradient_temp_bytes(bucket_rows: int) -> int:
    f = exchange(4, bucket_rows)

    def gradients(x_TD, ids_TK, *rest):
        y_TD, back, _ = jax.vjp(lambda x, *rest: f(x, ids_TK, *rest), x_TD, *rest, has_aux=True)
        return back(y_TD)

    analysis = jax.jit(gradients).lower(*abstract(4, 4, 64, 64)).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_the_backward_pass_keeps_nothing_per_round():
    """8 and 64 rounds: smaller buckets take less, not one more copy of weights and tokens for each round."""
    assert gradient_temp_bytes(1) <= gradient_temp_bytes(8)
