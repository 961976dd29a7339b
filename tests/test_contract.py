"""The compiled programs hold just the collectives that the deployments declare."""

import numpy as np
import pytest

from moe_jax.config.schema import DeploymentConfig, ModelConfig, TrainConfig
from moe_jax.deployments import create, rules
from moe_jax.deployments.contract import declare_forward, declare_step, tally_compiled, tally_declared
from moe_jax.parallel.exchange.bucketed import BucketedExchange
from moe_jax.train.step import Trainer

SEQ_LEN, BATCH = 32, 32
TRAIN = TrainConfig(batch_size=BATCH, steps=10, warmup_steps=1)
MESHES = {
    "single": DeploymentConfig(),
    "ep16": DeploymentConfig(expert=16),
    "tp8pp2": DeploymentConfig(pipe=2, tensor=8, num_microbatches=4),
    "ep8tp2": DeploymentConfig(expert=8, tensor=2),
    "pp2ep4tp2": DeploymentConfig(pipe=2, expert=4, tensor=2, num_microbatches=2),
    "dp2ep4tp2": DeploymentConfig(data=2, expert=4, tensor=2),
}


def tiny(**changes) -> ModelConfig:
    sizes = {
        "num_layers": 4, "d_model": 64, "num_heads": 8, "num_experts": 16, "expert_hidden": 128,
        "vocab_size": 272, "param_dtype": "float32", "compute_dtype": "float32",
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


def compiled_forward(deployment) -> str:
    ids = deployment.place_batch({"ids": np.zeros((BATCH, SEQ_LEN), np.int32)})["ids"]
    return deployment.logits_program.lower(deployment.abstract_params(), ids).compile().as_text()


def compiled_step(deployment, cfg: TrainConfig) -> str:
    trainer = Trainer(deployment, cfg)
    zeros = np.zeros((cfg.batch_size, SEQ_LEN), np.int32)
    batch = trainer.place({"ids_BL": zeros, "targets_BL": zeros})
    text = trainer.step_program.lower(trainer.abstract_state(), batch).compile().as_text()
    assert text
    return text


@pytest.mark.smoke
@pytest.mark.parametrize("name", MESHES)
def test_forward_moves_what_it_declares(name):
    deployment = create(tiny(), MESHES[name])
    compiled = tally_compiled(compiled_forward(deployment), deployment.mesh)
    assert compiled == tally_declared(declare_forward(deployment, BATCH, SEQ_LEN))


@pytest.mark.parametrize(
    ("name", "remat"),
    [(name, "block") for name in MESHES]
    + [("ep16", "none"), ("tp8pp2", "none"), ("ep16", "dots"), ("tp8pp2", "dots")],
)
def test_training_step_moves_what_it_declares(name, remat):
    deployment = create(tiny(remat=remat), MESHES[name])
    compiled = tally_compiled(compiled_step(deployment, TRAIN), deployment.mesh)
    assert compiled == tally_declared(declare_step(deployment, TRAIN, SEQ_LEN))


def test_accumulation_repeats_the_passes_but_not_the_parameters():
    cfg = TrainConfig(batch_size=BATCH, accumulation_steps=2, steps=10, warmup_steps=1, state_checksum=True)
    deployment = create(tiny(), MESHES["ep16"])
    compiled = tally_compiled(compiled_step(deployment, cfg), deployment.mesh)
    assert compiled == tally_declared(declare_step(deployment, cfg, SEQ_LEN))
    gathers = compiled["all-gather", ("expert",), False]
    assert (
        gathers == tally_declared(declare_step(deployment, TRAIN, SEQ_LEN))["all-gather", ("expert",), False]
    )


def test_tp8pp2_gathers_no_weights():
    deployment = create(tiny(), MESHES["tp8pp2"])
    gathers = [
        key for key in tally_compiled(compiled_step(deployment, TRAIN), deployment.mesh) if "gather" in key[0]
    ]
    # The one gather there is returns the gradient of the tokens that were cut over the stages.
    assert gathers == [("all-gather", ("pipe",), False)]
    assert not [k for k in tally_compiled(compiled_forward(deployment), deployment.mesh) if "gather" in k[0]]


def test_ep16_exchange_moves_the_bytes_of_the_formula():
    """2 (T/e) k d b (e-1)/e sent per device and layer, times the padding c e / (k T/e) of a round."""
    cfg, experts = tiny(), 16
    deployment = create(cfg, MESHES["ep16"])
    tokens = BATCH * SEQ_LEN // experts
    exchange = deployment.program.seams().exchange
    assert isinstance(exchange, BucketedExchange)
    bucket_rows = exchange.rows_per_bucket(tokens, cfg.top_k, experts)
    exact = 2 * tokens * cfg.top_k * cfg.d_model * 4 * (experts - 1) / experts
    padding = bucket_rows * experts / (cfg.top_k * tokens)
    count, operand_bytes = tally_compiled(compiled_forward(deployment), deployment.mesh)[
        "all-to-all", ("expert",), False
    ]
    assert count == 2 * cfg.num_layers
    assert operand_bytes * (experts - 1) / experts == pytest.approx(
        exact * padding * cfg.num_layers, rel=1e-12
    )


def test_a_rule_that_misses_its_axis_breaks_the_contract(monkeypatch):
    """The control: heads that stay whole on the tensor axis bring gradient sums that nobody declared."""
    declared = tally_declared(declare_step(create(tiny(), MESHES["tp8pp2"]), TRAIN, SEQ_LEN))
    monkeypatch.setitem(rules.RULES, "heads", ())
    deployment = create(tiny(), MESHES["tp8pp2"])
    assert tally_compiled(compiled_step(deployment, TRAIN), deployment.mesh) != declared
