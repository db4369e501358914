"""The settings of a training run, independent of the method."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffusion_distill.base.errors import positive_int, truth
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.base.seeds import check_seed
from diffusion_distill.training.low_rank import check_pattern
from diffusion_distill.training.optimizers import OptimizerSettings
from diffusion_distill.training.sharding import check_axes


@dataclass(frozen=True)
class Settings:
    """Batches, cadences, logs and the optimizer.

    Attributes:
      batch_size: global, over all devices.
      parts: each batch is worked through in so many parts (gradient accumulation), in the memory of one.
      seed: of initialisation, data order, times and noise.
      log_every, checkpoint_every: in updates.
      keep_checkpoints: how many of the newest stay.
      nonfinite_limit: after so many updates in a row whose loss or gradient was not finite the run stops; see
        `training.nonfinite`.
      updates_per_dispatch: so many updates run on a GPU or TPU in one go, see `training.dispatch`; 0 for what suits the
        devices: one on a CPU, ten elsewhere. Never more than from one record or checkpoint to the next.
      data_parallel, params_parallel: the two numbers of the mesh of devices; -1 for what the other one leaves. With
        params_parallel=n each device holds 1/n of the state; see `training.sharding`.
      low_rank: rank of the adapters that a distillation trains in place of the whole student; 0 for the whole student.
        See `training.low_rank`.
      low_rank_pattern: which parameters have adapters: a regular expression, searched in names such as
        'mid.block_1/conv1/kernel'; empty for every kernel.
      remat: computes the network's blocks a second time in the backward pass, which then needs less memory.
      evaluate_every: in training images, see `base.lengths` ('1M'); 0 for never.
      evaluate_count: images measured against the data at each evaluation; 0 draws a picture only.
      evaluate_features: what they are measured on, see `evaluation.features_named`: 'pixels', or a classifier's folder.
      flip: random horizontal flips of the training images.
      tensorboard: also write event files.
      wandb: Weights & Biases project to report to; empty for none.

    Raises:
      ValueError: a count that is not positive, a seed that is no whole number of 64 bits, a length that cannot be read,
        numbers of a mesh that are neither positive nor -1, or both -1, a pattern that is no regular expression.
      TypeError: the optimizer is no `OptimizerSettings`.
    """

    batch_size: int = 128
    parts: int = 1
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    nonfinite_limit: int = 200
    updates_per_dispatch: int = 0
    data_parallel: int = -1
    params_parallel: int = 1
    low_rank: int = 0
    low_rank_pattern: str = ""
    remat: bool = False
    evaluate_every: str | int = "0"
    evaluate_count: int = 0
    evaluate_features: str = "pixels"
    flip: bool = False
    tensorboard: bool = False
    wandb: str = ""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        counts = ("batch_size", "parts", "log_every", "checkpoint_every", "keep_checkpoints", "nonfinite_limit")
        for name in counts:
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))  # numbers of NumPy may overflow
        object.__setattr__(self, "seed", check_seed(self.seed))
        parse_length(self.evaluate_every)
        check_axes(self.data_parallel, self.params_parallel)
        for name in ("updates_per_dispatch", "evaluate_count", "low_rank"):
            if getattr(self, name) != 0:
                positive_int(f"{name}, if not 0,", getattr(self, name))
        check_pattern(self.low_rank_pattern)
        for name in ("remat", "flip", "tensorboard"):
            truth(name, getattr(self, name))
        if not isinstance(self.optimizer, OptimizerSettings):
            raise TypeError(f"optimizer must be OptimizerSettings(...), got {self.optimizer!r}.")


#: Fields of `Settings` that change no number of a run, so that it may go on with others.
WITHOUT_EFFECT = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "nonfinite_limit",
    "updates_per_dispatch",
    "data_parallel",
    "params_parallel",
    "remat",
    "evaluate_every",
    "evaluate_count",
    "evaluate_features",
    "tensorboard",
    "wandb",
)
