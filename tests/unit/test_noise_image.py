"""image_noise: pictures to the network's input in one pass, beside the reference's chain of steps."""

import pytest
import torch

from pipeline.noise import ops, reference
from pipeline.noise.config import NoiseConfig

EPOCH, SEED = torch.tensor(3), 7
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
KINDS = {
    "none": NoiseConfig(),
    "gaussian": NoiseConfig(kind="gaussian", strength=0.7),
    "salt_and_pepper": NoiseConfig(kind="salt_and_pepper", strength=0.3),
    "circular_shift": NoiseConfig(kind="circular_shift", strength=0.3, group_size=3),
    "optimal_q": NoiseConfig(kind="optimal_q", group_size=3),
}
ALL_KINDS = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
SIZES = [(224, 224), (1, 1), (3, 5), (7, 33), (2, 5000), (65, 64)]


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("flipped", [False, True])
def test_it_is_the_reference_s_chain(config, dtype, size, flipped):
    images = pictures(4, *size)
    ids = torch.arange(4) * 977
    flip = torch.tensor([True, False, True, True]) if flipped else None
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = ops.image_noise(images, MEAN, STD, config, ids, SEED, EPOCH, flip, dtype, memory_format)
        expected = reference.image_noise(images, MEAN, STD, config, ids, SEED, EPOCH, flip, dtype)
        assert found.shape == (4, 3, *size) and found.dtype == dtype
        assert found.is_contiguous(memory_format=memory_format)
        # Normalised by one product and sum instead of two quotients: 4 units of what is up to 3.
        bound = 2e-6 + 0.7 * 4e-6 + (torch.finfo(dtype).eps * expected.float().abs() if dtype != torch.float32 else 0)
        assert ((found.float() - expected.float()).abs() <= bound).all()


def test_salt_and_pepper_are_white_and_black_to_the_bit():
    levels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 8, 8, 3).contiguous()
    config = NoiseConfig(kind="salt_and_pepper", strength=1.0)
    black, white = ops.image_noise(levels, MEAN, STD, NoiseConfig(), torch.arange(2), SEED, EPOCH)
    noisy = ops.image_noise(levels, MEAN, STD, config, torch.arange(2), SEED, EPOCH)
    for channel in range(3):
        expected = {black[channel, 0, 0].item(), white[channel, 0, 0].item()}
        assert set(noisy[:, channel].flatten().tolist()) == expected


@ALL_KINDS
def test_neither_ranks_nor_threads_nor_strength_0_change_it(config):
    images, ids = pictures(12, 40, 30), torch.arange(12)
    whole = ops.image_noise(images, MEAN, STD, config, ids, SEED, EPOCH)
    for parts in (2, 4):
        split = zip(images.chunk(parts), ids.chunk(parts), strict=True)
        found = [ops.image_noise(a, MEAN, STD, config, b, SEED, EPOCH) for a, b in split]
        assert torch.equal(torch.cat(found), whole)
    off = torch.tensor(0.0, dtype=torch.float64)
    plain = ops.image_noise(images, MEAN, STD, KINDS["none"], ids, SEED, EPOCH)
    assert torch.equal(ops.image_noise(images, MEAN, STD, config, ids, SEED, EPOCH, strength=off), plain)


@ALL_KINDS
def test_compiled_and_checked_by_torch(config):
    images, ids = pictures(3, 16, 16), torch.arange(3)
    stream = ops.noise_stream(config)

    def forward(pictures: torch.Tensor, epoch: torch.Tensor) -> torch.Tensor:
        return ops.image_noise(pictures, MEAN, STD, config, ids, SEED, epoch, stream=stream) * 2

    torch._dynamo.reset()
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(images, EPOCH), forward(images, EPOCH))
    strength, out = torch.tensor(0.3, dtype=torch.float64), torch.empty(3, 3, 16, 16)
    flip = torch.zeros(3, dtype=torch.bool)
    arguments = (images, MEAN, STD, flip, 1, strength, ids, EPOCH, SEED, stream, 3, False, out)
    torch.library.opcheck(torch.ops.noisynn.image_noise_.default, arguments)


def test_an_empty_batch_stays_empty():
    found = ops.image_noise(pictures(0, 4, 4), MEAN, STD, KINDS["optimal_q"], torch.arange(0), SEED, EPOCH)
    assert found.shape == (0, 3, 4, 4)


def test_bad_input_is_refused_by_name():
    images, ids = pictures(2, 4, 4), torch.arange(2)
    config = KINDS["gaussian"]
    for call, message in (
        (lambda: ops.image_noise(images.float(), MEAN, STD, config, ids, 0, EPOCH), "give uint8"),
        (lambda: ops.image_noise(images.permute(0, 3, 1, 2), MEAN, STD, config, ids, 0, EPOCH), "give uint8"),
        (lambda: ops.image_noise(images, MEAN[:1], STD, config, ids, 0, EPOCH), "mean is"),
        (lambda: ops.image_noise(images, MEAN, STD.double(), config, ids, 0, EPOCH), "std is"),
        (lambda: ops.image_noise(images, MEAN, STD, config, ids[:1], 0, EPOCH), "2 rows, 1 sample ids"),
        (lambda: ops.image_noise(images, MEAN, STD, config, ids, 0, EPOCH, ids), "flip is"),
        (lambda: ops.image_noise(images, MEAN, STD, config, ids, 0, EPOCH, dtype=torch.float64), "take float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
