"""One function in ONNX, which many runtimes read: x_hat, with the parameters in it, by the package jax2onnx.

    session = onnxruntime.InferenceSession("student_1.onnx")
    [x_hat] = session.run(None, {"z": z, "alpha": alpha, "sigma": sigma})

z is [1, *shape], alpha and sigma [1], all float32; of a model with labels there is `labels` [1] int32 too. The batch is
1, since jax2onnx cannot pad arrays of unknown size.

JAX traces the function before jax2onnx sees it, so that jax2onnx puts nothing in the place of Flax's functions. Two
kinds of operations are exchanged for others that jax2onnx knows: forms for certain machines for the general one, and
the comparisons of a binary search for `<` and `<=`, from which they differ only for NaN and for zeros of other signs.
A network that computes in bfloat16 does so in float32 there, since onnxruntime has few operations of that type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Cond, Data, Params
from diffusion_distill.base.whole import whole
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process.levels import Level
from diffusion_distill.weights.exports import Export
from diffusion_distill.weights.matching import WeightsError

NEEDED = "Exports in ONNX need jax2onnx and onnxruntime: pip install 'diffusion_distill[onnx]'."
#: Comparisons of a binary search -> those that jax2onnx knows.
SAME = {"lt_to": "lt", "le_to": "le"}


def save(path: Path, model: Model, params: Params) -> Export:
    """Writes the function, whole or not at all, runs it in onnxruntime, and compares it with the model.

    Raises:
      ImportError: jax2onnx or onnxruntime is not installed.
      WeightsError: jax2onnx does not know an operation of the network.
    """
    try:
        import jax2onnx  # type: ignore[import-not-found]
        import onnxruntime  # type: ignore[import-not-found]
        from jax2onnx.plugins import plugin_system  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(NEEDED) from error
    plugin_system.import_all_plugins()
    if getattr(model.network, "dtype", "float32") != "float32":
        model = dataclasses.replace(model, network=model.network.clone(dtype="float32"))
    known = plugin_system.PLUGIN_REGISTRY
    inputs = _inputs(model)
    traced = _traced(model, params, list(inputs.values()))
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in inputs.values()]
    with mock.patch.dict(known, {name: known[other] for name, other in SAME.items()}):
        try:
            proto = jax2onnx.to_onnx(traced, inputs=shapes, input_names=list(inputs), output_names=["x_hat"])
        except NotImplementedError as error:
            raise WeightsError(f"jax2onnx cannot express this network: {error} Export it as stablehlo.") from error
    with whole(path) as half:
        half.write_bytes(proto.SerializeToString())
        session = onnxruntime.InferenceSession(half.read_bytes(), providers=["CPUExecutionProvider"])
        [found] = session.run(None, inputs)
    z, alpha, sigma, *cond = map(jnp.asarray, inputs.values())
    difference = float(jnp.abs(found - model.denoiser(params)(z, Level(alpha, sigma), *cond)).max())
    opset = ", ".join(f"{each.domain or 'ai.onnx'} {each.version}" for each in proto.opset_import)
    return Export(path, difference, f"operations {opset}; one sample at a time")


def _traced(model: Model, params: Params, inputs: list[np.ndarray]) -> Callable[..., Data]:
    """x_hat(z, alpha, sigma[, labels]) as operations of JAX, in their general form."""

    def x_hat(z: Data, alpha: Array, sigma: Array, *cond: Cond) -> Data:
        return model.denoiser(params)(z, Level(alpha, sigma), *cond)

    def general(*operands: Any, default: Callable[..., Any], **_: Any) -> Any:
        return default(*operands)

    with mock.patch.object(jax.lax, "platform_dependent", general):
        closed = jax.make_jaxpr(x_hat)(*inputs)
    return lambda *given: jax.extend.core.jaxpr_as_fun(closed)(*given)[0]


def _inputs(model: Model) -> dict[str, np.ndarray]:
    """One sample of noise at the level of half the time, and no label."""
    level, cond = model.process.level(np.array([0.5])), conditions.zeros(model)
    z = jax.random.normal(jax.random.key(0), (1, *model.shape))
    given = {"z": z, "alpha": level.alpha, "sigma": level.sigma}
    inputs = {name: np.asarray(value, np.float32) for name, value in given.items()}
    return inputs if cond is None else {**inputs, "labels": np.asarray(cond)}
