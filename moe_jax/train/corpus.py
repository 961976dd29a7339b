"""Text as one stream of token ids, split into a training and a held-out part."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_jax.config.errors import ConfigError, Problem
from moe_jax.config.schema import DataConfig
from moe_jax.train.text import Text, load_text
from moe_jax.train.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """The token streams of a run, and where they came from."""

    train_tokens: np.ndarray
    """Ids to train on, [T], uint16 or int32."""
    held_out_tokens: np.ndarray
    """Ids only evaluated on, [T], from the end of the text; may be empty."""
    fingerprint: str
    """sha256 over both streams: equal means the same ids in the same order with the same split."""
    text: Text
    """What was read."""

    def describe(self) -> str:
        """One line for people: sizes, and what was left out."""
        text = self.text
        reasons = {"empty or binary": text.num_skipped, "over data.max_bytes": text.num_capped}
        left_out = "".join(f", {count} files {reason}" for reason, count in reasons.items() if count)
        return (
            f"{len(text.documents)} documents, {text.num_bytes:,} bytes, {len(self.train_tokens):,} tokens "
            f"to train on, {len(self.held_out_tokens):,} held out{left_out}"
        )

    def identity(self) -> dict[str, object]:
        """What checkpoints hold of the text (JSON values), for :func:`check_same_text`."""
        return {
            "fingerprint": self.fingerprint,
            "num_train_tokens": len(self.train_tokens),
            "num_held_out_tokens": len(self.held_out_tokens),
        }


def load_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Reads and tokenizes the text that `config` names.

    Every document is followed by the tokenizer's end token, if it has one. The last ``held_out_fraction`` of
    the ids is held out, from the document boundary nearest to that point if the held-out part then stays
    within half and one and a half times its size, else from the very point.

    Raises:
        ConfigError: as :func:`moe_jax.train.text.load_text`, or text that makes no tokens.
    """
    text = load_text(config)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    pieces: list[np.ndarray] = []
    for document in text.documents:
        pieces.extend((tokenizer.encode(document.text).astype(dtype), np.asarray(end, dtype)))
    ends = np.cumsum([len(piece) for piece in pieces])[1::2]
    tokens = np.concatenate(pieces)
    if not len(tokens):
        raise ConfigError(
            Problem("data.tokenizer", config.tokenizer, "makes no token of the text", "use bytes, or another")
        )
    split = _split_point(len(tokens), ends, config.held_out_fraction)
    return Corpus(tokens[:split], tokens[split:], _fingerprint(tokens, split), text)


def check_same_text(saved: Mapping[str, object], corpus: Corpus) -> None:
    """Refuses to go on from a checkpoint that was trained on other ids than `corpus` holds.

    `saved` is the :meth:`Corpus.identity` of the checkpoint.

    Raises:
        ConfigError: the fingerprints differ.
    """
    if saved["fingerprint"] != corpus.fingerprint:
        raise ConfigError(
            f"data: the text is not what the checkpoint was trained on (then {saved['num_train_tokens']:,} + "
            f"{saved['num_held_out_tokens']:,} held-out tokens, sha256 {str(saved['fingerprint'])[:12]}...; "
            f"now {len(corpus.train_tokens):,} + {len(corpus.held_out_tokens):,}, sha256 "
            f"{corpus.fingerprint[:12]}...), so the data order cannot go on: give the same data.paths, "
            "data.tokenizer, data.held_out_fraction and data.max_bytes (and the same Python for its "
            "standard library), or start in another train.run_dir"
        )


def unigram_entropy_nats(tokens: np.ndarray) -> float:
    """Entropy of single ids in `tokens` [T], in nats: the loss of the best model that sees no context.

    Raises:
        ValueError: no tokens.
    """
    if not len(tokens):
        raise ValueError("tokens: the entropy of no tokens is not defined")
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    return float(-np.sum(shares * np.log(shares)))


def _split_point(num_tokens: int, ends: np.ndarray, held_out_fraction: float) -> int:
    held_out = round(num_tokens * held_out_fraction)
    if held_out == 0:
        return num_tokens
    point = num_tokens - held_out
    nearest = int(ends[np.argmin(np.abs(ends - point))])
    return nearest if held_out / 2 <= num_tokens - nearest <= held_out * 1.5 else point


def _fingerprint(tokens: np.ndarray, split: int) -> str:
    digest = hashlib.sha256(f"{split} {len(tokens)}".encode())
    for start in range(0, len(tokens), 1 << 20):
        digest.update(tokens[start : start + (1 << 20)].astype("<i4").tobytes())
    return digest.hexdigest()
