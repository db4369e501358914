"""One command for a GPU or TPU: are the numbers right there, and how fast is the library beside the device's own limit?

    python benchmarks/device.py [--minutes 15] [--out device.json] [--only matmul --only check] [--small]

It needs JAX with its device, flax, optax and orbax; with PyTorch it also times a compiled TRACT update of the same
network there. `--small` measures tiny networks, to try the command itself on a CPU: about five minutes on two idle
cores, most of which is compiling.

The parts, each in a process of its own (see `_device_parts`):

    matmul     bfloat16 matrix products: the peak, if the device's is not in `PEAKS`
    check      recorded numbers of the authors' programs, and bfloat16 networks beside float32 ones on the CPU
    cifar      updates of a teacher, BTD, TRACT-VP and TRACT-EDM: the 60M U-Net of CIFAR-10, images/s and MFU
    torch      the TRACT-VP update of that network in PyTorch: bfloat16 autocast, torch.compile, channels last
    sampling   DDIM and Heun, and a D-DDIM fit, beside their network calls alone
    adm        the updates with EDM's ADM of ImageNet 64x64
    inception  features per second of FID's network

A part has its share of the time that is left. One that fails or runs out of time loses only what it had not yet
measured. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # runs in a checkout that is not installed

from diffusion_distill.base.whole import write_json  # noqa: E402
from diffusion_distill.report import format_table  # noqa: E402

#: part -> its share of the time
SHARES = {"matmul": 0.3, "check": 4.0, "cifar": 2.2, "torch": 3.0, "sampling": 0.8, "adm": 3.0, "inception": 0.3}
#: What is aimed at: the updates' utilisation, and our speed over PyTorch's.
LEAST_MFU, LEAST_RATIO = 0.4, 1.3

Row = dict[str, Any]


def run_part(part: str, seconds: float, options: argparse.Namespace, peak: float) -> list[Row]:
    """The rows that a part printed in its own process within so many seconds, and its error as another one."""
    command = [sys.executable, str(HERE / "_device_parts.py"), part, f"--peak={peak}", *["--small"] * options.small]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    if options.small:
        environment.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling takes longer than running
    if part == "torch":
        environment["JAX_PLATFORMS"] = "cpu"  # JAX would take the memory
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        out, error = child.communicate(timeout=seconds)
        failed = f"exit status {child.returncode}" if child.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # and what it started
        out, error = child.communicate()
        failed, error = f"stopped after its {seconds:.0f} s", b""
    lines = out.decode(errors="replace").splitlines()
    rows = [{"part": part, **json.loads(line)} for line in lines if line.startswith('{"what"')]
    if failed:
        last = error.decode(errors="replace").strip().splitlines()[-1:]
        rows.append({"part": part, "what": part, "error": ": ".join([failed, *last])[:200]})
    return rows


def measured(options: argparse.Namespace) -> list[Row]:
    """The rows of all parts that are asked for."""
    begun, rows, peak = time.monotonic(), [], 0.0
    left = {part: share for part, share in SHARES.items() if not options.only or part in options.only}
    for part, share in list(left.items()):
        seconds = 60 * options.minutes - (time.monotonic() - begun)
        if not options.small:  # whose parts have other shares
            seconds *= share / sum(left.values())
        del left[part]
        found = run_part(part, max(seconds, 1.0), options, peak)
        peak = next((row["value"] for row in found if row["what"] == "peak"), peak)
        rows += found
        for row in found:
            print(json.dumps(row), flush=True)
    return rows if options.small else [*rows, *goals(rows)]


def goals(rows: list[Row]) -> list[Row]:
    """Whether the goals are met, as far as they were measured."""
    by_name = {(row["part"], row["what"]): row for row in rows if "value" in row}
    found = [
        {"part": part, "what": f"goal: MFU of {what}", "value": row["mfu"], "ok": row["mfu"] >= LEAST_MFU}
        for (part, what), row in by_name.items()
        if part in ("cifar", "adm") and "mfu" in row
    ]
    ours, theirs = by_name.get(("cifar", "TRACT-VP")), by_name.get(("torch", "TRACT-VP"))
    if ours and theirs:
        ratio = ours["value"] / theirs["value"]
        found.append({"part": "torch", "what": "goal: ours / PyTorch", "value": ratio, "ok": ratio >= LEAST_RATIO})
    return found


def table(rows: list[Row]) -> str:
    """The rows for people."""
    words = {True: "yes", False: "NO", None: None}
    shown = [
        {
            **{name: r.get(name) for name in ("part", "what", "value", "unit")},
            **{"MFU": r.get("mfu"), "GB": r.get("memory_gb")},
            **{"ok": words[r.get("ok")], "note": r.get("error", r.get("note"))},
        }
        for r in rows
    ]
    return format_table(shown, ["part", "what", "value", "unit", "MFU", "GB", "ok", "note"])


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="time for all parts together (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--only", action="append", default=[], choices=SHARES, help="only this part; may be repeated")
    parser.add_argument("--small", action="store_true", help="tiny networks")
    options = parser.parse_args()
    rows = measured(options)
    print(table(rows))
    if options.out:
        write_json(options.out, {"small": options.small, "rows": rows})
    return int(any(row["part"] == "check" and row.get("ok") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
