"""A resolved config as YAML text, each value with where it came from; the text can be loaded again."""

import json
from typing import Any

from moe_jax.config.fields import walk
from moe_jax.config.load import ResolvedRun
from moe_jax.config.yaml_file import parse_yaml

_COMMENT_COLUMN = 40


def to_yaml(resolved: ResolvedRun) -> str:
    """The whole config as YAML, ``name: value  # source`` a line; ``--config`` reads it back unchanged."""
    lines: list[str] = []
    for field, value in walk(resolved.config):
        section, _, name = field.partition(".")
        if f"{section}:" not in lines:
            lines.append(f"{section}:")
        source = " ".join(resolved.provenance[field].splitlines())
        lines.append(f"{f'  {name}: {_scalar(value)}':<{_COMMENT_COLUMN}}  # {source}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _reads_as_itself(value):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _reads_as_itself(text: str) -> bool:
    try:
        return parse_yaml(f"key: {text}") == {"key": text}
    except ValueError:
        return False
