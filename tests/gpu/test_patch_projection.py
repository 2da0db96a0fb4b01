"""A ViT's patches by a product on a GPU, beside cuDNN's convolution. Run by `make gpu PART=check`."""

import pytest
import torch

from pipeline.models import ModelConfig, create_model, timm_model
from pipeline.patches import PatchProjection
from pipeline.precision import whole_float32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("autocast", [False, True])
def test_the_model_answers_and_learns_as_timm_s(autocast):
    x = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0)).cuda()
    outcomes = []
    for build in (timm_model, create_model):
        torch.manual_seed(0)
        model = build(ModelConfig("vit_tiny_patch16_224", {"depth": 2}), 10, 224).cuda()
        with whole_float32(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits = model(x).float()
            logits.square().sum().backward()
        outcomes.append((logits, model.patch_embed.proj.weight.grad, model.patch_embed.proj.bias.grad))
    assert isinstance(model.patch_embed.proj, PatchProjection)
    for found, expected in zip(outcomes[1], outcomes[0], strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() <= (2e-2 if autocast else 1e-5) * expected.norm()
