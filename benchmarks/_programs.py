"""Every compiled function of the library with the shapes of its arguments, for devices that need not be there.

A `Program` is what `jax.jit` made, and shapes on a mesh in place of arrays. It can be lowered and compiled but not run;
TPUs of which JAX has only a description will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding

from diffusion_distill import VE, Cosine, EDMInput, LogsnrInput, Model, OptimizerSettings, UNet
from diffusion_distill.api import classifier, sampling
from diffusion_distill.api.ahead import batch_shapes, inputs
from diffusion_distill.base.flops import count_flops
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.evaluation import features
from diffusion_distill.evaluation.inception_network import SIZE, InceptionV3
from diffusion_distill.methods import Denoising, Knowledge, Progressive, Tract
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers import dode, engine, steps, tabulate
from diffusion_distill.solvers.table import Table
from diffusion_distill.studies import similarity, trajectories
from diffusion_distill.studies.subject import told
from diffusion_distill.training import checksum, dispatch
from diffusion_distill.training.optimizers import make_clip, make_optimizer
from diffusion_distill.training.sharding import data_mesh, replicated, split
from diffusion_distill.training.state import create
from diffusion_distill.training.step import make_step
from diffusion_distill.training.topologies import devices_of
from diffusion_distill.weights import PUBLISHED

# ---------------------------------------------------------------- networks


@dataclass(frozen=True)
class Case:
    """A network and its images.

    Attributes:
      batch: of all devices together.
      steps: of a teacher that is distilled, and of the student's first phase.
    """

    network: UNet
    shape: tuple[int, ...]
    batch: int
    steps: tuple[int, int]

    @property
    def vp(self) -> Model:
        """The network as a variance-preserving model that predicts v."""
        return Model(self.network, self.shape, Cosine(-20.0, 20.0), "v", LogsnrInput())

    @property
    def edm(self) -> Model:
        """The network as EDM's."""
        return Model(self.network, self.shape, VE(), "edm", EDMInput())


def _small() -> Case:
    sizes: dict[str, Any] = dict(ch_mult=(1,), num_res_blocks=1, attn_resolutions=(4,), num_heads=1, num_classes=10)
    network = UNet(ch=32, emb_ch=32, out_ch=3, **sizes, label_dropout=0.1, dtype="bfloat16")
    return Case(network, (4, 4, 3), 16, (4, 1))


def _published(name: str, batch: int, **changes: Any) -> Case:
    model = PUBLISHED[name].model
    return Case(model.network.clone(dtype="bfloat16", **changes), model.shape, batch, (1024, 32))


CASES: dict[str, Callable[[], Case]] = {
    "small": _small,
    "cifar": partial(_published, "cifar_original", 256),  # the 60M U-Net of BTD and TRACT
    "adm": partial(_published, "edm-imagenet-64x64-cond-adm", 64),
}


# ---------------------------------------------------------------- programs


class Program(NamedTuple):
    """A compiled function and the shapes of its arguments; arguments that jit treats as constant are as they are."""

    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]

    def lower(self) -> jax.stages.Lowered:
        """The program for the devices of the arguments."""
        return self.function.lower(*self.arguments)

    def flops(self) -> int:
        """Those of all devices together, counted from the shapes."""
        traced = self.function.trace(*self.arguments).jaxpr
        return count_flops(jaxpr_as_fun(traced), *traced.in_avals)


def mesh_of(chips: str) -> Mesh:
    """A mesh of TPUs that need not be there, such as v5e:2x4 or v6e:2x4; arguments and errors as `devices_of`."""
    return data_mesh(devices_of(chips))


def shapes(tree: Any, place: NamedSharding | None = None) -> Any:
    """The shapes of a tree's arrays, with where they lie."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a), sharding=place), tree)


def _key(place: NamedSharding | None = None) -> Any:
    return shapes(jax.eval_shape(jax.random.key, 0), place)


def update(
    case: Case, mesh: Mesh, *, method: Any, model: Model, updates: int = 1, parts: int = 1, per_shard: bool = False
) -> Program:
    """An update of a method's first phase, or several in one dispatch.

    Args:
      parts: of the batch, one after the other.
      per_shard: each device clips its own gradient.
    """
    settings = OptimizerSettings()
    optimizer, teacher = make_optimizer(settings), None if isinstance(method, Denoising) else model
    droppable = conditions.taken(model) and conditions.null_of(model) is not None
    step = make_step(
        method.losses,
        model,
        teacher,
        optimizer,
        mesh,
        parts=parts,
        shard_clip=make_clip(settings) if per_shard else None,
        label_dropout=0.1 if droppable else 0.0,
    )
    begin = lambda params: create(params, optimizer, method.averages, () if teacher is None else params)  # noqa: E731
    state = jax.eval_shape(lambda key: begin(model.init(key)), jax.random.key(0))
    batch, (one, key) = batch_shapes(model, case.batch), inputs(method.phases(model, case.batch)[0], method.averages)
    if updates == 1:
        return Program(step, (state, batch, one, key))
    stack = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct((updates, *a.shape), a.dtype), tree)  # noqa: E731
    each = stack(one._replace(rows=()))._replace(rows=one.rows)
    return Program(dispatch.several(step, mesh), (state, stack(batch), each, key))


def _images(case: Case, place: NamedSharding | None = None, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((case.batch, *case.shape), dtype, sharding=place)


def _classifier_update(case: Case, mesh: Mesh) -> Program:
    settings, optimizer = classifier.ClassifierSettings(), make_optimizer(OptimizerSettings())
    network = settings.network(10)
    training: Any = classifier._Training(network, settings)
    init = lambda key: create(classifier._init(network, case.shape, key), optimizer, ())  # noqa: E731
    batch = {"x": _images(case), "cond": jax.ShapeDtypeStruct((case.batch,), jnp.int32)}
    arguments = jax.eval_shape(init, jax.random.key(0)), batch, *inputs(settings.phase(), {})
    return Program(make_step(training.losses, training, None, optimizer, mesh), arguments)


def _classifier_features(case: Case, mesh: Mesh) -> Program:
    network = classifier.ClassifierSettings().network(10)
    params = jax.eval_shape(partial(classifier._init, network, case.shape), jax.random.key(0))
    return Program(classifier._apply, (network, shapes(params, replicated(mesh)), _images(case, split(mesh))))


def _inception(case: Case, mesh: Mesh) -> Program:
    images = jax.ShapeDtypeStruct((case.batch, SIZE, SIZE, 3), jnp.float32, sharding=split(mesh))
    params = jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    return Program(features._outputs, (shapes(params, replicated(mesh)), images, "float32"))


def _inception_input(case: Case, mesh: Mesh) -> Program:
    return Program(features._network_input, (_images(case, split(mesh), jnp.uint8), "pytorch_fid"))


# ---------------------------------------------------------------- samplers


class _Sampling(NamedTuple):
    """What samplers take: a denoiser and conditions, images, and a solver's table in float32."""

    denoise: Any
    cond: Any
    images: Any
    table: Table

    @property
    def registers(self) -> tuple[Any, ...]:
        """The solver's images before its first row."""
        return (self.images,) * self.table.weights.shape[1]


def _sampling(case: Case, mesh: Mesh, solver: str = "ddim") -> _Sampling:
    model, place = case.vp, split(mesh)
    table, cond = tabulate(solver, sampling.grid_for(model, 4), model.process), conditions.structs(model, case.batch)
    return _Sampling(
        Clipped(model.denoiser(shapes(jax.eval_shape(model.init, jax.random.key(0)), replicated(mesh)))),
        None if cond is None else shapes(cond, place),
        _images(case, place),
        jax.tree.map(lambda a: np.asarray(a, np.float32), table),
    )


def _sampler(case: Case, mesh: Mesh, solver: str, states: Sequence[int] = ()) -> Program:
    own = _sampling(case, mesh, solver)
    own = own._replace(table=own.table.plain())
    keys = jax.eval_shape(lambda key: engine.sample_keys(key, np.arange(case.batch)), jax.random.key(0))
    noise = None if own.table.deterministic else shapes(keys, split(mesh))
    return Program(engine._scan_loop, (own.table, own.denoise, own.registers, own.cond, noise, tuple(states), ()))


def _fit_row(case: Case, mesh: Mesh) -> Program:
    denoise, cond, images, table = own = _sampling(case, mesh)
    return Program(dode._jitted_row, (denoise, cond, np.inf, table.row(0), own.registers, images))


def _sample_keys(case: Case, mesh: Mesh) -> Program:
    numbers = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    return Program(sampling.sample_keys, (_key(), numbers, split(mesh)))


def _noise(case: Case, mesh: Mesh) -> Program:
    keys = jax.eval_shape(lambda key: engine.sample_keys(key, np.arange(case.batch)), jax.random.key(0))
    return Program(engine.noise, (shapes(keys, split(mesh)), 0, case.vp.shape))


def _solver_step(case: Case, mesh: Mesh, *, traced: bool) -> Program:
    """A step of Heun's method, between levels of JAX arrays or of the host."""
    denoise, cond, images, _ = _sampling(case, mesh)
    method, ends = steps._Method(steps.TABLEAUX["heun"]), (Level(np.float64(0.6), np.float64(0.8)),) * 2
    if traced:
        levels = shapes(jax.tree.map(np.float32, ends), replicated(mesh))
        return Program(steps._run_traced, (method, denoise, images, *levels, cond))
    return Program(steps._run, (denoise, images, method.table(*ends), cond))


def _study(function: Any, *options: Any) -> Callable[[Case, Mesh], Program]:
    """What a study computes from states and outputs of a sampler."""

    def program(case: Case, mesh: Mesh) -> Program:
        table = _sampling(case, mesh).table
        of = lambda rows: jax.ShapeDtypeStruct((rows, case.batch, *case.shape), jnp.float32, sharding=by_image)  # noqa: E731
        by_image = split(mesh, axis=1)
        return Program(function, (of(table.nfe + 1), of(table.nfe), told(table), *options))

    return program


# ---------------------------------------------------------------- others


def _init(case: Case, mesh: Mesh) -> Program:
    return Program(jax.jit(case.vp.init), (_key(replicated(mesh)),))


def _checksum(case: Case, mesh: Mesh) -> Program:
    return Program(checksum._checksum, (jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32, sharding=replicated(mesh)),))


def _of(method: Callable[[tuple[int, int]], Any], edm: bool = False, **options: Any) -> Callable[[Case, Mesh], Program]:
    """An update of a method that is made from the steps of teacher and student."""
    return lambda case, mesh: update(
        case, mesh, method=method(case.steps), model=case.edm if edm else case.vp, **options
    )


def _btd(steps: tuple[int, int]) -> Progressive:
    return Progressive(steps[0])


def _tract(steps: tuple[int, int]) -> Tract:
    return Tract(steps, length="1M")


#: Names of compiled functions -> the program of a case on a mesh.
UPDATES: dict[str, Callable[[Case, Mesh], Program]] = {
    "teacher": _of(lambda steps: Denoising(length="1M")),
    "BTD": _of(_btd),
    "BTD, clipped per device": _of(_btd, per_shard=True),
    "TRACT-VP": _of(_tract),
    "TRACT-EDM": _of(lambda steps: Tract.edm((40, 1), length="1M"), edm=True),
    "TRACT-VP in parts": _of(_tract, parts=2),
    "TRACT-VP, 10 updates": _of(_tract, updates=10),
    "knowledge": _of(lambda steps: Knowledge(steps=steps[1], length="1M")),
    "classifier": _classifier_update,
}
PROGRAMS: dict[str, Callable[[Case, Mesh], Program]] = UPDATES | {
    "DDIM": partial(_sampler, solver="ddim"),
    "ancestral": partial(_sampler, solver="ancestral"),
    "Heun, states kept": partial(_sampler, solver="heun", states=(1, 2)),
    "D-DDIM fit": _fit_row,
    "step of Heun": partial(_solver_step, traced=False),
    "step of Heun, traced": partial(_solver_step, traced=True),
    "keys of samples": _sample_keys,
    "noise of samples": _noise,
    "trajectories": _study(trajectories._norms),
    "similarity": _study(similarity._similarity, "eps"),
    "features of a classifier": _classifier_features,
    "InceptionV3": _inception,
    "InceptionV3's input": _inception_input,
    "parameters": _init,
    "checksum": _checksum,
}
