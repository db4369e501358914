"""What is written about the benchmarks: verdicts, their files, the summary, and the tables of docs/performance.md."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from diffusion_distill import UNet
from diffusion_distill.networks import DiT
from diffusion_distill.training.sharding import data_mesh

fast = pytest.mark.fast


@pytest.fixture(scope="module")
def tools() -> Iterator[dict[str, Any]]:
    """The modules of benchmarks/, which is no package, and the demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT / "experiments"), *sys.path])
        names = ("_verdicts", "_rounds", "_nets", "_programs", "summary", "digits")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture
def verdicts(tools: dict[str, Any]) -> list[Any]:
    """One of each kind: ahead, behind within the spread, behind, left out, and of another unit."""
    times, form = tools["_rounds"].Times, tools["_verdicts"]
    slow, fast = times([0.19, 0.2, 0.21]), times([0.1, 0.1, 0.1])
    return [
        form.compared("ahead", fast, slow, goal=1.5),
        form.compared("close", fast, slow, goal=2.05),
        form.compared("behind", slow, fast),
        form.alone("without", fast, "PyTorch is not installed"),
        form.bounded("memory", (30.0, 30.0, 30.0), 24.0, goal=0.9, unit="MB"),
    ]


@fast
def test_the_words_of_verdicts(verdicts: list[Any]) -> None:
    assert [verdict.word for verdict in verdicts] == [
        "met",
        "NOT MET, within the spread",
        "NOT MET",
        "left out: PyTorch is not installed",
        "NOT MET",
    ]
    assert [verdict.met for verdict in verdicts] == [True, False, False, None, False]
    assert str(verdicts[0]) == (
        "ahead: 100.0 ms against 200.0 [190.0 to 210.0] ms, ratio 2.00, goal 1.50: met"
    )  # quartiles of three values are the outer two
    assert str(verdicts[4]) == "memory: 30.0 MB against 24.0 MB, ratio 0.80, goal 0.90: NOT MET"


@fast
def test_a_file_of_verdicts_gives_them_back(tools: dict[str, Any], verdicts: list[Any], tmp_path: Path) -> None:
    tools["_verdicts"].report(verdicts, tmp_path / "found.json")
    assert tools["_verdicts"].read(tmp_path / "found.json") == verdicts


@fast
def test_the_summary_has_a_line_for_each_verdict(tools: dict[str, Any], verdicts: list[Any]) -> None:
    lines = tools["summary"].summary({"steps": verdicts[:2], "growth": verdicts[2:]}).splitlines()
    found = [line.split()[:2] for line in lines[2:7]]
    assert found == [[n, v.question] for n, v in zip(["steps"] * 2 + ["growth"] * 3, verdicts, strict=True)]
    assert lines[-1] == "1 of 5 goals met, 1 without their peer."


@fast
def test_only_what_was_run_is_written_anew(tools: dict[str, Any], verdicts: list[Any]) -> None:
    summary = tools["summary"]
    about = {"cpu": "a CPU", "devices": 2, "jaxlib": "1.2", "date": "2000-01-01", "load": 2.0}
    old = summary.record_of({"growth": verdicts[:1], "steps": verdicts}, dict.fromkeys(("growth", "steps"), about), {})
    later = {**about, "date": "2000-01-02"}
    new = summary.record_of({"growth": [], "steps": verdicts[:2]}, {"steps": later}, old)
    assert list(new) == ["steps", "growth"] and new["growth"] == old["growth"]
    page = summary.with_tables(f"before {summary.BEGIN} old {summary.END} after", json.loads(json.dumps(new)))
    assert page.startswith("before ") and page.endswith(" after") and " old " not in page
    assert "(a CPU, 2 cores and devices, jaxlib 1.2, 2000-01-02, load 2.0)" in page
    assert "| ahead | 100.0 ms | 200.0 [190.0 to 210.0] ms | 2.00 | 1.50 | met |" in page
    assert summary.with_tables(page, new) == page


@fast
def test_the_tables_of_the_page_are_those_of_the_record(tools: dict[str, Any]) -> None:
    summary = tools["summary"]
    page, record = summary.PAGE.read_text(encoding="utf-8"), json.loads(summary.RECORD.read_text(encoding="utf-8"))
    assert record and set(record) <= set(summary.BENCHMARKS)
    assert summary.with_tables(page, record) == page


@fast
def test_every_benchmark_is_in_the_summary(tools: dict[str, Any]) -> None:
    files = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")}
    # Of two checkouts, a GPU, TPUs, no machine, and without a goal.
    others = {"summary", "compare", "device", "tpu", "scale", "low_rank"}
    assert not files - set(tools["summary"].BENCHMARKS) - others


@fast
def test_the_demo_trains_the_network_that_is_timed(tools: dict[str, Any]) -> None:
    settings, image, batch = tools["_nets"].NETS["demo"]
    demo = tools["digits"]
    assert (UNet(**settings), image, batch) == (demo.NETWORK, demo.RECIPES["vp"](1.0).model.shape, demo.BATCH)


@pytest.mark.slow
def test_a_quick_run_writes_verdicts(tools: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "summary.py"), "--quick", f"--out={tmp_path}"]
    run = subprocess.run([*command, "--only=networks", "--only=input"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = {name: tools["_verdicts"].read(tmp_path / f"{name}.json") for name in ("networks", "input")}
    assert run.stdout.endswith(tools["summary"].summary(found) + "\n")
    assert all("load" in json.loads((tmp_path / f"{name}.machine.json").read_text()) for name in found)


def test_programs_for_other_machines_fit_the_functions_that_they_are_of(tools: dict[str, Any]) -> None:
    """Where no compiler of TPUs is installed too, which `test_tpu_compile.py` needs."""
    programs = tools["_programs"]
    network = DiT(16, depth=1, num_heads=2, out_ch=3, num_classes=10, dtype="bfloat16")
    case = programs.Case(network, (4, 4, 3), 16, (4, 1))
    for make in programs.PROGRAMS.values():
        program = make(case, data_mesh())
        program.function.trace(*program.arguments)
