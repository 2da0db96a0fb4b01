"""setup.sh where things are missing: one message that names them all, or apt-get for those who may."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
TOOLS = ("bash", "cat", "dirname", "sha256sum", "env", "mkdir", "touch")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkout on a machine with a shell, Python and nothing to compile with; `id` and `pkg-config` are stand-ins."""
    shutil.copy(REPOSITORY / "setup.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("six==1.17.0\n")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    stand_in(tmp_path, "id", "echo 1000")
    return tmp_path


def stand_in(checkout: Path, name: str, body: str) -> None:
    path = checkout / "bin" / name
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)


def run_setup(checkout: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(checkout / "bin"), "HOME": str(checkout)}
    return subprocess.run([checkout / "setup.sh"], env=environment, capture_output=True, text=True, timeout=60)


def test_a_user_who_may_not_install_gets_one_message_with_every_name(bare) -> None:
    done = run_setup(bare)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    for package in ("g++", "pkg-config", "libopencv-dev", "libturbojpeg0-dev", "libjpeg-dev", "libdeflate-dev"):
        assert package in done.stderr
    assert not (bare / ".venv").exists()


def test_a_user_with_sudo_has_them_installed(bare) -> None:
    stand_in(bare, "sudo", '[ "$1" != -n ] || shift; exec "$@"')
    stand_in(bare, "true", "exit 0")
    stand_in(bare, "apt-get", f'echo "$@" >> "{bare}/record"')
    done = run_setup(bare)
    installed = (bare / "record").read_text()
    assert "update -qq" in installed
    packages = "g++ pkg-config libopencv-dev libturbojpeg0-dev libjpeg-dev libdeflate-dev"
    assert f"--no-install-recommends {packages}" in installed
    assert done.returncode == 2 and "still missing after apt-get" in done.stderr  # the stand-in installs nothing


def finish(checkout: Path) -> None:
    version = subprocess.run([sys.executable, "-c", "import sys; print(sys.version)"], capture_output=True, text=True)
    digest = hashlib.sha256(((checkout / "requirements.txt").read_text() + version.stdout).encode()).hexdigest()
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".installed").write_text(f"{digest}  -\n")


def test_a_finished_set_up_is_found_done(bare) -> None:
    finish(bare)
    done = run_setup(bare)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == [
        "NO C++ COMPILER (or no make): Pillow reads pictures, several times slower",
        "NO C++ COMPILER (or no make): noise is plain PyTorch, some 30 times slower",
    ]
    (bare / "requirements.txt").write_text("six==1.17.0\ntyro\n")  # another list: not done any more
    assert run_setup(bare).returncode == 2


def test_without_libjpegs_header_only_restart_markers_go_unbuilt(bare) -> None:
    finish(bare)
    sources = bare / "data_prep" / "csrc"
    sources.mkdir(parents=True)
    for path in (REPOSITORY / "data_prep" / "csrc").glob("*.c"):
        shutil.copy(path, sources)
    assert "NO C COMPILER: " in run_setup(bare).stderr
    compiler = shutil.which("cc") or shutil.which("gcc")
    stand_in(bare, "mv", f'exec {shutil.which("mv")} "$@"')
    headless = 'case "$*" in *jpeglib.h*) exit 1 ;; esac\n'
    stand_in(bare, "cc", f'echo "$@" >> "{bare}/record"\n{headless}PATH={os.environ["PATH"]} exec {compiler} "$@"')
    assert "NO HEADERS OF libjpeg (Debian's libjpeg-dev): shard --restart-markers is refused" in run_setup(bare).stderr
    built = sources / "libdata_prep.so", sources / "libdata_prep_jpeg.so"
    assert [path.is_file() for path in built] == [True, False]
    stand_in(bare, "cc", f'echo "$@" >> "{bare}/record"\nPATH={os.environ["PATH"]} exec {compiler} "$@"')
    assert "libjpeg" not in run_setup(bare).stderr
    assert all(path.is_file() for path in built)
    made = (bare / "record").read_text().count("-shared")
    assert run_setup(bare).returncode == 0 and (bare / "record").read_text().count("-shared") == made == 2


def test_the_scripts_are_executable() -> None:
    for name in ("setup.sh", ".ci/run"):
        assert os.access(REPOSITORY / name, os.X_OK), name
