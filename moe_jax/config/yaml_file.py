"""Reading one YAML file strictly: what a person wrote is what the config gets, or it is refused."""

import re
from pathlib import Path
from typing import Any

import yaml

from moe_jax.config.errors import ConfigError, one_line

MAX_FILE_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a plain scalar, and no duplicate keys.

    YAML 1.1, PyYAML's own, reads 1e-3 as text, 1:30 as 90, 010 as 8 and ``no`` as false.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way; filled below, then only read)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The node's mapping; a key that is no text or comes twice is an error."""
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            mark = key_node.start_mark
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is no name", mark)
            if key in lines:
                text = f"{key!r} is given twice, first in line {lines[key]}"
                raise yaml.constructor.ConstructorError(None, None, text, mark)
            lines[key] = mark.line + 1
        return super().construct_mapping(node, deep)


_SCALARS = {
    "bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    "int": ("-+0123456789", r"[-+]?(0|[1-9][0-9_]*)"),
    "float": (
        "-+.0123456789",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
    "null": (["~", "n", "N", ""], r"~|null|Null|NULL|"),
}
for _tag, (_first, _pattern) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that the file holds (JSON is read too); raises ConfigError naming the file and the line."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes; this is no config file")
    try:
        document = parse_yaml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8 text") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if document is None:
        raise ConfigError(f"{path}: the file is empty; it must hold fields and values, e.g. num_layers: 4")
    if not isinstance(document, dict):
        text = one_line(repr(document))[:40]
        raise ConfigError(f"{path}: holds {text}; it must hold fields and values, e.g. num_layers: 4")
    return document


def parse_yaml(text: str) -> Any:
    """What one YAML document holds; raises ValueError with the line and the reason."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(line + one_line(error.problem or error.context or "not YAML")) from error
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {one_line(str(error))}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply for a config") from error
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        # What PyYAML lets through from int("x") and the like under an explicit tag.
        raise ValueError(f"a value is too large or does not fit its tag: {one_line(str(error))}") from error
