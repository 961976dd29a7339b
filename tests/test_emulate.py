"""Too few devices: emulated on a machine without accelerator, refused on one with; never silently."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.config import ConfigError, DeploymentConfig
from moe_jax.emulate import check_devices, ensure_devices, find_accelerators

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /dev, and an environment that says nothing about devices."""
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def add(dev: Path, *names: str) -> None:
    for name in names:
        (dev / name).touch()


def test_accelerators_are_counted_by_their_device_files(dev, monkeypatch):
    assert find_accelerators(dev) == (0, "TPU chips")
    add(dev, "nvidiactl", "nvidia-uvm", "nvidia0", "nvidia1", "nvidia10")
    assert find_accelerators(dev) == (3, "NVIDIA GPUs")
    for visible, found in [
        ("0,1", 2),
        ("0", 1),
        ("", 0),
        ("-1", 0),
        ("1,-1,0", 1),
        ("GPU-8932f937", 1),
        ("0,1,2,3", 3),
    ]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert find_accelerators(dev)[0] == found, visible
    assert find_accelerators(dev / "nothing") == (0, "TPU chips")


def test_tpu_chips_are_counted(dev):
    add(dev, "accel0", "accel1", "accel2", "accel3")
    assert find_accelerators(dev) == (4, "TPU chips")


def test_a_gpu_machine_with_too_few_is_refused_and_nothing_is_emulated(dev, capsys):
    add(dev, "nvidia0", "nvidia1")
    ensure_devices(2, dev)
    with pytest.raises(ConfigError) as refused:
        ensure_devices(16, dev)
    line = str(refused.value)
    assert line.startswith("deployment.num_devices = 16: must be at most 2 (NVIDIA GPUs on this machine)")
    assert "JAX_PLATFORMS=cpu in the environment emulates them" in line
    assert capsys.readouterr().err == ""


def test_a_platform_that_is_asked_for_and_absent_is_refused(dev, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    with pytest.raises(ConfigError, match="JAX_PLATFORMS = 'cuda': asks for an accelerator"):
        ensure_devices(1, dev)
    add(dev, "nvidia0")
    ensure_devices(1, dev)


def test_check_devices():
    check_devices(DeploymentConfig(expert=16), 16)
    with pytest.raises(ConfigError, match=r"deployment.num_devices = 16: must be at most 15"):
        check_devices(DeploymentConfig(expert=16), 15)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process on a machine that is said to hold one GPU, which JAX_PLATFORMS=cpu leaves alone."""
    names = ("XLA_FLAGS", "NPROC", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES")
    env = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", "import sys; from moe_jax.emulate import ensure_devices\n" + code],
        env={**env, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


COUNT = "import jax, os; print(len(jax.devices()), os.environ.get('NPROC'), os.environ.get('XLA_FLAGS'))"
FLAG = "--xla_force_host_platform_device_count"
TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"


@pytest.mark.smoke
def test_devices_are_emulated_with_a_line_that_says_so():
    done = run(f"ensure_devices(5); assert 'jax' in sys.modules; {COUNT}")
    assert done.stdout == f"5 32 {TIMEOUT}\n"
    assert done.stderr == "5 CPU devices emulated; speed says nothing of real ones\n"


def test_one_device_needs_nothing():
    done = run("ensure_devices(1); assert 'jax' not in sys.modules")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_count_that_is_set_already_is_kept_when_it_is_enough():
    done = run(f"ensure_devices(5); {COUNT}", XLA_FLAGS=f"{FLAG}=6", NPROC="50")
    assert done.stdout == f"6 50 {FLAG}=6 {TIMEOUT}\n"
    assert done.stderr == ""


@pytest.mark.parametrize("environment", [{"XLA_FLAGS": f"{FLAG}=4"}, {"JAX_NUM_CPU_DEVICES": "4"}])
def test_a_count_that_is_set_already_and_too_small_is_refused_before_jax_starts(environment):
    code = "try: ensure_devices(5)\nexcept ValueError as error: print(error, 'jax' in sys.modules)"
    done = run(code, **environment)
    assert done.stdout.startswith("deployment.num_devices = 5: must be at most 4 (CPU devices by ")
    assert done.stdout.endswith("raise it to 5, or unset it False\n")


def test_absurd_counts_are_refused():
    done = run("ensure_devices(100_000)")
    assert "deployment.num_devices = 100000: must be at most 1024 (emulated CPU devices)" in done.stderr


def test_emulating_after_jax_started_is_refused():
    done = run("import jax; jax.devices(); ensure_devices(5)")
    assert "jax is already in use in this process" in done.stderr.splitlines()[-1]
