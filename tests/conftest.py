"""Settings of all tests: eight simulated CPU devices, quick compiling, no silent rank promotion, toy models.

The devices must be set before JAX starts, hence at the import of this file. A test that needs fewer of them
uses `data_mesh(jax.devices()[:n])`.

Most of the time goes into compiling, and many tests compile the same program: a run that is stopped and goes on, a
training in another process. They share what was compiled in .jax_cache, which `make clean` removes, and XLA compiles
without optimising. `make test-versions` tests the optimised programs: XLA_FLAGS in the environment is left as it is.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
from pathlib import Path

QUICK = {  # as variables, so that the programs that tests start have them too
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).resolve().parent.parent / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
for name, value in QUICK.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tests are for correctness; a GPU or TPU is asked for by name
os.environ.setdefault("DIFFUSION_DISTILL_TINY", "1")  # read by the notebook

import jax
import pytest

from diffusion_distill.training.sharding import use_cpu_devices

use_cpu_devices(8, keep_memory=False)  # many tests follow each other in a process
jax.config.update("jax_numpy_rank_promotion", "raise")

import toys

from diffusion_distill.denoisers.model import Denoiser, Model
from diffusion_distill.networks import NETWORKS
from diffusion_distill.process.processes import Cosine
from diffusion_distill.training.artefact import Artefact


@pytest.fixture
def toy_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the toy networks known by name, as artefacts and runs need."""
    for name, network in toys.NETWORKS.items():
        monkeypatch.setitem(NETWORKS, name, network)


@pytest.fixture
def gaussian() -> toys.Gaussian:
    """Gaussian data whose optimal denoiser and flow are closed formulas."""
    return toys.Gaussian(mean=0.2, std=0.3)


@pytest.fixture
def exact(gaussian: toys.Gaussian) -> Denoiser:
    """The optimal denoiser of the Gaussian data."""
    return Denoiser(params=(), model=gaussian)


@pytest.fixture
def tiny_model(toy_networks: None) -> Model:
    """A small perceptron on 2x2 images that predicts v."""
    return Model(toys.Perceptron(out_ch=1), (2, 2, 1), Cosine(), prediction="v")


@pytest.fixture
def teacher(tiny_model: Model) -> Artefact:
    """An untrained teacher."""
    return Artefact(tiny_model, toys.parameters(tiny_model), provenance={"method": "none"})
