"""Freed memory stays with the process: the system clears no page twice."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_distill.base.heap import _addresses_are_limited

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
assert keep_freed_memory()  # once more changes nothing
first, kept = faults(), min(faults() for _ in range(3))
large = any(line.startswith("VmFlags") and " hg" in line for line in open("/proc/self/smaps"))
print(given_back, first, kept, int(large))
"""


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**35, resource.getrlimit(resource.RLIMIT_AS)[1]))\n"


@pytest.mark.parametrize("limited", [False, True])
def test_freed_memory_is_kept_in_large_pages_unless_addresses_are_limited(limited: bool) -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("this system's allocator has no such setting")
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    command = [sys.executable, "-c", LIMIT * limited + PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    given_back, first, kept, large = map(int, done.stdout.split())
    assert kept < 10 < min(given_back, first)
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").is_file():
        assert large == (not (limited or _addresses_are_limited()))
