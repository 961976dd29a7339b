"""scripts/train.py as a process: signals from outside, and two processes on one folder."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from run_tools import num_records, small_run, start_script, write_text

from moe_jax.checkpoint.layout import list_steps
from moe_jax.train.metrics import read_metrics

LIMIT_S = 240
STEPS = 24


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp() / "compiled-by-scripts"


def wait_for_records(process: subprocess.Popen, folder: Path, count: int, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while num_records(folder) < count:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_process_saved(tmp_path, compiled, sent, code):
    folder, log = tmp_path / "run", tmp_path / "first.log"
    run = small_run(write_text(tmp_path), folder, "ep16", {"train.steps": STEPS})
    process = start_script(run, log, compiled)
    try:
        wait_for_records(process, folder, 2, log)
        process.send_signal(signal.SIGSTOP)  # it holds the folder for as long as the other one needs to start
        second_log = tmp_path / "second.log"
        assert start_script(run, second_log, compiled).wait(LIMIT_S) == 2
        last = second_log.read_text().splitlines()[-1]
        assert last.startswith("error: ")
        assert f"is being trained in by process {process.pid} " in last
        process.send_signal(sent)
        process.send_signal(signal.SIGCONT)
        assert process.wait(LIMIT_S) == code, log.read_text()
    finally:
        process.kill()
    saved = max(list_steps(folder / "checkpoints"))
    assert 2 <= saved == max(read_metrics(folder))
    assert f"{sent.name}: saved step {saved}" in log.read_text().splitlines()[-1]

    assert start_script(run, log, compiled).wait(LIMIT_S) == 0, log.read_text()
    assert f"resumed from step {saved};" in log.read_text()
    records = read_metrics(folder)
    assert list(records) == list(range(1, STEPS + 1))
    assert [record["run"] for record in records.values()] == [1] * saved + [2] * (STEPS - saved)
