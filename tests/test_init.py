"""Parameters and optimizer state come into being in parts: no device ever holds a whole one."""

import jax
import numpy as np
import pytest
from jax.stages import Compiled

from moe_jax.config.schema import DeploymentConfig, ModelConfig, TrainConfig
from moe_jax.deployments import create
from moe_jax.train.step import Trainer

# Sizes all different, so that the shape of a whole array cannot be that of another one's part.
CFG = ModelConfig(
    num_layers=6, d_model=48, num_heads=8, head_dim=10, num_experts=16, expert_hidden=352, vocab_size=272,
    param_dtype="float32", compute_dtype="float32",
)  # fmt: skip
MESHES = {
    "ep16": DeploymentConfig(expert=16),
    "tp8pp2": DeploymentConfig(pipe=2, tensor=8),
    "dp2ep4tp2": DeploymentConfig(data=2, expert=4, tensor=2),
}


def shape_text(shape) -> str:
    return f"[{','.join(map(str, shape))}]"


def whole_shapes_in(compiled: Compiled, trainer: Trainer) -> set[str]:
    """Shapes of whole arrays, of those that are split, that occur in a compiled program's text."""
    split = [
        leaf.shape
        for leaf in jax.tree.leaves(trainer.abstract_state())
        if leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    ]
    text = compiled.as_text()
    assert split
    assert text
    return {shape_text(shape) for shape in split if shape_text(shape) in text}


def compiled_init(trainer: Trainer, shardings) -> Compiled:
    return jax.jit(trainer.make_state, out_shardings=shardings).lower(jax.random.key(0)).compile()


@pytest.mark.parametrize("name", MESHES)
def test_no_array_is_ever_whole(name):
    trainer = Trainer(create(CFG, MESHES[name]), TrainConfig())
    state = trainer.abstract_state()
    compiled = compiled_init(trainer, jax.tree.map(lambda leaf: leaf.sharding, state))
    assert not whole_shapes_in(compiled, trainer)
    part_bytes = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    memory = compiled.memory_analysis()
    assert memory
    assert memory.output_size_in_bytes <= 1.1 * part_bytes
    assert memory.temp_size_in_bytes <= part_bytes


def test_the_check_sees_whole_arrays():
    """The control: the same init with everything replicated holds every whole shape."""
    trainer = Trainer(create(CFG, MESHES["ep16"]), TrainConfig())
    replicated = trainer.deployment.sharding(jax.sharding.PartitionSpec())
    compiled = compiled_init(trainer, jax.tree.map(lambda _: replicated, trainer.abstract_state()))
    assert shape_text((6, 16, 48, 352)) in whole_shapes_in(compiled, trainer)


def test_one_seed_gives_the_same_weights_on_every_mesh():
    whole = jax.device_get(create(CFG, DeploymentConfig()).init_params(3))
    for config in MESHES.values():
        parts = jax.device_get(create(CFG, config).init_params(3, at_rest=True))
        assert jax.tree.all(jax.tree.map(np.array_equal, whole, parts)), config


def test_optimizer_state_is_split_where_weights_would_be_replicated():
    state = Trainer(create(CFG, MESHES["ep16"]), TrainConfig()).abstract_state()
    for leaf in (state["params"], state["opt"][0].mu, state["opt"][0].nu):
        w_q = leaf["blocks"]["attention"]["w_q"]
        assert np.prod(w_q.sharding.shard_shape(w_q.shape)) * 16 == np.prod(w_q.shape)
