"""PyTorch runs the same tables as JAX, to the same results, and without JAX.

PyTorch is asked in this Python, or in the one that the variable PEER_PYTHON names.
"""

from __future__ import annotations

import numpy as np
import pytest
from peers import answers_of
from torch_problems import CASES, PROCESSES, START, denoise, table_of

from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.engine import integrate, run_host


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What PyTorch computes, by name; see `peer_torch`."""
    return answers_of("peer_torch.py", "torch", tmp_path_factory.mktemp("torch"))


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
    names = [name for name in answers if name.startswith("network/")]
    assert len(names) == 10
    for name in names:
        level = Level(*PROCESSES[name.split("/")[2]].level(np.float64(0.3)))
        np.testing.assert_allclose(answers[name], denoise(START, level), rtol=1e-9, atol=1e-9, err_msg=name)
