"""ImageNet's development kit (ILSVRC2012_devkit_t12): which class each validation picture is of.

Its ground truth has an ILSVRC2012_ID for each picture. Those ids are not labels: they follow neither the order of the
wnids nor any other, so they go through the kit's own table, meta.mat, which also holds the inner nodes of the tree.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.storage import Folder, local_path, open_file, open_folder

ARCHIVE_NAME = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH_NAME = "data/ILSVRC2012_validation_ground_truth.txt"
META_NAME = "data/meta.mat"
_ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
# The real ones have 0.2 and 1.4 MB; more is no devkit, and is not unpacked into memory.
_MAX_MEMBER_BYTES = 64 << 20


class Devkit(NamedTuple):
    """Labels are indices into the sorted wnids, as an ImageFolder's are."""

    wnids: tuple[str, ...]  # sorted
    words: tuple[str, ...]  # readable, in the order of wnids
    labels: tuple[int, ...]  # of validation picture 1, 2, ...


def read_devkit(url: str) -> Devkit:
    """Reads the kit as it is fetched, or its unpacked folder.

    Errors: FileNotFoundError or ValueError naming the file in it, and the line, and the mend.
    """
    meta, truth = _files(url)
    wnid_of_id, words = _synsets(meta, f"{url}: {META_NAME}")
    wnids = tuple(sorted(words))
    label_of_wnid = {wnid: label for label, wnid in enumerate(wnids)}
    labels = []
    for number, line in enumerate(truth.decode("ascii", "replace").splitlines(), 1):
        try:
            labels.append(label_of_wnid[wnid_of_id[int(line)]])
        except (ValueError, KeyError):
            raise ValueError(
                f"{url}: {TRUTH_NAME}, line {number} is {line!r}, which is no id of a class in {META_NAME}: "
                f"fetch {ARCHIVE_NAME} again"
            ) from None
    return Devkit(wnids, tuple(words[wnid] for wnid in wnids), tuple(labels))


def _files(url: str) -> tuple[bytes, bytes]:
    """Bytes of meta.mat and of the ground truth."""
    path = local_path(url)
    if path is not None and not path.exists():
        raise FileNotFoundError(f"--devkit {url} does not exist: name {ARCHIVE_NAME} or the folder unpacked from it")
    if path.is_file() if path is not None else url.endswith(_ARCHIVE_SUFFIXES):
        folder, name = open_file(url)
        return _unpacked(folder.read(name), url)
    for place in (url.rstrip("/"), f"{url.rstrip('/')}/{ARCHIVE_NAME.removesuffix('.tar.gz')}"):
        unpacked: Folder = open_folder(place)
        if unpacked.size(META_NAME) is not None and unpacked.size(TRUTH_NAME) is not None:
            return unpacked.read(META_NAME), unpacked.read(TRUTH_NAME)
    raise ValueError(f"--devkit {url} holds no {META_NAME} with {TRUTH_NAME}: name {ARCHIVE_NAME}, or its folder")


def _unpacked(data: bytes, url: str) -> tuple[bytes, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                name = "/".join(Path(member.name).parts[-2:])
                file = tar.extractfile(member) if member.isfile() and member.size <= _MAX_MEMBER_BYTES else None
                if name in (META_NAME, TRUTH_NAME) and file is not None:
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"--devkit {url} cannot be read ({error}): fetch {ARCHIVE_NAME} again") from error
    for name in (META_NAME, TRUTH_NAME):
        if name not in found:
            raise ValueError(f"--devkit {url} holds no {name}: name {ARCHIVE_NAME}, or its folder")
    return found[META_NAME], found[TRUTH_NAME]


def _synsets(data: bytes, where: str) -> tuple[dict[int, str], dict[str, str]]:
    """(wnid by ILSVRC2012_ID, readable name by wnid) of the classes, which are the leaves of the tree."""
    from scipy.io import loadmat  # 0.2 s

    try:
        table: Any = np.atleast_1d(loadmat(io.BytesIO(data), variable_names=["synsets"], squeeze_me=True)["synsets"])
        leaves = [row for row in table if int(row["num_children"]) == 0]
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"])) for row in leaves]
    except Exception as error:  # scipy's reader raises whatever it meets in a damaged file
        raise ValueError(
            f"{where} cannot be read ({type(error).__name__}: {error}): fetch {ARCHIVE_NAME} again"
        ) from error
    wnid_of_id = {number: wnid for number, wnid, _ in rows}
    words = {wnid: readable for _, wnid, readable in rows}
    if not rows or not len(wnid_of_id) == len(words) == len(rows):
        raise ValueError(f"{where} names a class twice, or none: fetch {ARCHIVE_NAME} again")
    return wnid_of_id, words
