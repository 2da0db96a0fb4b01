"""What a line of counts holds, so that a damaged one is named before a figure is formed of it: accuracy and cifar."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.report.results import Result

_Kinds = dict[str, tuple[type, ...]]
_NONE = type(None)
_NUMBER = (int, float)

_ACCURACY: _Kinds = {"part": (str,), "seed": (int,), "trained_with": (dict, _NONE), "found": (list,)}
_FOUND: _Kinds = {
    "during": (str,),
    "point": (dict, _NONE),
    "order": (str,),
    "k": (int,),
    "class_mates": (*_NUMBER, _NONE),
    "correct_top1": (int,),
    "num_images": (int,),
}
_POINT: _Kinds = {"kind": (str,), "strength": (*_NUMBER, _NONE), "site": (str,)}
_WITH_NOISE = {"off": False, "vote": False, "eval": True, "both": True}
_CIFAR: _Kinds = {"contestant": (str,), "seed": (int,), "places": (dict,), "audit": (list,)}
_PROTOCOL: _Kinds = {
    "protocol": (int,),
    "site": (str, _NONE),
    "k": (int,),
    "n": (int,),
    "counts": (list,),
    "value": (*_NUMBER, _NONE),
    "class_mates": (*_NUMBER, _NONE),
    "differing": (int, _NONE),
}


def check_accuracy(results: Sequence[Result]) -> None:
    """Errors: ValueError naming the line, what is wrong with it, and the mend."""
    _check(results, _accuracy_counts)


def check_cifar(results: Sequence[Result]) -> None:
    """Errors: ValueError naming the line, what is wrong with it, and the mend."""
    _check(results, _cifar_counts)


def _check(results: Sequence[Result], counts_of: Callable[[dict[str, Any]], Iterator[tuple[int, int]]]) -> None:
    for result in results:
        try:
            for right, n in counts_of(result.row):
                if not 0 <= right <= n or not n:
                    raise ValueError(f"{right} of {n} right")
        except ValueError as error:
            raise ValueError(f"{result.where} is damaged ({error}): take it out, or measure it again") from error


def _accuracy_counts(row: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """(right, of so many) of each figure. Errors: ValueError saying what is wrong."""
    from benchmarks.accuracy_grid import Model  # with it comes torch

    _require(row, _ACCURACY)
    Model(row["part"]).config  # noqa: B018  (refuses options that are none)
    if row["trained_with"] is not None:
        _require(row["trained_with"], _POINT)
    for found in row["found"]:
        _require(found, _FOUND)
        if found["during"] not in _WITH_NOISE:
            raise ValueError(f"during is {_shown(found['during'])}")
        if found["order"] not in ("any", "class", "shuffled"):
            raise ValueError(f"order is {_shown(found['order'])}")
        if _WITH_NOISE[found["during"]]:
            _require(found["point"], _POINT)
        if found["order"] != "any":
            _require(found, {"class_mates": _NUMBER})
        yield found["correct_top1"], found["num_images"]
    if all(found["during"] != "off" for found in row["found"]):
        raise ValueError("it lacks what is found with the noise off")


def _cifar_counts(row: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """As above."""
    from benchmarks.cifar_summary import ALONE, CLEAN, NOISY, SHOWN  # with it comes torch

    _require(row, _CIFAR)
    _require(row["conditions"], {"noise": (str,)})
    if row["contestant"] not in (CLEAN, NOISY):
        raise ValueError(f"contestant is {_shown(row['contestant'])}")
    _require(row["places"], dict.fromkeys(row["places"], (str,)))
    there: dict[tuple[int, str | None], dict[str, Any]] = {}
    for found in row["audit"]:
        _require(found, _PROTOCOL)
        if found["site"] is not None:
            _require(row["places"], {found["site"]: (str,)})  # that it is there
        there.setdefault((found["protocol"], row["places"].get(found["site"])), found)
        counts = {f"count {number}": count for number, count in enumerate(found["counts"], 1)}
        _require(counts, dict.fromkeys(counts, (int,)))
        yield from ((count, found["n"]) for count in found["counts"])
    alone = [(ALONE, place) for place in row["places"].values()]
    for protocol, place in [*SHOWN, *alone]:
        if (protocol, place) not in there:
            raise ValueError(f"it lacks protocol {protocol}{f', {place}' if place else ''}")
        needed: _Kinds = {"differing": (int,)} if protocol == ALONE else {"value": _NUMBER}
        _require(there[protocol, place], needed | ({"class_mates": _NUMBER} if place and protocol != ALONE else {}))


def _require(body: Any, kinds: _Kinds) -> None:
    """Errors: ValueError saying what is missing, or of another kind."""
    if not isinstance(body, dict):
        raise ValueError(f"{_shown(body)} stands where {', '.join(kinds)} should")
    for name, kind in kinds.items():
        if name not in body:
            raise ValueError(f"it lacks {name!r}")
        value = body[name]
        endless = isinstance(value, float) and not math.isfinite(value)
        if isinstance(value, bool) or not isinstance(value, kind) or endless:
            raise ValueError(f"{name} is {_shown(value)}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
