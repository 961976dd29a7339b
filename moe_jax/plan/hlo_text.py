"""The text of a compiled XLA program (``jax.jit(f).lower(...).compile().as_text()``) as data.

Strict on purpose: a line that cannot be read is an error, since a skipped line might be a collective.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


class HloError(ValueError):
    """The text is not an XLA program of a form this package knows; the message quotes the place."""


@dataclass(frozen=True)
class ArrayShape:
    """Dtype (XLA's name: f32, bf16, s32, pred, ...) and dims of one array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements of the array."""
        return prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes of the array's elements, without the padding a chip's layout may add."""
        return -(-self.num_elements * _bits(self.dtype) // 8)


@dataclass(frozen=True)
class Instruction:
    """One instruction; a tuple's arrays are flattened into `shapes`."""

    name: str
    shapes: tuple[ArrayShape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: dict[str, str]


@dataclass(frozen=True)
class Module:
    """A program: computations by name, each with its instructions by name, in the order they run."""

    entry: str
    computations: dict[str, dict[str, Instruction]]
    num_devices: int


def parse_module(text: str) -> Module:
    """Read a whole program; raises :class:`HloError` at the first line it cannot read."""
    header = re.match(r"\s*HloModule [^\n]*", text)
    if header is None:
        raise HloError(f"not an XLA program: expected 'HloModule ...' first, found {text[:80]!r}")
    computations: dict[str, dict[str, Instruction]] = {}
    entry = None
    body: dict[str, Instruction] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if body is None:
            if match := _COMPUTATION.match(line):
                body = computations.setdefault(match["name"], {})
                entry = match["name"] if match["entry"] else entry
        elif line.startswith("}"):
            body = None
        elif line.strip():
            try:
                instruction = parse_instruction(line)
            except HloError as error:
                raise HloError(f"line {number}: {error}") from None
            body[instruction.name] = instruction
    if entry is None or body is not None:
        raise HloError("the program has no ENTRY computation, or the text is cut off inside a computation")
    return Module(entry, computations, _num_devices(header[0]))


def parse_instruction(line: str) -> Instruction:
    """Read one line, ``[ROOT] %name = shape opcode(operands), attribute=value, ...``."""
    line = _INDEX_COMMENT.sub("", line)
    head = _HEAD.match(line)
    if head is None:
        raise HloError(f"not an instruction: {line.strip()[:200]!r}")
    shape_end = (
        _closing(line, head.end()) + 1 if line.startswith("(", head.end()) else line.find(" ", head.end())
    )
    opcode = _OPCODE.match(line, shape_end)
    if opcode is None:
        raise HloError(f"no opcode after the shape: {line.strip()[:200]!r}")
    operands_end = _closing(line, opcode.end() - 1)
    attributes = {}
    for piece in _split(line[operands_end + 1 :]):
        key, equals, value = piece.partition("=")
        if equals:
            attributes[key.strip()] = value.strip()
    return Instruction(
        name=head["name"],
        shapes=_shapes(line[head.end() : shape_end]),
        opcode=opcode["opcode"],
        operands=tuple(piece.split()[-1].lstrip("%") for piece in _split(line[opcode.end() : operands_end])),
        attributes=attributes,
    )


_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[^\s({]+) (\(.*\) -> .*)?\{$")
_HEAD = re.compile(r"\s+(ROOT )?%?(?P<name>[^\s=]+) = ")
_OPCODE = re.compile(r" (?P<opcode>[a-z][\w-]*)\(")
_INDEX_COMMENT = re.compile(r"/\*index=\d+\*/")
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[^\]]*)\]")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]')


def _shapes(text: str) -> tuple[ArrayShape, ...]:
    """Every array of a shape; a dynamic dim ``<=16`` counts as its bound."""
    found = []
    for match in _ARRAY.finditer(text):
        dims = match["dims"].replace("<=", "")
        found.append(ArrayShape(match["dtype"], tuple(int(dim) for dim in dims.split(",") if dim)))
    return tuple(found)


def _bits(dtype: str) -> int:
    """Bits of one element: the first number in XLA's name; pred is a byte, tokens hold no data."""
    if dtype == "pred":
        return 8
    if dtype in ("token", "opaque"):
        return 0
    digits = re.search(r"\d+", dtype)
    if digits is None:
        raise HloError(f"unknown dtype {dtype!r}")
    return int(digits[0])


def _num_devices(header: str) -> int:
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
    return prod(int(count) for count in counts)


def _top_level(text: str, start: int = 0) -> Iterator[tuple[str, int]]:
    """Brackets and commas at depth 0 of `text`, and where each stands; quoted text is passed over."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        character = token[0]
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if depth == 0 and character in ")]},":
            yield character, token.start()


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    for character, position in _top_level(text, start):
        if character != ",":
            return position
    raise HloError(f"a bracket is never closed: {text.strip()[:200]!r}")


def _split(text: str) -> list[str]:
    """The pieces of `text` between top-level commas, empty ones left out."""
    commas = [position for character, position in _top_level(text) if character == ","]
    starts, ends = [0, *(comma + 1 for comma in commas)], [*commas, len(text)]
    return [piece for start, end in zip(starts, ends, strict=True) if (piece := text[start:end].strip())]
