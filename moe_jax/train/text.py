"""Which text a run reads: files, folders and globs, in an order that is the same on every machine."""

import codecs
import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config.errors import ConfigError, Problem
from moe_jax.config.schema import DataConfig

_FIELD = "data.paths"
# Parts of the standard library that are not program text of its own.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Document:
    """One file's text."""

    name: str
    """Path of the file."""
    text: str
    """Its text, never empty."""


@dataclass(frozen=True)
class Text:
    """What was read, and what was left out."""

    documents: tuple[Document, ...]
    """Files in sorted order of their paths."""
    num_bytes: int
    """UTF-8 bytes in all documents."""
    num_skipped: int
    """Files inside folders that hold no text: empty, or binary."""
    num_capped: int
    """Files left out (or, the last one taken, cut) because of data.max_bytes."""


@dataclass(frozen=True)
class _File:
    path: Path
    named: bool
    """Whether the user named this very file: then it must be text."""


def load_text(config: DataConfig) -> Text:
    """Reads the text that `config` names.

    Paths may be files, folders (read recursively, hidden names and symbolic links to folders left out) and
    globs (``**`` for any folders); none at all means the Python sources of the running standard library. All
    files are sorted by path, and a file reached twice is read once. If they hold more than ``max_bytes``,
    files spread evenly over the sorted list are taken until the cap is full (the last one is cut, at a line
    end if it can be).

    Raises:
        ConfigError: nothing matched, a file that cannot be read or is not UTF-8, or no text in any of them.
    """
    files = _stdlib_files() if not config.paths else _named_files(config.paths)
    documents: dict[int, Document] = {}
    room_bytes, num_skipped = config.max_bytes, 0
    for index in _spread(len(files)):
        if room_bytes == 0:
            break
        text, size_bytes = _read_text(files[index], room_bytes, strict=bool(config.paths))
        if text:
            documents[index] = Document(str(files[index].path), text)
            room_bytes = max(0, room_bytes - size_bytes)
        else:
            num_skipped += 1
    if not documents:
        raise _refused(
            list(config.paths), f"hold no text ({num_skipped} empty or binary files)", "name UTF-8 text files"
        )
    return Text(
        documents=tuple(documents[index] for index in sorted(documents)),
        num_bytes=sum(len(document.text.encode()) for document in documents.values()),
        num_skipped=num_skipped,
        num_capped=len(files) - len(documents) - num_skipped,
    )


def _named_files(patterns: Iterable[str]) -> list[_File]:
    """Files that `patterns` name, each once, sorted by path."""
    found: dict[Path, _File] = {}
    for pattern in patterns:
        matches = [_File(path, named) for path, named in _matches(os.path.expanduser(pattern))]
        if not matches:
            raise _refused(pattern, "matches no file", "give a file, a folder or a glob that does")
        for file in matches:
            other = found.setdefault(file.path.resolve(), file)
            first = min(file.path, other.path, key=Path.as_posix)  # of links to one file, always the same
            found[file.path.resolve()] = _File(first, file.named or other.named)
    return sorted(found.values(), key=lambda file: file.path.as_posix())


def _matches(pattern: str) -> Iterator[tuple[Path, bool]]:
    if not os.path.exists(pattern):  # an existing path is never taken for a glob, whatever its name
        for path in map(Path, glob.glob(pattern, recursive=True)):
            yield from ((file, False) for file in (_walk(path) if path.is_dir() else [path]))
    elif os.path.isdir(pattern):
        yield from ((file, False) for file in _walk(Path(pattern)))
    else:
        yield Path(pattern), True


def _walk(folder: Path, skipped: Iterable[str] = ()) -> Iterator[Path]:
    """Regular files under `folder` (no pipes, no broken links), without hidden and `skipped` names."""

    def refuse(error: OSError):
        raise _unreadable(error.filename, error) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _stdlib_files() -> list[_File]:
    """Python sources of the running standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _walk(root, _STDLIB_SKIPPED) if path.suffix == ".py"] if root.is_dir() else []
    if not paths:
        raise _refused([], f"is empty, and this Python has no sources under {root}", "name text files")
    return [_File(path, named=False) for path in sorted(paths, key=Path.as_posix)]


def _spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread evenly (van der Corput's, bits reversed)."""
    width = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda index: int(f"{index:0{width}b}"[::-1], 2))


def _read_text(file: _File, room_bytes: int, strict: bool) -> tuple[str, int]:
    """At most `room_bytes` of a file as text, and the bytes taken; empty text for one to be left out.

    `strict` refuses a text file that is not UTF-8; else it is left out like a binary one.
    """
    try:
        with open(file.path, "rb") as stream:
            data = stream.read(room_bytes + 1)
    except OSError as error:
        raise _unreadable(file.path, error) from error
    cut = len(data) > room_bytes
    if b"\0" in data[:8192] or not data:
        if file.named:
            kind = "is binary (it holds a zero byte)" if data else "is empty"
            raise _refused(str(file.path), kind, "name UTF-8 text files")
        return "", 0
    try:
        # final=False: what the cap cuts may end inside a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(data[:room_bytes], final=not cut)
    except UnicodeDecodeError as error:
        if not strict:
            return "", 0
        reason = f"is not UTF-8 (byte {error.start})"
        raise _refused(str(file.path), reason, "convert it to UTF-8 or leave it out") from error
    if cut and "\n" in text[len(text) // 2 :]:
        text = text[: text.rindex("\n") + 1]
    return text, len(data) if cut else len(text.encode())


def _unreadable(path: str | Path, error: OSError) -> ConfigError:
    return _refused(str(path), f"cannot be read ({error.strerror})", "allow reading it, or leave it out")


def _refused(value: object, reason: str, fix: str) -> ConfigError:
    return ConfigError(Problem(field=_FIELD, value=value, allowed=reason, fix=fix))
