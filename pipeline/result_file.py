"""The JSON file that a command's result goes to, settled before it is computed, which may take hours."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

SAMPLES_KEY = "samples_sha256"  # of a report: the digest of its pictures, or of each set's


def result_file(output: Path | None, default: Path, samples: str | Mapping[str, str]) -> Path:
    """Where the result goes, its folder made.

    output: what the user has named, which is written over. default: else; it is not, if it holds a result of other
    pictures. samples: what the report will have under SAMPLES_KEY. Errors: ValueError naming the file and the mend.
    """
    path = default if output is None else output
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it, such as {path / 'result.json'}")
    if blocked := next((p for p in path.parents if p.exists() and not p.is_dir()), None):
        raise ValueError(f"--output {path}: {blocked} is a file, no folder: name a file in a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {path}: its folder cannot be made ({error.strerror}): name another") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--output {path}: {path.parent} cannot be written to: name a file in another folder")
    if output is None and path.exists() and _samples_of(path) != samples:
        raise ValueError(f"{path} holds a result of other pictures: move it away, or name another place with --output")
    return path


def _samples_of(path: Path) -> object:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None
    return body.get(SAMPLES_KEY) if isinstance(body, dict) else None
