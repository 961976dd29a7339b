"""From files, names and overrides to one RunConfig, and where each of its values came from.

Later sources win: the dataclasses' defaults, the model file, the run file, the deployment, single fields.
A file is given by path or by name; names are looked up in ``configs/`` in the current folder, then beside the
installed package (that is the repository root of an editable install).
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_jax.config.checks import check_run
from moe_jax.config.errors import ConfigError, Problem, did_you_mean
from moe_jax.config.fields import (
    SECTIONS,
    all_fields,
    build_run,
    convert,
    mesh_label,
    read_section,
    unknown_field,
    walk,
)
from moe_jax.config.ranges import RANGES
from moe_jax.config.schema import DeploymentConfig, ModelConfig, RunConfig
from moe_jax.config.yaml_file import read_yaml

AXES = ("pipe", "data", "expert", "tensor")
COMMAND_LINE = "command line"
_Layer = tuple[dict[str, Any], str]  # values by dotted field, and where they come from
_FLAG = {"runs": "config", "models": "model", "deployments": "deployment"}


@dataclass(frozen=True)
class ResolvedRun:
    """A run's config, and for every dotted field the source that set it."""

    config: RunConfig
    provenance: Mapping[str, str]
    """``model.top_k`` -> ``default``, a file's path, ``deployment pipe=2,...`` or ``command line``."""


def config_folders(kind: str) -> list[Path]:
    """Where names of a kind (``runs``, ``models``, ``deployments``) are looked up, in order."""
    roots = [Path.cwd(), Path(__file__).resolve().parents[2]]
    return list(dict.fromkeys(root / "configs" / kind for root in roots))


def available(kind: str) -> list[str]:
    """Names of all config files of a kind."""
    return sorted({path.stem for folder in config_folders(kind) for path in folder.glob("*.yaml")})


def find_config(kind: str, name: str) -> Path:
    """The file that `name` means: a path, or a name in one of the folders of its `kind`.

    Raises ConfigError with the nearest name, the names there are and the folders searched.
    """
    path = Path(name)
    # os.path and not Path: a name that is too long or holds a NUL is simply not there.
    if (path.suffix or os.sep in name) and os.path.exists(name):
        return path
    if os.sep not in name:
        for folder in config_folders(kind):
            if os.path.isfile(file := folder / f"{name}.yaml"):
                return file
    names = available(kind)
    folders = " and ".join(_shown(folder) for folder in config_folders(kind))
    allowed = f"no such file or name; {', '.join(names) or 'none'} found in {folders}"
    raise ConfigError(Problem(_FLAG[kind], name, allowed, did_you_mean(path.stem, names)))


def _shown(path: Path) -> str:
    """A path as a person would type it: relative to the current folder where it lies inside."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def load_run(
    config: str | None = None,
    model: str | None = None,
    deployment: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ResolvedRun:
    """The resolved and checked config of a run.

    Args:
        config: run file, by path or name; None means the defaults.
        model: model file, by path or name; None means what the run file names.
        deployment: name, path, or sizes such as ``pipe=2,expert=4``; it replaces the run file's deployment.
        overrides: dotted field -> value.

    Raises ConfigError.
    """
    return override(resolve(config, model, deployment), overrides or {})


def resolve(config: str | None, model: str | None, deployment: str | None) -> ResolvedRun:
    """:func:`load_run` without single fields, and without its last step, the checks."""
    values: dict[str, Any] = {}
    provenance: dict[str, str] = dict.fromkeys(all_fields(), "default")
    for layer, source in _layers(config, model, deployment):
        values |= layer
        provenance |= dict.fromkeys(layer, source)
    return _relabel(ResolvedRun(build_run(values), provenance))


def _layers(config: str | None, model: str | None, deployment: str | None) -> Iterator[_Layer]:
    """What the files say, later ones over earlier ones."""
    path = find_config("runs", config) if config is not None else None
    run = read_yaml(path) if path else {}
    source = _shown(path) if path else ""
    for section in run:
        if section not in SECTIONS:
            raise ConfigError(unknown_field(section, run[section], source))
    # A text in place of fields names a file; one on the command line stands in for it.
    named = {name: run.pop(name) for name in ("model", "deployment") if isinstance(run.get(name), str)}
    model = named.get("model") if model is None else model
    deployment = named.get("deployment") if deployment is None else deployment
    if model is not None:
        yield _read_named("models", model)
    for section, part in run.items():
        layer = read_section(section, part, source)
        # A deployment is one choice: a row given later replaces it whole, never half of it.
        if section != "deployment" or deployment is None:
            yield layer, source
    if deployment is not None:
        yield _read_deployment(deployment)


def override(resolved: ResolvedRun, overrides: Mapping[str, Any], source: str = COMMAND_LINE) -> ResolvedRun:
    """`resolved` with single dotted fields set by `source`, checked. Raises ConfigError."""
    values = dict(walk(resolved.config))
    hints = all_fields()
    for field, value in overrides.items():
        if field not in hints:
            raise ConfigError(unknown_field(field, value, source))
        values[field] = convert(field, value, hints[field], source)
    provenance = {**resolved.provenance, **dict.fromkeys(overrides, source)}
    done = _relabel(ResolvedRun(build_run(values), provenance))
    sources = {field: origin for field, origin in provenance.items() if origin != "default"}
    check_run(done.config, sources)
    return done


def _relabel(resolved: ResolvedRun) -> ResolvedRun:
    """A mesh that was changed after it was named gets the name of its sizes; a row's name must not lie."""
    provenance, deployment = resolved.provenance, resolved.config.deployment
    named_by = provenance["deployment.name"]
    unchanged = all(provenance[f"deployment.{axis}"] in ("default", named_by) for axis in AXES)
    if unchanged or named_by == COMMAND_LINE:
        return resolved
    config = replace(resolved.config, deployment=replace(deployment, name=mesh_label(deployment)))
    return ResolvedRun(config, {**provenance, "deployment.name": "the mesh's sizes"})


def load_model(name: str) -> ModelConfig:
    """The model of a file in ``configs/models``, by path or name; not checked. Raises ConfigError."""
    values, _ = _read_named("models", name)
    return build_run(values).model


def parse_deployment(text: str) -> DeploymentConfig:
    """The deployment of a name or path (``ep16``), or of axis sizes (``pipe=2,expert=4,tensor=2``).

    Whether a model fits on it is for ``check_deployment``. Raises ConfigError.
    """
    values, _ = _read_deployment(text)
    return build_run(values).deployment


def _read_named(kind: str, name: str) -> _Layer:
    path = find_config(kind, name)
    section = {"models": "model", "deployments": "deployment"}[kind]
    row = read_yaml(path)
    if section == "deployment":
        row = {"name": path.stem, **row}
    return read_section(section, row, _shown(path)), _shown(path)


def _read_deployment(text: str) -> _Layer:
    if "=" not in text:
        return _read_named("deployments", text)
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or axis not in AXES:
            fix = did_you_mean(axis, AXES) if equals else "write it as pipe=2,expert=4,tensor=2"
            raise ConfigError(Problem("deployment", text, f"{part!r} is no size of {', '.join(AXES)}", fix))
        if axis in sizes:
            raise ConfigError(Problem("deployment", text, f"axis {axis} is given twice", "give it once"))
        limits = RANGES[f"deployment.{axis}"]
        if not (size.isascii() and size.isdigit() and len(size) < 10 and int(size) in limits):
            allowed = f"the size must be a whole number, {limits}"
            raise ConfigError(Problem(f"deployment.{axis}", size, allowed, f"e.g. {axis}=2"))
        sizes[axis] = int(size)
    deployment = DeploymentConfig(**sizes)
    values = {f"deployment.{axis}": size for axis, size in sizes.items()}
    return {**values, "deployment.name": mesh_label(deployment)}, f"deployment {text}"
