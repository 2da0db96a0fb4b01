"""A job's own copy of the code, so that it runs what it was submitted with, however long it waits or is requeued."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("data_prep", "pipeline", "jobs", "benchmarks")
COMMIT_NAME = "commit.txt"


def copy_code(source: Path, target: Path) -> None:
    """Copies the working tree's files as they are, uncommitted changes too, and the libraries built beside them."""
    for path in sorted(set(code_files(source))):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copied)  # times too: a library must stay newer than its sources


def code_files(source: Path) -> Iterator[Path]:
    """What git tracks, and Python files that it does not know yet (a new recipe); all of the packages without git."""
    if is_repository(source):
        listed = git(source, "ls-files", "-z") + git(source, "ls-files", "-z", "-o", "--exclude-standard", "--", "*.py")
        yield from (path for name in listed.split("\0") if name and (path := source / name).is_file())
    else:
        packages = [path for package in PACKAGES for path in (source / package).rglob("*")]
        yield from (path for path in packages if path.is_file() and "__pycache__" not in path.parts)
    for package in PACKAGES:
        yield from (source / package).rglob("*.so")


def describe_commit(source: Path) -> str:
    """The commit, what differs from it, and how. Names no remote: its URL may hold a password."""
    if not is_repository(source):
        return "commit unknown: the code was in no git repository\n"
    status, diff = git(source, "status", "--short"), git(source, "diff", "HEAD")
    return f"commit {commit_of(source)}\n\n{status}\n{diff}"


def commit_of(source: Path) -> str:
    """The commit, with `+changes` where the working tree differs from it; or `unknown`."""
    if not is_repository(source):
        return "unknown"
    changed = git(source, "status", "--porcelain", "--untracked-files=no").strip()
    return git(source, "rev-parse", "HEAD").strip() + ("+changes" if changed else "")


def is_repository(source: Path) -> bool:
    """Whether this folder itself is one: inside another, that one's commit would be told."""
    return shutil.which("git") is not None and (source / ".git").exists()


def git(source: Path, *words: str) -> str:
    """Errors: ValueError with what git says."""
    command = ["git", "-c", "core.quotepath=off", "-C", str(source), *words]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise ValueError(f"the code's state could not be read: `git {words[0]}` in {source}: {said}")
    return done.stdout.decode("utf-8", errors="surrogateescape")
