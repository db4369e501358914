"""Compiled programs are kept on disk: a program that was compiled once starts at once the next time.

This is JAX's persistent cache, in a folder of the user's. A program's entry is found by its content, JAX's version and
the devices, so several runs and processes can share the folder; an entry that is damaged is compiled again, with a
warning. Programs for a CPU use all of its instructions and would end the process on an older one: each kind of CPU has
its own folder, because home folders are often shared between machines.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax.core import Tracer

from diffusion_distill.base.files import user_path

#: Names another folder, or switches the cache off: 'off'. JAX's own JAX_COMPILATION_CACHE_DIR comes first.
VARIABLE = "DIFFUSION_DISTILL_COMPILED"
#: Programs that compile faster than this many seconds are not kept.
SHORTEST = 0.1
#: Bytes; when there are more, the oldest entries go.
LARGEST = 4 * 2**30


def keep_compiled() -> Path | None:
    """Switches the cache on for this process, unless JAX has been given one; returns its folder.

    Programs call it at their start. The folder is `VARIABLE`'s, or diffusion_distill/compiled in the user's cache
    folder (XDG_CACHE_HOME, ~/.cache; ~/Library/Caches on macOS). Without a folder that can be written there is no
    cache, and None is returned.
    """
    if given := jax.config.values["jax_compilation_cache_dir"]:
        return Path(given)
    named = os.environ.get(VARIABLE, "")
    if named == "off":
        return None
    try:
        folder = (user_path(named) if named else _user_cache() / "diffusion_distill" / "compiled") / _machine()
        folder.mkdir(parents=True, exist_ok=True)
        _forget_oldest(folder)
    except (OSError, RuntimeError):  # of the latter kind: there is no home folder
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    return folder


def run_once(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), as one program. A CPU's is compiled without optimising, which takes half of the time."""
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments))
    if jax.default_backend() != "cpu" or traced or jax.config.values["jax_disable_jit"]:
        return jax.jit(function)(*arguments)
    program = jax.jit(function).lower(*arguments)
    return program.compile({"xla_backend_optimization_level": "0"})(*arguments)


def _user_cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")


def _machine() -> str:
    """The name of this kind of CPU: its architecture, and a number made of its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        found = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(' '.join(sorted(found.split())).encode()).hexdigest()[:8]}"


def _forget_oldest(folder: Path, largest: int = LARGEST) -> None:
    """Removes the oldest entries until `largest` bytes are left; another process may do the same at the same time."""
    entries = []
    for path in filter(Path.is_file, folder.iterdir()):
        with suppress(FileNotFoundError):
            status = path.stat()
            entries.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= largest:
            return
        path.unlink(missing_ok=True)
        total -= size
