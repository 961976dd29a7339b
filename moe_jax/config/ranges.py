"""The range of every number in the config. A number without a row here is a bug (a test says so)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included unless `open_low`. NaN and infinities are never in it."""

    low: float
    high: float
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'above' if self.open_low else 'at least'} {self.low:,} and at most {self.high:,}"


_POSITIVE_INT_31 = Range(1, 2**31 - 1)
_FRACTION = Range(0, 1)
_WEIGHT = Range(0, 1000)
_DECAY = Range(0, 0.999999)  # closer to 1 is 1 in float32, and 1 / (1 - decay^step) infinite

# The upper ends are far beyond any model that was ever built; they are there to catch slips of the hand.
RANGES: Mapping[str, Range] = MappingProxyType(
    {
        "model.num_layers": Range(1, 4096),
        "model.d_model": Range(1, 2**20),
        "model.num_heads": Range(1, 2**16),
        "model.num_kv_heads": Range(1, 2**16),
        "model.head_dim": Range(2, 2**16),
        "model.rope_theta": Range(1, 1e12, open_low=True),
        "model.norm_eps": Range(1e-12, 0.1),
        "model.num_experts": Range(1, 2**16),
        "model.top_k": Range(1, 2**16),
        "model.expert_hidden": Range(1, 2**22),
        "model.num_shared_experts": Range(0, 1024),
        "model.balance_loss_weight": _WEIGHT,
        "model.z_loss_weight": _WEIGHT,
        "model.vocab_size": Range(2, 2**24),
        "model.init_std": Range(1e-12, 10),
        "deployment.pipe": Range(1, 2**16),
        "deployment.data": Range(1, 2**16),
        "deployment.expert": Range(1, 2**16),
        "deployment.tensor": Range(1, 2**16),
        "deployment.num_microbatches": Range(1, 2**20),
        "deployment.bucket_rows": Range(1, 2**24),
        "train.steps": _POSITIVE_INT_31,
        "train.batch_size": Range(1, 2**24),
        "train.accumulation_steps": Range(1, 2**20),
        "train.learning_rate": Range(1e-12, 10),
        "train.warmup_steps": Range(0, 2**31 - 1),
        "train.final_lr_fraction": _FRACTION,
        "train.adam_b1": _DECAY,
        "train.adam_b2": _DECAY,
        "train.adam_eps": Range(1e-30, 1),
        "train.weight_decay": Range(0, 10),
        "train.clip_norm": Range(0, 1e6),
        "train.seed": Range(0, 2**31 - 1),
        "train.log_every": _POSITIVE_INT_31,
        "train.eval_every": Range(0, 2**31 - 1),
        "train.eval_batches": Range(1, 2**20),
        "train.checkpoint_every": _POSITIVE_INT_31,
        "train.keep_checkpoints": Range(1, 10_000),
        "data.seq_len": Range(1, 2**24),
        "data.held_out_fraction": Range(0, 0.5, open_low=True),
        "data.max_bytes": Range(1, 2**40),
    }
)
