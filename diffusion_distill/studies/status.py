"""How far a run is, told from its folder, which is only read, also while a run writes it or where there is none."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_distill.base.files import user_path
from diffusion_distill.studies.folder_contents import METRICS
from diffusion_distill.studies.next_steps import artefacts_in
from diffusion_distill.training.checkpoint import DAMAGED, latest_in
from diffusion_distill.training.logs import read_figures
from diffusion_distill.training.progress import in_hours

LOCKS = Path("/proc/locks")


def status(folder: str | Path) -> dict[str, str]:
    """What a folder says about its run, {what: in words}; empty if it holds no run.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give the workdir of a run.")
    records, trouble = _figures(folder / METRICS)
    checkpoint = latest_in(folder / "checkpoints")
    if not (records or checkpoint or (folder / "run.json").exists() or trouble):
        return {}
    found = {"run": _at_work(folder / "lock"), **_progress(records)}
    found["last checkpoint"] = f"after update {checkpoint}" if checkpoint else "none"
    if damaged := sorted(path.name for path in folder.glob(f"{DAMAGED}/*")):
        found["damaged checkpoints"] = ", ".join(damaged)
    found["artefacts"] = ", ".join(path.name for path in artefacts_in(folder)) or "none yet"
    return found | ({"trouble": "; ".join(trouble)} if trouble else {})


def _progress(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Phase, update, speed, time left, skipped updates and where the time went, from the last record with a speed."""
    timed = [record for record in records if _number(record.get("images_per_second"))]
    if not timed:
        return {"update": "none is logged yet"}
    last = timed[-1]
    update, speed, whole = last["update"], last["images_per_second"], last.get("updates_in_all")
    found = {"phase": str(last.get("phase")), "update": f"{update}", "speed": f"{speed:g} images per second"}
    if _number(whole) and update:
        found["update"] += f" of {whole}"
        images = last.get("samples", 0) / update * (whole - update)
        found["time left"] = in_hours(images / speed) if speed > 0 else "unknown"
    if _number(last.get("loss")):
        found["loss"] = f"{last['loss']:.4g}"
    found["updates that were not finite"] = str(last.get("skipped", "unknown"))
    if isinstance(spent := last.get("seconds"), Mapping):
        whole_time = sum(value for value in spent.values() if _number(value)) or 1
        found["time spent"] = ", ".join(f"{name} {value / whole_time:.0%}" for name, value in spent.items())
    return found


def _figures(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a run, and what is wrong with them in sentences."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = read_figures(path) if path.exists() else []
        except OSError as error:
            return [], [f"{path}: {error.strerror}"]
    return found, [str(warning.message) for warning in told]


def _at_work(lock: Path) -> str:
    """Whether a process holds a lock. The system is asked; taking the lock could keep a run from starting."""
    try:
        place, holder = lock.stat(), lock.read_text(errors="replace").strip()[:100]
        age = time.time() - max(path.stat().st_mtime for path in (lock, lock.parent / METRICS) if path.is_file())
    except (OSError, ValueError):
        return "not at work"
    written = f"; last written {in_hours(max(age, 0))} ago"
    if not LOCKS.is_file():
        return f"begun by {holder or 'an unknown process'}{written}"
    held = any(line.split()[5:6] and line.split()[5].endswith(f":{place.st_ino}") for line in _lines(LOCKS))
    return f"at work ({holder or 'unknown process'}){written}" if held else f"not at work on this machine{written}"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
