"""Operations of a training step against published counts and by hand; peaks by device; MFU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.flops import FLOPS_PER_MAC, forward_flops, mfu, peak_flops, training_flops
from pipeline.models import ModelConfig, create_model


@pytest.mark.parametrize(
    ("name", "published_gmacs"),  # of timm's and DeiT's tables: multiplications with their additions, in 10^9
    [
        ("vit_tiny_patch16_224", 1.26),
        ("vit_small_patch16_224", 4.6),
        ("vit_base_patch16_224", 17.6),
        ("resnet50", 4.1),
    ],
)
def test_the_forward_pass_is_counted_as_published(name, published_gmacs):
    published = FLOPS_PER_MAC * 1e9 * published_gmacs
    assert forward_flops(ModelConfig(name), 1000, 224) == pytest.approx(published, rel=0.02)


def test_the_count_by_hand_and_nothing_is_drawn():
    options = {"patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
    width, tokens = 96, 17
    block = 12 * width**2 * tokens + 2 * tokens**2 * width
    by_hand = 2 * (16 * 3 * 8**2 * width + 6 * block + 10 * width)
    state = torch.get_rng_state()
    assert forward_flops(ModelConfig(options=options), 10, 32) == by_hand
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_is_three_forward_passes_as_really_counted():
    config = ModelConfig(options={"patch_size": 8, "embed_dim": 48, "depth": 12, "num_heads": 3})
    model = create_model(config, 10, 32)
    # The counter knows nothing of the CPU's own attention, so that is done as matrix multiplications.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        nn.functional.cross_entropy(model(torch.randn(1, 3, 32, 32)), torch.tensor([3])).backward()
    first_layer = 2 * 16 * 3 * 8**2 * 48  # needs no gradient of the picture
    assert training_flops(config, 10, 32) - first_layer == counter.get_total_flops()


def test_starting_weights_are_not_looked_for():
    options = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    plain, with_weights = (ModelConfig(options=options, init_from=path) for path in (None, Path("/nowhere")))
    assert forward_flops(with_weights, 10, 32) == forward_flops(plain, 10, 32)


@pytest.mark.parametrize(
    ("card", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H200", "fp16", 989e12),
        ("NVIDIA H200", "tf32", 494e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_only_a_whole_card_of_the_table_has_a_peak(card, precision, peak):
    assert peak_flops(card, precision) == peak


def test_mfu_is_the_share_of_all_devices():
    # ViT-B's 3 x 35 GFLOP at 4,200 images/s of one H200: 45 %, and half of it where two share the work.
    flops = training_flops(ModelConfig("vit_base_patch16_224"), 1000, 224)
    assert mfu(4200, flops, 989e12) == pytest.approx(0.45, abs=0.006)
    assert mfu(4200, flops, 989e12, devices=2) == pytest.approx(0.225, abs=0.003)
    assert mfu(4200, flops, None) is None
