"""The mesh, and collectives over its axes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from moe_jax.config.errors import ConfigError
from moe_jax.parallel.mesh import AXES, Axes, make_mesh
from moe_jax.plan.hlo import collectives


def sizes(pipe: int = 1, data: int = 1, expert: int = 1, tensor: int = 1) -> dict[str, int]:
    return {"pipe": pipe, "data": data, "expert": expert, "tensor": tensor}


def on(mesh: Mesh, f: Callable) -> jax.stages.Wrapped:
    """f(axes, part) on every device, an array of [devices, ...] cut into one part for each."""
    spec = PartitionSpec(AXES)
    body = jax.shard_map(
        lambda x: f(Axes(mesh), x[0])[None], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    return jax.jit(body)


def test_tensor_neighbours_are_adjacent_devices():
    mesh = make_mesh(sizes(pipe=2, data=2, expert=2, tensor=2))
    assert mesh.axis_names == ("pipe", "data", "expert", "tensor")
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids, np.arange(16).reshape(2, 2, 2, 2))


def test_the_first_devices_given_are_used():
    mesh = make_mesh(sizes(expert=2), jax.devices()[5:9])
    assert [device.id for device in mesh.devices.flat] == [5, 6]


def test_too_few_devices_says_needed_found_and_how():
    with pytest.raises(ConfigError) as error:
        make_mesh(sizes(pipe=4, expert=16))
    message = str(error.value)
    assert "pipe 4 x expert 16 needs 64 devices, found 16 (cpu)" in message
    assert "data" not in message
    assert "JAX_PLATFORMS=cpu" in message
    assert "jax.config.update('jax_num_cpu_devices', 64)" in message


def test_too_few_of_the_devices_given():
    with pytest.raises(ConfigError, match="tensor 4 needs 4 devices, found 3"):
        make_mesh(sizes(tensor=4), jax.devices()[:3])


def test_sizes_and_axes_that_are_present():
    axes = Axes(make_mesh(sizes(pipe=2, expert=4)))
    assert axes.size() == 1
    assert axes.size("data") == 1
    assert axes.size("pipe", "expert") == 8
    assert axes.present(*AXES) == ("pipe", "expert")
    assert axes.present("expert", "data") == ("expert",)


def test_an_axis_that_does_not_exist_is_refused():
    with pytest.raises(KeyError, match="experts"):
        Axes(make_mesh(sizes())).size("experts")


def every_collective(axes: Axes, x: jax.Array) -> jax.Array:
    x = axes.sum({"a": x}, *AXES)["a"] + axes.max(x, *AXES)
    x = axes.scatter_sum(axes.gather(x, 0, "expert", "tensor"), 0, "expert", "tensor")
    return x + axes.index("pipe").astype(x.dtype)


def test_one_device_needs_no_collectives():
    x = np.random.default_rng(0).standard_normal((1, 8, 3))
    run = on(make_mesh(sizes()), every_collective)
    np.testing.assert_array_equal(run(x), 2 * x)
    assert collectives(run.lower(x).compile().as_text()) == []


def test_axes_of_size_one_are_left_out_of_the_groups():
    """Over expert and data, with data 1: groups are those of expert alone, one collective."""
    x = np.random.default_rng(0).standard_normal((8, 4, 3))
    run = on(make_mesh(sizes(expert=4, tensor=2)), lambda axes, x: axes.sum(x, "data", "expert", "pipe"))
    (found,) = collectives(run.lower(x).compile().as_text())
    assert (found.kind, found.count, found.group_size) == ("all-reduce", 1, 4)
    # Device 2 e + t: the sum is over e.
    expected = np.broadcast_to(x.reshape(4, 2, 4, 3).sum(0), (4, 2, 4, 3)).reshape(8, 4, 3)
    np.testing.assert_allclose(run(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("names", [("tensor",), ("data", "expert"), ("expert", "pipe")])
def test_values_of_collectives(names):
    """Against numpy on [pipe, data, expert, tensor, ...]; parts lie in the order in which axes are named."""
    shape = (2, 2, 2, 2)
    mesh = make_mesh(dict(zip(AXES, shape, strict=True)))
    x = np.random.default_rng(1).standard_normal((16, 8, 3))
    grid = x.reshape(*shape, 8, 3)
    dims = tuple(AXES.index(name) for name in names)
    parts = 2 ** len(names)

    def whole(over: np.ndarray) -> np.ndarray:
        return np.broadcast_to(over, grid.shape).reshape(16, 8, 3)

    total = whole(grid.sum(dims, keepdims=True))
    got = {
        name: on(mesh, f)(x)
        for name, f in {
            "sum": lambda axes, x: axes.sum(x, *names),
            "max": lambda axes, x: axes.max(x, *names),
            "gather": lambda axes, x: axes.gather(x, 1, *names),
            "scatter_sum": lambda axes, x: axes.scatter_sum(x, 0, *names),
            "index": lambda axes, x: jnp.stack([axes.index(name) for name in AXES]),
        }.items()
    }
    np.testing.assert_allclose(got["sum"], total, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(got["max"], whole(grid.max(dims, keepdims=True)))
    for device, place in enumerate(np.ndindex(*shape)):
        assert got["index"][device].tolist() == list(place)
        rank = int(np.ravel_multi_index([place[dim] for dim in dims], (2,) * len(dims)))
        piece = slice(rank * 8 // parts, (rank + 1) * 8 // parts)
        np.testing.assert_allclose(got["scatter_sum"][device], total[device][piece], rtol=0, atol=1e-12)
        # All members of this device's group, the first named axis outermost.
        members = []
        for steps in np.ndindex(*(2,) * len(dims)):
            other = list(place)
            for dim, step in zip(dims, steps, strict=True):
                other[dim] = step
            members.append(grid[tuple(other)])
        np.testing.assert_array_equal(got["gather"][device], np.concatenate(members, axis=1))
