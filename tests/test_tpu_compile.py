"""Every compiled function of the library is compiled for TPUs, by their real compiler, which runs on a CPU.

It is in libtpu (the extra [tpu-compile]); without it there is nothing to test. The functions and the shapes of their
arguments are those of `benchmarks/tpu.py`; their networks are small ones.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import toys
from jax.sharding import Mesh
from places import ROOT

import diffusion_distill
from diffusion_distill import Denoising, Model, Settings
from diffusion_distill.api.ahead import Ahead
from diffusion_distill.networks import DiT
from diffusion_distill.networks.layers import attend, winograd
from diffusion_distill.solvers import engine
from diffusion_distill.training.sharding import replicated
from diffusion_distill.training.topologies import devices_of

pytest.importorskip("libtpu", reason="needs libtpu, in the extra [tpu-compile]")
sys.path.append(str(ROOT / "benchmarks"))

import _programs  # type: ignore[import-not-found]

CHIPS = ("v5e:2x4", "v6e:2x4")
#: Few layers with attention compile fastest.
CASE = _programs.Case(DiT(16, depth=1, num_heads=2, out_ch=3, num_classes=10, dtype="bfloat16"), (4, 4, 3), 16, (4, 1))
#: XLA's own level of effort that compiles fastest: 'O0'.
QUICK = {"optimization_level": 9}
#: What computes each image by itself: no device waits for another.
ALONE = {"DDIM", "ancestral", "Heun, states kept", "step of Heun", "features of a classifier", "InceptionV3"}
#: Operations by which a program reaches the host.
HOST = re.compile(r"\b(infeed|outfeed|send|recv)\(|callback|is_host_transfer=true")
#: What a lowered program may call by name: where its arrays lie, nothing of the host or of cuDNN.
PLACES = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    """Programs for devices that are not there can be written into JAX's cache on disk, but not read."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


@cache
def mesh_of(chips: str) -> Mesh:
    return _programs.mesh_of(chips)


def reduced(text: str) -> int:
    """The number of values that a compiled program sums over devices."""
    outputs = re.findall(r"= (\S.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", text)
    shapes = [shape for output in outputs for shape in re.findall(r"\w+\[([\d,]*)\]", output)]
    return sum(prod(map(int, filter(None, shape.split(",")))) for shape in shapes)


def factors(text: str) -> list[str]:
    """The types of the first factors of a lowered program's convolutions and matrix products."""
    return re.findall(r"stablehlo\.(?:convolution|dot_general).* : \(tensor<[\dx]*x(\w+)>", text)


@pytest.mark.slow
@pytest.mark.parametrize("chips", CHIPS)
@pytest.mark.parametrize("what", _programs.PROGRAMS)
def test_a_function_is_compiled(what: str, chips: str) -> None:
    program = _programs.PROGRAMS[what](CASE, mesh_of(chips))
    lowered = program.lower()
    assert set(re.findall(r"custom_call @(\w+)", lowered.as_text())) <= PLACES
    text = lowered.compile(compiler_options=QUICK).as_text()
    assert text is not None and not HOST.search(text)
    if what in ALONE:
        assert not re.search("all-(reduce|gather|to-all)|reduce-scatter|collective-permute", text)
    if what not in _programs.UPDATES:
        return
    state = program.arguments[0]
    [aliases] = re.findall(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliases.count("-alias") == len(jax.tree.leaves(state))  # the new state takes the place of the old one
    # The gradient, of which XLA computes parts only once: the biases of layers whose outputs are added have the same.
    assert reduced(text) > 0.95 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
@pytest.mark.parametrize("chips", CHIPS)
def test_the_small_network_of_the_benchmark_is_compiled(chips: str) -> None:
    program = _programs.PROGRAMS["TRACT-VP"](_programs.CASES["small"](), mesh_of(chips))
    lowered = program.lower()
    kinds = factors(lowered.as_text())
    assert kinds.count("bf16") > 0.7 * len(kinds)
    compiled = lowered.compile(compiler_options=QUICK)
    assert re.search(r"bf16\[[\d,]+\]\S* convolution\(", compiled.as_text() or "")
    memory: Any = compiled.memory_analysis()
    # The old state and the new one are one; besides there are images and the loss.
    assert memory.argument_size_in_bytes + memory.output_size_in_bytes < 1.1 * memory.alias_size_in_bytes * 2


def test_every_function_that_is_compiled_when_the_library_is_imported_is_among_the_programs() -> None:
    found = {}
    for module in pkgutil.walk_packages(diffusion_distill.__path__, "diffusion_distill."):
        if module.name.endswith("main") or module.name.startswith("diffusion_distill.torch"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, jax.stages.Wrapped) and not isinstance(value, type):
                found[id(value)] = f"{module.name}.{name}"
    tested = {id(make(CASE, mesh_of("v5e:2x4")).function) for make in _programs.PROGRAMS.values()}
    only_on_cpus = {id(engine._jitted_row), id(winograd._kernel_gradient_for_platform)}
    assert not [name for number, name in found.items() if number not in tested | only_on_cpus]
    assert len(found) > 9


# ---------------------------------------------------------------- forms of a platform


def lowered_for(chips: str, function: Any, *arrays: Any) -> str:
    place = replicated(mesh_of(chips))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in arrays]
    return jax.jit(function).lower(*shapes).as_text()


def test_convolutions_are_not_those_of_the_cpu_on_which_they_are_compiled() -> None:
    x, kernel = jnp.ones((2, 8, 8, 64)), jnp.ones((3, 3, 64, 64))
    assert winograd.is_faster(x, kernel)
    gradient = jax.grad(lambda x, kernel: jnp.sum(winograd.convolution(x, kernel) ** 2), argnums=(0, 1))
    text, here = lowered_for("v5e:2x4", gradient, x, kernel), jax.jit(gradient).lower(x, kernel).as_text()
    assert (text.count("stablehlo.convolution"), here.count("stablehlo.convolution")) == (3, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_is_two_products_and_a_softmax(dtype: str) -> None:
    q = jnp.ones((2, 16, 2, 64), dtype)
    text = lowered_for("v5e:2x4", attend, q, q, q)
    assert text.count("stablehlo.dot_general") == 2 and "custom_call" not in text
    assert factors(text) == 2 * [{"float32": "f32", "bfloat16": "bf16"}[dtype]]


def test_large_gradients_come_in_shares_at_the_usual_effort() -> None:
    """Of four chips that share a state each gets its part of the sum over them; only small arrays are summed whole."""
    model = Model(toys.Perceptron(out_ch=1, width=1024), (32, 32, 1), prediction="v")
    settings = Settings(batch_size=64, params_parallel=4)
    ahead = Ahead.of(model, None, Denoising(length="1K"), settings, devices_of("v5e:2x2"))
    text = ahead.lowered().compile().as_text() or ""
    shares = re.findall(r"= f32\[(\S+?)\]\S* fusion\(.*calls=%(?:all-)?reduce-scatter", text)
    kernels = [leaf.size for leaf in jax.tree.leaves(ahead.state.params) if leaf.ndim > 1]
    assert sorted(prod(map(int, shape.split(","))) for shape in shares) == sorted(size // 4 for size in kernels)


def test_parts_of_a_batch_and_updates_of_a_dispatch_are_loops() -> None:
    names = ("TRACT-VP", "TRACT-VP in parts", "TRACT-VP, 10 updates")
    programs = [_programs.PROGRAMS[name](CASE, mesh_of("v5e:2x4")) for name in names]
    loops = [program.lower().as_text().count("stablehlo.while") for program in programs]
    assert loops == [loops[0], loops[0] + 1, loops[0] + 1]
    flops = [program.flops() for program in programs]
    assert flops == [flops[0], flops[0], 10 * flops[0]]
