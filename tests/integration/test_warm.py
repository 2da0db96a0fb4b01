"""A command that `warm` forks is what `python` would have started: its words, folder, variables, end and status."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SHOWN = """
import atexit, json, os, sys, threading
from pathlib import Path

ours = [name for name in sys.modules if name.partition(".")[0] in ("pipeline", "data_prep", "jobs", "benchmarks")]
shown = [__name__, sys.argv, sys.path[0], os.getcwd(), os.environ["GIVEN"], "PATH" in os.environ, ours]
threading.Timer(0.3, lambda: print("the thread's end")).start()
atexit.register(print, "the end")
print(json.dumps(shown))
"""


def test_it_has_its_own_words_folder_and_variables_and_comes_to_its_end(warm, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SHOWN)
    out, err = warm.start(str(script), "--word", "a b", GIVEN="x").communicate(timeout=30)
    shown, *rest = out.splitlines()
    expected = ["__main__", [str(script), "--word", "a b"], str(tmp_path), str(REPOSITORY), "x", True, []]
    assert json.loads(shown) == expected, err
    assert (rest, err) == (["the thread's end", "the end"], "")


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no such file')", 1, "no such file\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_its_status_is_python_s(code: str, status: int, said: str, warm, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(code)
    running = warm.start(str(tmp_path / "script.py"))
    _, err = running.communicate(timeout=30)
    assert (running.returncode, err.endswith(said)) == (status, True), err
    assert bool(err) == bool(said)


def test_modules_are_run_by_name_and_signals_reach_it(warm) -> None:
    done = warm.run("json.tool", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    running = warm.start("-m", "http.server", "0")
    assert running.poll(1) is None
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=30)
    assert running.returncode == -signal.SIGTERM
