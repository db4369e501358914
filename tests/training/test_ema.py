"""Averages: their closed forms, exact weights, and when they begin anew."""

from __future__ import annotations

from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distill.methods.phases import AVERAGING, Phase
from diffusion_distill.training import ema

# --- averages


@pytest.mark.fast
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.9999, 0.999993])
def test_an_average_is_its_closed_form(momentum: float) -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, (60, 5)).astype(np.float32)
    rule, update = ema.rule("corrected", momentum), jax.jit(ema.update)
    average = ema.init({"w": jnp.full(5, 1e6)})  # where it starts from must never count
    for k, value in enumerate(values, start=1):
        average = update(average, {"w": value}, np.float32(rule(k)))
        ages = np.arange(k - 1, -1, -1)
        weights = momentum**ages
        expected = (weights[:, None] * values[:k].astype(np.float64)).sum(0) / weights.sum()
        chex.assert_trees_all_close(average.params["w"], expected, rtol=2e-6, custom_message=f"update {k}")
    assert int(average.count) == len(values)


@pytest.mark.fast
@pytest.mark.parametrize("momentum", [0.0, 0.9999])
def test_the_first_value_and_momentum_0_are_copied_bit_for_bit(momentum: float) -> None:
    values = np.random.default_rng(0).normal(0, 1, (3, 1000)).astype(np.float32)
    first, second = (np.float32(ema.rule("corrected", momentum)(k)) for k in (1, 2))
    average = ema.update(ema.init(jnp.asarray(values[0])), jnp.asarray(values[1]), first)
    chex.assert_trees_all_equal(average.params, values[1])
    again = ema.update(average, jnp.asarray(values[2]), second)
    assert bool((again.params == values[2]).all()) == (momentum == 0)


@pytest.mark.fast
def test_weights_of_every_rule_are_exact_and_the_first_value_is_copied() -> None:
    assert set(ema.RULES) == set(AVERAGING)
    for kind in AVERAGING:
        assert ema.rule(kind, 0.999)(1) == 1 and ema.rule(kind, 0.0)(7) == 1
    for momentum in (Fraction(1, 2), Fraction(9999, 10_000), Fraction(9_999_999, 10_000_000)):
        for k in (1, 2, 17, 1000):
            exact = float((1 - momentum) / (1 - momentum**k))
            assert ema.rule("corrected", float(momentum))(k) == pytest.approx(exact, rel=1e-8)  # of float(momentum)


@pytest.mark.fast
def test_averages_count_from_the_last_phase_that_began_them_anew() -> None:
    going_on = {"restart": False, "momentum": 0.5}
    phases = [
        Phase("first", 3, 1e-3, momentum=0.5),
        Phase("goes on", 4, 1e-3, **going_on),
        Phase("eval anew", 5, 1e-3, reset_average=True, **going_on),
        Phase("all anew", 2, 1e-3, momentum=0.5),
        Phase("goes on", 2, 1e-3, **going_on),
    ]
    rule, own = ema.rule("corrected", 0.5), ema.rule("corrected", 0.9)
    for number, done, counts in ((0, 0, (1, 1)), (1, 5, (6, 6)), (2, 7, (1, 8)), (3, 12, (1, 1)), (4, 14, (3, 3))):
        found = ema.Averaging(phases, number, {"own": 0.9}).at(done)
        assert found == {"eval": np.float32(rule(counts[0])), "own": np.float32(own(counts[1]))}


@pytest.mark.fast
def test_an_average_whose_first_update_was_skipped_copies_the_next_value() -> None:
    average = ema.update(ema.init(jnp.full(2, 1e6)), jnp.ones(2), np.float32(0.5))
    chex.assert_trees_all_equal(average.params, jnp.ones(2))


@pytest.mark.fast
def test_published_rules_of_averages() -> None:
    """BTD's: plain from the second value on; the mean since a window of n = 1/(1 - mu) began."""
    values = np.random.default_rng(0).normal(0, 1, (11, 3))
    plain, window = ema.init(jnp.full(3, 1e6)), ema.init(jnp.full(3, 1e6))
    expected = values[0]
    for k, value in enumerate(values):
        plain, window = (
            ema.update(average, jnp.float32(value), np.float32(ema.rule(kind, 0.75)(k + 1)))
            for average, kind in ((plain, "plain"), (window, "window"))
        )
        expected = 0.75 * expected + 0.25 * value
        chex.assert_trees_all_close(plain.params, expected, rtol=1e-7, atol=1e-6)
        chex.assert_trees_all_close(window.params, values[k // 4 * 4 : k + 1].mean(0), rtol=1e-7, atol=1e-6)


@pytest.mark.fast
def test_a_ramped_average_remembers_a_twentieth_of_the_past() -> None:
    """EDM's rule: beta = 0.5^(1/h) per update with a half-life h of at most 0.05 times the updates made before."""
    values, momentum = np.random.default_rng(0).normal(0, 1, (200, 3)), 0.5 ** (1 / 4)
    average, expected = ema.init(jnp.full(3, 1e6)), values[0]
    for made, value in enumerate(values):
        average = ema.update(average, jnp.float32(value), np.float32(ema.rule("ramped", momentum)(made + 1)))
        beta = 0.5 ** (1 / min(4, 0.05 * made)) if made else 0.0
        expected = beta * expected + (1 - beta) * value
        chex.assert_trees_all_close(average.params, expected, rtol=1e-7, atol=2e-6)


@pytest.mark.fast
def test_reset_forgets_at_the_next_value() -> None:
    average = ema.update(ema.init(jnp.zeros(2)), jnp.ones(2), np.float32(0.5))
    emptied = ema.reset(average)
    chex.assert_trees_all_equal(emptied.params, average.params)
    chex.assert_trees_all_equal(ema.update(emptied, jnp.full(2, 5.0), np.float32(0.5)).params, 5.0)
