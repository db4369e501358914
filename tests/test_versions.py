"""What setup.py requires, and the versions that `make test-versions` derives from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import conftest
import pytest
import versions
from packaging.requirements import Requirement

#: What Colab's runtimes have (CPU, GPU and TPU alike), Python 3.13.
COLAB = {
    "jax": "0.7.2",
    "flax": "0.11.2",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.4",
    "numpy": "2.1.0",
}


def test_installing_leaves_what_colab_has() -> None:
    required = {part.name: part.specifier for part in map(Requirement, versions.requirements()[""])}
    refused = {name: str(required[name]) for name, version in COLAB.items() if version not in required[name]}
    assert not refused


def test_the_lower_bounds_are_colabs() -> None:
    bounds = versions.lower_bounds(versions.requirements()[""])
    assert {f"jax=={COLAB['jax']}", f"flax=={COLAB['flax']}", f"optax=={COLAB['optax']}"} <= set(bounds)


def test_every_requirement_has_one_lower_bound() -> None:
    for extra, requirements in versions.requirements().items():
        assert len(versions.lower_bounds(requirements)) == len(requirements), extra


def test_chex_is_for_development_only() -> None:
    users = {extra for extra, needs in versions.requirements().items() if any(n.startswith("chex") for n in needs)}
    assert users == {"test", "dev"}


def test_lower_bounds() -> None:
    found = versions.lower_bounds(["jax>=0.7.2", "orbax-checkpoint >=0.12.4,<1", "pyright[nodejs]==1.1.414"])
    assert found == ["jax==0.7.2", "orbax-checkpoint==0.12.4", "pyright==1.1.414"]


@pytest.mark.parametrize("requirement", ["tqdm", "tqdm<5", "tqdm>=4,>=5"])
def test_a_requirement_without_a_lower_bound_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match=r"'tqdm.*' needs one lower bound"):
        versions.lower_bounds([requirement])


def test_an_unknown_run_is_told_what_is_allowed() -> None:
    with pytest.raises(SystemExit, match=r"Unknown: oldest\. Allowed: lowest, newest"):
        versions.main(["oldest"])


def test_one_of_each_keeps_the_first_parameters_and_all_of_other_packages() -> None:
    def item(name: str, *marks: str) -> Any:
        return SimpleNamespace(nodeid=f"test_file.py::{name}", get_closest_marker=lambda mark: (mark in marks) or None)

    items = [item("one[a]"), item("one[b]"), item("two"), item("three[a]", "packages"), item("three[b]", "packages")]
    config = mock.Mock()
    conftest.keep_one_of_each(config, found := list(items))
    assert found == [items[k] for k in (0, 2, 3, 4)]
    config.hook.pytest_deselected.assert_called_once_with(items=[items[1]])
