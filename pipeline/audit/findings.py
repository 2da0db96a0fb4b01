"""All that an audit found, and what it was found of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipeline.audit.rows import Row, per_image
from pipeline.audit.subject import PAPER_K
from pipeline.audit.verdict import Finding
from pipeline.noise.config import NoiseConfig
from pipeline.published import Headline
from pipeline.sections import to_json

_LIBRARIES = ("torch", "timm", "numpy", "python")
PUBLISHED_OF = (
    "on ImageNet's validation pictures: per image timm's figure by its ordinary evaluation; with the noise the "
    "official run's, which fine-tunes these weights first, for 50 epochs. Here timm's weights are as they are, and "
    "pictures as in the official run, per image too: squashed, and normalised by ImageNet's mean and deviation, where "
    "timm has 0.5 for these weights."
)


@dataclass(frozen=True)
class Audit:
    """Of one model on one split. Paths as they were given."""

    model: str
    source: str
    step: int | None
    weights_sha256: str
    image_size: int
    data: str
    samples_sha256: str
    num_classes: int
    class_order: str
    """What the order within a class is."""
    noises: tuple[NoiseConfig, ...]
    rows: tuple[Row, ...]
    verdict: tuple[Finding, ...]
    twin: str | None
    twin_weights_sha256: str | None
    published: Headline | None
    features: tuple[str, ...]
    """What was kept, and why where nothing was."""
    output: str
    """The folder of its files."""
    command: str
    config: dict[str, Any]
    seconds: float
    environment: dict[str, str]

    @property
    def plain(self) -> Row:
        return per_image(self.rows)

    def beside_published(self) -> list[tuple[str, float, float | None]]:
        """(figure, published, measured), in percent; none without --paper."""
        if self.published is None:
            return []
        official = next((row for row in self.rows if row.protocol == 8 and row.k == PAPER_K), None)
        found = (self.plain, official)
        names = ("per image, noise off", f"class order, k = {PAPER_K}, mean over batches of the running accuracy")
        given = (self.published.plain, self.published.noisy)
        return [
            (name, figure, None if row is None or row.value is None else 100 * row.value)
            for name, figure, row in zip(names, given, found, strict=True)
        ]

    def facts(self) -> list[tuple[str, str]]:
        """(what, in words)."""
        step = "" if self.step is None else f", step {self.step:,}"
        versions = ", ".join(f"{name} {value}" for name, value in self.environment.items() if name in _LIBRARIES)
        found = [
            ("Model (timm)", f"{self.model}, {self.image_size} px"),
            ("Weights", f"{self.source}{step}, sha256 {self.weights_sha256}"),
            (
                "Pictures",
                f"{self.data}: {self.plain.n:,} of {self.num_classes:,} classes, sha256 {self.samples_sha256}",
            ),
            ("Class order", f"by class, within a class {self.class_order}"),
            ("Noise at inference", "; ".join(replace(noise, group_size=1).describe() for noise in self.noises)),
        ]
        if self.twin is not None:
            found.append(("Clean twin", f"{self.twin}, sha256 {self.twin_weights_sha256}"))
        if self.published is not None:
            found.append(("Published figures", PUBLISHED_OF))
        return [
            *found,
            ("Features kept", "; ".join(self.features)),
            ("Device", f"{self.environment['device']}, {self.seconds:,.1f} s"),
            ("Versions", versions),
            ("Commit", self.environment["commit"]),
        ]

    def to_json(self) -> dict[str, Any]:
        """Shares from 0 to 1, but for what is published, in percent."""
        body = {name: to_json(value) for name, value in self.__dict__.items()}
        return body | {
            "rows": [row.to_json() for row in self.rows],
            "verdict": [finding._asdict() for finding in self.verdict],
            "published": self.published and self.published._asdict() | {"unit": "% top-1", "marked": "published"},
            "headline": {"top1_per_image": self.plain.value, "interval_95": self.plain.interval, "n": self.plain.n},
        }
