"""Runs small programs from users' reports and from attacks, and says which of them still find something wrong.

    python tests/programs.py DIR [DIR ...]

A program is a Python file that exits with 0 if all is right. Programs that were written for older versions of this
library are run with the names of today: `RENAMED` says which names have changed, and is the list to read when a program
of your own stops after an update. Only names are changed, never what a program expects.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Names of older versions, as patterns, and what they are called now.
RENAMED = {
    r"\bimage_shape\b": "shape",
    r'"image"': '"x"',
    r'"label"': '"cond"',
    r"import diffusion_distill\.runs\b": "import diffusion_distill.api",
    r"from diffusion_distill import weights, runs": "from diffusion_distill import weights, api as runs",
    r"from diffusion_distill import build, main": "from diffusion_distill.cli import build, modes as main",
    r"from diffusion_distill import build\b": "from diffusion_distill.cli import build",
    r"\bmain\.runs\b": "main.api",
    r"diffusion_distill\.runs\.images_out": "diffusion_distill.data.image_writer",
    r"diffusion_distill\.runs\.evaluation\b": "diffusion_distill.api.features",
    r"diffusion_distill\.metrics\b": "diffusion_distill.evaluation",
    r"diffusion_distill\.levels\b": "diffusion_distill.process.levels",
    r"diffusion_distill\.weights import torch_save": "diffusion_distill.formats import torch_save",
}


def renamed(source: str) -> str:
    """A program with the names of today."""
    for old, new in RENAMED.items():
        source = re.sub(old, new, source)
    return source


def outcome(program: Path, seconds: float = 300) -> tuple[int, str]:
    """(exit status, last line) of a program; 124 if it ran too long."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / program.name
        path.write_text(renamed(program.read_text(encoding="utf-8")), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, path], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return 124, f"still running after {seconds:g} s"
    said = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode, said[-1] if said else ""


def main(folders: list[str]) -> int:
    """Runs every program of the folders; exit status 0 if all are right."""
    programs = [path for folder in folders for path in sorted(Path(folder).glob("*.py"))]
    if not programs:
        sys.exit(f"No programs in {', '.join(folders) or 'no folder'}. Give folders with Python files.")
    wrong = 0
    for program in programs:
        status, last = outcome(program)
        wrong += status != 0
        print(
            f"{'right' if status == 0 else 'WRONG'} {program.name}{'' if status == 0 else ': ' + last[:200]}",
            flush=True,
        )
    print(f"{len(programs) - wrong} right, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
