"""Seeing to it that a process has the devices its deployment needs, before jax starts any backend.

On a machine without accelerator they are emulated as CPU devices, with a line that says so; on a machine with
one, never, unless JAX_PLATFORMS=cpu asks for the CPU.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from moe_jax.config import ConfigError, DeploymentConfig, Problem

MAX_EMULATED_DEVICES = 1024
_KNOWN_PLATFORMS = ("", "cuda", "gpu", "tpu")
_ON_CPU = "JAX_PLATFORMS=cpu in the environment emulates them on the CPU"


def ensure_devices(num_devices: int, dev: Path = Path("/dev")) -> None:
    """Make sure that jax will find `num_devices` devices in this process; call it before jax is used.

    Emulating sets jax's config and, for XLA, NPROC and XLA_FLAGS in the environment; one line on stderr
    says so. Device counts that the user set stay as they are. `dev` is where device files lie.

    Raises ConfigError when there are too few, before jax is imported.
    """
    platform = os.environ.get("JAX_PLATFORMS", "").split(",")[0].strip().lower()
    if platform == "cpu":
        _ensure_cpu_devices(num_devices)
        return
    if platform not in _KNOWN_PLATFORMS:
        return  # another vendor's plugin: only jax can tell what it has
    found, kind = find_accelerators(dev)
    if found:
        _check(num_devices, found, f"{kind} on this machine", _ON_CPU)
    elif platform:
        allowed = "asks for an accelerator, and this machine shows none"
        raise ConfigError(
            Problem("JAX_PLATFORMS", platform, allowed, "unset it to emulate devices on the CPU")
        )
    else:
        _ensure_cpu_devices(num_devices)


def check_devices(deployment: DeploymentConfig, available: int) -> None:
    """Raise ConfigError when the mesh of `deployment` needs more than the `available` devices."""
    _check(deployment.num_devices, available, "devices here", _ON_CPU)


def find_accelerators(dev: Path = Path("/dev")) -> tuple[int, str]:
    """How many accelerators this process may use, and what they are: ``(8, "NVIDIA GPUs")``.

    Device files are counted, since asking the driver through jax would start it.
    """
    if gpus := _count(dev, r"nvidia\d+") or _count_by_nvidia_smi(dev):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return gpus, "NVIDIA GPUs"
        # As CUDA reads it: the list ends at the first entry that is no device, such as -1.
        names = (name.strip() for name in visible.split(","))
        listed = list(itertools.takewhile(lambda name: name and name[0] != "-", names))
        return min(gpus, len(listed)), "NVIDIA GPUs shown by CUDA_VISIBLE_DEVICES"
    return _count(dev, r"accel\d+"), "TPU chips"


def _count(dev: Path, pattern: str) -> int:
    return sum(bool(re.fullmatch(pattern, path.name)) for path in dev.iterdir()) if dev.is_dir() else 0


def _count_by_nvidia_smi(dev: Path) -> int:
    """GPUs where Windows lends them to Linux: no file for each one there."""
    if not (dev / "dxg").exists() or shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def _ensure_cpu_devices(num_devices: int) -> None:
    if num_devices == 1:
        return
    asked, setting = _asked_cpu_devices()
    if asked is not None:
        _check(num_devices, asked, f"CPU devices by {setting}", f"raise it to {num_devices}, or unset it")
    else:
        _check(num_devices, MAX_EMULATED_DEVICES, "emulated CPU devices", "or run it on real devices")
    _set_up_xla(num_devices)
    if asked is None:
        _emulate(num_devices)


def _asked_cpu_devices() -> tuple[int | None, str]:
    """The number of CPU devices that is set already, and where; jax's own setting wins over XLA's flag."""
    jax = sys.modules.get("jax")
    text = str(jax.config.jax_num_cpu_devices) if jax else os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if text.isdigit():
        return int(text), "jax_num_cpu_devices"
    flags = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return (int(flags[-1]), "--xla_force_host_platform_device_count in XLA_FLAGS") if flags else (None, "")


def _set_up_xla(num_devices: int) -> None:
    """Keep XLA:CPU from hanging or giving up in collectives; it reads the environment when it starts."""
    # Executions in flight that hold all threads leave none for the last device of a collective: a deadlock.
    given = os.environ.get("NPROC", "")
    os.environ["NPROC"] = str(max(32, 2 * num_devices, int(given) if given.isdigit() else 0))
    # Devices share cores: one may come to a collective minutes after another, and the default aborts at 60 s.
    flag = "--xla_cpu_collective_call_terminate_timeout_seconds"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=600".strip()


def _emulate(num_devices: int) -> None:
    import jax  # late: it takes a second, and must not be imported before NPROC is set

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError as error:
        allowed = "cannot be emulated any more: jax is already in use in this process"
        fix = "call ensure_devices before the first use of jax"
        raise ConfigError(Problem("deployment.num_devices", num_devices, allowed, fix)) from error
    print(f"{num_devices} CPU devices emulated; speed says nothing of real ones", file=sys.stderr, flush=True)


def _check(needed: int, found: int, what: str, fix: str) -> None:
    if needed > found:
        smaller = "use a smaller --deployment, e.g. single"
        raise ConfigError(
            Problem(
                "deployment.num_devices", needed, f"must be at most {found} ({what})", f"{smaller}; {fix}"
            )
        )
