"""Floating point operations of a model, the peak of a device, and the share of it that training uses (MFU).

Model FLOPs utilisation (Chowdhery et al., "PaLM", 2022, appendix B): operations that the model itself needs, over those
that the devices could have done in that time. What is computed again (activation checkpointing) does not count.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import ModelConfig, create_model

FLOPS_PER_MAC = 2  # published tables of models count a multiplication with its addition as one
STEP_OVER_FORWARD = 3  # the backward pass multiplies twice for each multiplication of the forward pass

Precision = Literal["fp32", "tf32", "bf16", "fp16"]


class _Peak(NamedTuple):
    """Dense operations a second; None where the device has no units for it."""

    fp32: float
    tf32: float | None
    bf16: float | None
    fp16: float


_H100_SXM = _Peak(67e12, 494e12, 989e12, 989e12)
_A100 = _Peak(19.5e12, 156e12, 312e12, 312e12)
_V100_SXM = _Peak(15.7e12, None, None, 125e12)
_V100_PCIE = _Peak(14e12, None, None, 112e12)

# Of NVIDIA's data sheets, whose figures "with sparsity" are halved; fp16 sums in float32. By the whole name, as
# torch.cuda.get_device_name gives it: cards of one family differ, and a slice of a card (MIG) is not the card.
_PEAKS = {
    "NVIDIA H200": _H100_SXM,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA GH200 480GB": _H100_SXM,
    "NVIDIA H100 NVL": _Peak(60e12, 417e12, 835e12, 835e12),
    "NVIDIA H100 PCIe": _Peak(51e12, 378e12, 756e12, 756e12),
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA L40S": _Peak(91.6e12, 183e12, 362e12, 362e12),
    "NVIDIA L4": _Peak(30.3e12, 60e12, 121e12, 121e12),
    "NVIDIA A10": _Peak(31.2e12, 62.5e12, 125e12, 125e12),
    "Tesla V100-SXM2-16GB": _V100_SXM,
    "Tesla V100-SXM2-32GB": _V100_SXM,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla T4": _Peak(8.1e12, None, None, 65e12),
}


def forward_flops(config: ModelConfig, num_classes: int, image_size: int) -> int:
    """Of one picture's forward pass, two for each multiplication with its addition.

    Counted on shapes alone, so nothing is allocated or computed; what is no matrix multiplication, convolution or
    attention does not count. Errors: ValueError for a model that timm does not know.
    """
    with torch.device("meta"):
        model = create_model(config.without_start(), num_classes, image_size).eval()
        picture = torch.empty(1, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(picture)
    return counter.get_total_flops()


def training_flops(config: ModelConfig, num_classes: int, image_size: int) -> int:
    """Of one picture's forward and backward pass, as forward_flops counts them."""
    return STEP_OVER_FORWARD * forward_flops(config, num_classes, image_size)


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Dense operations a second of one device, by torch.cuda.get_device_name; None where the table has none.

    precision: of the multiplications. Without autocast it is tf32 where torch.backends allows that, else fp32.
    """
    peak = _PEAKS.get(device_name)
    return None if peak is None else getattr(peak, precision)


def mfu(images_per_second: float, flops_per_image: int, peak: float | None, devices: int = 1) -> float | None:
    """Share, 0 to 1, of what `devices` of this peak could do; images_per_second: of all together. None: no peak."""
    return None if peak is None else images_per_second * flops_per_image / (peak * devices)
