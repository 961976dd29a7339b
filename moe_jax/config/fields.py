"""The fields of the config dataclasses: their names, their types, and strict conversion to and from dicts.

Strict means: no text becomes a number, no number becomes a truth value, and an unknown name is refused. The
only liberties are an int where a float is wanted, and a list where a tuple is.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moe_jax.config.errors import ConfigError, Problem, did_you_mean
from moe_jax.config.schema import DataConfig, DeploymentConfig, ModelConfig, RunConfig, TrainConfig

Section = ModelConfig | DeploymentConfig | TrainConfig | DataConfig
SECTIONS: Mapping[str, type[Section]] = types.MappingProxyType(
    {"model": ModelConfig, "deployment": DeploymentConfig, "train": TrainConfig, "data": DataConfig}
)
_KIND = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


@functools.cache
def section_fields(section: str) -> Mapping[str, Any]:
    """Field name -> type of one section (``model``, ``deployment``, ``train``, ``data``)."""
    return types.MappingProxyType(get_type_hints(SECTIONS[section]))


@functools.cache
def all_fields() -> Mapping[str, Any]:
    """Dotted field name -> type, over all sections in order."""
    fields = {
        f"{section}.{name}": kind for section in SECTIONS for name, kind in section_fields(section).items()
    }
    return types.MappingProxyType(fields)


def describe_type(hint: Any) -> str:
    """What a field of this type may hold, in words: ``a whole number or null``."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe_type(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of texts"
    return _KIND[hint]


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if origin is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def type_problem(field: str, value: object, hint: Any, source: str = "") -> Problem | None:
    """The reason why `value` has not the type of the dotted `field`, or None when it has."""
    if _fits(value, hint):
        return None
    fix = ""
    if get_origin(hint) is Literal and isinstance(value, str):
        fix = did_you_mean(value, get_args(hint))
    elif get_origin(hint) is tuple and isinstance(value, str):
        fix = "write it as a list, even of one"
    elif value in ("None", "none") and type(None) in get_args(hint):
        fix = "write null"
    elif isinstance(value, str) and value[:1].isdigit():
        fix = "give it without quotes or units"
    return Problem(field, value, f"must be {describe_type(hint)}", fix, source)


def convert(field: str, value: Any, hint: Any, source: str = "") -> Any:
    """`value` as the dotted `field` stores it (an int becomes the float that is wanted, a list a tuple).

    Raises ConfigError when it has another type.
    """
    if problem := type_problem(field, value, hint, source):
        raise ConfigError(problem)
    if hint is float and isinstance(value, int):
        try:
            return float(value)
        except OverflowError:  # beyond what any range allows; the check says so
            return math.inf if value > 0 else -math.inf
    return tuple(value) if get_origin(hint) is tuple else value


def unknown_field(field: str, value: object, source: str = "") -> Problem:
    """The problem of a dotted name that is no field."""
    section, _, _ = field.partition(".")
    names = [*all_fields(), *SECTIONS]
    fix = did_you_mean(field, names)
    if not fix:
        known = section_fields(section) if section in SECTIONS else SECTIONS
        fix = f"{section if section in SECTIONS else 'a run'} has {', '.join(known)}"
    return Problem(field, value, "no such field", fix, source)


def read_section(section: str, values: object, source: str = "") -> dict[str, Any]:
    """The converted values of a section's mapping, by dotted name.

    Raises ConfigError naming the first field that is unknown or has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(Problem(section, values, "must be a mapping of fields to values", source=source))
    hints = section_fields(section)
    converted = {}
    for name, value in values.items():
        field = f"{section}.{name}"
        if name not in hints:
            raise ConfigError(unknown_field(field, value, source))
        converted[field] = convert(field, value, hints[name], source)
    return converted


def build_run(values: Mapping[str, Any]) -> RunConfig:
    """The RunConfig of converted values by dotted name; fields that are not there keep their defaults."""
    by_section: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for field, value in values.items():
        section, _, name = field.partition(".")
        by_section[section][name] = value
    parts: dict[str, Any] = {section: kind(**by_section[section]) for section, kind in SECTIONS.items()}
    return RunConfig(**parts)


def mesh_label(deployment: DeploymentConfig) -> str:
    """The mesh in short: ``ep16``, ``pp2ep4tp2``, ``single``; axes of size 1 are left out."""
    axes = {"pp": deployment.pipe, "dp": deployment.data, "ep": deployment.expert, "tp": deployment.tensor}
    return "".join(f"{short}{size}" for short, size in axes.items() if size > 1) or "single"


def walk(cfg: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every dotted field name of `cfg` with its value, in order."""
    for section in SECTIONS:
        part = getattr(cfg, section)
        for field in dataclasses.fields(part):
            yield f"{section}.{field.name}", getattr(part, field.name)


def to_dict(cfg: RunConfig) -> dict[str, dict[str, Any]]:
    """`cfg` as nested dicts that JSON and YAML can hold (tuples as lists); :func:`from_dict` reads them."""
    nested: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for field, value in walk(cfg):
        section, _, name = field.partition(".")
        nested[section][name] = list(value) if isinstance(value, tuple) else value
    return nested


def from_dict(values: object, source: str = "") -> RunConfig:
    """The RunConfig that :func:`to_dict` wrote; types are checked, ranges are not (``check_run`` does that).

    Every section must be there and no unknown field; a field that is missing (a config written before the
    field existed) takes its default. `source` is named in errors. Raises ConfigError.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(Problem("config", values, "must be a mapping of sections", source=source))
    for section in values:
        if section not in SECTIONS:
            raise ConfigError(unknown_field(str(section), values[section], source))
    converted: dict[str, Any] = {}
    for section in SECTIONS:
        if section not in values:
            raise ConfigError(Problem(section, None, "this section is missing", source=source))
        converted |= read_section(section, values[section], source)
    return build_run(converted)
