"""Progress of long commands: a line in a log tells rate and time left."""

import os
import pty
import re
import subprocess
import sys

from data_prep import progress as progress_module
from data_prep.progress import progress


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with progress("shard train") as on_done:
        for seconds in (10, 19, 1, 5):
            now[0] += seconds
            on_done(1000, 110_000_000, 1_281_167)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["shard train: 3,000 of 1,281,167 images, 100 images/s, 11 MB/s, 3.6 h left"]


def test_without_a_total_no_time_is_promised(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0.0)
    with progress("index train") as on_done:
        on_done(10, 1000, 0)
    assert re.fullmatch(r"index train: 10 images, [\d,]+ images/s, [\d,]+ MB/s\n", capsys.readouterr().err)


def test_a_terminal_gets_a_bar_with_rates_and_time_left():
    code = (
        "import time\nfrom data_prep.progress import progress\n"
        "with progress('shard train') as on_done:\n"
        "    for _ in range(12):\n        time.sleep(0.05)\n        on_done(10, 1_000_000, 200)\n"
    )
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", code], stderr=follower, env=environment, check=True, timeout=60)
    os.close(follower)
    shown = os.read(leader, 1 << 20).decode()
    os.close(leader)
    assert "shard train" in shown and "/200" in shown
    assert re.search(r"\d+ images/s \d+ MB/s", shown) and re.search(r"0:00:0\d", shown)
