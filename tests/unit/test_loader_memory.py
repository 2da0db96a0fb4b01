"""A loader's memory does not grow with the steps."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FORMS = ("wds", "ffcv")
WARM_UP = 500  # steps after which all that is kept has been made

STEPS = """
import gc, os, sys
from pathlib import Path
from numbers_reader import stream
from small_shards import tars
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import TrainLoader
from pipeline.data.order import Layout

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

manifest, form, warm_up, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
loader = TrainLoader(tars(manifest, AugmentConfig(), size=64, format=form), Layout(0, 1, 8, 1), 5, 2, window=2)
batches = stream(loader)
for _ in range(warm_up):
    next(batches)
before = resident()
for _ in range(steps):
    next(batches)
print(resident() - before)
"""


def growth(manifest: Path, steps: int) -> dict[str, int]:
    """Container -> bytes, each in a process of its own, both at once."""

    def run(form: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", STEPS, str(manifest), form, str(WARM_UP), str(steps)],
            env={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests/unit'}", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    with ThreadPoolExecutor() as pool:
        results = dict(zip(FORMS, pool.map(run, FORMS), strict=True))
    assert [done.stderr for done in results.values() if done.returncode] == []
    return {form: int(done.stdout) for form, done in results.items()}


def test_it_stays_over_2000_steps(sizes_split):
    found = growth(sizes_split, 2000)
    assert max(found.values()) < 2_000_000, found


@pytest.mark.soak
def test_it_stays_over_10000_steps(sizes_split):
    found = growth(sizes_split, 10_000)
    print(f"{found} bytes in 10,000 steps")
    assert max(found.values()) < 10_000_000, found
