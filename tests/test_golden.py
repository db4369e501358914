"""The golden check passes on recorded numbers, and can fail."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import golden_check
import numpy as np
import pytest

SMALL = Path(__file__).parent / "golden"
FULL = Path(__file__).parents[2] / "shared" / "golden"
#: What the library implements so far.
IN_SCOPE = ("btd/*", "tract/*", "edm/*", "solvers/*", "ddpm/guidance.npz", "eval/*")
#: Minutes on real data: `python tests/golden_check.py ../shared/golden/eval --only real_data.json`.
BY_HAND = ("eval/real_data.json",)
COPIES = [name for name, _ in golden_check.data_files(SMALL)]
FOUND = [name for name, _ in golden_check.data_files(FULL, IN_SCOPE)] if FULL.is_dir() else []
ORIGINALS = [name for name in FOUND if name not in BY_HAND]
needs_full = pytest.mark.skipif(not ORIGINALS, reason="needs the optional sibling folder ../shared/golden")


def failures(tally: golden_check.Tally) -> list[str]:
    return [str(line) for line in tally.lines if line.verdict in ("FAIL", "NOT HANDLED")]


@pytest.mark.parametrize("name", COPIES)
def test_small_copy(name: str) -> None:
    tally = golden_check.check(SMALL, only=[name])
    assert tally.count("PASS") > 0
    assert not failures(tally)


@needs_full
@pytest.mark.parametrize("name", [name for name in ORIGINALS if name not in COPIES])
def test_full_set(name: str) -> None:
    tally = golden_check.check(FULL, only=[name])
    assert tally.count("PASS") > 0
    assert not failures(tally)


@needs_full
def test_small_copy_is_unchanged() -> None:
    assert filecmp.cmpfiles(SMALL, FULL, COPIES, shallow=False) == (COPIES, [], [])


def changed(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], None], as_name: str = "") -> Path:
    """Writes a changed copy of a fixture into a folder."""
    with np.load(SMALL / name) as stored:
        arrays = {key: stored[key].copy() for key in stored.files}
    change(arrays)
    path = folder / (as_name or Path(name).name)
    np.savez(path, allow_pickle=False, **arrays)
    return path


def test_all_passing_exits_with_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(tmp_path, "btd/schedules.npz", lambda arrays: None, as_name="another name.npz")
    (tmp_path / "README.md").write_text("not data")
    assert golden_check.main([str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "10 passed, 0 failed"


def test_a_wrong_number_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def add_to_one(arrays: dict[str, np.ndarray]) -> None:
        arrays["f64/cosine/-10_10"][7] += 1e-3

    changed(tmp_path, "btd/schedules.npz", add_to_one)
    assert golden_check.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "8 passed, 2 failed"
    assert "f64/cosine/-10_10  float64  error" in out


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reference_that_is_not_finite_fails(tmp_path: Path, value: float) -> None:
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["f64/cosine/-10_10"][7] = value

    assert golden_check.check(changed(tmp_path, "btd/schedules.npz", spoil)).count("FAIL") == 2


def test_a_wrong_input_fails(tmp_path: Path) -> None:
    def other_network(arrays: dict[str, np.ndarray]) -> None:
        arrays["coef_teacher"][0] *= 1.01

    tally = golden_check.check(changed(tmp_path, "tract/btd_2_1_both.npz", other_network))
    failed = {line.array for line in tally.lines if line.verdict == "FAIL"}
    assert {"f64_target", "f64_loss", "f64_grad_coef_student"} <= failed


def test_another_shape_fails(tmp_path: Path) -> None:
    def add_axis(arrays: dict[str, np.ndarray]) -> None:
        arrays["f64/cosine/-10_10"] = arrays["f64/cosine/-10_10"][:, None]

    assert golden_check.check(changed(tmp_path, "btd/schedules.npz", add_axis)).count("FAIL") == 2


def test_what_nothing_is_done_with_is_not_handled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def add_array(arrays: dict[str, np.ndarray]) -> None:
        arrays["f64/sine/-10_10"] = arrays["f64/cosine/-10_10"]

    changed(tmp_path, "btd/schedules.npz", add_array)
    (tmp_path / "extra.json").write_text(json.dumps({"a": 1}))
    assert golden_check.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "extra.json  -  no check for this kind of file  NOT HANDLED" in lines
    assert "schedules.npz  f64/sine/-10_10  NOT HANDLED" in lines
    assert lines[-1] == "10 passed, 2 failed"


def test_a_damaged_file_fails_alone(tmp_path: Path) -> None:
    shutil.copy(SMALL / "btd/schedules.npz", tmp_path)
    (tmp_path / "damaged.npz").write_bytes((SMALL / "btd/dpm.npz").read_bytes()[:1000])
    tally = golden_check.check(tmp_path)
    assert (tally.count("PASS"), tally.count("FAIL")) == (10, 1)


def test_a_folder_without_data_fails(tmp_path: Path) -> None:
    assert golden_check.main([str(tmp_path)]) == 1


def some_rows(arrays: dict[str, np.ndarray], batch: int) -> None:
    """Every second row of all arrays [batch, ...]."""
    for key, value in arrays.items():
        if value.shape[:1] == (batch,):
            arrays[key] = value[::2]


@pytest.mark.parametrize(("name", "batch"), [("dpm", 21), ("losses", 12), ("distill", 6)])
def test_other_batch_sizes_and_step_counts(tmp_path: Path, name: str, batch: int) -> None:
    def smaller(arrays: dict[str, np.ndarray]) -> None:
        some_rows(arrays, batch)
        for key in [key for key in arrays if "/N512" in key]:
            del arrays[key]

    tally = golden_check.check(changed(tmp_path, f"btd/{name}.npz", smaller))
    assert tally.count("PASS") > 50
    assert not failures(tally)


def test_nothing_is_read_from_the_names_of_files(tmp_path: Path) -> None:
    changed(tmp_path, "tract/tract_vp_16_1_both.npz", lambda arrays: None, as_name="step_a.npz")
    changed(tmp_path, "tract/sampler_btd_x.npz", lambda arrays: None, as_name="step_b.npz")
    tally = golden_check.check(tmp_path)
    assert tally.count("PASS") > 50
    assert not failures(tally)
