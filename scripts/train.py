"""Train a model: python scripts/train.py --config configs/runs/tiny.yaml --deployment ep16."""

import sys

from moe_jax.config.cli import NoOptions, parse_run, run_script


def main(argv: list[str]) -> int:
    """Resolve and check the config, see to the devices, train; 0 when the run is complete."""
    request = parse_run(argv, NoOptions, prog="train.py", description=__doc__ or "")
    # Late: whatever is wrong with the config or the machine is said before jax is loaded.
    from moe_jax.emulate import ensure_devices

    ensure_devices(request.config.deployment.num_devices)
    from moe_jax.train.loop import run

    return run(request.config, request.resolved.provenance)


if __name__ == "__main__":
    sys.exit(run_script(main))
