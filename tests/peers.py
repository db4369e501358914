"""Programs of tests that answer by files: they run in a Python with PyTorch or diffusers, perhaps PEER_PYTHON's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import places
import pytest


def answers_of(program: str, library: str, folder: Path) -> dict[str, np.ndarray]:
    """FOLDER/answers.npz of a program in tests/; skips where there is no such library."""
    if "PEER_PYTHON" not in os.environ and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}, here or in the Python that PEER_PYTHON names")
    python, tests = os.environ.get("PEER_PYTHON", sys.executable), places.ROOT / "tests"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(places.ROOT), str(tests)])}
    command = [python, str(tests / program), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "answers.npz") as found:
        return dict(found)
