"""The pipeline against running its stages one after another."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from moe_jax.parallel.pipeline import pipeline, pipeline_with_state
from moe_jax.plan.hlo import collectives

ROWS, DIM = 2, 3


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def stage(w_DD, x_RD):
    """Not linear, and different on each stage; tells what it was given."""
    y_RD = x_RD + jnp.tanh(x_RD @ w_DD)
    return y_RD, {"input": x_RD, "square": jnp.sum(y_RD * y_RD)}


def on_stages(f, num_stages: int):
    """f(this stage's part, ...) on a mesh of stages; arrays' leading dim is the stage."""
    mesh = Mesh(np.array(jax.devices()[:num_stages]), ("pipe",))
    spec = PartitionSpec("pipe")

    def body(*args):
        return jax.tree.map(lambda a: a[None], f(*jax.tree.map(lambda a: a[0], args)))

    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


@cache
def with_gradients(num_stages: int):
    """(w, x, dy, d_square) on each stage -> (y, aux) and the gradients of w and x.

    Each stage's loss is its share: the last one's results times dy, and its own aux times d_square.
    """

    def run(w_DD, x_MRD, dy_MRD, d_square_M):
        is_last = jax.lax.axis_index("pipe") == num_stages - 1

        def share(w_DD, x_MRD):
            y_MRD, aux_M = pipeline(lambda x: stage(w_DD, x), x_MRD, "pipe", num_stages)
            last = jnp.where(is_last, jnp.sum(y_MRD * dy_MRD), 0.0)
            return last + jnp.sum(aux_M["square"] * d_square_M), (y_MRD, aux_M)

        grads, out = jax.grad(share, argnums=(0, 1), has_aux=True)(w_DD, x_MRD)
        return *out, *grads

    return on_stages(run, num_stages)


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # much code that runs briefly
def one_after_another(w_SDD, x_MRD, dy_MRD, d_square_SM):
    """The same with plain loops over microbatches and stages on one device."""

    def loss(w_SDD, x_MRD):
        y_M, aux_SM = [], [[] for _ in w_SDD]
        for x_RD in x_MRD:
            for s, w_DD in enumerate(w_SDD):
                x_RD, aux = stage(w_DD, x_RD)
                aux_SM[s].append(aux)
            y_M.append(x_RD)
        aux_SM = [jax.tree.map(lambda *m: jnp.stack(m), *aux_M) for aux_M in aux_SM]
        aux = jax.tree.map(lambda *s: jnp.stack(s), *aux_SM)
        return jnp.sum(jnp.stack(y_M) * dy_MRD) + jnp.sum(aux["square"] * d_square_SM), (jnp.stack(y_M), aux)

    grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(w_SDD, x_MRD)
    return *out, *grads


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 5])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_pipeline_equals_stages_one_after_another(num_stages, num_microbatches):
    w_SDD, x_MRD = normal(1, num_stages, DIM, DIM), normal(2, num_microbatches, ROWS, DIM)
    dy_MRD, d_square_SM = normal(3, *x_MRD.shape), normal(4, num_stages, num_microbatches)
    # Only the first stage is given the microbatches, the others get noise that must not matter.
    x_SMRD = np.stack([x_MRD] + [normal(9 + s, *x_MRD.shape) for s in range(1, num_stages)])
    dy_SMRD = np.stack([dy_MRD] * num_stages)
    y_SMRD, aux_SM, dw_SDD, dx_SMRD = with_gradients(num_stages)(w_SDD, x_SMRD, dy_SMRD, d_square_SM)
    got = y_SMRD[-1], aux_SM, dw_SDD, dx_SMRD[0]
    expected = one_after_another(w_SDD, x_MRD, dy_MRD, d_square_SM)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.dtype == jnp.float64
        np.testing.assert_allclose(g, e, rtol=0, atol=1e-12)
    assert not np.asarray(dx_SMRD[1:]).any()


def permutes(compiled: jax.stages.Compiled) -> list[tuple[float, set]]:
    """Executions, and (sender, receiver) pairs, of each permute; there must be no other collective."""
    found = collectives(compiled.as_text())
    assert {collective.kind for collective in found} <= {"collective-permute"}
    return [(collective.count, set(collective.source_target_pairs)) for collective in found]


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 3), (2, 1), (4, 5)])
def test_one_permute_a_tick(num_stages, num_microbatches):
    def run(w_DD, x_MRD):
        return pipeline(lambda x: stage(w_DD, x), x_MRD, "pipe", num_stages)

    args = np.zeros((num_stages, DIM, DIM)), np.zeros((num_stages, num_microbatches, ROWS, DIM))
    found = permutes(on_stages(run, num_stages).lower(*args).compile())
    ticks = num_microbatches + num_stages - 1
    to_next = {(s, s + 1) for s in range(num_stages - 1)}
    assert found == ([] if num_stages == 1 else [(ticks, to_next)])


def counted_stage(w_DD, x_RD, state):
    """Reads its state, and notes in it what it was given."""
    y_RD = x_RD + jnp.tanh(x_RD @ w_DD) * state["calls"].astype(x_RD.dtype)
    return y_RD, {"calls": state["calls"] + 1, "inputs": state["inputs"] + x_RD}


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_state_changes_once_and_on_its_stage(num_stages):
    """Two calls in a row, the state of the first handed to the second."""

    def run(w_DD, x_RD, state):
        return pipeline_with_state(lambda x, s: counted_stage(w_DD, x, s), x_RD, state, "pipe", num_stages)

    w_SDD = normal(1, num_stages, DIM, DIM)
    calls_S = np.arange(1, num_stages + 1, dtype=np.int32)
    state = {"calls": calls_S, "inputs": normal(2, num_stages, ROWS, DIM)}
    expected_state = jax.tree.map(np.copy, state)
    piped = on_stages(run, num_stages)
    for seed in (3, 4):
        x_RD = normal(seed, ROWS, DIM)
        # All stages but the first are given noise.
        x_SRD = np.stack([x_RD] + [normal(9 + s, ROWS, DIM) for s in range(1, num_stages)])
        y_SRD, state = piped(w_SDD, x_SRD, state)
        for s in range(num_stages):
            expected_state["inputs"][s] += x_RD
            x_RD = x_RD + np.tanh(x_RD @ w_SDD[s]) * expected_state["calls"][s]
            expected_state["calls"][s] += 1
        np.testing.assert_allclose(y_SRD[-1], x_RD, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(state["calls"], expected_state["calls"])
        np.testing.assert_allclose(state["inputs"], expected_state["inputs"], rtol=0, atol=1e-12)


def test_stages_out_of_turn_are_skipped():
    """Every stage is called once in all, not once a tick; one permute a tick."""
    seen = []

    def noted(w_DD, x_RD, state):
        jax.debug.callback(lambda s: seen.append(int(s)), jax.lax.axis_index("pipe"))
        return counted_stage(w_DD, x_RD, state)

    def run(w_DD, x_RD, state):
        return pipeline_with_state(lambda x, s: noted(w_DD, x, s), x_RD, state, "pipe", 4)

    state = {"calls": np.ones(4, np.int32), "inputs": np.zeros((4, ROWS, DIM))}
    lowered = on_stages(run, 4).lower(np.zeros((4, DIM, DIM)), np.zeros((4, ROWS, DIM)), state)
    compiled = lowered.compile()
    jax.block_until_ready(compiled(np.zeros((4, DIM, DIM)), np.zeros((4, ROWS, DIM)), state))
    jax.effects_barrier()
    assert sorted(seen) == [0, 1, 2, 3]
    assert permutes(compiled) == [(4, {(0, 1), (1, 2), (2, 3)})]
