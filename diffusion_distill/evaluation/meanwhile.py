"""Work on the host that goes on in a thread while the devices compute what comes next."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Meanwhile:
    """A function whose calls return at once and run in a thread, one after another.

        with Meanwhile(part.add) as add:
            for images in drawn:
                add(features(images))

    At most one call is under way, so that at most one call's arguments are held: the next call waits for it, and so
    does the end of the block. An error of a call is raised by whatever waits for it. NumPy's products of matrices,
    copies and sums let other threads run, so statistics cost little time where a device computes.

    Args:
      function: is called in the thread; nobody else may touch what it changes before `wait`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._pool = function, ThreadPoolExecutor(1, "meanwhile")
        self._running: Future[Any] | None = None

    def __call__(self, *arguments: Any) -> None:
        """Calls the function in the thread, after the call before has ended."""
        self.wait()
        self._running = self._pool.submit(self._function, *arguments)

    def wait(self) -> None:
        """Returns when nothing is under way any more."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> Meanwhile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()
