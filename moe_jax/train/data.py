"""Batches out of a token stream: a pure function of (seed, step), so a run resumes from its step alone."""

import numpy as np

from moe_jax.config.errors import ConfigError

Batch = dict[str, np.ndarray]
"""``{"ids_BL": int32 [B, L], "targets_BL": int32 [B, L]}``; a target is the id that follows."""


class TrainData:
    """Training batches of `tokens`, in an order that depends on the seed only.

    An epoch is every window of `seq_len` ids once, in random order; windows do not overlap (each needs one
    more id, the last target), and every epoch starts them at another random offset. Batches run on from one
    epoch into the next.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int):
        """Takes ids [T] of any integer dtype; nothing is copied.

        Raises:
            ConfigError: fewer than seq_len + 1 ids.
        """
        _check_long_enough(tokens, seq_len, "training", "give more text (data.paths, data.max_bytes)")
        assert batch_size > 0
        assert seed >= 0
        self._tokens = tokens
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed
        # One window less than fit, so that the offset is free to be anything below seq_len.
        self.windows_per_epoch = max(1, len(tokens) // seq_len - 1)
        """Windows in one epoch."""
        self._max_offset = min(seq_len - 1, len(tokens) - 1 - self.windows_per_epoch * seq_len)
        self._starts_of: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> Batch:
        """Batch of optimizer step `step`, counted from 0."""
        if step < 0:
            raise ValueError(f"step = {step}: steps count from 0")
        first = step * self._batch_size
        starts = [self._start(index) for index in range(first, first + self._batch_size)]
        return _cut(self._tokens, np.asarray(starts), self._seq_len)

    def epoch(self, step: int) -> float:
        """Epochs behind when step `step` begins (0.5: half of the windows seen once)."""
        return step * self._batch_size / self.windows_per_epoch

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.windows_per_epoch)
        if epoch not in self._starts_of:
            if len(self._starts_of) >= 2:  # a batch may lie across two epochs, hardly ever more
                self._starts_of.pop(min(self._starts_of))
            self._starts_of[epoch] = self._epoch_starts(epoch)
        return int(self._starts_of[epoch][place])

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        # RandomState, because numpy promises its stream never changes; a Generator's may with a version.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, epoch])))
        offset = random.randint(self._max_offset + 1)
        return random.permutation(self.windows_per_epoch) * self._seq_len + offset


def held_out_batches(tokens: np.ndarray, seq_len: int, batch_size: int, num_batches: int) -> list[Batch]:
    """The same batches every time, their windows spread evenly over the ids `tokens` [T].

    At most `num_batches`; fewer if the text is too short for them without overlap, yet always one, whose
    windows overlap if they must.

    Raises:
        ConfigError: fewer than seq_len + 1 ids.
    """
    fix = "raise data.held_out_fraction, give more text, or set train.eval_every to 0"
    _check_long_enough(tokens, seq_len, "held-out", fix)
    num_windows = (len(tokens) - 1) // seq_len
    count = max(1, min(num_batches, num_windows // batch_size)) * batch_size
    starts = np.arange(count) * (len(tokens) - 1 - seq_len) // max(1, count - 1)
    return [_cut(tokens, rows, seq_len) for rows in starts.reshape(-1, batch_size)]


def _cut(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> Batch:
    windows = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)
    return {
        "ids_BL": np.ascontiguousarray(windows[:, :-1]),
        "targets_BL": np.ascontiguousarray(windows[:, 1:]),
    }


def _check_long_enough(tokens: np.ndarray, seq_len: int, part: str, fix: str) -> None:
    if len(tokens) <= seq_len:
        raise ConfigError(
            f"data.seq_len = {seq_len}: the {part} text has {len(tokens)} tokens, one window needs "
            f"{seq_len + 1}; lower data.seq_len, or {fix}"
        )
