"""Rows between token order and expert order: permutations worked by hand, and one-hot products."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from moe_jax.ops.rows import Slots, block_slots, sort_rows, sum_rows, take_rows

# Five tokens choose two of three experts. Row r = 2 * token + choice goes to expert
#   r       0  1  2  3  4  5  6  7  8  9
#   expert  2  0  0  1  2  1  0  2  2  0
# so expert 0 gets rows 1 2 6 9, expert 1 rows 3 5, expert 2 rows 0 4 7 8.
IDS_TK = np.array([[2, 0], [0, 1], [2, 1], [0, 2], [2, 0]], np.int32)


def counts_of(ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    return np.bincount(ids_TK.reshape(-1), minlength=num_experts).astype(np.int32)


def sort_and_check(ids_TK: np.ndarray, num_experts: int) -> list[list]:
    order = jax.jit(sort_rows)(ids_TK, counts_of(ids_TK, num_experts))
    assert [a.dtype for a in order] == [jnp.int32] * 3
    return [a.tolist() for a in order]


def test_sort_by_hand():
    row_of_position_R, rank_TK, start_E = sort_and_check(IDS_TK, 3)
    assert row_of_position_R == [1, 2, 6, 9, 3, 5, 0, 4, 7, 8]
    assert rank_TK == [[0, 0], [1, 0], [1, 1], [2, 2], [3, 3]]
    assert start_E == [0, 4, 6]


def test_sort_with_experts_that_get_nothing():
    """Experts 0, 2 and 4 of five get no row: their start is where the next expert's rows begin."""
    # r       0  1  2  3
    # expert  3  1  3  1
    row_of_position_R, rank_TK, start_E = sort_and_check(np.array([[3, 1], [3, 1]], np.int32), 5)
    assert row_of_position_R == [1, 3, 0, 2]
    assert rank_TK == [[0, 0], [1, 1]]
    assert start_E == [0, 0, 2, 2, 4]


def test_sort_with_one_expert_keeps_token_order():
    row_of_position_R, rank_TK, start_E = sort_and_check(np.zeros((4, 1), np.int32), 1)
    assert row_of_position_R == [0, 1, 2, 3]
    assert rank_TK == [[0], [1], [2], [3]]
    assert start_E == [0]


def test_sort_with_one_choice():
    row_of_position_R, rank_TK, start_E = sort_and_check(np.array([[1], [0], [1], [0]], np.int32), 2)
    assert row_of_position_R == [1, 3, 0, 2]
    assert rank_TK == [[0], [0], [1], [1]]
    assert start_E == [0, 2]


@partial(jax.jit, static_argnums=(1, 2))
@partial(jax.vmap, in_axes=(0, None, None))
def make_blocks(ids_TK: jax.Array, num_experts: int, block_rows: int) -> tuple[Slots, jax.Array, jax.Array]:
    """block_slots for one distribution of rows or, the leading dim, many."""
    counts_E = jnp.zeros(num_experts, jnp.int32).at[ids_TK.reshape(-1)].add(1)
    return block_slots(sort_rows(ids_TK, counts_E), ids_TK, counts_E, block_rows)


def one_of_blocks(ids_TK: np.ndarray, num_experts: int, block_rows: int) -> tuple[Slots, np.ndarray, int]:
    return jax.tree.map(lambda a: a[0], jax.device_get(make_blocks(ids_TK[None], num_experts, block_rows)))


def test_blocks_by_hand():
    """Blocks of three rows: two for expert 0, one for expert 1, two for expert 2; 10/3 up + 3 = 7 in all."""
    slots, expert_X, num_used = one_of_blocks(IDS_TK, 3, 3)
    assert num_used == 5
    assert expert_X[:5].tolist() == [0, 0, 1, 2, 2]
    # block    0        1        2        3        4         5, 6
    # row      1  2  6  9  -  -  3  5  -  0  4  7  8  -  -   -
    # token    0  1  3  4  -  -  1  2  -  0  2  3  4  -  -   -
    x_TD = np.arange(1.0, 6.0)[:, None]
    tokens_S = [1, 2, 4, 5, 0, 0, 2, 3, 0, 1, 3, 4, 5, 0, 0] + [0] * 6
    assert jax.jit(take_rows)(x_TD, slots)[:, 0].tolist() == tokens_S
    assert slots.filled_S.tolist() == [value > 0 for value in tokens_S]
    assert slots.slot_of_row_TK.tolist() == [[9, 0], [1, 6], [10, 7], [2, 11], [12, 3]]
    assert slots.present_TK.all()
    # Slot s holds the number s; a token's sum is that of its two slots, weighed 1 and 100.
    rows_SD = np.arange(21.0)[:, None]
    weights_TK = np.tile([[1.0, 100.0]], (5, 1))
    assert jax.jit(sum_rows)(rows_SD, weights_TK, slots)[:, 0].tolist() == [9, 601, 710, 1102, 312]


def check_blocks(ids_TK, slots: Slots, expert_X, num_used, num_experts: int, block_rows: int) -> None:
    """The whole contract of block_slots for one distribution, in plain loops."""
    held = set()
    for t, k in np.ndindex(*ids_TK.shape):
        slot = int(slots.slot_of_row_TK[t, k])
        assert slots.present_TK[t, k]
        assert slots.filled_S[slot]
        assert (slots.token_of_slot_S[slot], slots.choice_of_slot_S[slot]) == (t, k)
        assert expert_X[slot // block_rows] == ids_TK[t, k]
        held.add(slot)
    assert len(held) == ids_TK.size == slots.filled_S.sum()
    needed_E = [-(-count // block_rows) for count in counts_of(ids_TK, num_experts)]
    assert num_used == sum(needed_E) <= len(expert_X)
    used_X = expert_X[:num_used].tolist()
    assert used_X == [e for e, blocks in enumerate(needed_E) for _ in range(blocks)]
    assert expert_X[num_used:].tolist() == [num_experts - 1] * (len(expert_X) - num_used)


@pytest.mark.parametrize("block_rows", [1, 3, 8])
@pytest.mark.parametrize(("num_rows", "num_experts"), [(7, 3), (8, 1), (2, 5)])
def test_blocks_suffice_for_every_distribution(num_rows, num_experts, block_rows):
    """All ways to give rows to experts, not a sample of them: the static number of blocks always does."""
    counts = [c for c in product(range(num_rows + 1), repeat=num_experts) if sum(c) == num_rows]
    ids_CTK = np.stack([np.repeat(np.arange(num_experts, dtype=np.int32), c)[:, None] for c in counts])
    out = jax.device_get(make_blocks(ids_CTK, num_experts, block_rows))
    for i, ids_TK in enumerate(ids_CTK):
        slots, expert_X, num_used = jax.tree.map(lambda a, i=i: a[i], out)
        check_blocks(ids_TK, slots, expert_X, num_used, num_experts, block_rows)


@settings(max_examples=40, deadline=None)
@given(ids_R=st.lists(st.integers(0, 4), min_size=24, max_size=24), block_rows=st.sampled_from([3, 40]))
def test_blocks_of_rows_in_any_order(ids_R, block_rows):
    ids_TK = np.array(ids_R, np.int32).reshape(12, 2)
    check_blocks(ids_TK, *one_of_blocks(ids_TK, 5, block_rows), num_experts=5, block_rows=block_rows)


# take_rows and sum_rows against a one-hot tensor: hot_STK[s, t, k] is 1 if slot s holds row (t, k).

T, K, S, D = 6, 3, 20, 4


def random_slots(seed: int) -> tuple[Slots, np.ndarray]:
    """Some of the rows in some of the slots; what is documented as "any valid" is noise."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(T * K)[: T * K * 2 // 3]
    places = rng.permutation(S)[: len(rows)]
    token_S, choice_S = rng.integers(0, T, S, np.int32), rng.integers(0, K, S, np.int32)
    slot_TK, hot_STK = rng.integers(0, S, (T, K), np.int32), np.zeros((S, T, K))
    for row, slot in zip(rows, places, strict=True):
        t, k = divmod(row, K)
        token_S[slot], choice_S[slot], slot_TK[t, k], hot_STK[slot, t, k] = t, k, slot, 1.0
    parts = token_S, choice_S, hot_STK.any((1, 2)), slot_TK, hot_STK.any(0)
    return Slots(*(jnp.asarray(part) for part in parts)), hot_STK


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@jax.jit
def take_and_gradient(x_TD, slots: Slots, d_rows_SD) -> tuple:
    rows_SD, back = jax.vjp(lambda x: take_rows(x, slots), x_TD)
    return rows_SD, *back(d_rows_SD)


@jax.jit
def sum_and_gradients(rows_SD, weights_TK, slots: Slots, dy_TD) -> tuple:
    y_TD, back = jax.vjp(lambda rows, w: sum_rows(rows, w, slots), rows_SD, weights_TK)
    return y_TD, *back(dy_TD)


def assert_close(got, expected) -> None:
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == jnp.float64
        np.testing.assert_allclose(g, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_take_rows_equals_adding_row_by_row(seed):
    slots, hot_STK = random_slots(seed)
    x_TD, d_rows_SD = normal(1, T, D), normal(2, S, D)
    got = take_and_gradient(x_TD, slots, d_rows_SD)
    rows_SD, dx_TD = np.zeros((S, D)), np.zeros((T, D))
    for s, t, _ in zip(*np.nonzero(hot_STK), strict=True):
        rows_SD[s] += x_TD[t]
        dx_TD[t] += d_rows_SD[s]
    assert_close(got, (rows_SD, dx_TD))
    assert not np.asarray(got[0])[~np.asarray(slots.filled_S)].any()


@pytest.mark.parametrize("seed", range(3))
def test_sum_rows_equals_adding_row_by_row(seed):
    slots, hot_STK = random_slots(seed)
    rows_SD, weights_TK, dy_TD = normal(1, S, D), normal(2, T, K), normal(3, T, D)
    y_TD, d_rows_SD, d_weights_TK = np.zeros((T, D)), np.zeros((S, D)), np.zeros((T, K))
    for s, t, k in zip(*np.nonzero(hot_STK), strict=True):
        y_TD[t] += weights_TK[t, k] * rows_SD[s]
        d_rows_SD[s] += weights_TK[t, k] * dy_TD[t]
        d_weights_TK[t, k] += rows_SD[s] @ dy_TD[t]
    assert_close(sum_and_gradients(rows_SD, weights_TK, slots, dy_TD), (y_TD, d_rows_SD, d_weights_TK))


def test_gradients_equal_those_of_plain_indexing():
    """The same maps written with jax's own gathers, whose transposes jax derives."""
    slots, _ = random_slots(7)

    @jax.jit
    def plain(x_TD, rows_SD, weights_TK, d_rows_SD, dy_TD):
        def take(x_TD):
            return jnp.where(slots.filled_S[:, None], x_TD[slots.token_of_slot_S], 0.0)

        def add(rows_SD, weights_TK):
            rows_TKD = jnp.where(slots.present_TK[:, :, None], rows_SD[slots.slot_of_row_TK], 0.0)
            return jnp.sum(rows_TKD * weights_TK[:, :, None], axis=1)

        return *jax.vjp(take, x_TD)[1](d_rows_SD), *jax.vjp(add, rows_SD, weights_TK)[1](dy_TD)

    x_TD, rows_SD, weights_TK = normal(1, T, D), normal(2, S, D), normal(3, T, K)
    d_rows_SD, dy_TD = normal(4, S, D), normal(5, T, D)
    ours = take_and_gradient(x_TD, slots, d_rows_SD)[1:]
    ours += sum_and_gradients(rows_SD, weights_TK, slots, dy_TD)[1:]
    assert_close(ours, plain(x_TD, rows_SD, weights_TK, d_rows_SD, dy_TD))


def test_gradients_equal_numerical_ones():
    slots, _ = random_slots(3)
    check_grads(jax.jit(lambda x: take_rows(x, slots)), (normal(1, T, D),), order=1, modes=["rev"])
    sums = jax.jit(lambda rows, w: sum_rows(rows, w, slots))
    check_grads(sums, (normal(1, S, D), normal(2, T, K)), order=1, modes=["rev"])


def test_neither_direction_scatters():
    slots, _ = random_slots(0)
    x_TD, rows_SD, weights_TK = normal(1, T, D), normal(2, S, D), normal(3, T, K)
    for program in (
        take_and_gradient.lower(x_TD, slots, rows_SD),
        sum_and_gradients.lower(rows_SD, weights_TK, slots, x_TD),
    ):
        assert "gather" in program.as_text()
        assert "scatter" not in program.as_text()


def test_bfloat16_is_added_up_in_float32():
    """256 + 1 + 1 is 256 in bfloat16 (step 2, ties to even), 258 in float32."""
    slots, _, _ = one_of_blocks(np.array([[0, 1, 2]], np.int32), 3, 1)
    rows = np.zeros((slots.filled_S.shape[0], 1))
    rows[slots.slot_of_row_TK[0], 0] = 256, 1, 1
    rows_SD = rows.astype(jnp.bfloat16)
    total_TD = jax.jit(sum_rows)(rows_SD, np.ones((1, 3), np.float32), slots)
    assert total_TD.dtype == jnp.float32
    assert total_TD.tolist() == [[258.0]]
    taken_SD, dx_TD = take_and_gradient(np.ones((1, 1), jnp.bfloat16), slots, rows_SD)
    assert taken_SD.dtype == dx_TD.dtype == jnp.bfloat16
    assert dx_TD.tolist() == [[258.0]]


def test_gradients_keep_the_dtypes_of_their_arrays():
    slots, _ = random_slots(1)
    rows_SD, weights_TK = normal(1, S, D).astype(jnp.bfloat16), normal(2, T, K).astype(np.float32)
    got = sum_and_gradients(rows_SD, weights_TK, slots, np.ones((T, D), np.float32))
    assert [a.dtype for a in got] == [jnp.float32, jnp.bfloat16, jnp.float32]
