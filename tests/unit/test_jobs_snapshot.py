"""What a submitted job takes with it: the working tree as it is, and how that differs from its commit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.snapshot import commit_of, copy_code, describe_commit

REPOSITORY = Path(__file__).parents[2]


def git(folder: Path, *words: str) -> None:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    subprocess.run(["git", *words], cwd=folder, env=os.environ | identity, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with a changed, a removed, a new and an ignored file, and a library built beside its source."""
    source = tmp_path / "the source"
    (source / "jobs").mkdir(parents=True)
    (source / ".gitignore").write_text("*.so\nsecrets.py\n")
    for name in ("kept é.txt", "changed.txt", "removed.txt", "jobs/code.c"):
        (source / name).write_text("committed\n")
    git(source, "init", "-q")
    git(source, "add", "-A")
    git(source, "commit", "-q", "-m", "first")
    git(source, "remote", "add", "origin", "https://me:password@host/repository")
    (source / "changed.txt").write_text("changed since\n")
    (source / "removed.txt").unlink()
    for name in ("jobs/new_recipe.py", "notes.txt", "secrets.py", "jobs/libcode.so"):
        (source / name).write_text("new")
    return source


def test_the_copy_is_the_working_tree(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "code"
    copy_code(tree, target)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    kept = {".gitignore", "kept é.txt", "changed.txt", "jobs/code.c"}
    assert found == kept | {"jobs/new_recipe.py", "jobs/libcode.so"}  # a recipe not yet added, and what was built
    assert (target / "changed.txt").read_text() == "changed since\n"
    assert (target / "jobs/libcode.so").stat().st_mtime == (tree / "jobs/libcode.so").stat().st_mtime


def test_the_commit_is_told_with_its_changes_and_no_remote(tree: Path) -> None:
    text = describe_commit(tree)
    assert text.startswith(f"commit {commit_of(tree)}\n") and commit_of(tree).endswith("+changes")
    assert "+changed since" in text and "?? notes.txt" in text
    assert "password" not in text
    git(tree, "checkout", "-q", "--", ".")
    assert len(commit_of(tree)) == 40


def test_without_git_the_packages_are_copied(tree: Path, tmp_path: Path) -> None:
    (tree / ".git").rename(tmp_path / "elsewhere")
    (tree / "jobs" / "__pycache__").mkdir()
    (tree / "jobs" / "__pycache__" / "x.pyc").write_text("")
    copy_code(tree, tmp_path / "code")
    found = {str(path.relative_to(tmp_path / "code")) for path in (tmp_path / "code").rglob("*") if path.is_file()}
    assert found == {"jobs/code.c", "jobs/new_recipe.py", "jobs/libcode.so"}
    assert commit_of(tree) == "unknown"


def test_a_job_runs_its_copy_and_not_the_working_tree(tmp_path: Path) -> None:
    """Though it starts in the working tree, where a module of the same name lies."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} -c "import jobs; print(jobs.__file__)"\n')
    python.chmod(0o755)
    launch = ("--launch-folder", str(tmp_path / "it's here"), "--python", str(python), "--submit")
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "local", "data_prep", *launch, "--", "stats", "x"],
        cwd=REPOSITORY,
        env=os.environ | {"HF_TOKEN": "hf-secret-1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == str(tmp_path / "it's here/1/code/jobs/__init__.py"), done.stderr
    written = [path for path in (tmp_path / "it's here").rglob("*") if path.is_file()]
    assert not any(b"hf-secret-1" in path.read_bytes() for path in written if "tests" not in path.parts)
