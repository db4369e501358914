"""What `import diffusion_distill` loads, and what training, sampling and fitting do without."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from places import ROOT

import diffusion_distill as dd

#: Packages that take long to import, and are needed for saving and training only.
LATER = ("optax", "orbax", "tensorstore")
#: Packages of single readers, writers, plots and doors, which a machine with a bare JAX on it lacks.
MISSING = (
    "IPython", "PIL", "equinox", "haiku", "importlib_resources", "matplotlib", "ml_collections", "pandas",
    "safetensors", "scipy", "sklearn", "tensorboardX", "tensorflow", "tensorflow_datasets", "torch", "tqdm", "wandb",
)  # fmt: skip
PROGRAM = f"""
import sys

sys.modules.update(dict.fromkeys({MISSING!r}))  # importing one of them raises ModuleNotFoundError
import diffusion_distill as dd
print("loaded:", sorted(set({LATER!r}) & set(sys.modules)))

import jax.numpy as jnp
import numpy as np

network = dd.Functions(lambda key, z, time: {{"a": jnp.zeros(2)}}, lambda p, z, time: p["a"] * z)
model = dd.Model(network, shape=(2,), prediction="v")
source = dd.data.from_arrays(np.zeros((8, 2), np.float32))
teacher = dd.train(model, source, dd.Denoising(length=16), dd.Settings(batch_size=8, log_every=1))
assert dd.distill(teacher, source, dd.Tract((2, 1), length=16), dd.Settings(batch_size=8))[1].steps == 1
fitted = dd.fit_solver(teacher, "ddim", 2, dd.FitSettings(scale=2, batch_size=4))
print("drawn:", np.isfinite(dd.sample(teacher, 4, fitted=fitted)).all())
"""


def test_the_package_imports_little_and_needs_little() -> None:
    """One program for both, since starting JAX takes most of its time."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "loaded: []\n" in done.stdout and "drawn: True\n" in done.stdout


#: Libraries that tables and `diffusion_distill.torch` do without.
JAX = ("absl", "flax", "jax", "jaxlib", "ml_collections", "optax", "orbax")
WITHOUT_JAX = f"""
import sys

sys.modules.update(dict.fromkeys({JAX!r}))
import numpy as np
from diffusion_distill.process import grids, processes
from diffusion_distill.solvers import SOLVERS, tabulate
from diffusion_distill.solvers.fitted import FittedSolver

for process in (processes.DiscreteBetas(), processes.VE(), processes.RectifiedFlow()):
    grid = grids.make_grid(process, 5)
    tables = [tabulate(solver, grid, process) for solver in SOLVERS]
    fitted = FittedSolver("ddim", process, grid, np.zeros((5, 1)), np.zeros(5), np.zeros(5))
    assert FittedSolver.from_dict(fitted.to_dict()).table().nfe == 5
print("tables:", len(tables))
"""


@pytest.mark.fast
def test_tables_and_fitted_solvers_need_no_jax() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_JAX], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"tables: {len(dd.SOLVERS)}\n" in done.stdout


@pytest.mark.fast
def test_files_of_rooms_are_there_without_an_import_of_their_own() -> None:
    asked = "import diffusion_distill as dd; dd.process.levels.from_logsnr, dd.training.checkpoint, dd.solvers.steps"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.fast
def test_names_are_imported_when_asked_for_and_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "diffusion_distill" / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        (alias.name, str(node.module))
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {(name, f"diffusion_distill.{module}") for module, names in dd.NAMES.items() for name in names}
    assert seen == lazy | {(room, "diffusion_distill") for room in dd.ROOMS}
    assert {name for name, _ in seen} | {"__version__"} == set(dd.__all__) <= set(dir(dd))
    assert all(getattr(dd, name) is not None for name in dd.__all__)
    assert all(getattr(dd, room).__name__ == f"diffusion_distill.{room}" for room in (*dd.INNER, "torch"))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dd.nothing  # type: ignore[attr-defined]
