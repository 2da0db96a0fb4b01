"""No counter of Philox is met twice: counters are read back from the words that the operators draw.

No draw is repeated, for (element, sample id, site, purpose, seed, epoch) -> (counter, key, word) is injective:
- element -> (block = element // 4, word = element % 4), and a sample's 2^34 elements at most have 2^32 blocks;
- sample id -> its low and high half;
- (site, purpose) -> 24 and 8 bits of the stream. Sites whose 24 bits are equal are refused in one model;
- (seed, epoch) -> the key.
Ten rounds of Philox with one key are a permutation of the counters, so a counter can be read from its block's words.
"""

import hashlib
from functools import partial

import numpy as np
import pytest
import timm
import torch
from scipy import stats

from pipeline.noise import ops
from pipeline.noise.config import IMAGE_SITE
from pipeline.noise.reference import Purpose, philox4x32, stream_of

MASK32 = 0xFFFFFFFF
MODELS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "resnet50", "convnext_tiny")


def counters(words: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """Philox4x32-10 backwards: int64 (..., 4) words -> their counter, (..., 4)."""
    c0, c1, c2, c3 = words.unbind(-1)
    inverse = pow(0xD2511F53, -1, 1 << 32), pow(0xCD9E8D57, -1, 1 << 32)
    for turn in reversed(range(10)):
        before0, before2 = c3 * inverse[0] & MASK32, c1 * inverse[1] & MASK32
        high0, high1 = before0 * 0xD2511F53 >> 32 & MASK32, before2 * 0xCD9E8D57 >> 32 & MASK32
        keys = seed + turn * 0x9E3779B9 & MASK32, epoch + turn * 0xBB67AE85 & MASK32
        c0, c1, c2, c3 = before0, c0 ^ high1 ^ keys[0], before2, c2 ^ high0 ^ keys[1]
    return torch.stack((c0, c1, c2, c3), -1)


def test_a_counter_is_read_from_its_words():
    known = torch.tensor([0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD])  # Random123's answer to all ones
    assert counters(known, MASK32, MASK32).tolist() == [MASK32] * 4
    counter = torch.randint(0, 1 << 32, (1000, 4), generator=torch.Generator().manual_seed(0))
    words = philox4x32(tuple(counter.unbind(-1)), (torch.tensor(5), torch.tensor(6)))
    assert torch.equal(counters(words, 5, 6), counter)
    assert not (counters(words, 5, 7) == counter).all(-1).any()


IDS = torch.tensor([0, 1, 2, MASK32, 1 << 32, (1 << 32) + 1, (1 << 63) - 1])
KEYS = [(seed, epoch) for seed in (0, 1, MASK32) for epoch in (0, 1, 2, MASK32)]


def drawn_counters(site: str, purpose: Purpose, seed: int, epoch: int, blocks: int) -> torch.Tensor:
    """int64 (ids, blocks, 4), read from the operator's words."""
    words = ops.random_words(4 * blocks, IDS, seed, torch.tensor(epoch), stream_of(site, purpose))
    return counters(words.view(len(IDS), blocks, 4), seed, epoch)


@pytest.mark.parametrize(("seed", "epoch"), KEYS)
def test_the_operator_s_words_have_the_counter_of_their_place(seed, epoch):
    blocks = 1030  # whole vectors and a remainder
    for site, purpose in ((IMAGE_SITE, Purpose.NOISE), ("blocks.11.attn", Purpose.MASK)):
        found = drawn_counters(site, purpose, seed, epoch, blocks)
        assert torch.equal(found[..., 0], torch.arange(blocks).expand(len(IDS), -1))
        assert (found[..., 1] == stream_of(site, purpose)).all()
        assert torch.equal(found[..., 2] | found[..., 3] << 32, IDS[:, None].expand(-1, blocks))


def test_the_millionth_block_has_its_counter():
    blocks = 1 << 22
    words = ops.random_words(4 * blocks, IDS[-1:], 1, torch.tensor(2), 3)[0, -4000:].view(1000, 4)
    assert torch.equal(counters(words, 1, 2)[:, 0], torch.arange(blocks - 1000, blocks))


def keyed_counters(sites: tuple[str, ...]) -> torch.Tensor:
    """(all blocks drawn, 6): seed, epoch and counter, over elements, samples, sites, purposes, seeds and epochs."""
    parts = []
    for seed, epoch in KEYS:
        for site in sites:
            for purpose in Purpose:
                found = drawn_counters(site, purpose, seed, epoch, 16).view(-1, 4)
                parts.append(torch.cat((torch.tensor([[seed, epoch]]).expand(len(found), -1), found), 1))
    return torch.cat(parts)


def met_again(numbers: torch.Tensor) -> int:
    """How many numbers, or rows of them, have been there before."""
    return len(numbers) - len(numbers.unique(dim=None if numbers.ndim == 1 else 0))


def test_no_counter_is_met_twice():
    sites = (IMAGE_SITE, "blocks.0", "blocks.1", "blocks.11.attn", "layer4.2")
    found = keyed_counters(sites)
    assert len(found) == len(KEYS) * len(sites) * len(Purpose) * len(IDS) * 16
    assert met_again(found) == 0


def test_two_names_that_hash_alike_would_be_seen():
    """The one way to a repeated counter, which the injector refuses: 24 equal bits of two names."""
    named: dict[int, str] = {}
    for number in range(100_000):  # 5,000 names have a pair with a chance of a half
        name = f"blocks.{number}"
        stream = stream_of(name, Purpose.NOISE)
        if stream in named:
            break
        named[stream] = name
    pair = named[stream], name
    assert len({hashlib.sha256(site.encode()).digest()[:3] for site in pair}) == 1
    found = keyed_counters(pair)
    assert met_again(found) == len(found) // 2


@pytest.fixture(scope="module")
def module_names() -> dict[str, list[str]]:
    """Each module of each model, on the meta device: names alone are wanted."""
    found = {}
    for model in MODELS:
        with torch.device("meta"):
            modules = timm.create_model(model, pretrained=False).named_modules()
        found[model] = [name for name, _ in modules if name]
    return found


def test_each_site_of_real_models_has_streams_of_its_own(module_names):
    names = {IMAGE_SITE}.union(*module_names.values())
    assert all(len(of_model) > 200 for of_model in module_names.values())
    assert len({stream_of(name, purpose) for name in names for purpose in Purpose}) == len(names) * len(Purpose)


def words_of(sites: list[str], purpose: Purpose, count: int, epochs: tuple[int, ...] = (0, 1)) -> torch.Tensor:
    """The first `count` words of 8 samples at 2 seeds, each epoch and each site: (runs, count)."""
    draw = partial(ops.random_words, count, torch.arange(8))
    streams = [stream_of(site, purpose) for site in sites]
    return torch.cat(
        [draw(seed, torch.tensor(epoch), stream) for seed in (0, 1) for epoch in epochs for stream in streams]
    )


def test_no_64_bits_are_drawn_twice_at_all_sites_of_real_models(module_names):
    """Birthdays: n numbers of 64 bits have n^2 / 2^65 pairs that are equal, 5e-7 for 2^22 of them."""
    sites = sorted({IMAGE_SITE}.union(*module_names.values()))

    def joined(words: torch.Tensor) -> torch.Tensor:
        return (words[:, 0::2] << 32 | words[:, 1::2]).flatten()

    once = joined(words_of(sites, Purpose.NOISE, 272))
    assert len(once) >= 1 << 22
    assert met_again(once) == 0
    # An epoch that is forgotten at one site: its 2 seeds, 8 samples and 136 pairs of words come twice.
    again = joined(words_of(sites[:1], Purpose.NOISE, 272, epochs=(0,)))
    assert met_again(torch.cat((once, again))) == 2 * 8 * 136


def test_32_bits_meet_as_often_as_by_chance(module_names):
    """Among n = 2^22 words some 2,048 have been there before: n less the values met, of 2^32. Poisson, at 1e-4."""
    words = words_of(module_names["vit_small_patch16_224"], Purpose.MASK, 512).flatten()[: 1 << 22]
    assert len(words) == 1 << 22

    def p_value(words: torch.Tensor) -> float:
        n, values = len(words), 2.0**32
        expected, found = n + values * np.expm1(n * np.log1p(-1 / values)), met_again(words)
        return 2 * min(stats.poisson.cdf(found, expected), stats.poisson.sf(found - 1, expected))

    assert p_value(words) > 1e-4
    repeated_some, all_different = words.clone(), torch.arange(1 << 22) * 1021
    repeated_some[1000::10_000] = words[0:-1000:10_000]
    assert p_value(repeated_some) < 1e-4 and p_value(all_different) < 1e-4
