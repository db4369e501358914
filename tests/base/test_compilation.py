"""Compiled programs are kept in a folder of the user's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_distill.base import compilation

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No cache is set, and the user's cache folder is a new one."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compilation.VARIABLE, raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_users_own(tmp_path: Path) -> None:
    folder = compilation.keep_compiled()
    assert folder and folder.parent == tmp_path / "cache" / "diffusion_distill" / "compiled" and folder.is_dir()
    assert jax.config.values["jax_compilation_cache_dir"] == str(folder)


def test_another_folder_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compilation.VARIABLE, "off")
    assert compilation.keep_compiled() is None and jax.config.values["jax_compilation_cache_dir"] is None
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "mine"))
    folder = compilation.keep_compiled()
    assert folder and folder.parent == tmp_path / "mine"


def test_a_cache_that_jax_has_is_left_alone(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert compilation.keep_compiled() == tmp_path / "theirs"
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "file"))
    assert compilation.keep_compiled() is None and jax.config.values["jax_compilation_cache_dir"] is None


def test_without_a_home_folder_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert compilation.keep_compiled() is None


def test_the_oldest_entries_go(tmp_path: Path) -> None:
    for k in range(5):
        (tmp_path / f"{k}-cache").write_bytes(bytes(10))
        os.utime(tmp_path / f"{k}-cache", (k, k))
    compilation._forget_oldest(tmp_path, largest=25)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3-cache", "4-cache"]


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    program = (
        "import jax, logging; from diffusion_distill.base.compilation import keep_compiled; folder = keep_compiled();"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0);"
        "events = []; jax.monitoring.register_event_listener(lambda name, **_: events.append(name));"
        "jax.jit(lambda x: x * 2)(1.0);"
        "print(events.count('/jax/compilation_cache/cache_hits'), len(list(folder.iterdir())))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    environment["XDG_CACHE_HOME"] = str(tmp_path)

    def run() -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        return [int(word) for word in done.stdout.split()]

    (first, kept), (second, still) = run(), run()
    assert first == 0 and kept > 0
    assert second > 0 and still == kept


def test_what_runs_once_is_the_function_also_inside_of_others() -> None:
    key = jax.random.key(0)
    draw = partial(jax.random.normal, shape=(3,))
    expected = np.asarray(draw(key))
    np.testing.assert_allclose(compilation.run_once(draw, key), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(partial(compilation.run_once, draw))(key), expected, rtol=1e-6)
    assert jax.eval_shape(partial(compilation.run_once, draw), key).shape == (3,)
    with jax.disable_jit():
        np.testing.assert_allclose(compilation.run_once(draw, key), expected, rtol=1e-6)
