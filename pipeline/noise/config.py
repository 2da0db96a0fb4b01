"""What noise, how strong, where and when. Source: NoisyNN (arXiv 2309.10625), sections on the noise types."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["none", "gaussian", "salt_and_pepper", "circular_shift", "optimal_q"]
During = Literal["train", "eval", "both"]

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
    """`image` (the normalised input), or a module as timm names it (`blocks.11.attn`, `layer4.2`): its input."""
    during: During = "train"
    group_size: int | None = 8
    """Samples that a linear noise mixes, or over which salt-and-pepper takes its extremes. It divides the micro-batch.
    None: the whole running micro-batch, as the official code does; results then depend on the batch (transductive)."""
    spare_prefix_tokens: bool = True
    """Leave the class (and register) tokens alone, as the official ViT does."""
    detach: bool = False
    """Keep the noise term of a linear noise out of the gradient, as the official CNN does."""

    def __post_init__(self) -> None:
        # The command line checks these two itself; a misspelt phase from anywhere else would switch the noise off.
        for name, names in (("kind", get_args(Kind)), ("during", get_args(During))):
            if getattr(self, name) not in names:
                raise ValueError(f"noise.{name} is {getattr(self, name)!r}: use one of {', '.join(names)}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"noise.group_size is {self.group_size}: give at least 1, or None for the micro-batch")
        if self.kind in _STRENGTHS:
            meaning, low, high = _STRENGTHS[self.kind]
            if self.strength is None:
                raise ValueError(f"noise.strength is missing: {self.kind} needs {meaning}")
            if not low <= self.strength <= high:
                raise ValueError(f"noise.strength is {self.strength}: for {self.kind} it is {meaning}")
            if math.isinf(self.strength):
                raise ValueError(f"noise.strength is infinite: for {self.kind} it is {meaning}")
        elif self.strength is not None:
            raise ValueError(f"noise.strength is {self.strength}, but {self.kind} takes none: leave it out")
        if self.detach and self.kind not in LINEAR_KINDS:
            raise ValueError(f"noise.detach is for {' and '.join(LINEAR_KINDS)}; {self.kind} has no gradient to detach")

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
        group = f", k = {self.group_size or 'micro-batch'}" if self.mixes_samples else ""
        tokens = ", prefix tokens spared" if self.spare_prefix_tokens else ", all tokens"
        if self.site == IMAGE_SITE:
            tokens = ""
        return f"{self.kind}{strength} at {self.site} (during {self.during}{tokens}{group})"
