"""What the papers' runs need of machines: bytes of the state on a device, FLOPs, hours at a stated utilisation.

    python benchmarks/scale.py [--write]

Everything is computed from shapes, nothing is compiled or run; `--write` puts the tables into docs/scale.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs in a checkout that is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from importlib import import_module  # noqa: E402

from jax.sharding import AbstractMesh  # noqa: E402

from diffusion_distill.api.ahead import UTILISATION, Ahead  # noqa: E402
from diffusion_distill.cli import build  # noqa: E402
from diffusion_distill.training.sharding import AXES  # noqa: E402
from diffusion_distill.training.utilisation import GIB, MEMORY, PEAKS, device_bytes  # noqa: E402

#: Config -> the published teacher that it distils; none where it trains one.
RUNS = {
    "cifar10_teacher": "",
    "cifar10_tract": "cifar_original",
    "cifar10_btd": "cifar_original",
    "imagenet64_tract": "imagenet_original",
    "imagenet64_btd": "imagenet_original",
    "imagenet64_edm_tract": "edm-imagenet-64x64-cond-adm",
    "lsun128_btd": "bedroom_original",
}
#: Machine -> JAX's name of its devices, and how many it has. A v5p-8 has four chips: Google counts their two cores.
MACHINES = {
    "v5e-8": ("TPU v5 lite", 8),
    "v5e-16": ("TPU v5 lite", 16),
    "v5p-8": ("TPU v5p", 4),
    "one H100": ("NVIDIA H100 80GB HBM3", 1),
    "eight H100": ("NVIDIA H100 80GB HBM3", 8),
}
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- written by benchmarks/scale.py -->", "<!-- end of what is written -->"


def run(config: str, teacher: str) -> Ahead:
    """A config's run before it begins."""
    sys.path.insert(0, str(ROOT / "configs"))
    found = import_module(config).get_config()
    found.teacher = teacher
    return build.ahead(found, "")


def rows(config: str, ahead: Ahead) -> list[str]:
    """The table's rows of a run: one for each machine."""
    flops, lines = ahead.flops(), []
    for machine, (kind, count) in MACHINES.items():
        shared = [device_bytes(ahead.state, AbstractMesh(sizes, AXES)) for sizes in ((count, 1), (1, count))]
        hours = flops / (UTILISATION * PEAKS[kind] * count) / 3600
        parts = f"{shared[0] / GIB:.2f}", f"{shared[1] / GIB:.2f}", f"{MEMORY[kind] / GIB:.0f}", f"{hours:,.0f}"
        lines.append(f"| `{config}` | {machine} | {' | '.join(parts)} |")
    return lines


def tables() -> str:
    """Both tables: the runs, and what they need of each machine."""
    runs = ["| config | parameters | batch | images | FLOPs of an image |", "| --- | --- | --- | --- | --- |"]
    machines = [
        "| config | machine | state, GiB of a device | shared by all devices | memory, GiB | hours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for config, teacher in RUNS.items():
        ahead = run(config, teacher)
        images = sum(phase.updates for phase in ahead.phases) * ahead.settings.batch_size
        facts: list[Any] = [f"{ahead.parameters / 1e6:.1f}M", ahead.settings.batch_size, f"{images / 1e6:,.0f}M"]
        runs.append(f"| `{config}` | {' | '.join(map(str, facts))} | {ahead.flops() / images:.3g} |")
        machines += rows(config, ahead)
        print(runs[-1], *machines[-len(MACHINES) :], sep="\n", flush=True)
    return "\n".join([*runs, "", *machines])


def main() -> None:
    """Prints, and writes the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    written = parser.parse_args().write
    text = tables()
    if written:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
