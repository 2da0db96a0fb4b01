"""ImageNet's variants as they lie on disk once unpacked: folders, and the classes that they are of.

V2      Recht et al. 2019, Do ImageNet Classifiers Generalize to ImageNet? 10,000 pictures, 10 a class, in each of three
        choices: imagenetv2-matched-frequency-format-val/<index>/<hash>.jpeg, likewise -threshold0.7- and -top-images-.
        <index> is 0 to 999 in the order of the WordNet ids. As text it sorts 0, 1, 10, 100: ImageFolder's labels are
        other classes.
A       Hendrycks et al. 2021, Natural Adversarial Examples. 7,500 pictures of 200 classes: imagenet-a/<wnid>/*.jpg,
        with a README.txt beside the folders. The answer is the largest of those 200 logits.
R       Hendrycks et al. 2021, The Many Faces of Robustness. 30,000 pictures of 200 other classes (86 are in both):
        imagenet-r/<wnid>/*.jpg; else as A.
Sketch  Wang et al. 2019, Learning Robust Global Representations by Penalizing Local Predictive Power. 50,889 pictures
        of all classes: sketch/<wnid>/sketch_<n>.JPEG.
C       corruptions.py. ReaL: real.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.folder import class_folders
from pipeline.variants.classes import WNID, WordNetClasses, synsets
from pipeline.variants.corruptions import EXTRA, GROUPS, SEVERITIES

_SUBSETS = {"a": "imagenet_a", "r": "imagenet_r"}
_PICTURES = {"val": 50_000, "v2": 10_000, "a": 7_500, "r": 30_000, "sketch": 50_889, "c": 50_000}
NAMES = {"val": "ImageNet", "v2": "ImageNet-V2", "a": "ImageNet-A", "r": "ImageNet-R", "sketch": "ImageNet-Sketch"}
NAMES["c"] = "ImageNet-C"


@dataclass(frozen=True)
class Layout:
    """The class folders of one set, in the order of its labels."""

    option: str  # the key of NAMES
    root: Path
    folders: tuple[str, ...]
    classes: tuple[str, ...]  # their WordNet ids
    columns: np.ndarray  # int64 (classes,): their logits


def find_layout(option: str, root: Path, own: WordNetClasses) -> Layout:
    """The set that `option` names. Errors: OSError or ValueError naming the folder, what it seems to hold, the mend."""
    folders = class_folders(root)
    if option == "v2":
        return _by_index(root, folders, own)
    if not folders or not all(map(WNID.fullmatch, folders)):
        raise ValueError(f"--{option} {root} holds {_what(folders, root)}, not one folder a WordNet id")
    if unknown := sorted(set(folders) - set(own.names)):
        raise ValueError(
            f"--{option} {root} has classes that the checkpoint has not ({_few(unknown)}): name {NAMES[option]} as it "
            "was published, and a checkpoint of all of ImageNet's classes"
        )
    if option in _SUBSETS:
        _check_subset(option, root, folders, own)
    elif missing := sorted(set(own.names) - set(folders)):
        raise ValueError(
            f"--{option} {root} has {len(folders)} of the checkpoint's {len(own.names)} classes, without "
            f"{_few(missing)}: unpack all of {NAMES[option]}; sets of some classes are --a and --r"
        )
    return Layout(option, root, folders, folders, own.columns_of(folders))


def notes_on(layout: Layout, pictures: int, own: WordNetClasses) -> tuple[str, ...]:
    """What of a set is not as it was published."""
    name = NAMES[layout.option]
    if not own.is_imagenet:
        return (
            f"{name}: the checkpoint's {len(own.names)} classes are not ImageNet's, so this is not the published set",
        )
    published = _PICTURES[layout.option]
    return () if pictures == published else (f"{name}: {pictures:,} pictures, of {published:,} that were published",)


def _by_index(root: Path, folders: tuple[str, ...], own: WordNetClasses) -> Layout:
    """Folder i is the i-th WordNet id, whatever the text sorts like."""
    count = len(own.names)
    wanted = tuple(map(str, range(count)))
    if not folders or not all(name.isdecimal() for name in folders):
        raise ValueError(f"--v2 {root} holds {_what(folders, root)}, not one folder a class index, 0 to {count - 1}")
    missing, unknown = (
        sorted(part, key=_as_index) for part in (set(wanted) - set(folders), set(folders) - set(wanted))
    )
    if missing or unknown:
        faults = [f"without {_few(missing)}"] if missing else []
        faults += [f"with {_few(unknown)}"] if unknown else []
        raise ValueError(
            f"--v2 {root} has {len(folders)} class indices, {' and '.join(faults)}; the checkpoint's {count} classes "
            f"are 0 to {count - 1}: unpack all of it, and evaluate a checkpoint of all of ImageNet's classes"
        )
    return Layout("v2", root, wanted, own.names, own.columns)


def _check_subset(option: str, root: Path, folders: tuple[str, ...], own: WordNetClasses) -> None:
    """Errors: ValueError where -A or -R has other classes than it was published with."""
    if len(folders) == len(own.names):
        raise ValueError(
            f"--{option} {root} has all {len(folders)} classes of the checkpoint, {NAMES[option]} some alone: is it "
            "--sketch, or --val?"
        )
    if not own.is_imagenet:
        return
    published = {name: synsets(listed) for name, listed in _SUBSETS.items()}
    for other in published.keys() - {option}:
        if folders == published[other]:
            raise ValueError(f"--{option} {root} has the classes of {NAMES[other]}: give it as --{other}")
    missing, unknown = (sorted(part) for part in _differences(published[option], folders))
    if missing or unknown:
        faults = [f"it lacks {_few(missing)}"] if missing else []
        faults += [f"{_few(unknown)} are not in it"] if unknown else []
        raise ValueError(
            f"--{option} {root} has {len(folders)} classes, not the 200 of {NAMES[option]} ({'; '.join(faults)}): its "
            "logits are compared among those 200, so unpack it as it was published"
        )


def _differences(wanted: Sequence[str], found: Sequence[str]) -> tuple[set[str], set[str]]:
    return set(wanted) - set(found), set(found) - set(wanted)


def _what(folders: tuple[str, ...], root: Path) -> str:
    """What a folder seems to hold, and how to name it, for messages."""
    names = set(folders)
    if not names:
        return "no folders (unpack the set there)"
    if names == set(SEVERITIES):
        return "severities 1 to 5 (of one corruption of ImageNet-C: give --c the folder above the corruptions)"
    if all(name.isdecimal() for name in names):
        return f"class indices ({_few(folders)}: ImageNet-V2's layout, give it as --v2)"
    if all(map(WNID.fullmatch, names)):
        return f"{len(names)} WordNet ids (give it as --a, --r or --sketch, whichever it is)"
    if names & {*GROUPS, *EXTRA, *(name for group in GROUPS.values() for name in group)}:
        return f"corruptions ({_few(folders)}: ImageNet-C's layout, give it as --c)"
    return f"{_few(folders)} (name the one in it that holds the classes, such as {root / folders[0]})"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _as_index(name: str) -> tuple[int, str]:
    return int(name), name
