"""The page about a workdir shows what its files hold, whatever state they are in."""

from __future__ import annotations

import json
import re
import shlex
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from diffusion_distill.cli import modes
from diffusion_distill.report import image_grid
from diffusion_distill.solvers.search import Search
from diffusion_distill.studies.folder_contents import holdings
from diffusion_distill.studies.folder_report import distinct_names, folder_report
from diffusion_distill.studies.lambdas import candidates, lambdas


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def training(folder: Path, method: str = "Tract", reduction: str = "sum", end: int = 1, done: bool = True) -> Path:
    """A folder as a training leaves it."""
    settings = {"schedule": [32, end], "reduction": reduction, "learning_rate": 0.001}
    write(folder / "run.json", {"method": method, "method_settings": settings, "settings": {"seed": 0}})
    records = [
        {"update": k, "phase": f"phase {k // 5}", "samples": 64 * k, "loss": 1 / k, "frechet/eval": 9.5 - k}
        for k in range(1, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"cut')
    if done:
        write(
            folder / f"student_{end}" / "model.json", {"model": {"prediction": "v", "shape": [8, 8, 1]}, "steps": end}
        )
        write(folder / f"student_{end}" / "provenance.json", {"method": method, "updates": 9})
    return folder


def results(folder: Path, digest: str = "a1") -> Path:
    """A folder as an evaluation leaves it."""
    rows = [
        {
            "sampler": f"ddim {n} steps",
            "solver": "ddim",
            "nfe": n,
            "fitted": n > 4,
            "frechet": 10 / n,
            "repetitions": [{}],
        }
        for n in (2, 4, 8, 16)
    ]
    write(folder / "results.json", {"features": "pixels", "reference hash": digest, "rows": rows})
    image_grid({"a": np.zeros((2, 8, 8, 1), np.float32)}, folder / "samples.png")
    return folder


def shown(folders: list[Path], path: Path) -> str:
    return unescape(folder_report(folders, path).read_text(encoding="utf-8"))


@pytest.mark.fast
def test_a_page_says_what_one_sees(tmp_path: Path) -> None:
    """What it is told, or else what the files hold."""
    folder = results(training(tmp_path / "mine"))
    told = folder_report([folder], tmp_path / "told.html", "Digits & noise.").read_text(encoding="utf-8")
    assert '<p class="lead">Digits &amp; noise.</p>' in told
    assert '<p class="lead">What the files here hold: ' in shown([folder], tmp_path / "counted.html")


@pytest.mark.fast
def test_a_training_with_its_students_and_results(tmp_path: Path) -> None:
    folder = results(training(tmp_path / "mine"))
    page = shown([folder], tmp_path / "report.html")
    for wanted in (
        "<h1>mine</h1>", "1 training, 1 artefact and 1 picture", "D-ddim", "frechet by evaluations", "student_1",
        "frechet, measured during training", "phase 1", "--mode=sample", f"--config.artefact={folder}/student_1",
        "mine/samples.png: the first samples", '"learning_rate": 0.001', "8×8×1",
    ):  # fmt: skip
        assert wanted in page, wanted
    assert "Go on" not in page and "--mode=distill" not in page  # it is finished, and a step cannot be halved
    assert 'data-x="64 128 192 256 320 384 448 512 576" data-y="1 0.5 0.3333 0.25' in page
    assert "repetitions" not in page


@pytest.mark.fast
def test_several_folders_share_tables_and_charts(tmp_path: Path) -> None:
    folders = [results(training(tmp_path / "a" / "run"), "a1"), results(training(tmp_path / "b" / "run", "Btd"), "b2")]
    (tmp_path / "out").mkdir()
    modes.report(None, tmp_path / "out", modes.Asked(",".join(map(str, folders))))
    page = unescape((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "<h1>a/run · b/run</h1>" in page
    assert page.count('data-label="a/run" data-x="64') == page.count('data-label="b/run" data-x="64') == 1
    assert "differ in reference hash" in page and "compare curves of the same method" in page
    assert page.count("<img") == 2 and "<td>a/run</td><td>ddim 2 steps</td>" in page
    assert re.search(r"<td>method</td><td[^>]*>Tract</td><td[^>]*>Btd</td>", page)
    assert distinct_names([folders[0], folders[0]]) == {"run": folders[0]}


@pytest.mark.fast
def test_an_experiment_is_a_folder_of_runs(tmp_path: Path) -> None:
    for end in (16, 2):
        training(tmp_path / f"tract_{end}", end=end)
    training(tmp_path / "late", end=4, done=False)
    write(tmp_path / "results.json", {"rows": [{"method": "real", "nfe": "", "frechet": 0.2}], "seed": 1})
    (tmp_path / "late" / "checkpoints" / "9").mkdir(parents=True)
    write(tmp_path / "late" / "checkpoints" / "9" / "model.json", {})
    names = [holding.name for holding in holdings(tmp_path)]
    assert names == [tmp_path.name, "late", "tract_2", "tract_2/student_2", "tract_16", "tract_16/student_16"]
    page = shown([tmp_path], tmp_path / "report.html")
    assert "Go on: the command that began the run" in page and f"--workdir={tmp_path}/late\n" in page.replace("<", "\n")
    assert f"--config.teacher={tmp_path}/tract_16/student_16" in page


@pytest.mark.fast
def test_what_studies_draw_are_charts(tmp_path: Path) -> None:
    lambdas({"D-ddim": (np.array([[0.125], [-0.25]]), np.array([-3.0, 4.0]))}, tmp_path)
    candidates({"D-ddim": Search("frechet", (0.0, 0.5), (2.0, 1.5), 0.5)}, tmp_path)
    page = shown([tmp_path], tmp_path / "report.html")
    assert 'data-x="-3 4" data-y="0.125 -0.25"' in page and 'data-y="2 1.5"' in page and "<img" not in page


@pytest.mark.fast
@pytest.mark.fast
def test_figures_of_another_user_are_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("metrics.jsonl", "results.jsonl"):
        (tmp_path / name).write_text("{}\n")
    monkeypatch.setattr("diffusion_distill.studies.folder_contents.read_json_lines", refuse)
    [found] = holdings(tmp_path)
    assert not found.figures and not found.rows
    assert ["metrics.jsonl cannot be read: Permission denied" in said for said in found.trouble] == [True, False]


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = training(tmp_path / "run")
    (folder / "results.json").write_text('{"rows": [')
    (folder / "samples.png").write_text("<html>")
    write(folder / "lambdas.json", {"fits": {"a": {}}})
    write(folder / "student_1" / "model.json", {"model": [], "steps": "<script>"})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'\n{{"loss": 1{"0" * 400}, "samples": NaN}}\n{{"loss": 2, "samples": [3]}}\n')
    write(folder / "run.json", {"method": ["</pre><script>"], "method_settings": 3})
    page = folder_report([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    for wanted in (
        "results.json cannot be read",
        "is no PNG",
        "lambdas.json cannot be drawn",
        "Loss",
        "&lt;/pre&gt;",
    ):
        assert wanted in page, wanted
    assert page.count("<script") == 1


@pytest.mark.fast
def test_folders_with_nothing_to_show_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        modes.report(None, tmp_path / "none", modes.Asked(""))
    with pytest.raises(ValueError, match="nothing to report"):
        modes.report(None, tmp_path, modes.Asked(""))


@pytest.mark.fast
def test_a_classifier_goes_on_until_it_is_there_and_is_measured_with_then(tmp_path: Path) -> None:
    write(tmp_path / "run.json", {"classifier": {"name": "small"}})
    assert "--mode=classifier" in shown([tmp_path], tmp_path / "report.html")
    write(tmp_path / "classifier" / "classifier.json", {"about": {}})
    page = shown([tmp_path], tmp_path / "report.html")
    assert "--mode=classifier" not in page and f"--config.evaluation.features={tmp_path}/classifier" in page


@pytest.mark.fast
def test_commands_hold_in_a_shell(tmp_path: Path) -> None:
    folder = training(tmp_path / "it's; mine", end=2)
    page = shown([folder], tmp_path / "report.html")
    commands = [shlex.split(text.replace("\\\n", " ")) for text in re.findall(r"<pre>(python.*?)</pre>", page, re.S)]
    modes_named = [word.partition("=")[2] for words in commands for word in words if word.startswith("--mode=")]
    assert modes_named == ["sample", "evaluate", "distill", "solvers", "export"]
    assert set(modes_named) <= {*modes.MODES, *modes.WITHOUT_CONFIG}
    assert f"--config.teacher={folder}/student_2" in commands[2]
