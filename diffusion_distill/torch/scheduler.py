"""Our solvers as a scheduler of diffusers: it takes the place of a pipeline's own.

    pipeline.scheduler = DistilledODEScheduler.from_config(pipeline.scheduler.config, solver="dpm_solver++")

The pipeline calls the network once per row of the solver's table, with the row's timestep, and `step` computes the row.
Solvers with several calls per step have a timestep for each call. Guidance, prompts and decoding stay the pipeline's.

The state is kept in float32 (rows' memories too) and handed out in the precision of the pipeline's images. What the
pipeline changes in them between two steps is added to the state.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from diffusers import ConfigMixin, SchedulerMixin  # pyright: ignore[reportMissingImports]
from diffusers.configuration_utils import register_to_config  # pyright: ignore[reportMissingImports]
from diffusers.schedulers import KarrasDiffusionSchedulers  # pyright: ignore[reportMissingImports]
from diffusers.utils import BaseOutput  # pyright: ignore[reportMissingImports]

from diffusion_distill.base.errors import choose
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import to_x
from diffusion_distill.process.processes import Process
from diffusion_distill.process.vp_discrete import Discrete
from diffusion_distill.solvers import Table, spelled, tabulate
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.kinds import start_scale
from diffusion_distill.solvers.rows import after
from diffusion_distill.torch import conventions, spacing
from diffusion_distill.torch.engine import precise

#: Schedulers of EDM's models and of flows, whose configs are read beside those of models of betas.
OTHERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")
#: How far levels that a fitted solver is asked for may be from its own, relative to sigma.
CLOSE = 1e-4


@dataclass
class StepOutput(BaseOutput):
    """What `step` returns.

    Attributes:
      prev_sample: the next input of the pipeline's network, or the result.
      pred_original_sample: the network's estimate x_hat.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class DistilledODEScheduler(SchedulerMixin, ConfigMixin):
    """A solver of `SOLVERS` that draws no noise, plain or fitted, as a scheduler of diffusers.

    Args:
      solver: its name, perhaps with options: 'deis order=2'. With `fitted`, the fitted one.
      fitted: a `FittedSolver`, its file, or the file's content, which `save_pretrained` writes.
      grid: levels of your own, {"alpha": [...], "sigma": [...]}, as `choose_levels` gives them.
      family: 'betas', 'edm' or 'flow', see `conventions`; `from_config` finds it.
      spacing: a rule of `grids.RULES` in place of the config's `timestep_spacing`, such as 'logsnr'.
      others: as the schedulers of diffusers have them.

    Raises:
      ValueError: an unknown solver, family or spacing, a solver that draws noise, or levels (a fit's too) that are not
        those of the model.
    """

    config_name = "scheduler_config.json"
    order = 1
    #: Their configs are read, and what they say beyond ours is kept for the way back.
    _compatibles: ClassVar[list[str]] = [*(kind.name for kind in KarrasDiffusionSchedulers), *OTHERS]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        set_alpha_to_one: bool = True,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        family: str = "betas",
        solver: str = "ddim",
        spacing: str = "",
        fitted: Any = None,
        grid: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        if isinstance(fitted, str | Path):
            fitted = FittedSolver.load(fitted)
        self.fitted = FittedSolver.from_dict(fitted) if isinstance(fitted, Mapping) else fitted
        if self.fitted is not None:
            self.register_to_config(fitted=self.fitted.to_dict(), solver=self.fitted.solver)
        spelled(self.config.solver)
        self.convention = conventions.read(self.config)
        self._check_own()
        self.init_noise_sigma = start_scale(self._first_level())
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.num_inference_steps: int | None = None

    @classmethod
    def from_config(cls, settings: Any = None, **kwargs: Any) -> Any:
        """A scheduler for the model of another scheduler, from its config; keywords take the place of its values.

        Raises:
          ValueError: it is no config, it asks for something that is not computed here, or a keyword is unknown.

        Warns of options about the spacing of sigmas that are not read.
        """
        known = {name: None for name in inspect.signature(cls.__init__).parameters if name != "self"}
        for name in kwargs.keys() - {"return_unused_kwargs"}:
            choose("keyword of DistilledODEScheduler", name, known)
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"Give the config of a scheduler, such as pipeline.scheduler.config, got {type(settings).__name__}. "
                "from_pretrained loads a saved one."
            )
        settings = {name: value for name, value in settings.items() if name != "_use_default_values"}
        if "family" not in settings:
            conventions.check(settings)
            kwargs["family"] = kwargs.get("family") or conventions.family_of(settings)
            if not any(kwargs.get(name) for name in ("spacing", "grid", "fitted")):
                conventions.warn_of_spacing(settings)
        if kwargs.get("family") == "flow" and "prediction_type" not in settings:
            kwargs.setdefault("prediction_type", "flow_prediction")
        made = super().from_config(settings, **kwargs)
        scheduler = made[0] if isinstance(made, tuple) else made
        if scheduler.fitted is not None and kwargs.get("solver") not in (None, scheduler.fitted.solver):
            fit, asked = scheduler.fitted.solver, kwargs["solver"]
            raise ValueError(
                f"The fit is one of {fit!r}: leave solver={asked!r} out, or give fitted=None to drop the fit."
            )
        return made

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Makes the table of a number of steps, or of levels of your own.

        Args:
          timesteps: what the network is told at the beginning of each step, decreasing.
          sigmas: sigma/alpha there, and of a flow sigma, before its shift; they may end in 0.
          mu: of a flow whose shift depends on the size of the images.

        Raises:
          ValueError: neither steps nor levels, levels that do not decrease, or others than those of `fitted`.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError("Give timesteps or sigmas, not both.")
        self._mu = mu
        grid = self._own_levels()
        if grid is not None:
            self._check_asked(grid, num_inference_steps, timesteps, sigmas, mu)
        elif timesteps is not None:
            grid = spacing.closed(self.convention.levels_told(timesteps))
        elif sigmas is not None:
            grid = spacing.closed(self._levels_of(sigmas, mu))
        elif num_inference_steps is None:
            raise ValueError("Give the number of steps, or their timesteps or sigmas.")
        else:
            grid = spacing.grid_of(self.config, self.convention, num_inference_steps, mu)
        self._use(grid, device)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The network's input for a sample: scaled for EDM's models, as it is for the others."""
        scale = self.convention.inputs.scale(self._level(timestep))
        return sample if scale is None else (float(scale) * sample.to(precise(sample.dtype))).to(sample.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """One row of the solver's table.

        Args:
          model_output: the network's, perhaps guided, [batch, channels, ...]; a variance behind it is not used.
          timestep: of this row. It says where to begin; after that rows follow each other.
          sample: what `step` returned before, or the noise at first.
          eta: 0; the others are taken for pipelines that pass them.
          return_dict: give a `StepOutput`, else its two fields as a tuple.

        Raises:
          ValueError: eta is not 0, `set_timesteps` was not called, no row is left, or the output is no tensor of the
            sample's shape.
        """
        if eta:
            raise ValueError(f"These solvers draw no noise, but eta={eta!r} was asked for. Leave it out.")
        if self._index < 0:
            self._start(timestep, sample)
        state, row = precise(sample.dtype), self._row(self._index - self._skipped)
        y = self._registers[0] + (sample.to(state) - self._handed.to(state))
        x_hat = self._x_hat(_of_shape(model_output, sample).to(state), y, row.level)
        self._registers = self._advance(row, (y, *self._registers[1:]), x_hat)
        self._index += 1
        self._handed = self._registers[0].to(sample.dtype)
        found = StepOutput(prev_sample=self._handed, pred_original_sample=x_hat.to(sample.dtype))
        return found if return_dict else (found.prev_sample, found.pred_original_sample)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """alpha·x + sigma·eps at the levels of timesteps [batch]."""
        level = self.convention.levels_told(np.atleast_1d(np.asarray(torch.as_tensor(timesteps).cpu(), np.float64)))
        like = original_samples
        alpha, sigma = (
            torch.as_tensor(part, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))
            for part in level
        )
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: torch.Tensor, timestep: Any, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise`, as pipelines of flows call it."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep).reshape(-1))

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begins at a row: pipelines that begin with an image call it."""
        self._begin_index = begin_index

    @property
    def step_index(self) -> int | None:
        """The row that comes next; None before the first."""
        return self._index if self._index >= 0 else None

    @property
    def begin_index(self) -> int | None:
        """The row to begin at, if a pipeline said so."""
        return self._begin_index

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # --- the table, and where in it

    _index: int = -1  # before the first row
    _begin_index: int | None = None
    _skipped = 0
    _mu: float | None = None

    def _tabulate(self, grid: Level, skipped: int = 0) -> Table:
        """The table on a grid; of a fitted solver, whose first rows may be skipped."""
        table = tabulate(self.config.solver, grid, self.convention.process)
        table = table.plain() if self.fitted is None else table.distilled(self.fitted.lambdas[skipped:])
        if not table.deterministic:
            raise ValueError(f"The solver {self.config.solver!r} draws noise; this scheduler runs those that do not.")
        return table

    def _use(self, grid: Level, device: Any) -> None:
        self._grid, self._table = grid, self._tabulate(grid)
        self._index, self._begin_index = -1, None
        self._lay_out(self._table.level, self._table.init, device)
        self.num_inference_steps = len(grid.sigma) - 1
        self.order = -(-self._table.nfe // self.num_inference_steps)

    def _lay_out(self, levels: Level, init: float, device: Any) -> None:
        """What the pipeline is told of rows: their timesteps, whole numbers as such, and their levels."""
        self._levels, self.init_noise_sigma = levels, float(init)
        told = self.convention.told(levels)
        whole = np.abs(told - np.round(told)).max() < 1e-6 and self.config.family == "betas"
        self._told = np.round(told) if whole else told
        self.timesteps = torch.tensor(self._told, dtype=torch.int64 if whole else torch.float32, device=device)
        self.sigmas = torch.tensor(np.append(self.convention.sigmas(levels), 0.0), dtype=torch.float32)

    def _first_level(self) -> Level:
        own = self._own_levels()
        level = self.convention.process.level(np.array([1.0])) if own is None else own
        return Level(*map(np.float64, level.at(0)))

    def _own_levels(self) -> Level | None:
        """Those of the fitted solver, or those that the config names."""
        return self.fitted.grid if self.fitted is not None else grids.from_numbers(self.config.grid)

    def _levels_of(self, sigmas: Sequence[float], mu: float | None) -> Level:
        flow = self.config.family == "flow"
        return self.convention.levels_of(spacing.shifted(self.config, sigmas, mu) if flow else sigmas)

    def _check_own(self) -> None:
        """Raises ValueError if the solver draws noise, its own levels are not the model's, or no rule has a name."""
        own, model = self._own_levels(), self.convention.process
        if self.config.spacing:
            choose("spacing", self.config.spacing, grids.RULES)
        if own is None:
            self._tabulate(grids.make_grid(model, 4))
            return
        self._tabulate(own)
        theirs = model if self.fitted is None else self.fitted.process
        if not self.convention.owns(own) or (isinstance(theirs, Discrete) and not _alike(theirs, model)):
            told = "levels of its own" if self.fitted is None else f"a solver fitted for {theirs}"
            raise ValueError(f"This scheduler has {told}, but the config is that of a model with {model}.")

    def _check_asked(self, own: Level, steps: int | None, timesteps: Any, sigmas: Any, mu: float | None) -> None:
        """Raises ValueError if a pipeline asks for other levels than a scheduler's own."""
        have = len(own.sigma) - 1
        if sigmas is not None and self.config.family == "flow" and spacing.equal(sigmas):
            sigmas, steps = None, len(sigmas)
        if timesteps is not None or sigmas is not None:
            levels = self.convention.levels_told(timesteps) if sigmas is None else self._levels_of(sigmas, mu)
            asked, steps = spacing.closed(levels).sigma, None
            if asked.shape != own.sigma.shape or not np.allclose(asked, own.sigma, rtol=CLOSE, atol=CLOSE):
                raise ValueError(
                    f"This scheduler has levels of its own, of its fit or its grid, for {have} steps, but others were "
                    f"asked for. Leave timesteps= and sigmas= out and ask for {have} steps."
                )
        if steps not in (None, have):
            raise ValueError(
                f"This scheduler has levels for {have} steps, but {steps} were asked for. Ask for {have}, or fit or "
                f"choose levels for {steps}."
            )

    def _row_of(self, timestep: Any) -> int:
        """The first row whose timestep is nearest to one."""
        if self.num_inference_steps is None:
            raise ValueError("Call set_timesteps first.")
        if self._begin_index is not None:
            return self._begin_index
        return 0 if timestep is None else int(np.argmin(np.abs(self._told - float(timestep))))

    def _level(self, timestep: Any) -> Level:
        index = self._row_of(timestep) if self._index < 0 else self._index
        return Level(*map(np.float64, self._levels.at(index)))

    def _start(self, timestep: Any, sample: torch.Tensor) -> None:
        """Begins; at a row in the middle with the solver on the rest of the grid, as it has no earlier outputs."""
        self._index = self._skipped = self._row_of(timestep)
        if self._skipped:
            first = int(np.argmin(np.abs(self._grid.angle - self._levels.at(self._skipped).angle)))
            rows = len(self._levels.sigma) - self._skipped
            self._table = self._tabulate(self._grid.at(slice(first, None)), self._skipped)
            if self._table.nfe != rows:
                raise ValueError(
                    f"The pipeline begins in the middle of a step of the solver {self.config.solver!r}, at row "
                    f"{self._skipped}. Change strength= or denoising_start= a little, or take a solver with one call "
                    "in a step."
                )
        self._handed = sample
        self._registers = (sample.to(precise(sample.dtype)),) * self._table.weights.shape[1]

    # --- one row

    def _x_hat(self, output: torch.Tensor, y: torch.Tensor, level: Level) -> torch.Tensor:
        x_hat = to_x(self.convention.prediction, self.convention.sign * output, y, level, self.convention.sigma_data)
        largest = self.config.clip_sample_range
        return x_hat.clamp(-largest, largest) if self.config.clip_sample else x_hat

    def _row(self, k: int) -> Table:
        if k >= self._table.nfe:
            raise ValueError("All rows of the solver are done: call set_timesteps before the next sample.")
        return self._table.row(k)

    def _advance(self, row: Table, registers: tuple, x_hat: torch.Tensor) -> tuple:
        return after(row, registers, x_hat)


def _of_shape(output: Any, sample: torch.Tensor) -> torch.Tensor:
    """A network's output without the variance behind it; raises ValueError if it is none for a sample."""
    found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if not isinstance(found, tuple) or len(found) < 2 or output[:, : sample.shape[1]].shape != sample.shape:
        raise ValueError(
            f"The network's output must be a tensor of its inputs' shape {tuple(sample.shape)}, got {found}. Networks "
            "of diffusers return it as .sample."
        )
    return output[:, : sample.shape[1]]


def _alike(process: Process, other: Process) -> bool:
    """Whether two processes have the same levels."""
    times = np.linspace(0.1, 1.0, 10)
    return np.allclose(np.stack(process.level(times)), np.stack(other.level(times)), rtol=0, atol=CLOSE)
