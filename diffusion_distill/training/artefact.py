"""An artefact: a teacher or a student on disk, all that distilling, sampling and evaluating need.

FOLDER/params/            parameters, see `training.params_folder`
FOLDER/model.json         what builds it: network, process, prediction, shape; a student's steps and levels; a checksum
FOLDER/provenance.json    where it comes from: method, settings, updates, teacher, versions

Parameters are kept as nested dictionaries, whatever tree they are. Of a network that the library cannot rebuild, kind,
class and plain settings are written down; it must be given to load the artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_distill.base.files import read_json, user_path
from diffusion_distill.base.typing import Data, Params
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.denoisers.denoise import Denoise, as_denoise
from diffusion_distill.denoisers.given import Given, WholeLevel
from diffusion_distill.denoisers.model import Denoiser, Model
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Cosine, Process
from diffusion_distill.training import checkpoint, params_folder
from diffusion_distill.training.checksum import fingerprint

MODEL, PROVENANCE = "model.json", "provenance.json"


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
        facts = {"steps": self.steps, "grid": grids.to_numbers(self.grid), "fingerprint": fingerprint(self.params)}
        descriptions = {
            PROVENANCE: {**self.provenance, "versions": params_folder.VERSIONS},
            MODEL: {"model": self.model.to_dict(), **facts},
        }
        return params_folder.write(user_path(folder), self.params, descriptions)

    @staticmethod
    def check_place(folder: str | Path) -> None:
        """Raises ValueError if an artefact cannot be saved in a folder, see `params_folder.check_place`."""
        params_folder.check_place(user_path(folder), (PROVENANCE, MODEL))

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
        if not (folder / MODEL).is_file():
            raise FileNotFoundError(
                f"{folder} is not an artefact: it has no model.json. Give the folder that training or distilling "
                "wrote, for example WORKDIR/teacher or WORKDIR/student_1."
            )
        return params_folder.read(folder, (PROVENANCE, MODEL), lambda: cls._read(folder, network))

    @classmethod
    def _read(cls, folder: Path, network: Any) -> Artefact:
        description = read_json(folder / MODEL, checkpoint.ADVICE)
        provenance = read_json(folder / PROVENANCE, checkpoint.ADVICE)
        model, steps, grid = _described(folder / MODEL, description, network)
        params = params_folder.params_in(folder, _shapes(folder / MODEL, model), description.get("fingerprint"))
        return cls(model, params, steps, provenance, grid)


def _shapes(path: Path, model: Model) -> Params:
    """The shapes of the parameters of the model in a model.json, whose errors name the file."""
    try:
        return model.param_shapes()
    except ValueError as error:
        raise ValueError(f"{path}: {error} {checkpoint.ADVICE}") from error


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
