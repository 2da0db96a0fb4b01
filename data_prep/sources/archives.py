"""ImageNet's archives as they are fetched, read where they lie: nothing is unpacked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.sources import Listing, ListingBuilder, Sample
from data_prep.sources.devkit import ARCHIVE_NAME, read_devkit
from data_prep.sources.reading import FileStamps, check_suffix, read_ahead
from data_prep.sources.tar_walk import walk_archive
from data_prep.storage import file_system, local_path, named_errors
from data_prep.tar_headers import Member

_VAL_NAME = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG", re.IGNORECASE)


@dataclass(frozen=True)
class TrainArchive:
    """ILSVRC2012_img_train.tar, a tar of one tar a class: as the ImageFolder that is unpacked from it."""

    url: str
    _stamps: FileStamps = field(default_factory=FileStamps, init=False, compare=False, repr=False)

    def describe(self) -> dict[str, Any]:
        return {"kind": "train-archive", "name": self.url.rpartition("/")[2]}

    def where(self, path: str) -> str:
        return f"{self.url}: {path}"

    def scan(self) -> Listing:
        """Lists classes and pictures from the tars' headers.

        Errors: ValueError or OSError naming the archive and the member, where it is cut or damaged, holds anything but
        tars of pictures, or holds something twice.
        """
        tars: dict[str, Member] = {}
        for member in _visible(walk_archive(self.url)):
            name, suffix = os.path.splitext(member.name.rpartition("/")[2])
            if suffix != ".tar":
                raise ValueError(f"{self.where(member.name)} is no tar of a class's pictures: remove it")
            if name in tars:
                raise ValueError(f"{self.where(member.name)} is there twice: fetch the archive again")
            tars[name] = member
        classes = sorted(tars)
        listing = ListingBuilder(classes)
        for label, pictures in enumerate(read_ahead(self._pictures, [tars[name] for name in classes])):
            for picture in pictures:
                listing.add(f"{classes[label]}/{picture.name}", label, (picture.offset, picture.size))
        return listing.listing()

    def read(self, samples: Sequence[Sample]) -> Iterator[bytes]:
        return _read(self.url, samples)

    def stamp(self, sample: Sample) -> str:
        return f"{self._stamps.of(self.url)} {sample.place}"

    def _pictures(self, tar: Member) -> list[Member]:
        """The pictures of one class, in an ImageFolder's order."""
        pictures: dict[str, Member] = {}
        for picture in _visible(walk_archive(self.url, tar)):
            where = self.where(f"{tar.name}: {picture.name}")
            check_suffix(picture.name, where)
            pictures[picture.name] = picture
        if not pictures:
            raise ValueError(f"{self.where(tar.name)} holds no pictures: fetch the archive again")
        return [pictures[name] for name in sorted(pictures, key=os.path.split)]


@dataclass(frozen=True)
class ValArchive:
    """ILSVRC2012_img_val.tar, whose pictures' classes are in the devkit: as the ImageFolder that is made of both."""

    url: str
    devkit: str  # path or URL of ILSVRC2012_devkit_t12.tar.gz, or of its folder
    _stamps: FileStamps = field(default_factory=FileStamps, init=False, compare=False, repr=False)

    def describe(self) -> dict[str, Any]:
        return {"kind": "val-archive", "name": self.url.rpartition("/")[2]}

    def where(self, path: str) -> str:
        return f"{self.url}: {path}"

    def scan(self) -> Listing:
        """Lists classes and pictures from the tar's headers and the devkit.

        Errors: as TrainArchive.scan; ValueError too where pictures and ground truth do not go together.
        """
        kit = read_devkit(self.devkit)
        pictures = self._pictures(len(kit.labels))
        labels = np.array(kit.labels)
        empty = np.setdiff1d(np.arange(len(kit.wnids)), labels)
        if len(empty):
            raise ValueError(
                f"{self.devkit}: {len(empty):,} of {len(kit.wnids):,} classes have no picture in the ground truth, the "
                f"first is {kit.wnids[empty[0]]}: fetch {ARCHIVE_NAME} again"
            )
        listing = ListingBuilder(kit.wnids, kit.words)
        for index in np.argsort(labels, kind="stable").tolist():
            name, offset, size = pictures[index]
            listing.add(f"{kit.wnids[kit.labels[index]]}/{name}", kit.labels[index], (offset, size))
        return listing.listing()

    def read(self, samples: Sequence[Sample]) -> Iterator[bytes]:
        return _read(self.url, samples)

    def stamp(self, sample: Sample) -> str:
        return f"{self._stamps.of(self.url)} {sample.place}"

    def _pictures(self, count: int) -> list[Member]:
        """Pictures 1 to `count`, of bare names."""
        found: dict[int, Member] = {}
        for member in _visible(walk_archive(self.url)):
            name = member.name.rpartition("/")[2]
            match = _VAL_NAME.fullmatch(name)
            if match is None:
                raise ValueError(f"{self.where(member.name)} is not ILSVRC2012_val_<8 digits>.JPEG: remove it")
            number = int(match[1])
            if number in found:
                raise ValueError(f"{self.where(member.name)} is there twice: fetch the archive again")
            if not 1 <= number <= count:
                raise ValueError(
                    f"{self.where(member.name)} has no line in the ground truth of {self.devkit}, which has {count:,}: "
                    "archive and devkit must be of one data set"
                )
            found[number] = member._replace(name=name)
        missing = [number for number in range(1, count + 1) if number not in found]
        if missing:
            raise ValueError(
                f"{self.url} holds {len(found):,} of the {count:,} pictures in the ground truth of {self.devkit}, the "
                f"first missing is ILSVRC2012_val_{missing[0]:08d}.JPEG: fetch the archive again"
            )
        return [found[number] for number in range(1, count + 1)]


def _visible(members: Iterator[Member]) -> Iterator[Member]:
    """Without hidden files (macOS puts `._x` beside x), which an ImageFolder passes over too."""
    return (member for member in members if not any(part.startswith(".") for part in member.name.split("/")))


def _read(url: str, samples: Sequence[Sample]) -> Iterator[bytes]:
    """The bytes at each sample's place. Errors: OSError naming the sample."""
    path = local_path(url)
    if path is None:
        with named_errors(url):
            fs, remote = file_system(url)
        yield from read_ahead(lambda sample: _whole(_fetched(fs, remote, sample, url), sample, url), samples)
        return
    # Unbuffered: a buffer would be one more copy of each picture.
    with open(path, "rb", buffering=0) as file:
        for sample in samples:
            offset, size = sample.place
            yield _whole(os.pread(file.fileno(), size, offset), sample, url)


def _fetched(fs: Any, remote: str, sample: Sample, url: str) -> bytes:
    offset, size = sample.place
    with named_errors(f"{url}: {sample.path}"):
        return fs.cat_file(remote, start=offset, end=offset + size) if size else b""


def _whole(data: bytes, sample: Sample, url: str) -> bytes:
    if len(data) != sample.place[1]:
        raise OSError(
            f"{url}: {sample.path} has {len(data):,} of {sample.place[1]:,} bytes: the archive was cut after it was "
            "listed: fetch it again"
        )
    return data
