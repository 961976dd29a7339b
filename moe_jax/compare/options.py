"""What a comparison is asked for, and what can be refused of it without jax."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_jax.config import ConfigError, DeploymentConfig, Problem, parse_deployment


@dataclass(frozen=True)
class CompareOptions:
    """The options of scripts/compare.py."""

    checkpoint: str
    """A run folder (its newest checkpoint is taken), its checkpoints folder, or the folder of one step."""
    deployments: tuple[str, ...]
    """Two or more names in configs/deployments, paths, or mesh sizes such as pipe=2,tensor=8; all others are
    compared with the first."""
    tokens: Literal["held-out", "random"] = "held-out"
    """held-out: the text that the run is evaluated on; random: ids drawn evenly from the vocabulary."""
    sequences: int = 16
    """Sequences in the batch; every deployment must be able to cut it evenly."""
    seq_len: int | None = None
    """Tokens per sequence; None means data.seq_len of the run."""
    dtype: Literal["bfloat16", "float32", "float64"] | None = None
    """Compute in this dtype; None means that of the run. float64 tells an error from rounding."""
    tolerance: float | None = None
    """Largest relative difference of loss, logits and gradients that passes; None goes by the dtype
    (float64 1e-10, float32 1e-5, bfloat16 looser)."""
    generate: int = 16
    """Tokens to generate after each of four prompts; 0 leaves generation out."""
    temperature: float = 0.0
    """0 generates the most likely tokens; above 0 samples, by the same random numbers in every deployment."""
    repeats: int = 3
    """Timed runs of each program, after one to warm up; the median counts."""
    runs: tuple[str, ...] = ()
    """Run folders whose loss curves the HTML report draws over each other; none means the checkpoint's."""
    json: str | None = None
    """File to write all results to, as JSON."""
    html: str | None = None
    """File to write the report to, as one HTML page."""


def check_options(options: CompareOptions) -> list[DeploymentConfig]:
    """The deployments that `options` names, the reference first.

    Raises ConfigError for an option that cannot be followed, whatever the checkpoint.
    """
    problems = [*_number_problems(options), *_file_problems(options)]
    if problems:
        raise ConfigError(*problems)
    deployments = [parse_deployment(text) for text in options.deployments]
    if len(deployments) < 2:
        fix = "name the reference first, then what to compare with it: --deployments single ep16"
        raise ConfigError(Problem("deployments", list(options.deployments), "must be two or more", fix))
    names = [deployment.name for deployment in deployments]
    for index, name in enumerate(names):
        if name in names[:index]:
            allowed = f"name one deployment twice ({name})"
            fix = "leave one out, or give the other a name of its own in a file"
            raise ConfigError(Problem("deployments", list(options.deployments), allowed, fix))
    return deployments


def check_batch(deployments: list[DeploymentConfig], sequences: int, seq_len: int) -> None:
    """Raise ConfigError unless every deployment can cut the batch evenly."""
    parts = {d.name: d.data * d.expert * d.num_microbatches for d in deployments}
    common = math.lcm(*parts.values())
    for deployment in deployments:
        cut = parts[deployment.name]
        if sequences % cut:
            allowed = f"must be a multiple of data x expert x num_microbatches = {cut} of {deployment.name}"
            raise ConfigError(Problem("sequences", sequences, allowed, f"use {common} (fits all), or more"))
        group_tokens = sequences // (deployment.data * deployment.expert) * seq_len
        if group_tokens % deployment.pipe:
            allowed = (
                f"gives each device group of {deployment.name} {group_tokens} tokens, which its "
                f"{deployment.pipe} pipeline stages must share evenly"
            )
            fix = f"use a multiple of {deployment.pipe}"
            raise ConfigError(Problem("seq_len", seq_len, allowed, fix))


def _number_problems(options: CompareOptions) -> list[Problem]:
    lows = {"sequences": 1, "seq_len": 1, "generate": 0, "repeats": 1}
    problems = []
    for name, low in lows.items():
        value = getattr(options, name)
        if value is not None and not low <= value < 2**31:
            problems.append(Problem(name, value, f"must be at least {low} and below 2**31", f"e.g. {low}"))
    tolerance = options.tolerance
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        problems.append(Problem("tolerance", tolerance, "must be a finite number, 0 or more", "e.g. 1e-5"))
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        allowed = "must be a finite number, 0 or more"
        problems.append(Problem("temperature", options.temperature, allowed, "e.g. 0.7"))
    return problems


def _file_problems(options: CompareOptions) -> list[Problem]:
    problems = []
    for name in ("json", "html"):
        value = getattr(options, name)
        if value is None:
            continue
        path = Path(value).expanduser()
        if path.is_dir():
            problems.append(Problem(name, value, "is a folder", "name a file in it"))
        elif not path.absolute().parent.is_dir():
            problems.append(Problem(name, value, "lies in a folder that does not exist", "make it first"))
    for run in options.runs:
        if not Path(run).expanduser().is_dir():
            problems.append(Problem("runs", run, "is no folder", "name the folder that a training run wrote"))
    if options.runs and options.html is None:
        fix = "add --html FILE, or leave them out"
        problems.append(Problem("runs", list(options.runs), "are for the report only", fix))
    return problems
