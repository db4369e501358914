"""The part of `device.py` that looks whether the numbers are right on a device."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _device_common import guarded, random_params

from diffusion_distill import ADM, DiT, Model, SongUNet, UNet
from diffusion_distill.api import table_for
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers import engine

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"

#: Quantity -> largest relative error in each type, from the CPU's float32.
BOUNDS = {
    "output": {"float32": 1e-4, "bfloat16": 2e-2},
    "gradient": {"float32": 1e-3, "bfloat16": 5e-2},
    "samples": {"float32": 1e-4, "bfloat16": 5e-2},
}


def check(options: argparse.Namespace) -> None:
    """Recorded numbers in float32, and networks here beside float32 on the CPU, which another process computes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wanted.npz"
        command = [sys.executable, str(HERE / "_device_parts.py"), "wanted", f"--file={file}"]
        command += ["--small"] * options.small
        other = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
        try:
            guarded("recorded numbers, float32", recorded)
            other.wait()
            with np.load(file) as wanted:
                for name, (work, bounds) in quantities(options.small).items():
                    for kind, bound in bounds.items():
                        compare = lambda work=work, kind=kind: relative(work(kind), wanted[name])  # noqa: E731
                        guarded(f"{name}, {kind}", lambda c=compare, bound=bound: within(c(), bound))
        finally:
            other.kill()


def write_wanted(options: argparse.Namespace) -> None:
    """All quantities of `check` in float32, into the file."""
    wanted: dict[str, Any] = {name: work("float32") for name, (work, _) in quantities(options.small).items()}
    np.savez(options.file, **wanted)


def within(error: float, bound: float) -> dict[str, Any]:
    """A row of a check."""
    return {"value": error, "unit": "relative error", "ok": bool(error <= bound), "note": f"at most {bound:g}"}


def recorded() -> dict[str, Any]:
    """The golden checks of networks, losses, targets and samplers whose files are in the checkout."""
    sys.path.insert(0, str(TESTS))
    golden_check: Any = importlib.import_module("golden_check")
    common: Any = importlib.import_module("golden_checks.common")
    modules = [importlib.import_module(f"golden_checks.{name}") for name in ("btd", "tract")]
    known = [kind for module in modules for kind in module.KINDS if common.FLOAT32 in kind.modes]
    golden_check.kinds = lambda: [dataclasses.replace(kind, modes=(common.FLOAT32,)) for kind in known]
    patterns = ["btd/unet/*", "btd/samplers.npz", "tract/tract_vp_16_1_both.npz", "tract/sampler_*"]
    found = golden_check.check(TESTS / "golden", only=patterns).lines
    lines = [line for line in found if line.verdict in ("PASS", "FAIL") and line.text.startswith("float32")]
    worst = max(lines, key=lambda line: line.share)
    failed = [line for line in lines if line.verdict != "PASS"]
    note = f"{len(failed)} of {len(lines)} beyond their tolerance; worst {worst.file} {worst.array}"
    return {"value": worst.share, "unit": "error / tolerance", "ok": bool(lines) and not failed, "note": note}


def small_networks(few: bool) -> dict[str, Any]:
    """Small networks of every kind, with heads that cuDNN's attention takes; or a U-Net and a transformer alone."""
    sizes: dict[str, Any] = dict(ch=64, emb_ch=64, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,))
    found: dict[str, Any] = {
        "U-Net": UNet(**sizes, head_dim=64),
        "DiT": DiT(width=128, depth=2, num_heads=2, out_ch=3),
    }
    if not few:
        found["ADM"] = UNet(**sizes, **ADM)
        found["NCSN++"] = SongUNet(**sizes, encoder="residual", embedding="fourier", resample_filter=(1, 3, 3, 1))
    return found


def quantities(few: bool) -> dict[str, tuple[Callable[[str], np.ndarray], dict[str, float]]]:
    """Name -> (what computes it in a type, {type: largest relative error})."""
    found: dict[str, tuple[Callable[[str], np.ndarray], dict[str, float]]] = {}
    for name, network in small_networks(few).items():
        for what, bounds in BOUNDS.items():
            found[f"{name}: {what}"] = partial(computed, network, what), bounds
    return found


def computed(network: Any, what: str, kind: str) -> np.ndarray:
    """A network's quantity in a type as one array, its float32 products in full precision."""
    model, angles = (
        Model(network.clone(dtype=kind), (16, 16, 3), prediction="v"),
        np.asarray([0.2, 0.6, 1.0, 1.4], np.float32),
    )
    level, table = Level(np.cos(angles), np.sin(angles)), table_for(model, 4)
    raw = lambda p, z: model.denoiser(p).raw(z, level)  # noqa: E731
    functions = {
        "output": raw,
        "gradient": jax.grad(lambda p, z: jnp.mean(raw(p, z) ** 2)),
        "samples": lambda p, z: engine.integrate(model.denoiser(p), table, z),
    }
    z = np.random.default_rng(1).standard_normal((4, *model.shape), np.float32)
    with jax.default_matmul_precision("highest"):
        leaves = jax.tree.leaves(jax.jit(functions[what])(random_params(model), z))
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves])


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """The size of the difference over the size of what is wanted."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
