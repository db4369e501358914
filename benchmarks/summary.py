"""Runs the benchmarks of a CPU one after the other and prints one summary, a verdict per line.

    python benchmarks/summary.py [--only steps --only growth] [--quick] [--no-run] [--write] [--out runs/bench]

What a benchmark prints is shown as it runs; its verdicts are written to OUT/NAME.json. `--write` also writes them, with
the machine and the date, to docs/performance.json, and from this file the tables between two comments of
docs/performance.md; benchmarks that were not run keep what is there. `--quick` only shows that all works: small
networks and few rounds, whose figures mean nothing. A peer that is not installed is left out, and so said.
The exit status is 1 if a benchmark failed; a goal that is not met is no failure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _verdicts import Verdict, from_record, read, shown

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # runs in a checkout that is not installed

from diffusion_distill.base.whole import write_json  # noqa: E402
from diffusion_distill.report import format_table  # noqa: E402

DOCS = HERE.parent / "docs"
RECORD, PAGE, PICTURE = DOCS / "performance.json", DOCS / "performance.md", DOCS / "growth.png"
BEGIN, END = "<!-- written by benchmarks/summary.py -->", "<!-- end of what is written -->"

#: benchmark -> what makes it quick
BENCHMARKS: dict[str, list[str]] = {
    "steps": ["--net=demo", "--rounds=2"],
    "networks": ["--net=demo", "--rounds=2"],
    "input": ["--net=demo", "--rounds=2"],
    "sampling": ["--solver=ddim", "--rounds=2"],
    "dode": ["--solver=ddim", "--steps=2", "--scale=2", "--rounds=2"],
    "evaluation": ["--batch=2", "--width=256", "--rounds=2"],
    "growth": ["--quick", "--rounds=2"],
}
COLUMNS = ("question", "ours", "other", "ratio", "goal", "verdict")
Found = dict[str, list[Verdict]]


def run(name: str, out: Path, quick: bool) -> list[Verdict]:
    """Runs a benchmark and returns its verdicts, none if it failed."""
    file = out / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"{name}.py"), f"--out={file}", *(BENCHMARKS[name] if quick else [])]
    if name == "growth":
        command.append(f"--picture={out / PICTURE.name}")
    print(f"== {name}", flush=True)
    begun = time.monotonic()
    failed = subprocess.run(command, check=False).returncode
    write_json(machine_file(out, name), machine())
    print(f"== {name}: {'FAILED after ' if failed else ''}{time.monotonic() - begun:.0f} s\n", flush=True)
    return [] if failed else read(file)


def machine_file(out: Path, name: str) -> Path:
    """Where it is written which machine a benchmark ran on: beside its verdicts."""
    return out / f"{name}.machine.json"


def machine() -> dict[str, Any]:
    """Where and when figures were measured, asked as soon as they are."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "devices": os.cpu_count(),
        "python": platform.python_version(),
        "jaxlib": version("jaxlib"),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def cpu_name() -> str:
    """The CPU's name for people, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def rows(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    """The cells of `COLUMNS`."""
    return [
        {
            "question": v.question,
            "ours": f"{shown(v.ours)} {v.unit}",
            "other": f"{shown(v.other)} {v.unit}" if v.other else "",
            "ratio": v.ratio_shown,
            "goal": f"{v.goal:.2f}",
            "verdict": v.word,
        }
        for v in verdicts
    ]


def summary(found: Found) -> str:
    """All verdicts, a line each, and how many goals are met."""
    lines = [{"benchmark": name, **row} for name, verdicts in found.items() for row in rows(verdicts)]
    every = [verdict for verdicts in found.values() for verdict in verdicts]
    met = sum(verdict.met is True for verdict in every)
    left_out = sum(verdict.met is None for verdict in every)
    return f"{format_table(lines)}\n\n{met} of {len(every)} goals met, {left_out} without their peer."


def record_of(found: Found, machines: Mapping[str, Mapping], old: Mapping[str, Any]) -> dict[str, Any]:
    """What docs/performance.json holds: benchmark -> {machine, verdicts}; the old where there is nothing new."""
    verdicts = {name: [asdict(v) for v in vs] for name, vs in found.items() if vs}
    new = {name: {"machine": dict(machines[name]), "verdicts": vs} for name, vs in verdicts.items()}
    together = {**old, **new}
    return {name: together[name] for name in BENCHMARKS if name in together}


def tables(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    parts = []
    for name, entry in record.items():
        about, verdicts = entry["machine"], map(from_record, entry["verdicts"])
        cells = [[row[column] for column in COLUMNS] for row in rows(list(verdicts))]
        lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
        where = f"{about['cpu']}, {about['devices']} cores and devices, jaxlib {about['jaxlib']}, {about['date']}"
        where += f", load {about['load']}" if about["load"] else ""
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**`benchmarks/{name}.py`** ({where})\n\n{table}")
    return "\n\n".join(parts)


def with_tables(page: str, record: Mapping[str, Any]) -> str:
    """The page with the record's tables between its two comments."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"The page has no comments {BEGIN!r} and {END!r} to write between.")
    return f"{before}{BEGIN}\n\n{tables(record)}\n\n{END}{after}"


def write(found: Found, out: Path) -> None:
    """Writes the record, the page and the picture of the growth, from what lies in a folder."""
    old = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    machines = {name: json.loads(machine_file(out, name).read_text()) for name in found if found[name]}
    record = record_of(found, machines, old)
    write_json(RECORD, record)
    PAGE.write_text(with_tables(PAGE.read_text(), record))
    if found.get("growth"):
        PICTURE.write_bytes((out / PICTURE.name).read_bytes())


def main() -> int:
    """Runs the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="this benchmark; may be repeated")
    parser.add_argument("--quick", action="store_true", help="only show that all works")
    parser.add_argument("--no-run", action="store_true", help="run nothing; take the files that lie in OUT")
    parser.add_argument("--write", action="store_true", help="write docs/performance.json and the tables from it")
    parser.add_argument("--out", type=Path, help="folder (runs/bench; of a quick run runs/bench/quick)")
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--quick measures nothing that could be written; leave out one of --quick and --write.")
    out = options.out or Path("runs/bench/quick" if options.quick else "runs/bench")
    out.mkdir(parents=True, exist_ok=True)
    names = options.only or list(BENCHMARKS)
    if options.no_run:
        found = {name: read(file) for name in names if (file := out / f"{name}.json").exists()}
    else:
        found = {name: run(name, out, options.quick) for name in names}
    if any(found.values()):
        print(summary(found))
    if options.write:
        write(found, out)
    failed = [name for name, verdicts in found.items() if not verdicts]
    if failed:
        print(f"Failed: {', '.join(failed)}.")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
