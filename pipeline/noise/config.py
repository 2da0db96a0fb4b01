"""What noise, how strong, where and when. Source: NoisyNN (arXiv 2309.10625), sections on the noise types."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["none", "gaussian", "salt_and_pepper", "circular_shift", "optimal_q"]
During = Literal["train", "eval", "both"]
Pick = Literal["all", "random_one"]
Ramp = Literal["linear", "cosine"]

LINEAR_KINDS = ("circular_shift", "optimal_q")
IMAGE_SITE = "image"

_STRENGTHS = {
    "gaussian": ("the standard deviation, at least 0", 0.0, math.inf),
    "salt_and_pepper": ("the probability that an entry is replaced, from 0 to 1", 0.0, 1.0),
    "circular_shift": ("alpha, from 0 to below 0.5", 0.0, math.nextafter(0.5, 0)),
}


@dataclass(frozen=True)
class NoiseConfig:
    """One noise at one site. `kind="none"` is the plain model."""

    kind: Kind = "none"
    strength: float | None = None
    """Gaussian: standard deviation. Salt-and-pepper: probability. Circular shift: alpha, below 0.5. Optimal Q: none."""
    site: str = IMAGE_SITE
    """`image` (the normalised input), or a module as timm names it (`blocks.11.attn`, `layer4.2`): its input. Several:
    names with commas between them, or a pattern (`blocks.*.attn`)."""
    during: During = "train"
    group_size: int | None = 8
    """Samples that a linear noise mixes, or over which salt-and-pepper takes its extremes. It divides the micro-batch.
    None: the whole running micro-batch, as the official code does; results then depend on the batch (transductive)."""
    spare_prefix_tokens: bool = True
    """Leave the class (and register) tokens alone, as the official ViT does."""
    detach: bool = False
    """Keep the noise term of a linear noise out of the gradient, as the official CNN does."""
    pick: Pick = "all"
    """Of several sites: all of them, or one in each step, drawn from (seed, epoch, step), the same on all ranks."""
    end_strength: float | None = None
    """Strength at the end of training and in evaluation; on the way it goes there from `strength`. None: constant."""
    ramp: Ramp = "linear"
    """How the strength goes there."""

    def __post_init__(self) -> None:
        # The command line checks these two itself; a misspelt phase from anywhere else would switch the noise off.
        for name, choices in (("kind", Kind), ("during", During), ("pick", Pick), ("ramp", Ramp)):
            if getattr(self, name) not in (names := get_args(choices)):
                raise ValueError(f"noise.{name} is {getattr(self, name)!r}: use one of {', '.join(names)}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"noise.group_size is {self.group_size}: give at least 1, or None for the micro-batch")
        self._check_strengths()
        if len(self.site_patterns) > 1 and IMAGE_SITE in self.site_patterns:
            raise ValueError(f"noise.site is {self.site!r}: {IMAGE_SITE} cannot stand beside modules")
        if self.pick == "random_one" and len(self.site_patterns) == 1 and "*" not in self.site:
            raise ValueError(f"noise.pick is random_one, but noise.site {self.site!r} is one place: name several")
        if self.detach and self.kind not in LINEAR_KINDS:
            raise ValueError(f"noise.detach is for {' and '.join(LINEAR_KINDS)}; {self.kind} has no gradient to detach")

    def _check_strengths(self) -> None:
        if self.kind not in _STRENGTHS:
            for name in ("strength", "end_strength"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"noise.{name} is {value}, but {self.kind} takes none: leave it out")
            return
        meaning, low, high = _STRENGTHS[self.kind]
        if self.strength is None:
            raise ValueError(f"noise.strength is missing: {self.kind} needs {meaning}")
        for name in ("strength", "end_strength"):
            if (value := getattr(self, name)) is None:
                continue
            if not low <= value <= high:
                raise ValueError(f"noise.{name} is {value}: for {self.kind} it is {meaning}")
            if math.isinf(value):
                raise ValueError(f"noise.{name} is infinite: for {self.kind} it is {meaning}")

    @property
    def site_patterns(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.site.split(","))

    @property
    def site_label(self) -> str:
        """The site as a part of a file's name."""
        return re.sub(r"[^\w.]+", "-", self.site)

    def strength_at(self, progress: float) -> float:
        """The level at a share of the training, 0 to 1; 1 for optimal Q, which has none."""
        if self.strength is None:
            return 1.0
        if self.end_strength is None:
            return self.strength
        way = progress if self.ramp == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.strength + (self.end_strength - self.strength) * way

    def active(self, training: bool) -> bool:
        """Whether the noise acts in this phase."""
        return self.kind != "none" and self.during in ("both", "train" if training else "eval")

    @property
    def mixes_samples(self) -> bool:
        """Whether one sample's result depends on the others of its group (so: transductive when evaluated)."""
        # At the image salt is white and pepper black; inside the network they are the group's extremes.
        by_extremes = self.kind == "salt_and_pepper" and self.site != IMAGE_SITE
        return (self.kind in LINEAR_KINDS or by_extremes) and self.group_size != 1

    def describe(self) -> str:
        if self.kind == "none":
            return "none"
        strength = "" if self.strength is None else f" {self.strength:g}"
        if self.end_strength is not None:
            strength += f" to {self.end_strength:g} ({self.ramp})"
        group = f", k = {self.group_size or 'micro-batch'}" if self.mixes_samples else ""
        tokens = ", prefix tokens spared" if self.spare_prefix_tokens else ", all tokens"
        if self.site == IMAGE_SITE:
            tokens = ""
        place = f"one of {self.site}" if self.pick == "random_one" else self.site
        return f"{self.kind}{strength} at {place} (during {self.during}{tokens}{group})"
