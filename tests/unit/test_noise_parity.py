"""The official code's noises as PAPER.md states them, written out as formulas, beside what this project's models do.

Official code: github.com/Shawey94/NoisyNN, commit 719ccf6 (PAPER.md, sections 2 and 3, marked [code]).
"""

import pytest
import timm
import torch
from torch import nn

from pipeline.noise import ops, reference
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.noise.reference import Purpose, stream_of

SEED, EPOCH = 7, 3
BATCH = 5  # the official micro-batch is the running one: k = B
LAST = "blocks.1.attn"


def vit() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5).eval()


def pictures(side: int) -> torch.Tensor:
    return torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(5))


def noisy_logits(model: nn.Module, x: torch.Tensor, config: NoiseConfig) -> torch.Tensor:
    injector = NoiseInjector(model, config, x.shape[-1], SEED)
    injector.set_batch(torch.arange(len(x)), EPOCH)
    logits = model(x)
    injector.remove()
    return logits


def official_vit(model: nn.Module, x: torch.Tensor, formula) -> torch.Tensor:
    """A ViT's forward pass written out, with formula(tokens after norm1) inside the last block, before qkv."""
    tokens = model.patch_embed(x)
    tokens = torch.cat((model.cls_token.expand(len(x), -1, -1), tokens), dim=1) + model.pos_embed
    for number, block in enumerate(model.blocks):
        normal = block.norm1(tokens)
        if number == len(model.blocks) - 1:
            normal = formula(normal)
        tokens = tokens + block.attn(normal)  # the residual stream itself gets no noise
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.head(model.norm(tokens)[:, 0])


def optimal_q_as_stated(normal: torch.Tensor) -> torch.Tensor:
    """x_i <- (x_i + sum_j x_j) / (k + 1) for the patch tokens, k = B; the class token is left alone."""
    out = normal.clone()
    for i in range(len(normal)):
        total = sum(normal[j, 1:] for j in range(len(normal)))
        out[i, 1:] = (normal[i, 1:] + total) / (len(normal) + 1)
    return out


def shift_as_stated(normal: torch.Tensor, a: float) -> torch.Tensor:
    """x_i <- (1 - a) x_i + a x_{i+1}, the last takes the first."""
    k = len(normal)
    return torch.stack([(1 - a) * normal[i] + a * normal[(i + 1) % k] for i in range(k)])


def test_optimal_q_in_a_vit():
    model, x = vit(), pictures(32)
    found = noisy_logits(model, x, NoiseConfig(kind="optimal_q", site=LAST, during="eval", group_size=None))
    expected = official_vit(model, x, optimal_q_as_stated)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, model(x), atol=1e-3)


@pytest.mark.parametrize("a", [0.3, 0.4])
def test_circular_shift_in_a_vit(a):
    def formula(normal: torch.Tensor) -> torch.Tensor:
        return torch.cat((normal[:, :1], shift_as_stated(normal[:, 1:], a)), dim=1)

    model, x = vit(), pictures(32)
    config = NoiseConfig(kind="circular_shift", strength=a, site=LAST, during="eval", group_size=None)
    torch.testing.assert_close(noisy_logits(model, x, config), official_vit(model, x, formula), rtol=0, atol=1e-5)


def normals_of(shape: torch.Size, site: str) -> torch.Tensor:
    """What is drawn for a batch of this shape: the reference's normals, of evaluation (epoch 0, its own seed)."""
    zeros = torch.zeros(shape, dtype=torch.float64)
    seed = SEED ^ 0x5EED
    return reference.gaussian_noise(
        zeros, 1.0, torch.arange(len(zeros)), seed, torch.tensor(0), stream_of(site, Purpose.NOISE)
    ).float()


def test_gaussian_noise_in_a_vit():
    """x + N(0, s), s being what the official flag calls a variance."""
    s = 0.5

    def formula(normal: torch.Tensor) -> torch.Tensor:
        noise = s * normals_of(normal.shape, LAST)
        return torch.cat((normal[:, :1], (normal + noise)[:, 1:]), dim=1)

    model, x = vit(), pictures(32)
    config = NoiseConfig(kind="gaussian", strength=s, site=LAST, during="eval")
    torch.testing.assert_close(noisy_logits(model, x, config), official_vit(model, x, formula), rtol=0, atol=1e-3)


def test_impulse_noise_in_a_vit():
    """With prob. p/2 an entry becomes the batch's maximum, with p/2 its minimum."""
    p = 0.2

    def formula(normal: torch.Tensor) -> torch.Tensor:
        count = normal[0].numel()
        stream = stream_of(LAST, Purpose.MASK)
        ids, epoch = torch.arange(len(normal)), torch.tensor(0)
        words = reference.random_words(count, ids, SEED ^ 0x5EED, epoch, stream).reshape(normal.shape)
        u = words / 2**32
        patches = normal[:, 1:]
        out = torch.where(u < p / 2, patches.max(), torch.where(u < p, patches.min(), normal))
        return torch.cat((normal[:, :1], out[:, 1:]), dim=1)

    model, x = vit(), pictures(32)
    config = NoiseConfig(kind="salt_and_pepper", strength=p, site=LAST, during="eval", group_size=None)
    torch.testing.assert_close(noisy_logits(model, x, config), official_vit(model, x, formula), rtol=0, atol=1e-5)


def test_circular_shift_in_a_cnn_and_its_gradient():
    """The input of stage 4, block 3 (of a ResNet-18: block 2), a = 0.4, both noise terms detached from the gradient."""
    a, x = 0.4, pictures(64)
    gradients = []
    for official in (True, False):
        model = resnet().train()
        site = model.layer4[1]
        if official:
            handle = site.register_forward_pre_hook(
                lambda module, args: (args[0] + (a * torch.roll(args[0], -1, 0)).detach() - (a * args[0]).detach(),)
            )
        else:
            injector = NoiseInjector(
                model,
                NoiseConfig(kind="circular_shift", strength=a, site="layer4.1", group_size=None, detach=True),
                64,
                SEED,
            )
            injector.set_batch(torch.arange(BATCH), EPOCH)
        logits = model(x)
        logits.square().sum().backward()
        gradients.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        if official:
            handle.remove()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * one.abs().max().item())


@pytest.mark.parametrize("kind", ["optimal_q", "circular_shift"])
def test_at_k_1_a_picture_gets_the_plain_model_s_answer_to_the_bit(kind):
    model, x = vit(), pictures(32)
    plain = model(x[:1])
    strength = 0.4 if kind == "circular_shift" else None
    for group_size in (None, 1, 10):
        config = NoiseConfig(kind=kind, strength=strength, site=LAST, during="eval", group_size=group_size)
        assert torch.equal(noisy_logits(model, x[:1], config), plain)


@pytest.mark.parametrize("kind", ["gaussian", "salt_and_pepper", "circular_shift", "optimal_q"])
def test_the_class_token_is_untouched_to_the_bit(kind):
    strength = {"gaussian": 0.5, "salt_and_pepper": 0.2, "circular_shift": 0.4}.get(kind)
    x = torch.randn(BATCH, 5, 48, generator=torch.Generator().manual_seed(1))
    config = NoiseConfig(kind=kind, strength=strength, site=LAST)
    out = ops.apply_noise(x, config, torch.arange(BATCH), SEED, torch.tensor(EPOCH), 1)
    assert torch.equal(out[:, 0], x[:, 0])
    assert (out[:, 1:] != x[:, 1:]).any(dim=(0, 2)).all()
