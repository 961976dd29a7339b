"""Text to token ids and back: bytes by default, or any Hugging Face ``tokenizer.json``."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from moe_jax.config.errors import ConfigError, Problem

_FIELD = "data.tokenizer"
# What published tokenizers call the two tokens that training needs; the first name found wins.
_BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]")
_EOS_NAMES = ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 to vocab_size - 1."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Id that starts a text, or None if this vocabulary has none."""
        ...

    @property
    def eos_id(self) -> int | None:
        """Id that ends a text, or None if this vocabulary has none."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 [T], without begin or end tokens."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of `ids` [T], special tokens left out.

        Raises:
            ValueError: an id outside the vocabulary, or ids of more than one dimension.
        """
        ...

    def to_json(self) -> dict[str, object]:
        """What identifies this vocabulary, for checkpoints (JSON values only)."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, and 16 specials (<bos> 256, <eos> 257, <pad> 258, the rest reserved)."""

    vocab_size = 272
    bos_id = 256
    eos_id = 257
    pad_id = 258

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 [T].

        Bytes that reached Python undecoded (surrogate escapes, as in command lines) come out as they were.

        Raises:
            ValueError: half of a surrogate pair, which no UTF-8 text can hold.
        """
        return np.frombuffer(text.encode("utf-8", errors="surrogateescape"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of `ids` [T]; specials are skipped, and bytes that are no UTF-8 become U+FFFD."""
        ids_T = _checked_ids(ids, self.vocab_size)
        return ids_T[ids_T < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> dict[str, object]:
        """What identifies this vocabulary, for checkpoints."""
        return {"type": "bytes", "vocab_size": self.vocab_size}


class FileTokenizer:
    """A ``tokenizer.json`` as the `tokenizers` library writes and Hugging Face model folders hold."""

    def __init__(self, path: str | Path):
        """Reads `path`.

        Raises:
            ConfigError: no such file, not JSON, not a tokenizer, or an empty vocabulary.
        """
        self.path = Path(path).expanduser()
        content = _read_tokenizer_file(self.path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises plain Exception
            raise _refused(self.path, f"is JSON, but not a tokenizer ({error})") from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise _refused(self.path, "has an empty vocabulary")
        self._vocab_size = max(vocabulary.values()) + 1  # ids may have holes
        self._bos_id = next((vocabulary[name] for name in _BOS_NAMES if name in vocabulary), None)
        self._eos_id = next((vocabulary[name] for name in _EOS_NAMES if name in vocabulary), None)
        # Of the parsed content, so that other spacing in the file is still the same vocabulary.
        self._sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._vocab_size

    @property
    def bos_id(self) -> int | None:
        """Id of the begin token, found by its usual names, or None."""
        return self._bos_id

    @property
    def eos_id(self) -> int | None:
        """Id of the end token, found by its usual names, or None (documents then run into each other)."""
        return self._eos_id

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 [T], without begin or end tokens."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of `ids` [T], special tokens left out."""
        return self._tokenizer.decode(_checked_ids(ids, self.vocab_size).tolist(), skip_special_tokens=True)

    def to_json(self) -> dict[str, object]:
        """What identifies this vocabulary, for checkpoints; the path only helps to find the file again."""
        return {
            "type": "tokenizer.json",
            "vocab_size": self.vocab_size,
            "sha256": self._sha256,
            "path": str(self.path.resolve()),
        }


def create_tokenizer(spec: str, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names: ``bytes``, or the path of a tokenizer.json.

    `vocab_size` is the model's; None leaves the fit unchecked.

    Raises:
        ConfigError: the file is missing or no tokenizer, or it has more ids than the model.
    """
    tokenizer = ByteTokenizer() if spec == "bytes" else FileTokenizer(spec)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            Problem(
                field="model.vocab_size",
                value=vocab_size,
                allowed=f"must be at least {tokenizer.vocab_size}, the ids of {_FIELD} = {spec}",
                fix=f"use --model.vocab-size {tokenizer.vocab_size}, or a smaller vocabulary",
            )
        )
    return tokenizer


def tokenizer_of_checkpoint(identity: Mapping[str, object], run_dir: str | Path) -> Tokenizer:
    """The tokenizer whose :meth:`Tokenizer.to_json` a checkpoint holds.

    Looked for as ``tokenizer.json`` in `run_dir` (where a run keeps its copy), then at its first place.

    Raises:
        ConfigError: an unknown type, or no file there with the same vocabulary.
    """
    if identity.get("type") == "bytes":
        return ByteTokenizer()
    if identity.get("type") != "tokenizer.json":
        raise ConfigError(f"the checkpoint's tokenizer is of a type this version does not know: {identity}")
    places = [Path(run_dir) / "tokenizer.json", Path(str(identity["path"]))]
    for place in places:
        if place.is_file():
            found = FileTokenizer(place)
            if found.to_json()["sha256"] == identity["sha256"]:
                return found
    raise ConfigError(
        f"the checkpoint's tokenizer.json (sha256 {str(identity['sha256'])[:12]}...) is neither of "
        f"{', '.join(map(str, places))}; put the file it was trained with at one of these places"
    )


def _checked_ids(ids: Iterable[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    ids_T = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
    if ids_T.ndim != 1:
        raise ValueError(f"ids: one sequence [T] can be decoded, not shape {ids_T.shape}; decode row by row")
    outside = ids_T[(ids_T < 0) | (ids_T >= vocab_size)]
    if outside.size:
        raise ValueError(f"ids: {outside[0]} is outside the vocabulary (0 to {vocab_size - 1})")
    return ids_T


def _read_tokenizer_file(path: Path) -> object:
    if not path.exists():
        raise _refused(path, "does not exist", fix="use bytes, or the path of a tokenizer.json")
    if path.is_dir():
        raise _refused(path, "is a folder", fix=f"use {path / 'tokenizer.json'}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise _refused(path, f"is not JSON ({error})") from error


def _refused(
    path: Path, reason: str, fix: str = "give a tokenizer.json of the tokenizers library"
) -> ConfigError:
    return ConfigError(Problem(field=_FIELD, value=str(path), allowed=reason, fix=fix))
