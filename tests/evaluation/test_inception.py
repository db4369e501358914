"""InceptionV3: recorded outputs, the layouts of its weights, and the folder they are kept in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import places
import pytest
import torch_files
from golden_checks import eval_inception
from golden_checks.inception_weights import random_tensor, without_gamma

from diffusion_distill.evaluation import features
from diffusion_distill.evaluation.features import Inception, InceptionFeatures
from diffusion_distill.evaluation.inception_network import BLOCKS, SIZE, InceptionV3, average_pool, max_pool
from diffusion_distill.formats import graph_def, torch_save
from diffusion_distill.weights import Fetched, WeightsError, flatten, inception, unflatten

Flat = dict[str, np.ndarray]

FOLDERS = (places.SMALL / "eval", places.GOLDEN / "eval")
RECORDED = next((path for folder in FOLDERS if (path := folder / "inception.npz").is_file()), None)
needs_recorded = pytest.mark.skipif(RECORDED is None, reason="needs eval/inception.npz in golden or ../shared/golden")

# ---------------------------------------------------------------- the network


@pytest.fixture(scope="module")
def recorded() -> Flat:
    with np.load(str(RECORDED)) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    """Our parameters from pytorch-fid's random ones, without a file."""
    made = eval_inception.weights(eval_inception.tag_of(RECORDED.parent) if RECORDED else eval_inception.TAG)
    arrays = {name.replace(".", "/"): array for name, array in made.items()}
    return unflatten({path: jnp.asarray(ours(array)) for path, array in arrays.items()})


def ours(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array


@pytest.mark.slow
@needs_recorded
def test_recorded_outputs(recorded: Flat, params: Any) -> None:
    network = Inception(params)
    outputs = network.outputs(recorded["images_32"])
    # The README's tolerances; the golden check compares all arrays.
    np.testing.assert_allclose(outputs.pool3, recorded["a_pool3_32"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(outputs.logits, recorded["a_logits_32"], rtol=0, atol=2e-4)
    for i, found in enumerate((outputs.block0, outputs.block1, outputs.block2)):
        np.testing.assert_allclose(found, recorded[f"a_b{i}_mean_32"], rtol=0, atol=5e-5)
    ones = {p: jnp.ones_like(a) if p.endswith("bn/weight") else a for p, a in flatten(params).items()}
    found = dataclasses.replace(network, params=unflatten(ones), rule="tensorflow")(recorded["images_64"])
    np.testing.assert_allclose(found.pool3, recorded["b_pool3_64"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(found.spatial, recorded["b_spatial_64"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(found.logits, recorded["b_logits_nobias_64"], rtol=0, atol=2e-4)
    assert [a.dtype for a in found] == [jnp.float32] * 3
    assert isinstance(found, InceptionFeatures)
    assert features._outputs._cache_size() == 1  # type: ignore[attr-defined] # both sizes and rules by one compilation


@needs_recorded
def test_bfloat16_is_near(recorded: Flat, params: Any) -> None:
    found = Inception(params, dtype="bfloat16")(recorded["images_32"][:1])
    error = np.abs(np.asarray(found.pool3) - recorded["a_pool3_32"][:1])
    assert [a.dtype for a in found] == [jnp.float32] * 3
    assert 1e-4 < error.max() < 0.05  # features are of size 0.5, and bfloat16 has eight bits
    assert error.mean() < 0.005


@pytest.mark.fast
def test_the_network_takes_its_own_size_and_known_dtypes() -> None:
    x = jnp.zeros((1, SIZE, SIZE - 1, 3))
    with pytest.raises(ValueError, match=r"takes images \[n, 299, 299, 3\], got \(1, 299, 298, 3\)"):
        jax.eval_shape(InceptionV3().init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="Unknown dtype of InceptionV3 'float16'"):
        jax.eval_shape(InceptionV3("float16").init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    with pytest.raises(ValueError, match="Unknown input rule 'pytorch'"):
        Inception({}, rule="pytorch")
    with pytest.raises(ValueError, match="Unknown dtype of InceptionV3 'half'"):
        Inception({}, dtype="half")


@pytest.mark.fast
def test_pools_see_what_is_inside() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 7, 3), np.float32)

    def naive(reduce: Callable[..., Any], centres: Any) -> np.ndarray:
        rows, columns = centres
        window = lambda i, j: x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]  # noqa: E731
        return np.stack([np.stack([reduce(window(i, j), axis=(1, 2)) for j in columns], 1) for i in rows], 1)

    same, inner = (range(5), range(7)), (range(1, 4, 2), range(1, 6, 2))
    np.testing.assert_allclose(average_pool(jnp.asarray(x)), naive(np.mean, same), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), 1, "SAME"), naive(np.max, same))
    np.testing.assert_array_equal(max_pool(jnp.asarray(x)), naive(np.max, inner))
    # The one difference between the last two blocks, which changes features by 0.8.
    assert [BLOCKS[name][-1][0] for name in ("Mixed_6e", "Mixed_7b", "Mixed_7c")] == ["average", "average", "max"]


# ---------------------------------------------------------------- layouts of weights

STEM, TOWER = "Conv2d_1a_3x3", "Mixed_7b/branch3x3dbl_3b"
#: A part of the network, small enough for a table of files.
PART = {
    f"{STEM}/conv/weight": (3, 3, 3, 32),
    f"{TOWER}/conv/weight": (3, 1, 4, 6),
    "fc/weight": (8, 5),
    "fc/bias": (5,),
    **{f"{STEM}/bn/{name}": (32,) for name in ("weight", "bias", "running_mean", "running_var")},
    **{f"{TOWER}/bn/{name}": (6,) for name in ("weight", "bias", "running_mean", "running_var")},
}


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Flat:
    """pytorch-fid's arrays of the part, which stands for the network."""
    monkeypatch.setattr(inception, "shapes", lambda: PART)
    shapes = {path.replace("/", "."): eval_inception._torch_shape(shape) for path, shape in PART.items()}
    return {name: random_tensor(name, shape) for name, shape in shapes.items()}


def graph_layout(arrays: Flat) -> Flat:
    names = {name: inception.tensorflow_name(name.replace(".", "/")) for name in arrays}
    found = {other: np.ascontiguousarray(ours(arrays[name])) for name, other in names.items() if other}
    places = [name.removesuffix("conv2d_params") for name in found if name.endswith("conv2d_params")]
    return found | {
        f"{p}batchnorm/gamma": np.ones_like(found[f"{p}batchnorm/beta"])
        for p in places
        if f"{p}batchnorm/beta" in found
    }


def write(path: Path, how: str, arrays: Flat) -> Path:
    """A file of one of the published kinds."""
    nvidia = eval_inception.nvidia_layout
    if how == "graph":
        return torch_files.write_graph(path, graph_layout(arrays))
    if how == "TorchScript":
        return torch_files.write_script(path, nvidia(arrays))
    if how == "OpenAI":
        return torch_files.write_zip(path, torch_files.state_dict(nvidia(arrays)))
    counts = {f"{n.removesuffix('weight')}num_batches_tracked": np.array(7) for n in arrays if n.endswith("bn.weight")}
    content = torch_files.state_dict({**arrays, **counts})
    return (torch_files.write_legacy if how == "legacy" else torch_files.write_zip)(path, content)


KINDS = {
    "legacy": ("pytorch_fid", "pytorch_fid"),
    "zip": ("pytorch_fid", "pytorch_fid"),
    "OpenAI": ("nvidia", "tensorflow"),
    "TorchScript": ("nvidia", "tensorflow"),
    "graph": ("tensorflow", "tensorflow"),
}


@pytest.mark.fast
@pytest.mark.parametrize("how", KINDS)
def test_files_of_every_kind_are_read_exactly(how: str, part: Flat, tmp_path: Path) -> None:
    path = write(tmp_path / "file", how, part)
    found = inception.read(path)
    assert (found.layout, found.rule) == KINDS[how]
    assert found.facts["file"] == "file"
    assert found.facts["bytes"] == path.stat().st_size
    assert len(found.facts["sha256"]) == 64
    expected = part if found.layout == "pytorch_fid" else without_gamma(part)
    flat = flatten(found.params)
    assert flat.keys() == PART.keys()
    path.unlink()  # the arrays do not need the file
    for name, array in expected.items():
        assert flat[name.replace(".", "/")].dtype == np.float32
        np.testing.assert_array_equal(flat[name.replace(".", "/")], ours(array))


@pytest.mark.fast
def test_names_of_the_original_graph() -> None:
    # As listed by the README of github.com/anshuman23/tensorflex, and by pytorch-fid's converter.
    listed = {
        "Mixed_7c/branch_pool/bn/running_var": "mixed_10/tower_2/conv/batchnorm/moving_variance",
        "Mixed_7c/branch3x3dbl_3b/bn/running_mean": "mixed_10/tower_1/mixed/conv_1/batchnorm/moving_mean",
        "Mixed_7c/branch3x3dbl_2/conv/weight": "mixed_10/tower_1/conv_1/conv2d_params",
        "Mixed_7c/branch3x3_2a/bn/bias": "mixed_10/tower/mixed/conv/batchnorm/beta",
        "Mixed_7b/branch3x3dbl_3a/conv/weight": "mixed_9/tower_1/mixed/conv/conv2d_params",
        "Mixed_7c/branch1x1/conv/weight": "mixed_10/conv/conv2d_params",
        "fc/weight": "softmax/weights",
    }
    assert {path: inception.tensorflow_name(path) for path in listed} == listed
    names = [name for path in inception.shapes() if (name := inception.tensorflow_name(path))]
    assert len(names) == len(set(names)) == 378


UNFIT: dict[str, tuple[str, Callable[[Flat], Any], str]] = {
    "missing": ("zip", lambda a: a.pop("fc.bias"), r"missing \(1\): fc.bias"),
    "left over": (
        "zip",
        lambda a: a.update({"AuxLogits.fc.bias": np.ones(3)}),
        r"unknown to the model \(1\): AuxLogits",
    ),
    "another head": (
        "legacy",
        lambda a: a.update({"fc.bias": np.ones(4, "f4")}),
        r"fc.bias is \(4,\), the model has \(5,\)",
    ),
    "transposed": (
        "OpenAI",
        lambda a: a.update({"fc.weight": a["fc.weight"].T}),
        r"output.weight is .*\(transposed\?\)",
    ),
    "transposed in a graph": ("graph", lambda a: a.update({"fc.weight": a["fc.weight"].T}), "softmax/weights is "),
    "not finite": ("zip", lambda a: a[f"{STEM}.bn.bias"].fill(np.nan), f"not finite .1.: {STEM}.bn.bias"),
    "negative variance": (
        "TorchScript",
        lambda a: a[f"{STEM}.bn.running_var"].fill(-1),
        "conv.var has negative variances",
    ),
    "whole numbers": ("zip", lambda a: a.update({"fc.bias": np.ones(5, "i8")}), r"another type .*fc.bias \(int64\)"),
    "another network": ("zip", lambda a: a.pop(f"{STEM}.conv.weight"), "holds none of 'Conv2d_1a_3x3.conv.weight', "),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", UNFIT)
def test_other_weights_are_refused_by_name(name: str, part: Flat, tmp_path: Path) -> None:
    how, change, said = UNFIT[name]
    change(part)
    with pytest.raises(WeightsError, match=said):
        inception.read(write(tmp_path / "file", how, part))


@pytest.mark.fast
def test_a_gamma_of_a_graph_must_be_one(part: Flat, tmp_path: Path) -> None:
    arrays = graph_layout(part)
    arrays["conv/batchnorm/gamma"] = arrays["conv/batchnorm/gamma"] * 2
    with pytest.raises(WeightsError, match="conv/batchnorm/gamma and 0 others are not 1"):
        inception.read(torch_files.write_graph(tmp_path / "file.pb", arrays))


@pytest.mark.fast
@pytest.mark.parametrize("how", KINDS)
def test_cut_or_changed_anywhere_a_file_is_read_or_refused(how: str, part: Flat, tmp_path: Path) -> None:
    small = {name: array for name, array in part.items() if TOWER.replace("/", ".") in name or name == "fc.bias"}
    small[f"{STEM}.conv.weight"] = np.ones((1, 1, 1, 1), "f4")
    path, changed = write(tmp_path / "file", how, small), tmp_path / "changed"
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for i in range(300):
        at = int(rng.integers(len(content)))
        spoilt = bytearray(content[:at] if i % 3 == 0 else content)
        if i % 3:
            spoilt[at] ^= 1 << int(rng.integers(8)) if i % 3 == 1 else int(rng.integers(1, 256))
        changed.write_bytes(spoilt)
        try:
            read = graph_def.read if how == "graph" else torch_save.read
            read(changed)
        except WeightsError as error:
            refused += 1
            assert len(str(error)) < 1000
    assert refused > 100  # all that are cut


@pytest.mark.fast
@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04\x95", b"{}"])
def test_files_of_other_formats_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(WeightsError, match=r"(begins with b|is empty|is a pickle).*NVIDIA's \.pkl is a program"):
        inception.read(tmp_path / "file")


# ---------------------------------------------------------------- kept in a folder


@pytest.mark.fast
def test_saved_and_loaded(part: Flat, tmp_path: Path) -> None:
    written = inception.read(write(tmp_path / "file", "OpenAI", part))
    folder = inception.save_inception(written, tmp_path / "kept")
    found = inception.load_inception(folder)
    assert found[1:] == (written.layout, written.rule, written.facts)
    for path, array in flatten(written.params).items():
        np.testing.assert_array_equal(flatten(found.params)[path], array)
    about = json.loads((folder / "inception.json").read_text())
    assert about["source"]["sha256"] == written.facts["sha256"]
    assert sorted(path.name for path in folder.iterdir()) == ["inception.json", "inception.safetensors"]

    about["rule"] = "pytorch_fid"
    (folder / "inception.json").write_text(json.dumps(about))
    with pytest.raises(WeightsError, match=r"does not describe inception\.safetensors"):
        inception.load_inception(folder)
    (folder / "inception.json").write_text("{")
    with pytest.raises(WeightsError, match="is damaged"):
        inception.load_inception(folder)
    with pytest.raises(FileNotFoundError):
        inception.load_inception(tmp_path)


@pytest.mark.fast
def test_downloads_have_the_hash_in_their_name(part: Flat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "file.pth", "legacy", part)
    (tmp_path / "file.pth.json").write_text("{}")
    hashed = "6726825d" + "0" * 56
    monkeypatch.setattr(inception.download, "fetch", lambda url, folder, report: Fetched(path, hashed, 1))
    found = inception.fetch("inception-torch-fidelity", tmp_path)
    assert (found.layout, found.rule) == ("pytorch_fid", "tensorflow")  # the publisher's rule, not the layout's
    assert found.facts["name"] == "inception-torch-fidelity"
    assert found.facts["url"].endswith("6726825d.pth")
    hashed = "0" * 64
    with pytest.raises(WeightsError, match="does not begin with 6726825d"):
        inception.fetch("inception-pytorch-fid", tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="Did you mean 'inception-openai'"):
        inception.fetch("inception-opnai", tmp_path)
    assert all(entry.rule in features.RULES for entry in inception.INCEPTION_FILES.values())
