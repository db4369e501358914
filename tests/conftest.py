"""Settings of all tests: eight simulated CPU devices, quick compiling, no silent rank promotion, toy models.

The devices must be set before JAX starts, hence at the import of this file. A test that needs fewer of them
uses `data_mesh(jax.devices()[:n])`.

Most of the time goes into compiling, and many tests compile the same program: a run that is stopped and goes on, a
training in another process. They share what was compiled in .jax_cache, which `make clean` removes. XLA compiles
without optimising and without its fusion emitters, which would double the time of compiling. `make test-versions` tests
the optimised programs: XLA_FLAGS in the environment is left as it is.

`--one-of-each` keeps of every test function the first of its parameters that is selected, all where it is marked
`packages`.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

XLA_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if Version(version("jaxlib")) < Version("0.11"):  # a newer XLA has no such flag, and ends at an unknown one
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
QUICK = {  # as variables, so that the programs that tests start have them too
    "XLA_FLAGS": " ".join(XLA_FLAGS),
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).resolve().parent.parent / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
for name, value in QUICK.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tests are for correctness; a GPU or TPU is asked for by name
os.environ.setdefault("DIFFUSION_DISTILL_TINY", "1")  # read by the notebooks

import jax
import pytest

from diffusion_distill.training import sharding

sharding.use_cpu_devices(8, keep_memory=False)  # many tests follow each other in a process
jax.config.update("jax_numpy_rank_promotion", "raise")

import toys

from diffusion_distill.denoisers.model import Denoiser, Model
from diffusion_distill.networks import NETWORKS
from diffusion_distill.process.processes import Cosine
from diffusion_distill.training.artefact import Artefact

#: Notebooks without a marker of their own that run among the slow tests.
SLOW_NOTEBOOKS = ("cifar10_on_colab.ipynb", "dode_in_five_minutes.ipynb")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-of-each", action="store_true", help="the first parameters of every test function only")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Marks the long notebooks as slow, lets -m and -k select, and then leaves out what `--one-of-each` does."""
    for item in items:
        if item.path.name in SLOW_NOTEBOOKS:
            item.add_marker(pytest.mark.slow)
    yield
    if config.getoption("--one-of-each"):
        keep_one_of_each(config, items)


def keep_one_of_each(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps one test of every function, and all that call other packages."""
    seen: set[str] = set()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        function = item.nodeid.partition("[")[0]
        chosen = function not in seen or item.get_closest_marker("packages") is not None
        (kept if chosen else left_out).append(item)
        seen.add(function)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture
def toy_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the toy networks known by name, as artefacts and runs need."""
    for name, network in toys.NETWORKS.items():
        monkeypatch.setitem(NETWORKS, name, network)


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs for one device are compiled and run sooner than for eight, where a test is of something else."""
    mesh = sharding.data_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "data_mesh", lambda devices=None: mesh)
    monkeypatch.setattr(sharding, "make_mesh", lambda data=-1, params=1, devices=None: mesh)


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
