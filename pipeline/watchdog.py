"""Ends a rank that makes no progress, with the stack of each of its threads on standard error.

A collective that hangs is ended by its own time limit; this is for whatever hangs without one: a lock, a file system,
a driver. faulthandler's thread is in C, so it fires while Python's lock is held, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from collections.abc import Iterator

_MARGIN_SECONDS = 5.0  # after the collectives' own limit, whose error says more
_REARM_SECONDS = 1.0  # a new thread each time: not at every step
_PATIENCE_SECONDS = 1800.0


class Watchdog:
    """Fires where two beats lie further apart than the collectives' time limit, and a few seconds."""

    def __init__(self, timeout_seconds: float) -> None:
        self._seconds = timeout_seconds + _MARGIN_SECONDS
        self._armed_at: float | None = None

    def start(self) -> None:
        self._arm(0.0)

    def beat(self) -> None:
        """A sign of progress."""
        if self._armed_at is not None and time.monotonic() - self._armed_at >= _REARM_SECONDS:
            self._arm(0.0)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """While something is under way that is known to take long: compiling, a whole state's copy."""
        if self._armed_at is None:
            yield
            return
        self._arm(_PATIENCE_SECONDS)
        try:
            yield
        finally:
            self._arm(0.0)

    def rest(self) -> None:
        """No longer watched."""
        faulthandler.cancel_dump_traceback_later()
        self._armed_at = None

    def _arm(self, more_seconds: float) -> None:
        self._armed_at = time.monotonic() + more_seconds  # beats within that time change nothing
        faulthandler.dump_traceback_later(self._seconds + more_seconds, exit=True, file=sys.stderr)
