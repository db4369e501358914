"""What `import diffusion_distill` loads, and what training, sampling and fitting do without."""

from __future__ import annotations

import subprocess
import sys

from places import ROOT

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
