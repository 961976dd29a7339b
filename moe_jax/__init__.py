"""One mixture-of-experts transformer, trained and served under any mix of parallelisms.

The names of :data:`__all__` are the public API. They are imported on first use, so that ``import moe_jax``
and everything under :mod:`moe_jax.config` stay free of jax and take milliseconds.
"""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES: dict[str, str] = {
    "Model": "moe_jax.api",
    "build": "moe_jax.api",
    "load": "moe_jax.api",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public names: {sorted(__all__)}"
        )
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access is a plain lookup
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
