"""Frozen parts: what a pattern means, and that frozen BatchNorms keep their statistics."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pipeline.freezing import freeze, hold_frozen_norms
from pipeline.models import ModelConfig, create_model


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=2, num_classes=4
    )


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def under(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("patterns", "prefixes"),
    [
        (("patch_embed",), ("patch_embed.",)),
        (("pos_embed", "cls_token"), ("pos_embed", "cls_token")),
        (("blocks.0",), ("blocks.0.",)),
        (("patch_embed", "blocks.0", "blocks.2.norm1"), ("patch_embed.", "blocks.0.", "blocks.2.norm1.")),
        (("blocks.*.mlp",), ("blocks.0.mlp.", "blocks.1.mlp.", "blocks.2.mlp.")),
        (("blocks.1.attn.qkv.bias",), ("blocks.1.attn.qkv.bias",)),
        ((), ("nothing",)),
    ],
    ids=str,
)
def test_patterns(patterns, prefixes):
    model = vit()
    freeze(model, patterns)
    assert frozen(model) == under(model, *prefixes)


@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc."), ("convnext_atto", "head.fc."), (None, "head.")])
def test_all_but_the_head(name, head):
    model = timm.create_model(name, num_classes=3) if name else vit()
    freeze(model, ("all_but_head",))
    trained = {key for key, _ in model.named_parameters()} - frozen(model)
    assert trained == under(model, head) and trained


@pytest.mark.parametrize(
    ("pattern", "near"), [("block.0", "blocks.0"), ("blocks.3", "blocks."), ("patchembed", "patch")]
)
def test_an_unknown_part_is_refused_with_the_nearest(pattern, near):
    model = vit()
    with pytest.raises(ValueError, match=rf"model\.freeze '{pattern}' is no part") as error:
        freeze(model, (pattern,))
    assert near in str(error.value) and "all_but_head" in str(error.value) and "\n" not in str(error.value)


def test_frozen_batch_norms_keep_their_statistics():
    config = ModelConfig(name="resnet18", freeze=("bn1", "layer1"))
    model = create_model(config, 4, 32)
    model.train()
    hold_frozen_norms(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    changed = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if not name.startswith(("bn1.", "layer1."))}
    assert all(module.training for name, module in model.named_modules() if name.startswith(("layer2", "fc")))
    assert model.layer1[0].conv1.weight.grad is None and model.layer2[0].conv1.weight.grad is not None


def test_what_is_frozen_does_not_move():
    from pipeline.optim import OptimConfig, create_optimizer

    model = create_model(ModelConfig(name="resnet18", freeze=("conv1", "bn1", "layer*")), 4, 32).train()
    hold_frozen_norms(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = create_optimizer(model, OptimConfig(lr=0.1))
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"fc.weight", "fc.bias"}
