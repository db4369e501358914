"""Pure functions with and without jit, from NumPy and from device arrays, over several devices: chex's variants.

Every variant is held against the same right value: a closed form, or the float64 value on the host. Single solver steps
have theirs in test_steps.py.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from diffusion_distill.base.arrays import namespace
from diffusion_distill.denoisers.guidance import ClassifierFree
from diffusion_distill.methods import progressive, targets
from diffusion_distill.process import grids, noising, predictions, weighting
from diffusion_distill.process.levels import Level, from_logsnr
from diffusion_distill.process.processes import (
    VE,
    Cosine,
    DiscreteBetas,
    IDDPMCosine,
    LinearBeta,
    LinearBetaDiscrete,
    Process,
    RectifiedFlow,
)
from diffusion_distill.process.vp_discrete import LinearAlphaDiscrete
from diffusion_distill.training import ema

pytestmark = pytest.mark.fast

PROCESSES = {
    type(process).__name__: process
    for process in (
        *(Cosine(), LinearBeta(), LinearBetaDiscrete(), LinearAlphaDiscrete(), IDDPMCosine()),
        *(DiscreteBetas("cosine", logsnr_min=-10.2), VE(1.0), RectifiedFlow(3.0)),
    )
}
every_schedule = parameterized.named_parameters(*PROCESSES.items())
LOGSNR = np.array([-15.0, -4.0, 0.0, 3.0, 12.0], np.float32)
LEVELS = from_logsnr(LOGSNR.astype(np.float64))
SINGLE = Level(*map(np.float32, LEVELS))
X, EPS = np.random.default_rng(0).standard_normal((2, 5, 3, 3, 2)).astype(np.float32)
Z = noising.diffuse(X, EPS, SINGLE)


class Schedules(chex.TestCase):
    @chex.all_variants
    @every_schedule
    def test_levels(self, process: Process) -> None:
        t = np.linspace(0.05, 1, 20, dtype=np.float32)
        level = self.variant(process.level)(t)
        chex.assert_shape(level, (20,))
        if isinstance(level.alpha, jax.Array):  # NumPy arrays may become float64
            chex.assert_type(list(level), jnp.float32)
        chex.assert_trees_all_close(level, process.level(t.astype(np.float64)), rtol=5e-6)

    @chex.all_variants
    @every_schedule
    def test_times_are_the_inverse(self, process: Process) -> None:
        t = np.linspace(0.05, 1, 20)
        found = self.variant(process.time)(Level(*map(np.float32, process.level(t))))
        chex.assert_shape(found, (20,))
        chex.assert_trees_all_close(found, t.astype(np.float32), rtol=0, atol=1e-6)

    @chex.all_variants
    def test_logsnr_and_back(self) -> None:
        level = self.variant(from_logsnr)(LOGSNR)
        chex.assert_trees_all_close(level, LEVELS, rtol=2e-6)
        chex.assert_trees_all_close(np.asarray(level.logsnr), LOGSNR, rtol=1e-6, atol=2e-6)


class Noising(chex.TestCase):
    @chex.all_variants
    def test_diffuse(self) -> None:
        z = self.variant(noising.diffuse)(X, EPS, SINGLE)
        chex.assert_equal_shape([z, X])
        chex.assert_trees_all_close(z, np.float32(noising.diffuse(np.float64(X), EPS, LEVELS)), rtol=1e-5, atol=1e-6)

    @chex.all_variants
    def test_a_step_along_the_image_itself_keeps_the_noise(self) -> None:
        later = from_logsnr(np.float64(LOGSNR) + 2)
        moved = self.variant(noising.ddim_step)(Z, X, SINGLE, Level(*map(np.float32, later)))
        chex.assert_trees_all_close(moved, np.float32(noising.diffuse(X, EPS, later)), rtol=1e-5, atol=1e-5)

    @chex.all_variants
    @parameterized.named_parameters(*((name, name) for name in predictions.PREDICTIONS))
    def test_what_a_network_says_of_the_image(self, prediction: str) -> None:
        raw = predictions.raw_of(prediction, X, EPS, SINGLE)
        found = self.variant(lambda raw, z, level: predictions.to_x(prediction, raw, z, level))(raw, Z, SINGLE)
        chex.assert_equal_shape([found, X])
        # x of eps divides rounding by alpha
        slack = SINGLE.expand(X).alpha if predictions.predicts_noise(prediction) else 1.0
        chex.assert_trees_all_close(np.asarray(found) * slack, X * slack, rtol=0, atol=2e-6)

    @chex.all_variants
    @parameterized.named_parameters(*((name, name) for name in weighting.WEIGHTINGS))
    def test_weights(self, name: str) -> None:
        found = self.variant(lambda level: weighting.of(name, level, 0.5))(SINGLE)
        chex.assert_trees_all_close(np.broadcast_to(found, 5), weighting.of(name, LEVELS, 0.5) * np.ones(5), rtol=5e-6)


def halved(z: chex.Array, level: Level, labels: chex.Array | None = None) -> chex.Array:
    """A denoiser; its classes shift the image."""
    shift = 0.0 if labels is None else namespace(z, labels).where(labels == 3, 0.0, labels)[:, None, None, None]
    return 0.5 * z + 0.25 * shift


class Targets(chex.TestCase):
    @chex.all_variants
    def test_a_target_takes_one_step_where_two_steps_lead(self) -> None:
        rows = progressive.rows(grids.make_grid(Cosine(), 16)).at(np.arange(1, 6))  # the first row ends at zero noise
        end = Cosine().level(np.arange(1, 6) / 8)
        z = np.float32(Z)
        target = self.variant(lambda rows, z: targets.target(rows, z, halved, halved))(
            jax.tree.map(np.float32, rows._replace(count=0)), z
        )
        middle = noising.ddim_step(np.float64(z), halved(np.float64(z), rows.t), rows.t, rows.m)
        there = noising.ddim_step(middle, halved(middle, rows.m), rows.m, end)
        found = noising.ddim_step(np.float64(z), np.float64(target), rows.t, end)
        chex.assert_type(target, jnp.float32)
        chex.assert_trees_all_close(found, there, rtol=0, atol=1e-6)

    @chex.all_variants
    def test_guidance_extrapolates(self) -> None:
        labels = np.arange(5, dtype=np.int32) % 3
        free = self.variant(lambda z, level, labels: ClassifierFree(halved, 2.0, null=3)(z, level, labels))
        found = free(Z, SINGLE, labels)
        expected = 0.5 * Z + 2 * 0.25 * labels[:, None, None, None]
        chex.assert_trees_all_close(found, np.float32(expected), rtol=0, atol=2e-6)


class Averages(chex.TestCase):
    @chex.all_variants(without_device=False)  # type: ignore[call-arg]
    @parameterized.named_parameters(("none", 0.0), ("short", 0.5), ("long", 0.9999))
    def test_the_average_of_two_values(self, momentum: float) -> None:
        values = np.random.default_rng(1).standard_normal((2, 7)).astype(np.float32)
        update, rule = self.variant(ema.update), ema.rule("corrected", momentum)
        average = ema.init({"w": jnp.full(7, 1e6)})
        for k, value in enumerate(values, start=1):
            average = update(average, {"w": value}, np.float32(rule(k)))
        expected = (momentum * values[0] + values[1]) / (1 + momentum)
        chex.assert_trees_all_close(average.params, {"w": expected}, rtol=2e-6)
        chex.assert_trees_all_equal(average.count, np.int32(2))
