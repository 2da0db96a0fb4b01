"""A loader's memory does not grow with the steps."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
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


def growth(manifest: Path, form: str, steps: int) -> int:
    """Bytes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(manifest), form, str(WARM_UP), str(steps)],
        env={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests/unit'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("form", ["wds", "ffcv"])
def test_it_stays_over_2000_steps(sizes_split, form):
    assert growth(sizes_split, form, 2000) < 2_000_000


@pytest.mark.soak
@pytest.mark.parametrize("form", ["wds", "ffcv"])
def test_it_stays_over_10000_steps(sizes_split, form):
    found = growth(sizes_split, form, 10_000)
    print(f"{form}: {found} bytes in 10,000 steps")
    assert found < 10_000_000
