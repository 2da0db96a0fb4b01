"""ReaL labels (Beyer et al. 2020, Are we done with ImageNet?): what is really in each validation picture.

real.json is a list of 50,000 lists of class indices, in the order of the WordNet ids; entry i is of
ILSVRC2012_val_{i + 1:08d}. An answer that is in its list is right. 3,163 lists are empty: no class was agreed on, and
those pictures do not count. Labels go with a picture's own number, so its name has to be known.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from pipeline.data.folder import FolderSource
from pipeline.data.shards import TarSource
from pipeline.data.source import Source
from pipeline.variants.classes import WordNetClasses

VALIDATION_PICTURES = 50_000
# As data_prep writes keys (n01440764_ILSVRC2012_val_00000293), and the class behind it as some archives have it.
_KEY = re.compile(r"(?:.*[/_])?ILSVRC2012_val_([0-9]{8})(?:_n[0-9]{8})?")


def read_real(path: Path, own: WordNetClasses) -> list[frozenset[int]]:
    """The accepted class indices of picture 1, 2, ...

    Errors: OSError or ValueError naming the file, the entry and the mend.
    """
    mend = "fetch real.json of google-research/reassessed-imagenet again"
    try:
        body = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"--real {path} is not JSON ({error}): {mend}") from error
    if not isinstance(body, list) or not body:
        raise ValueError(f"--real {path} is no list of lists of class indices: {mend}")
    if own.is_imagenet and len(body) != VALIDATION_PICTURES:
        raise ValueError(f"--real {path} has {len(body):,} entries, not {VALIDATION_PICTURES:,}: {mend}")
    for number, entry in enumerate(body):
        if not isinstance(entry, list) or not all(type(i) is int and 0 <= i < len(own.names) for i in entry):
            raise ValueError(
                f"--real {path}: entry {number} is {json.dumps(entry)[:60]}, no list of class indices from 0 to "
                f"{len(own.names) - 1}: {mend}"
            )
    return [frozenset(entry) for entry in body]


def accepted_answers(source: Source, real: list[frozenset[int]]) -> list[frozenset[int]]:
    """The accepted class indices of each sample, by its file's name.

    Errors: ValueError naming the sample whose name is none of ILSVRC2012_val's, is beyond real.json, or is there twice.
    """
    accepted: list[frozenset[int]] = []
    seen: dict[int, int] = {}  # number -> sample id
    for sample_id, key in enumerate(_keys(source)):
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{source.where(sample_id)} is called {key!r}, not ILSVRC2012_val_<number>: ReaL's labels go by that "
                "name, so give --val as the validation set's own pictures, or the shards made of them"
            )
        number = int(match[1])
        if not 1 <= number <= len(real):
            raise ValueError(f"{source.where(sample_id)} is number {number}, but --real has {len(real)} entries")
        if number in seen:
            other = source.where(seen[number])
            raise ValueError(f"{source.where(sample_id)} and {other} are both number {number}: name each picture once")
        seen[number] = sample_id
        accepted.append(real[number - 1])
    return accepted


def _keys(source: Source) -> list[str]:
    """Of all samples, in order: file names up to their first dot."""
    if isinstance(source, FolderSource):
        names = [source.path(i).name for i in range(len(source.index))]
    elif isinstance(source, TarSource):
        names = list(source.member_names())
    else:
        raise ValueError(f"{source.where(0)}: a .beton holds no names, by which ReaL's labels go: give --val as shards")
    return [name.rpartition("/")[2].partition(".")[0] for name in names]


def count_real(predicted: np.ndarray, accepted: list[frozenset[int]]) -> tuple[int, int]:
    """(right, counted). predicted: class indices in the order of the WordNet ids, int64 (n,)."""
    pairs = [(answer, those) for answer, those in zip(predicted.tolist(), accepted, strict=True) if those]
    return sum(answer in those for answer, those in pairs), len(pairs)
