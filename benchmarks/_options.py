"""The command line that benchmarks share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def parser_of(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options --devices, --rounds and --out, and the benchmark's docstring as its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="devices to split a CPU into")
    parser.add_argument("--rounds", type=int, default=rounds, help="how often all take their turn (%(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file of the verdicts")
    return parser
