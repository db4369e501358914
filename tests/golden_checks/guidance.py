"""Fixtures of guidance (folder ddpm): guidance.npz.

The network and the classifier are the README's. What denoisers answer is read as noise. In float64 the README's 1e-9;
it gives nothing for float32: 2e-6, and for noise that is read off x_hat divided by sigma, as the noise is z less
alpha·x_hat over sigma, where these float32 numbers are rounded.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from flax import struct

from diffusion_distill.base.arrays import expand, namespace
from diffusion_distill.denoisers.guidance import ClassifierFree, ClassifierGuided, label_log_prob
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import eps_from_x
from diffusion_distill.process.processes import LinearBetaDiscrete
from golden_checks.common import DEFAULT_FLOAT32, FLOAT64, Fixture, Formula, Kind, Mode, Rule, absolute

#: The fixture's words for the package's predictions.
TYPES = {"noise": "eps", "x_start": "x", "v": "v", "score": "score"}
PLAIN = absolute(1e-9)


def check_guidance(fixture: Fixture, mode: Mode) -> None:
    process = schedule_of_betas(fixture)
    level = process.level(mode.array(fixture.input("t")))
    z, labels = to_nhwc(mode.array(fixture.input("x"))), mode.array(fixture.input("y"))
    network, classifier = Network(process, mode.array(fixture.input("bias"))), classifier_of(fixture, mode, process)
    if mode is FLOAT64:
        check_levels(fixture, process, level)
    unconditional, conditional = network.unconditional("eps"), network.conditional()
    guided = partial(ClassifierGuided, log_prob=classifier)
    free = partial(ClassifierFree, conditional, null=fixture.meta["null_class"])
    scales = [float(s) for s in fixture.input("classifier_scales")]

    def compare(key: str, *denoisers: Any, where: Level = level) -> None:
        found = np.stack([to_nchw(eps_from_x(z, denoise(z, where, labels), where)) for denoise in denoisers])
        fixture.compare(key, found if len(denoisers) > 1 else found[0], mode, eps_rule(mode, where))

    compare("uncond", unconditional)
    for key, prediction in TYPES.items():
        compare(f"type/{key}", network.unconditional(prediction))
    rule = PLAIN if mode is FLOAT64 else DEFAULT_FLOAT32
    fixture.compare("classifier_log_prob", classifier(z, level, labels), mode, rule)
    gradient = guided(unconditional, scale=1.0).gradient(z, level, labels)
    fixture.compare("classifier_grad", to_nchw(gradient), mode, rule)
    compare("classifier", *(guided(unconditional, scale=s) for s in scales))
    compare("classifier_conditional_net", *(guided(conditional, scale=s) for s in scales))
    compare("classifier_free", *(free(scale=float(s)) for s in fixture.input("cfg_scales")))
    if "discrete_t" in fixture:
        where = process.level(mode.array((fixture.input("discrete_t") + 1.0) / process.steps))
        compare("discrete_classifier", guided(unconditional, scale=float(fixture.input("discrete_scale"))), where=where)


def check_levels(fixture: Fixture, process: LinearBetaDiscrete, level: Level) -> None:
    """What the host knows before anything is denoised."""
    fixture.compare("alpha", level.alpha, FLOAT64, PLAIN)
    fixture.compare("sigma", level.sigma, FLOAT64, PLAIN)
    fixture.compare("model_time", told(process, level), FLOAT64, PLAIN)
    if "discrete_alpha_bar" in fixture:
        discrete = process.level((fixture.input("discrete_t") + 1.0) / process.steps)
        fixture.compare("discrete_alpha_bar", discrete.alpha**2, FLOAT64, PLAIN)


# ------------------------------------------------------------------------------------------------- parts


def schedule_of_betas(fixture: Fixture) -> LinearBetaDiscrete:
    """The process of the recorded betas, which the comparisons of alpha and sigma hold to."""
    betas = fixture.input("betas")
    return LinearBetaDiscrete(len(betas), float(betas[0]), float(betas[-1]), logsnr_max=math.inf)


def told(process: LinearBetaDiscrete, level: Level) -> Any:
    """What the README's network and classifier are told: the index, from 0."""
    return process.steps * process.time(level) - 1


class Network(struct.PyTreeNode):
    """The README's network as denoisers.

    Attributes:
      bias: [classes, channels], the null class last.
    """

    process: LinearBetaDiscrete = struct.field(pytree_node=False)
    bias: Any

    def conditional(self) -> Any:
        """With a class, predicting noise."""
        return Formula(self._output, "eps").denoiser(self.bias)

    def unconditional(self, prediction: str) -> Any:
        """Without a class; what it answers is read as a prediction."""
        return Formula(self._output, prediction).denoiser(None)

    def _output(self, prediction: str, bias: Any, z: Any, level: Level, labels: Any) -> Any:
        output = 0.5 * z + 0.1 * expand(namespace(z).sin(told(self.process, level) / 100), z)
        if bias is not None:
            output = output + bias[labels][:, None, None, :]
        return output


class Classifier(struct.PyTreeNode):
    """The README's classifier.

    Attributes:
      weights: [height, width, channels, classes]; bias: [classes].
    """

    process: LinearBetaDiscrete = struct.field(pytree_node=False)
    weights: Any
    bias: Any

    def __call__(self, z: Any, level: Level, labels: Any) -> Any:
        slope = 1 - told(self.process, level) / 2000
        logits = namespace(z).tensordot(z, self.weights, 3) * slope[:, None] + self.bias
        return label_log_prob(logits, labels)


def classifier_of(fixture: Fixture, mode: Mode, process: LinearBetaDiscrete) -> Classifier:
    """The classifier, whose weights stand in the originals' order of channel, height, width."""
    shape = fixture.arrays["x"].shape[1:]
    weights = mode.array(fixture.input("W")).reshape(*shape, -1).transpose(1, 2, 0, 3)
    return Classifier(process, weights, mode.array(fixture.input("b")))


def eps_rule(mode: Mode, level: Level) -> Rule:
    """For noise read off x_hat."""
    if mode is FLOAT64:
        return PLAIN
    sigma = np.asarray(level.sigma, np.float64)[:, None, None, None]
    text = "·max(1, max|ref|)/sigma (the README gives none; eps is read off x_hat)"
    return Rule(DEFAULT_FLOAT32.bound, text, lambda ref: DEFAULT_FLOAT32.scale(ref) / sigma)


def to_nhwc(images: Any) -> Any:
    """[batch, channels, height, width] to the package's layout."""
    return images.transpose(0, 2, 3, 1)


def to_nchw(images: Any) -> np.ndarray:
    """The inverse of `to_nhwc`."""
    return np.asarray(images).transpose(0, 3, 1, 2)


# -------------------------------------------------------------------------------------------- what there is


def _is_guidance(fixture: Fixture) -> bool:
    return "classifier_scales" in fixture and "cfg_scales" in fixture and "null_class" in fixture.meta


KINDS = [Kind("guidance", _is_guidance, check_guidance)]
