"""Whether one checkout is slower than another: both run in turn on this machine.

    python benchmarks/compare.py OLD NEW [--net demo] [--method Tract] [--rounds 4] [--starts 3]

OLD and NEW are folders that hold a diffusion_distill/. The updates are those of `steps.py`. A change is called slower
or faster where the medians differ by more than the wider of the two spreads (between quartiles) allows: half of it.
Both are started several times, since one start of the same program can stay a tenth slower than another.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from _nets import NETS
from _rounds import Times, in_turn
from steps import METHODS, command_of


def verdict(old: Times, new: Times) -> str:
    """In words, with the ratio of the medians."""
    change = new.median / old.median
    doubt = max((high - low) / 2 for low, high in (old.spread, new.spread)) / old.median
    word = "slower" if change > 1 + doubt else "faster" if change < 1 - doubt else "no difference beyond the spread"
    return f"new / old {change:.3f}, in doubt by {doubt:.3f}: {word}"


def main() -> None:
    """Compares two checkouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--net", choices=NETS, default="demo")
    parser.add_argument("--method", choices=METHODS, default="Tract")
    parser.add_argument("--devices", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--starts", type=int, default=3, help="how often both are started anew")
    options = parser.parse_args()
    folders = {"old": options.old, "new": options.new}
    for folder in folders.values():
        if not (folder / "diffusion_distill").is_dir():
            parser.error(f"{folder} holds no diffusion_distill/")
    command = command_of(options.net, options.method, options.devices)
    variables = {name: {"PYTHONPATH": str(folder.resolve())} for name, folder in folders.items()}
    found: dict[str, Times] = {}
    for _ in range(options.starts):
        for name, times in in_turn(dict.fromkeys(folders, command), options.rounds, variables=variables).items():
            found[name] = Times([*(found[name].seconds if name in found else ()), *times.seconds])
    for name, times in found.items():
        print(f"{name}  {times}  {folders[name]}")
    if len(found) == 2:
        print(verdict(found["old"], found["new"]))


if __name__ == "__main__":
    main()
