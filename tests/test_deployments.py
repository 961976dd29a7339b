"""Every deployment computes what one device computes, and one device computes what the oracle does."""

from functools import cache

import jax
import numpy as np
import oracle
import pytest

from moe_jax.config.schema import DeploymentConfig, ModelConfig, TrainConfig
from moe_jax.deployments import create
from moe_jax.parallel.exchange import bucketed
from moe_jax.train.step import Trainer

B, L, VOCAB = 16, 8, 64
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
MESHES = {
    "ep16": DeploymentConfig(expert=16),
    "tp8pp2": DeploymentConfig(pipe=2, tensor=8, num_microbatches=4),
    "ep8tp2": DeploymentConfig(expert=8, tensor=2),
    "pp4ep4": DeploymentConfig(pipe=4, expert=4, num_microbatches=2),
    "dp2ep4tp2": DeploymentConfig(data=2, expert=4, tensor=2),
    "pp2ep4tp2": DeploymentConfig(pipe=2, expert=4, tensor=2, num_microbatches=2),
    "ep16 bucket 1": DeploymentConfig(expert=16, bucket_rows=1),
}
ROUTINGS = ("random", "one_expert", "same_experts", "empty_expert")
# An epsilon above float32 rounding: with less, AdamW takes full-size steps where gradients are noise.
TRAIN = TrainConfig(batch_size=B, steps=8, warmup_steps=2, learning_rate=1e-3, adam_eps=1e-5)


@cache
def model(kind: str, dtype: str) -> ModelConfig:
    """``plain``: the paper's kind of block. ``rich``: all that is optional in it, switched on."""
    options = {
        "plain": {},
        "rich": {
            "num_kv_heads": 8, "head_dim": 6, "expert_type": "gated", "activation": "silu", "top_k": 3,
            "num_shared_experts": 1, "tie_embeddings": True, "renormalize_top_k": False, "remat": "dots",
        },
    }[kind]  # fmt: skip
    sizes = {"num_layers": 4, "d_model": 32, "num_heads": 8, "num_experts": 16, "expert_hidden": 32}
    return ModelConfig(**sizes, vocab_size=VOCAB, param_dtype=dtype, compute_dtype=dtype, **options)  # pyright: ignore


@cache
def weights(kind: str, routing: str) -> dict:
    cfg = model(kind, "float64")
    params = oracle.random_params(cfg, seed=1)
    return params if routing == "random" else oracle.force_routing(params, cfg, routing, expert=5)


@cache
def batch(seed: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, VOCAB, (B, L + 1)).astype(np.int32)
    return {"ids_BL": ids[:, :-1], "targets_BL": ids[:, 1:]}


class Run:
    """One deployment's compiled programs, and what they compute."""

    def __init__(self, mesh: DeploymentConfig, kind: str, dtype: str):
        self.deployment = create(model(kind, dtype), mesh)
        self.trainer = Trainer(self.deployment, TRAIN)
        self.kind = kind

    def params(self, routing: str, at_rest: bool) -> dict:
        shapes = self.deployment.abstract_params(at_rest)
        return jax.tree.map(
            lambda w, s: jax.device_put(w.astype(s.dtype), s.sharding), weights(self.kind, routing), shapes
        )

    def forward_and_backward(self, routing: str) -> dict:
        logits = self.deployment.logits(self.params(routing, at_rest=False), batch(0)["ids_BL"])
        terms, grads, chosen = self.deployment.loss_and_gradients(
            self.params(routing, at_rest=True), batch(0)
        )
        return jax.device_get({"logits": logits, "terms": terms, "gradients": grads, "routing": chosen})

    def after_three_steps(self, routing: str) -> dict:
        state = self.trainer.init_state() | {"params": self.params(routing, at_rest=True)}
        losses = []
        for seed in range(3):
            state, metrics = self.trainer.step(state, batch(seed))
            losses.append(metrics["loss"])
        return jax.device_get({"params": state["params"], "losses": losses})


@cache
def single(kind: str, dtype: str, routing: str) -> tuple[dict, dict]:
    run = _single_run(kind, dtype)
    return run.forward_and_backward(routing), run.after_three_steps(routing)


@cache
def _single_run(kind: str, dtype: str) -> Run:
    return Run(DeploymentConfig(), kind, dtype)


def largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x)))


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))


def worst_difference(got, expected, size=largest) -> float:
    """The difference of the array of a tree that differs most, relative to that array's size."""

    def difference(a, b) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        return size(a - b) / max(size(b), 1e-30)

    return max(jax.tree.leaves(jax.tree.map(difference, got, expected)))


def check(run: Run, kind: str, dtype: str, routings=ROUTINGS) -> None:
    for routing in routings:
        expected, expected_trained = single(kind, dtype, routing)
        got = run.forward_and_backward(routing)
        np.testing.assert_array_equal(
            got["routing"]["expert_ids_NTK"], expected["routing"]["expert_ids_NTK"], err_msg=routing
        )
        # AdamW divides by the gradient's own size: where a gradient is all rounding, so is the update, up to
        # the learning rate. In float32 that shows in single entries, so there the norm is compared.
        size = largest if dtype == "float64" else norm
        for part in ("logits", "terms", "gradients"):
            assert worst_difference(got[part], expected[part], size) < TOLERANCE[dtype], (routing, part)
        trained = run.after_three_steps(routing)
        assert worst_difference(trained, expected_trained, size) < TOLERANCE[dtype], (routing, "trained")


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_one_device_equals_the_oracle(kind):
    cfg = model(kind, "float64")
    for routing in ROUTINGS:
        got, _ = single(kind, "float64", routing)
        args = weights(kind, routing), batch(0)["ids_BL"]
        loss, parts = oracle.oracle_loss(*args, batch(0)["targets_BL"], cfg)
        terms = {"loss": loss} | {k: parts[k] for k in ("cross_entropy", "balance_loss", "z_loss")}
        expected = {"logits": oracle.oracle_logits(*args, cfg), "terms": terms}
        expected["gradients"] = oracle.oracle_grads(*args, batch(0)["targets_BL"], cfg)
        for part, value in expected.items():
            assert worst_difference(got[part], value) < 1e-10, (routing, part)
        chosen = got["routing"]["expert_ids_NTK"].reshape(cfg.num_layers, B, L, cfg.top_k)
        np.testing.assert_array_equal(chosen, oracle.oracle_expert_ids(*args, cfg))
        np.testing.assert_array_equal(got["routing"]["tokens_per_expert_NE"], parts["tokens_per_expert_NE"])


@pytest.mark.parametrize("name", MESHES)
def test_float64_equals_one_device(name):
    check(Run(MESHES[name], "plain", "float64"), "plain", "float64")


@pytest.mark.parametrize("name", ["ep16", "pp2ep4tp2"])
def test_optional_parts_equal_one_device(name):
    check(Run(MESHES[name], "rich", "float64"), "rich", "float64", ("random", "one_expert"))


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["ep16", "tp8pp2"])
def test_float32_equals_one_device(name):
    check(Run(MESHES[name], "plain", "float32"), "plain", "float32", ("random", "one_expert"))


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize(("kind", "dtype"), [("rich", "float64"), ("plain", "float32")])
def test_every_mesh_with_every_model(name, kind, dtype):
    check(Run(MESHES[name], kind, dtype), kind, dtype)


def test_unbalanced_routing_takes_the_rounds_it_needs():
    """8 tokens a device, one row a bucket: all tokens to one expert need 8 rounds, and nothing is lost."""
    run = Run(MESHES["ep16 bucket 1"], "plain", "float64")
    _, _, routing = run.deployment.loss_and_gradients(run.params("one_expert", at_rest=True), batch(0))
    assert routing["rounds_N"].tolist() == [8, 8, 8, 8]
    assert np.asarray(routing["tokens_per_expert_NE"])[:, 5].tolist() == [B * L] * 4


@pytest.mark.parametrize("broken", ["combine", "dispatch"])
def test_a_broken_exchange_is_found(monkeypatch, broken):
    """The control: rows that come back (or go) one device off fail the same check."""
    whole = bucketed.BucketedExchange._all_to_all
    calls = iter(["dispatch", "combine"] * 1000)

    def off_by_one(self, rows_SD):
        out = whole(self, rows_SD)
        return jax.numpy.roll(out, 1, axis=0) if next(calls) == broken else out

    monkeypatch.setattr(bucketed.BucketedExchange, "_all_to_all", off_by_one)
    with pytest.raises(AssertionError, match="random"):
        check(Run(MESHES["ep16"], "plain", "float64"), "plain", "float64", ("random",))


def test_no_stage_routes_zeros_in_the_bubble(monkeypatch):
    """Zeros tie, so all of them would go to the lowest experts, in as many rounds as there can be."""
    seen, whole = [], bucketed.BucketedExchange.__call__

    def noted(self, *args):
        y_TD, rounds = whole(self, *args)
        jax.debug.callback(lambda r: seen.append(int(r)), rounds)
        return y_TD, rounds

    monkeypatch.setattr(bucketed.BucketedExchange, "__call__", noted)
    cfg = ModelConfig(
        num_layers=2,
        d_model=16,
        num_heads=2,
        num_experts=8,
        expert_hidden=16,
        vocab_size=64,
        top_k=1,
        param_dtype="float32",
        compute_dtype="float32",
    )
    deployment = create(cfg, DeploymentConfig(pipe=2, expert=4, num_microbatches=2, bucket_rows=40))
    ids_BL = np.random.default_rng(0).integers(0, 64, (16, 64)).astype(np.int32)
    jax.block_until_ready(deployment.logits(deployment.init_params(0), ids_BL))
    jax.effects_barrier()
    assert set(seen) == {1}
