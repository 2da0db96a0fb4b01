"""torchrun, whose exit status says why: ``python -m jobs.torchrun`` takes torchrun's own options.

torchrun itself ends with 1 and a traceback whatever has happened, so that no scheduler could tell a run that has saved
and must go on (128 + signal) from one whose input is wrong (2). And what keeps ranks from meeting is one line here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

# Of nodes that do not meet, torch writes pages of C++ frames; what its exception says is told here. Read once, when
# torch is imported, and not meant for the ranks.
_QUIET = "TORCH_CPP_LOG_LEVEL"
_was_set = os.environ.get(_QUIET)
os.environ.setdefault(_QUIET, "FATAL")
import torch  # noqa: E402
from torch.distributed import DistError  # noqa: E402
from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.elastic.rendezvous.api import RendezvousError  # noqa: E402
from torch.distributed.run import parse_args, run  # noqa: E402

if _was_set is None:
    del os.environ[_QUIET]


def main(words: list[str]) -> int:
    """One node's agent: 0, a rank's own status, 128 + a signal, 2 for wrong input, 69 where nodes do not meet."""
    options = parse_args(words)
    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed"):  # the agent's own words; what a rank says stays
                logging.getLogger(name).setLevel(logging.CRITICAL)
    host, port = endpoint(options)
    try:
        check_gpus(int(options.nproc_per_node))
        if is_first(options):
            check_port(host, port)
        with each_signal_once():
            run(options)
    except ValueError as error:
        return refused(str(error))
    except ChildFailedError as error:
        return status_of({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except (RendezvousError, DistError) as error:
        refused(no_meeting(host, port, error))
        return os.EX_UNAVAILABLE  # another try may find the others
    return 0


def refused(why: str) -> int:
    print(f"error ({socket.gethostname()}): {' '.join(why.split())}", file=sys.stderr, flush=True)
    return 2


def endpoint(options: Any) -> tuple[str, int]:
    """Where the nodes meet; port 0 where torchrun chooses one itself."""
    if options.standalone:
        return "localhost", 0
    if options.rdzv_backend == "static":
        return options.master_addr, int(options.master_port)
    host, _, port = options.rdzv_endpoint.rpartition(":")
    return host, int(port)


def is_first(options: Any) -> bool:
    """Whether this node hosts the meeting."""
    return int(options.node_rank) == 0 if options.rdzv_backend == "static" else "is_host=1" in options.rdzv_conf


def check_gpus(processes: int) -> None:
    """Errors: ValueError where this node has fewer GPUs than ranks. CUDA_VISIBLE_DEVICES= means a CPU run."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    if (found := torch.cuda.device_count()) < processes:
        raise ValueError(
            f"--gpus-per-node {processes}: PyTorch finds {found} on this node; ask for at most {found}, look at "
            f"nvidia-smi there, or train on the CPU by --gpus-per-node 0 --processes N"
        )


def check_port(host: str, port: int) -> None:
    """Errors: ValueError where another process of the first node holds the port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed a moment ago is free
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(f"--port: {port} on {host} cannot be opened ({error.strerror}): give another") from None


def no_meeting(host: str, port: int, error: Exception) -> str:
    cause = error.__cause__ or error
    return (
        f"this node and the first, {host}:{port}, did not meet: is {host} its name and reachable from here "
        f"(--network-interface, --port), and have all nodes started? ({type(cause).__name__}: {first_line(cause)})"
    )


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def status_of(statuses: dict[int, int]) -> int:
    """Of a rank that was killed, else of one that refused its input or saved and stopped, else any other's.

    A rank whose peer has died ends with 1, sometimes first; SIGTERM is torchrun's own.
    """

    def cause(rank: int) -> int:
        status = statuses[rank]
        return 0 if status < 0 and status != -signal.SIGTERM else 1 if status not in (1, -signal.SIGTERM) else 2

    status = statuses[min(statuses, key=cause)]
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def each_signal_once():
    """A second signal would raise inside torchrun's shutdown, which then leaves ranks that are still saving.

    Schedulers signal each process of a job, and jobs.agent hands the signal on: so it does come twice.
    """
    register = signal.signal
    came: list[int] = []

    def register_once(number: int, handler: Any) -> Any:
        if not callable(handler) or isinstance(handler, signal.Handlers):
            return register(number, handler)
        return register(number, once(handler))

    def once(handler: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
        def handle(number: int, frame: Any) -> None:
            if not came:
                came.append(number)
                handler(number, frame)

        return handle

    signal.signal = register_once  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = register


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
