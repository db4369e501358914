"""The tools that read the sources see all of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from places import ROOT


def tracked_sources() -> set[Path]:
    """The Python files that git knows of."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {Path(name) for name in listed.stdout.split("\0") if name}
    assert Path("diffusion_distill/api/evaluation.py") in found
    return found


@pytest.mark.fast
def test_ruff_leaves_no_file_out() -> None:
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert not tracked_sources() - {Path(line).relative_to(ROOT) for line in shown}


@pytest.mark.fast
def test_pyright_leaves_no_file_out() -> None:
    included = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]["include"]
    assert not [path for path in tracked_sources() if path.parts[0] not in included]
