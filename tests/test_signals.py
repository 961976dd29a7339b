"""SIGINT and SIGTERM: the first is a wish, the second an order."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from moe_jax.train.signals import StopRequest

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@BOTH
def test_the_first_signal_is_noted_and_the_block_goes_on(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None
        assert stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.signal is number
        assert stop.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert f"{number.name}: finishing this step" in capfd.readouterr().err


_STUBBORN = """
import time
from moe_jax.train.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
        if stop.signal:
            print("noted", flush=True)
"""


@BOTH
def test_the_second_signal_ends_the_process_at_once_even_in_code_that_catches_everything(number):
    code = _STUBBORN.replace("time.sleep(60)", "time.sleep(0.05)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "noted\n"
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number


def test_other_threads_change_nothing():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def use():
        with StopRequest() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
