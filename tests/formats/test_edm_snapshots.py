"""Snapshots of EDM's networks are read bit for bit; a snapshot of another model is refused, saying why."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import edm_tensors
import numpy as np
import pytest
import snapshots
from weight_files import FULL_EDM, Flat, assert_same, needs_full, random_arrays, sha256, spoil

from diffusion_distill import weights
from diffusion_distill.api import import_weights
from diffusion_distill.formats import torch_pickle
from diffusion_distill.process import edm_grids
from diffusion_distill.process.processes import VE
from diffusion_distill.process.time_input import VPInput
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.weights import (
    Fetched,
    WeightsError,
    edm,
    matching,
)

RECORDED = ("ddpmpp_edm", "ncsnpp_edm", "adm_edm", "ddpmpp_vp", "ncsnpp_ve", "adm_iddpm", "views_edm")


@needs_full
@pytest.mark.fast
@pytest.mark.parametrize("name", [*RECORDED, "ddpmpp_edm_torch2"])
def test_recorded_snapshots_are_read_bit_for_bit(name: str) -> None:
    facts = json.loads((FULL_EDM / "pickles" / "expected.json").read_text())["files"][f"{name}.pkl"]
    wrapper = torch_pickle.read(FULL_EDM / "pickles" / f"{name}.pkl")
    assert (wrapper.class_name, wrapper.modules["model"].class_name) == (facts["precond_class"], facts["model_class"])
    assert wrapper.init_kwargs == facts["init_kwargs"]
    assert {n: float(wrapper.attributes[n]) for n in ("sigma_min", "sigma_max")} == {
        n: float(facts[n]) for n in ("sigma_min", "sigma_max")
    }
    tensors = wrapper.tensors()
    assert list(tensors) == list(facts["tensors"])
    for tensor, array in tensors.items():
        expected = facts["tensors"][tensor]
        assert [list(array.shape), str(array.dtype)] == [expected["shape"], expected["dtype"]]
        assert sha256(array) == expected["sha256"], tensor
        assert not array.flags.writeable


@pytest.mark.fast
def test_views_are_the_elements_that_size_and_strides_say() -> None:
    rng = np.random.default_rng(0)
    storage = np.arange(100, dtype=np.float32)
    for _ in range(200):
        size = tuple(rng.integers(1, 5, rng.integers(0, 4)).tolist())
        stride = tuple(rng.integers(0, 12, len(size)).tolist())
        offset = int(rng.integers(0, 20))
        wanted = np.full(size, np.float32(offset))
        for index in np.ndindex(size):
            wanted[index] += sum(n * step for n, step in zip(index, stride, strict=True))
        if wanted.max() > 99:
            with pytest.raises(WeightsError, match="not in its storage of 100 elements"):
                torch_pickle.as_tensor(storage, offset, size, stride)
        else:
            np.testing.assert_array_equal(torch_pickle.as_tensor(storage, offset, size, stride), wanted)
    assert torch_pickle.as_tensor(storage, 99, (1, 1), (2**70, 5)).item() == 99  # steps that are never taken


KWARGS = {"model_channels": 4, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1}
KWARGS |= {"img_resolution": 8, "img_channels": 3, "label_dim": 2}
#: What wrappers are made with, and what they then tell of their range: EDM.md, section 1, in golden/edm.
CONSTANTS = {
    "EDMPrecond": {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
}
RANGES = {"VPPrecond": (0.0009765625, 152.16697692871094), "iDDPMPrecond": (0.006422337144613266, 20291.169921875)}


@cache
def shapes_in(wrapper: str, network: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a network made with `KWARGS`."""
    model = edm.model_of(wrapper, {**KWARGS, "model_type": network})
    return edm_tensors.tensor_shapes(model.network, model.shape)


class Snapshot:
    """What goes into a file, to be changed before it is written."""

    def __init__(self, wrapper: str = "EDMPrecond", network: str = "SongUNet", **kwargs: Any) -> None:
        self.wrapper, self.network = wrapper, network
        self.kwargs = {**KWARGS, "model_type": network, **kwargs}  # of the wrapper
        self.inner: Flat = {}  # of the network, where they differ
        self.attributes: Flat = {**CONSTANTS[wrapper]}  # of the wrapper
        self.attributes |= dict(zip(("sigma_min", "sigma_max"), RANGES.get(wrapper, ()), strict=False))
        self.buffers = {"u": edm_grids.iddpm_sigmas(dtype=np.float32)} if wrapper == "iDDPMPrecond" else {}
        self.late: list[Callable[[Any], None]] = []  # what is changed in the pickled wrapper
        self.tensors = random_arrays(0, shapes_in(wrapper, network))
        filters = [name for name in self.tensors if name.endswith("resample_filter")]
        self.tensors |= dict.fromkeys(filters, np.full((1, 1, 2, 2), 0.25, np.float32))

    def write(self, path: Path) -> Path:
        own = {"model_type", "img_channels", "use_fp16", *CONSTANTS[self.wrapper]}
        inner = {name: value for name, value in self.kwargs.items() if name not in own}
        inner |= {"in_channels": 3, "out_channels": 6 if self.wrapper == "iDDPMPrecond" else 3} | self.inner
        network = snapshots.network(self.network, inner, self.tensors)
        made = snapshots.wrapped(self.wrapper, self.kwargs, network, self.attributes, self.buffers)
        for change in self.late:
            change(made)
        return snapshots.write(path, snapshots.snapshot(made))


@pytest.mark.fast
@pytest.mark.parametrize("network", ["SongUNet", "DhariwalUNet"])
@pytest.mark.parametrize(
    ("wrapper", "prediction", "low", "high"),
    [
        ("EDMPrecond", "edm", 0.002, 80),
        ("VPPrecond", "eps", 0.002, 80),
        ("VEPrecond", "scaled_score", 0.02, 80),
        ("iDDPMPrecond", "eps_var", 0.006422337, 80),
    ],
)
def test_the_file_decides_the_model(
    tmp_path: Path, network: str, wrapper: str, prediction: str, low: float, high: float
) -> None:
    content = Snapshot(wrapper, network)
    found = edm.read(content.write(tmp_path / "file.pkl"))
    model = found.model
    assert (model.prediction, model.shape, model.num_classes) == (prediction, (8, 8, 3), 2)
    assert isinstance(model.process, VE)
    np.testing.assert_allclose([model.process.sigma_min, model.process.sigma_max], [low, high], rtol=1e-6)
    assert (model.network.dropout, found.facts["arguments"]["dropout"]) == (0.0, 0.1)  # type: ignore[attr-defined]
    stored = edm_tensors.to_state_dict(model.network, model.shape, found.params)
    assert stored.keys() == content.tensors.keys()
    for name, array in content.tensors.items():
        np.testing.assert_array_equal(stored[name], array)
    for array in matching.flatten(found.params).values():
        assert array.flags.owndata or array.base.flags.owndata  # nothing hangs on the file


@pytest.mark.fast
def test_constants_of_a_wrapper_are_used(tmp_path: Path) -> None:
    content = Snapshot(sigma_data=0.6, sigma_max=50.0, use_fp16=True)
    content.attributes |= {"sigma_data": 0.6, "sigma_max": 50.0, "use_fp16": True}
    model = edm.read(content.write(tmp_path / "file.pkl")).model
    assert (model.sigma_data, model.process) == (0.6, VE(sigma_max=50.0))
    content = Snapshot("VPPrecond", beta_d=10.0, M=500, epsilon_t=0.01)
    low, high = (float(np.sqrt(np.expm1(5 * t**2 + 0.1 * t))) for t in (0.01, 1))
    content.attributes |= {"beta_d": 10.0, "M": 500, "epsilon_t": 0.01, "sigma_min": low, "sigma_max": high}
    model = edm.read(content.write(tmp_path / "file.pkl")).model
    assert model.time_input == VPInput(10.0, 0.1, 500)
    found = [model.process.sigma_min, model.process.sigma_max]  # type: ignore[attr-defined]
    np.testing.assert_allclose(found, [low, high])


# ---------------------------------------------------------------- EDM: snapshots of another model


def put(field: str, **values: Any) -> Callable[[Snapshot], None]:
    return lambda snapshot: getattr(snapshot, field).update(values)


def both(**values: Any) -> Callable[[Snapshot], None]:
    """Arguments of wrapper and network."""

    def change(snapshot: Snapshot) -> None:
        snapshot.kwargs |= values
        snapshot.inner |= values

    return change


def without(field: str, name: str) -> Callable[[Snapshot], None]:
    return lambda snapshot: getattr(snapshot, field).pop(name)


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Snapshot], None]:
    return lambda snapshot: snapshot.tensors.update({name: change(snapshot.tensors[name])})


def part(path: str, **facts: Any) -> Callable[[Snapshot], None]:
    """Other facts of a part, or attributes of it if they are no facts."""

    def late(made: Any) -> None:
        there = snapshots.facts_of(made, path)
        for name, value in facts.items():
            (there if name in there else there["state"])[name] = value

    return lambda snapshot: snapshot.late.append(late)


WEIGHT, BLOCK, FILTER = "map_layer0.weight", "model.enc.8x8_block0", "enc.4x4_down.conv0.resample_filter"
EDM_NAMES = "sigma_min, sigma_max|sigma_max, sigma_min"
UNFIT_SNAPSHOTS: dict[str, tuple[str, Callable[[Snapshot], None], str]] = {
    "an unknown wrapper": ("EDMPrecond", part("", class_name="EDMPrecomp"), "Did you mean 'EDMPrecond'"),
    "an unknown network": ("EDMPrecond", put("kwargs", model_type="SongVNet"), "model_type is 'SongVNet'"),
    "both unknown": (
        "EDMPrecond",
        lambda s: (put("kwargs", model_type="SongVNet")(s), part("model", class_name="SongVNet")(s)),  # type: ignore[func-returns-value]
        "Did you mean 'SongUNet'",
    ),
    "an argument of another wrapper": ("EDMPrecond", put("kwargs", beta_d=19.9), "Unknown argument 'beta_d'"),
    "an unknown argument": ("EDMPrecond", both(attention="flash"), "argument of SongUNet.* 'attention'"),
    "an argument of the wrapper only": (
        "EDMPrecond",
        lambda s: (put("kwargs", augment_dim=9)(s), put("inner", augment_dim=0)(s)),  # type: ignore[func-returns-value]
        "augment_dim 9 and 0",
    ),
    "an argument of the network only": ("EDMPrecond", put("inner", num_blocks=2), "num_blocks 1 and 2"),
    "no resolution": ("EDMPrecond", without("kwargs", "img_resolution"), "img_resolution"),
    "a resolution that is none": ("EDMPrecond", both(img_resolution="8"), "img_resolution"),
    "a truth for a number": ("EDMPrecond", both(num_blocks=True), "num_blocks"),
    "a huge width": ("EDMPrecond", both(model_channels=2**30), "model_channels"),
    "a huge number of blocks": ("EDMPrecond", both(num_blocks=2**30), "num_blocks"),
    "more blocks than there are": ("EDMPrecond", both(num_blocks=64), "128 blocks, but 10"),
    "a huge resolution": ("EDMPrecond", both(img_resolution=2**40), "img_resolution"),
    "a list without end": ("EDMPrecond", both(channel_mult=[1] * 1000), "channel_mult"),
    "one class": ("EDMPrecond", both(label_dim=1), "label_dim"),
    "use_fp16 in words": ("EDMPrecond", put("kwargs", use_fp16="no"), "use_fp16"),
    "no number of steps": ("VPPrecond", put("kwargs", M=1000.0), "M is 1000.0"),
    "a million steps": ("iDDPMPrecond", put("kwargs", M=10**6), "M is 1000000"),
    "a constant that is none": ("EDMPrecond", put("kwargs", sigma_data=float("nan")), "sigma_data"),
    "a constant below zero": ("VPPrecond", put("kwargs", beta_min=-0.1), "beta_min is -0.1, out of range"),
    "another constant than told": ("EDMPrecond", put("attributes", sigma_data=0.6), "sigma_data is 0.6.* give 0.5"),
    "another range than told": ("VEPrecond", put("attributes", sigma_min=0.03), "sigma_min is 0.03.* give 0.02"),
    "another range of the VP levels": ("VPPrecond", put("attributes", sigma_max=100.0), "sigma_max"),
    "an unknown attribute": ("EDMPrecond", put("attributes", sigma_dat=0.5), "'sigma_dat' Did you mean 'sigma_data'"),
    "no table": ("iDDPMPrecond", without("buffers", "u"), "buffers none instead of u"),
    "another table": ("iDDPMPrecond", lambda s: s.buffers.update(u=s.buffers["u"] * 1.001), "buffer u"),
    "a shorter table": ("iDDPMPrecond", lambda s: s.buffers.update(u=s.buffers["u"][1:]), "buffer u"),
    "a table that is not asked for": ("EDMPrecond", put("buffers", u=np.ones(3)), "buffers u instead of none"),
    "another eps of a norm": ("EDMPrecond", part(f"{BLOCK}.norm0", eps=1e-5), "enc.8x8_block0.norm0 has eps 1e-05"),
    "other groups": ("EDMPrecond", part(f"{BLOCK}.norm0", num_groups=2), "norm0 has num_groups 2"),
    "no scale of the sums": ("EDMPrecond", part(BLOCK, skip_scale=1), "skip_scale 1, but SongUNet computes with 0.7"),
    "two heads": ("EDMPrecond", part("model.enc.4x4_block0", num_heads=2), "num_heads 2"),
    "another embedding": ("EDMPrecond", part("model.map_noise", max_positions=1000), "max_positions 1000"),
    "an unknown part": ("EDMPrecond", part(BLOCK, class_name="UNetBlock2"), "unknown class 'UNetBlock2'"),
    "a version": ("EDMPrecond", part(BLOCK, version=7), "version 7"),
    "a type": ("EDMPrecond", part(BLOCK, type="klass"), "type 'klass'"),
    "arguments without names": ("EDMPrecond", part(BLOCK, _init_args=(4, 4)), "arguments without names"),
    "an array as an attribute": ("EDMPrecond", part(BLOCK, mask=snapshots.tensor(np.ones(3))), "mask is ndarray"),
    "a module as an attribute": ("EDMPrecond", part("", other=snapshots.persistent("Linear", {})), "other is _Object"),
    "a missing tensor": ("EDMPrecond", without("tensors", WEIGHT), f"missing .1.: {WEIGHT}"),
    "a tensor too much": (
        "EDMPrecond",
        put("tensors", **{"map_layer0.weight2": np.ones(3)}),
        "unknown .*weight2",
    ),
    "a transposed tensor": ("EDMPrecond", tensor(WEIGHT, lambda a: a.T), r"\(4, 16\), the model has \(16, 4\)"),
    "no number": ("EDMPrecond", tensor(WEIGHT, lambda a: spoil(a, np.nan)), f"not finite .1.: {WEIGHT}"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", UNFIT_SNAPSHOTS)
def test_snapshots_of_another_model_are_refused_saying_why(tmp_path: Path, name: str) -> None:
    wrapper, change, said = UNFIT_SNAPSHOTS[name]
    content = Snapshot(wrapper)
    change(content)
    path = content.write(tmp_path / "file.pkl")
    with pytest.raises(WeightsError, match=said) as error:
        edm.read(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 3000


@pytest.mark.fast
def test_filters_of_a_file_are_used_or_refused(tmp_path: Path) -> None:
    other = np.array([[[[0.4, 0.1], [0.3, 0.2]]]], np.float32)
    for network in ("SongUNet", "DhariwalUNet"):
        content = Snapshot(network=network)
        content.tensors[FILTER] = other
        path = content.write(tmp_path / "file.pkl")
        if network == "SongUNet":
            found = edm.read(path)
            stored = edm_tensors.to_state_dict(found.model.network, found.model.shape, found.params)
            np.testing.assert_array_equal(stored[FILTER], other)
        else:
            with pytest.raises(WeightsError, match=FILTER):
                edm.read(path)


@pytest.mark.fast
def test_a_given_model_must_be_the_one_in_the_file(tmp_path: Path) -> None:
    path = Snapshot().write(tmp_path / "file.pkl")
    model = edm.read(path).model
    other_grid = dataclasses.replace(model.with_network(dropout=0.3), process=VE(40.0))
    assert edm.read(path, other_grid).model is other_grid
    wider = edm.model_of("EDMPrecond", {**KWARGS, "model_type": "SongUNet", "model_channels": 8})
    with pytest.raises(WeightsError, match=r"network.ch is 4 instead of 8; network.emb_ch is 16 instead of 32.*path"):
        edm.read(path, wider)
    eps = dataclasses.replace(model, prediction="eps", time_input=VPInput())
    with pytest.raises(WeightsError, match=r"prediction is 'edm' instead of 'eps'"):
        edm.read(path, eps)


def test_import_of_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Snapshot().write(tmp_path / "edm-ffhq-64x64-uncond-vp.pkl")
    artefact = import_weights(path, tmp_path / "artefact")  # what the file holds, whatever it is called
    loaded = Artefact.load(tmp_path / "artefact")
    assert (loaded.model, loaded.steps) == (edm.read(path).model, 0)
    assert_same(loaded.params, matching.flatten(edm.read(path).params))
    assert_same(artefact.params, matching.flatten(loaded.params))
    told = loaded.provenance["imported_from"]
    assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (told["class"], told["arguments"]["dropout"]) == ("EDMPrecond", 0.1)
    fetched = Fetched(path, told["sha256"], path.stat().st_size)
    monkeypatch.setattr(weights, "fetch", lambda *args, **options: fetched)
    with pytest.raises(WeightsError, match=r"network.ch is 4 instead of 128"):
        import_weights("edm-ffhq-64x64-uncond-vp", tmp_path / "other")
