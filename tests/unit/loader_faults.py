"""Damage to a split's files, and what its reader makes of it. Run with `make soak` for the full counts."""

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from small_shards import beton, tars

from data_prep.manifest import read_manifest, unpack_index
from pipeline.data.batch import Batch

OPEN = {"wds": tars, "ffcv": beton}


class Trial:
    """A copy of a split that is damaged and mended again and again."""

    def __init__(self, split: Path, folder: Path, form: str, seed: int) -> None:
        self.manifest = Path(shutil.copytree(split.parent, folder)) / split.name
        self.form = form
        self.draw = random.Random(seed)
        names = {"wds": ("*.tar", "train-*.idx"), "ffcv": ("*.beton", "*.beton.idx")}[form]
        # The file with the pictures four times as often as its index.
        self.pictures, self.indexes = (sorted(folder.glob(pattern)) for pattern in names)
        self.good = {path: path.read_bytes() for path in (*self.pictures, *self.indexes)}
        self.expected = self.read()
        self.outcomes: Counter[str] = Counter()

    def read(self, reader=None) -> Batch:
        reader = reader or OPEN[self.form](self.manifest)
        return reader.batch(np.arange(24), epoch=1)

    def one_of(self, *paths: Path) -> Path:
        return self.draw.choice(paths or [*self.pictures * 4, *self.indexes])

    def judge(self, path: Path, what: str, reader=None) -> None:
        """Reads everything: an error must name the file; without one every picture and label must be the right one."""
        try:
            found = self.read(reader)
        except (ValueError, OSError) as error:
            assert path.stem in str(error), f"{what}: another file is named: {error}"
            self.outcomes["refused"] += 1
        else:
            same = all(a.equal(b) for a, b in zip(found[:3], self.expected[:3], strict=True))
            assert same, f"{what} was accepted in silence"
            self.outcomes["harmless"] += 1  # in a header or between members, of which nothing is read
        for damaged, data in self.good.items():
            if damaged == path or damaged.stat().st_size != len(data):
                damaged.write_bytes(data)

    def flip(self) -> None:
        """One bit: two times of three in a picture, else anywhere; most of a small .beton is padding."""
        path = self.one_of()
        data = bytearray(self.good[path])
        place, bit = self.draw.randrange(len(data)), self.draw.randrange(8)
        if path in self.pictures and self.draw.random() < 2 / 3:
            entry = self.draw.choice(self._entries(path))
            place = entry.offset + self.draw.randrange(entry.size)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        self.judge(path, f"bit {bit} of byte {place} of {path.name}")

    def cut(self) -> None:
        """Before the split is opened, or while it is open; at a picture's edge, a block's, or anywhere."""
        path = self.one_of()
        length = self.draw.choice((self._edge(path), self.draw.randrange(len(self.good[path]))))
        reader = OPEN[self.form](self.manifest) if path in self.pictures and self.draw.random() < 0.5 else None
        path.write_bytes(self.good[path][:length])
        self.judge(path, f"{path.name} cut to {length} bytes", reader)

    def swap(self) -> None:
        """The places of two pictures, where they are as long or not; of two records of an index; or of two files."""
        how = self.draw.choice(("pictures", "records", "files"))
        path = self.one_of(*(self.pictures if how == "pictures" else self.indexes))
        data = bytearray(self.good[path])
        if how == "files" and len(self.pictures) > 1:
            group = self.draw.choice((self.pictures, self.indexes))
            path, other = self.draw.sample(group, 2)
            path.write_bytes(self.good[other])
        elif how == "pictures":
            one, other = self.draw.sample(self._entries(path), 2)
            length = min(one.size, other.size)
            first, second = (slice(entry.offset, entry.offset + length) for entry in (one, other))
            data[first], data[second] = data[second], data[first]
            path.write_bytes(data)
        else:
            one, other = (20 + 20 * i for i in self.draw.sample(range((len(data) - 24) // 20), 2))
            data[one : one + 20], data[other : other + 20] = data[other : other + 20], data[one : one + 20]
            path.write_bytes(data)
        self.judge(path, f"a swap of {how} in {path.name}")

    def _edge(self, path: Path) -> int:
        if path in self.indexes:
            return self.draw.randrange(20, len(self.good[path]), 20)
        entry = self.draw.choice(self._entries(path))
        return self.draw.choice((entry.offset, entry.offset + entry.size, entry.offset // 512 * 512))

    def _entries(self, path: Path):
        manifest = read_manifest(self.manifest)
        beton_index = path.with_name(f"{path.name}.idx")
        index = beton_index if self.form == "ffcv" else path.with_suffix(".idx")
        assert manifest.num_samples == 24
        return unpack_index(self.good[index], index)


def trials(split: Path, folder: Path, form: str, flips: int, cuts: int, swaps: int) -> Counter[str]:
    """Runs the faults; returns how each kind ended. Errors: AssertionError for one that is accepted in silence."""
    trial = Trial(split, folder, form, seed=flips)
    ends: Counter[str] = Counter()
    for kind, count in (("flip", flips), ("cut", cuts), ("swap", swaps)):
        for _ in range(count):
            getattr(trial, kind)()
        ends.update({f"{kind} {end}": n for end, n in trial.outcomes.items()})
        trial.outcomes.clear()
    trial.judge(trial.indexes[0], "nothing at all")
    assert trial.outcomes == {"harmless": 1}, "the copy was not mended between the trials"
    return ends
