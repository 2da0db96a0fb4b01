"""What `evaluate` prints."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.accuracy import Accuracy
from pipeline.answers import ROUNDING
from pipeline.evaluate import Against, ClassCount, Evaluation
from pipeline.intervals import Interval

_NAMED, _ENDS = 8, 3  # near ties, and classes of either end, that are printed


def print_evaluation(found: Evaluation) -> None:
    """The protocols, the headline first; then what hangs on rounding, the classes at both ends, and the comparison."""
    rows = list(found.accuracies)
    if found.against is not None:
        rows.append(found.against.accuracy)
    names = [_protocol(accuracy) for accuracy in found.accuracies] + ["other checkpoint\nnoise off"]
    print_accuracies(list(zip(names, rows, strict=False)), len(found.classes))
    if found.accuracies[-1].noise != "none":
        print(f"Noise at inference: {found.accuracies[-1].noise}.")
    if any(accuracy.transductive for accuracy in found.accuracies):
        print(
            "Transductive figures depend on the other pictures of the batch; the per-image one is the model's accuracy."
            "\nMates: how many of a picture's group are of its class. Answers in a group hang together: intervals are "
            "too narrow."
        )
    print(_near_ties(found.accuracies[0]))
    print(_ends(found.classes))
    if found.against is not None:
        print(_comparison(found.against))
    print(f"Written: {found.output}")


def _protocol(accuracy: Accuracy) -> str:
    """In short lines: the table has to fit into 80 columns."""
    lines = ["transductive" if accuracy.transductive else "per image"]
    if accuracy.noise == "none":
        lines.append("noise off")
    else:
        lines.append("any order" if accuracy.order == "manifest" else f"{accuracy.order}, k = {accuracy.group_size}")
    if accuracy.class_mate_share is not None:
        lines.append(f"{100 * accuracy.class_mate_share:.1f} % mates")
    return "\n".join(lines)


def print_accuracies(rows: list[tuple[str, Accuracy]], num_classes: int) -> None:
    """Each under its name; below each percentage its 95 % interval and the count that it is of.

    Five classes or fewer are all in the top-5, which then stays blank.
    """

    def percent(share: float, interval: Interval, correct: int) -> str:
        low, high = interval
        return f"{100 * share:.2f}\n{100 * low:.2f} to {100 * high:.2f}\n{correct:,}"

    table = Table("protocol", "top-1 %", "top-5 %", "loss", "ECE %", "n", box=box.HORIZONTALS, show_lines=True)
    for name, accuracy in rows:
        table.add_row(
            name,
            percent(accuracy.top1, accuracy.top1_interval, accuracy.correct_top1),
            percent(accuracy.top5, accuracy.top5_interval, accuracy.correct_top5) if num_classes > 5 else "",
            f"{accuracy.mean_loss:.4f}",
            f"{100 * accuracy.calibration_error:.2f}",
            f"{accuracy.num_images:,}",
        )
    Console(highlight=False).print(table)
    print("Below each percentage: its 95 % interval (Wilson), and how many pictures. Loss in nats.")


def _near_ties(headline: Accuracy) -> str:
    """Of the per-image answers, which pictures hang on float32's rounding."""
    bound = f"closer than 2^{math.log2(ROUNDING):.0f} of their largest, float32's rounding"
    if not headline.near_ties:
        return f"No picture's first two logits lie {bound}."
    names = [tie.name for tie in headline.near_ties]
    more = f" and {len(names) - _NAMED} more, all in the JSON" if len(names) > _NAMED else ""
    return f"The first two logits of {len(names)} lie {bound}: {', '.join(names[:_NAMED])}{more}."


def _ends(classes: tuple[ClassCount, ...]) -> str:
    """The classes of the lowest and the highest accuracy, those without pictures aside."""

    def told(counts: list[ClassCount]) -> str:
        return ", ".join(f"{count.name}: {count.right} of {count.seen}" for count in counts)

    ascending = sorted((count for count in classes if count.seen), key=lambda count: count.right / count.seen)
    if len(ascending) <= 2 * _ENDS:
        return f"By class, {told(ascending)}."
    return f"Lowest by class, {told(ascending[:_ENDS])}; highest, {told(ascending[: -_ENDS - 1 : -1])}."


def _comparison(against: Against) -> str:
    found = against.comparison
    return (
        f"{found.only_one:,} pictures only here right, {found.only_other:,} only there ({against.folder}); "
        f"p = {found.p_value:.2g} (McNemar, exact)."
    )
