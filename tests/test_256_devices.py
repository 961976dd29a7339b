"""ep16pp16: every expert of every layer on a device of its own, 256 of them."""

import subprocess
import sys

import pytest

SCRIPT = """
import numpy as np
from moe_jax.config import parse_deployment
from moe_jax.config.schema import DeploymentConfig, ModelConfig
from moe_jax.emulate import ensure_devices

deployment = parse_deployment("ep16pp16")
ensure_devices(deployment.num_devices)

from moe_jax.deployments import create

cfg = ModelConfig(num_layers=16, d_model=16, num_heads=2, num_experts=16, expert_hidden=16, vocab_size=64,
                  init_std=0.2, compute_dtype="float32")
ids = np.random.default_rng(0).integers(0, 64, (128, 4)).astype(np.int32)
batch = {"ids_BL": ids, "targets_BL": np.roll(ids, -1, axis=1)}
results = []
for config in (DeploymentConfig(), deployment):
    placed = create(cfg, config)
    params = placed.init_params(0, at_rest=True)
    terms, gradients, _ = placed.loss_and_gradients(params, batch)
    results.append((float(terms["loss"]), np.asarray(gradients["blocks"]["experts"]["w_up"])))
(loss, gradient), (loss_256, gradient_256) = results
assert abs(loss_256 - loss) < 1e-5 * loss, (loss, loss_256)
assert np.abs(gradient_256 - gradient).max() < 1e-5 * np.abs(gradient).max()
w_up = params["blocks"]["experts"]["w_up"]
parts = {tuple((s.start, s.stop) for s in shard.index[:2]) for shard in w_up.addressable_shards}
assert parts == {((n, n + 1), (e, e + 1)) for n in range(16) for e in range(16)}
print("equal on", w_up.sharding.mesh.size)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_expert_of_a_layer_on_each_of_256_devices():
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    assert "equal on 256" in out.stdout
