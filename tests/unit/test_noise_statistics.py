"""The operators' draws: 10^7 of each kind beside their laws, and what each test would see.

All seeds are fixed, so a test holds or fails for ever. Right draws fail the family of 49 tests in one of 10^4 seeds.
With 10^7 draws a mean that is 0.002 off is seen, a standard deviation 0.2 % off, a correlation of 0.002 (0.003 of
seeds, epochs and sites): six standard errors or more, where Holm's bound for 49 tests is 4.7.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import draws
from benchmarks.draws import NORMALS, WORDS, DrawsOptions, Law, Row, Tally, judge, measure_draws, verdict
from benchmarks.harness import read_rows
from pipeline.noise import ops
from pipeline.noise.reference import normals

CPU = torch.device("cpu")
MASK32 = 0xFFFFFFFF
CHUNK, CUBES = 1 << 19, 20
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
