"""Runs `python -m benchmarks` in a process that has none of the packages which the smallest GPU environment lacks."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ABSENT = ("tyro", "rich", "psutil", "webdataset", "ffcv", "deepspeed", "scipy", "pytest")
PEAK_FLOPS = 1e12  # in place of the card's
CODE = "tested"  # in place of the sources' digest, which changes when they are edited while the tests run
PROGRAM = """
import json, sys
absent, peak, code, words = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(absent))
from benchmarks import cells, gpu_train
from benchmarks.__main__ import main
gpu_train.peak_of, cells.code_digest = lambda device: peak, lambda: code
sys.exit(main(words))
"""


def run_bare(words: list[str]) -> str:
    """Standard output of the command, which has to succeed."""
    arguments = (json.dumps(value) for value in (ABSENT, PEAK_FLOPS, CODE, words))
    program = (sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments)
    done = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
