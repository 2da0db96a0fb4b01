"""From uint8 pictures to what the network gets: one pass with the noise at the image; two where mixup is between."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.batch import Batch
from pipeline.data.mixing import erase, mix, targets_of
from pipeline.models import Preprocess
from pipeline.noise import reference
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.step import inputs_and_targets, show_inputs

SEED, EPOCH, SIZE = 11, 3, 32
IDS = torch.tensor([40, 3, 1 << 33, 7, 8, 1000])
KINDS = {
    "none": NoiseConfig(),
    "gaussian": NoiseConfig("gaussian", 0.7),
    "salt_and_pepper": NoiseConfig("salt_and_pepper", 0.3),
    "circular_shift": NoiseConfig("circular_shift", 0.3, group_size=4),
    "optimal_q": NoiseConfig("optimal_q", group_size=2),
}
ALL_KINDS = pytest.mark.parametrize("noise", KINDS.values(), ids=KINDS)
# As test_noise_image.py: one product and sum instead of two quotients, and 4 units of normals of up to 6.
BOUND = 2e-6 + 0.7 * 4e-6


class Tiny(nn.Module):
    """The mean and std of ImageNet, a convolution, and what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        self.conv = nn.Conv2d(3, 4, 8, 8)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.conv(x).mean((2, 3))


def pictures(count: int = len(IDS)) -> Tensor:
    return torch.randint(0, 256, (count, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def prepared(model: nn.Module, noise: NoiseConfig, training: bool = True, **progress) -> Preprocess:
    model.train(training)
    injector = NoiseInjector(model, noise, SIZE, SEED)
    injector.set_batch(IDS, EPOCH, **progress)
    return Preprocess(model, torch.device("cpu"), injector)


def expected(model: nn.Module, noise: NoiseConfig, training: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """The specification's, with the seed and epoch of training or of evaluation."""
    mean, std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))
    seed, epoch = (SEED, EPOCH) if training else (SEED ^ 0x5EED, 0)
    return reference.image_noise(pictures(), mean, std, noise, IDS, seed, torch.tensor(epoch), dtype=dtype)


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32, bound: float = BOUND) -> None:
    rounding = 0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
    assert ((found.double() - wanted.double()).abs() <= bound + rounding * wanted.double().abs()).all()


@ALL_KINDS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_it_is_the_specification_in_the_type_of_the_parameters(noise, training, dtype):
    model = Tiny().to(dtype)
    found = prepared(model, replace(noise, during="both"), training)(pictures())
    assert found.shape == (len(IDS), 3, SIZE, SIZE) and found.dtype == dtype
    assert_near(found, expected(model, noise, training, dtype if dtype != torch.float64 else torch.float32), dtype)
    if noise.kind != "none":
        assert (found - expected(model, NoiseConfig(), dtype=torch.float64).to(dtype)).abs().max() > 0.1


@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_normalising_and_then_the_noise_are_the_one_pass(noise, dtype):
    preprocess = prepared(Tiny().to(dtype), noise)
    whole, parts = preprocess(pictures()), preprocess.noise(preprocess.normalise(pictures()))
    assert parts.dtype == dtype
    if noise.kind in ("none", "salt_and_pepper"):
        assert torch.equal(parts, whole)  # white and black, of the same pixels, to the bit
    else:  # rounded once more on the way, each time by half a unit of what is up to 2.7 then
        assert_near(parts, whole, dtype, bound=BOUND + (0.0 if dtype == torch.float32 else 2**-7))


def test_salt_is_white_and_pepper_black():
    levels = torch.tensor([0, 255], dtype=torch.uint8).repeat(3)[:, None, None, None].expand(6, SIZE, SIZE, 3)
    preprocess = prepared(Tiny(), NoiseConfig("salt_and_pepper", 1.0))
    plain, noisy = preprocess.normalise(levels), preprocess(levels)
    for channel in range(3):
        assert noisy[:, channel].unique().tolist() == plain[:, channel].unique().tolist()
    shown = preprocess.undo(noisy)
    assert shown.unique().tolist() == [0, 255] and not torch.equal(shown, levels)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit"])
@pytest.mark.parametrize("last", [False, True])
def test_it_hands_on_the_layout_of_the_model_s_convolutions(name, last):
    small = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "img_size": SIZE}
    model = timm.create_model("vit_tiny_patch16_224", **small) if name == "vit" else timm.create_model(name)
    memory_format = torch.channels_last if last else torch.contiguous_format
    preprocess = prepared(model.to(memory_format=memory_format), KINDS["gaussian"])
    found = preprocess(pictures())
    assert found.is_contiguous(memory_format=memory_format)
    assert torch.equal(found, prepared(model.to(memory_format=torch.contiguous_format), KINDS["gaussian"])(pictures()))
    in_two = preprocess.noise(preprocess.normalise(pictures()))
    assert in_two.is_contiguous(memory_format=memory_format)
    assert_near(in_two, found)


def test_it_is_timm_s_normalising_and_can_be_undone():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2)
    preprocess = prepared(model, NoiseConfig())
    x = preprocess(images)
    cfg = model.pretrained_cfg
    exact = (images.double().numpy() / 255 - cfg["mean"]) / cfg["std"]
    assert x.shape == (1, 3, 16, 16) and x.dtype == torch.float32
    # Three float32 operations on numbers of order 1.
    torch.testing.assert_close(x[0].permute(1, 2, 0).double(), torch.from_numpy(exact[0]), rtol=0, atol=1e-6)
    assert torch.equal(preprocess.undo(x), images)
    assert preprocess.undo(x + 100).max() == 255 and preprocess.undo(x - 100).max() == 0


# When


@pytest.mark.parametrize(("during", "in_training", "in_evaluation"), [("train", 1, 0), ("eval", 0, 1), ("both", 1, 1)])
def test_during_and_off(during, in_training, in_evaluation):
    model = Tiny()
    preprocess = prepared(model, replace(KINDS["gaussian"], during=during))
    plain = preprocess.normalise(pictures())
    for training, noisy in ((True, in_training), (False, in_evaluation)):
        model.train(training)
        for found in (preprocess(pictures()), preprocess.noise(plain)):
            assert torch.equal(found, plain) != bool(noisy)
        with preprocess.injector.off():
            assert torch.equal(preprocess(pictures()), plain)
            assert torch.equal(preprocess.noise(plain), plain)
        assert torch.equal(preprocess(pictures()), plain) != bool(noisy)


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_the_strength_is_the_schedule_s_and_evaluation_has_the_last_one(progress):
    model, noise = Tiny(), NoiseConfig("gaussian", 0.6, end_strength=0.2, during="both")
    found = prepared(model, noise, progress=progress)(pictures())
    assert_near(found, expected(model, NoiseConfig("gaussian", 0.6 - 0.4 * progress)))
    found = prepared(model, noise, training=False, progress=progress)(pictures())
    assert_near(found, expected(model, NoiseConfig("gaussian", 0.2), training=False))


def test_noise_elsewhere_leaves_the_image_alone():
    model = Tiny()
    preprocess = prepared(model, replace(KINDS["gaussian"], site="conv"))
    assert torch.equal(preprocess(pictures()), preprocess.normalise(pictures()))
    assert len(model.conv._forward_pre_hooks) == 1


def test_a_removed_injector_adds_nothing():
    preprocess = prepared(Tiny(), KINDS["gaussian"])
    preprocess.injector.remove()
    assert torch.equal(preprocess(pictures()), preprocess.normalise(pictures()))


def test_sample_ids_of_another_batch_and_forgetting_them_are_errors():
    preprocess = prepared(Tiny(), KINDS["gaussian"])
    with pytest.raises(ValueError, match="3 rows, 6 sample ids"):
        preprocess(pictures(3))
    model = Tiny().train()
    preprocess = Preprocess(model, torch.device("cpu"), NoiseInjector(model, KINDS["gaussian"], SIZE, SEED))
    with pytest.raises(AssertionError, match="set_batch"):
        preprocess(pictures())


# In training


PLAIN = AugmentConfig()
AUGMENTS = pytest.mark.parametrize(
    "augment",
    [PLAIN, AugmentConfig(mixup_alpha=0.4), AugmentConfig(erasing=0.7), AugmentConfig(cutmix_alpha=1, erasing=0.7)],
    ids=["alone", "mixup", "erasing", "both"],
)


def a_run(noise: NoiseConfig, augment: AugmentConfig) -> SimpleNamespace:
    """As much of a build.Training as a batch on its way into the network meets."""
    preprocess = prepared(Tiny(), noise)
    return SimpleNamespace(
        config=TrainConfig(seed=SEED, label_smoothing=0.1, augment=augment, noise=noise),
        engine=SimpleNamespace(device=torch.device("cpu")),
        model=preprocess.injector._model,
        preprocess=preprocess,
        classes=("a", "b", "c"),
        step=0,
        shown=False,
        log=SimpleNamespace(shown=[]),
    )


@ALL_KINDS
@AUGMENTS
def test_training_has_the_noise_once_and_behind_erasing_and_mixing(noise, augment):
    run = a_run(noise, augment)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    x, targets = inputs_and_targets(run, Batch(pictures(), labels, IDS), EPOCH)
    run.model(x)
    clean = expected(run.model, NoiseConfig())
    wanted = erase(clean, IDS, SEED, EPOCH, augment)
    wanted, wanted_targets = mix(wanted, labels, IDS, SEED, EPOCH, augment, 3, 0.1)
    assert torch.equal(clean, wanted) == (augment is PLAIN)
    assert torch.equal(targets_of(labels, 3, 0.1), wanted_targets) == (not augment.mixes_samples)
    if noise.kind != "none":
        mean, std = (torch.tensor(run.model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        extremes = -mean / std, (1 - mean) / std
        wanted = reference.apply_noise(wanted, noise, IDS, SEED, torch.tensor(EPOCH), extremes=extremes)
    assert_near(run.model.seen[0], wanted)
    assert torch.equal(targets, wanted_targets)


@AUGMENTS
def test_the_pictures_shown_are_what_the_network_gets(augment):
    run, shown = a_run(KINDS["gaussian"], augment), []
    run.log.pictures = lambda name, step, grid: shown.append((name, step, grid))
    for _ in range(2):
        x, _ = inputs_and_targets(run, Batch(pictures(), torch.zeros(6, dtype=torch.int64), IDS), EPOCH)
        show_inputs(run, x)
        run.model(x)
    ((name, step, grid),) = shown
    assert (name, step) == ("input/step_0", 0)
    assert torch.equal(grid, run.preprocess.undo(run.model.seen[0]))
    plain = pictures().double()
    assert (
        augment is not PLAIN or 10 < (grid - plain).abs().mean() < 60
    )  # 0.7 of a std of 0.22: about 40 levels, many cut off
