"""What the measurements of training share: the device, and one compiled function from pictures to loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SMOOTHING = 0.1  # of labels

Loss = Callable[[Tensor, Tensor], Tensor]


def chosen_device(option: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Errors: ValueError where a GPU is asked for and torch sees none."""
    if option == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave the option out to measure the CPU")
    return torch.device("cuda" if option != "cpu" and torch.cuda.is_available() else "cpu")


def loss_function(model: nn.Module, dtype: torch.dtype, compiled: bool) -> Loss:
    """(normalised pictures (B, 3, H, W), labels int64 (B,)) -> label-smoothed cross entropy, a float32 scalar.

    The model runs under autocast to `dtype`. Compiled, it is one graph, and a break in it is an error.
    """

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(x)
        return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)

    return torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
