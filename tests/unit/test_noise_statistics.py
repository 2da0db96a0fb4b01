"""The operators' draws: 10^7 of each kind beside their laws, what each test would see, and no counter met twice.

All seeds are fixed, so a test holds or fails for ever. Right draws fail the family of 49 tests in one of 10^4 seeds.
With 10^7 draws a mean that is 0.002 off is seen, a standard deviation 0.2 % off, a correlation of 0.002 (0.003 of
seeds, epochs and sites): six standard errors or more, where Holm's bound for 49 tests is 4.7.
"""

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import timm
import torch
from scipy import stats

from benchmarks import draws
from benchmarks.draws import NORMALS, WORDS, DrawsOptions, Law, Row, Tally, judge, measure_draws, verdict
from benchmarks.harness import read_rows
from pipeline.noise import ops
from pipeline.noise.config import IMAGE_SITE
from pipeline.noise.reference import Purpose, normals, philox4x32, stream_of

CPU = torch.device("cpu")
MASK32 = 0xFFFFFFFF
CHUNK, CUBES = 1 << 19, 20
MODELS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "resnet50", "convnext_tiny")
Defect = Callable[[torch.Tensor, int], torch.Tensor]  # of a cube and its number


@pytest.fixture(scope="module", autouse=True)
def on_one_thread():
    with draws.one_thread():
        yield


# Laws


@pytest.fixture(scope="module")
def cubes() -> dict[str, list[torch.Tensor]]:
    return {
        law.name: [draws.draw_cube(law, number, CHUNK, 0, CPU) for number in range(CUBES)] for law in (NORMALS, WORDS)
    }


def rows_of(law: Law, cubes: list[torch.Tensor]) -> list[Row]:
    tally = Tally(law)
    for cube in cubes:
        tally.add(cube)
    return tally.rows()


@pytest.fixture(scope="module")
def right(cubes) -> dict[str, list[Row]]:
    return {law.name: rows_of(law, cubes[law.name]) for law in (NORMALS, WORDS)}


def test_the_draws_follow_their_laws(right):
    rows = judge(right["normals"] + right["words"])
    assert CHUNK * CUBES >= 10_000_000 and all(row.n >= CHUNK * CUBES / 2 for row in rows)  # pairs: half
    assert all(row.passed for row in rows), verdict(rows)


def repeated(lag: int) -> Defect:
    """One draw in 200 is that `lag` places before."""

    def defect(cube: torch.Tensor, number: int) -> torch.Tensor:
        out = cube.clone()
        out[..., lag:][..., ::200] = cube[..., :-lag][..., ::200]
        return out

    return defect


def forgotten(axis: int) -> Defect:
    """In one cube of twenty both seeds (epochs, sites) draw the same."""

    def defect(cube: torch.Tensor, number: int) -> torch.Tensor:
        return cube.select(axis, 0).unsqueeze(axis).expand_as(cube) if number == 3 else cube

    return defect


def sample_twice(cube: torch.Tensor, number: int) -> torch.Tensor:
    """In one cube of twenty a sample draws what its neighbour draws."""
    return cube[..., [0, 0, *range(2, draws.SAMPLES)], :] if number == 3 else cube


def too_even(cube: torch.Tensor, number: int) -> torch.Tensor:
    """Multiples of the golden section: each cell is filled alike, better than by chance."""
    places = torch.arange(number * CHUNK, (number + 1) * CHUNK)
    return (places * 0x9E3779B9 & MASK32).view_as(cube)


def angle_of_the_radius(cube: torch.Tensor, number: int) -> torch.Tensor:
    words = draws.draw_cube(WORDS, number, CHUNK, 0, CPU)
    words[..., 1::2] = words[..., 0::2]
    return normals(words)


def each_200000th_is_far(cube: torch.Tensor, number: int) -> torch.Tensor:
    out = cube.clone()
    out.view(-1)[::200_000] = 6.5
    return out


def each_250th_has_a_bit_set(cube: torch.Tensor, number: int) -> torch.Tensor:
    out = cube.clone()
    out.view(-1)[::250] |= 1 << 7
    return out


def each_200th_has_no_low_bits(cube: torch.Tensor, number: int) -> torch.Tensor:
    out = cube.clone()
    out.view(-1)[::200] &= MASK32 << 20
    return out


def moments(first: int) -> set[str]:
    return {f"moment {power}" for power in range(first, 9, 2)}


FIT = {"Kolmogorov-Smirnov", "Anderson-Darling"}
CELLS, PAIRS = "cells, chi-square", "pairs, chi-square"
CONTROLS: dict[str, dict[str, tuple[Defect, set[str]]]] = {
    "normals": {
        "std 0.2 % off": (lambda cube, number: cube * 1.002, {"moment 2"}),
        "std 0.4 % off": (lambda cube, number: cube * 1.004, moments(2) | {"Anderson-Darling"}),
        "mean 0.008 off": (lambda cube, number: cube + 0.008, moments(1) | FIT),
        "skewed": (lambda cube, number: cube + 0.001 * (cube**2 - 1), {"moment 3"}),
        "on a grid": (lambda cube, number: (cube * 4096).round() / 4096, {CELLS}),
        "cut off at 4": (lambda cube, number: cube.clamp(-4, 4), {"beyond 4"}),
        "far ones": (each_200000th_is_far, {"beyond 5", "beyond 6"}),
        "the angle from the radius' word": (angle_of_the_radius, {PAIRS, "squares of a pair"}),
    },
    "words": {
        "std 0.4 % off": (lambda cube, number: (cube - (1 << 31)) * 996 // 1000 + (1 << 31), moments(2)),
        "mean 0.01 off": (lambda cube, number: (cube + 12_400_000).clamp(max=MASK32), moments(1) | FIT),
        "too even": (too_even, {CELLS} | FIT),
        "a bit is set": (each_250th_has_a_bit_set, {"each bit is set in half"}),
        "no low bits": (each_200th_has_no_low_bits, {"low 20 bits, chi-square", "each bit is set in half"}),
    },
}
for _controls in CONTROLS.values():
    for _lag in draws.LAGS:
        _controls[f"repeated at lag {_lag}"] = (repeated(_lag), {f"correlation at lag {_lag}"})
    _controls["repeated in a pair"] = (repeated(1), {"squares of a pair", PAIRS})
    for _axis, _what in enumerate(("seeds", "epochs", "sites")):
        _controls[f"{_what} forgotten"] = (forgotten(_axis), {f"correlation of {_what}"})
    _controls["a sample twice"] = (sample_twice, {"correlation of samples"})


@pytest.mark.parametrize(("part", "name"), [(part, name) for part in CONTROLS for name in CONTROLS[part]])
def test_a_defect_is_seen(cubes, right, part, name):
    defect, seen_by = CONTROLS[part][name]
    law = {"normals": NORMALS, "words": WORDS}[part]
    rows = rows_of(law, [defect(cube, number) for number, cube in enumerate(cubes[part])])
    other = right["words" if part == "normals" else "normals"]
    assert seen_by <= {row.test for row in judge(rows + other) if not row.passed}


def test_each_test_has_a_defect_that_it_sees(right):
    for part, rows in right.items():
        assert set().union(*(seen_by for _, seen_by in CONTROLS[part].values())) == {row.test for row in rows}


# Statistics


def test_statistics_from_cells_are_those_from_sorted_draws(cubes):
    cube = cubes["normals"][0]
    rows = {row.test: row for row in rows_of(NORMALS, [cube])}
    u = np.sort(stats.norm.cdf(cube.flatten().double().numpy()))
    n, place = len(u), np.arange(1, len(u) + 1)
    d = stats.kstest(u, "uniform").statistic
    widest = np.diff(NORMALS.edges()).max()  # an edge lies on a float32, so cells are up to 3 % wider than 2^-20
    assert 0 <= d - rows["Kolmogorov-Smirnov"].statistic <= widest < 1.03 * 2.0**-draws.CELL_BITS
    a2 = -n - ((2 * place - 1) * (np.log(u) + np.log1p(-u[::-1]))).sum() / n
    assert rows["Anderson-Darling"].statistic == pytest.approx(a2, abs=1e-3)


def test_anderson_darling_s_law():
    # Stephens, "EDF statistics for goodness of fit and some comparisons", JASA 69, 1974, table 1, case 0.
    for a2, level in ((1.933, 0.1), (2.492, 0.05), (3.070, 0.025), (3.857, 0.01)):
        assert 1 - draws.anderson_darling_cdf(a2) == pytest.approx(level, rel=0.025)
    # Far out the first term leads: P(A^2 > a) -> sqrt(3) P(chi-square > 2 a) (Zolotarev, 1961).
    assert 1 - draws.anderson_darling_cdf(12.0) == pytest.approx(3**0.5 * stats.chi2.sf(24, 1), rel=0.03)
    assert draws.anderson_darling_cdf(1e-3) < 1e-9 and draws.anderson_darling_cdf(1e6) > 1 - 1e-9


def test_anderson_darling_s_weights_on_equal_cells():
    """Covariance and weights of the statistic on k cells have the eigenvalues 1 / (i (i + 1)), i from 1 to k - 1."""
    k = 24
    u = np.arange(1, k) / k
    covariance = np.minimum.outer(u, u) - np.outer(u, u)
    weights = np.sqrt(1 / (u * (1 - u)) / k)
    found = np.linalg.eigvalsh(weights[:, None] * covariance * weights)[::-1]
    i = np.arange(1, k)
    np.testing.assert_allclose(found, 1 / (i * (i + 1)), rtol=0, atol=1e-14)


def test_holm_s_p_values():
    rows = [Row("words", f"test {p}", 10, 0.0, "", p) for p in (0.04, 1e-6, 0.03, 0.5, 3e-5)]
    judged = judge(rows)
    assert [row.test for row in judged] == [row.test for row in rows]
    assert [row.p_holm for row in judged] == pytest.approx([0.09, 5e-6, 0.09, 0.5, 1.2e-4])
    assert [row.passed for row in judged] == [True, False, True, True, True]
    assert verdict(judged).startswith("FAILED: 1 of 5 tests do not hold: words, test 1e-06 (p by Holm 5e-06)")
    assert verdict(judge(rows[:1])).startswith("All 1 tests hold")


# The command


def test_a_run_writes_a_row_for_each_test_and_prints_the_verdict(tmp_path, capsys, right):
    options = DrawsOptions(draws=draws.FEWEST, chunk=CHUNK, device="cpu", output=tmp_path / "draws.jsonl")
    rows = measure_draws(options, ["-m", "benchmarks", "draws"])
    assert [row.p_value for row in rows] == [row.p_value for row in right["normals"] + right["words"]]
    written = read_rows(options.output)
    assert [(row["part"], row["test"], row["passed"]) for row in written] == [(r.part, r.test, True) for r in rows]
    assert written[0]["conditions"]["draws"] == CHUNK * CUBES
    assert written[0]["conditions"]["family"] == {"tests": 49, "level": 1e-4, "passed": True}
    assert "All 49 tests hold" in capsys.readouterr().out


def test_a_run_of_wrong_draws_says_so(tmp_path, capsys, monkeypatch):
    plain = ops.gaussian_noise
    monkeypatch.setattr(ops, "gaussian_noise", lambda x, std, *draw: plain(x, 1.004 * std, *draw))
    options = DrawsOptions(draws=draws.FEWEST, chunk=CHUNK, device="cpu", output=tmp_path / "draws.jsonl")
    rows = measure_draws(options, ["-m", "benchmarks", "draws"])
    assert not all(row.passed for row in rows) and "normals, moment 2" in capsys.readouterr().out
    written = read_rows(options.output)
    assert [row["passed"] for row in written] == [row.passed for row in rows]
    assert written[0]["conditions"]["family"]["passed"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 9_999_999}, "--draws 9999999: at least 10000000"),
        ({"chunk": 1000}, "--chunk 1000: a multiple of 2048"),
        ({"chunk": 0}, "--chunk 0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DrawsOptions(**options)


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name a"):
        measure_draws(DrawsOptions(output=tmp_path), [])


# Counters
#
# No draw is repeated, for (element, sample id, site, purpose, seed, epoch) -> (counter, key, word) is injective:
# - element -> (block = element // 4, word = element % 4), and a sample's 2^34 elements at most have 2^32 blocks;
# - sample id -> its low and high half;
# - (site, purpose) -> 24 and 8 bits of the stream. Sites whose 24 bits are equal are refused in one model;
# - (seed, epoch) -> the key.
# Ten rounds of Philox with one key are a permutation of the counters, so a counter can be read from its block's words.


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
