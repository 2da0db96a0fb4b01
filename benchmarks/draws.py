"""Statistics of the operators' draws, over 10^9 of them and more: each beside its law, and one verdict over all.

Two kinds are tested: standard normals (gaussian_noise on zeros, float32) and the 32-bit words behind all noises. They
come in cubes: two neighbouring seeds, epochs and sites, 16 samples, and the elements of each, so that a draw meets its
neighbour in each direction. Nothing is kept but sums and tables of counts; no cube draws what another drew.

A statistic counts all draws. The other way is a p-value for each chunk and a test of these (L'Ecuyer and Simard,
"TestU01", ACM TOMS 33, 2007): it sees chunks that are too alike, but a small lasting defect must then show in 10^6
draws, where one statistic shows it in 10^9. Sorting 10^9 draws takes memory, so Kolmogorov-Smirnov and Anderson-Darling
are taken at the edges of 2^20 cells, equal in probability to 3 %:
- Kolmogorov's D lies between the figure given and that plus a cell: in between, neither side rises by more.
- Anderson-Darling's A^2 on k equal cells is a sum of chi-squares / (i (i + 1)), as A^2 itself, but for the terms from
  i = k on, whose mean is 1 / k (Choulakian, Lockhart and Stephens, Canadian Journal of Statistics 22, 1994).
An edge lies midway between two floats, so a cell's probability is exact for normals that were rounded to float32.
(On cells of equal probability the chi-square of 10^9 draws fails with p = 2e-195: near 1 a cell has 33 floats, or 32.)

What is not seen: defects within a cell (around 0 normals go in steps of some 2e-7, a twelfth of a cell), and the end
of the tails. A uniform is 2^-33 at least, so no normal is above sqrt(66 ln 2) = 6.76 in size: 7e10 draws are needed
before one is missed. All p-values are two-sided: a fit that is too good is a defect too.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from benchmarks.harness import OnTurn, append_rows, check_output, circumstances_of, print_table, status_line
from pipeline.intervals import holm
from pipeline.noise import native, ops
from pipeline.noise.reference import Purpose, stream_of

CELL_BITS = 20
CELLS = 1 << CELL_BITS
SAMPLES = 16  # of a cube
SITES = 12
LAGS = (1, 2, 3, 4, 8)
TAILS = (4, 5, 6)
FAMILY_LEVEL = 1e-4  # right draws fail in one of 10,000 seeds
FEWEST = 10_000_000  # below, a pair's cell expects under five draws, and the eighth power's mean is not yet normal


@dataclass(frozen=True)
class DrawsOptions:
    """Statistics of the normals and words that the noise operators draw. Ends with status 1 where they fail."""

    draws: int = 1_000_000_000
    """Standard normals, and as many words; whole chunks of them."""
    chunk: int = 1 << 19
    """Draws at a time, a multiple of 2048; 80 bytes of memory each."""
    seed: int = 0
    """Of the first chunk; the others take the seeds that follow, as they take epochs and samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    note: str = ""
    """Kept in each row, such as `2 CPU cores, shared`."""
    output: Path | None = None
    """JSON lines to add to; benchmarks/results/draws.jsonl if None."""

    def __post_init__(self) -> None:
        if self.draws < FEWEST:
            raise ValueError(f"--draws {self.draws}: at least {FEWEST}, below which the laws of the tests do not hold")
        if self.chunk < 2048 or self.chunk % 2048:
            raise ValueError(f"--chunk {self.chunk}: a multiple of 2048")
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"--seed {self.seed}: from 0 to 2^31 - 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; leave the option out to test the CPU")


@dataclass(frozen=True)
class Row:
    """One test's result."""

    part: str  # what was drawn: normals or words
    test: str
    n: int  # draws, or pairs of them, that the statistic counts
    statistic: float
    law: str  # of the statistic, for right draws
    p_value: float  # two-sided
    p_holm: float = math.nan  # adjusted for all tests of the run; NaN until judge() has seen them
    passed: bool = False


@dataclass(frozen=True)
class Law:
    """What draws must follow, once they are scaled to mean 0 and variance 1."""

    name: Literal["normals", "words"]
    moment: Callable[[int], float]  # of a scaled value's power, about 0
    values: Callable[[Tensor], Tensor]  # draws -> float64, scaled
    probabilities: Callable[[Tensor], Tensor]  # scaled values -> their distribution function
    edges: Callable[[], np.ndarray]  # float64 (CELLS + 1,): the distribution function at the edges of cells


def _normal_edges() -> np.ndarray:
    """A cell begins at the first float32 whose probability is enough: the numbers that round to it begin midway."""
    exact = special.ndtri(np.arange(1, CELLS) / CELLS)
    first = exact.astype(np.float32)
    first = np.where(first < exact, np.nextafter(first, np.float32(np.inf)), first)
    before = np.nextafter(first, np.float32(-np.inf))
    inner = special.ndtr((first.astype(np.float64) + before.astype(np.float64)) / 2)
    return np.concatenate(([0.0], inner, [1.0]))


NORMALS = Law(
    "normals",
    lambda power: 0.0 if power % 2 else float(math.prod(range(1, power, 2))),
    Tensor.double,
    torch.special.ndtr,
    cache(_normal_edges),
)
WORDS = Law(
    "words",
    lambda power: 0.0 if power % 2 else 3 ** (power / 2) / (power + 1),
    lambda words: (words.double() - (2.0**31 - 0.5)) * (math.sqrt(12) * 2.0**-32),
    lambda values: values / math.sqrt(12) + 0.5,
    lambda: np.arange(CELLS + 1) / CELLS,
)


def measure_draws(options: DrawsOptions, command: Sequence[str]) -> list[Row]:
    """Draws, tests, writes, and prints a table and the verdict. Where a row has not passed, the command has failed.

    Errors: ValueError, OSError naming the option or the file.
    """
    path = check_output(options.output, "draws")
    circumstances = circumstances_of(command, options.note)
    device = torch.device("cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu")
    chunks = -(-options.draws // options.chunk)
    with one_thread(), status_line() as on_turn:
        rows = judge(_rows(options, chunks, device, on_turn))
    circumstances["conditions"] = {
        "draws": chunks * options.chunk,
        "chunk": options.chunk,
        "seed": options.seed,
        "cells": CELLS,
        "samples_of_a_cube": SAMPLES,
        "device": device.type,
        "kernels": native.is_loaded(device.type),
        "family": {"tests": len(rows), "level": FAMILY_LEVEL, "passed": all(row.passed for row in rows)},
    }
    lines = [{"question": "draws"} | asdict(row) | circumstances for row in rows]
    append_rows(path, [json.dumps(line, ensure_ascii=False) for line in lines])
    _print(rows)
    print(f"{len(rows)} rows, with versions, commit and command, added to {path}")
    return rows


def _rows(options: DrawsOptions, chunks: int, device: torch.device, on_turn: OnTurn) -> list[Row]:
    rows: list[Row] = []
    for law in (NORMALS, WORDS):
        tally = Tally(law)
        for number in range(chunks):
            on_turn(f"{law.name}: {number * options.chunk:,} of {options.draws:,}")
            tally.add(draw_cube(law, number, options.chunk, options.seed, device))
        rows += tally.rows()
    return rows


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Calls of half a millisecond: where others use the cores, two threads wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _print(rows: Sequence[Row]) -> None:
    for part in dict.fromkeys(row.part for row in rows):
        cells = [
            [row.test, f"{row.n:,}", f"{row.statistic:.6g}", row.law, f"{row.p_value:.3g}", f"{row.p_holm:.3g}"]
            for row in rows
            if row.part == part
        ]
        print_table(f"draws: {part}", ["test", "n", "statistic", "its law", "p", "p by Holm"], cells)
    print(verdict(rows))


# ---- draws ----


def draw_cube(law: Law, number: int, draws: int, seed: int, device: torch.device) -> Tensor:
    """Cube `number`: (2 seeds, 2 epochs, 2 sites, SAMPLES, elements), float32 normals or int64 words.

    Normals and words have purposes of their own: the words tested are not those behind the normals.
    """
    size = draws // (8 * SAMPLES)
    ids = torch.arange(SAMPLES, device=device) + number * SAMPLES
    zeros = torch.zeros(SAMPLES, size, device=device)
    purpose = Purpose.NOISE if law is NORMALS else Purpose.MASK
    parts = []
    for own_seed in (seed + 2 * number, seed + 2 * number + 1):
        for own_epoch in (2 * number, 2 * number + 1):
            epoch = torch.tensor(own_epoch, device=device)
            for site in (number % SITES, (number + 1) % SITES):
                stream = stream_of(f"blocks.{site}.attn", purpose)
                if law is NORMALS:
                    parts.append(ops.gaussian_noise(zeros, 1.0, ids, own_seed, epoch, stream))
                else:
                    parts.append(ops.random_words(size, ids, own_seed, epoch, stream))
    return torch.stack(parts).view(2, 2, 2, SAMPLES, size)


# ---- sums and counts ----


class Mean(NamedTuple):
    """A sum over `terms` terms that are uncorrelated and have this mean and variance each."""

    total: Tensor
    terms: int
    mean: float
    variance: float


class Tally:
    """What is kept of all cubes of one kind of draws."""

    def __init__(self, law: Law) -> None:
        self.law = law
        self.draws = 0
        self.means: dict[str, Mean] = {}
        self.tables: dict[str, Tensor] = {}
        self.beyond: dict[int, Tensor] = {}

    def add(self, cube: Tensor) -> None:
        """cube: as draw_cube makes it."""
        values = self.law.values(cube)
        self.draws += values.numel()
        for name, mean in _means(values, self.law.moment):
            if name in self.means:
                before = self.means[name]
                mean = mean._replace(total=before.total + mean.total, terms=before.terms + mean.terms)
            self.means[name] = mean
        # In float64 the probability of 8.3 is 1.
        cells = self.law.probabilities(values).mul_(CELLS).long().clamp_(max=CELLS - 1)
        self._count("cells", cells)
        half = CELL_BITS // 2
        self._count("pairs", (cells[..., 0::2] >> half << half) | (cells[..., 1::2] >> half))
        if self.law is WORDS:
            self._count("low bits", cube & CELLS - 1)
        else:
            far = values[values.abs() > TAILS[0]].abs()
            for limit in TAILS:
                self.beyond[limit] = self.beyond.get(limit, 0) + (far > limit).sum()

    def _count(self, name: str, places: Tensor) -> None:
        found = torch.bincount(places.flatten(), minlength=CELLS)
        self.tables[name] = self.tables[name].add_(found) if name in self.tables else found

    def rows(self) -> list[Row]:
        """Each test's result, not yet judged."""
        part, edges = self.law.name, self.law.edges()
        found = [_mean_row(part, name, mean) for name, mean in self.means.items()]
        tables = {name: table.cpu().numpy() for name, table in self.tables.items()}
        found += [_kolmogorov_row(part, tables["cells"], edges), _anderson_darling_row(part, tables["cells"], edges)]
        coarse = np.diff(edges[:: CELLS >> CELL_BITS // 2])
        found.append(_chi_square_row(part, "cells, chi-square", tables["cells"], np.diff(edges)))
        found.append(_chi_square_row(part, "pairs, chi-square", tables["pairs"], np.outer(coarse, coarse).ravel()))
        if self.law is WORDS:
            # The edges of words' cells are even, whichever bits.
            found.append(_chi_square_row(part, "low 20 bits, chi-square", tables["low bits"], np.diff(edges)))
            found.append(_bits_row(part, tables["cells"], tables["low bits"]))
        return found + [_tail_row(part, limit, int(count), self.draws) for limit, count in self.beyond.items()]


def _means(x: Tensor, moment: Callable[[int], float]) -> Iterator[tuple[str, Mean]]:
    """x: float64 (2, 2, 2, SAMPLES, elements). All terms of a mean are uncorrelated if the draws are independent."""
    flat = x.flatten()
    x2 = flat * flat
    x3, x4 = x2 * flat, x2 * x2
    factors = ((flat, None), (flat, flat), (flat, x2), (x2, x2), (x2, x3), (x3, x3), (x3, x4), (x4, x4))
    for power, (one, other) in enumerate(factors, start=1):
        total = one.sum() if other is None else torch.dot(one, other)
        mean = moment(power)
        yield f"moment {power}", Mean(total, len(flat), mean, moment(2 * power) - mean**2)
    for lag in LAGS:
        yield f"correlation at lag {lag}", _product(x[..., :-lag], x[..., lag:])
    for axis, name in enumerate(("seeds", "epochs", "sites")):
        yield f"correlation of {name}", _product(x.select(axis, 0), x.select(axis, 1))
    yield "correlation of samples", _product(x[..., :-1, :], x[..., 1:, :])
    # Box-Muller's two normals share a radius: where it is wrong, their squares tell.
    squares = x2 - 1
    yield "squares of a pair", Mean(torch.dot(squares[0::2], squares[1::2]), len(flat) // 2, 0, (moment(4) - 1) ** 2)


def _product(one: Tensor, other: Tensor) -> Mean:
    return Mean((one * other).sum(), one.numel(), 0.0, 1.0)


# ---- statistics and their laws ----


def _two_sided(below: float, above: float) -> float:
    """below, above: the probabilities of a statistic at most, and at least, as large."""
    return float(min(1.0, 2 * min(below, above)))


def _mean_row(part: str, name: str, mean: Mean) -> Row:
    z = (mean.total.item() - mean.terms * mean.mean) / math.sqrt(mean.terms * mean.variance)
    return Row(part, name, mean.terms, z, "standard normal", math.erfc(abs(z) / math.sqrt(2)))


def _kolmogorov_row(part: str, counts: np.ndarray, edges: np.ndarray) -> Row:
    n = int(counts.sum())
    d = float(np.abs(np.cumsum(counts) / n - edges[1:]).max())
    scaled = math.sqrt(n) * d
    p_value = _two_sided(stats.kstwobign.cdf(scaled), stats.kstwobign.sf(scaled))
    return Row(part, "Kolmogorov-Smirnov", n, d, "Kolmogorov / sqrt(n)", p_value)


def _anderson_darling_row(part: str, counts: np.ndarray, edges: np.ndarray) -> Row:
    n = int(counts.sum())
    inner, width = edges[1:-1], (edges[2:] - edges[:-2]) / 2
    difference = np.cumsum(counts)[:-1] / n - inner
    a2 = float(n * (difference**2 / (inner * (1 - inner)) * width).sum())
    below = anderson_darling_cdf(a2)
    return Row(part, "Anderson-Darling", n, a2, "Anderson-Darling", _two_sided(below, 1 - below))


def anderson_darling_cdf(a2: float) -> float:
    """P(A^2 <= a2) for many draws: A^2 is then a sum over i of chi-squares / (i (i + 1)).

    Source: Anderson and Darling, JASA 49, 1954; the characteristic function is inverted by Gil-Pelaez's formula, at
    midpoints 0.1 apart. Good to 1e-9, which is the smallest p-value that it can tell.
    """
    terms, step = 200, 0.1
    t = (np.arange(6000) + 0.5) * step
    weights = 1 / (np.arange(1, terms + 1) * np.arange(2, terms + 2))
    logarithm = -0.5 * np.log1p(-2j * t * weights[:, None]).sum(0)
    logarithm += 1j * t / (terms + 1) - t**2 / (3 * (terms + 0.5) ** 3)  # of all further terms
    wave = np.exp(logarithm - 1j * t * min(a2, 30.0))  # above, the probability of a larger one is below 1e-14
    return float(np.clip(0.5 - (wave.imag / t).sum() * step / math.pi, 0, 1))


def _chi_square_row(part: str, name: str, counts: np.ndarray, probabilities: np.ndarray) -> Row:
    n = int(counts.sum())
    expected = n * probabilities
    return _chi_square(part, name, n, float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1)


def _chi_square(part: str, name: str, n: int, statistic: float, degrees: int) -> Row:
    p_value = _two_sided(stats.chi2.cdf(statistic, degrees), stats.chi2.sf(statistic, degrees))
    return Row(part, name, n, statistic, f"chi-square of {degrees:,}", p_value)


def _bits_row(part: str, high: np.ndarray, low: np.ndarray) -> Row:
    """high, low: counts of a word's first and last 20 bits. Bits are independent, so the squares add up."""
    n, numbers = int(high.sum()), np.arange(CELLS)
    set_bits = [high[numbers >> bit & 1 == 1].sum() for bit in range(CELL_BITS - 1, CELL_BITS - 13, -1)]
    set_bits += [low[numbers >> bit & 1 == 1].sum() for bit in range(CELL_BITS)]
    statistic = ((np.array(set_bits) - n / 2) ** 2 / (n / 4)).sum()
    return _chi_square(part, "each bit is set in half", n, float(statistic), len(set_bits))


def _tail_row(part: str, limit: int, count: int, n: int) -> Row:
    expected = n * 2 * stats.norm.sf(limit)
    p_value = _two_sided(stats.poisson.cdf(count, expected), stats.poisson.sf(count - 1, expected))
    return Row(part, f"beyond {limit}", n, count, f"Poisson of {expected:.4g}", p_value)


def judge(rows: Sequence[Row]) -> list[Row]:
    """The rows of a family, with Holm's p-values: one that is below FAMILY_LEVEL has failed."""
    adjusted = holm([row.p_value for row in rows])
    return [replace(row, p_holm=p, passed=p >= FAMILY_LEVEL) for row, p in zip(rows, adjusted, strict=True)]


def verdict(rows: Sequence[Row]) -> str:
    """One or two sentences on the rows that judge() returned."""
    failed = [f"{row.part}, {row.test} (p by Holm {row.p_holm:.2g})" for row in rows if not row.passed]
    odds = f"Right draws fail any of {len(rows)} tests in one of {1 / FAMILY_LEVEL:,.0f} seeds."
    if failed:
        return f"FAILED: {len(failed)} of {len(rows)} tests do not hold: {'; '.join(failed)}. {odds}"
    least = min(rows, key=lambda row: row.p_value)
    return (
        f"All {len(rows)} tests hold: the least of Holm's p-values is {least.p_holm:.2g} ({least.part}, {least.test}), "
        f"and {FAMILY_LEVEL:g} would be too little. {odds}"
    )
