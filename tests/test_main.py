"""The command line and the README: whole journeys at a tiny size, and what a mistake is answered with."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion_distill import build, main

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def config_of(name: str, **changes):
    """The config of a file in configs/, with changes by dotted name."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.fast
@pytest.mark.parametrize("name", CONFIGS)
def test_configs_describe_a_run(name: str) -> None:
    config = config_of(name)
    build.settings(config)
    build.source(config)
    build.method(config)
    if "model" in config:
        described = build.model(config).to_dict()
        assert json.loads(json.dumps(described)) == json.loads(json.dumps(config.model.to_dict()))


def test_train_distill_sample_evaluate(tmp_path: Path) -> None:
    # 8 devices are simulated, so batches and samples are multiples of 8
    small = {"run.batch_size": 16, "run.log_every": 1}
    main.train(config_of("digits_teacher", **small, **{"method.length": "32"}), tmp_path / "teacher")
    teacher = str(tmp_path / "teacher" / "teacher")
    distilled = config_of(
        "digits_tract", **small, **{"method.length": "64", "teacher": teacher, "method.schedule": (4, 2, 1)}
    )
    main.distill(distilled, tmp_path / "tract")
    student = str(tmp_path / "tract" / "student_1")
    used = config_of("digits_tract", **{"artefact": student, "sample.count": 16, "sample.batch_size": 16})
    main.sample(used, tmp_path / "out")
    images = np.load(tmp_path / "out" / "samples.npz")["images"]
    assert images.shape == (16, 8, 8, 1) and np.isfinite(images).all() and np.abs(images).max() <= 1
    assert (tmp_path / "out" / "samples.png").stat().st_size > 0
    main.evaluate(used, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["sample"]["steps"] == 1 and results["reference"]["images"] == 900 and results["frechet"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    {
        "a misspelt field": (["--config.run.batch_sise=8"], "batch_size"),
        "a mistyped field": (["--config.run.batch_size=many"], "run.batch_size"),
        "an unknown mode": (["--mode=trane"], "train"),
        "an unknown data set": (["--config.data.name=digitz"], "Did you mean 'digits'"),
        "an unknown weighting": (["--config.method.weighting=snr_trunk"], "Did you mean 'snr_trunc'"),
        "zero batch": (["--config.run.batch_size=0"], "at least 1"),
    }.values(),
)
def test_mistakes_are_answered_before_any_compute(arguments: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffusion_distill.main", "--mode=train", f"--workdir={tmp_path}"]
    command += [f"--config={ROOT / 'configs' / 'digits_teacher.py'}", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended.returncode != 0
    assert said in ended.stderr, ended.stderr
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("mode", ["distill", "sample", "evaluate"])
def test_modes_that_need_an_artefact_say_so(mode: str, tmp_path: Path) -> None:
    part = "teacher" if mode == "distill" else "artefact"
    with pytest.raises(ValueError, match=f"--config.{part}=FOLDER"):
        main.MODES[mode](config_of("digits_tract"), tmp_path)


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    exec(code[1].replace('"96K"', "256"), {})
    assert (tmp_path / "runs" / "student_1" / "model.json").is_file()
