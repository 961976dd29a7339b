"""Measure on this machine: python scripts/benchmark.py moe --deployment ep16."""

import sys
from dataclasses import dataclass

from moe_jax.config import ConfigError
from moe_jax.config.cli import parse_options, run_script


@dataclass(frozen=True)
class MoeBenchmark:
    """The MoE layer, forward, beside the bare matrix products of the same rows on one device."""

    deployment: str = "ep16"
    """A name in configs/deployments, or mesh sizes such as expert=8,tensor=2."""
    d_model: int = 256
    """Width of the residual stream."""
    expert_hidden: int = 1024
    """Hidden width of one expert."""
    num_experts: int = 16
    """Routed experts."""
    top_k: int = 2
    """Experts each token is sent to."""
    num_tokens: int = 4096
    """Tokens over all devices."""
    repeats: int = 15
    """Timed calls of each part; the median counts."""


def benchmark_moe(options: MoeBenchmark) -> int:
    """Check the sizes, measure, print each part as a ratio to the bare products."""
    from moe_jax.config import check_deployment, check_model, parse_deployment
    from moe_jax.config.schema import ModelConfig
    from moe_jax.emulate import ensure_devices

    deployment = parse_deployment(options.deployment)
    sizes = {name: getattr(options, name) for name in ("d_model", "expert_hidden", "num_experts", "top_k")}
    model = ModelConfig(
        **sizes, num_layers=deployment.pipe, num_heads=deployment.tensor, head_dim=2, compute_dtype="float32"
    )
    check_model(model)
    check_deployment(model, deployment)
    groups = deployment.data * deployment.expert
    if options.num_tokens < groups or options.num_tokens % groups:
        raise ConfigError(
            f"num_tokens = {options.num_tokens}: must be a multiple of {groups} (data x expert)"
        )
    if options.repeats < 1:
        raise ConfigError(f"repeats = {options.repeats}: must be at least 1")
    ensure_devices(deployment.num_devices)
    from moe_jax.bench.moe_layer import REFERENCE, measure_moe_layer

    seconds, rounds = measure_moe_layer(model, deployment, options.num_tokens, options.repeats)
    print(
        f"{options.num_tokens} tokens, top-{options.top_k} of {options.num_experts}, {options.deployment}; ",
        end="",
    )
    print(f"exchange rounds: {rounds}. Median of {options.repeats}, in multiples of the bare products:")
    for name, value in seconds.items():
        print(f"  {value / seconds[REFERENCE]:6.2f}  {name}")
    return 0


COMMANDS = {"moe": (MoeBenchmark, benchmark_moe)}


def main(argv: list[str]) -> int:
    """Run the command that the first argument names."""
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        print(__doc__, *(f"  {key}: {options.__doc__}" for key, (options, _) in COMMANDS.items()), sep="\n")
        return 0
    if name not in COMMANDS:
        raise ConfigError(
            f"command = {name!r}: the first argument names what to measure: {', '.join(COMMANDS)}"
        )
    options, run = COMMANDS[name]
    description = options.__doc__ or ""
    return run(parse_options(rest, options, prog=f"benchmark.py {name}", description=description))


if __name__ == "__main__":
    sys.exit(run_script(main))
