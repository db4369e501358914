"""Prefetch: batches, and what is made of them, computed ahead of their use in background threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from diffusion_distill.base.errors import positive_int
from diffusion_distill.data.pipeline import Batches

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def prefetch(
    batches: Batches, start: int, stop: int, *, depth: int = 2, threads: int = 1
) -> Generator[dict[str, np.ndarray], None, None]:
    """`batches.at(step)` for every step of range(start, stop), computed up to `depth` batches ahead.

    Because a batch depends on its step alone, the result is the same for every depth and number of threads, and
    nothing has to be saved to resume. An error in `at` is raised when the loop reaches its step. If the loop may
    end early, use `with contextlib.closing(prefetch(...)) as stream:`, which waits for the batches being computed,
    drops the others and ends the threads. Deleting the last reference to the stream does the same.

    Args:
        depth: number of batches that wait or are being computed, beside the one in use.
        threads: number of threads that compute batches; more than one helps if batches take longer than training steps.

    Raises:
        ValueError: depth or threads below 1, or start > stop.
    """
    positive_int("depth", depth)
    positive_int("threads", threads)
    if not 0 <= start <= stop:
        raise ValueError(f"start is {start} and stop {stop}; need 0 <= start <= stop.")
    return ahead(batches.at, range(start, stop), depth=depth, threads=threads)


def ahead(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], *, depth: int = 2, threads: int = 1
) -> Generator[Result, None, None]:
    """function(argument) for every argument, in order, computed up to `depth` ahead as `prefetch` does."""
    pool = ThreadPoolExecutor(threads, "prefetch")  # starts no thread before the first submit
    waiting: deque[Future[Result]] = deque()
    try:
        for argument in arguments:
            waiting.append(pool.submit(function, argument))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
