"""What the tokens of a command line say about the config's fields, and why they were refused, in one line."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from moe_jax.config.errors import ConfigError, Problem, did_you_mean
from moe_jax.config.fields import SECTIONS, all_fields, describe_type, type_problem
from moe_jax.config.load import COMMAND_LINE


def given_options(argv: Sequence[str]) -> dict[str, list[str]]:
    """The options on a command line, as ``train.run_dir``, each with the values that follow it last."""
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for token in itertools.takewhile(lambda token: token != "--", argv):
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            values = given[name.replace("-", "_")] = [value] if equals else []
        else:
            values.append(token)
    return given


def field_of_option(option: str) -> str:
    """The dotted field that an option sets: ``train.no_resume`` -> ``train.resume``."""
    positive = _without_no(option)
    return positive if option not in all_fields() and positive in all_fields() else option


def _without_no(option: str) -> str:
    return re.sub(r"(^|\.)no_", r"\1", option, count=1)


def strange_options(argv: Sequence[str], options: Sequence[str]) -> list[str]:
    """The options on a command line, as they are typed, that are none of `options`."""
    return [flag(name) for name in given_options(argv) if not {name, _without_no(name)} & set(options)]


def flag(option: str) -> str:
    """An option as it is typed: ``--train.run-dir``."""
    return "--" + option.replace("_", "-")


def value_error(complaint: str, argv: Sequence[str]) -> ConfigError:
    """The error for tyro's `complaint` (a box of text) about an option's value or the lack of one."""
    hints = all_fields()
    complaint = re.sub(r"\x1b\[[0-9;]*m", "", complaint)  # colours
    for option in re.findall(r"--([A-Za-z][\w.-]*)", complaint):
        field = field_of_option(option.replace("-", "_"))
        if field not in hints:
            continue
        section, _, name = field.partition(".")
        default = next(f.default for f in dataclasses.fields(SECTIONS[section]) if f.name == name)
        example = f"e.g. {flag(field)} {default}"
        values = given_options(argv).get(field, [])
        value = " ".join(values) if values else None
        problem = type_problem(field, value, hints[field], COMMAND_LINE) if values else None
        fix = problem.fix if problem and problem.fix.startswith("did you mean") else example
        allowed = describe_type(hints[field]).replace("null", "None")
        lead = "must be" if values else "the value is missing; it must be"
        return ConfigError(Problem(field, value, f"{lead} {allowed}", fix, COMMAND_LINE))
    return ConfigError(_boxed_text(complaint))


def unknown_option_error(unknown: Sequence[str], argv: Sequence[str], options: Sequence[str]) -> ConfigError:
    """The error for tokens that no option took; `options` are all there are, with underscores."""
    names = [token for token in unknown if token.startswith("-")]
    if not names:
        return ConfigError(_stray_value(unknown[0], argv))
    given = given_options(argv)
    problems = []
    for name in dict.fromkeys(name.partition("=")[0] for name in names):
        option = name.lstrip("-").replace("-", "_")
        hint = re.sub(r"mean (\S+)\?", lambda found: f"mean {flag(found[1])}?", did_you_mean(option, options))
        value = " ".join(given.get(option, []))
        problems.append(Problem(name, value, "no such option", hint or "see --help", COMMAND_LINE))
    return ConfigError(*problems)


def _stray_value(token: str, argv: Sequence[str]) -> Problem:
    hints = all_fields()
    for option, values in given_options(argv).items():
        field = field_of_option(option)
        if token in values and hints.get(field) is bool:
            section, _, name = field.partition(".")
            fix = f"for true write {flag(field)}, for false {flag(f'{section}.no_{name}')}"
            return Problem(field, token, "takes no value on the command line", fix, COMMAND_LINE)
    return Problem("argument", token, "stands after no option that takes it", "see --help", COMMAND_LINE)


def _boxed_text(box: str) -> str:
    """What a tyro box says first, without its title, in one line; borders may be drawn or blank."""
    rows = [row for row in (line.strip("│ ") for line in box.splitlines()) if row]
    rules = [number for number, row in enumerate(rows) if set(row) <= set("─-")]
    start = 2 if 1 in rules else 1  # without drawn borders, a rule lies below the title
    end = next((number for number in rules if number >= start), len(rows))
    return " ".join(" ".join(rows[start:end]).split())
