"""Several deployments side by side: each is measured and held against the first."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.compare.difference import Difference, Tolerance, difference, failures
from moe_jax.compare.measure import Measurement, Outputs, Work, measure
from moe_jax.config import DeploymentConfig, ModelConfig

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One deployment of a comparison."""

    measurement: Measurement
    difference: Difference | None
    """From the reference; None for the reference itself."""
    forward_speed: float
    """Tokens/s of the forward pass over those of the reference, in this run, on this machine."""
    gradients_speed: float
    """The same of loss and gradients."""
    failures: list[str]
    """What does not hold, a sentence each."""
    prompt_ids: list[list[int]]
    """The prompts for generation; empty if nothing was generated."""
    generated_ids: list[list[int]]
    """What was generated after each of them."""

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.measurement.deployment.name


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found, and of what."""

    checkpoint: str
    """Path of the checkpoint."""
    step: int
    """Optimizer steps behind it."""
    model: ModelConfig
    tokens: str
    """What the batch is: held-out or random."""
    num_sequences: int
    seq_len: int
    machine: str
    """Devices and versions."""
    tolerance: Tolerance
    entries: list[Entry]
    """The reference first."""

    @property
    def reference(self) -> Entry:
        """What all others are compared with."""
        return self.entries[0]

    @property
    def failures(self) -> list[str]:
        """What does not hold of any deployment; empty if they all agree."""
        return [line for entry in self.entries for line in entry.failures]

    def verdict(self) -> str:
        """One sentence: whether all deployments agree."""
        others = ", ".join(entry.name for entry in self.entries[1:])
        if self.failures:
            return f"DIFFERENT: {len(self.failures)} checks of {self.reference.name} against {others} failed"
        limits = self.tolerance
        return (
            f"EQUAL: {others} computed what {self.reference.name} did, within {limits.loss:.0e} (loss), "
            f"{limits.logits:.0e} (logits), {limits.gradients:.0e} (gradients); {self.model.compute_dtype}"
        )


def compare_deployments(
    deployments: list[DeploymentConfig],
    work: Work,
    tolerance: Tolerance,
    announce: Callable[[str], None] = lambda name: None,
) -> list[Entry]:
    """Measure each deployment and compare it with the first; `announce` is told each name before its turn.

    Only the first one's results stay in (host) memory.
    """
    entries: list[Entry] = []
    reference: Outputs | None = None
    for config in deployments:
        announce(config.name)
        measurement, outputs = measure(config, work)
        found = None if reference is None else difference(outputs, reference)
        if reference is None:
            reference = outputs.on_host()
        first = entries[0].measurement if entries else measurement
        prompts, generated = _split(outputs.generated_BL, work.num_generated)
        entries.append(
            Entry(
                measurement=measurement,
                difference=found,
                forward_speed=measurement.forward.tokens_per_s / first.forward.tokens_per_s,
                gradients_speed=measurement.gradients.tokens_per_s / first.gradients.tokens_per_s,
                failures=failures(measurement, found, tolerance, first.deployment.name),
                prompt_ids=prompts,
                generated_ids=generated,
            )
        )
        del outputs  # before the next deployment needs the memory
    return entries


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values; numbers that are not finite become null."""
    content = {
        "format_version": FORMAT_VERSION,
        "equal": not comparison.failures,
        "verdict": comparison.verdict(),
        **dataclasses.asdict(comparison),
    }
    return _plain(content)


def _split(ids_BL: np.ndarray | None, num_generated: int) -> tuple[list[list[int]], list[list[int]]]:
    if ids_BL is None:
        return [], []
    return ids_BL[:, :-num_generated].tolist(), ids_BL[:, -num_generated:].tolist()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
