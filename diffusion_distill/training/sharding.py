"""Devices: one mesh of two axes over all of them, batches split over both, the state over the second.

    data      devices that hold the same part of the state
    params    devices that share one state: each array that is large enough is split over them (`placed`)

So (devices, 1) is data parallelism, the default, with the whole state on every device; (1, devices) is fully sharded
data parallelism (arXiv:1910.02054, its third stage); what lies between has a state in every row of the mesh. Batches
are split over all devices in each case. An update gathers the parameters that it needs and keeps of the sum of the
gradients the share that it updates, see `training.gradients`. On several hosts or slices of TPUs a state stays within
one of them, where gathering is fast.

The same step runs on one CPU, one GPU or a pod; a mean over the batch is a mean over the global batch, so
the loss does not depend on the number of devices beyond the order of summation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_distill.base.errors import positive_int
from diffusion_distill.base.heap import keep_freed_memory
from diffusion_distill.base.typing import Batch

#: The axes of a mesh, the outer one first.
AXES = ("data", "params")
#: Elements of the smallest array that is split, 64 KiB in float32. Smaller ones, such as biases and scales, are most of
#: the arrays but less than a hundredth of a state, and each exchange takes its time however little it moves.
LEAST_SPLIT = 2**14


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


def check_axes(data: int, params: int) -> None:
    """Raises ValueError unless both numbers of `make_mesh` are positive, or one of them is and the other -1."""
    for name, number in (("data_parallel", data), ("params_parallel", params)):
        if number != -1:
            positive_int(f"{name}, if not -1 for what is left,", number)
    if data == params == -1:
        raise ValueError("data_parallel and params_parallel are both -1, what is left: give one of them as a number.")


def make_mesh(data: int = -1, params: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh [data, params] with the axes `AXES`.

    Args:
      data, params: its two numbers; -1 for what the other one leaves of the devices.
      devices: all by default.

    Raises:
      ValueError: numbers that do not multiply to the devices; or of several hosts or slices, one that is no multiple of
        `params` devices.
    """
    check_axes(data, params)
    devices = list(jax.devices() if devices is None else devices)
    sizes = [number if number > 0 else max(1, len(devices) // max(data, params)) for number in (data, params)]
    if prod(sizes) != len(devices):
        raise ValueError(
            f"data_parallel={data} times params_parallel={params} must be the number of devices, which is "
            f"{len(devices)}. Write -1 for what one of them leaves."
        )
    if sizes[1] > 1 and len({_host(device) for device in devices}) > 1:
        return Mesh(arranged(sizes[0], sizes[1], devices), AXES, axis_types=(AxisType.Auto,) * 2)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over the given devices (all by default) on which each has the whole state."""
    return make_mesh(devices=devices)


def arranged(data: int, params: int, devices: Sequence[Any]) -> np.ndarray:
    """Devices [data, params] of several hosts, or slices of TPUs, each row within one of them.

    Raises:
      ValueError: the devices of one are no multiple of `params`.
    """
    hosts = len({_host(device) for device in devices})
    if len(devices) % hosts or len(devices) // hosts % params:
        raise ValueError(
            f"params_parallel={params} must divide the devices of each host or slice, which has "
            f"{len(devices) / hosts:g} of {len(devices)}: a state lies within one, where gathering it is fast."
        )
    by_process = not hasattr(devices[0], "slice_index")
    shape, outer = (data // hosts, params), (hosts, 1)
    return mesh_utils.create_hybrid_device_mesh(shape, outer, devices, process_is_granule=by_process)


def _host(device: Any) -> int:
    """The number of the slice of fast connections that a device is in; of its process, where there are no slices."""
    return getattr(device, "slice_index", device.process_index)


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


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis split over all devices, the first by default: that of a batch."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, mesh.axis_names))


def placed(mesh: Mesh | AbstractMesh, shape: Sequence[int]) -> NamedSharding:
    """Where an array of the state lies, by its shape alone.

    It is split along the longest of the axes that the number of devices of 'params' divides. It lies whole on each
    device if there is no such axis, or if it has less than `LEAST_SPLIT` elements.
    """
    count = mesh.shape["params"]
    axes = [axis for axis, size in enumerate(shape) if size % count == 0]
    if count == 1 or not axes or prod(shape) < LEAST_SPLIT:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "params"))


def places(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """`placed` for each array of a tree, or shape of one: a state, parameters, a denoiser."""
    return jax.tree.map(lambda array: placed(mesh, np.shape(array)), tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """The arrays of a tree on the mesh, each where `placed` says."""
    if jax.process_count() > 1:  # what lies on a device here cannot be moved to those of others, but numbers can
        tree = jax.tree.map(lambda a: np.asarray(a) if getattr(a, "is_fully_addressable", False) else a, tree)
    return jax.device_put(tree, places(tree, mesh))


def one_copy(tree: Any) -> Any:
    """The tree to write down: of what lies on the devices of this process more than once, the first copy, uncopied.

    Orbax would have each device write its share of every array, and cuts it out with a program for each shape and
    device: 1.4 s for the state of a small network on two devices. Of several processes each writes what it has.
    """
    return jax.tree.map(_first_copy, tree) if jax.process_count() == 1 else tree


def _first_copy(array: Any) -> Any:
    """What lies whole on each device is the first device's alone; what 'params' splits lies on the mesh's first row."""
    if not isinstance(array, jax.Array) or all(shard.replica_id == 0 for shard in array.addressable_shards):
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    first: Any = array.sharding
    first = NamedSharding(Mesh(first.mesh.devices[:1], AXES), first.spec)
    shares = [shard.data for shard in array.addressable_shards if shard.replica_id == 0]
    return jax.make_array_from_single_device_arrays(array.shape, first, shares)


def gathered(tree: Any, mesh: Mesh) -> Any:
    """In a compiled function: a tree whose arrays are whole on every device."""
    return tree if mesh.shape["params"] == 1 else jax.lax.with_sharding_constraint(tree, replicated(mesh))


def scattered(tree: Any, mesh: Mesh) -> Any:
    """In a compiled function: a tree of which each device keeps what `placed` gives it."""
    return tree if mesh.shape["params"] == 1 else jax.lax.with_sharding_constraint(tree, places(tree, mesh))


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
