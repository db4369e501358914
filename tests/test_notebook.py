"""The notebooks' first cell installs from the repository without touching jax, and tells of a missing accelerator.

All notebooks have the same. Whole notebooks are run by `pytest --nbmake`, at a tiny size.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from types import SimpleNamespace
from typing import Any

import jax
import places
import pytest

NOTEBOOKS: dict[str, Any] = {
    path.name: json.loads(path.read_text("utf-8")) for path in sorted((places.ROOT / "notebooks").glob("*.ipynb"))
}


def code_of(notebook: dict[str, Any]) -> list[str]:
    """The text of each cell of code."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


FIRST = code_of(NOTEBOOKS["quickstart.ipynb"])[0]
#: Whatever machine runs this test has none of these unless a case says so.
HINTS = ("JAX_PLATFORMS", "TPU_NAME", "COLAB_TPU_ADDR", "COLAB_GPU", "COLAB_RELEASE_TAG")


def run_first_cell(monkeypatch: pytest.MonkeyPatch, said: dict[str, str], files: list[str], driver: int | None) -> str:
    """What the cell warns of, "" for nothing; `driver` is what nvidia-smi exits with, None for no such program."""
    for name in HINTS:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("glob.glob", lambda pattern: files)
    monkeypatch.setattr("shutil.which", lambda name: None if driver is None else name)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=driver))
    code = "\n".join(line for line in FIRST.splitlines() if not line.lstrip().startswith("%pip"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(code, {"__name__": "notebook"})
    return " ".join(str(warning.message) for warning in caught)


CASES: dict[str, tuple[dict[str, str], list[str], int | None, str]] = {
    "a CPU": ({}, [], None, ""),
    "a driver without a card": ({}, [], 9, ""),
    "a CPU that was asked for": ({"JAX_PLATFORMS": "cpu", "COLAB_GPU": "1"}, [], 0, ""),
    "an NVIDIA card": ({}, [], 0, "GPU"),
    "Colab's GPU": ({"COLAB_GPU": "1"}, [], None, "GPU"),
    "Colab without what the notebook asks for": ({"COLAB_GPU": "", "COLAB_RELEASE_TAG": "x"}, [], None, "GPU"),
    "Colab's TPU, as it was": ({"COLAB_GPU": "0", "COLAB_TPU_ADDR": "10.0.0.2:8470"}, [], None, "TPU"),
    "Colab's TPU": ({"COLAB_GPU": "", "COLAB_RELEASE_TAG": "x"}, ["/dev/accel0"], None, "TPU"),
    "a TPU machine": ({"TPU_NAME": "local"}, [], None, "TPU"),
}


@pytest.mark.parametrize(("said", "files", "driver", "missing"), CASES.values(), ids=CASES)
def test_a_missing_accelerator_is_told(
    said: dict[str, str], files: list[str], driver: int | None, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    told = run_first_cell(monkeypatch, said, files, driver)
    assert (f"A {missing} WAS EXPECTED, BUT JAX USES THE CPU" in told) if missing else not told


def test_an_accelerator_that_is_used_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not run_first_cell(monkeypatch, {"COLAB_GPU": "1"}, [], 0)


def test_devices_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_first_cell(monkeypatch, {}, [], None)
    assert str(jax.devices()) in capsys.readouterr().out


def test_it_installs_from_the_repository_and_asks_for_no_jax() -> None:
    lines = [line.strip() for line in FIRST.splitlines() if "%pip" in line]
    assert lines == ['%pip install -q "diffusion_distill[demo] @ git+{REPOSITORY}"']
    assert FIRST.count('REPOSITORY = "https://') == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_opens_on_colab_and_installs_as_all_do(name: str) -> None:
    notebook = NOTEBOOKS[name]
    metadata: dict[str, Any] = notebook["metadata"]
    title = "".join(notebook["cells"][0]["source"])
    assert metadata["accelerator"] == "GPU" and metadata["colab"]["name"] == name
    assert "colab-badge.svg" in title and f"/main/notebooks/{name})" in title
    assert code_of(notebook)[0] == FIRST


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_what_it_printed(name: str) -> None:
    cells = [cell for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_can_be_made_small(name: str) -> None:
    assert any("DIFFUSION_DISTILL_TINY" in code for code in code_of(NOTEBOOKS[name]))
