"""How a model is sampled, as one value: the same by keywords, as a value, from a config and from a plain dictionary."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
import toys

import diffusion_distill as dd
from diffusion_distill import api
from diffusion_distill.api.sampling import sampler_of
from diffusion_distill.cli import build
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process.processes import Cosine
from diffusion_distill.training.artefact import Artefact

pytestmark = pytest.mark.fast

#: Each field with a value that is not its default.
FIELDS: dict[str, Any] = {
    "solver": "deis order=2",
    "steps": 3,
    "spacing": "quadratic",
    "end": 0.01,
    "clip": False,
    "threshold": 0.9,
    "guidance": {"scale": 3.0, "null": 2},
}


@pytest.fixture(scope="module")
def labelled() -> Artefact:
    model = Model(toys.Perceptron(1, num_classes=3), (2, 2, 1), Cosine(-8, 8), "v")
    params = jax.tree.map(lambda a: 3 * a, toys.parameters(model))  # so that x_hat leaves [-1, 1]
    return Artefact(model, params)


def test_every_field_is_tried() -> None:
    assert {field.name for field in dataclasses.fields(dd.SamplerSpec)} == {*FIELDS, "fitted"}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_acts_the_same_wherever_it_is_given(name: str, labelled: Artefact) -> None:
    """By keyword, in the value, through JSON and from the command line's config; and it does act."""
    cond, how = np.arange(4) % 3, {"steps": 4, name: FIELDS[name]}
    drawn = dd.sample(labelled, 4, cond=cond, **how)
    assert np.isfinite(drawn).all()
    spec = dd.SamplerSpec(**how)
    again = dd.SamplerSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    flat = {**how, **({"guidance": 3.0, "null": 2} if name == "guidance" else {})}
    config = build.config_of(None, None, None, {"name": "digits"}, {"name": "digits"}, **flat)
    assert spec == again == build.spec(config)
    np.testing.assert_array_equal(dd.sample(labelled, 4, cond=cond, spec=again), drawn)
    about = sampler_of(labelled, spec).about
    assert dd.SamplerSpec.from_dict(about["sampling"]) == spec.complete(0)
    assert np.abs(dd.sample(labelled, 4, 4, cond=cond) - drawn).max() > 1e-4


def test_a_fitted_solver_says_how_it_was_fitted(labelled: Artefact) -> None:
    how = {"threshold": 0.9, "guidance": {"scale": 2.0, "null": 2}, "spacing": "quadratic"}
    settings = dd.FitSettings(scale=2, batch_size=8)
    fits = [dd.fit_solver(labelled, "ddim", 3, settings, **how),
            dd.fit_solver(labelled, settings=settings, spec=dd.SamplerSpec("ddim", 3, **how))]  # fmt: skip
    np.testing.assert_array_equal(fits[0].lambdas, fits[1].lambdas)
    assert {name: fits[0].provenance[name] for name in how} == how
    assert np.abs(fits[0].lambdas - dd.fit_solver(labelled, "ddim", 3, settings).lambdas).max() > 1e-4
    drawn = dd.sample(labelled, 4, spec=dd.SamplerSpec(fitted=fits[0], **how))
    np.testing.assert_array_equal(dd.sample(labelled, 4, fitted=fits[0], **{**how, "spacing": None}), drawn)
    with pytest.warns(UserWarning, match="fitted with the guidance .*'scale': 2.0.*, but samples with {'scale': 1.0}"):
        dd.sample(labelled, 4, fitted=fits[0])


def test_a_classifier_guides_where_one_is_given(labelled: Artefact) -> None:
    def brighter(z: Any, level: Any, cond: Any) -> Any:
        return level.alpha * z.sum(axis=(1, 2, 3))  # its gradient moves x_hat up by s·sigma²

    guided = {"scale": 0.5, "classifier": brighter}
    plain, pulled = (dd.sample(labelled, 4, 4, guidance=how) for how in (None, guided))
    assert pulled.mean() > plain.mean() + 0.05
    assert dd.SamplerSpec(guidance=guided).to_dict()["guidance"] == {"scale": 0.5, "classifier": "function"}


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a typo": ({"sovler": "ddim"}, TypeError, "no setting 'sovler'. Did you mean 'solver'"),
    "a typo in guidance": ({"guidance": {"scal": 2.0}}, ValueError, "Did you mean 'scale'"),
    "a number as guidance": ({"guidance": 2.0}, TypeError, "guidance must be a mapping"),
    "no scale": ({"guidance": {"null": 0}}, ValueError, "guidance needs a scale"),
    "a text as scale": ({"guidance": {"scale": "2"}}, TypeError, "scale of guidance must be a number"),
    "another label than there are": ({"guidance": {"scale": 2.0, "null": 4}}, ValueError, r"in \[0, 3\]"),
    "an unknown solver": ({"solver": "dies"}, ValueError, "Did you mean 'deis'"),
    "an unknown option": ({"solver": "deis ordr=2"}, TypeError, "no option 'ordr'"),
    "a negative end": ({"end": -0.1}, ValueError, "at least 0"),
    "a quantile": ({"threshold": 1.5}, ValueError, r"in \[0, 1\]"),
    "steps": ({"steps": -1}, ValueError, "steps must be a whole number"),
}


@pytest.mark.parametrize(("fields", "kind", "said"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_refused(
    fields: dict[str, Any], kind: type[Exception], said: str, labelled: Artefact
) -> None:
    with pytest.raises(kind, match=said):
        dd.sample(labelled, 2, **fields)
    with pytest.raises(kind, match=said):
        api.denoiser_of(labelled, **fields)
