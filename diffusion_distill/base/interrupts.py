"""Orderly stops: SIGTERM (preemption) and Ctrl-C leave a request that long loops check for.

`listen` installs the handlers (the command line does; a library should not), `check` raises `Interrupted` at a
place where the caller can save what it has. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

#: Exit status of a program that stopped because of SIGTERM: schedulers then know that it is not done.
EXIT_STATUS = 128 + signal.SIGTERM

_request: str | None = None


class Interrupted(Exception):
    """Raised when the program was asked to stop; functions that it passes through save their work first."""


def listen() -> None:
    """From now on SIGTERM and Ctrl-C ask to stop instead of killing."""
    forget()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ask)


def request(reason: str) -> None:
    """Asks all loops to stop."""
    global _request
    _request = reason


def forget() -> None:
    """Withdraws a request."""
    global _request
    _request = None


def check() -> None:
    """Raises Interrupted if the program was asked to stop."""
    if _request:
        raise Interrupted(_request)


def _ask(number: int, frame: FrameType | None) -> None:
    if _request and number == signal.SIGINT:
        raise KeyboardInterrupt
    request(signal.Signals(number).name)
    print(f"{_request}: stopping at the next safe place; Ctrl-C stops at once.", file=sys.stderr, flush=True)
