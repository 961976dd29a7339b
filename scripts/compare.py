"""Compare deployments: python scripts/compare.py --checkpoint runs/tiny --deployments single ep16 tp8pp2.

The same checkpoint and the same tokens in each: results, speed, bytes, placement. Exit code 1 if they differ
by more than rounding.
"""

import sys

from moe_jax.compare.options import CompareOptions, check_options
from moe_jax.config.cli import parse_options, run_script


def main(argv: list[str]) -> int:
    """Check the options, see to the devices, compare; 0 if all deployments agree, else 1."""
    options = parse_options(argv, CompareOptions, prog="compare.py", description=__doc__ or "")
    deployments = check_options(options)
    # Late: whatever is wrong with the options or the machine is said before jax is loaded.
    from moe_jax.emulate import ensure_devices

    ensure_devices(max(deployment.num_devices for deployment in deployments))
    from moe_jax.compare.run import run

    return run(options, deployments)


if __name__ == "__main__":
    sys.exit(run_script(main))
