"""Checkpoints of the whole state with Orbax: one item per role, so that one can be read without the others.

CHECKPOINTS/<update>/params, opt_state, averages, teacher, counters   arrays
CHECKPOINTS/<update>/checksums                                        of each item, see `training.checksum`
CHECKPOINTS/<update>/about                                            phase, data position, configuration (JSON)

Saving happens in the background and is atomic. A checkpoint that cannot be read, or whose checksums differ, is
moved aside and the one before it is taken. One that is a link, because it was moved to another disk, is read like the
others and never deleted. Orbax is imported where it is used: that takes a third of a second, which a program that
saves and loads nothing does not wait for.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from diffusion_distill.base.files import plain, read_json, writable
from diffusion_distill.base.trees import from_plain, to_plain
from diffusion_distill.training.checksum import checksums
from diffusion_distill.training.sharding import one_copy
from diffusion_distill.training.state import TrainState

DAMAGED = "damaged_checkpoints"
ADVICE = "Copy the whole folder again from where it was made, or make it again."


class Checkpoints:
    """The checkpoints of a run, newest last, under a folder."""

    def __init__(self, folder: Path, keep: int = 2, about: Mapping[str, Any] | None = None):
        """Keeps the newest `keep` checkpoints; `about` is written into each.

        Raises:
          ValueError: as `base.files.writable`, or a file or a link to nothing stands where a checkpoint belongs.
        """
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(preservation_policy=_Kept(folder, keep), create=True)
        self._folder, self._cleanup, self._asked = folder, ExitStack(), 0
        self._about = json.loads(json.dumps(dict(about or {}), default=plain))
        _check_numbers(writable(folder))
        self._manager = ocp.CheckpointManager(self._cleanup.enter_context(_plain(folder)), options=options)

    @property
    def latest(self) -> int | None:
        """The update number of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, **about: Any) -> None:
        """Saves the state and facts about it under its update number, if it is newer than what is there."""
        import orbax.checkpoint as ocp

        if self.latest is not None and step <= self.latest:
            return
        items = _items(state)
        items = one_copy({**items, "checksums": {name: checksums(tree) for name, tree in items.items()}})
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}  # type: ignore[call-arg]
        facts = ocp.args.JsonSave({"update": step, **about, **self._about})  # type: ignore[call-arg]
        if not self._manager.save(step, args=ocp.args.Composite(**arguments, about=facts)):
            raise RuntimeError(f"Orbax did not save the checkpoint of update {step}.")

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint that is whole, with the shapes, types and shardings of `like`.

        Raises:
          ValueError: none can be read.
          PermissionError, ValueError: the newest one that is whole may not be read by this user; it stays where it is.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._read(step, like)
            except Exception as error:  # Orbax raises a dozen kinds for damaged files
                if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error):
                    raise  # another user's file is not damaged
                damaged[step] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            self._move_aside(damaged)
            return state
        raise ValueError(
            f"None of the checkpoints in {self._folder} can be read: {damaged}. Delete the folder to begin again."
        )

    def reached_preemption(self) -> bool:
        """Whether the machines are about to be taken away; known only where several processes run together.

        All processes ask equally often.
        """
        # JAX agrees on the next number after the last one that any process asked with, and answers yes to that number
        # only. Numbers of updates would leave it out where there are several updates between two questions.
        self._asked += 1
        return jax.process_count() > 1 and self._manager.reached_preemption(self._asked)

    def close(self) -> None:
        """Waits for saves under way."""
        with self._cleanup:
            self._manager.wait_until_finished()
            self._manager.close()

    def _read(self, step: int, like: TrainState) -> TrainState:
        import orbax.checkpoint as ocp

        items, whole = _items(like), like.step.sharding  # without one Orbax looks for the devices that saved it
        sums = {
            name: jax.ShapeDtypeStruct((len(jax.tree.leaves(tree)),), np.uint32, sharding=whole)
            for name, tree in items.items()
        }
        shapes = {**jax.tree.map(ocp.utils.to_shape_dtype_struct, items), "checksums": sums}
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}  # type: ignore[call-arg]
        found = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        for name in items:
            if not np.array_equal(checksums(found[name]), found["checksums"][name]):
                raise ValueError(f"the content of {name} has changed since it was written")
        parts = {name: from_plain(found[name], getattr(like, name)) for name in items if name != "counters"}
        return like.replace(**parts, **found["counters"])

    def _move_aside(self, damaged: Mapping[int, str]) -> None:
        for step, reason in damaged.items():
            place = _free(self._folder.parent / DAMAGED / str(step))
            warnings.warn(f"Checkpoint {step} is damaged ({reason}); moved to {place}.", stacklevel=3)
            if jax.process_index() == 0:
                writable(place.parent)
                (self._folder / str(step)).replace(place)
        if damaged:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints")
            self._manager.reload()


@dataclass(frozen=True)
class _Kept:
    """Tells Orbax which checkpoints stay: the newest few and all links, of which it would delete what they point to."""

    folder: Path
    keep: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each of the checkpoints, the newest being the last."""
        first = len(checkpoints) - self.keep
        return [k >= first or (self.folder / str(c.step)).is_symlink() for k, c in enumerate(checkpoints)]


def _check_numbers(folder: Path) -> None:
    """Warns of checkpoints that are links; raises ValueError if no folder stands where a newer checkpoint belongs."""
    newest = latest_in(folder)
    for path in _numbered(folder):
        if not path.is_dir() and int(path.name) > newest:
            what = "a link to nothing" if path.is_symlink() else "a file"
            where = f"from update {newest}" if newest else "from the beginning"
            raise ValueError(
                f"{path} is {what}, where a checkpoint belongs. Bring back the checkpoint, for example by mounting the "
                f"disk on which it lies; or delete {path.name}: then the run goes on {where}."
            )
        if path.is_dir() and path.is_symlink():
            warnings.warn(
                f"The checkpoint {path} is a link to {os.readlink(path)}. It stays, even when it is old: delete both "
                "when they are needed no more.",
                stacklevel=5,
            )


def _items(state: TrainState) -> dict[str, Any]:
    """The state's non-empty parts by item name, as nested dictionaries: a network's parameters may be any tree."""
    parts = {
        "params": state.params,
        "opt_state": state.opt_state,
        "averages": state.averages,
        "teacher": state.teacher,
    }
    parts = {name: to_plain(tree) for name, tree in parts.items() if jax.tree.leaves(tree)}
    return {**parts, "counters": {"step": state.step, "skipped": state.skipped}}


def latest_in(folder: Path) -> int:
    """The update number of the newest checkpoint in a folder, without opening it; 0 if there is none."""
    return max(_numbers(folder), default=0)


def described_in(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint that tells it says about its run, as `Checkpoints` was given it; {} if none does."""
    for number in sorted(_numbers(folder), reverse=True):
        try:
            found = read_json(folder / str(number) / "about" / "metadata", "")
        except (OSError, ValueError):
            continue
        return {name: value for name, value in found.items() if name != "update"}
    return {}


def _numbers(folder: Path) -> list[int]:
    """The update numbers of the checkpoints in a folder; an empty folder is none."""
    return [int(path.name) for path in _numbered(folder) if any(path.glob("*"))]


def _numbered(folder: Path) -> list[Path]:
    """What has the name of a checkpoint in a folder."""
    return [path for path in folder.glob("*") if re.fullmatch("[0-9]+", path.name)]


def _free(place: Path) -> Path:
    """The path, or with a number behind it if it is taken: an update may be damaged, repeated and damaged again."""
    names = (place, *(place.with_name(f"{place.name}_{k}") for k in range(2, 1000)))
    return next(name for name in names if not name.exists())


def save_params(folder: Path, params: Any) -> None:
    """Writes parameters alone, as an artefact's, as nested dictionaries."""
    import orbax.checkpoint as ocp

    folder.parent.mkdir(parents=True, exist_ok=True)
    with _plain(folder.parent) as parent, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(parent / folder.name, jax.tree.map(jnp.asarray, one_copy(to_plain(params))), force=True)


def load_params(folder: Path, like: Any) -> Any:
    """Reads parameters of the shapes and types of `like` (arrays or shape structs) onto the default device.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: names, shapes or types differ from `like`, or files are missing or damaged.
    """
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} with parameters. {ADVICE}")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), to_plain(like))
    with _plain(folder.parent) as parent, ocp.StandardCheckpointer() as checkpointer:
        try:
            found = checkpointer.restore(parent / folder.name, abstract)
            return jax.tree.map(jnp.asarray, from_plain(found, like))
        except Exception as error:  # Orbax raises a dozen kinds for damaged files
            reason = " ".join(str(error).split())[:400]
            raise ValueError(
                f"The parameters in {folder} are damaged, or are not those of the model beside them "
                f"({type(error).__name__}: {reason}). {ADVICE}"
            ) from error


#: Characters that Orbax takes for a pattern of names, and one that TensorStore takes for a separator.
MISREAD = {*"[]*?\\"} - {os.sep}


@contextmanager
def _plain(folder: Path) -> Iterator[Path]:
    """An absolute path of a folder that Orbax and TensorStore read as it is: through a link where its own is not so."""
    folder = folder.absolute()
    if not MISREAD & {*str(folder)}:
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        if MISREAD & {*place}:
            raise ValueError(
                f"Checkpoints cannot be kept in {folder}: neither its path nor that of the folder for temporary files, "
                f"{place}, is free of [ ] * ? and backslash. Choose another folder, or set TMPDIR."
            )
        link = Path(place) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link
