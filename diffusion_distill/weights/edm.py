"""NVIDIA's published EDM networks (Karras et al., arXiv:2206.00364): snapshot files to models with parameters.

`ema` of a file is a wrapper around a network. The file holds the arguments it was made with (`_init_kwargs`), which
say which network it is. The wrapper's class gives the prediction, which is the meaning of the network's output F, and
the time input:

    wrapper        prediction   input        levels of the wrapper
    EDMPrecond     edm          EDMInput     sigma_min to sigma_max (0 to infinity)
    VPPrecond      eps          VPInput      s(epsilon_t) to s(1)
    VEPrecond      scaled_score VEInput      sigma_min to sigma_max (0.02 to 100)
    iDDPMPrecond   eps_var      IDDPMInput   the tabulated ones, buffer u

The model's process goes from 80 to 0.002, within these levels. Every argument, constant and array of a file
is used, compared with what the model does, or refused by name. Only `use_fp16` (we compute in float32) and the rates
of dropout (0 here, since a teacher does not train) are recorded without effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_distill.base.errors import choose, near_matches
from diffusion_distill.denoisers.model import Model
from diffusion_distill.formats import torch_pickle
from diffusion_distill.formats.torch_pickle import Module
from diffusion_distill.process import training_levels
from diffusion_distill.process.time_input import EDMInput, IDDPMInput, TimeInput, VEInput, VPInput
from diffusion_distill.process.ve import VE
from diffusion_distill.weights import edm_arguments, edm_layout
from diffusion_distill.weights.matching import Checkpoint, WeightsError

Constants = Mapping[str, Any]

MAX_BLOCKS = 128  # of a network; the largest published one has 37
MAX_STEPS = 2**14  # discrete times of a wrapper
TABLE_TOLERANCE = 1e-4  # relative, of the levels in `u`: sums of 1000 float32 terms
VP_TOLERANCE = 0.03  # relative: the files' levels lose digits near 0 in float32, 0.00098 for 0.00100
#: What only training reads.
TRAINING = ("dropout", "label_dropout")


@dataclass(frozen=True)
class Wrapper:
    """The properties of a class of wrappers.

    Attributes:
      prediction: what the network's output means.
      defaults: its own arguments.
      time_input: how the network is called.
      levels: (lowest, highest) noise level it is defined for.
      tolerance: relative tolerance of the levels stored in a file.
    """

    prediction: str
    defaults: Constants
    time_input: Callable[[Constants], TimeInput]
    levels: Callable[[Constants], tuple[float, float]]
    tolerance: float = 1e-4


def _given_levels(constants: Constants) -> tuple[float, float]:
    return constants["sigma_min"], constants["sigma_max"]


def _vp_input(constants: Constants) -> VPInput:
    return VPInput(constants["beta_d"], constants["beta_min"], constants["M"])


def _vp_levels(constants: Constants) -> tuple[float, float]:
    ends = training_levels.vp(
        VE(), np.array([1.0, 0.0]), constants["beta_d"], constants["beta_min"], constants["epsilon_t"]
    )
    return float(ends.sigma[0]), float(ends.sigma[1])


def _iddpm_input(constants: Constants) -> IDDPMInput:
    return IDDPMInput(constants["M"], constants["C_1"], constants["C_2"])


def _iddpm_levels(constants: Constants) -> tuple[float, float]:
    sigmas = _iddpm_input(constants).sigmas
    return float(sigmas[-2]), float(sigmas[0])


WRAPPERS = {
    "EDMPrecond": Wrapper(
        "edm",
        {"sigma_min": 0.0, "sigma_max": math.inf, "sigma_data": 0.5},
        lambda constants: EDMInput(constants["sigma_data"]),
        _given_levels,
    ),
    "VPPrecond": Wrapper(
        "eps",
        {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
        _vp_input,
        _vp_levels,
        tolerance=VP_TOLERANCE,
    ),
    "VEPrecond": Wrapper(
        "scaled_score", {"sigma_min": 0.02, "sigma_max": 100.0}, lambda constants: VEInput(), _given_levels
    ),
    "iDDPMPrecond": Wrapper("eps_var", {"C_1": 0.001, "C_2": 0.008, "M": 1000}, _iddpm_input, _iddpm_levels),
}


def read(path: str | Path, model: Model | None = None) -> Checkpoint:
    """Reads a snapshot file.

    Args:
      model: the model that the file must hold; by default any. Its process and dropout are not compared.

    Returns:
      The model, the file's or the given one, with its float32 parameters; `facts` is what the file says about itself.

    Raises:
      WeightsError: the file is damaged, unknown in any part, or holds another model than the given one, see
        `torch_pickle.read`.
      OSError: it cannot be opened.
    """
    wrapper = torch_pickle.read(path)
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused
            found, params = _model_and_params(wrapper)
    except (WeightsError, ValueError, TypeError, OverflowError) as error:
        raise WeightsError(f"{path}, {wrapper.class_name[:40]}: {error}") from error
    differences = _differences(found, model) if model else []
    if differences:
        advice = "To import what it holds, give its path and no model."
        raise WeightsError(f"{path} holds another model than expected: {'; '.join(differences)}. {advice}")
    facts = {"class": wrapper.class_name, "arguments": _for_json(wrapper.init_kwargs)}
    return Checkpoint(model or found, params, facts=facts)


def model_of(class_name: str, kwargs: Mapping[str, Any]) -> Model:
    """The model of a wrapper made with these arguments.

    Args:
      class_name: a name in `WRAPPERS`.
      kwargs: its `_init_kwargs`; `model_type` names the network.

    Raises:
      ValueError: unknown, missing or unfit arguments.
    """
    wrapper = choose("wrapper", class_name, WRAPPERS)
    network_class, network_kwargs = edm_arguments.network_arguments(class_name, kwargs)
    network = edm_arguments.network_of(network_class, network_kwargs)
    network = network.clone(**dict.fromkeys(TRAINING, 0.0))
    low, high = wrapper.levels(_constants(wrapper, kwargs))
    usual = VE()
    return Model(
        network,
        edm_arguments.image_shape_of(network_class, network_kwargs),
        VE(sigma_min=max(usual.sigma_min, low), sigma_max=min(usual.sigma_max, high)),
        wrapper.prediction,
        wrapper.time_input(_constants(wrapper, kwargs)),
    )


# ---------------------------------------------------------------- from a file


def _model_and_params(module: Module) -> tuple[Model, dict[str, Any]]:
    wrapper = choose("wrapper", module.class_name, WRAPPERS)
    _check_form(module, ("model",), ("u",) if "C_1" in wrapper.defaults else ())
    inner = module.modules["model"]
    kwargs = {"model_type": inner.class_name, **module.init_kwargs}
    _check_arguments(wrapper, kwargs)
    _check_constants(wrapper, kwargs, module)
    _check_network(module.class_name, kwargs, inner)
    _check_parts(inner)
    model = model_of(module.class_name, kwargs)
    _check_blocks(model, inner)
    params = edm_layout.to_params(model.network, model.shape, inner.tensors(), "its tensors")
    return model, jax.tree.map(_own, params)


def _own(view: np.ndarray) -> np.ndarray:
    """A copy that does not depend on the file, aligned so that JAX on CPU uses it without copying again."""
    space = np.empty(view.size + 16, np.float32)
    first = -space.ctypes.data % 64 // 4
    copy = space[first : first + view.size].reshape(view.shape)
    copy[...] = view
    return copy


def _constants(wrapper: Wrapper, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The wrapper's own numbers."""
    return {name: kwargs.get(name, value) for name, value in wrapper.defaults.items()}


def _check_form(module: Module, modules: tuple[str, ...], buffers: tuple[str, ...]) -> None:
    there = {"modules": (modules, module.modules), "buffers": (buffers, module.buffers)}
    there["parameters"] = ((), module.parameters)
    for kind, (wanted, found) in there.items():
        if set(wanted) != set(found):
            raise WeightsError(f"{kind} {_names(found)} instead of {_names(wanted)}")


def _check_arguments(wrapper: Wrapper, kwargs: Mapping[str, Any]) -> None:
    """The wrapper's own arguments; the others are those of its network."""
    for name in set(kwargs) & set(edm_arguments.WRAPPER_ARGUMENTS) - {"use_fp16"}:
        value, default = kwargs[name], choose("argument", name, wrapper.defaults)
        whole = type(default) is int
        if type(value) is not int and (whole or type(value) is not float):
            raise WeightsError(f"argument {name} is {_said(value)}, not a {'whole ' if whole else ''}number")
        if not value >= 0 or (whole and not 2 <= value <= MAX_STEPS):
            raise WeightsError(f"argument {name} is {_said(value)}, out of range")
    if type(kwargs.get("use_fp16", False)) is not bool:
        raise WeightsError(f"argument use_fp16 is {_said(kwargs['use_fp16'])}, not true or false")


def _check_constants(wrapper: Wrapper, kwargs: Mapping[str, Any], module: Module) -> None:
    """The attributes that the wrapper computes with are those of its arguments, and its table is ours."""
    constants = _constants(wrapper, kwargs)
    low, high = wrapper.levels(constants)
    wanted = {"use_fp16": False, "label_dim": 0, **kwargs, **constants, "sigma_min": low, "sigma_max": high}
    for name, value in module.attributes.items():
        if name == "training":
            continue
        if name not in wanted:
            raise WeightsError(f"an unknown attribute {_said(name)}{near_matches(name, wanted)}")
        tolerance = wrapper.tolerance if name in ("sigma_min", "sigma_max") else 0.0
        if not _close(value, wanted[name], tolerance):
            raise WeightsError(f"attribute {name} is {_said(value)}, but its arguments give {_said(wanted[name])}")
    if "u" in module.buffers:
        sigmas, stored = _iddpm_input(constants).sigmas, module.buffers["u"]
        if stored.shape != sigmas.shape or not np.allclose(stored, sigmas, rtol=TABLE_TOLERANCE, atol=0):
            raise WeightsError("buffer u holds other noise levels than M, C_1 and C_2 give")


def _check_network(class_name: str, kwargs: Mapping[str, Any], inner: Module) -> None:
    """The network was made with what the wrapper says."""
    network_class, wanted = edm_arguments.network_arguments(class_name, kwargs)
    if network_class != inner.class_name:
        raise WeightsError(f"model_type is {_said(network_class)}, but the network is {_said(inner.class_name)}")
    defaults, found = choose("network", network_class, edm_arguments.ARGUMENTS), inner.init_kwargs
    pairs = {n: [_listed(made.get(n, defaults.get(n))) for made in (wanted, found)] for n in {**wanted, **found}}
    differing = [f"{name} {_said(one)} and {_said(other)}" for name, (one, other) in pairs.items() if one != other]
    if differing:
        raise WeightsError(f"wrapper and network were made with different arguments: {'; '.join(differing[:8])}")


def _check_blocks(model: Model, inner: Module) -> None:
    """A network is traced only if the file has its blocks: the time it takes is theirs."""
    there = sum(part.class_name == "UNetBlock" for _, part in inner.walk())
    claimed = model.network.num_res_blocks * len(model.network.ch_mult)  # type: ignore[attr-defined]
    if not claimed <= there <= MAX_BLOCKS:
        raise WeightsError(f"a network of {claimed} blocks, but {there} are there; at most {MAX_BLOCKS} are read")


#: network -> part -> what its attributes must be, because ours computes so.
FIXED: dict[str, dict[str, Constants]] = {
    "SongUNet": {
        "PositionalEmbedding": {"max_positions": 10_000, "endpoint": True},
        "GroupNorm": {"eps": 1e-6},
        "UNetBlock": {"skip_scale": math.sqrt(0.5), "adaptive_scale": False},
    },
    "DhariwalUNet": {
        "PositionalEmbedding": {"max_positions": 10_000, "endpoint": False},
        "GroupNorm": {"eps": 1e-5},
        "UNetBlock": {"skip_scale": 1, "adaptive_scale": True},
    },
}
PARTS = ("PositionalEmbedding", "FourierEmbedding", "Linear", "Conv2d", "GroupNorm", "UNetBlock", "ModuleDict")


def _check_parts(inner: Module) -> None:
    """Checks what shapes cannot show: the parts use the same constants as ours."""
    for prefix, part in inner.walk():
        where = prefix.removesuffix(".") or "the network"
        if part is not inner and part.class_name not in PARTS:
            raise WeightsError(f"{where} is of an unknown class {_said(part.class_name)}; known: {', '.join(PARTS)}")
        wanted = {**FIXED[inner.class_name].get(part.class_name, {}), **_by_width(inner, part)}
        for name, value in wanted.items():
            if not _close(part.attributes.get(name), value, 1e-9):
                found = _said(part.attributes.get(name))
                raise WeightsError(f"{where} has {name} {found}, but {inner.class_name} computes with {value}")


def _by_width(inner: Module, part: Module) -> dict[str, int]:
    """Attributes that follow from a part's number of channels: groups of a norm, heads of an attention."""
    if part.class_name == "GroupNorm" and "weight" in part.parameters:
        return {"num_groups": min(32, part.parameters["weight"].size // 4)}
    if part.class_name == "UNetBlock" and "qkv" in part.modules and "weight" in part.modules["qkv"].parameters:
        channels = part.modules["qkv"].parameters["weight"].shape[0] // 3
        return {"num_heads": channels // 64 if inner.class_name == "DhariwalUNet" else 1}
    return {}


# ---------------------------------------------------------------- parts


def _close(value: Any, wanted: Any, tolerance: float) -> bool:
    """Whether a value read from a file is a number equal to the expected one."""
    numbers = all(type(number) in (int, float, bool) for number in (value, wanted))
    return numbers and math.isclose(value, wanted, rel_tol=tolerance)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _differences(found: Model, wanted: Model) -> list[str]:
    """The differences between two models, except in process, dropout and precision."""
    one, other = dict(_leaves(found.to_dict())), dict(_leaves(wanted.to_dict()))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    ignored = ("process", *(f"network.{name}" for name in (*TRAINING, "dtype")))
    names = [name for name in names if not name.startswith(ignored)]
    return [f"{name} is {_said(one.get(name))} instead of {_said(other.get(name))}" for name in names]


def _leaves(description: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in description.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, _listed(value)


def _for_json(value: Any) -> Any:
    """A copy for JSON, with infinity and NaN as text."""
    if isinstance(value, Mapping):
        return {name: _for_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _said(value: Any) -> str:
    return repr(value)[:80]


def _names(names: Any) -> str:
    return ", ".join(list(names)[:8]) or "none"
