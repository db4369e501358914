"""Where the figures and pictures of a run go: JSON lines always, TensorBoard and Weights & Biases if asked for.

A log has three methods: scalars, images and close. A run that resumes at update k takes up its logs there:
records of later updates, written before it died, are dropped or overwritten.
"""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffusion_distill.base.files import EDITED
from diffusion_distill.base.whole import whole
from diffusion_distill.report.pictures import tile


class Log(Protocol):
    """A place for figures and pictures."""

    def scalars(self, update: int, figures: Mapping[str, Any]) -> None:
        """Figures by name after an update."""
        ...

    def images(self, update: int, name: str, images: np.ndarray) -> None:
        """Pictures [n, height, width, channels] in [-1, 1]."""
        ...

    def close(self) -> None:
        """Writes what is not yet written."""
        ...


class JsonLines:
    """Appends one JSON object per record to a file; does nothing without a path. It leaves out pictures."""

    def __init__(self, path: Path | None, keep: int = 0):
        """A file that is there keeps its records up to update number `keep`, from which a run goes on."""
        if path and path.exists():
            kept = [record for record in read_figures(path) if record["update"] <= keep]
            with whole(path) as half:
                half.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = open(path, "a", buffering=1, encoding="utf-8") if path else None  # noqa: SIM115

    def scalars(self, update: int, figures: Mapping[str, Any]) -> None:
        """Writes a record."""
        if self._file:
            self._file.write(json.dumps({"update": update, **figures}) + "\n")

    def images(self, update: int, name: str, images: np.ndarray) -> None:
        """Nothing."""

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()


class TensorBoard:
    """Event files for TensorBoard, written by tensorboardX (no TensorFlow)."""

    def __init__(self, folder: Path, keep: int = 0):
        """Raises ImportError without tensorboardX."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard needs tensorboardX: `pip install tensorboardX` (the extra [tensorboard])."
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=keep + 1 if keep else None)

    def scalars(self, update: int, figures: Mapping[str, Any]) -> None:
        """Every figure that is a number."""
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, update)

    def images(self, update: int, name: str, images: np.ndarray) -> None:
        """One tiled picture."""
        self._writer.add_image(name, tile(images), update, dataformats="HWC")

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; it is the same run after a restart, because its id is kept in the folder."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]):
        """Raises ImportError without wandb."""
        try:
            import wandb  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError("Weights & Biases needs its package: `pip install wandb` (the extra [wandb]).") from error
        self._library, remembered = wandb, folder / "wandb_id"
        number = remembered.read_text() if remembered.exists() else secrets.token_hex(6)
        remembered.write_text(number)
        self._run = wandb.init(project=project, id=number, resume="allow", config=dict(settings), dir=str(folder))

    def scalars(self, update: int, figures: Mapping[str, Any]) -> None:
        """Every figure."""
        self._run.log(dict(figures), step=update)

    def images(self, update: int, name: str, images: np.ndarray) -> None:
        """One tiled picture."""
        self._run.log({name: self._library.Image(tile(images))}, step=update)

    def close(self) -> None:
        """Ends the session; a restart goes on with the run."""
        self._run.finish()


class Logs:
    """Several logs as one."""

    def __init__(self, logs: Sequence[Log] = ()):
        """In the order in which they are written."""
        self._logs = list(logs)

    def scalars(self, update: int, figures: Mapping[str, Any]) -> None:
        """To every log."""
        for log in self._logs:
            log.scalars(update, figures)

    def images(self, update: int, name: str, images: np.ndarray) -> None:
        """To every log."""
        for log in self._logs:
            log.images(update, name, images)

    def close(self) -> None:
        """Closes every log."""
        for log in self._logs:
            log.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file.

    A last line that was cut off while being written is left out, and so are damaged ones, such as the zero bytes that a
    machine that loses power may leave, with a warning.
    """
    *lines, _ = path.read_text(encoding=EDITED, errors="replace").split("\n")
    found = [_record(line) for line in lines if line]
    if None in found:
        warnings.warn(f"{path}: {found.count(None)} of {len(found)} lines are damaged and left out.", stacklevel=2)
    return [record for record in found if record is not None]


def read_figures(path: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl; those that say no update are damaged too."""
    found = read_json_lines(path)
    figures = [record for record in found if type(record.get("update")) is int]
    if len(figures) < len(found):
        warnings.warn(
            f"{path}: {len(found) - len(figures)} of {len(found)} records name no update and are left out.",
            stacklevel=2,
        )
    return figures


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
