"""--mode=report: what a workdir holds is on the page, and what it cannot show is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffusion_distill.cli.modes import WITHOUT_CONFIG, Asked
from diffusion_distill.report import image_grid
from diffusion_distill.studies.folder_report import write_report

pytestmark = pytest.mark.fast


def run_folder(place: Path, loss: float, steps: int = 1) -> Path:
    """A finished distillation as its run leaves it, without parameters."""
    student = place / f"student_{steps}"
    student.mkdir(parents=True)
    (place / "run.json").write_text(json.dumps({"method": "Tract", "method_settings": {"schedule": [8, steps]}}))
    records = [{"step": k, "samples": 8 * k, "loss": loss / k, "images_per_second": 100.0} for k in (1, 2, 3)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (student / "model.json").write_text(json.dumps({"steps": steps, "secret <b>": "&"}))
    image_grid({"": np.zeros((2, 8, 8, 1), np.float32)}, place / "samples.png")
    return place


def test_a_run_and_its_neighbours_are_on_one_page(tmp_path: Path) -> None:
    """Lines of both runs in one chart, pictures, results, commands that fit, and folded files."""
    first, second = (run_folder(tmp_path / name, loss) for name, loss in (("first", 8.5), ("second", 4.25)))
    rows = [{"sampler": "student_1", "nfe": 1, "frechet": 0.125, "repetitions": [{"frechet": 0.125}]}]
    (first / "results.json").write_text(json.dumps({"rows": rows, "count": 64}))
    WITHOUT_CONFIG["report"](None, tmp_path, Asked(f"{first},{second}"))
    content = (tmp_path / "report.html").read_text("utf-8")
    for there in (
        "8.5",
        "4.25",
        'data-value="0.125"',
        f"--config.artefact={first}/student_1",
        "run.json",
        "samples.png",
    ):
        assert there in content
    assert 'data-label="first"' in content and 'data-label="second"' in content
    assert "repetitions" not in content.split("<details>")[0]  # lists stay in the files
    assert "secret &lt;b&gt;" in content and "secret <b>" not in content


def test_the_workdir_itself_is_reported(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", 8.5)
    (tmp_path / "run" / "results.json").write_text("{")
    WITHOUT_CONFIG["report"](None, tmp_path / "run", Asked(""))
    content = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "results.json" in content and "left out" in content and 'data-label="run"' in content


def test_nothing_to_show_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds nothing to report"):
        write_report([tmp_path / "empty"], tmp_path / "report.html")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        write_report([tmp_path / "none"], tmp_path / "report.html")
