"""Requests to save and end: SIGTERM, SIGUSR1 (the warning of a scheduler), and the end of a run's own time.

The first request is noted; the loop asks for it at every step, and all ranks together save and end. A second one ends
the process at once: nothing half-written ever stands under a final name, so that is safe at any time.
"""

from __future__ import annotations

import os
import signal
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A scheduler signals each process of a job, and torchrun's agent hands the signal on: one request that comes twice.
_SAME_REQUEST_SECONDS = 5.0


class StopRequests:
    """What this process has been asked. One a process, made by its main thread."""

    def __init__(self) -> None:
        self._signal = 0
        self._first: float | None = None  # when a signal came
        self._deadline = float("inf")
        # Python runs handlers between two bytecodes of the main thread, which may be inside a collective for minutes.
        # The number of a signal reaches a pipe at once, and a thread that waits there acts on it.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def limit(self, seconds: float | None) -> None:
        """From now on; after that the run is asked as by SIGUSR1."""
        if seconds is not None:
            self._deadline = time.monotonic() + seconds

    def pending(self) -> int:
        """The signal that asks this run to end, or 0."""
        if not self._signal and time.monotonic() >= self._deadline:
            self._signal = int(signal.SIGUSR1)
        return self._signal

    def _listen(self) -> None:
        while numbers := os.read(self._read, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._signal, self._first = self._signal or number, now
        elif now - self._first > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def ignore_stop_requests() -> None:
    """For a process that works for a rank: the rank ends it, not a scheduler that signals the whole job."""
    signal.set_wakeup_fd(-1)  # inherited by a fork: it would speak in the rank's name
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
