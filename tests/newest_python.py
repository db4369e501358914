"""Runs the fast tests on the newest Python of this machine, in an environment of its own.

`make test` calls this at its end. The suite runs on the machine's default Python, whose newest jax may be an
old one (jax 0.11 needs Python 3.12). A newer Python gets newer libraries, so what will break tomorrow shows
today. Candidates are `python3.N` on the PATH and the versions pyenv has installed. One that is there may
still refuse to run (a pyenv shim) or get no wheels yet (a very new Python): then the next lower is tried.
Finding none is no failure; failing tests are.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-newest"  # one folder per version
OLDEST = (3, 12)

# Prints "3 13" where the Python runs, is a released CPython with the usual lock, and can make environments.
PROBE = """
import sys, sysconfig, venv, ensurepip
usual = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
print(*sys.version_info[:2] if usual and sys.version_info.releaselevel == "final" else (0, 0))
"""


def candidates() -> list[Path]:
    """Files that look like a Python 3, on the PATH and among pyenv's versions; they need not run."""
    on_path = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [file for folder in on_path for file in sorted(folder.glob("python3.[1-9][0-9]"))]
    return found + sorted(pyenv.glob("versions/*/bin/python3"))


def version_of(python: Path) -> tuple[int, int]:
    """(major, minor) of a Python, or (0, 0) where it does not run or cannot serve."""
    try:
        probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=60, check=True)
        major, minor = probe.stdout.split()
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0, 0


def newer_pythons() -> list[tuple[tuple[int, int], Path]]:
    """The Pythons newer than this one, the newest first, one for each version."""
    by_version: dict[tuple[int, int], Path] = {}
    for python in candidates():
        by_version.setdefault(version_of(python), python)
    oldest = max(OLDEST, (sys.version_info.major, sys.version_info.minor + 1))
    return sorted((item for item in by_version.items() if item[0] >= oldest), reverse=True)


def installed(python: Path, name: str) -> Path | None:
    """The Python of an up-to-date environment made with `python`, or None where it cannot be made."""
    folder = ENVIRONMENTS / name
    own, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = hashlib.sha256((ROOT / "setup.py").read_bytes()).hexdigest()
    if own.exists() and stamp.exists() and stamp.read_text() == wanted:
        return own
    print(f"Installing into {folder.relative_to(ROOT)}: once, about a minute plus the download.", flush=True)
    make = [python, "-m", "venv", "--clear", folder]
    install = [own, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-e", f"{ROOT}[dev]"]
    for command in (make, install):
        if subprocess.run(command).returncode:
            shutil.rmtree(folder, ignore_errors=True)
            return None
    stamp.write_text(wanted)
    return own


def main() -> int:
    """Exit status of the fast tests on the newest Python that can be used; 0 where there is none."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    newer = newer_pythons()
    if not newer:
        print(f"No Python newer than {here} found: the fast tests ran on {here} only.")
        return 0
    for (major, minor), python in newer:
        name = f"{major}.{minor}"
        print(f"\n== The fast tests on Python {name} ({python})", flush=True)
        own = installed(python, name)
        if own is not None:
            return subprocess.run([own, "-m", "pytest", "-m", "fast", "tests"], cwd=ROOT).returncode
        print(f"The dependencies do not install on Python {name}; trying the next lower.", flush=True)
    print(f"WARNING: no newer Python could be set up; the tests ran on {here} only.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
