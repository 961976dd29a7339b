"""From nothing to two deployments: python scripts/demo.py (or `make demo`).

Trains the tiny model with one expert per device (ep16) on the standard library's source, restores its
checkpoint into the tensor/pipeline baseline (tp8pp2), continues both on the same batches, and compares them:
numbers, text, placement, and an HTML report.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config import ConfigError, ResolvedRun, load_run
from moe_jax.config.cli import parse_options, run_script

FIRST, SECOND = "ep16", "tp8pp2"


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does."""

    steps: int = 150
    """Steps under ep16 before the checkpoint is carried over."""
    more_steps: int = 20
    """Steps that both deployments then do on the same batches."""
    folder: str = "runs/demo"
    """Where the two runs and the report go; an earlier demo there is replaced."""


def plan_runs(options: DemoOptions) -> tuple[ResolvedRun, ResolvedRun, ResolvedRun]:
    """The three runs: ep16, its continuation, and the same continuation under tp8pp2."""
    for name in ("steps", "more_steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} = {getattr(options, name)}: must be at least 1")

    def resolved(deployment: str, steps: int) -> ResolvedRun:
        every_step = {
            "train.log_every": 1,
            "train.eval_every": options.steps,
            "train.checkpoint_every": steps,
        }
        run_dir = {"train.run_dir": f"{options.folder}/{deployment}", "train.steps": steps}
        return load_run("tiny", None, deployment, every_step | run_dir)

    total = options.steps + options.more_steps
    return resolved(FIRST, options.steps), resolved(FIRST, total), resolved(SECOND, total)


def train_and_carry_over(options: DemoOptions) -> None:
    """Train, copy the run folder, continue both; stops the demo if a run was stopped."""
    from moe_jax.train.loop import run

    first, *continued = plan_runs(options)
    folder = Path(options.folder)
    for name in (FIRST, SECOND):
        shutil.rmtree(folder / name, ignore_errors=True)
    _run_to_end(run, first)
    shutil.copytree(folder / FIRST, folder / SECOND)
    for resolved in continued:
        print(
            f"\n--- the same checkpoint, continued under {resolved.config.deployment.name}", file=sys.stderr
        )
        _run_to_end(run, resolved)


def _run_to_end(run, resolved: ResolvedRun) -> None:
    if code := run(resolved.config, resolved.provenance):
        raise SystemExit(code)


def print_loss_differences(options: DemoOptions) -> None:
    """The losses of the continued steps, side by side."""
    from moe_jax.train.metrics import read_metrics

    curves = [read_metrics(Path(options.folder) / name) for name in (FIRST, SECOND)]
    steps = range(options.steps + 1, options.steps + options.more_steps + 1)
    differences = [abs(curves[0][s]["loss"] - curves[1][s]["loss"]) / curves[0][s]["loss"] for s in steps]
    last = {name: curve[steps[-1]]["loss"] for name, curve in zip((FIRST, SECOND), curves, strict=True)}
    losses = ", ".join(f"{name} {loss:.6f}" for name, loss in last.items())
    print(f"\nloss at step {steps[-1]}: {losses}")
    print(f"largest relative difference over the {len(steps)} continued steps: {max(differences):.1e}")


def main(argv: list[str]) -> int:
    """Run the demo; 0 if both deployments agree."""
    options = parse_options(argv, DemoOptions, prog="demo.py", description=__doc__ or "")
    plan_runs(options)
    from moe_jax.emulate import ensure_devices

    ensure_devices(16)
    train_and_carry_over(options)
    print_loss_differences(options)
    from moe_jax.compare.options import CompareOptions, check_options
    from moe_jax.compare.run import run as compare

    folder = Path(options.folder)
    request = CompareOptions(
        checkpoint=str(folder / FIRST),
        deployments=(FIRST, SECOND),
        generate=64,
        temperature=0.5,
        runs=(str(folder / FIRST), str(folder / SECOND)),
        html=str(folder / "report.html"),
        json=str(folder / "report.json"),
    )
    return compare(request, check_options(request))


if __name__ == "__main__":
    sys.exit(run_script(main))
