"""A timm model as stages one after another, so that it can be cut in two before the first place of a noise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import NamedTuple, cast

from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Stage(NamedTuple):
    """A part of the forward pass."""

    names: tuple[str, ...]
    """The modules that run in it, with all that is in them."""
    run: Callable[[Tensor], Tensor]

    def holds(self, site: str) -> bool:
        return any(site == name or site.startswith(f"{name}.") for name in self.names)


def stages_of(model: nn.Module, sites: Collection[str]) -> tuple[Stage, ...] | None:
    """The stages whose composition is the model in evaluation; None for a family whose forward pass is not known.

    sites: a container that is itself one (`layer4`) stays whole, since its hooks run only where it is called. Exactly
    timm's own two classes: one derived from them may go another way.
    """
    if type(model) is VisionTransformer:
        return tuple(_vit(model, sites))
    if type(model) is ResNet:
        return tuple(_resnet(model, sites))
    return None


def _vit(model: VisionTransformer, sites: Collection[str]) -> Iterator[Stage]:
    yield _module(model, "patch_embed")
    yield Stage(("pos_drop",), model._pos_embed)
    yield from (_module(model, name) for name in ("patch_drop", "norm_pre"))
    yield from _blocks(model, "blocks", sites)
    yield _module(model, "norm")
    yield Stage(("attn_pool", "fc_norm", "head_drop", "head"), model.forward_head)


def _resnet(model: ResNet, sites: Collection[str]) -> Iterator[Stage]:
    yield from (_module(model, name) for name in ("conv1", "bn1", "act1", "maxpool"))
    for name in ("layer1", "layer2", "layer3", "layer4"):
        yield from _blocks(model, name, sites)
    yield Stage(("global_pool", "fc"), model.forward_head)


def _blocks(model: nn.Module, name: str, sites: Collection[str]) -> Iterator[Stage]:
    container = cast(nn.Sequential, model.get_submodule(name))
    if name in sites:
        yield _module(model, name)
    else:
        yield from (_module(model, f"{name}.{number}") for number in range(len(container)))


def _module(model: nn.Module, name: str) -> Stage:
    # By its name, each time: a noise at `norm` would put another module there.
    return Stage((name,), partial(_call, model, name))


def _call(model: nn.Module, name: str, x: Tensor) -> Tensor:
    return model.get_submodule(name)(x)


def first_stage(stages: tuple[Stage, ...], sites: Collection[str]) -> int | None:
    """The number of the stage that holds the first of the sites; None where none does, or it is the first of all."""
    found = [number for number, stage in enumerate(stages) if any(map(stage.holds, sites))]
    return found[0] if found and found[0] else None


def official_place(model: nn.Module) -> str:
    """Where the official code has its noise: PAPER.md, section 3. Errors: ValueError for another family."""
    names = dict(model.named_modules())
    for container, inside in (("blocks", ".attn"), ("layer4", "")):
        if isinstance(part := names.get(container), nn.Sequential):
            place = f"{container}.{len(part) - 1}{inside}"
            if place in names:
                return place
    raise ValueError(
        f"the paper has no place for a {type(model).__name__}: name one with --sites, as timm names its modules"
    )
