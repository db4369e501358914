"""How much of a device's memory training needs, and of its arithmetic it uses.

The latter is model FLOPs utilisation (MFU, arXiv:2204.02311 appendix B).

    MFU = FLOPs of an image · images per second / (peak of a device · devices)

The FLOPs are those that an update needs, not those that were done: a network that is recomputed to spare memory counts
once. They are those of the loss, forward, and twice those of the student for its gradient.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from diffusion_distill.base.flops import count_flops
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process.levels import Level
from diffusion_distill.training import sharding
from diffusion_distill.training.state import TrainState
from diffusion_distill.training.step import Losses, mean_loss_of

#: FLOP/s of dense matrix products in bfloat16, accumulated in float32, by JAX's name of a device. Makers that print the
#: rate of sparse products print twice as much. V100 and T4 have no bfloat16: it is their float16 rate.
PEAKS: dict[str, float] = {
    # as given for the V100, T4, A100, A10, A30, L4, L40S, H100, H200 and Blackwell; half of the sparse rate where only
    # that is given
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla V100-PCIE-16GB": 112e12,
    "Tesla V100-PCIE-32GB": 112e12,
    "Tesla T4": 65e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A30": 165e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    # cloud.google.com/tpu/docs, the page of each version. JAX sees two devices on a chip of v2 (46e12) and v3 (123e12).
    "TPU v2": 23e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
}

GIB = 2**30
#: Bytes of a device's memory, by JAX's name of it. NVIDIA's figures are taken as GiB, which is a little more than a
#: program gets, so that nothing is refused that might fit.
MEMORY: dict[str, int] = {
    "NVIDIA A100-SXM4-40GB": 40 * GIB,
    "NVIDIA A100-SXM4-80GB": 80 * GIB,
    "NVIDIA A100-PCIE-40GB": 40 * GIB,
    "NVIDIA A100 80GB PCIe": 80 * GIB,
    "NVIDIA H100 80GB HBM3": 80 * GIB,
    "NVIDIA H100 PCIe": 80 * GIB,
    # cloud.google.com/tpu/docs, the page of each version
    "TPU v5 lite": 16 * GIB,
    "TPU v5e": 16 * GIB,
    "TPU v5": 95 * GIB,
    "TPU v5p": 95 * GIB,
    "TPU v6 lite": 32 * GIB,
    "TPU v6e": 32 * GIB,
}


class Meter(NamedTuple):
    """What a speed is worth: FLOPs of an image in an update, and FLOP/s that all devices together can do."""

    flops_per_image: int
    peak: float

    def figures(self, images_per_second: float) -> dict[str, float]:
        """The utilisation, from 0 to 1, and the FLOPs, for logs."""
        mfu = self.flops_per_image * images_per_second / self.peak
        return {"mfu": float(f"{mfu:.3g}"), "flops_per_image": self.flops_per_image}


def device_bytes(state: Any, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of a state's arrays, or shapes of them, on each device of a mesh."""
    each = ((leaf, sharding.placed(mesh, leaf.shape).shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state))
    return sum(prod(share) * leaf.dtype.itemsize for leaf, share in each)


def described(state: TrainState, mesh: Mesh | AbstractMesh) -> str:
    """The bytes of the state's roles on each device, in one line."""
    roles = {
        "student": state.params,
        "optimizer": state.opt_state,
        "averages": state.averages,
        "teacher": state.teacher,
        "base": state.base,
    }
    sizes = {name: device_bytes(role, mesh) for name, role in roles.items() if jax.tree.leaves(role)}
    parts = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    return f"state: {device_bytes(state, mesh):,} bytes on each device ({parts})"


def check_memory(state: Any, mesh: Mesh) -> None:
    """Raises ValueError if the state alone, without what an update needs besides, is too large for the devices.

    Devices whose memory is not in `MEMORY` are not checked.
    """
    kind = mesh.devices.flat[0].device_kind
    needed, there = device_bytes(state, mesh), MEMORY.get(kind)
    if there is not None and needed > there:
        raise ValueError(
            f"The state of this run takes {needed / GIB:.1f} GiB of each device, but a {kind} has {there / GIB:.0f} "
            f"GiB. Let more devices share it: params_parallel is {mesh.shape['params']} of {mesh.size} devices "
            "(--config.run.params_parallel=N, Settings(params_parallel=N))."
        )


def named_peak() -> float:
    """FLOP/s that all devices together can do; 0 if the peak of one of them is not in `PEAKS`."""
    peaks = [PEAKS.get(device.device_kind, 0.0) for device in jax.devices()]
    return sum(peaks) if all(peaks) else 0.0


def meter(losses: Losses, model: Model, teacher: Model | None, state: TrainState, rows: Any) -> Meter | None:
    """The meter of a run; None, which costs nothing, where the peak of the devices is not known, as of CPUs."""
    peak = named_peak()
    return Meter(update_flops(losses, model, teacher, state, rows), peak) if peak else None


def update_flops(losses: Losses, model: Model, teacher: Model | None, state: TrainState, rows: Any) -> int:
    """FLOPs of an update for each image of the batch.

    Args:
      losses, model, teacher: as in `make_step`.
      rows: the loss's arrays of a phase.
    """
    batch = {"x": jnp.zeros((1, *model.shape), jnp.float32), "cond": conditions.zeros(model)}
    batch = {name: value for name, value in batch.items() if value is not None}
    loss = count_flops(mean_loss_of(losses, model, teacher), state.params, state, batch, rows, jax.random.key(0))
    student = jax.eval_shape(lambda state: state.whole(state.params), state)
    return loss + 2 * forward_flops(model, student)


def forward_flops(model: Model, params: Any) -> int:
    """FLOPs of one network call for one sample."""
    z, level = jnp.zeros((1, *model.shape), jnp.float32), Level(*jnp.full((2, 1), 0.5))
    call = lambda params, z, level, cond: model.raw(params, z, level, cond, None)  # noqa: E731
    return count_flops(call, params, z, level, conditions.zeros(model))
