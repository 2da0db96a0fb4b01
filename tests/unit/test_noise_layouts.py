"""Tensors as they lie in memory: slices, channels_last, transposes, and results too large for the caches."""

import pytest
import torch

from pipeline.noise import ops
from pipeline.noise.config import NoiseConfig
from tests.unit.test_noise_ops import ALL_KINDS, EPOCH, batch, ids_of

# Each takes a tensor of whole memory; what is not contiguous is read and written where it lies.
STRIDED = {
    "channels last": lambda: batch((4, 6, 5, 8)).to(memory_format=torch.channels_last),
    "channels last, odd": lambda: batch((5, 7, 3, 7)).to(memory_format=torch.channels_last),
    "channels last, several tiles": lambda: batch((3, 40, 56, 56)).to(memory_format=torch.channels_last),
    "channels last, longer than a tile": lambda: batch((2, 3, 300, 301)).to(memory_format=torch.channels_last),
    "tokens last": lambda: batch((4, 9, 33)).transpose(1, 2),
    "turned about": lambda: batch((4, 8, 5, 6)).transpose(1, 3),
    "one of three": lambda: batch((4, 9, 3, 16))[:, :, 1],
    "a slice of the tokens": lambda: batch((4, 9, 33))[:, 2:7],
    "a slice of the channels": lambda: batch((4, 9, 40))[:, :, 8:24],
    "each second sample": lambda: batch((8, 9, 33))[::2],
    "gaps": lambda: batch((4, 6, 5, 16))[..., ::2],
    "samples last": lambda: batch((9, 33, 4)).permute(2, 0, 1),
    "one sample for all": lambda: batch((1, 9, 33)).expand(4, -1, -1),
    "one row for all": lambda: batch((4, 1, 33)).expand(-1, 9, -1),
    "all its own": lambda: batch((4, 5, 2, 6, 3)).permute(0, 3, 1, 4, 2),
}


@ALL_KINDS
@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("first_token", [0, 2])
def test_values_do_not_depend_on_the_memory_layout_which_stays(config, layout, first_token):
    x = STRIDED[layout]()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        strided = torch.empty_strided(x.shape, x.stride(), dtype=dtype) if 0 not in x.stride() else x.to(dtype)
        strided = strided.copy_(x) if 0 not in x.stride() else strided
        found = ops.apply_noise(strided, config, ids_of(x), 7, EPOCH, first_token)
        expected = ops.apply_noise(strided.contiguous(), config, ids_of(x), 7, EPOCH, first_token)
        assert torch.equal(found, expected)
        assert found.stride() == torch.empty_like(strided).stride()


def test_extremes_by_channel_in_channels_last():
    x = batch((5, 3, 12, 9)).to(memory_format=torch.channels_last)
    extremes = torch.tensor([-1.0, -2, -3]).view(3, 1, 1), torch.tensor([4.0, 5, 6]).view(3, 1, 1)
    config = NoiseConfig(kind="salt_and_pepper", strength=0.5)
    found, expected = (ops.apply_noise(t, config, ids_of(x), 7, EPOCH, extremes=extremes) for t in (x, x.contiguous()))
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)


@ALL_KINDS
def test_what_lies_between_a_slice_s_rows_is_not_written(config):
    """The result of an operator is new memory; the input's own stays as it was, gaps included."""
    whole = batch((4, 9, 40))
    before = whole.clone()
    ops.apply_noise(whole[:, 2:7, 8:24], config, ids_of(whole), 7, EPOCH)
    assert torch.equal(whole, before)


@ALL_KINDS
@pytest.mark.parametrize("shape", [(16, 65, 8192), (16, 67, 8191)], ids=str)
@pytest.mark.parametrize(("dtype", "first_token"), [(torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 1)])
def test_large_results_go_past_the_caches_and_are_the_same(config, shape, dtype, first_token):
    """A part is below the 32 MB from which on they do."""
    x = batch(shape, torch.float32).to(dtype)
    x = torch.cat((x, x)) if dtype == torch.bfloat16 else x
    assert x.numel() * x.element_size() >= 1 << 25
    found = ops.apply_noise(x, config, ids_of(x), 7, EPOCH, first_token)
    parts = zip(x.split(4), ids_of(x).split(4), strict=True)
    expected = torch.cat([ops.apply_noise(part, config, ids, 7, EPOCH, first_token) for part, ids in parts])
    assert torch.equal(found, expected)
