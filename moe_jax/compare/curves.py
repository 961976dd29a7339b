"""Loss curves out of the metrics that training runs leave behind."""

import math
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config import ConfigError
from moe_jax.train.metrics import read_metrics


@dataclass(frozen=True)
class Curve:
    """The training loss of one run, step by step as it was logged."""

    label: str
    """The run's folder, with as many folders above it as it takes to tell it from the others."""
    steps: list[int]
    losses: list[float]


def read_curves(run_dirs: list[Path]) -> list[Curve]:
    """The training losses of each run; those that are not finite are left out.

    Raises ConfigError for a folder without metrics, or without a training loss.
    """
    curves = []
    for label, run_dir in zip(_labels(run_dirs), run_dirs, strict=True):
        try:
            records = read_metrics(run_dir, "train")
        except OSError as error:
            raise ConfigError(f"runs: {error}; name the folder that a training run wrote") from error
        except ValueError as error:
            raise ConfigError(f"runs: {error}") from error
        losses = {step: float(record["loss"]) for step, record in records.items()}
        finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        if not finite:
            raise ConfigError(
                f"runs: {run_dir} has logged no training loss; let it train for some steps first"
            )
        curves.append(Curve(label, list(finite), list(finite.values())))
    return curves


def _labels(run_dirs: list[Path]) -> list[str]:
    parts = [run_dir.expanduser().resolve().parts for run_dir in run_dirs]
    for depth in range(1, max(map(len, parts), default=0)):
        labels = ["/".join(one[-depth:]) for one in parts]
        if len(set(labels)) == len(labels):
            return labels
    return ["/".join(one) for one in parts]
