"""An artefact: a teacher or a student on disk, all that distilling, sampling and evaluating need.

FOLDER/params/            parameters (Orbax)
FOLDER/model.json         what builds it: network, process, prediction, shape; a student's steps and levels; a checksum
FOLDER/provenance.json    where it comes from: method, settings, updates, teacher, versions

An artefact that replaces another is written beside it first and then takes its place. Until model.json has changed too,
the old parameters stay in FOLDER/params.replaced, so that a program that is killed at any moment leaves the one or the
other, and a program that reads meanwhile gets one of them.

Parameters are kept as nested dictionaries, whatever tree they are. Of a network that the library cannot rebuild, kind,
class and plain settings are written down; it must be given to load the artefact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from diffusion_distill.base.files import read_json, user_path
from diffusion_distill.base.typing import Data, Params
from diffusion_distill.base.whole import put, remove, replaced, unfinished, write_json
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.denoisers.denoise import Denoise, as_denoise
from diffusion_distill.denoisers.given import Given, WholeLevel
from diffusion_distill.denoisers.model import Denoiser, Model
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Cosine, Process
from diffusion_distill.training import checkpoint
from diffusion_distill.training.checksum import fingerprint
from diffusion_distill.version import __version__

PARAMS = "params"
#: How often a folder that is being written is read, with a pause in seconds.
READS, PAUSE = 20, 0.1


@dataclass(frozen=True)
class Artefact:
    """A model with parameters.

    Attributes:
      params: a tree of arrays, as the model's network takes it.
      steps: the sampling steps a student was made for; 0 for a teacher, which takes any number.
      grid: the levels [steps + 1] that a student was trained on, by default those of its process; None for a teacher.
        A sampler goes from the last but one to zero noise itself.
      provenance: JSON-ready facts about its making.
    """

    model: Model
    params: Params
    steps: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    grid: Level | None = None

    def __post_init__(self) -> None:
        grid = self.grid
        if self.steps and grid is None:
            grid = grids.make_grid(self.model.process, self.steps)
        if grid is not None and len(grid.sigma) != self.steps + 1:
            raise ValueError(
                f"The grid of a student of {self.steps} steps has {self.steps + 1} levels, got {len(grid.sigma)}."
            )
        object.__setattr__(self, "grid", None if grid is None else grids.check(grid))

    @classmethod
    def of(
        cls, denoise: Denoise | Callable[..., Data], shape: Sequence[int], process: Process | None = None,
        *, num_classes: int = 1, **fields: Any,
    ) -> Artefact:  # fmt: skip
        """A denoiser without a network that the library knows, to sample, fit a solver to, evaluate, or distil.

        Args:
          denoise: (z, level, cond) -> x_hat: a JAX tree, whose arrays jit sees, or a plain function.
          shape: of one sample.
          process: whose levels it is asked for; `Cosine()` by default.
          num_classes: of the labels that it takes; 1 for none.
          fields: of the model: cond, null, data_range.
        """
        model = Model(Given(num_classes), tuple(shape), process or Cosine(), "x", WholeLevel(), **fields)
        return cls(model, as_denoise(denoise))

    def denoiser(self, clip: bool = True) -> Denoiser | Clipped:
        """Its estimate of x, clipped to the range of the data by default."""
        denoise = self.model.denoiser(self.params)
        return Clipped(denoise) if clip else denoise

    def save(self, folder: str | Path) -> Path:
        """Writes the artefact's folder, replacing an artefact that is there; it is there whole or not at all."""
        folder, described = user_path(folder), self.model.to_dict()
        folder.mkdir(parents=True, exist_ok=True)
        params = folder / PARAMS
        checkpoint.save_params(unfinished(params), self.params)
        facts = {"steps": self.steps, "grid": grids.to_numbers(self.grid), "fingerprint": fingerprint(self.params)}
        versions = {"diffusion_distill": __version__, "jax": jax.__version__}
        if jax.process_index() == 0:
            put(params)
            write_json(folder / "provenance.json", {**self.provenance, "versions": versions})
            write_json(folder / "model.json", {"model": described, **facts})
            remove(replaced(params))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"artefact {folder}")
        return folder

    @classmethod
    def load(cls, folder: str | Path, network: Any = None) -> Artefact:
        """Reads an artefact's folder.

        Args:
          network: as it was when the artefact was made, for a network that the library cannot rebuild.

        Raises:
          FileNotFoundError: the folder is not an artefact, or lacks a part.
          ValueError, TypeError: a part is damaged (the message names the file and field), the network must be given,
            or the parameters do not fit the model, or have changed since they were written.
        """
        folder = user_path(folder)
        if not (folder / "model.json").is_file():
            raise FileNotFoundError(
                f"{folder} is not an artefact: it has no model.json. Give the folder that training or distilling "
                "wrote, for example WORKDIR/teacher or WORKDIR/student_1."
            )
        for _ in range(READS - 1):
            before = _state(folder)
            try:
                return cls._read(folder, network)
            except (OSError, ValueError, TypeError):
                if _state(folder) == before and not unfinished(folder / PARAMS).exists():
                    raise  # nobody else is writing it
                time.sleep(PAUSE)
        return cls._read(folder, network)

    @classmethod
    def _read(cls, folder: Path, network: Any) -> Artefact:
        description = read_json(folder / "model.json", checkpoint.ADVICE)
        provenance = read_json(folder / "provenance.json", checkpoint.ADVICE)
        model, steps, grid = _described(folder / "model.json", description, network)
        try:
            params = _params(folder / PARAMS, model, description)
        except (OSError, ValueError):
            if not replaced(folder / PARAMS).exists():
                raise
            params = _params(replaced(folder / PARAMS), model, description)
        return cls(model, params, steps, provenance, grid)


def _params(folder: Path, model: Model, description: Mapping[str, Any]) -> Params:
    """The parameters in a folder, if they are those that the description was written with."""
    params = checkpoint.load_params(folder, jax.eval_shape(model.init, jax.random.key(0)))
    if description.get("fingerprint") not in (None, fingerprint(params)):
        raise ValueError(f"The parameters in {folder} have changed since they were written: the disk or a copy failed.")
    return params


def _state(folder: Path) -> list[tuple[int, int] | None]:
    """What changes while an artefact is written."""
    found = (folder / name for name in (PARAMS, replaced(Path(PARAMS)), "provenance.json", "model.json"))
    return [_identity(path) for path in found]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        return path.stat().st_ino, path.stat().st_mtime_ns
    except OSError:
        return None


def _described(path: Path, description: Mapping[str, Any], network: Any) -> tuple[Model, int, Level | None]:
    """The model, step count and grid of a model.json; its errors name the file."""
    steps = description.get("steps")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"{path}: 'steps' must be a whole number of at least 0, got {steps!r}. {checkpoint.ADVICE}")
    try:
        model = Model.from_dict(description.get("model"), network)  # type: ignore[arg-type]
        return model, steps, grids.from_numbers(description.get("grid"))
    except (ValueError, TypeError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{path}: {error}") from error
