"""The golden check passes on recorded numbers, and can fail."""

from __future__ import annotations

import filecmp
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edm_tensors
import golden_check
import numpy as np
import places
import pytest
from golden_checks import ddpm_files, eval_inception
from golden_checks.inception_weights import random_tensor

from diffusion_distill import weights
from diffusion_distill.weights import edm

SMALL = places.SMALL
FULL = places.GOLDEN
#: What the library implements so far.
IN_SCOPE = ("btd/*", "tract/*", "edm/*", "solvers/*", "ddpm/*", "eval/*")
#: Minutes on real data: `python tests/golden_check.py ../shared/golden/eval --only real_data.json`.
BY_HAND = ("eval/real_data.json",)
#: A quarter of a minute and more of CPU each.
LONG = (
    "btd/manifests.json",
    "btd/train_step.npz",
    "eval/analytic.json",
    "eval/inception.npz",
    "solvers/dode_noise.npz",
    "tract/tract_vp_trajectory_reset_phase.npz",
)
COPIES = [name for name, _ in golden_check.data_files(SMALL)]
FOUND = [name for name, _ in golden_check.data_files(FULL, IN_SCOPE)] if FULL.is_dir() else []
ORIGINALS = [name for name in FOUND if name not in BY_HAND]
needs_full = pytest.mark.skipif(not ORIGINALS, reason="needs the optional sibling folder ../shared/golden")


def failures(tally: golden_check.Tally) -> list[str]:
    return [str(line) for line in tally.lines if line.verdict in ("FAIL", "NOT HANDLED")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in COPIES]
)
def test_small_copy(name: str) -> None:
    tally = golden_check.check(SMALL, only=[name])
    assert tally.count("PASS") > 0
    assert not failures(tally)


@pytest.mark.slow
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
    np.savez(path, **arrays)
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


FILES = "ddpm/files.tar.xz"


@pytest.mark.slow
@pytest.mark.skipif(FILES not in FOUND, reason="needs the optional sibling folder ../shared/golden")
def test_other_expectations_of_weight_files_fail(tmp_path: Path) -> None:
    root = ddpm_files.unpacked(FULL / FILES, tmp_path / "files")
    expected = json.loads((root / "expected.json").read_text())
    good, bad = {"views.pt": None, "dtypes.pt": None, "adm.pt": None}, {"sane_control.pt": None, "eval.pt": None}
    expected["good"] = {name: expected["good"][name] for name in good}
    expected["bad"] = {name: expected["bad"][name] for name in bad}
    expected["good"]["views.pt"]["tensors"]["slice"][2] = 16 * "0"
    expected["good"]["dtypes.pt"]["tensors"]["more"] = [[1], "float32", 16 * "0"]
    expected["nets"]["adm"]["config"]["num_heads"] = expected["nets"]["adm"]["config"]["num_head_channels"] = 1
    expected["bad"]["sane_control.pt"]["expect"], expected["bad"]["eval.pt"]["expect"] = "error", "ok"
    (root / "expected.json").write_text(json.dumps(expected))
    with tarfile.open(tmp_path / "files.tar.xz", "w:xz") as archive:
        archive.add(root, "files")
    tally = golden_check.check(tmp_path / "files.tar.xz")
    failed = " ".join(line.array for line in tally.lines if line.verdict == "FAIL")
    assert all(
        name in failed for name in ("views.pt", "dtypes.pt", "adm.pt: adm/out", "sane_control.pt", "eval.pt", "listed")
    )


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


def edit_meta(arrays: dict[str, np.ndarray], change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the JSON in a fixture's `meta`."""
    meta = json.loads(str(arrays["meta"]))
    change(meta)
    arrays["meta"] = np.array(json.dumps(meta))


@pytest.mark.fast
def test_the_standard_deviation_of_the_data_is_the_files(tmp_path: Path) -> None:
    """w = (s² + sd²) / (s·sd)², and the loss is w·(D - y)², for sd = 0.4 in one of the two EDM cases."""

    def other_data(arrays: dict[str, np.ndarray]) -> None:
        y, sigma = (arrays[f"EDM.plain.{name}"].astype(np.float64) for name in ("images", "sigma"))
        weight = (sigma**2 + 0.4**2) / (sigma * 0.4) ** 2
        loss = weight * (arrays["EDM.plain.net_output"] - y) ** 2
        arrays |= {"EDM.plain.weight": weight, "EDM.plain.loss": loss}

        def tell(meta: dict[str, Any]) -> None:
            case = meta["cases"]["EDM.plain"]
            case["params"]["sigma_data"] = 0.4
            case["training_scalar_batch_mean_of_pixel_sums"] = float(loss.sum() / len(loss))

        edit_meta(arrays, tell)

    tally = golden_check.check(changed(tmp_path, "edm/losses.npz", other_data))
    assert tally.count("PASS") == 60
    assert not failures(tally)


def test_the_tag_of_random_weights_is_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's weights of the tag reach the network, whatever the sizes of the images."""
    (tmp_path / "manifest.json").write_text(json.dumps({"weights_tag": "another", "tensors": []}))
    with np.load(SMALL / "eval" / "inception.npz") as stored:
        images = stored["images_32"][:1]
        names = stored["a_child_names"]
    np.savez(tmp_path / "recorded.npz", a_child_names=names, images_32=images, images_48=images)
    given: list[tuple[str, np.ndarray]] = []
    for variant in ("a", "b"):
        monkeypatch.setattr(
            eval_inception,
            f"check_variant_{variant}",
            lambda fixture, mode, size, images, params, rule: given.append((size, params["Conv2d_1a_3x3"]["conv"])),
        )
    golden_check.check(tmp_path, only=["*.npz"])
    wanted = random_tensor("Conv2d_1a_3x3.conv.weight", (32, 3, 3, 3), "another").transpose(2, 3, 1, 0)
    assert [size for size, _ in given] == ["32", "32", "48", "48"]
    for _, conv in given:
        np.testing.assert_array_equal(conv["weight"], wanted)


def block_fixture(path: Path, project: bool) -> dict[str, np.ndarray]:
    """A halving block of EDM's second network, 8 channels, as the program stores one; returns its tensors."""
    rng = np.random.default_rng(0)
    shapes = {"norm0": (8,), "conv0": (8, 8, 3, 3), "affine": (16, 10), "norm1": (8,), "conv1": (8, 8, 3, 3)}
    shapes |= {"skip": (8, 8, 1, 1)} if project else {}
    tensors = {f"{name}.weight": rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": rng.normal(size=16 if name == "affine" else 8) for name in shapes}
    tensors |= {f"{name}.resample_filter": np.full((1, 1, 2, 2), 0.25) for name in ("conv0", "skip")}
    given = {"x": rng.normal(size=(2, 8, 4, 4)), "emb": rng.normal(size=(2, 10))}
    arrays = {f"block.a.{name}": a for name, a in {**{f"sd.{n}": t for n, t in tensors.items()}, **given}.items()}
    kwargs = {"down": True, "resample_proj": project}
    case = {"in_channels": 8, "out_channels": 8, "emb_channels": 10, "num_heads": 0, "kwargs": kwargs}
    arrays["block.a.y"] = block_output({**tensors, **given})
    arrays["meta"] = np.array(json.dumps({"fixture": "units", "cases": {"block.a": case}}))
    np.savez(path, **{k: a.astype(np.float32) if k != "meta" else a for k, a in arrays.items()})
    return tensors


def block_output(given: dict[str, np.ndarray]) -> np.ndarray:
    """The fact sheet's block in plain NumPy, float64, (batch, channels, height, width)."""
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        groups = x.reshape(len(x), 2, -1)
        scaled = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
        weight, bias = (given[f"{name}.{part}"].reshape(-1, 1, 1) for part in ("weight", "bias"))
        return scaled.reshape(x.shape) * weight + bias

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        weight, pad = given[f"{name}.weight"], given[f"{name}.weight"].shape[-1] // 2
        padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[-2:], (2, 3))
        return np.einsum("nchwij,ocij->nohw", windows, weight) + given[f"{name}.bias"].reshape(-1, 1, 1)

    halved = lambda x: x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).mean((3, 5))  # noqa: E731
    h = conv(halved(silu(norm(given["x"], "norm0"))), "conv0")
    scale, shift = np.split(given["emb"] @ given["affine.weight"].T + given["affine.bias"], 2, axis=1)
    h = conv(silu(norm(h, "norm1") * (1 + scale[..., None, None]) + shift[..., None, None]), "conv1")
    shortcut = halved(given["x"])
    return h + (conv(shortcut, "skip") if "skip.weight" in given else shortcut)


@pytest.mark.fast
@pytest.mark.parametrize("project", [True, False])
def test_a_block_that_resamples_with_a_projected_shortcut(tmp_path: Path, project: bool) -> None:
    """Where the channels stay, the shortcut is a matrix product exactly if the block says so."""
    block_fixture(tmp_path / "units.npz", project)
    tally = golden_check.check(tmp_path)
    assert tally.count("PASS") == 2  # parameters, output
    assert not failures(tally)


@pytest.mark.fast
def test_a_projection_that_a_block_does_not_use_fails(tmp_path: Path) -> None:
    path = tmp_path / "units.npz"
    block_fixture(path, project=True)
    with np.load(path) as stored:
        arrays = dict(stored)
    edit_meta(arrays, lambda meta: meta["cases"]["block.a"]["kwargs"].pop("resample_proj"))
    np.savez(path, **arrays)
    [failed] = [line for line in golden_check.check(tmp_path).lines if line.array == "block.a: parameters"]
    assert failed.verdict == "FAIL" and "nin_shortcut/kernel" in failed.text


EDM_ARGUMENTS = {
    "model_type": "SongUNet",
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 3,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}


def edm_variants(layout: str) -> dict[str, Any]:
    """A parameter tree by hand-counted numbers beside its hyper-parameters, in layouts that a file of them may have."""
    model = edm.model_of("EDMPrecond", EDM_ARGUMENTS)
    shapes = edm_tensors.tensor_shapes(model.network, model.shape)
    kinds = {name: "buffer" if name.endswith("resample_filter") else "param" for name in shapes}
    trained = [int(np.prod(shape)) for name, shape in shapes.items() if kinds[name] == "param"]
    counts = {"num_params": sum(trained), "num_tensors": len(shapes), "num_buffer_values": 4 * 4}
    tensors = {f"model.{name}": [list(shape), kinds[name]] for name, shape in shapes.items()}
    wrapped = {"precond_class": "EDMPrecond", "init_kwargs": EDM_ARGUMENTS}
    alone = {k: v for k, v in EDM_ARGUMENTS.items() if k not in ("model_type", "img_channels")}
    alone = {"class_name": "SongUNet", "init_kwargs": alone | {"in_channels": 3, "out_channels": 3}}
    plain = {name: list(shape) for name, shape in shapes.items()}
    return {
        "manifests": {"note": "words", "manifests": {"one": wrapped | counts | {"tensors": tensors}}},
        "a list": {"variants": [wrapped | counts | {"tensors": tensors}]},
        "flat": {"one": {"precond_class": "EDMPrecond", **EDM_ARGUMENTS, **counts, "tensors": tensors}},
        "counts alone": {"one": wrapped | counts},
        "a network alone": {"one": alone | counts | {"tensors": plain}},
        "another count": {"one": wrapped | counts | {"num_params": 1}},
        "another tree": {"one": wrapped | counts | {"tensors": {**tensors, "model.more": [[1], "param"]}}},
    }[layout]


@pytest.mark.fast
@pytest.mark.parametrize(
    "layout", ["manifests", "a list", "flat", "counts alone", "a network alone", "another count", "another tree"]
)
def test_trees_of_edm_with_hyper_parameters(tmp_path: Path, layout: str) -> None:
    (tmp_path / "manifest_variants.json").write_text(json.dumps(edm_variants(layout)))
    tally = golden_check.check(tmp_path)
    assert tally.count("NOT HANDLED") == 0
    assert tally.count("PASS") >= 2
    assert tally.count("FAIL") == layout.startswith("another")


@pytest.mark.fast
def test_a_manifest_without_a_list_of_models_is_that_of_a_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = {"tensors": edm_variants("manifests")["manifests"]["one"]["tensors"]}
    (tmp_path / "manifests.json").write_text(json.dumps({"manifests": {"net": manifest}}))
    of_ours = weights.Published("ours", edm.model_of("EDMPrecond", EDM_ARGUMENTS), 0, "", "", "", "edm")
    monkeypatch.setattr(weights, "PUBLISHED", {"ours": of_ours})
    assert failures(golden_check.check(tmp_path)) == []
    monkeypatch.setattr(weights, "PUBLISHED", {})
    [failed] = failures(golden_check.check(tmp_path, only=["*"]))[:1]
    assert "no published model has this manifest" in failed


@pytest.mark.fast
@pytest.mark.parametrize("kept", [("num_params",), ("num_params", "params"), ("digest",)])
def test_trees_of_btd_with_hyper_parameters(tmp_path: Path, kept: tuple[str, ...]) -> None:
    """Parameter counts or trees, with the image's shape under another name; 1093249 numbers are recorded."""
    with np.load(SMALL / "btd/unet/c.npz") as stored:
        meta = json.loads(str(stored["meta"]))
        params = {key.removeprefix("params/"): stored[key].shape for key in stored.files if key.startswith("params/")}
    facts = {"num_params": meta["num_params"], "params": params, "digest": weights.digest(params)}
    entry = {"config": meta["config"], "image": meta["image"], **{name: facts[name] for name in kept}}
    (tmp_path / "manifest_variants.json").write_text(json.dumps({"c": entry}))
    tally = golden_check.check(tmp_path)
    assert (tally.count("PASS"), failures(tally)) == (len(kept), [])
