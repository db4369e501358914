"""A published file of weights: what the registry knows about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusion_distill.denoisers.model import Model


@dataclass(frozen=True)
class Published:
    """A published file of weights.

    Attributes:
      name: its name here.
      model: everything but the parameters.
      steps: the sampling steps a student was made for; 0 for a teacher.
      dataset: what it was trained on.
      url: where it is.
      source: paper, publisher and licence.
      format: a name in `READERS`.
      size, sha256: of the file, in bytes and hexadecimal; None where they have not been published.
      family, arguments: of a file of PyTorch, see `torch_models`.
      preprocessing: how its images were prepared, where that is known.
    """

    name: str
    model: Model
    steps: int
    dataset: str
    url: str
    source: str
    format: str = "progressive"
    size: int | None = None
    sha256: str | None = None
    family: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: str = ""
