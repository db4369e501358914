"""A fitted solver: what sampling with a D-ODE solver needs, in one small JSON file.

It holds the solver, its grid level by level, the noise schedule, the lambdas, how near each row came
to the teacher before and after them, and where they come from. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_distill.diffusion.schedules import SCHEDULES, Schedule
from diffusion_distill.files import read_json, user_path
from diffusion_distill.levels import Level
from diffusion_distill.settings import describe, rebuild
from diffusion_distill.solvers import Table, tabulate

FORMAT = 1


@dataclass(frozen=True)
class FittedSolver:
    """A solver on a grid with its lambdas.

    Attributes:
      solver: a name of `SOLVERS`, perhaps with options.
      schedule: the model's, for solvers that need it.
      grid: levels [steps + 1].
      lambdas: [rows, D] in the paper's convention.
      plain, fitted: root mean square distance from the teacher's states without and with them, [rows].
      provenance: JSON-ready facts about the fit.
    """

    solver: str
    schedule: Schedule
    grid: Level
    lambdas: np.ndarray
    plain: np.ndarray
    fitted: np.ndarray
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Table:
        """The solver's table with its directions."""
        return tabulate(self.solver, self.grid, self.schedule)

    def table(self) -> Table:
        """The plain table to sample with."""
        return self.base.distilled(self.lambdas)

    def save(self, path: str | Path) -> Path:
        """Writes the file."""
        directions = self.base.directions
        content = {
            "format": FORMAT,
            "solver": self.solver,
            "schedule": describe(self.schedule, SCHEDULES),
            "grid": {"alpha": _numbers(self.grid.alpha), "sigma": _numbers(self.grid.sigma)},
            "lambdas": _numbers(self.lambdas),
            "lambdas in the published code's convention": _numbers(self.lambdas * directions.published),  # type: ignore[union-attr]
            "distance from the teacher": {"plain": _numbers(self.plain), "fitted": _numbers(self.fitted)},
            "provenance": dict(self.provenance),
        }
        path = user_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> FittedSolver:
        """Reads a file that `save` wrote.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it is no fitted solver, or its parts do not fit each other.
        """
        path = user_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no fitted solver {path}. --mode=fit writes one.")
        content = read_json(path, "Copy it again, or fit it again by --mode=fit.")
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, this version reads {FORMAT}")
            distance = content["distance from the teacher"]
            found = cls(
                solver=content["solver"],
                schedule=rebuild("schedule", content["schedule"], SCHEDULES),
                grid=Level(np.array(content["grid"]["alpha"]), np.array(content["grid"]["sigma"])),
                lambdas=np.array(content["lambdas"]),
                plain=np.array(distance["plain"]),
                fitted=np.array(distance["fitted"]),
                provenance=content["provenance"],
            )
            found.table()
        except (KeyError, TypeError, ValueError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} is no fitted solver: {what}") from error
        return found


def _numbers(values: Any) -> list:
    return np.asarray(values, np.float64).tolist()
