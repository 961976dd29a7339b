"""Continue prompts: python scripts/generate.py --checkpoint runs/tiny --deployment ep16 --prompt "def "."""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config import ConfigError, parse_deployment
from moe_jax.config.cli import parse_options, run_script


@dataclass(frozen=True)
class GenerateOptions:
    """The options of scripts/generate.py."""

    checkpoint: str
    """A run folder (its newest checkpoint is taken), its checkpoints folder, or the folder of one step."""
    prompt: str | None = None
    """Text to continue; it is streamed to the terminal."""
    prompts: str | None = None
    """File with a prompt on each line; the answers go to --output."""
    output: str | None = None
    """JSON-lines file for --prompts: {"prompt", "text"} per line; none prints them."""
    deployment: str = "single"
    """A name in configs/deployments, or mesh sizes such as pipe=2,tensor=8."""
    max_new_tokens: int = 100
    """Tokens to generate per prompt."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0 samples."""
    seed: int = 0
    """Seed of the sampling."""


def check_options(options: GenerateOptions) -> None:
    """Refuse what cannot be done, before anything is loaded."""
    if (options.prompt is None) == (options.prompts is None):
        raise ConfigError("prompt, prompts: give one of them, a text or a file with one on each line")
    if options.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {options.max_new_tokens}: must be at least 1")
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise ConfigError(f"temperature = {options.temperature}: must be 0 (most likely token) or positive")
    if not 0 <= options.seed < 2**32:
        raise ConfigError(f"seed = {options.seed}: must be from 0 to 2**32 - 1")
    if options.output is not None:
        folder = Path(options.output).parent
        if options.prompts is None:
            raise ConfigError(f"output = {options.output}: goes with --prompts")
        if Path(options.output).is_dir() or not os.access(folder, os.W_OK):
            raise ConfigError(f"output = {options.output}: must be a file in a folder that can be written")


def read_prompts(options: GenerateOptions) -> list[str]:
    """The prompts asked for; refuses empty ones."""
    if options.prompt is not None:
        prompts = [options.prompt]
    else:
        try:
            prompts = Path(str(options.prompts)).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompts = {options.prompts}: cannot be read ({error})") from None
    if not prompts or "" in prompts:
        raise ConfigError("prompt: is empty; give at least one character (per line)")
    return prompts


def main(argv: list[str]) -> int:
    """Load the checkpoint in the deployment and generate."""
    options = parse_options(argv, GenerateOptions, prog="generate.py", description=__doc__ or "")
    check_options(options)
    prompts = read_prompts(options)
    deployment = parse_deployment(options.deployment)
    from moe_jax.emulate import ensure_devices

    ensure_devices(deployment.num_devices)
    import moe_jax
    from moe_jax.checkpoint import CheckpointError, open_checkpoint
    from moe_jax.infer.text import continue_batch, stream_one
    from moe_jax.train.tokenizer import tokenizer_of_checkpoint

    try:
        checkpoint = open_checkpoint(options.checkpoint)
        if "tokenizer" not in checkpoint.meta:
            raise ConfigError(f"checkpoint = {options.checkpoint}: names no tokenizer; use moe_jax.load")
        tokenizer = tokenizer_of_checkpoint(checkpoint.meta["tokenizer"], checkpoint.path.parent.parent)
        model = moe_jax.load(checkpoint.path, deployment)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint: {error}") from error
    if without := [prompt for prompt in prompts if not len(tokenizer.encode(prompt))]:
        raise ConfigError(f"prompt = {without[0]!r}: the checkpoint's tokenizer makes no token of it")
    settings = (options.max_new_tokens, options.temperature, options.seed)
    if options.prompt is not None:
        for piece in stream_one(model, tokenizer, options.prompt, *settings):
            print(piece, end="", flush=True)
        print()
        return 0
    texts = continue_batch(model, tokenizer, prompts, *settings)
    lines = [
        json.dumps({"prompt": p, "text": t}, ensure_ascii=False) + "\n"
        for p, t in zip(prompts, texts, strict=True)
    ]
    if options.output is None:
        print(*lines, sep="", end="")
    else:
        Path(options.output).write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
