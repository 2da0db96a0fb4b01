"""Puts noise at the input of a named module of any timm model, by hooks: the model's state_dict keys stay timm's."""

from __future__ import annotations

import contextlib
import copy
import difflib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.noise.config import IMAGE_SITE, NoiseConfig
from pipeline.noise.ops import apply_noise, noise_stream

_PROBE_BATCH = 3  # no usual number of windows or heads turns 3 rows into 3 rows of something else
_EVALUATION_SEED = 0x5EED  # validation draws other noise than training does


class NoiseInjector:
    """Holds the hook and what it needs of the running batch.

    Call `set_batch` before each forward pass: noise is a function of (seed, epoch, sample id, site), never of a
    hidden generator. In evaluation the epoch is 0 and the seed another.
    """

    def __init__(self, model: nn.Module, config: NoiseConfig, image_size: int, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.enabled = True
        self.first_token = 0
        self._model = model
        self._sample_ids: Tensor | None = None
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._handle = None
        self._stream = noise_stream(config)
        self._extremes = _black_and_white(model) if config.site == IMAGE_SITE else None
        if config.kind == "none":
            return
        shape = check_site(model, config.site, image_size)
        if config.spare_prefix_tokens and config.site != IMAGE_SITE:
            self.first_token = prefix_tokens(model, config.site, shape)
        module = model if config.site == IMAGE_SITE else model.get_submodule(config.site)
        self._handle = module.register_forward_pre_hook(self._hook)

    def set_batch(self, sample_ids: Tensor, epoch: int) -> None:
        """sample_ids: int64 (B,), on the model's device."""
        self._sample_ids = sample_ids
        self._epoch.fill_(epoch)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The plain model, for as long as the context lasts."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _hook(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        training = self._model.training
        if not (self.enabled and self.config.active(training)):
            return None
        assert self._sample_ids is not None, "set_batch() was not called before the forward pass"
        seed = self.seed if training else self.seed ^ _EVALUATION_SEED
        epoch = self._epoch if training else torch.zeros_like(self._epoch)
        noisy = apply_noise(
            args[0], self.config, self._sample_ids, seed, epoch, self.first_token, self._extremes, stream=self._stream
        )
        return (noisy, *args[1:])


def _black_and_white(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Black and white after the model's own normalisation, (3, 1, 1) each; None for a model that timm did not make."""
    settings = getattr(model, "pretrained_cfg", None)
    if not settings:
        return None
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    return -mean / std, (1 - mean) / std


def check_site(model: nn.Module, site: str, image_size: int) -> tuple[int, ...]:
    """The shape that arrives at the site, its first axis the batch.

    Errors: ValueError for a module that does not exist, is not run, or whose first axis is not the batch; it names
    the nearest that can be used.
    """
    if site == IMAGE_SITE:
        return (_PROBE_BATCH, 3, image_size, image_size)
    names = [name for name, _ in model.named_modules() if name]
    if site not in names:
        near = difflib.get_close_matches(site, names, n=3, cutoff=0.3)
        raise ValueError(f"noise.site {site!r} is no module of {type(model).__name__}; nearest: {', '.join(near)}")
    shapes = _input_shapes(model, image_size)
    usable = [name for name, shape in shapes.items() if shape[0] == _PROBE_BATCH]
    if site not in shapes:
        raise ValueError(f"noise.site {site!r} gets no tensor in a forward pass; nearest: {_nearest(site, usable)}")
    if site not in usable:
        raise ValueError(
            f"noise.site {site!r}: the first axis of its input is not the batch "
            f"({shapes[site][0]} rows for {_PROBE_BATCH} images); nearest that is: {_nearest(site, usable)}"
        )
    return shapes[site]


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
        module.register_forward_pre_hook(record(name))
    with torch.no_grad():
        probe(torch.empty(_PROBE_BATCH, 3, image_size, image_size, device="meta"))
    return shapes
