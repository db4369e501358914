"""Devices: one mesh over all of them, batches split over it, everything else replicated.

The same step runs on one CPU, one GPU or a pod; a mean over the batch is a mean over the global batch, so
the loss does not depend on the number of devices beyond the order of summation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_distill.base.heap import keep_freed_memory
from diffusion_distill.base.typing import Batch


def use_cpu_devices(count: int, keep_memory: bool = True) -> None:
    """Splits the CPU into `count` devices: one per core is fastest, more simulate a larger machine.

    Call it before JAX is first used. XLA's thread pool gets one thread more than there are devices: they wait
    for each other inside it, and with none to spare they can lock up; many more slow each other down (four
    threads per device made a step 1.4 times as long).

    Args:
      count: number of devices.
      keep_memory: keeps freed memory for the process, which then stays as large as it once was; see `base.heap`.

    Raises:
      RuntimeError: JAX has already started its devices.
    """
    os.environ["NPROC"] = str(max(count + 1, os.cpu_count() or 1))
    jax.config.update("jax_num_cpu_devices", count)
    if keep_memory:
        keep_freed_memory()


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with one axis, 'data', over the given devices (all by default)."""
    devices = list(jax.devices() if devices is None else devices)
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def on_cpu(mesh: Mesh) -> bool:
    """Whether programs for the mesh are for CPUs, whose loops run gradients of convolutions 80 times more slowly.

    The mesh says it, not JAX's default device: a program may be compiled for devices that are not there.
    """
    return mesh.devices.flat[0].platform == "cpu"


def devices_for(batch: int) -> list[Any]:
    """As many of the devices as a batch of this size can be split over evenly, all of them if it can.

    Raises:
      ValueError: several processes, which need all of their devices, and a batch that is no multiple of their number.
    """
    devices = jax.devices()
    if jax.process_count() > 1 and batch % len(devices):
        raise ValueError(f"On several processes a batch must be a multiple of all {len(devices)} devices, got {batch}.")
    return devices[: max(n for n in range(1, len(devices) + 1) if batch % n == 0)]


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """Raises ValueError if a global batch cannot be split evenly over the devices and into parts."""
    if batch_size < 1 or batch_size % (mesh.size * parts):
        times = f" times the parts of a batch ({parts})" if parts > 1 else ""
        raise ValueError(
            f"The batch size must be a positive multiple of the number of devices ({mesh.size}){times}, "
            f"got {batch_size}."
        )


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> Batch:
    """This process's part of a batch [local, ...] as global arrays split over the mesh."""
    place = split(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(place, a), dict(batch))


def fetch(array: jax.Array) -> np.ndarray:
    """A global array on the host, in every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
