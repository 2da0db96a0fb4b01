"""python -m pipeline train | evaluate | audit | entropy | robustness | export | report | doctor"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

_COMMANDS = {
    "train": "pretrain or fine-tune by a recipe: `train RECIPE [options]`",
    "evaluate": "exact top-1 and top-5 of a checkpoint, per image and by transductive protocols",
    "audit": "what an accuracy under a mixing noise is made of: nine protocols, their intervals, a verdict in words",
    "entropy": "dS of a noise by definition, beside the information measured in a checkpoint's features",
    "robustness": "exact top-1 and top-5 on ImageNet's variants: V2, ReaL, A, R, Sketch, C",
    "export": "a checkpoint's weights as timm-named safetensors",
    "report": "results.json and report.html of a pretraining and a fine-tuning run",
    "doctor": "what is installed, what works, what to mend",
}


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status: 0 done, 1 a check failed, 2 bad input."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m pipeline COMMAND [--help]\n")
        print("\n".join(f"  {name:<10} {what}" for name, what in _COMMANDS.items()))
        return 0 if arguments else 2
    if arguments[0] not in _COMMANDS:
        print(f"error: no command {arguments[0]!r}; there are {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return _command(arguments[0])(arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        from pipeline.parallel import is_lost_peer, is_timeout

        if is_lost_peer(error):
            return 1  # that peer, or its launcher, says why
        if is_timeout(error):
            return _hung(error)
        raise
    except (ValueError, OSError) as error:
        if os.environ.get("NOISYNN_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        return 2


def _hung(error: RuntimeError) -> int:
    """Another rank did not come to a collective: says where this one waited."""
    import faulthandler

    reason = str(error).strip().splitlines()[0]
    rank = os.environ.get("RANK", "0")
    print(f"error (rank {rank}): the ranks waited longer than parallel.timeout_seconds: {reason}", file=sys.stderr)
    traceback.print_tb(error.__traceback__)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    return 1


def _command(name: str) -> Callable[[list[str]], int]:
    """Imports only what the command needs: `doctor` must run where torch does not."""
    if name == "doctor":
        from pipeline.doctor import doctor_command

        return doctor_command
    from pipeline import commands

    return {
        "train": commands.train_command,
        "evaluate": commands.evaluate_command,
        "audit": commands.audit_command,
        "entropy": commands.entropy_command,
        "robustness": commands.robustness_command,
        "export": commands.export_command,
        "report": commands.report_command,
    }[name]


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if "RANK" in os.environ:
        from pipeline.parallel import leave

        leave(status)
    sys.exit(status)
