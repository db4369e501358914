"""Compiles the library's functions for TPUs that are not there: seconds, bytes of a device, FLOPs, XLA's estimate.

    python benchmarks/tpu.py [--net small] [--chip v5e:2x4] [--what TRACT-VP --what DDIM] [--out tpu.json]

The real compiler of TPUs runs on the CPU; it is in libtpu, which the extra [tpu-compile] installs. Nothing is run. A
program that does not fit into the memory of the chips is an error of the compiler's.

`--net small` is a tiny network; `cifar` the 60M U-Net of CIFAR-10 with a batch of 256 and `adm` EDM's network of
ImageNet 64x64 with a batch of 64, both in bfloat16. An update of these takes the compiler some 10 minutes of a core.
XLA's estimate is left out if it is below what the counted FLOPs take at the peak of the chip.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # runs in a checkout that is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
from _programs import CASES, PROGRAMS, Case, mesh_of  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from diffusion_distill.base.whole import write_json  # noqa: E402
from diffusion_distill.report import format_table  # noqa: E402
from diffusion_distill.training.utilisation import PEAKS  # noqa: E402

Row = dict[str, Any]
COLUMNS = [
    "what",
    "lower s",
    "compile s",
    "core s",
    "argument MB",
    "temporary MB",
    "output MB",
    "GFLOP",
    "XLA ms",
    "error",
]


def compiled(what: str, case: Case, mesh: Mesh) -> Row:
    """The figures of a program; bytes and FLOPs are those of one device."""
    program, begun = PROGRAMS[what](case, mesh), time.perf_counter()
    lowered = program.lower()
    made, used = time.perf_counter(), time.process_time()
    found = lowered.compile()
    ended, memory, cost = time.perf_counter(), found.memory_analysis(), found.cost_analysis()
    assert memory is not None
    flops, estimate = program.flops() / mesh.size, float((cost or {}).get("optimal_seconds", 0.0))
    return {
        "lower_seconds": made - begun,
        "compile_seconds": ended - made,
        "compile_cpu_seconds": time.process_time() - used,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "flops": flops,
        "xla_seconds": estimate if is_sane(estimate, flops, mesh) else None,
        "xla_seconds_given": estimate,
    }


def is_sane(seconds: float, flops: float, mesh: Mesh) -> bool:
    """Whether so many FLOPs can be done in this time."""
    return seconds > 0 and seconds >= flops / PEAKS[mesh.devices.flat[0].device_kind]


def row(what: str, case: Case, mesh: Mesh) -> Row:
    """`compiled`, or the first line of the error."""
    try:
        return {"what": what, **compiled(what, case, mesh)}
    except Exception as error:
        return {"what": what, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]}


def shown(row: Row) -> Row:
    """A row for people."""
    if "error" in row:
        return dict.fromkeys(COLUMNS) | row
    estimate = row["xla_seconds"]
    return dict.fromkeys(COLUMNS) | {
        "what": row["what"],
        "lower s": round(row["lower_seconds"], 1),
        "compile s": round(row["compile_seconds"], 1),
        "core s": round(row["compile_cpu_seconds"], 1),
        **{f"{part} MB": row[f"{part}_bytes"] / 1e6 for part in ("argument", "temporary", "output")},
        "GFLOP": row["flops"] / 1e9,
        "XLA ms": None if estimate is None else 1e3 * estimate,
    }


def main() -> int:
    """Compiles and prints; the exit status is 1 if a program could not be compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=CASES, default="small", help="the network (%(default)s)")
    parser.add_argument("--chip", default="v5e:2x4", help="kind and arrangement, such as v6e:2x4 (%(default)s)")
    parser.add_argument("--what", action="append", choices=PROGRAMS, help="only this function; may be repeated")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # such programs can be written there, but not read
    case, mesh, rows = CASES[options.net](), mesh_of(options.chip), []
    for what in options.what or PROGRAMS:
        rows.append(row(what, case, mesh))
        print(rows[-1], flush=True)
        if options.out:
            write_json(options.out, {"net": options.net, "chip": options.chip, "batch": case.batch, "rows": rows})
    print(format_table([shown(row) for row in rows], COLUMNS))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
