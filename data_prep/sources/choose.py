"""Which source a path or URL names."""

from __future__ import annotations

import itertools
from pathlib import Path

from data_prep.manifest import MANIFEST_SUFFIX
from data_prep.sources import PICTURE_SUFFIXES, Source
from data_prep.sources.archives import TrainArchive, ValArchive
from data_prep.sources.devkit import ARCHIVE_NAME
from data_prep.sources.image_folder import ImageFolder, RemoteImageFolder
from data_prep.sources.names import read_classes
from data_prep.sources.parquet import Parquet, find_parquet
from data_prep.sources.shards import ShardSource
from data_prep.sources.tar_walk import walk_archive
from data_prep.storage import local_path

_ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
# Of a WebDataset tar's first members, one is a label.
_MEMBERS_LOOKED_AT = 4
_LABEL_SUFFIXES = (".cls", ".json", ".txt")


def open_source(url: str, devkit: str | None = None, classes: str | None = None) -> Source:
    """The source that `url` names, by what is there: class folders, one of ImageNet's archives, or Parquet files.

    `devkit` names ImageNet's development kit, for the archive of validation pictures alone; `classes` a file of class
    names, for Parquet files alone.
    Errors: ValueError or FileNotFoundError where nothing is there, it is nothing that can be read, or an option is
    missing or would not be read.
    """
    if url.endswith(MANIFEST_SUFFIX):
        _refuse("--devkit", devkit, url, "a manifest of shards")
        _refuse("--classes", classes, url, "a manifest of shards")
        if (manifest := local_path(url)) is None:
            raise ValueError(f"source {url}: shards of a store cannot be a source: copy them to a disk first")
        return ShardSource(manifest)
    path = local_path(url)
    if url.endswith(_ARCHIVE_SUFFIXES) and not (path is not None and path.is_dir()):
        _refuse("--classes", classes, url, "an archive")
        return _archive(url, devkit)
    _refuse("--devkit", devkit, url, "no .tar")
    if found := find_parquet(url):
        return Parquet(found, None if classes is None else read_classes(classes))
    _refuse("--classes", classes, url, "no Parquet file and holds none")
    if url.endswith(".parquet"):
        raise FileNotFoundError(f"source {url} names no file: name a folder of *.parquet, one file, or a pattern")
    return RemoteImageFolder(url.rstrip("/")) if path is None else ImageFolder(Path(path))


def _refuse(option: str, value: str | None, url: str, what: str) -> None:
    if value is not None:
        raise ValueError(f"{option} {value}: source {url} is {what}, and would not read it: leave it out")


def _archive(url: str, devkit: str | None) -> Source:
    if not url.endswith(".tar"):
        raise ValueError(f"source {url} is compressed, so that no picture can be reached alone: unpack it first")
    names = [member.name for member in itertools.islice(walk_archive(url), _MEMBERS_LOOKED_AT)]
    if not names:
        raise ValueError(f"source {url} is an empty tar: fetch it again")
    if any(name.endswith(_LABEL_SUFFIXES) for name in names):
        raise ValueError(
            f"source {url} is a WebDataset shard: such shards are used as they are, after `python -m data_prep index`"
        )
    if names[0].endswith(".tar"):
        _refuse("--devkit", devkit, url, "a tar of one tar a class")
        return TrainArchive(url)
    if not names[0].lower().endswith(PICTURE_SUFFIXES):
        raise ValueError(f"source {url} begins with {names[0]}, which is neither picture nor tar of pictures")
    if devkit is None:
        raise ValueError(f"source {url} is a tar of pictures without classes: give --devkit {ARCHIVE_NAME}")
    return ValArchive(url, devkit)
