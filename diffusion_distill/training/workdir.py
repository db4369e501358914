"""The folder of a run: which run it holds, and that only one process works in it.

WORKDIR/run.json               what the run is: model, method, settings, teacher, data
WORKDIR/lock                   held by the process at work; the operating system frees it when that one ends
WORKDIR/checkpoints/           see `training.checkpoint`
WORKDIR/metrics.jsonl          figures, one record per line
WORKDIR/samples/               pictures drawn on the way
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diffusion_distill.base.files import plain, read_json, writable
from diffusion_distill.base.whole import write_json
from diffusion_distill.training.checkpoint import described_in, latest_in

#: What file systems answer that cannot lock, as Lustre and NFS may be mounted.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
#: (folder, description there, description asked for) -> (differences that are accepted, those that are not), in words
Compare = Callable[[Path, Mapping[str, Any], Mapping[str, Any]], tuple[list[str], list[str]]]


class Workdir:
    """A claimed folder, until closed."""

    def __init__(
        self, folder: str | Path, description: Mapping[str, Any], kind: str = "run", compare: Compare | None = None
    ):
        """Makes the folder, or checks that what is there is the same run and that nobody else is at it.

        Args:
          description: JSON-ready, what makes the run this one.
          kind: runs of several kinds may share a folder; KIND.json describes each.
          compare: says which differences from the description there matter, by default all. Those that do not are
            printed, and the description is written anew.

        Raises:
          ValueError: it holds another run, whose differing fields are named; another process works in it; it
            cannot be written.
        """
        lock, described = "lock" if kind == "run" else f"{kind}.lock", f"{kind}.json"
        self.path = writable(folder, lock, described, "metrics.jsonl")
        self._lock = _lock(self.path / lock) if jax.process_index() == 0 else None
        try:
            _claim(self.path / described, json.loads(json.dumps(description, default=plain)), compare or all_matter)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets others work in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(path: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows has no such locks; two processes there are the user's matter
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    except PermissionError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror}. Another user began this run; change the permissions of its "
            "files, or choose another workdir."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 100).decode(errors="replace").strip()
        os.close(descriptor)
        raise ValueError(
            f"Another process ({holder or 'unknown'}) works in {path.parent}. Wait until it ends, stop it, or choose "
            "another workdir."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        warnings.warn(
            f"The file system of {path.parent} has no locks ({error.strerror}): see to it that no other process works "
            "there.",
            stacklevel=4,
        )
    os.truncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode())
    return descriptor


def _claim(path: Path, wanted: dict[str, Any], compare: Compare) -> None:
    if path.exists():
        found = _description(path, wanted)
        accepted, refused = compare(path.parent, found, wanted)
        if refused:
            raise ValueError(
                f"The workdir {path.parent} holds another {path.stem}; it differs in {', '.join(refused)}. "
                "Choose another workdir, or delete this one."
            )
        if accepted and jax.process_index() == 0:
            print("\n".join(f"goes on with {change}" for change in accepted), flush=True)
        if found == wanted:
            return
    if jax.process_index() == 0:
        write_json(path, wanted)


def _description(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The description in a file. A damaged one is moved aside, and the newest checkpoint's copy takes its place.

    Without any checkpoint nothing was kept that another description could spoil: then the one asked for does.
    """
    try:
        return read_json(path, "Choose another workdir, or delete the file if the workdir is surely this run's.")
    except ValueError as error:
        checkpoints = path.parent / "checkpoints"
        spare = described_in(checkpoints) if latest_in(checkpoints) else wanted
        if path.stem != "run" or not spare:
            raise
        warnings.warn(
            f"{error} Its content is taken from {'the newest checkpoint' if spare is not wanted else 'this command'}; "
            f"the damaged file is kept as {path.name}.damaged.",
            stacklevel=4,
        )
        if jax.process_index() == 0:
            os.replace(path, path.with_name(f"{path.name}.damaged"))
            write_json(path, spare)
        return spare


class Change(NamedTuple):
    """A field that differs between two descriptions, by its dotted name; None where one lacks it."""

    name: str
    before: Any
    now: Any

    def in_words(self) -> str:
        """As errors say it."""
        return f"{self.name} (there {self.before!r}, asked {self.now!r})"


def changes(found: Any, wanted: Any, name: str = "") -> list[Change]:
    """The fields that differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted({*found, *wanted})
        return [c for key in keys for c in changes(found.get(key), wanted.get(key), f"{name}.{key}".strip("."))]
    return [] if found == wanted else [Change(name, found, wanted)]


def all_matter(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The strictest `Compare`: no field may differ."""
    return [], [change.in_words() for change in changes(found, wanted)]
