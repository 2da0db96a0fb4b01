"""The pictures of tars in the formats of other libraries, their bytes as they are."""

from __future__ import annotations

import multiprocessing
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_PICTURES = ("jpg", "jpeg", "png", "webp")


class Sample(NamedTuple):
    path: str
    label: int


def write_folder(tars: Sequence[Path], folder: Path) -> list[Sample]:
    """An ImageFolder; a class is named by its label, padded so that sorting by name keeps the order of the labels."""
    samples = []
    for number, (suffix, data, label) in enumerate(_members(tars)):
        path = folder / f"{label:06d}" / f"{number:08d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        samples.append(Sample(str(path), label))
    return samples


def _members(tars: Sequence[Path]) -> Iterator[tuple[str, bytes, int]]:
    """(suffix, picture's bytes, label) of each sample; its members stand next to one another."""
    for path in tars:
        key = ""
        found: dict[str, bytes] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, suffix = member.name.partition(".")
                if stem != key:
                    key, found = stem, {}
                content = tar.extractfile(member)
                assert content is not None, f"{path}: {member.name} is no file"
                found[suffix] = content.read()
                picture = next((suffix for suffix in _PICTURES if suffix in found), None)
                if picture is not None and "cls" in found:
                    yield picture, found.pop(picture), int(found["cls"])


def write_mds(samples: Sequence[Sample], folder: Path) -> None:
    """MosaicML Streaming's shards; by default of 64 MB."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
        for sample in samples:
            writer.write({"image": Path(sample.path).read_bytes(), "label": sample.label})


def write_litdata(samples: Sequence[Sample], folder: Path, processes: int) -> None:
    """LitData's chunks, of the 64 MB that its README takes."""
    from litdata import optimize

    # It sets this process's way to start others for good: to what it is already.
    start = multiprocessing.get_start_method()
    optimize(
        _litdata_sample,
        list(samples),
        str(folder),
        chunk_bytes="64MB",
        num_workers=processes,
        start_method=start,
        verbose=False,
    )


def _litdata_sample(sample: Sample) -> dict[str, Any]:
    from litdata import Jpeg

    # By default it encodes anew what is of a quality above 95.
    return {"image": Jpeg(path=sample.path, max_quality=None), "label": sample.label}
