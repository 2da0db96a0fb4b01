"""python -m benchmarks loader | noise | shards"""

from __future__ import annotations

import os
import signal
import sys

_QUESTIONS = {
    "loader": "images/s of this project's readers beside the webdataset library",
    "noise": "elements/s of each noise beside eager torch and a plain copy",
    "shards": "data_prep beside plain writes, webdataset, FFCV's writer and tarfile",
}


def main(arguments: list[str]) -> int:
    """Answers one question; returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m benchmarks QUESTION [--help]\n")
        print("\n".join(f"  {name:<8} {what}" for name, what in _QUESTIONS.items()))
        return 0 if arguments else 2
    if arguments[0] not in _QUESTIONS:
        print(f"error: no question {arguments[0]!r}; there are {', '.join(_QUESTIONS)}", file=sys.stderr)
        return 2
    # A scheduler's SIGTERM unwinds as an error does, so that temporary shards go.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        _answer(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("NOISYNN_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _answer(question: str, arguments: list[str]) -> None:
    import tyro

    command = ["-m", "benchmarks", question, *arguments]
    prog = f"python -m benchmarks {question}"
    if question == "loader":
        from benchmarks.loader import LoaderOptions, measure_loaders

        measure_loaders(tyro.cli(LoaderOptions, prog=prog, args=arguments), command)
    elif question == "shards":
        from benchmarks.shards import ShardsOptions, measure_shards

        measure_shards(tyro.cli(ShardsOptions, prog=prog, args=arguments), command)
    else:
        from benchmarks.noise import NoiseOptions, measure_noises

        measure_noises(tyro.cli(NoiseOptions, prog=prog, args=arguments), command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
