"""The mesh, and collectives over its axes that cost nothing where an axis has size 1."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from moe_jax.config.errors import ConfigError

AXES = ("pipe", "data", "expert", "tensor")
"""Every mesh has these axes, outermost first: neighbours on the tensor axis are the closest devices."""


def make_mesh(sizes: dict[str, int], devices: Sequence | None = None) -> Mesh:
    """A mesh over the first devices needed (all of jax.devices() by default).

    Raises ConfigError when there are too few, saying how many are needed, found, and how to emulate them.
    """
    assert tuple(sizes) == AXES, sizes
    devices = jax.devices() if devices is None else devices
    needed = int(np.prod(list(sizes.values())))
    if len(devices) < needed:
        kind = f" ({devices[0].platform})" if devices else ""
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        raise ConfigError(
            f"deployment: {shape} needs {needed} devices, found {len(devices)}{kind}; use "
            f"a smaller deployment, or emulate them on the CPU: set JAX_PLATFORMS=cpu and "
            f"jax.config.update('jax_num_cpu_devices', {needed}) before the first jax call"
        )
    grid = np.array(devices[:needed], dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


class Axes:
    """Collectives by axis name, for use inside a shard_map over the whole mesh.

    An axis of size 1 is left out of each call, so that a deployment without it has no collective of it.
    """

    def __init__(self, mesh: Mesh):
        self.sizes = dict(mesh.shape)

    def size(self, *axes: str) -> int:
        """Product of the axes' sizes."""
        return int(np.prod([self.sizes[axis] for axis in axes], dtype=int))

    def present(self, *axes: str) -> tuple[str, ...]:
        """Those of the axes that are larger than 1."""
        return tuple(axis for axis in axes if self.sizes[axis] > 1)

    def index(self, axis: str) -> jax.Array:
        """This device's place on the axis, int32 scalar."""
        return jax.lax.axis_index(axis) if self.sizes[axis] > 1 else jnp.int32(0)

    def sum(self, x, *axes: str):
        """All-reduce (sum) of an array or a tree of arrays."""
        axes = self.present(*axes)
        return jax.lax.psum(x, axes) if axes else x

    def max(self, x, *axes: str):
        """All-reduce (maximum); has no gradient."""
        axes = self.present(*axes)
        return jax.lax.pmax(x, axes) if axes else x

    def gather(self, x: jax.Array, dim: int, *axes: str) -> jax.Array:
        """All-gather along a dim."""
        axes = self.present(*axes)
        return jax.lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x

    def scatter_sum(self, x: jax.Array, dim: int, *axes: str) -> jax.Array:
        """Reduce-scatter (sum) along a dim."""
        axes = self.present(*axes)
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True) if axes else x
