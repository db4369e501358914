"""The parts of `device.py`, each run in a process of its own: it prints one JSON object per figure.

    python benchmarks/_device_parts.py PART [--peak FLOP/S] [--small]

What one figure cannot be measured does not keep the others from being.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import _device_common
import jax
import jax.numpy as jnp
import numpy as np
from _device_checks import check, write_wanted
from _device_common import guarded, peak_memory, random_like, random_params, seconds_of, show
from _updates import update_of

from diffusion_distill import ADM, VE, Cosine, EDMInput, LogsnrInput, Model, UNet
from diffusion_distill.api import grid_for, table_for
from diffusion_distill.methods import Denoising, Progressive, Tract
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers import ddim, dode, engine, tabulate
from diffusion_distill.solvers.pairing import nested
from diffusion_distill.training import utilisation
from diffusion_distill.training.sharding import data_mesh, replicated
from diffusion_distill.weights import PUBLISHED

Options = argparse.Namespace


# ---------------------------------------------------------------- networks


def cifar(small: bool) -> tuple[UNet, tuple[int, ...], int]:
    """BTD's and TRACT's U-Net of CIFAR-10, its images and the batch; it predicts v, as the one in PyTorch."""
    if small:
        sizes: dict[str, Any] = dict(ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_heads=1)
        return UNet(ch=32, emb_ch=32, out_ch=3, **sizes, resblock_resample=True, dtype="bfloat16"), (4, 4, 3), 8
    model = PUBLISHED["cifar_original"].model
    return model.network.clone(dtype="bfloat16"), model.shape, 256


def adm(small: bool) -> tuple[UNet, tuple[int, ...], int]:
    """EDM's ADM of ImageNet 64x64."""
    if small:
        sizes: dict[str, Any] = dict(ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_classes=10)
        return UNet(ch=64, emb_ch=32, out_ch=3, **sizes, dtype="bfloat16", **ADM), (4, 4, 3), 8
    model = PUBLISHED["edm-imagenet-64x64-cond-adm"].model
    return model.network.clone(dtype="bfloat16", label_dropout=0.0, dropout=0.0), model.shape, 64


def vp_of(network: UNet, shape: tuple[int, ...]) -> Model:
    """The network as a variance-preserving model that predicts v."""
    return Model(network, shape, Cosine(-20.0, 20.0), "v", LogsnrInput())


def edm_of(network: UNet, shape: tuple[int, ...]) -> Model:
    """The network as EDM's."""
    return Model(network, shape, VE(), "edm", EDMInput())


# ---------------------------------------------------------------- parts


def matmul(options: Options) -> None:
    """bfloat16 products of random square matrices on the first device."""
    size = 1024 if options.small else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    rate = 2 * size**3 / seconds_of(lambda: product(a, a))
    named = utilisation.named_peak() / jax.device_count()
    device = jax.devices()[0]
    note = f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}"
    show(
        "product",
        value=rate / 1e12,
        unit="TFLOP/s",
        note=f"{size} x {size}",
        **({"mfu": rate / named} if named else {}),
    )
    show("peak", value=named or rate, unit="FLOP/s", note=note + ("" if named else "; measured"))


def updates(network: UNet, shape: tuple[int, ...], batch: int, peak: float) -> None:
    """Updates of every method, in images/s and MFU; their programs are compiled at the same time."""
    vp, edm = vp_of(network, shape), edm_of(network, shape)
    runs: dict[str, tuple[Model, Any]] = {
        "TRACT-VP": (vp, Tract((1024, 32), length="1M")),
        "teacher": (vp, Denoising()),
        "BTD": (vp, Progressive(64, 32, phase_length=batch)),
        "TRACT-EDM": (edm, Tract.edm((40, 1), length="1M")),
    }
    params = random_params(vp)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    with ThreadPoolExecutor(len(runs)) as pool:
        waiting = {}
        for name, (model, method) in runs.items():
            begin, step, others = update_of(model, method, batch)
            compiled = pool.submit(lambda b=begin, s=step, o=others: s.lower(jax.eval_shape(b, params), *o).compile())
            waiting[name] = model, method, partial(begin, params), others, compiled
        wait([compiled for *_, compiled in waiting.values()])  # compiling tries kernels on the device
        for name, (model, method, begin, others, compiled) in waiting.items():
            note = f"batch {batch}, {count / 1e6:.1f}M parameters"
            guarded(name, lambda m=model, s=method, b=begin, o=others, c=compiled, n=note: {
                **timed_update(m, s, b, o, c.result(), peak), "note": n,
            })  # fmt: skip


def timed_update(
    model: Model, method: Any, begin: Callable[[], Any], others: tuple[Any, ...], compiled: Any, peak: float
) -> dict[str, Any]:
    """The row of a method."""
    teacher = None if isinstance(method, Denoising) else model
    data, inputs, _ = others
    state = jax.device_put(begin(), replicated(data_mesh()))
    flops = utilisation.update_flops(method.losses, model, teacher, state, inputs.rows)

    def advance() -> Any:
        nonlocal state
        state, metrics = compiled(state, *others)
        return metrics["loss"]

    rate = len(data["x"]) / seconds_of(advance)
    mfu = {"mfu": flops * rate / (peak * jax.device_count())} if peak else {}
    return {"value": rate, "unit": "images/s", **mfu, "memory_gb": peak_memory()}


def torch(options: Options) -> None:
    """The TRACT-VP update in PyTorch."""
    guarded("TRACT-VP", lambda: torch_update(*cifar(options.small), options))


def torch_update(network: UNet, shape: tuple[int, ...], batch: int, options: Options) -> dict[str, Any]:
    """The row of PyTorch's update.

    Raises:
      ImportError: torch is not installed.
    """
    import torch as library  # type: ignore[import-not-found]
    from _torch_peer import Tract as Peer
    from _torch_peer import UNet as PeerUNet

    device = "cuda" if library.cuda.is_available() else "cpu"
    library.backends.cudnn.benchmark = True
    names = ("ch", "emb_ch", "out_ch", "ch_mult", "num_res_blocks", "attn_resolutions", "num_heads")
    make = lambda: PeerUNet(shape[-1], size=shape[0], **{name: getattr(network, name) for name in names})  # noqa: E731
    model = vp_of(network, shape)
    rows = Tract((1024, 32), length="1M").phases(model, batch)[0].inputs
    levels = {f"{part}_{at}": getattr(getattr(rows, at), part) for part in ("alpha", "sigma") for at in "tm"}
    times = {f"time_{at}": np.asarray(model.time_input.time(getattr(rows, at), model.process)) for at in "tm"}
    others = {name: getattr(rows, name) for name in ("r", "d", "first", "second")}
    step = Peer(make, {**levels, **times, **others}, compiled=True, dtype=library.bfloat16, device=device)
    x = library.rand((batch, shape[-1], *shape[:2]), device=device).mul(2).sub(1)
    x = x.to(memory_format=library.channels_last)
    rate = batch / seconds_of(lambda: step(x), wait=lambda loss: float(loss))
    on_gpu = device == "cuda"
    memory = round(library.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else None
    mfu = (
        {"mfu": 5 * utilisation.forward_flops(model, random_params(model)) * rate / options.peak}
        if options.peak
        else {}
    )
    note = f"batch {batch}, torch {library.__version__}, compiled, bfloat16"
    return {"value": rate, "unit": "images/s", **mfu, "memory_gb": memory, "note": note}


def sampling(options: Options) -> None:
    """Samplers and a fit with the network of CIFAR-10, beside as many calls of the network alone."""
    network, shape, batch = cifar(options.small)
    model = vp_of(network, shape)
    denoise = jax.device_put(model.denoiser(random_params(model)))
    start = jax.device_put(np.random.default_rng(3).standard_normal((batch, *shape), np.float32))
    level = jax.device_put(Level(*(np.full(batch, a, np.float32) for a in (0.6, 0.8))))
    call = jax.jit(lambda denoise, z: denoise(z, level))

    def alone(calls: int) -> float:
        """Seconds of so many network calls, each of the result of the one before."""

        def work() -> Any:
            z = start
            for _ in range(calls):
                z = call(denoise, z)
            return z

        return seconds_of(work)

    def drawn(solver: str, steps: int) -> dict[str, Any]:
        table = table_for(model, steps, solver)
        whole, bare = seconds_of(lambda: engine.integrate(denoise, table, start)), alone(table.nfe)
        flops = utilisation.forward_flops(model, denoise.params) * table.nfe * batch
        mfu = {"mfu": flops / whole / options.peak} if options.peak else {}
        note = f"{table.nfe} calls of {batch} images, {whole / bare:.3f} of the calls alone"
        return {"value": batch / whole, "unit": "images/s", **mfu, "note": note}

    def fitted(steps: int, scale: int) -> dict[str, Any]:
        student = tabulate("ddim", grid_for(model, steps))
        teacher = nested(student, model.process, scale, ddim)
        whole = seconds_of(lambda: dode.fit(denoise, student, teacher, start))
        bare = alone((scale + 1) * steps)
        note = f"{(scale + 1) * steps} calls of {batch} images, {whole / bare:.3f} of the calls alone"
        return {"value": whole, "unit": "s", "note": note}

    guarded("DDIM, 10 steps", lambda: drawn("ddim", 10))
    guarded("Heun, 10 steps", lambda: drawn("heun", 10))
    guarded("D-DDIM fit, 5 steps", lambda: fitted(5, 5))


def inception(options: Options) -> None:
    """Features of FID's InceptionV3 with random weights."""
    from diffusion_distill.evaluation.features import Inception
    from diffusion_distill.evaluation.inception_network import SIZE, InceptionV3

    def work() -> dict[str, Any]:
        batch = 2 if options.small else 256
        shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))
        network = Inception(jax.device_put(random_like(shapes["params"])))
        images = np.random.default_rng(4).integers(0, 256, (batch, 32, 32, 3), np.uint8)
        return {
            "value": batch / seconds_of(lambda: network(images).pool3),
            "unit": "images/s",
            "note": f"batch {batch}",
        }

    guarded("features", work)


PARTS: dict[str, Callable[[Options], None]] = {
    "matmul": matmul,
    "check": check,
    "wanted": write_wanted,
    "cifar": lambda options: updates(*cifar(options.small), options.peak),
    "torch": torch,
    "sampling": sampling,
    "adm": lambda options: updates(*adm(options.small), options.peak),
    "inception": inception,
}


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--peak", type=float, default=0.0, help="FLOP/s of a device")
    parser.add_argument("--file", help="what the part 'wanted' writes")
    parser.add_argument("--small", action="store_true", help="tiny networks")
    options = parser.parse_args()
    _device_common.SECONDS = 0.3 if options.small else _device_common.SECONDS
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
