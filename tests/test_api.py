"""The public API: build, train, save, load in another deployment, generate."""

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.checkpoint import CheckpointStore
from moe_jax.config import ConfigError, to_dict
from moe_jax.config.schema import DataConfig, DeploymentConfig, ModelConfig, RunConfig, TrainConfig

MODEL = ModelConfig(
    num_layers=2, d_model=32, num_heads=8, num_experts=16, expert_hidden=32, vocab_size=272, init_std=0.2,
    param_dtype="float32", compute_dtype="float32",
)  # fmt: skip
RUN = RunConfig(MODEL, DeploymentConfig(), TrainConfig(batch_size=16, steps=4, warmup_steps=1), DataConfig())
PROMPTS = np.random.default_rng(0).integers(0, 256, (3, 7)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    model, _ = moe_jax.build(RUN)
    with CheckpointStore(folder) as store:
        store.save(0, {"params": model.deployment.init_params(0)}, {"config": to_dict(RUN)})
    return folder


@pytest.fixture(scope="module")
def single(checkpoint):
    return moe_jax.load(checkpoint)


def test_public_names_are_documented():
    assert {"load", "build", "Model"} <= set(moe_jax.__all__)
    for name in ("load", "build", "Model"):
        assert getattr(moe_jax, name).__doc__


def test_load_gives_config_and_deployment(single):
    assert single.config == MODEL
    assert single.deployment.config.num_devices == 1


def test_logits_are_float32_and_causal(single):
    logits = np.asarray(single.logits(PROMPTS))
    assert logits.shape == (3, 7, 272)
    assert logits.dtype == np.float32
    changed = PROMPTS.copy()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    after = np.asarray(single.logits(changed))
    np.testing.assert_array_equal(after[:, :-1], logits[:, :-1])
    assert np.abs(after[:, -1] - logits[:, -1]).max() > 1e-3


@pytest.mark.smoke
@pytest.mark.parametrize("deployment", ["ep16", "pipe=2,tensor=8", "pipe=2,expert=4,tensor=2"])
def test_every_deployment_gives_the_same(checkpoint, single, deployment):
    model = moe_jax.load(checkpoint, deployment)
    np.testing.assert_allclose(model.logits(PROMPTS), single.logits(PROMPTS), rtol=0, atol=1e-5)
    for temperature in (0.0, 1.0):
        new = model.generate(PROMPTS, 12, temperature, seed=3)
        np.testing.assert_array_equal(new, single.generate(PROMPTS, 12, temperature, seed=3))


def test_generation_continues_as_the_full_pass_does(single):
    ids = single.generate(PROMPTS, 10)
    assert ids.shape == (3, 17)
    np.testing.assert_array_equal(ids[:, :7], PROMPTS)
    predicted = np.asarray(single.logits(ids)).argmax(-1)
    np.testing.assert_array_equal(ids[:, 7:], predicted[:, 6:-1])


def test_a_sequence_samples_the_same_in_any_batch(single):
    alone = single.generate(PROMPTS[:1], 8, temperature=1.0, seed=1)
    np.testing.assert_array_equal(single.generate(PROMPTS, 8, temperature=1.0, seed=1)[:1], alone)
    assert not np.array_equal(single.generate(PROMPTS[:1], 8, temperature=1.0, seed=2), alone)


@pytest.mark.smoke
def test_build_trains():
    model, step = moe_jax.build(RUN)
    batch = {"ids_BL": np.tile(np.arange(8, dtype=np.int32), (16, 1))}
    batch["targets_BL"] = (batch["ids_BL"] + 1) % 8
    before = np.asarray(model.logits(batch["ids_BL"][:1]))
    losses = [float(step(batch)["loss"]) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert np.abs(np.asarray(model.logits(batch["ids_BL"][:1])) - before).max() > 1e-4


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.logits(np.zeros(4, np.int32)), "2-D"),
        (lambda m: m.logits(np.zeros((2, 0), np.int32)), "non-empty"),
        (lambda m: m.logits(np.zeros((2, 4), np.float32)), "float32"),
        (lambda m: m.logits(np.full((1, 4), 272)), "272"),
        (lambda m: m.logits(np.full((1, 4), -1)), "-1"),
        (lambda m: m.generate(PROMPTS, -1), "max_new_tokens"),
        (lambda m: m.generate(PROMPTS, 1, temperature=float("nan")), "temperature"),
        (lambda m: m.generate(PROMPTS, 1, temperature=-1.0), "temperature"),
        (lambda m: m.generate(PROMPTS, 1, seed=-1), "seed"),
    ],
)
def test_bad_arguments_are_refused(single, call, said):
    with pytest.raises(ValueError, match=said):
        call(single)


def test_a_deployment_that_does_not_fit_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="num_experts"):
        moe_jax.load(checkpoint, "expert=5")
    with pytest.raises(ConfigError, match="device"):
        moe_jax.load(checkpoint, "data=32")
    with pytest.raises(ConfigError, match="num_layers"):
        moe_jax.build(RunConfig(MODEL, DeploymentConfig(pipe=3), RUN.train, RUN.data))
    assert jax.device_count() == 16
