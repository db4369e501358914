"""Freed memory stays with the process: the system clears no page twice."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from diffusion_distill.base.heap import keep_freed_memory

PROGRAM = """
import resource
import numpy as np
from diffusion_distill.base.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(2**26, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = min(faults() for _ in range(3))
assert keep_freed_memory()
first, kept = faults(), min(faults() for _ in range(3))
print(given_back, first, kept)
"""


def test_freed_memory_is_kept() -> None:
    if not keep_freed_memory():
        pytest.skip("this system's allocator has no such setting")
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    given_back, first, kept = map(int, done.stdout.split())
    assert kept < 10 < min(given_back, first)
