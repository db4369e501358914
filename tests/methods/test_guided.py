"""Guided students against the exact denoisers of a mixture: what they learn, and that no later stage guides them again.

`toys.Classes` knows the conditional and the unconditional estimate, so that the guided one is known at every scale.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_networks
import toys
from flax import struct
from toys import NULL, Classes, equal

import diffusion_distill as dd
from diffusion_distill.api.ahead import Ahead
from diffusion_distill.api.beginning import first_params
from diffusion_distill.api.sampling import denoiser_of, sampler_of
from diffusion_distill.base import guided
from diffusion_distill.base.arrays import Array
from diffusion_distill.cli import build
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.guidance import AtScale, ClassifierFree
from diffusion_distill.denoisers.model import Denoiser
from diffusion_distill.methods import targets, tract
from diffusion_distill.networks import NETWORKS, DiT, SongUNet, UNet
from diffusion_distill.process import grids, noising
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Cosine
from diffusion_distill.studies.comparison import Setting
from diffusion_distill.training.utilisation import forward_flops
from diffusion_distill.weights import card
from diffusion_distill.weights.matching import Checkpoint

SETTINGS = dd.Settings(batch_size=16, seed=1)
FIT = dd.FitSettings(batch_size=8, scale=4)
SCALES = (1.0, 3.0)
LABELS = np.arange(16, dtype=np.int32) % NULL
S = np.linspace(*SCALES, 16, dtype=np.float32)
TOLD = guided.told(S, LABELS)


class Told(nn.Module):
    """A perceptron that mixes all pixels, the time, the label and, if there is one, the scale."""

    width: int = 16
    num_classes: int = NULL

    @nn.compact
    def __call__(self, z: Array, time: Array, cond: Any) -> Array:
        scale, labels = guided.parts(cond)
        angle = time[:, None] * (np.pi / 2000)
        hidden = [z.reshape(len(z), -1), jnp.cos(angle), jnp.sin(angle), jax.nn.one_hot(labels, self.num_classes)]
        hidden = nn.Dense(self.width)(jnp.concatenate(hidden, axis=1))
        if scale is not None:
            hidden += nn.Dense(self.width, kernel_init=nn.initializers.zeros, name="scale")(scale[:, None])
        hidden = nn.swish(nn.Dense(self.width)(nn.swish(hidden)))
        return nn.Dense(z[0].size)(hidden).reshape(z.shape)


def mixture(z: Any, level: Level, labels: Any = None) -> Any:
    """E[x | z, label], or E[x | z]; with arrays of its own, as JAX remembers the type that an array once became."""
    return jax.tree.map(lambda a: a.astype(z.dtype), Classes())(z, level, labels)


class Exact(struct.PyTreeNode):
    """The mixture's denoiser in the place of a model: guided where it is told a scale."""

    prediction: str = struct.field(pytree_node=False, default="x")

    def raw(self, params: Any, z: Any, level: Level, cond: Any, dropout: Any) -> Any:
        """x_u + s·(x_c - x_u), or x_c."""
        scale, labels = guided.parts(cond)
        x_c, x_u = mixture(z, level, labels), mixture(z, level)
        return x_c if scale is None else x_u + scale.reshape(-1, 1, 1, 1) * (x_c - x_u)


STUDENT = Denoiser(params=(), model=Exact())
MODEL = dd.Model(Told(), (2, 2, 1), prediction="v")
STUDENT_MODEL = dataclasses.replace(MODEL, guided=SCALES)
SOURCE = dd.data.from_arrays(
    np.float32(np.random.default_rng(0).normal(size=(48, 2, 2, 1)).clip(-1, 1)), np.arange(48, dtype=np.int32) % NULL
)


def teacher(model: dd.Model = MODEL) -> dd.Artefact:
    """An untrained one."""
    return dd.Artefact(model, toys.parameters(model), provenance={"method": "none"})


def exact(told: bool = False, data_range: tuple[float, float] | None = None) -> dd.Artefact:
    """The mixture as a teacher, or as a guided student."""
    return dd.Artefact.of(
        lambda z, level, cond: Exact().raw((), z, level, cond, None),
        (2, 2, 1), Cosine(), num_classes=NULL, data_range=data_range, guided=SCALES if told else None,
    )  # fmt: skip


def images() -> tuple[np.ndarray, np.ndarray]:
    """Samples and noise."""
    x, eps = np.random.default_rng(0).normal(size=(2, 16, 2, 2, 1)).astype(np.float32)
    return x.clip(-1, 1), eps


# --- the target


@pytest.mark.fast
@pytest.mark.parametrize("clip", [False, True])
def test_the_target_is_the_guided_estimate_at_each_samples_scale(clip: bool) -> None:
    """A student that has it has no loss; one that is told another scale has the weighted squared distance."""
    (x, eps), level = images(), Cosine(-8, 8).level((np.arange(16) + 0.5) / 16)
    z = noising.diffuse(x, eps, level)
    wanted = ClassifierFree(mixture, S, NULL)(z, level, LABELS)
    assert np.abs(wanted).max() > 1 and np.abs(wanted - mixture(z, level, LABELS)).max() > 0.3, "there is guidance"
    method = dd.Guided(SCALES, clip=clip, weighting="snr_trunc", reduction="sum")
    roles = {"teacher": exact(data_range=(-1, 1)).denoiser(clip=False), "student": STUDENT}
    found = method.losses_at(roles, level, x, eps, TOLD)
    error = STUDENT(z, level, TOLD) - (wanted.clip(-1, 1) if clip else wanted)
    weighted = np.maximum(level.snr, 1) * (error**2).sum(axis=(1, 2, 3))
    chex.assert_trees_all_close(found, weighted, rtol=1e-3, atol=1e-6)
    assert (found < 1e-6).all() != clip


@pytest.mark.fast
def test_without_guidance_it_is_knowledge_distillation() -> None:
    """At scale 1 the target is the conditional estimate."""
    rows = tract.rows(grids.make_grid(Cosine(), 16), 16)
    (x, eps), one = images(), guided.told(np.ones(16, np.float32), LABELS)
    roles = {
        "teacher": exact(data_range=(-0.5, 0.5)).denoiser(clip=False),
        "student": STUDENT.replace(model=toys.Curved()),
    }
    ours = dd.Guided(clip=True).losses_at(roles, rows.t, x, eps, one)
    theirs = dd.Knowledge(16).losses_at(roles, rows, x, eps, LABELS)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


# --- stage two


def rows_of(method: Any) -> targets.Rows:
    """Rows of its first phase, one for each of 16 samples."""
    [phase, *_] = method.phases(MODEL, 16)
    return phase.inputs.at(np.arange(16) % int(phase.inputs.count))


@pytest.mark.fast
@pytest.mark.parametrize("method", [dd.Progressive(8, 4, 16), dd.Tract((8, 2), 16), dd.Knowledge(8, 16)], ids=str)
def test_a_later_stage_never_guides_again(method: Any) -> None:
    """Its target is that of the guided teacher, whose estimates are not mixed once more."""
    rows, (x, eps) = rows_of(method), images()
    z = noising.diffuse(x, eps, rows.t)

    def target(denoise: Any, cond: Any) -> Array:
        roles = dict.fromkeys(("teacher", "self_teacher"), denoise)
        first, second = method.estimators(roles, rows)
        return targets.target(rows, z, first, second, cond)

    found, wanted = target(STUDENT, TOLD), target(ClassifierFree(mixture, S, NULL), LABELS)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)
    once = AtScale(STUDENT, 2.5)
    wanted = target(ClassifierFree(mixture, 2.5, NULL), LABELS)
    chex.assert_trees_all_close(target(once, LABELS), wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(target(ClassifierFree(once, 2.5, NULL), LABELS) - wanted).max() > 0.1, "twice would be seen"


@pytest.mark.parametrize("method", [dd.Tract((2, 1), 16), dd.Progressive(2, 1, 16)], ids=["tract", "btd"])
def test_a_run_of_a_later_stage_calls_its_teacher_once_for_each_sample(method: Any, one_device: None) -> None:
    """Guidance would join two batches, of which the first has no labels."""
    seen: list[tuple[int, dict[str, Any]]] = []

    def watched(z: Array, level: Level, cond: Any) -> Array:
        seen.append((len(z), jax.tree.map(lambda a: (a.shape, a.dtype), cond)))  # while it is traced
        return Exact().raw((), z, level, cond, None)

    student = dd.Artefact.of(watched, (2, 2, 1), num_classes=NULL, data_range=None, guided=SCALES)
    method = dataclasses.replace(method, **{"length" if hasattr(method, "length") else "phase_length": 32})
    [made] = dd.distill(student, SOURCE, method, SETTINGS, student=MODEL).values()
    assert made.model == STUDENT_MODEL
    batch = {"guidance": ((16,), np.float32), "cond": ((16,), np.int32)}
    assert seen and all(told == (16, batch) for told in seen)


# --- learning


def test_a_student_reaches_the_guided_estimate_at_each_scale(one_device: None) -> None:
    """From the exact teacher; one step of it leads where one step of the guided teacher leads."""
    model = dd.Model(Told(64), (2, 2, 1), prediction="x", data_range=None)
    method = dd.Guided(SCALES, 64 * 2000, learning_rate=5e-3, anneal=True, weighting="constant")
    data = np.random.default_rng(1)
    labels = data.choice(NULL, 4096, p=toys.SHARES).astype(np.int32)
    noise = data.normal(size=(4096, 2, 2, 1))
    x = toys.MEANS[labels].reshape(-1, 1, 1, 1) + toys.STDS[labels].reshape(-1, 1, 1, 1) * noise
    source = dd.data.from_arrays(np.float32(x), labels, value_range=None)
    settings = dataclasses.replace(SETTINGS, batch_size=64, log_every=500)
    student = dd.distill(exact(), source, method, settings, student=model)[0]
    assert student.steps == 0 and student.model.guided == SCALES
    cond, far = np.arange(64) % NULL, {}
    for scale in (1.0, 2.0, 3.0):
        for steps in (1, 4):
            drawn = [dd.sample(a, 64, steps=steps, cond=cond, guidance={"scale": scale}) for a in (student, exact())]
            far[scale, steps] = np.abs(drawn[0] - drawn[1]).mean()
    plain, most = (dd.sample(exact(), 64, steps=1, cond=cond, guidance={"scale": s}) for s in (1.0, 3.0))
    assert np.abs(plain - most).mean() > 0.5 and max(far.values()) < 0.12


# --- networks


SMALL: dict[str, Any] = {
    "unet": UNet(8, 8, 2, (1,), 1, (), num_heads=1, norm_groups=8, num_classes=5),
    "song_unet": SongUNet(8, 8, 2, (1,), 1, (), num_classes=5),
    "dit": DiT(width=8, depth=1, num_heads=2, out_ch=2, num_classes=5),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.fast) if n == "dit" else n for n in SMALL])
def test_a_student_of_the_librarys_networks_begins_as_its_teacher(name: str) -> None:
    """For every scale; all but the scale's embedding is the teacher's, which itself has no such parameters."""
    before = teacher(dd.Model(SMALL[name], (4, 4, 2)))
    model = dd.Guided(SCALES).student_of(before.model)
    params = first_params(model, before, SETTINGS)
    assert set(params) - set(before.params) == {"guidance_emb"}
    assert equal({**params, "guidance_emb": ()}, {**before.params, "guidance_emb": ()})
    z, time = small_networks.images(size=4)
    labels, apply = np.array([0, 4, 2], np.int32), jax.jit(model.adapter.apply)
    scale = jnp.array([1.0, 1.7, 3.0])
    begun, wanted = apply(params, z, time, guided.told(scale, labels)), apply(before.params, z, time, labels)
    chex.assert_trees_all_close(begun, wanted, rtol=0, atol=1e-6)
    moved = {**params, "guidance_emb": jax.tree.map(lambda a: a + 0.1, params["guidance_emb"])}
    found = [apply(moved, z, time, guided.told(s * scale, labels)) for s in (1.0, 1.1)]
    assert np.abs(found[0] - wanted).max() > 1e-3 and np.abs(found[0] - found[1]).max() > 1e-4, "it is heard"


def told_functions() -> Any:
    """Plain functions that are told a scale."""

    def init(key: Any, z: Array, time: Array, cond: Any) -> Any:
        return {"of_z": jnp.ones(1), "of_scale": jnp.zeros(1)}

    def apply(params: Any, z: Array, time: Array, cond: Any) -> Array:
        scale, label = guided.parts(cond)
        shift = label + 0.0 if scale is None else label + params["of_scale"] * scale
        return params["of_z"][0] * z + shift.reshape(-1, 1, 1, 1)

    return dd.Functions(init, apply)


def told_equinox() -> Any:
    """An Equinox module, which is called for one sample."""
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        weight: Array

        def __call__(self, z: Array, time: Array, cond: Any) -> Array:
            scale, label = guided.parts(cond)
            return self.weight[0] * z + self.weight[1] * (0.0 if scale is None else scale) + label

    return Network(jnp.array([1.0, 0.5]))


def told_nnx() -> Any:
    """A module of Flax NNX."""
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.array([1.0, 0.5]))

        def __call__(self, z: Array, time: Array, cond: Any) -> Array:
            scale, label = guided.parts(cond)
            shift = label if scale is None else label + self.weight[1] * scale
            return self.weight[0] * z + shift.reshape(-1, 1, 1, 1)

    return Network()


@pytest.mark.packages
@pytest.mark.parametrize("make", [Told, told_functions, told_equinox, told_nnx])
def test_networks_of_every_library_are_guided_students(make: Callable[[], Any], one_device: None) -> None:
    """Both stages: the condition is the teacher's, and the network is told the tree."""
    cond, null = (None, None) if make is Told else (0.0, -1.0)
    before = teacher(dd.Model(make(), (2, 2, 1), prediction="v", cond=cond, null=null))
    source = SOURCE if make is Told else dd.data.from_arrays(SOURCE.x, np.arange(48) / 48, num_classes=0)
    student = dd.distill(before, source, dd.Guided(SCALES, 32), SETTINGS)[0]
    last = dd.distill(student, source, dd.Tract((2, 1), 32), SETTINGS)[1]
    given = np.arange(4) % NULL if make is Told else np.arange(4.0)
    low, high = (dd.sample(last, 4, cond=given, guidance={"scale": s}, clip=False) for s in SCALES)
    assert last.model.guided == SCALES and np.isfinite(low).all() and not np.allclose(low, high, atol=1e-6)


# --- conditions, runs, files


@pytest.mark.fast
def test_scales_are_drawn_uniformly_for_guided_students_alone() -> None:
    labels = np.zeros(4000, np.int32)
    told = conditions.with_scales(dataclasses.replace(MODEL, guided=(1.5, 4.0)), labels, jax.random.key(0))
    scale, own = guided.parts(told)
    assert scale is not None and scale.dtype == np.float32 and own is labels
    counts = np.histogram(scale, bins=5, range=(1.5, 4.0))[0]
    assert counts.sum() == 4000 and counts.min() > 700
    assert conditions.with_scales(MODEL, labels, jax.random.key(0)) is labels


def test_a_batch_in_parts_is_told_the_same_scales(one_device: None) -> None:
    """The gradient in parts is that of the whole batch."""
    method = dd.Guided(SCALES, 48, learning_rate=1e-2, warmup=0)
    whole, parts = (
        dd.distill(teacher(), SOURCE, method, dataclasses.replace(SETTINGS, parts=n))[0].params for n in (1, 2)
    )
    chex.assert_trees_all_close(whole, parts, rtol=0, atol=1e-4)


def test_runs_go_on_and_students_are_kept(tmp_path: Path, one_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage one in two goes; its student is read, sampled, and distilled as adapters."""
    monkeypatch.setitem(NETWORKS, "told", Told)
    method = dd.Guided(SCALES, 64)
    whole = dd.distill(teacher(), SOURCE, method, SETTINGS)[0]
    dd.distill(teacher(), SOURCE, dd.Guided(SCALES, 32), SETTINGS, tmp_path)
    again = dd.distill(teacher(), SOURCE, method, SETTINGS, tmp_path)[0]
    found = dd.Artefact.load(tmp_path / "student")
    for other in (again, found):
        chex.assert_trees_all_close(other.params, whole.params, rtol=0, atol=1e-5)
    assert found.model == whole.model == STUDENT_MODEL and found.steps == 0
    assert found.provenance["method_settings"]["scales"] == [1.0, 3.0]
    last = dd.distill(found, SOURCE, dd.Tract((2, 1), 32), dataclasses.replace(SETTINGS, low_rank=2), tmp_path / "two")
    assert equal(dd.Artefact.load(tmp_path / "two" / "student_1").params, last[1].params)


def test_a_teacher_of_few_steps_gives_its_levels(one_device: None) -> None:
    """A student of 4 steps is guided at its levels, and so is one that is asked to be."""
    few = dd.distill(teacher(), SOURCE, dd.Tract((8, 4), 32), SETTINGS)[4]
    for before, method in ((few, dd.Guided(SCALES, 32)), (teacher(), dd.Guided(SCALES, 32, steps=4))):
        student = dd.distill(before, SOURCE, method, SETTINGS)[4]
        assert equal(tuple(student.grid), tuple(few.grid)) and student.model.guided == SCALES  # type: ignore[arg-type]
        [phase] = method.phases(MODEL, 16, before.grid)
        assert equal(tuple(phase.inputs), tuple(few.grid.at(slice(None, -1))))  # type: ignore[union-attr]


@pytest.mark.fast
def test_sampling_tells_the_scale_and_guides_no_more(one_device: None) -> None:
    """The door's denoiser is the guided estimate of the teacher, at scale 1 by default."""
    z, level = images()[0], Cosine().level(np.full(16, 0.7, np.float32))
    for scale in (None, 2.5):
        how = None if scale is None else {"scale": scale}
        found, wanted = (denoiser_of(a, guidance=how, clip=False)(z, level, LABELS) for a in (exact(True), exact()))
        chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)
    fitted = [
        dd.fit_solver(a, "ddim", 3, dd.FitSettings(8, 4), guidance={"scale": 2.0}) for a in (exact(True), exact())
    ]
    np.testing.assert_allclose(fitted[0].lambdas, fitted[1].lambdas, rtol=1e-3, atol=1e-4)


BEYOND = dataclasses.replace(STUDENT_MODEL, guided=(2.0, 4.0))
DOORS: dict[str, Callable[[dd.SamplerSpec], Any]] = {
    "sampler": lambda how: sampler_of(teacher(BEYOND), how).about["sampling"]["guidance"],
    "fit": lambda how: dd.fit_solver(
        teacher(BEYOND), "ddim", 2, dd.FitSettings(8, 2), spec=how, teacher=teacher()
    ).provenance["guidance"],
    "comparison": lambda how: Setting(teacher(BEYOND), 4, spec=how).facts()["guidance"],
    "denoiser": lambda how: {"scale": denoiser_of(teacher(BEYOND), how, clip=False).scale},  # type: ignore[attr-defined]
}


@pytest.mark.fast
@pytest.mark.parametrize("door", DOORS)
def test_a_student_that_did_not_learn_1_says_which_scale_it_is_told(door: str, one_device: None) -> None:
    """Without a scale, also in the command line's config; another that it did not learn is an error, 1 as well."""
    asked = {scale: config_of(guidance=scale) if scale else config_of() for scale in (0, 1.0, 2.0, 5.0)}
    with pytest.warns(UserWarning, match=r"scales from 2 to 4\. No scale was given: it is told 2"):
        assert DOORS[door](build.spec(asked[0])) == {"scale": 2.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DOORS[door](build.spec(asked[2.0])) == {"scale": 2.0}
    for scale in (1.0, 5.0):
        with pytest.raises(ValueError, match=f"number from 2 to 4, which this student learned, got {scale:g}"):
            DOORS[door](build.spec(asked[scale]))


@pytest.mark.fast
def test_an_evaluation_says_which_scales_were_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each sampler's own row does; of several students each its own."""
    monkeypatch.setitem(dd.NETWORKS, "told", Told)
    folders = [str(teacher(model).save(tmp_path / name)) for name, model in (("a", STUDENT_MODEL), ("b", BEYOND))]

    def said(*measured: str, **sample: Any) -> Any:
        config = config_of(**sample)
        config.artefact = ",".join(measured)
        return build.conventions(config)["sample"]["guidance"]

    told = {folder: sampler_of(dd.Artefact.load(folder)).about["sampling"]["guidance"] for folder in folders}
    assert [said(folder) for folder in folders] == [told[folder] for folder in folders]
    assert said(*folders) == told == dict(zip(folders, [{"scale": 1.0}, {"scale": 2.0}], strict=True))
    assert said(*folders, guidance=3.0) == {"scale": 3.0}


def config_of(**sample: Any) -> Any:
    """A config that samples."""
    return build.config_of(None, None, None, {"name": "digits"}, {"name": "digits"}, **sample)


def test_students_are_exported_with_their_scale(tmp_path: Path) -> None:
    """As a function of the tree; to formats without a place for it they are not."""
    made = dd.api.exported(teacher(STUDENT_MODEL), tmp_path / "student.stablehlo", "stablehlo")
    assert made.difference < 1e-5
    assert "a scale from 1 to 3" in card.of_hub(Checkpoint(STUDENT_MODEL, {}, 0))
    assert "scale" not in card.of_hub(Checkpoint(MODEL, {}, 0))
    for form in ("onnx", "diffusers", "pytorch"):
        path = tmp_path / f"student{dd.api.EXPORTS[form]}"
        with pytest.raises(ValueError, match=f"the format {form} has no place"):
            dd.api.exported(teacher(STUDENT_MODEL), path, form)


@pytest.mark.fast
def test_what_a_run_will_need_counts_the_scales_parameters() -> None:
    ahead = Ahead(MODEL, dd.Guided(SCALES, 64), SETTINGS, teacher())
    assert ahead.parameters == sum(a.size for a in jax.tree.leaves(teacher().params)) + 2 * 16
    student, before = (forward_flops(model, teacher(model).params) for model in (STUDENT_MODEL, MODEL))
    assert ahead.flops() == 64 * (3 * student + 2 * before), "the student with its gradient, the teacher twice"


@pytest.mark.fast
@pytest.mark.parametrize("wide", [1, 2])
def test_a_network_is_called_once_to_see_whether_it_can_be_told_a_scale(wide: int) -> None:
    """Large ones take a second for each call, and a study asks several times."""
    calls = []

    class Counted(nn.Module):
        num_classes: int = NULL

        @nn.compact
        def __call__(self, z: Array, time: Array, cond: Any) -> Array:
            scale, _ = guided.parts(cond)
            calls.append(scale is not None)
            return nn.Dense(wide)(z)

    model = dd.Model(Counted(), (2, 2, 1))
    for _ in range(2):
        if wide == 1:
            assert dd.Guided(SCALES).student_of(model).guided == SCALES
        else:
            with pytest.raises(ValueError, match=r"cannot be told the scale.*must be \(1, 2, 2, 1\)"):
                dd.Guided(SCALES).student_of(model)
    assert calls == [True] * wide, "what failed is looked at again"


DEAF = dd.Model(toys.Perceptron(1, num_classes=NULL), (2, 2, 1), prediction="v")
ALONE = dd.Model(toys.Perceptron(1), (2, 2, 1), prediction="v")
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "an unconditional teacher": (lambda: dd.distill(teacher(ALONE), SOURCE, dd.Guided()), "unconditional"),
    "a teacher without a null condition": (
        lambda: dd.distill(teacher(dd.Model(Told(), (2, 2, 1), cond=0)), SOURCE, dd.Guided()),
        "needs `null`",
    ),
    "a guided teacher": (lambda: dd.distill(teacher(STUDENT_MODEL), SOURCE, dd.Guided()), "guided already"),
    "a network that cannot be told": (
        lambda: dd.distill(teacher(DEAF), SOURCE, dd.Guided()),
        r"network Perceptron cannot be told the scale.*student=Model\(network, \.\.\.\)",
    ),
    "a guided student that is trained": (lambda: dd.train(STUDENT_MODEL, SOURCE), r"is distilled.*Guided"),
    "an unconditional student": (lambda: dataclasses.replace(ALONE, guided=SCALES), "this model is unconditional"),
    "one scale": (lambda: dd.Guided(scales=2.0), r"must be \(least, largest\).*got 2\.0"),  # type: ignore[arg-type]
    "scales that fall": (lambda: dd.Guided(scales=(3.0, 1.0)), r"got \(3\.0, 1\.0\)"),
    "a scale that is not finite": (lambda: dd.Guided(scales=(1.0, np.inf)), r"got \(1\.0, inf\)"),
    "no scales": (lambda: dd.Guided(scales=None), r"must be \(least, largest\)"),  # type: ignore[arg-type]
    "a flag for a scale": (lambda: dd.Guided(scales=(True, 2.0)), r"got \(True, 2\.0\)"),
    "a student guided otherwise than its teacher": (
        lambda: dd.distill(teacher(), SOURCE, dd.Tract((4, 1), length=32), SETTINGS, student=STUDENT_MODEL),
        r"The student is guided for scales .*, but the teacher for None",
    ),
    "sampling at a scale that is no number": (
        lambda: denoiser_of(teacher(STUDENT_MODEL), guidance={"scale": np.nan}),
        "must be a finite number",
    ),
    "half a step": (lambda: dd.Guided(steps=0.5), "number of steps, got 0.5"),  # type: ignore[arg-type]
    "an unknown noise": (lambda: dd.Guided(noise="unifrom"), "Did you mean 'uniform'"),
    "adapters in stage one": (
        lambda: dd.distill(teacher(), SOURCE, dd.Guided(length=32), dataclasses.replace(SETTINGS, low_rank=2)),
        "the student has another network or model",
    ),
    "dropped labels": (
        lambda: dd.distill(teacher(), SOURCE, dd.Guided(length=32, label_dropout=0.1), SETTINGS),
        "guided already",
    ),
    "a null label": (
        lambda: dd.sample(teacher(STUDENT_MODEL), 4, guidance={"scale": 2.0, "null": 3}),
        "told a scale and nothing else, got scale, null",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_told(make: Callable[[], Any], said: str, toy_networks: None) -> None:
    with pytest.raises(ValueError, match=said):
        make()
