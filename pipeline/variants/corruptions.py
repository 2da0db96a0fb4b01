"""ImageNet-C (Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions).

<corruption>/<severity 1 to 5>/<wnid>/ILSVRC2012_val_<n>.JPEG, each cell the 50,000 validation pictures anew; the
download's archives lay the corruptions into groups, as blur/defocus_blur/3/..., which is read too. The published means
are over 15 corruptions and all severities. Four more (speckle_noise, gaussian_blur, spatter, saturate) were meant for
tuning: they are shown, and in no mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.folder import class_folders

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
EXTRA = GROUPS["extra"]
CORRUPTIONS = tuple(name for group, names in GROUPS.items() if group != "extra" for name in names)
SEVERITIES = ("1", "2", "3", "4", "5")
CELLS = len(CORRUPTIONS) * len(SEVERITIES)  # of the published means
# Shares of 50,000, meaned over the severities: as hendrycks/robustness published them, and google-research/augmix uses.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
Cell = tuple[str, str]  # corruption, severity


def find_cells(root: Path) -> dict[Cell, Path]:
    """The folder of class folders of each corruption and severity that is there, in the published order.

    Errors: OSError or ValueError naming the folder and the mend, where it is no ImageNet-C or holds a corruption twice.
    """
    folders: dict[str, Path] = {}
    for name, folder in _corruption_folders(root):
        if name in folders:
            raise ValueError(f"--imagenet-c {root} holds {name} twice, as {folders[name]} and {folder}: remove one")
        folders[name] = folder
    if not folders:
        raise ValueError(f"--imagenet-c {root} holds no folders: unpack ImageNet-C there")
    cells: dict[Cell, Path] = {}
    for name in (*CORRUPTIONS, *EXTRA):
        if name not in folders:
            continue
        severities = class_folders(folders[name])
        if not severities or not set(severities) <= set(SEVERITIES):
            held = ", ".join(severities[:6]) or "nothing"
            raise ValueError(f"--imagenet-c {folders[name]} holds {held}, not severities 1 to 5: unpack {name} again")
        cells |= {(name, severity): folders[name] / severity for severity in severities}
    return cells


def _corruption_folders(root: Path) -> Iterator[tuple[str, Path]]:
    for entry in class_folders(root):
        if entry in GROUPS:
            for name in class_folders(root / entry):
                if name not in GROUPS[entry]:
                    raise ValueError(
                        f"--imagenet-c {root / entry} holds {name}, which is no corruption of that group: it has "
                        f"{', '.join(GROUPS[entry])}"
                    )
                yield name, root / entry / name
        elif entry in (*CORRUPTIONS, *EXTRA):
            yield entry, root / entry
        else:
            raise ValueError(
                f"--imagenet-c {root} holds {entry}, which is no corruption of ImageNet-C: name the folder that holds "
                f"{CORRUPTIONS[0]} and the others, or their groups ({', '.join(GROUPS)})"
            )


@dataclass(frozen=True)
class Corruptions:
    """Top-1, as shares, of each cell; means are unweighted, and None where a cell that they need is missing."""

    top1: Mapping[Cell, float]
    by_alexnet: bool
    """Whether the classes are ImageNet's, so that AlexNet's errors are of the same task."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Of the published 15 corruptions x 5 severities, as `fog/3`; a corruption of which there is none, as `fog`."""
        absent = []
        for name in CORRUPTIONS:
            severities = [severity for severity in SEVERITIES if (name, severity) not in self.top1]
            whole = len(severities) == len(SEVERITIES)
            absent += [name] if whole else [f"{name}/{severity}" for severity in severities]
        return tuple(absent)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in self.top1))

    def mean_of(self, corruption: str) -> float | None:
        """Over its five severities."""
        cells = [self.top1.get((corruption, severity)) for severity in SEVERITIES]
        found = [share for share in cells if share is not None]
        return math.fsum(found) / len(SEVERITIES) if len(found) == len(SEVERITIES) else None

    @property
    def mean(self) -> float | None:
        """Over the 15 published corruptions and their severities."""
        if self.missing:
            return None
        return math.fsum(self.top1[name, severity] for name in CORRUPTIONS for severity in SEVERITIES) / CELLS

    @property
    def mce(self) -> float | None:
        """Mean corruption error, a share: each corruption's error over AlexNet's, meaned (section 4.1 there)."""
        if self.missing or not self.by_alexnet:
            return None
        errors = (
            (name, 1 - math.fsum(self.top1[name, s] for s in SEVERITIES) / len(SEVERITIES)) for name in CORRUPTIONS
        )
        return math.fsum(error / ALEXNET_ERRORS[name] for name, error in errors) / len(CORRUPTIONS)
