"""The README and docs/: every block of code and every command runs, at a tiny size.

The blocks of a page run in their order, in one namespace and in a folder of the page's own; the fixture `prepared` says
what lies there at first. Networks are a small perceptron behind U-Net's name, downloads are small local files, configs
are made small by `SMALL`, and code by the replacements in `CHANGES`. Of `make` and `pip install` lines only the targets
and the extras are checked. `NOT_RUN` lists the commands that cannot run here, and why.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import io
import json
import re
import shlex
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files
import toys
from absl import flags
from flax import serialization
from ml_collections import config_flags
from PIL import Image
from places import ROOT

import diffusion_distill as dd
from diffusion_distill import weights
from diffusion_distill.base import guided
from diffusion_distill.base.arrays import Array
from diffusion_distill.cli.modes import MODES, WITHOUT_CONFIG, Asked
from diffusion_distill.networks import NETWORKS
from diffusion_distill.networks.inputs import label_vectors
from diffusion_distill.solvers import registry
from diffusion_distill.training import sharding
from diffusion_distill.weights import Fetched

flags.FLAGS.mark_as_parsed()
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

#: Replacements that make the Python code of a page small; each text must occur in it.
CHANGES = {
    "README.md": [('"96K"', "256")],
    "docs/index.md": [('"96K"', "256")],
    "docs/getting_started.md": [('"96K"', "256")],
    "docs/models/nnx.md": [("range(1000)", "range(2)"), ('"32K"', "64")],
    "docs/models/equinox.md": [('"96K"', "64"), ('"12K"', "64")],
    "docs/models/text.md": [('"64K"', "64")],
    "docs/models/rectified_flow_transformer.md": [('"24K"', "64"), ('"16K"', "128"), ("depth=3", "depth=1")],
    "docs/models/latents.md": [('"128K"', "64"), ('"64K"', "64")],
    "docs/weights.md": [('"64x64_classifier.pt"', '"classifier.pt"')],  # which is smaller than the published one
    "docs/runs.md": [
        ('"96K"', "256"),
        ("use_cpu_devices(2)", ""),  # it must come before JAX starts, which it has
    ],
}
#: Pages whose code another test runs, with more checks; their commands are run here.
ELSEWHERE = {"docs/from_google_btd.md": "test_from_google_btd.py"}
#: Other programs that need not be installed, and what needs them; code that imports them is compiled, not run.
ABSENT = ("diffusers", "guided_diffusion", "diffusion_distill.api.hub", "diffusion_distill.torch")
#: Commands that cannot run in a test, by a pattern, and why.
NOT_RUN = {
    "git clone *": "the tests run in a checkout",
    "cd diffusion_distill": "the tests run in a checkout",
    "source .venv/bin/activate*": "the tests run in an environment",
    "* --mode=status *": "needs a run; training/test_survival.py makes one",
    "python benchmarks/*": "measures for minutes",
    "python -m experiments.*": "takes minutes to days; test_paper_experiments.py runs each kind of cell",
    "dd-fit-diffusers *": "needs a pipeline of diffusers; torch_room/test_torch_fit.py runs it",
    "tfds build *": "downloads a data set, and needs TensorFlow",
    "* --model=inception-pytorch-fid *": "downloads 95 MB; evaluation/test_inception.py imports a small one",
    "* --format=diffusers": "the networks here are perceptrons; weights/test_exports.py exports U-Nets",
    "* --format=pytorch": "the networks here are perceptrons; weights/test_exports.py exports U-Nets",
    "* --format=onnx": "needs the extra [onnx]; weights/test_exports.py exports where it is installed",
    "* --topology=*": "compiles a published network for TPUs; api/test_ahead.py compiles a small one",
    "* --config.evaluation.features=runs/inception*": "needs FID's network, whose compilation takes minutes",
}
#: Fields of configs that are given small values, where a config has them.
SMALL = {
    "run.batch_size": 8,
    "run.log_every": 1,
    "run.evaluate_every": "0",
    "run.evaluate_count": 8,
    "method.length": "64",
    "method.phase_length": "16",
    "method.start_steps": 4,
    "sample.count": 8,
    "sample.batch_size": 8,
    "fit.batch_size": 8,
    "fit.scale": 2,
    "solvers.solvers": ("ddim", "dpm_solver++"),
    "solvers.nfe": (3,),
    "solvers.truth_steps": 6,
    "evaluation.repetitions": 1,
    "classifier.length": "64",
    "classifier.ch_mult": (1,),
    "classifier.batch_size": 8,
}


class Tiny(dd.UNet):
    """A perceptron with the settings of a U-Net, which is compiled in a moment."""

    @nn.compact
    def __call__(
        self, x: Array, time: Array, labels: Array | None = None, train: bool = False, augment: Array | None = None
    ) -> Array:
        scale, labels = guided.parts(labels)
        parts = [x.reshape(len(x), -1), time[:, None] / 1000]
        if self.num_classes > 1:
            parts.append(label_vectors(labels, len(x), self.num_classes))
        hidden = nn.Dense(8)(jnp.concatenate(parts, axis=1))
        hidden = nn.swish(hidden if scale is None else hidden + nn.Dense(8, name="scale")(scale[:, None]))
        outputs = x.shape[1] * x.shape[2] * self.out_ch
        return nn.Dense(outputs)(hidden).reshape(*x.shape[:-1], self.out_ch)


def tiny(out_ch: int, num_classes: int = 1) -> Tiny:
    """A small network of the digits' kind."""
    return Tiny(32, 64, out_ch, (1,), 1, (), num_heads=1, num_classes=num_classes)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the checkout's configs, and with the images, artefacts and downloads that pages start from."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "configs").symlink_to(ROOT / "configs")
    model = dd.Model(tiny(1), (8, 8, 1), prediction="v")
    artefacts = {"digits/teacher/teacher": 0, "digits/tract_1/student_1": 1, "digits/tract_4/student_4": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "unet", Tiny)
        for name, steps in artefacts.items():
            dd.Artefact(model, toys.parameters(model), steps, {"method": "none"}).save(folder / "runs" / name)
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "cifar10.zip", "w") as archive:  # two images of each class, to train and to test
        for split, label, number in np.ndindex(2, 10, 2):
            encoded = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(encoded, "PNG")
            archive.writestr(f"{('train', 'test')[split]}/{label}/{number}.png", encoded.getvalue())
    torch_files.write_adm(folder / "ema_0.9999_200000.pt", folder / "classifier.pt")
    (folder / "classifier.json").write_text(json.dumps(torch_files.CLASSIFIER), encoding="utf-8")
    (folder / "published").mkdir()
    for entry in published():
        content = {"step": 1, "num_sample_steps": 0, "ema_params": toys.parameters(entry.model), "optimizer": None}
        content = jax.tree.map(np.asarray, content)
        (folder / "published" / Path(entry.url).name).write_bytes(serialization.msgpack_serialize(content))
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than running here
    yield folder
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture
def small_world(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_device: None) -> Iterator[None]:
    """A copy of that folder to work in, with small networks and without a network connection."""
    shutil.copytree(prepared, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dd, "UNet", Tiny)
    monkeypatch.setitem(NETWORKS, "unet", Tiny)
    monkeypatch.setattr(sharding, "use_cpu_devices", lambda count: None)
    for entry in published():
        monkeypatch.setitem(weights.PUBLISHED, entry.name, entry)
    downloaded = lambda url, *_, **__: Fetched(tmp_path / "published" / Path(url).name, "", 0)  # noqa: E731
    monkeypatch.setattr(weights, "fetch", downloaded)
    with mock.patch.dict(registry.SOLVERS):  # a page may add one
        yield


def published() -> list[weights.Published]:
    """Published names with small networks, whose files have the layout of Google's checkpoints."""
    found = []
    for name, num_classes in (("cifar_original", 1), ("edm-cifar10-32x32-cond-vp", 10)):
        entry = weights.PUBLISHED[name]
        model = dataclasses.replace(entry.model, network=tiny(entry.model.network.out_ch, num_classes))
        found.append(dataclasses.replace(entry, model=model, format="progressive", size=None, sha256=None))
    return found


@pytest.mark.parametrize("name", [name for name, path in PAGES.items() if BLOCK.search(path.read_text("utf-8"))])
def test_a_page_can_be_followed(name: str, small_world: None) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    changes, used, namespace = CHANGES.get(name, []), set(), {}
    for language, block in BLOCK.findall(text):
        if language == "python" and name not in ELSEWHERE:
            for old, new in changes:
                used |= {old} if old in block else set()
                block = block.replace(old, new)
            code = compile(block, f"{name}, a block of code", "exec")
            if not any(re.search(rf"^(from|import) {package}\b", block, re.MULTILINE) for package in ABSENT):
                exec(code, namespace)
        elif language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                follow(shlex.split(line, comments=True))
        elif language != "python":
            assert "diffusion_distill.main --mode=" not in block.replace("--mode=MODE", ""), "write ```bash before it"
    assert used == {old for old, _ in changes}, "CHANGES names what the page does not contain"


def follow(words: list[str]) -> None:
    """Runs a command, or checks what can be checked of it."""
    command = " ".join(words)
    if words[:3] == ["python", "-m", "diffusion_distill.main"]:
        mode, config, workdir, asked = parsed(words[3:])
        if not any(fnmatch.fnmatch(command, pattern) for pattern in NOT_RUN):
            if mode in WITHOUT_CONFIG:
                WITHOUT_CONFIG[mode](config, workdir, asked)
            else:
                MODES[mode](config, workdir)
    elif words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif words[:2] == ["pip", "install"]:
        assert words[-1].startswith("diffusion_distill[") and "git+https://" in words[-1], command
        assert set(words[-1].partition("[")[2].partition("]")[0].split(",")) <= extras(), command
    else:
        assert not words or any(fnmatch.fnmatch(command, pattern) for pattern in NOT_RUN), f"Unknown: {command}"


def parsed(arguments: list[str]) -> tuple[str, Any, Path, Asked]:
    """(mode, small config, workdir, what is asked for) of a command's arguments, read as the program reads them."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    flags.DEFINE_enum("mode", None, [*MODES, *WITHOUT_CONFIG], "", flag_values=values, required=True)
    flags.DEFINE_string("workdir", None, "", flag_values=values, required=True)
    flags.DEFINE_string("topology", "", "", flag_values=values)
    flags.DEFINE_bool("alternatives", True, "", flag_values=values)
    for name in Asked._fields:
        flags.DEFINE_string(name, Asked._field_defaults.get(name, ""), "", flag_values=values)
    with mock.patch.object(sys, "argv", ["main", *arguments]):  # where changes of the config are looked for
        values(sys.argv)
    if values.config is not None:
        make_small(values.config, {argument.partition("=")[0] for argument in arguments})
    asked = Asked(*(getattr(values, name) for name in Asked._fields))
    return values.mode, values.config, Path(values.workdir), asked


def make_small(config: Any, asked: set[str]) -> None:
    """Gives fields of a config their small values; an evaluation that is asked for is kept."""
    for field, value in SMALL.items():
        part, _, name = field.rpartition(".")
        kept = field == "run.evaluate_every" and f"--config.{field}" in asked
        if part in config and config[part].get(name) and not kept:
            config[part][name] = type(config[part][name])(value)


def extras() -> set[str]:
    """The names of the extras in setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS":
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key) for key in node.value.keys if key is not None}
    raise AssertionError("setup.py has no EXTRAS")


@pytest.mark.fast
def test_every_exception_is_needed() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES.values())
    lines = [line for _, block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    commands = [" ".join(line.split()) for line in lines]
    assert all((ROOT / "tests" / name).is_file() for name in ELSEWHERE.values())
    assert [pattern for pattern in NOT_RUN if not fnmatch.filter(commands, pattern)] == []


@pytest.mark.fast
@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    text, folder = BLOCK.sub("", PAGES[name].read_text(encoding="utf-8")), PAGES[name].parent
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        page = folder / path if path else PAGES[name]
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.fast
def test_the_readme_is_short_and_names_every_page() -> None:
    text = PAGES["README.md"].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    pages = [name for name in PAGES if name.startswith("docs/") and not name.startswith("docs/api/")]  # a site's pages
    assert [name for name in pages if f"({name}" not in text] == []
