"""The tokens that a comparison runs on: text the run did not train on, or random ids."""

import numpy as np

from moe_jax.config import ConfigError, RunConfig
from moe_jax.train.corpus import load_corpus
from moe_jax.train.data import Batch, held_out_batches
from moe_jax.train.tokenizer import Tokenizer


def held_out_batch(run: RunConfig, tokenizer: Tokenizer, sequences: int, seq_len: int) -> Batch:
    """One batch from the held-out part of the run's text: ids_BL and targets_BL, int32 [sequences, seq_len].

    Raises ConfigError when the text is not there, or too short.
    """
    try:
        corpus = load_corpus(run.data, tokenizer)
        return held_out_batches(corpus.held_out_tokens, seq_len, sequences, num_batches=1)[0]
    except ConfigError as error:
        raise ConfigError(f"{error}; or compare on --tokens random") from error


def random_batch(vocab_size: int, sequences: int, seq_len: int, seed: int = 0) -> Batch:
    """Ids drawn evenly from the vocabulary: ids_BL and targets_BL, int32 [sequences, seq_len]."""
    rows = np.random.RandomState(seed).randint(vocab_size, size=(sequences, seq_len + 1), dtype=np.int32)
    return {"ids_BL": np.ascontiguousarray(rows[:, :-1]), "targets_BL": np.ascontiguousarray(rows[:, 1:])}
