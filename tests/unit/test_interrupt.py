"""Requests to end: the first is noted, its echo too, a second one ends the process even inside a collective."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# Then says what it was asked; or waits for ever in one call of C, as in a collective that hangs.
WAITS = """
import ctypes, sys, time
from pipeline.interrupt import StopRequests
requests = StopRequests()
print("ready", flush=True)
if sys.argv[1] == "for ever":
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)
time.sleep(float(sys.argv[1]))
print(requests.pending(), flush=True)
"""


def start(seconds: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, seconds], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_is_noted_and_its_echo_is_no_second_one(number):
    process = start("1")
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # as torchrun's agent hands on what a scheduler has sent to all
    assert process.communicate(timeout=10)[0] == f"{int(number)}\n"
    assert process.returncode == 0


def test_a_second_request_ends_the_process_at_once():
    process = start("for ever")
    process.send_signal(signal.SIGUSR1)
    time.sleep(5.5)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    assert time.monotonic() - asked < 5


def test_nothing_is_pending_unasked_and_time_s_end_is_a_request():
    code = (
        "import time; from pipeline.interrupt import StopRequests; r = StopRequests(); r.limit(None); "
        "print(r.pending()); r.limit(0.2); print(r.pending()); time.sleep(0.3); print(r.pending())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0", str(int(signal.SIGUSR1))]


def test_a_forked_helper_does_not_speak_in_its_rank_s_name():
    code = (
        "import os, signal, time; from pipeline.interrupt import StopRequests, ignore_stop_requests\n"
        "r = StopRequests(); child = os.fork()\n"
        "if child == 0:\n"
        "    ignore_stop_requests(); os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])); time.sleep(0.2); print(r.pending())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "0"], "the helper went on, and the rank was asked nothing"


def test_a_rank_that_makes_no_progress_shows_its_stacks_and_ends():
    code = (
        "import time; from pipeline.watchdog import Watchdog\n"
        "w = Watchdog(-4.5)\n"  # half a second with the margin
        "def stuck_here(): time.sleep(60)\n"
        "w.beat(); time.sleep(0.8)\n"  # not started: nothing is watched
        "w.start()\n"
        "with w.patient(): time.sleep(0.9); w.beat()\n"
        "w.rest(); time.sleep(0.8)\n"
        "w.start(); print('watched', flush=True); stuck_here()"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and done.stdout == "watched\n"
    assert "stuck_here" in done.stderr and "Timeout" in done.stderr
    assert time.monotonic() - began < 20
