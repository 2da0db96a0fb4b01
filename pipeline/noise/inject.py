"""Puts noise at the inputs of named modules of any timm model: its state_dict keys stay timm's.

By hooks, or, behind a LayerNorm that feeds the site alone, in one pass with it (norm.py). At the image nothing is
attached: models.Preprocess asks for the draw and adds the noise in the pass that normalises.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.noise.config import IMAGE_SITE, NoiseConfig
from pipeline.noise.norm import NormNoise, as_products_take, norm_before
from pipeline.noise.operators import NORM_KINDS
from pipeline.noise.ops import apply_noise, noise_stream, norm_noise, random_words
from pipeline.noise.reference import Purpose, stream_of

_PROBE_BATCH = 3  # no usual number of windows or heads turns 3 rows into 3 rows of something else
_EVALUATION_SEED = 0x5EED  # validation draws other noise than training does


@dataclass(frozen=True)
class _Site:
    """One place of the noise, and its level there in this step."""

    name: str
    first_token: int
    stream: int
    strength: Tensor  # float64 scalar, of training; 0 where another site was picked
    evaluation_strength: Tensor

    def to(self, device: torch.device) -> _Site:
        strengths = self.strength.to(device), self.evaluation_strength.to(device)
        return replace(self, strength=strengths[0], evaluation_strength=strengths[1])


class Draw(NamedTuple):
    """What the noise at one site is a function of, in the running batch; devices and types as ops.apply_noise has."""

    sample_ids: Tensor
    seed: int
    epoch: Tensor
    strength: Tensor
    stream: int


class NoiseInjector:
    """Holds the hooks and what they need of the running batch.

    Call `set_batch` before a batch is preprocessed: noise is a function of (seed, epoch, sample id, site), never of a
    hidden generator. In evaluation the epoch is 0, the seed another, and the strength the last one.
    """

    def __init__(self, model: nn.Module, config: NoiseConfig, image_size: int, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.enabled = True
        self.sites: tuple[_Site, ...] = ()
        self._model = model
        self._sample_ids: Tensor | None = None
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._filled_epoch: int | None = None  # what the numbers on the device are, as far as they were filled
        self._filled_levels: tuple[tuple[float, float], ...] | None = None
        self._handles: list[RemovableHandle] = []
        self._replaced: dict[str, nn.Module] = {}  # norms by their names, as they were
        if config.kind == "none":
            return
        shapes = site_shapes(model, config.site_patterns, image_size)
        self.sites = tuple(self._site(name, shape) for name, shape in shapes.items())
        _check_streams(self.sites)
        for number, site in enumerate(self.sites):
            self._attach(number, site.name)

    def set_batch(self, sample_ids: Tensor, epoch: int, step: int = 0, progress: float = 0.0) -> None:
        """sample_ids: int64 (B,), on the model's device; progress: the share of the training that is done, 0 to 1.

        In evaluation a random site is that of step 0, so that an answer does not change with the batch.
        """
        self._sample_ids = sample_ids
        if self._epoch.device != sample_ids.device:  # the model has been moved since
            self._epoch = self._epoch.to(sample_ids.device)
            self.sites = tuple(site.to(sample_ids.device) for site in self.sites)
        if epoch != self._filled_epoch:
            self._epoch.fill_(epoch)
            self._filled_epoch = epoch
        level, last_level = self.config.strength_at(progress), self.config.strength_at(1.0)
        picked, picked_in_evaluation = self._picked(epoch, step), self._picked(0, 0)
        levels = tuple(
            (level if picked in (None, number) else 0.0, last_level if picked_in_evaluation in (None, number) else 0.0)
            for number in range(len(self.sites))
        )
        # Each fill is a launch on a GPU, and most steps change nothing.
        if levels != self._filled_levels:
            for site, (strength, evaluation_strength) in zip(self.sites, levels, strict=True):
                site.strength.fill_(strength)
                site.evaluation_strength.fill_(evaluation_strength)
            self._filled_levels = levels

    def at_image(self) -> Draw | None:
        """The running batch's draw at the image; None where no noise acts there."""
        if not self._is_active() or [site.name for site in self.sites] != [IMAGE_SITE]:
            return None
        return self._draw(self.sites[0])

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The plain model, for as long as the context lasts."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name, norm in self._replaced.items():
            now = self._model.get_submodule(name)
            if isinstance(now, NormNoise):  # whose parameters may have been replaced since
                norm.weight, norm.bias = now.weight, now.bias
                _put(self._model, name, norm.train(now.training))
        self._replaced.clear()
        self.sites = ()

    def _attach(self, number: int, site: str) -> None:
        if site == IMAGE_SITE:
            return
        norm = norm_before(self._model, site)
        # Behind another injector's noise this one comes by a hook, as two hooks would come one after the other.
        if norm is None or self.config.kind not in NORM_KINDS or isinstance(self._model.get_submodule(norm), NormNoise):
            hook = partial(self._hook, number, norm is not None)
            self._handles.append(self._model.get_submodule(site).register_forward_pre_hook(hook))
            return
        plain = self._model.get_submodule(norm)
        assert isinstance(plain, nn.LayerNorm)
        self._replaced[norm] = plain
        _put(self._model, norm, NormNoise(plain, partial(self._normalise, number)))

    def _site(self, name: str, shape: tuple[int, ...]) -> _Site:
        first_token = 0
        if self.config.spare_prefix_tokens and name != IMAGE_SITE:
            first_token = prefix_tokens(self._model, name, shape)
        stream = noise_stream(replace(self.config, site=name, pick="all"))
        zero = torch.zeros((), dtype=torch.float64)
        return _Site(name, first_token, stream, zero, zero.clone())

    def _picked(self, epoch: int, step: int) -> int | None:
        """The number of the one site that is noisy in this step; None: all are."""
        if self.config.pick == "all":
            return None
        stream = stream_of(self.config.site, Purpose.SITE)
        word = random_words(1, torch.tensor([step]), self.seed, torch.tensor(epoch), stream).item()
        return int(word) * len(self.sites) >> 32

    def _hook(
        self, number: int, behind_norm: bool, module: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        if not self._is_active():
            return None
        return (self._noisy(number, as_products_take(args[0]) if behind_norm else args[0]), *args[1:])

    def _noisy(self, number: int, x: Tensor) -> Tensor:
        site = self.sites[number]
        ids, seed, epoch, strength, stream = self._draw(site)
        return apply_noise(x, self.config, ids, seed, epoch, site.first_token, None, strength, stream)

    def _normalise(self, number: int, x: Tensor, norm: NormNoise) -> Tensor | None:
        """What stands in for a norm's result; None: the norm's own."""
        if not self._is_active():
            return None
        if torch.is_autocast_enabled(x.device.type):
            # LayerNorm is float32 there, the products behind it 16 bits. A compiler adds, normalises and rounds in one
            # pass, and noise on what it rounded moves a third of the bytes that noise on float32 and a rounding would.
            # Without one it costs a pass more than norm_noise: both round at the same places, whoever compiles.
            return self._noisy(number, as_products_take(norm.alone(x)))
        site = self.sites[number]
        ids, seed, epoch, strength, stream = self._draw(site)
        return norm_noise(
            x, norm.weight, norm.bias, norm.eps, self.config, ids, seed, epoch, site.first_token, strength, stream
        )

    def _is_active(self) -> bool:
        return self.enabled and self.config.active(self._model.training)

    def _draw(self, site: _Site) -> Draw:
        ids = self._sample_ids
        assert ids is not None, "set_batch() was not called before the batch"
        if self._model.training:
            return Draw(ids, self.seed, self._epoch, site.strength, site.stream)
        epoch = torch.zeros_like(self._epoch)
        return Draw(ids, self.seed ^ _EVALUATION_SEED, epoch, site.evaluation_strength, site.stream)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _check_streams(sites: Sequence[_Site]) -> None:
    """Errors: ValueError where two sites would draw the same noise: 24 bits of a name's hash may be equal."""
    first: dict[int, str] = {}
    for site in sites:
        if (other := first.setdefault(site.stream, site.name)) != site.name:
            raise ValueError(f"noise.site {site.name!r} would draw the noise of {other!r}: leave one of them out")


def site_shapes(model: nn.Module, patterns: Sequence[str], image_size: int) -> dict[str, tuple[int, ...]]:
    """Each site that the names and patterns mean, in the model's order, and the shape that arrives there, batch first.

    A pattern means those of its modules at which noise can be; a name must be such a one.
    Errors: ValueError for a module that does not exist, is not run, or whose first axis is not the batch, and for a
    pattern without any that can be used; it names the nearest.
    """
    if tuple(patterns) == (IMAGE_SITE,):
        return {IMAGE_SITE: (_PROBE_BATCH, 3, image_size, image_size)}
    names = [name for name, _ in model.named_modules() if name]
    shapes = _input_shapes(model, image_size)
    usable = {name: shape for name, shape in shapes.items() if shape[0] == _PROBE_BATCH}
    wanted: set[str] = set()
    for pattern in patterns:
        if "*" not in pattern:
            _check_site(model, pattern, names, shapes, list(usable))
            wanted.add(pattern)
            continue
        # A star stands for one part of a name: `blocks.*` is the blocks, not all that is in them.
        found = [name for name in usable if _matches(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, usable, n=3, cutoff=0.0)
            raise ValueError(f"noise.site {pattern!r} fits no module that noise can be at; nearest: {', '.join(near)}")
        wanted.update(found)
    return {name: usable[name] for name in names if name in wanted}


def check_site(model: nn.Module, site: str, image_size: int) -> tuple[int, ...]:
    """The shape that arrives at one site. Errors: as site_shapes."""
    return site_shapes(model, (site,), image_size)[site]


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _check_site(
    model: nn.Module, site: str, names: list[str], shapes: dict[str, tuple[int, ...]], usable: list[str]
) -> None:
    if site not in names:
        near = difflib.get_close_matches(site, names, n=3, cutoff=0.3)
        raise ValueError(f"noise.site {site!r} is no module of {type(model).__name__}; nearest: {', '.join(near)}")
    if site not in shapes:
        raise ValueError(f"noise.site {site!r} gets no tensor in a forward pass; nearest: {_nearest(site, usable)}")
    if site not in usable:
        raise ValueError(
            f"noise.site {site!r}: the first axis of its input is not the batch "
            f"({shapes[site][0]} rows for {_PROBE_BATCH} images); nearest that is: {_nearest(site, usable)}"
        )


def prefix_tokens(model: nn.Module, site: str, shape: tuple[int, ...]) -> int:
    """How many class and register tokens stand first among the tokens at a site; shape: that of its input.

    Errors: ValueError where they stand there, but not on axis 1, so that they cannot be spared.
    """
    prefix = getattr(model, "num_prefix_tokens", 0)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if len(shape) == 4 and patches is not None and prefix and shape[2] == patches + prefix:
        raise ValueError(
            f"noise.site {site!r} gets {shape[1:]} (heads, tokens, channels): its prefix tokens cannot be spared; "
            f"take {site.rpartition('.')[0]!r}, or set noise.spare_prefix_tokens to False"
        )
    # Before the class token is put in front (patch_embed.norm), the first token is a patch.
    return prefix if len(shape) == 3 and shape[1] != patches else 0


def _nearest(site: str, usable: list[str]) -> str:
    parts = site.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (parent := ".".join(parts[:end])) in usable:
            return parent
    return ", ".join(difflib.get_close_matches(site, usable, n=3, cutoff=0.0))


def _input_shapes(model: nn.Module, image_size: int) -> dict[str, tuple[int, ...]]:
    """Input shape of every module in a forward pass of shapes alone (the meta device computes no values)."""
    probe = copy.deepcopy(model).to("meta").eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor):
                shapes.setdefault(name, tuple(args[0].shape))

        return hook

    for name, module in probe.named_modules():
        module._forward_pre_hooks.clear()  # another injector's: its sample ids are not the probe's
        if isinstance(module, NormNoise):
            module.noisy = None
        module.register_forward_pre_hook(record(name))
    with torch.no_grad():
        probe(torch.empty(_PROBE_BATCH, 3, image_size, image_size, device="meta"))
    return shapes
