"""Pipelines of diffusers with our solvers: a small model of digits is trained, fitted and sampled, in PyTorch.

    python experiments/pipelines.py [--out=docs/diffusers.json]

It needs PyTorch and diffusers, in this Python or in the one that the variable PEER_PYTHON names, and scikit-learn's
digits here. It writes the distances of docs/diffusers.md and prints that page's table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "experiments" / "common" / "pipeline_worker.py"
WAYS = {"plain": "plain", "fitted": "fitted", "levels": "chosen levels", "both": "both"}


def table(distances: Mapping[str, float]) -> str:
    """The distances 'solver|calls|way|precision' as a table in Markdown."""
    rows = dict.fromkeys(tuple(name.split("|")[k] for k in (0, 1, 3)) for name in distances)
    head = ["solver", "calls", "precision", *WAYS.values()]
    lines = [
        [solver, calls, precision, *(f"{distances[f'{solver}|{calls}|{way}|{precision}']:.4f}" for way in WAYS)]
        for solver, calls, precision in rows
    ]
    bars = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in bars)


def main() -> None:
    """Asks the other Python, and writes what it found."""
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "docs" / "diffusers.json"), help="the distances")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder) / "digits.npy"
        np.save(digits, (load_digits().images / 8 - 1).astype(np.float32))  # type: ignore[attr-defined]
        command = [os.environ.get("PEER_PYTHON", sys.executable), str(WORKER), str(digits), out]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    print(table(json.loads(Path(out).read_text(encoding="utf-8"))["distances"]))


if __name__ == "__main__":
    main()
