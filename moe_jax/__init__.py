"""One mixture-of-experts transformer, trained and served under any mix of parallelisms.

The names of :data:`__all__` are the public API. They are imported on first use, so that ``import moe_jax``
and everything under :mod:`moe_jax.config` stay free of jax and take milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_jax.api import Model, build, load

__version__ = "0.1.0"

__all__ = ["Model", "__version__", "build", "load"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {__all__}")
    value = getattr(import_module("moe_jax.api"), name)
    globals()[name] = value  # the next access is a plain lookup
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
