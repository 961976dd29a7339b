"""From logical dim names to mesh axes: cases by hand, and the rule table of the deployments."""

from math import prod

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config.errors import ConfigError
from moe_jax.config.schema import DeploymentConfig, ModelConfig
from moe_jax.deployments import create
from moe_jax.deployments.rules import RULES
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.sharding import axes_of, leaf_layout, partition_spec


def mesh_of(pipe: int = 1, data: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    return make_mesh({"pipe": pipe, "data": data, "expert": expert, "tensor": tensor})


EVERY_AXIS = mesh_of(2, 2, 2, 2)
W_Q = ("layers", "embed", "heads", "head_width")
W_UP = ("layers", "experts", "embed", "mlp")
REST = ("data", "expert")


def test_spec_by_hand():
    assert partition_spec("w_up", W_UP, (4, 8, 16, 32), RULES, EVERY_AXIS) == P(
        "pipe", "expert", None, "tensor"
    )
    assert partition_spec("ids", ("batch",), (8,), RULES, EVERY_AXIS) == P(("data", "expert"))


def test_axes_of_size_one_are_left_out():
    """On a mesh with data 1 a batch dim is split by expert alone, and nothing else names an axis."""
    mesh = mesh_of(expert=4)
    assert partition_spec("ids", ("batch",), (8,), RULES, mesh) == P("expert")
    assert partition_spec("w_up", W_UP, (3, 8, 5, 7), RULES, mesh) == P(None, "expert", None, None)
    assert partition_spec("w_up", W_UP, (3, 5, 5, 7), RULES, mesh_of()) == P(None, None, None, None)


def test_unknown_name():
    with pytest.raises(
        ConfigError, match=r"a/b: no sharding rule for the dim 'head'; the rules know .*heads"
    ):
        partition_spec("a/b", ("embed", "head"), (8, 8), RULES, EVERY_AXIS)


def test_one_axis_on_two_dims():
    with pytest.raises(ConfigError, match=r"a/b: .* 'tensor' on two dims, 'heads' and 'mlp'"):
        partition_spec("a/b", ("heads", "mlp"), (8, 8), RULES, EVERY_AXIS)
    # Where the axis has size 1 nothing is split, and nothing collides.
    assert partition_spec("a/b", ("heads", "mlp"), (8, 8), RULES, mesh_of(expert=4)) == P(None, None)


def test_size_that_does_not_divide():
    with pytest.raises(
        ConfigError, match=r"a/b: the dim 'batch' of size 6 cannot be cut in 4 over data x ex"
    ):
        partition_spec("a/b", ("batch",), (6,), RULES, EVERY_AXIS)
    with pytest.raises(ConfigError, match="choose a size that 2 divides"):
        partition_spec("a/b", ("heads",), (5,), RULES, EVERY_AXIS)


def test_axes_of_a_spec():
    assert axes_of(P(None, ("data", "expert"), "tensor")) == ("data", "expert", "tensor")
    assert axes_of(P()) == ()


@pytest.mark.parametrize(
    ("names", "shape", "rest_spec", "rest_dim", "rest_axes", "sum_axes"),
    [
        # data and expert replicate w_q; its whole dims are embed (64) and head_width (16): the larger.
        (W_Q, (4, 64, 8, 16), P("pipe", REST, "tensor", None), 1, REST, ()),
        # Among equals the later dim.
        (W_Q, (4, 16, 64, 16), P("pipe", None, "tensor", REST), 3, REST, ()),
        # 66 is larger, but 4 does not divide it.
        (W_Q, (4, 66, 16, 16), P("pipe", None, "tensor", REST), 3, REST, ()),
        # Neither divides: replicated, its gradient's parts are summed over both.
        (W_Q, (4, 66, 16, 18), P("pipe", None, "tensor", None), None, (), REST),
        # The experts use the expert axis: only data is left.
        (W_UP, (4, 8, 64, 32), P("pipe", "expert", "data", "tensor"), 2, ("data",), ()),
        # Held alike by all stages: split over data and expert, summed over pipe.
        (("vocab", "embed"), (512, 64), P("tensor", REST), 1, REST, ("pipe",)),
        # 8,191 elements are too few to split, 8,192 are not.
        (("embed",), (8191,), P(None), None, (), ("pipe", "data", "expert", "tensor")),
        (("embed",), (8188,), P(None), None, (), ("pipe", "data", "expert", "tensor")),
        (("embed",), (8192,), P(REST), 0, REST, ("pipe", "tensor")),
    ],
)
def test_rest_layout_by_hand(names, shape, rest_spec, rest_dim, rest_axes, sum_axes):
    layout = leaf_layout("w", names, shape, RULES, EVERY_AXIS, REST)
    assert layout.shape == shape
    assert layout.spec == partition_spec("w", names, shape, RULES, EVERY_AXIS)
    assert (layout.rest_spec, layout.rest_dim) == (rest_spec, rest_dim)
    assert (layout.rest_axes, layout.sum_axes) == (rest_axes, sum_axes)


def test_rest_layout_without_rest_axes_is_that_of_use():
    layout = leaf_layout("w", W_Q, (4, 64, 8, 16), RULES, EVERY_AXIS, ())
    assert layout.rest_spec == layout.spec == P("pipe", None, "tensor", None)
    assert (layout.rest_dim, layout.rest_axes, layout.sum_axes) == (None, (), ("data", "expert"))


def test_rest_axes_of_size_one_are_left_out():
    layout = leaf_layout("w", W_Q, (4, 64, 8, 16), RULES, mesh_of(expert=4, tensor=2), REST)
    assert (layout.rest_spec, layout.rest_axes) == (P(None, "expert", "tensor", None), ("expert",))
    alone = leaf_layout("w", W_Q, (4, 64, 8, 16), RULES, mesh_of(), REST)
    assert (alone.rest_spec, alone.rest_axes, alone.sum_axes) == (P(None, None, None, None), (), ())


def held(shape: tuple[int, ...], spec: P, mesh: Mesh) -> np.ndarray:
    """How many devices hold each element."""
    count = np.zeros(shape, int)
    for index in NamedSharding(mesh, spec).devices_indices_map(shape).values():
        count[index] += 1
    return count


@pytest.mark.parametrize(
    "sizes", [{"expert": 16}, {"pipe": 2, "tensor": 8}, {"pipe": 2, "data": 2, "expert": 2, "tensor": 2}]
)
def test_every_parameter_is_split_exactly(sizes):
    """Each element lies on as many devices as the spec leaves axes unused, at rest and in use; and every axis
    either splits a parameter, or is one over which its gradient is summed."""
    cfg = ModelConfig(num_layers=4, d_model=64, num_heads=8, num_experts=16, expert_hidden=64, vocab_size=272,
                      num_shared_experts=1, expert_type="gated")  # fmt: skip
    deployment = create(cfg, DeploymentConfig(**sizes))
    mesh, present = deployment.mesh, {axis for axis in sizes if sizes[axis] > 1}
    layouts = jax.tree.leaves(deployment.layouts)
    assert len(layouts) == len(jax.tree.leaves(deployment.shapes)) == 16
    for layout in layouts:
        for spec in (layout.spec, layout.rest_spec):
            parts = prod(mesh.shape[axis] for axis in axes_of(spec))
            assert (held(layout.shape, spec, mesh) == mesh.size // parts).all()
        assert {*axes_of(layout.rest_spec), *layout.sum_axes} == present
        assert not {*axes_of(layout.rest_spec)} & {*layout.sum_axes}
        assert {*axes_of(layout.spec), *layout.rest_axes} == {*axes_of(layout.rest_spec)}
