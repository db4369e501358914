"""PyTorch runs the same tables as JAX, to the same results, and without JAX.

PyTorch is asked in this Python, or in the one that the variable PEER_PYTHON names.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import places
import pytest
from problems import CASES, START, denoise, table_of

from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.engine import integrate, run_host

PEER = os.environ.get("PEER_PYTHON", sys.executable)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What PyTorch computes, by name; see `peer_torch`."""
    if "PEER_PYTHON" not in os.environ and importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch, here or in the Python that PEER_PYTHON names")
    folder = tmp_path_factory.mktemp("torch")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(places.ROOT), str(HERE)])}
    command = [PEER, str(HERE / "peer_torch.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "answers.npz") as found:
        return dict(found)


@pytest.mark.parametrize("fitted", [False, True], ids=["plain", "with lambdas"])
def test_every_solver_gives_what_the_engine_on_the_host_gives(answers: dict[str, np.ndarray], fitted: bool) -> None:
    for case in CASES:
        expected = run_host(table_of(case, fitted), denoise, START)
        np.testing.assert_allclose(answers[f"run/{case}/{fitted}/torch.float64"], expected, rtol=1e-9, atol=1e-9)
        single = answers[f"run/{case}/{fitted}/torch.float32"]
        np.testing.assert_allclose(single, expected, atol=1e-4 * np.abs(expected).max(), err_msg=case)
        assert single.dtype == np.float32


@pytest.mark.parametrize("case", ["dpm_solver++|discrete", "heun|ve", "deis order=2|flow"])
def test_float32_gives_what_jax_gives(answers: dict[str, np.ndarray], case: str) -> None:
    jax = integrate(denoise, table_of(case), START.astype(np.float32))
    np.testing.assert_allclose(answers[f"run/{case}/False/torch.float32"], jax, rtol=1e-5, atol=1e-5)


def test_noise_of_rows_enters_as_on_the_host(answers: dict[str, np.ndarray]) -> None:
    table, noise = table_of("ancestral|discrete"), np.random.default_rng(1).standard_normal((5, *START.shape))
    expected = run_host(table, denoise, START, row_noise=noise, states=True)
    np.testing.assert_allclose(answers["ancestral"], expected, rtol=1e-9, atol=1e-9)


def test_a_network_of_any_prediction_becomes_the_same_denoiser(answers: dict[str, np.ndarray]) -> None:
    from problems import PROCESSES

    names = [name for name in answers if name.startswith("network/")]
    assert len(names) == 10
    for name in names:
        level = Level(*PROCESSES[name.split("/")[2]].level(np.float64(0.3)))
        np.testing.assert_allclose(answers[name], denoise(START, level), rtol=1e-9, atol=1e-9, err_msg=name)
