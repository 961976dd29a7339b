"""The arrays of a state by name, and whether those of a checkpoint are the ones wanted."""

from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.checkpoint.errors import CheckpointError

Leaf = dict[str, Any]
"""``{"shape": [int, ...], "dtype": "float32"}``."""

_DTYPES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("bfloat16", "float16", "float32", "float64"),
}
_MAX_NAMED = 4


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of `tree` by path, as in ``params/blocks/router/w``."""
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths_and_leaves}


def describe_leaves(tree: Any) -> dict[str, Leaf]:
    """Shape and dtype of every array in `tree`, by name.

    Raises:
        CheckpointError: a leaf that is no jax.Array of a plain dtype.
    """
    arrays = named_leaves(tree)
    for name, array in arrays.items():
        if not isinstance(array, jax.Array):
            raise CheckpointError(f"{name}: is a {type(array).__name__}; only jax arrays can be saved")
        if str(array.dtype) not in _DTYPES:
            raise CheckpointError(
                f"{name}: has dtype {array.dtype}, which cannot be saved; of a key save jax.random.key_data"
            )
    return {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()}


def check_fit(saved: Mapping[str, Leaf], wanted_tree: Any, where: str) -> None:
    """Refuses a restore that would not give exactly the arrays of `wanted_tree`; reads no data.

    `wanted_tree` holds jax.ShapeDtypeStructs with shardings.

    Raises:
        CheckpointError: a missing or superfluous array, another shape or dtype, or no sharding.
    """
    wanted = named_leaves(wanted_tree)
    problems = [f"{name}: not in the checkpoint" for name in wanted if name not in saved]
    problems += [f"{name}: in the checkpoint, not wanted" for name in saved if name not in wanted]
    fix = "restore into the model and optimizer of the config in its meta"
    for name in wanted.keys() & saved.keys():
        have, want = _shown(saved[name]["dtype"], saved[name]["shape"]), wanted[name]
        if have != _shown(want.dtype, want.shape):
            problems.append(f"{name}: checkpoint {have}, wanted {_shown(want.dtype, want.shape)}")
            if list(want.shape) == saved[name]["shape"]:
                fix = f"restore as {saved[name]['dtype']} (model.param_dtype) and convert afterwards"
        elif jax.dtypes.canonicalize_dtype(want.dtype) != want.dtype:
            problems.append(f"{name}: {want.dtype} needs 64-bit mode")
            fix = 'switch it on: jax.config.update("jax_enable_x64", True)'
        elif getattr(want, "sharding", None) is None:
            problems.append(f"{name}: wanted without a sharding")
            fix = "give jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
    if problems:
        problems.sort()
        more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise CheckpointError(f"{where} does not fit: {'; '.join(problems[:_MAX_NAMED])}{more}; {fix}")


def _shown(dtype: object, shape: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"
