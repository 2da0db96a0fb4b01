"""What the rows come to, in words: a pure function of the numbers.

A noise at inference is the identity for a picture on its own, so whatever it gains is transductive. What can survive
for a single picture is what training with the noise did, and that is for the clean twin to show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from pipeline.audit.rows import Row, faults, in_words, per_image, points_over, signed
from pipeline.intervals import holm

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
    "voting does as much",
    "voting does less",
    "swayed by mates",
    "not swayed",
    "twin better",
    "twin worse",
    "twins equal",
    "no twins",
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
        noises = dict.fromkeys(row.noise for row in rows if row.protocol == 3)
        for noise in noises:
            first, *others = _of_noise([row for row in rows if row.noise == noise or row.protocol == 6], plain)
            found.append(first)  # which names its noise
            found += [_naming(str(noise), finding) if len(noises) > 1 else finding for finding in others]
    return [*found, _of_twin(next(row for row in rows if row.protocol == 9), plain)]


def _naming(noise: str, finding: Finding) -> Finding:
    return finding._replace(words=f"{noise}: {finding.words[0].lower()}{finding.words[1:]}")


def _of_noise(rows: Sequence[Row], plain: Row) -> Iterator[Finding]:
    ordered = [row for row in rows if row.protocol == 3]
    best = max(ordered, key=lambda row: row.value or 0.0)
    found = _in_class_order(best, _adjusted_p(best, ordered), plain, next(row for row in rows if row.protocol == 2))
    yield found
    beside = {row.protocol: row for row in rows if row.k == best.k and row.noise == best.noise}
    yield _shuffled(beside[4], plain)
    yield _one_of_each(beside[5], plain)
    if found.kind == "all transductive":
        yield _voting(next(row for row in rows if row.protocol == 6 and row.k == best.k), best)
    yield from _adversarial(rows, best.k)


def _adjusted_p(best: Row, ordered: Sequence[Row]) -> float | None:
    """By Holm, since the best of several k was sought out."""
    ps = [row.p for row in ordered if row.p is not None]
    return None if best.p is None else holm(ps)[ps.index(best.p)]


def _in_class_order(best: Row, p: float | None, plain: Row, alone: Row) -> Finding:
    gain = points_over(best, plain)
    where = f"{best.noise}: in class order it has {_percent(best)} at k = {best.k}, its best: {signed(gain)} points"
    if p is not None and p < ALPHA and gain > 0:
        return Finding(
            "all transductive",
            f"{where}. All of this gain is transductive, and nothing of it survives for a single "
            f"picture: it comes from the rest of a group of {best.k}, of which {_share(best.class_mates)} are of the "
            f"picture's class. For a picture alone (k = 1) {alone.differing} of {alone.n:,} answers are not the plain "
            "ones.",
        )
    if p is not None and p < ALPHA and gain < 0:
        return Finding("harm in class order", f"{where}. Even there it harms.")
    return Finding(
        "no gain", f"{where}, not told apart from none (p = {in_words(p)}, Holm's over k). There is no gain to divide."
    )


def _voting(row: Row, best: Row) -> Finding:
    """Decided on the same pictures."""
    where = f"Averaging the plain logits over the same groups has {_percent(row)}"
    test = f"p = {in_words(best.p_voting)}"
    if best.p_voting is None or best.p_voting >= ALPHA:
        words = f"{where}, not told apart from what the noise gets ({test}): the gain comes without noise too."
        return Finding("voting does as much", words)
    if points_over(row, best) > 0:
        return Finding("voting does it", f"{where}, more than with the noise ({test}): the gain needs no noise.")
    return Finding("voting does less", f"{where}, less than with the noise ({test}).")


def _shuffled(row: Row, plain: Row) -> Finding:
    seeds = f"over {len(row.counts)} orders" if len(row.counts) > 1 else "in one order"
    where = (
        f"Shuffled, at the same k, it has {_percent(row)} {seeds} ({_share(row.class_mates)} class mates): "
        f"{signed(points_over(row, plain))} points"
    )
    change = _told_apart(row, plain)
    if change < 0:
        return Finding("shuffled harms", f"{where}, it harms.")
    if change > 0:
        return Finding("shuffled gains", f"{where}, which too come from the other pictures of a group.")
    return Finding("shuffled neutral", f"{where}, not told apart from none.")


def _one_of_each(row: Row, plain: Row) -> Finding:
    where = (
        f"Cycling through the classes it has {_percent(row)} ({_share(row.class_mates)} class mates): "
        f"{signed(points_over(row, plain))} points"
    )
    change = _told_apart(row, plain)
    if change < 0:
        return Finding("mixed classes harm", f"{where}, it harms.")
    if change > 0:
        return Finding("mixed classes gain", f"{where}, which too come from the other pictures of a group.")
    return Finding("mixed classes neutral", f"{where}, not told apart from none.")


def _adversarial(rows: Sequence[Row], k: int) -> Iterator[Finding]:
    found = [row for row in rows if row.protocol == 7 and row.k == k and row.was_run]
    if not found:
        return
    row = found[0]
    assert row.beside is not None
    off = row.beside / row.n
    swayed = row.p is not None and row.p < ALPHA and row.counts[0] > row.beside
    words = (
        f"In a group of {k}, the rest of one other class, {_percent(row)} of {row.n:,} pictures are answered as that "
        f"class; with the noise off {100 * off:.2f} % of the same are (p = {in_words(row.p)})."
    )
    yield Finding("swayed by mates" if swayed else "not swayed", words)


def _of_twin(row: Row, plain: Row) -> Finding:
    if not row.was_run:
        words = "What training with noise gives a single picture was not asked: name the clean twin with --twin."
        return Finding("no twin", words)
    difference = points_over(row, plain)  # of the same sign as in the table
    where = (
        f"For a single picture: {_percent(plain)} here, {_percent(row)} for the clean twin, {signed(difference)} "
        "points there"
    )
    test = f"p = {in_words(row.p)}"
    if row.unlike:
        return Finding("no twins", f"{where} ({test}), but {row.unlike}: this says nothing of the noise.")
    if row.p is None or row.p >= ALPHA:
        return Finding("twins equal", f"{where}, not told apart from none ({test}): no gain is seen to survive.")
    one = "It is one training of each: what of this is the noise's and what chance, only more seeds can tell."
    if difference < 0:
        return Finding("twin better", f"{where} ({test}): a gain that survives for a single picture. {one}")
    return Finding("twin worse", f"{where} ({test}): the noisy training came out worse. {one}")


def _told_apart(row: Row, plain: Row) -> int:
    """1 above the model per image, -1 below it, 0 where chance could do that much; by each order of several."""
    ps = row.seed_ps or (row.p,)
    if any(p is None or p >= ALPHA for p in ps):
        return 0
    signs = {(count > plain.counts[0]) - (count < plain.counts[0]) for count in row.counts}
    return signs.pop() if len(signs) == 1 else 0


def _percent(row: Row) -> str:
    assert row.value is not None
    return f"{100 * row.value:.2f} %"


def _share(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"
