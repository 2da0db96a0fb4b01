"""The sample ledger: which rank has trained on which samples in which step. Proves that none is lost or repeated."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.manifest import atomic_file

FOLDER = "ledger"


class SampleLedger:
    """A line a step in RUN/ledger/rank-NNNNN.jsonl: {"step", "epoch", "world_size", "sample_ids"}."""

    def __init__(self, run: Path, rank: int, world_size: int) -> None:
        folder = run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._world_size = world_size
        self._file = open(folder / f"rank-{rank:05d}.jsonl", "a", buffering=1)  # noqa: SIM115  (closed in close)
        self._sample_ids: list[int] = []

    def note(self, sample_ids: list[int]) -> None:
        """A micro-batch of the step under way."""
        self._sample_ids += sample_ids

    def end_step(self, step: int, epoch: int) -> None:
        line = {"step": step, "epoch": epoch, "world_size": self._world_size, "sample_ids": self._sample_ids}
        self._sample_ids = []
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            print(f"warning: step {step} is not in the ledger ({error}): the run goes on", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._file.close()


def cut_ledger(run: Path, done_steps: int) -> None:
    """Drops what killed runs have noted beyond the step that is resumed: those steps are taken again. By one rank."""
    for path in sorted((run / FOLDER).glob("rank-*.jsonl")):
        kept = [line for line, entry in _lines(path) if entry["step"] <= done_steps]
        with atomic_file(path) as file:
            file.write("".join(f"{line}\n" for line in kept).encode())


def read_ledger(run: Path) -> dict[int, list[int]]:
    """Step -> its sample ids in the global order, from the files of all ranks.

    Errors: ValueError where ranks have noted a step under different world sizes, or one of them is missing.
    """
    found: dict[int, dict[int, list[int]]] = {}
    sizes: dict[int, set[int]] = {}
    for path in sorted((run / FOLDER).glob("rank-*.jsonl")):
        rank = int(path.stem.removeprefix("rank-"))
        for _, entry in _lines(path):
            if rank in found.setdefault(entry["step"], {}):
                raise ValueError(f"{path} has step {entry['step']} twice")
            found[entry["step"]][rank] = entry["sample_ids"]
            sizes.setdefault(entry["step"], set()).add(entry["world_size"])
    for step, by_rank in found.items():
        if sizes[step] != {len(by_rank)}:
            raise ValueError(f"{run / FOLDER}: step {step} was noted by {len(by_rank)} ranks of {sorted(sizes[step])}")
    return {step: [i for rank in sorted(found[step]) for i in found[step][rank]] for step in sorted(found)}


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Whole lines alone: a killed rank may have left half of one."""
    for line in path.read_text().splitlines():
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError:
            continue
