"""A 10,000-token forward pass runs in bounded memory."""

import subprocess
import sys

SCRIPT = r"""
import re
from pathlib import Path
import numpy as np
from moe_jax.config.schema import DeploymentConfig, ModelConfig
from moe_jax.deployments import create

cfg = ModelConfig(num_layers=1, d_model=64, num_heads=8, num_experts=4, expert_hidden=128, vocab_size=272,
                  compute_dtype="float32")
deployment = create(cfg, DeploymentConfig())
logits = deployment.logits(deployment.init_params(0), np.zeros((1, 10_000), np.int32))
assert bool(np.isfinite(np.asarray(logits)).all())
# Not getrusage: its maximum also covers the process that started this one.
print(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_ten_thousand_tokens_stay_under_two_gib():
    """Whole process, jax included. The scores alone, L x L for 8 heads, would take 3.2 GB."""
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(out.stdout) * 1024 < 2 * 2**30
