"""Quantisation against whole arithmetic and the numbers recorded of published programs."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import places
import pytest

from diffusion_distill.data.quantise import RULES, quantise

GOLDEN = places.GOLDEN / "eval" / "quantise.npz"
RECORDED = {
    "round_half_up": "floor_127p5x_plus_128",
    "round_half_even": "round_127p5_x_plus_1",
    "truncate": "trunc_127p5_x_plus_1",
    "truncate_unit": "trunc_255u",
}
DYADIC = np.arange(-1100, 1101) / 1024  # exact in binary, among them ties and values outside


def level(x: Fraction, rule: str) -> int:
    """The rule in rational numbers."""
    exact = (x + 1) * 255 / 2
    whole = {"round_half_up": (exact + Fraction(1, 2)).__floor__, "round_half_even": exact.__round__}
    return min(max(whole.get(rule, exact.__floor__)(), 0), 255)


@pytest.mark.fast
@pytest.mark.parametrize("array", [lambda x: x, lambda x: jnp.asarray(x, jnp.float32)], ids=["host", "device"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_in_rational_numbers(rule: str, array: Callable[[np.ndarray], Any]) -> None:
    found = quantise(array(DYADIC), rule)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, [level(Fraction(float(x)), rule) for x in DYADIC])


@pytest.mark.fast
def test_ties_and_the_default() -> None:
    ties = (np.arange(255) + 0.5) / 127.5 - 1
    ties = ties[(ties + 1) * 127.5 == np.arange(255) + 0.5]  # those that float64 represents
    assert len(ties) > 50
    difference = quantise(ties).astype(int) - quantise(ties, "round_half_even")
    assert set(difference) == {0, 1}


@pytest.mark.fast
@pytest.mark.parametrize("rule", ["round_half_up", "round_half_even"])
def test_every_grey_level_comes_back_where_the_rule_rounds(rule: str) -> None:
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(quantise(levels / np.float32(127.5) - 1, rule), levels)
    np.testing.assert_array_equal(quantise(levels, rule), levels)


@pytest.mark.parametrize("rule", RULES)
def test_recorded_levels(rule: str) -> None:
    if not GOLDEN.is_file():
        pytest.skip("needs quantise.npz in the optional sibling folder ../shared/golden/eval")
    with np.load(GOLDEN) as recorded:
        np.testing.assert_array_equal(quantise(recorded["x"], rule), recorded[RECORDED[rule]])


@pytest.mark.fast
def test_what_has_no_grey_level_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        quantise(np.array([0.0, np.nan]))
    with pytest.raises(TypeError, match="int64"):
        quantise(np.arange(3))
    with pytest.raises(ValueError, match="Did you mean 'truncate'"):
        quantise(np.zeros(1), "truncat")
