"""Runs the fast tests with the oldest and with the newest packages: `make test-versions`.

    lowest    every package at exactly the lower bound that setup.py gives: what Colab has. On Colab's Python 3.13
              where this machine has it, else on the Python that runs this file.
    newest    the newest packages on the newest Python of this machine (jax 0.11 needs Python 3.12), so what will
              break tomorrow shows today. Where `make test` ran on that Python already, there is nothing to do.

What breaks is how a package is called, and other parameters of a test call it alike: of every test function the first
of its parameters is run. Where each calls another package, the test is marked `packages`, and all are run.

`python tests/versions.py lowest` runs one of the two. Each has an environment of its own, made again only when
setup.py changes. A Python is a `python3.N` on the PATH or one of pyenv's. It may still refuse to run (a pyenv shim)
or get no wheels yet (a very new Python): for the newest packages, the next lower is tried then.
"""

import hashlib
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

from packaging.requirements import Requirement

Version = tuple[int, int]

ROOT = Path(__file__).resolve().parent.parent
HERE: Version = sys.version_info[:2]
COLAB: Version = (3, 13)

# Prints "3 13" where the Python runs, is a released CPython with the usual lock, and can make environments.
PROBE = """
import sys, sysconfig, venv, ensurepip
usual = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
print(*sys.version_info[:2] if usual and sys.version_info.releaselevel == "final" else (0, 0))
"""


def requirements() -> dict[str, list[str]]:
    """What setup.py requires by extra; what the package itself needs stands under ""."""
    setuptools = mock.Mock()
    with mock.patch.dict(sys.modules, setuptools=setuptools):
        runpy.run_path(str(ROOT / "setup.py"))
    told = setuptools.setup.call_args.kwargs
    return {"": told["install_requires"], **told["extras_require"]}


def lower_bounds(requirements: Iterable[str]) -> list[str]:
    """`name==version` with the lowest version that each requirement allows.

    Raises:
      ValueError: a requirement has no lower bound.
    """
    found = set()
    for requirement in map(Requirement, requirements):
        versions = [bound.version for bound in requirement.specifier if bound.operator in (">=", "==")]
        if len(versions) != 1:
            raise ValueError(f"'{requirement}' needs one lower bound: name>=version.")
        found.add(f"{requirement.name}=={versions[0]}")
    return sorted(found)


def candidates() -> list[Path]:
    """Files that look like a Python 3, on the PATH and among pyenv's versions; they need not run."""
    on_path = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [file for folder in on_path for file in sorted(folder.glob("python3.[1-9][0-9]"))]
    return found + sorted(pyenv.glob("versions/*/bin/python3"))


def version_of(python: Path) -> Version:
    """(major, minor) of a Python, or (0, 0) where it does not run or cannot serve."""
    try:
        probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=60, check=True)
        major, minor = probe.stdout.split()
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0, 0


def pythons() -> dict[Version, Path]:
    """The Pythons of this machine by version; the one that runs this stands for its own version."""
    found = {HERE: Path(sys.executable)}
    for python in candidates():
        found.setdefault(version_of(python), python)
    return found


def installed(python: Path, folder: Path, constraints: list[str]) -> Path | None:
    """The Python of an up-to-date environment made with `python`, or None where it cannot be made."""
    own, stamp, pins = (folder / name for name in ("bin/python", ".installed", "constraints.txt"))
    wanted = hashlib.sha256(repr(constraints).encode() + (ROOT / "setup.py").read_bytes()).hexdigest()
    if own.exists() and stamp.exists() and stamp.read_text() == wanted:
        return own
    print(f"Installing into {folder.relative_to(ROOT)}: once, about a minute plus the download.", flush=True)
    try:
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        pins.write_text("\n".join(constraints))
        pip = [own, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", pins, "-e", f"{ROOT}[test]"], check=True)
    except subprocess.CalledProcessError:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    stamp.write_text(wanted)
    return own


def run_fast_tests(python: Path) -> int:
    """Exit status of one of each fast test, in two processes, with XLA's optimisations (see conftest.py)."""
    command = [python, "-m", "pytest", "-m", "fast", "--one-of-each", "-n", "2", "--dist", "worksteal", "tests"]
    return subprocess.run(command, cwd=ROOT, env={"XLA_FLAGS": "", **os.environ}).returncode


def lowest() -> int:
    """Exit status of the fast tests with every package at its lower bound; 1 where these do not install."""
    found = pythons()
    version = COLAB if COLAB in found else HERE
    print("\n== The fast tests with the lower bounds of setup.py on Python {}.{}".format(*version), flush=True)
    required = requirements()
    constraints = lower_bounds(required[""] + required["test"])
    own = installed(found[version], ROOT / ".venv-lowest", constraints)
    if own is None:
        print("The lower bounds of setup.py do not install together. pip says above which one has to be raised.")
        return 1
    return run_fast_tests(own)


def newest() -> int:
    """Exit status of the fast tests on the newest Python that can be used; 0 where there is none above this one."""
    newer = sorted(item for item in pythons().items() if item[0] > HERE)
    for (major, minor), python in reversed(newer):
        print(f"\n== The fast tests with the newest packages on Python {major}.{minor} ({python})", flush=True)
        own = installed(python, ROOT / ".venv-newest" / f"{major}.{minor}", [])
        if own is not None:
            return run_fast_tests(own)
        print(f"The packages do not install on Python {major}.{minor}; trying the next lower.", flush=True)
    print("No Python newer than {}.{} could be used: `make test` has run on the newest.".format(*HERE))
    return 0


RUNS = {"lowest": lowest, "newest": newest}


def main(names: list[str]) -> int:
    """Runs those named, or all; exit status 0 where all tests passed."""
    if unknown := set(names) - set(RUNS):
        sys.exit(f"Unknown: {', '.join(sorted(unknown))}. Allowed: {', '.join(RUNS)}, or none for all.")
    return max([RUNS[name]() for name in names or RUNS])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
