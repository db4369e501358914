"""One function in StableHLO, the form in which compilers exchange programs: x_hat, with the parameters in it.

    function = jax.export.deserialize(bytearray(Path("student_1.stablehlo").read_bytes()))
    x_hat = function.call(z, alpha, sigma)              z [batch, *shape], alpha and sigma [batch], all float32
    x_hat = function.call(z, alpha, sigma, labels)      labels [batch] int32, of a model with labels
    x_hat = function.call(z, alpha, sigma, told)        {"guidance": scale [batch], "cond": ...}, of a guided student

Any batch size is taken. JAX promises to read such a file for six months after the version that wrote it; what should
last longer is exported as safetensors.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Cond, Data, Params
from diffusion_distill.base.whole import whole
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process.levels import Level
from diffusion_distill.weights.exports import Export

PLATFORMS = ("cpu", "cuda", "tpu")


def save(path: Path, model: Model, params: Params) -> Export:
    """Writes the function, whole or not at all, reads it again, and compares it with the model."""
    denoise = model.denoiser(params)

    def x_hat(z: Data, alpha: Array, sigma: Array, *cond: Cond) -> Data:
        one = jax.tree.map(lambda a: a[None], (z, Level(alpha, sigma), *cond))  # networks ask for the size of a batch
        return denoise(*one)[0]

    (batch,) = export.symbolic_shape("batch")
    described = conditions.told(model, batch)  # type: ignore[arg-type]
    conds = [] if described is None else [described]
    level = [jax.ShapeDtypeStruct((batch,), jnp.float32)] * 2
    z = jax.ShapeDtypeStruct((batch, *model.shape), jnp.float32)
    made = export.export(jax.jit(jax.vmap(x_hat)), platforms=PLATFORMS)(z, *level, *conds)
    with whole(path) as half:
        half.write_bytes(made.serialize())
        difference = _read_back(half, model, params)
    note = f"calling convention {made.calling_convention_version} of jax.export, for {', '.join(made.platforms)}; "
    return Export(path, difference, f"{note}JAX {jax.__version__} and those of the next six months read it")


def _read_back(path: Path, model: Model, params: Params) -> float:
    z, cond = jax.random.normal(jax.random.key(0), (1, *model.shape)), conditions.zeros(model)
    level = Level(*(jnp.asarray(part, jnp.float32) for part in model.process.level(np.array([0.5]))))
    given = (z, *level, *([] if cond is None else [cond]))
    found = export.deserialize(bytearray(path.read_bytes())).call(*given)
    return float(jnp.abs(found - model.denoiser(params)(z, level, cond)).max())
