"""Command lines from dataclasses, by tyro; user errors as exit code 2 and one last line ``error: ...``.

A script is::

    def main(argv: list[str]) -> int:
        request = parse_run(argv, NoOptions, prog="train.py", description="Train a model.")
        ...

    if __name__ == "__main__":
        sys.exit(run_script(main))
"""

import contextlib
import dataclasses
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import tyro

from moe_jax.config.arguments import (
    field_of_option,
    given_options,
    strange_options,
    unknown_option_error,
    value_error,
)
from moe_jax.config.errors import ConfigError, one_line
from moe_jax.config.fields import all_fields, walk
from moe_jax.config.load import ResolvedRun, available, override, resolve
from moe_jax.config.render import to_yaml
from moe_jax.config.schema import RunConfig

T = TypeVar("T")
USER_ERROR = 2
_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class NoOptions:
    """For a script without options of its own."""


@dataclass(frozen=True)
class CommonOptions:
    """What every script understands."""

    debug: _Flag = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class RunOptions:
    """Where a run's config comes from; the single fields below come last and win."""

    config: str | None = None
    """Run file: a path, or a name in configs/runs."""
    model: str | None = None
    """Model file: a path, or a name in configs/models; model fields in the run file win over it."""
    deployment: str | None = None
    """A name in configs/deployments, a path, or mesh sizes such as pipe=2,expert=4,tensor=2; it replaces the
    run file's deployment."""
    print_config: _Flag = False
    """Print the resolved config as YAML, with where each value came from, and stop."""


@dataclass(frozen=True)
class RunRequest(Generic[T]):
    """What a command line asked for."""

    resolved: ResolvedRun
    """The checked config, and where its values came from."""
    options: T
    """The script's own options."""

    @property
    def config(self) -> RunConfig:
        """The checked config."""
        return self.resolved.config


def run_script(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call `main` with the arguments (those of the process by default) and return its exit code.

    A ConfigError becomes exit code 2 and, as the last line of stderr, ``error: ...``; with ``--debug`` the
    traceback comes before it. Any other exception is a bug or a failing machine and passes through.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return main(argv)
    except ConfigError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)
        return USER_ERROR


def parse_options(argv: Sequence[str], options: type[T], *, prog: str, description: str) -> T:
    """An instance of the flat dataclass `options` from the command line, which also takes ``--debug``.

    ``--help`` prints and raises SystemExit(0). Raises ConfigError.
    """
    return _parse(argv, {"own": options, "common": CommonOptions}, None, prog, description).own


def parse_run(argv: Sequence[str], options: type[T], *, prog: str, description: str) -> RunRequest[T]:
    """The run that the command line asks for, checked, and the script's own `options` (a flat dataclass).

    ``--print-config`` and ``--help`` print and raise SystemExit(0). Raises ConfigError.
    """
    given = given_options(argv)
    first = {option: values[0] for option, values in given.items() if values}
    resolved = resolve(first.get("config"), first.get("model"), first.get("deployment"))
    kinds = {"sources": RunOptions, "own": options, "common": CommonOptions}
    parsed = _parse(argv, kinds, resolved.config, prog, description)
    if parsed.sources.config is None and parsed.sources.model is None:
        names = ", ".join(available("runs"))
        raise ConfigError(f"config: no run is named; use --config with a file or one of: {names}")
    values = dict(walk(parsed.run))
    fields = [field for field in map(field_of_option, given) if field in values]
    resolved = override(resolved, {field: values[field] for field in fields})
    if parsed.sources.print_config:
        with _reader_may_leave():
            print(to_yaml(resolved), end="", flush=True)
        raise SystemExit(0)
    return RunRequest(resolved, parsed.own)


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Printing into ``| head`` ends the process quietly when head has seen enough."""
    try:
        yield
    except BrokenPipeError:
        # The flush at exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _parse(
    argv: Sequence[str], kinds: dict[str, type], run: RunConfig | None, prog: str, description: str
) -> Any:
    """An object with an attribute for each of `kinds`, and `run` given its defaults; options side by side."""
    unprefixed = tyro.conf.arg(name="")
    fields: list[Any] = [(name, Annotated[kind, unprefixed]) for name, kind in kinds.items()]
    options = [field.name for kind in kinds.values() for field in dataclasses.fields(kind)]
    if run is not None:
        fields.append(("run", Annotated[RunConfig, unprefixed], dataclasses.field(default=run)))
        options += all_fields()
    command = dataclasses.make_dataclass("Command", fields)
    complaint = io.StringIO()
    try:
        with _reader_may_leave(), contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                command, args=list(argv), prog=prog, description=description, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        strange = strange_options(argv, options)
        error = unknown_option_error(strange, argv, options) if strange else None
        raise error or value_error(complaint.getvalue(), argv) from None
    if unknown:
        raise unknown_option_error(unknown, argv, options)
    sys.stderr.write(complaint.getvalue())
    return parsed
