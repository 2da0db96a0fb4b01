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

# By option. torchrun would take a `--r` for one of its own, so the names are whole.
NAMES = {
    "val": "ImageNet",
    "imagenet_v2": "ImageNet-V2",
    "imagenet_a": "ImageNet-A",
    "imagenet_r": "ImageNet-R",
    "imagenet_sketch": "ImageNet-Sketch",
    "imagenet_c": "ImageNet-C",
}
_PICTURES = {
    "val": 50_000,
    "imagenet_v2": 10_000,
    "imagenet_a": 7_500,
    "imagenet_r": 30_000,
    "imagenet_sketch": 50_889,
    "imagenet_c": 50_000,
}
_SUBSETS = ("imagenet_a", "imagenet_r")


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
    flag = flag_of(option)
    if option == "imagenet_v2":
        return _by_index(root, folders, own)
    if not folders or not all(map(WNID.fullmatch, folders)):
        raise ValueError(f"{flag} {root} holds {_what(folders, root)}, not one folder a WordNet id")
    if unknown := sorted(set(folders) - set(own.names)):
        raise ValueError(
            f"{flag} {root} has classes that the checkpoint has not ({_few(unknown)}): name {NAMES[option]} as it "
            "was published, and a checkpoint of all of ImageNet's classes"
        )
    if option in _SUBSETS:
        _check_subset(option, root, folders, own)
    elif missing := sorted(set(own.names) - set(folders)):
        raise ValueError(
            f"{flag} {root} has {len(folders)} of the checkpoint's {len(own.names)} classes, without "
            f"{_few(missing)}: unpack all of {NAMES[option]}; sets of some classes are --imagenet-a and -r"
        )
    return Layout(option, root, folders, folders, own.columns_of(folders))


def flag_of(option: str) -> str:
    """As it stands on a command line."""
    return "--" + option.replace("_", "-")


def notes_on(layout: Layout, pictures: int, own: WordNetClasses) -> tuple[str, ...]:
    """What of a set is not as it was published; of other classes than ImageNet's, none is."""
    published = _PICTURES[layout.option]
    if not own.is_imagenet or pictures == published:
        return ()
    return (f"{NAMES[layout.option]}: {pictures:,} pictures, of {published:,} that were published",)


def _by_index(root: Path, folders: tuple[str, ...], own: WordNetClasses) -> Layout:
    """Folder i is the i-th WordNet id, whatever the text sorts like."""
    count = len(own.names)
    wanted = tuple(map(str, range(count)))
    if not folders or not all(name.isdecimal() for name in folders):
        raise ValueError(
            f"--imagenet-v2 {root} holds {_what(folders, root)}, not one folder a class index, 0 to {count - 1}"
        )
    missing, unknown = (sorted(part, key=_as_index) for part in _differences(wanted, folders))
    if missing or unknown:
        faults = [f"without {_few(missing)}"] if missing else []
        faults += [f"with {_few(unknown)}"] if unknown else []
        raise ValueError(
            f"--imagenet-v2 {root} has {len(folders)} class indices, {' and '.join(faults)}; the checkpoint's "
            f"{count} classes are 0 to {count - 1}: unpack all of it, and evaluate a checkpoint of all of ImageNet's"
        )
    return Layout("imagenet_v2", root, wanted, own.names, own.columns)


def _check_subset(option: str, root: Path, folders: tuple[str, ...], own: WordNetClasses) -> None:
    """Errors: ValueError where -A or -R has other classes than it was published with."""
    flag = flag_of(option)
    if len(folders) == len(own.names):
        raise ValueError(
            f"{flag} {root} has all {len(folders)} classes of the checkpoint, {NAMES[option]} some alone: is it "
            "--imagenet-sketch, or --val?"
        )
    if not own.is_imagenet:
        return
    for other in _SUBSETS:
        if other != option and folders == synsets(other):
            raise ValueError(f"{flag} {root} has the classes of {NAMES[other]}: give it as {flag_of(other)}")
    missing, unknown = (sorted(part) for part in _differences(synsets(option), folders))
    if missing or unknown:
        faults = [f"it lacks {_few(missing)}"] if missing else []
        faults += [f"{_few(unknown)} are not in it"] if unknown else []
        raise ValueError(
            f"{flag} {root} has {len(folders)} classes, not the 200 of {NAMES[option]} ({'; '.join(faults)}): its "
            "logits are compared among those 200, so unpack it as it was published"
        )


def _differences(wanted: Sequence[str], found: Sequence[str]) -> tuple[set[str], set[str]]:
    """(missing, unknown)."""
    return set(wanted) - set(found), set(found) - set(wanted)


def _what(folders: tuple[str, ...], root: Path) -> str:
    """What a folder seems to hold, and how to name it, for messages."""
    names = set(folders)
    if not names:
        return "no folders (unpack the set there)"
    if names == set(SEVERITIES):
        return "severities 1 to 5 (of one corruption of ImageNet-C: give --imagenet-c the folder above the corruptions)"
    if all(name.isdecimal() for name in names):
        return f"class indices ({_few(folders)}: ImageNet-V2's layout, give it as --imagenet-v2)"
    if all(map(WNID.fullmatch, names)):
        return f"{len(names)} WordNet ids (give it as --imagenet-a, -r or -sketch, whichever it is)"
    if names & {*GROUPS, *EXTRA, *(name for group in GROUPS.values() for name in group)}:
        return f"corruptions ({_few(folders)}: ImageNet-C's layout, give it as --imagenet-c)"
    return f"{_few(folders)} (name the one in it that holds the classes, such as {root / folders[0]})"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _as_index(name: str) -> tuple[int, str]:
    return int(name), name
