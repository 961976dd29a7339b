"""Text in, text out: prompts through a tokenizer and a model."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.progress import track


class TextModel(Protocol):
    """What generation needs of a model (moe_jax.Model has it)."""

    def stream(
        self, ids_BL: np.ndarray, max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[np.ndarray]:
        """Yield the next token of every sequence, int32 [B], max_new_tokens times."""
        ...


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer (moe_jax.train.tokenizer.Tokenizer has it)."""

    def encode(self, text: str) -> np.ndarray:
        """Text to ids [T]."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Ids [T] to text."""
        ...


def stream_one(
    model: TextModel,
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """Yield the prompt, then pieces of its continuation as they are made.

    A token can end in the middle of a character: such a piece waits for the rest of it.
    """
    yield prompt
    ids = tokenizer.encode(prompt)[None, :]
    new: list[int] = []
    shown = ""
    for next_B in model.stream(ids, max_new_tokens, temperature, seed):
        new.append(int(next_B[0]))
        text = tokenizer.decode(np.asarray(new, np.int32))
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(np.asarray(new, np.int32))[len(shown) :]


def continue_batch(
    model: TextModel,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """The continuation of each prompt (without the prompt), with a progress bar.

    Prompts of equal token length run as one batch; a prompt samples by its place in that batch.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    texts = [""] * len(prompts)
    groups = sorted(by_length.items())
    for _, members in track(groups, "generating", console=Console(stderr=True)):
        ids_BL = np.stack([encoded[index] for index in members])
        new_BL = np.stack(list(model.stream(ids_BL, max_new_tokens, temperature, seed)), axis=1)
        for index, ids in zip(members, new_BL, strict=True):
            texts[index] = tokenizer.decode(ids)
    return texts
