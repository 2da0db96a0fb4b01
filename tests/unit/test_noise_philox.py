"""Philox4x32-10 and what is drawn from it: against published answers and written-out integers."""

import hashlib
import random

import pytest
import torch

from pipeline.noise.reference import (
    Purpose,
    philox4x32,
    random_words,
    stream_of,
)

EPOCH = torch.tensor(3)
MASK32 = 0xFFFFFFFF

# Random123's kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def philox_int(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 from the paper's figure, in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK32, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c


def philox(counter: list[int], key: list[int]) -> list[int]:
    c = tuple(torch.tensor(v) for v in counter)
    return philox4x32(c, (torch.tensor(key[0]), torch.tensor(key[1]))).tolist()


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    numbers = [[int(word, 16) for word in text.split()] for text in (counter, key, answer)]
    assert philox(*numbers[:2]) == numbers[2]
    assert philox_int(*numbers[:2]) == numbers[2]


def test_philox_equals_unbounded_integers():
    draw = random.Random(0)
    edges = (0, 1, MASK32, MASK32 - 1, 1 << 31)
    for trial in range(300):
        words = [draw.choice(edges) if trial % 3 == 0 else draw.getrandbits(32) for _ in range(6)]
        assert philox(words[:4], words[4:]) == philox_int(words[:4], words[4:]), words


def test_random_words_layout_of_counter_and_key():
    """Key (seed, epoch); counter (position // 4, stream, low and high half of the id); word position % 4."""
    ids = [0, 5, (1 << 32) + 5, (7 << 32) + MASK32]
    stream = stream_of("layer4.2", Purpose.MASK)
    words = random_words(11, torch.tensor(ids), MASK32, torch.tensor(9), stream)
    assert words.shape == (4, 11)
    for row, sample in zip(words.tolist(), ids, strict=True):
        for place, word in enumerate(row):
            assert word == philox_int([place // 4, stream, sample & MASK32, sample >> 32], [MASK32, 9])[place % 4]


def test_stream_is_24_bits_of_the_name_and_8_of_the_purpose():
    for site in ("image", "blocks.11.attn"):
        for purpose in Purpose:
            assert f"{stream_of(site, purpose):08x}" == hashlib.sha256(site.encode()).hexdigest()[:6] + f"{purpose:02x}"
    assert len({int(p) for p in Purpose}) == len(Purpose)


def test_words_differ_by_each_of_their_keys():
    stream = stream_of("image", Purpose.NOISE)
    base = random_words(256, torch.tensor([17]), 1, torch.tensor(2), stream)
    others = {
        "sample id": random_words(256, torch.tensor([18]), 1, torch.tensor(2), stream),
        "sample id by 2^32": random_words(256, torch.tensor([17 + (1 << 32)]), 1, torch.tensor(2), stream),
        "epoch": random_words(256, torch.tensor([17]), 1, torch.tensor(3), stream),
        "seed": random_words(256, torch.tensor([17]), 2, torch.tensor(2), stream),
        "seed and epoch changed round": random_words(256, torch.tensor([17]), 2, torch.tensor(1), stream),
        "site": random_words(256, torch.tensor([17]), 1, torch.tensor(2), stream_of("blocks.0", Purpose.NOISE)),
        "purpose": random_words(256, torch.tensor([17]), 1, torch.tensor(2), stream_of("image", Purpose.MASK)),
    }
    for name, words in others.items():
        assert not (words == base).any(), name  # one equal word in 256 has a chance of 6e-8
    assert len(base.unique()) == 256


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9])
def test_a_sample_s_first_words_do_not_depend_on_how_many_are_drawn(count):
    ids, stream = torch.tensor([4, 9]), stream_of("image", Purpose.NOISE)
    assert torch.equal(random_words(count, ids, 1, EPOCH, stream), random_words(16, ids, 1, EPOCH, stream)[:, :count])
