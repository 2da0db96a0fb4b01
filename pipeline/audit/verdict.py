"""What the rows come to, in words: a pure function of the numbers.

A noise at inference is the identity for a picture on its own, so whatever it gains is transductive. What can survive
for a single picture is what training with the noise did, and that is for the clean twin to show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from pipeline.audit.rows import Row, faults, per_image

ALPHA = 0.05

Kind = Literal[
    "per image",
    "fault",
    "all transductive",
    "no gain",
    "harm in class order",
    "shuffled harms",
    "shuffled neutral",
    "shuffled gains",
    "mixed classes harm",
    "mixed classes neutral",
    "mixed classes gain",
    "voting does it",
    "voting does less",
    "swayed by mates",
    "not swayed",
    "twin better",
    "twin worse",
    "twins equal",
    "no twin",
]


class Finding(NamedTuple):
    kind: Kind
    words: str


def verdict(rows: Sequence[Row]) -> list[Finding]:
    """The headline first, then each noise, then what survives for a single picture. rows: of run_protocols."""
    plain = per_image(rows)
    assert plain.interval is not None and plain.value is not None
    low, high = (100 * end for end in plain.interval)
    count = f"{plain.counts[0]:,} of {plain.n:,}"
    found = [
        Finding(
            "per image",
            f"Per image, noise off, the model has {_percent(plain)} top-1 ({count}; 95 %: {low:.2f} to {high:.2f}): "
            "this is its accuracy, whatever other pictures come with one.",
        )
    ]
    if wrong := faults(rows):
        found += [Finding("fault", f"{line}. No transductive figure here may be used.") for line in wrong]
    else:
        for noise in dict.fromkeys(row.noise for row in rows if row.protocol == 3):
            found += _of_noise([row for row in rows if row.noise == noise or row.protocol == 6], plain)
    return [*found, _of_twin(next(row for row in rows if row.protocol == 9), plain)]


def _of_noise(rows: Sequence[Row], plain: Row) -> Iterator[Finding]:
    best = max((row for row in rows if row.protocol == 3), key=lambda row: row.value or 0.0)
    yield _in_class_order(best, plain, next(row for row in rows if row.protocol == 2))
    beside = {row.protocol: row for row in rows if row.k == best.k and row.noise == best.noise}
    yield _shuffled(beside[4], plain)
    yield _one_of_each(beside[5], plain)
    voting = next(row for row in rows if row.protocol == 6 and row.k == best.k)
    if (best.value or 0) > (plain.value or 0):
        enough = (voting.value or 0) >= (best.value or 0)
        what = "so the gain needs no noise" if enough else "less than with the noise"
        yield Finding(
            "voting does it" if enough else "voting does less",
            f"Averaging the plain logits over the same groups has {_percent(voting)}, {what}.",
        )
    yield from _adversarial(rows, best.k)


def _in_class_order(best: Row, plain: Row, alone: Row) -> Finding:
    gain = _points(best, plain)
    where = f"{best.noise}: in class order it has {_percent(best)} at k = {best.k}, its best"
    if best.p is not None and best.p < ALPHA and gain > 0:
        return Finding(
            "all transductive",
            f"{where}: {gain:+.2f} points. All of this gain is transductive, and nothing of it survives for a single "
            f"picture: it comes from the rest of a group of {best.k}, of which {_share(best.class_mates)} are of the "
            f"picture's class. For a picture alone (k = 1) {alone.differing} of {alone.n:,} answers are not the plain "
            "ones.",
        )
    if best.p is not None and best.p < ALPHA and gain < 0:
        return Finding("harm in class order", f"{where}: {gain:+.2f} points. Even there it harms.")
    return Finding(
        "no gain",
        f"{where}: {gain:+.2f} points, not told apart from none (p = {_p(best.p)}). There is no gain to divide.",
    )


def _shuffled(row: Row, plain: Row) -> Finding:
    seeds = f"over {len(row.counts)} orders" if len(row.counts) > 1 else "in one order"
    where = f"Shuffled, at the same k, it has {_percent(row)} {seeds} ({_share(row.class_mates)} class mates)"
    change = _told_apart(row, plain)
    if change < 0:
        return Finding("shuffled harms", f"{where}: {_points(row, plain):+.2f} points, it harms.")
    if change > 0:
        words = f"{where}: {_points(row, plain):+.2f} points, which too come from the other pictures of a group."
        return Finding("shuffled gains", words)
    return Finding("shuffled neutral", f"{where}: {_points(row, plain):+.2f} points, not told apart from none.")


def _one_of_each(row: Row, plain: Row) -> Finding:
    where = f"Cycling through the classes it has {_percent(row)} ({_share(row.class_mates)} class mates)"
    change = _told_apart(row, plain)
    if change < 0:
        return Finding("mixed classes harm", f"{where}: {_points(row, plain):+.2f} points, it harms.")
    if change > 0:
        words = f"{where}: {_points(row, plain):+.2f} points, which too come from the other pictures of a group."
        return Finding("mixed classes gain", words)
    return Finding("mixed classes neutral", f"{where}: {_points(row, plain):+.2f} points, not told apart from none.")


def _adversarial(rows: Sequence[Row], k: int) -> Iterator[Finding]:
    found = [row for row in rows if row.protocol == 7 and row.k == k and row.was_run]
    if not found:
        return
    row = found[0]
    assert row.interval is not None and row.beside is not None
    off = row.beside / row.n
    words = (
        f"In a group of {k}, the rest of one other class, {_percent(row)} of {row.n:,} pictures are answered as that "
        f"class; with the noise off {100 * off:.2f} % of the same are."
    )
    yield Finding("swayed by mates" if row.interval.low > off else "not swayed", words)


def _of_twin(row: Row, plain: Row) -> Finding:
    if not row.was_run:
        words = "What training with noise gives a single picture was not asked: name the clean twin with --twin."
        return Finding("no twin", words)
    gain = -_points(row, plain)
    where = f"For a single picture: {_percent(plain)} here, {_percent(row)} for the clean twin, {gain:+.2f} points"
    if row.p is None or row.p >= ALPHA:
        words = f"{where}, not told apart from none (p = {_p(row.p)}): no gain is seen to survive."
        return Finding("twins equal", words)
    if gain > 0:
        return Finding("twin better", f"{where} (p = {_p(row.p)}): this survives for a single picture.")
    return Finding("twin worse", f"{where} (p = {_p(row.p)}): training with noise cost accuracy.")


def _told_apart(row: Row, plain: Row) -> int:
    """1 above the model per image, -1 below it, 0 where chance could do that much."""
    gain = _points(row, plain)
    if row.p is not None:
        apart = row.p < ALPHA
    else:
        apart = row.interval is not None and not row.interval.low <= (plain.value or 0) <= row.interval.high
    return (gain > 0) - (gain < 0) if apart else 0


def _points(row: Row, plain: Row) -> float:
    assert row.value is not None and plain.value is not None
    return 100 * (row.value - plain.value)


def _percent(row: Row) -> str:
    assert row.value is not None
    return f"{100 * row.value:.2f} %"


def _share(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"


def _p(p: float | None) -> str:
    return "unknown" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
