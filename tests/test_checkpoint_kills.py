"""Saves that fail or are killed: the reason is told, and what was committed stays whole."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from moe_jax.checkpoint import CheckpointError, CheckpointStore, layout, open_checkpoint


def _save_and_wait(store: CheckpointStore, step: int, state):
    store.save(step, state, {})
    store.wait()


def test_a_save_that_fails_says_so_and_leaves_the_older_steps(tmp_path):
    state = {"params": {"w": jnp.arange(8)}}
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(1, state, {})
    store.wait()
    moved = (tmp_path / "checkpoints").rename(tmp_path / "moved")
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"step 2 .*could not|step 2 cannot be saved"):
        _save_and_wait(store, 2, state)
    (tmp_path / "checkpoints").unlink()
    moved.rename(tmp_path / "checkpoints")
    assert layout.list_steps(tmp_path / "checkpoints") == [1]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used"):
        CheckpointStore(tmp_path / "file")


def test_a_step_whose_manifest_cannot_be_written_is_never_committed(tmp_path, monkeypatch):
    def fail(folder, draft):
        raise OSError(28, "No space left on device")

    state = {"params": {"w": jnp.arange(8)}}
    store = CheckpointStore(tmp_path)
    store.save(1, state, {})
    store.wait()
    monkeypatch.setattr("moe_jax.checkpoint.store.write_manifest", fail)
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved .*No space left.*full disk"):
        _save_and_wait(store, 2, state)
    monkeypatch.undo()
    assert store.steps() == [1]
    with CheckpointStore(tmp_path) as store:
        _save_and_wait(store, 3, state)
        assert store.steps() == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]  # what step 2 left is cleared away


_DISK_FULL = """
import os, resource, signal, sys
import jax, numpy as np
from moe_jax.checkpoint import CheckpointError, CheckpointStore
params = {"w": jax.device_put(np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32))}
with CheckpointStore(sys.argv[1]) as store:
    store.save(1, {"params": params}, {})
    store.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    store.save(2, {"params": params}, {})
"""


def test_a_full_disk_ends_the_run_with_the_reason_and_the_older_step(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", _DISK_FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert "CheckpointError" in run.stderr.splitlines()[-1]
    assert "step 2 could not be saved" in run.stderr.splitlines()[-1]
    assert layout.list_steps(tmp_path) == [1]


_SAVER = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from moe_jax.checkpoint import CheckpointStore
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("a",)), PartitionSpec("a"))
with CheckpointStore(sys.argv[1], keep=2) as store:
    step = (store.latest_step() or 0) + 1
    while True:
        w = lambda i: jax.device_put(np.full((4, 65536), step + i, np.float32), sharding)
        params = {f"w{i}": w(i) for i in range(8)}
        store.save(step, {"params": params, "step": params["w0"] * 2}, {"step": step})
        store.wait()
        print(step, flush=True)
        step += 1
"""


def _kill_savers(directory: Path, moments_s: list[float]) -> int:
    """Kills a process that saves without end, each time so long after a save, and checks what it left.

    Returns how many of the kills came in the middle of a save.
    """
    num_unfinished = 0
    sharding = SingleDeviceSharding(jax.devices()[0])
    struct = jax.ShapeDtypeStruct((4, 65536), jnp.float32, sharding=sharding)
    abstract = {"params": {f"w{i}": struct for i in range(8)}, "step": struct}
    for moment_s in moments_s:
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVER, str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with process:
            assert process.stdout is not None
            told = [int(process.stdout.readline())]
            time.sleep(moment_s)
            process.send_signal(signal.SIGKILL)
            told += [int(line) for line in process.stdout.read().split()]
        num_unfinished += any(directory.glob(f"*{layout.UNFINISHED_MARK}*"))
        steps = layout.list_steps(directory)
        # What wait() returned for is there; at most the one under way came on top.
        assert steps[-1] in (told[-1], told[-1] + 1)
        assert len(steps) <= 3
        for step in steps:
            checkpoint = open_checkpoint(directory, step)
            assert checkpoint.meta == {"step": step}
            state = checkpoint.restore(abstract)
            for i in range(8):
                assert np.all(np.asarray(state["params"][f"w{i}"]) == step + i)
    return num_unfinished


def test_a_kill_in_the_middle_of_saves_leaves_only_whole_checkpoints(tmp_path):
    _kill_savers(tmp_path, [0.0, 0.07, 0.23])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_kills_in_the_middle_of_saves_leave_only_whole_checkpoints(tmp_path):
    moments_s = np.random.default_rng(0).uniform(0, 0.5, 25).tolist()
    assert _kill_savers(tmp_path, moments_s) > 5
