"""The losses, against torch's and timm's own."""

from __future__ import annotations

import pytest
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from pipeline.loss import LossConfig, loss_of

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
TARGETS = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) * (LOGITS > 0)


def test_cross_entropy_is_timm_s_of_soft_targets():
    wanted = SoftTargetCrossEntropy()(LOGITS, TARGETS)
    assert loss_of(LOGITS, TARGETS, LossConfig()).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.4])
def test_bce_is_timm_s(threshold):
    wanted = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold)(LOGITS, TARGETS)
    found = loss_of(LOGITS, TARGETS, LossConfig(kind="bce", bce_threshold=threshold))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_half_logits_are_widened():
    found = loss_of(LOGITS.bfloat16(), TARGETS, LossConfig())
    assert found.dtype == torch.float32
    assert torch.equal(found, loss_of(LOGITS.bfloat16().float(), TARGETS, LossConfig()))


def test_options_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match=r"loss\.bce_threshold is 0\.0, but loss\.kind is cross_entropy"):
        LossConfig(bce_threshold=0.0)
    with pytest.raises(ValueError, match=r"loss\.bce_threshold is 1\.0"):
        LossConfig(kind="bce", bce_threshold=1.0)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.1 and loss\.bce_threshold 0"):
        LossConfig(kind="bce", bce_threshold=0.0).check_smoothing(0.1)
    for config, smoothing in ((LossConfig("bce", 0.0), 0.0), (LossConfig("bce", 0.2), 0.1), (LossConfig(), 0.1)):
        config.check_smoothing(smoothing)
