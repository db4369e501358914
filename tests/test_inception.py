"""InceptionV3: outputs of the public programs, their input rules, and files that are read exactly or refused."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files
from golden_checks import eval_inception
from golden_checks.inception_weights import random_tensor, without_gamma

from diffusion_distill.evaluation import features
from diffusion_distill.evaluation.features import FromFunction, Inception, InceptionFeatures, Pixels, network_input
from diffusion_distill.evaluation.inception_network import BLOCKS, SIZE, InceptionV3, average_pool, max_pool
from diffusion_distill.formats import graph_def, torch_save
from diffusion_distill.weights import Fetched, WeightsError, flatten, inception, unflatten

Flat = dict[str, np.ndarray]
FOLDERS = (Path(__file__).parent / "golden" / "eval", Path(__file__).parents[2] / "shared" / "golden" / "eval")
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


# ---------------------------------------------------------------- its input


@pytest.mark.fast
@pytest.mark.parametrize("length", [1, 2, 32, 64, 299, 300, 1000])
def test_a_ramp_shows_where_each_pixel_comes_from(length: int) -> None:
    i = np.arange(SIZE)
    places = {"pytorch_fid": (i + 0.5) * length / SIZE - 0.5, "tensorflow": i * length / SIZE}
    for rule, place in places.items():
        weights = features.interpolation(length, rule)
        expected = np.clip(place, 0, length - 1)
        np.testing.assert_allclose(weights @ np.arange(length), expected, rtol=0, atol=1e-4 * max(1, length / 300))
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-6)
        for row, at in zip(weights, expected, strict=True):
            assert set(np.flatnonzero(row)) <= {int(np.floor(at)), int(np.ceil(at))}


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(32, 32), (40, 17), (400, 320)])
def test_half_pixel_rule_is_that_of_jax_without_antialiasing(shape: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), np.uint8)
    with jax.numpy_rank_promotion("allow"):
        resized = jax.image.resize(images.astype(np.float32), (1, SIZE, SIZE, 3), "bilinear", antialias=False)
    found = network_input(images, "pytorch_fid")
    # jax.image computes the places in float32: 400 of them have an error of 2e-5 pixels.
    np.testing.assert_allclose(found, resized / 127.5 - 1, rtol=0, atol=1e-4)


@pytest.mark.fast
def test_ranges_and_grey() -> None:
    greys = np.stack([np.full((4, 6, 1), value, np.uint8) for value in (0, 127, 128, 255)])
    for rule, expected in {
        "pytorch_fid": [-1, 127 / 127.5 - 1, 128 / 127.5 - 1, 1],
        "tensorflow": [-1, -1 / 128, 0, 127 / 128],
    }.items():
        found = np.asarray(network_input(greys, rule))
        assert found.shape == (4, SIZE, SIZE, 3)
        assert found.dtype == np.float32
        wanted = np.broadcast_to(np.array(expected)[:, None, None, None], found.shape)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
        colours = jnp.asarray(np.repeat(greys, 3, axis=-1))
        np.testing.assert_allclose(found, network_input(colours, rule), rtol=0, atol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("images", "error", "said"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), TypeError, "dtype float32; need uint8"),
        (np.zeros((4, 4, 3), np.uint8), ValueError, r"shape \(4, 4, 3\); need \[n, height, width, channels\]"),
        (np.zeros((1, 4, 4, 2), np.uint8), ValueError, r"\[n, h, w, 1\] for grey"),
        (np.zeros((0, 4, 4, 3), np.uint8), ValueError, r"shape \(0, 4, 4, 3\)"),
    ],
)
def test_other_images_are_refused(images: np.ndarray, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Inception({})(images)


# ---------------------------------------------------------------- other features


@pytest.mark.fast
def test_pixels_and_functions_are_features() -> None:
    images = np.arange(2 * 2 * 3 * 1, dtype=np.uint8).reshape(2, 2, 3, 1) * 20
    own = FromFunction(lambda images: images.reshape(len(images), -1).mean(axis=1, keepdims=True), "mean", 1)
    every: list[features.Features] = [Pixels((2, 3, 1)), own]
    assert [(f.name, f.width) for f in every] == [("pixels", 6), ("mean", 1)]
    found = every[0](images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images.reshape(2, 6) / 127.5 - 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(every[1](images), [[50], [170]])
    with pytest.raises(ValueError, match=r"need \[n, 2, 3, 1\]"):
        every[0](images[:, :1])
    with pytest.raises(TypeError, match="need uint8"):
        every[0](images / 255)
    with pytest.raises(ValueError, match=r"'mean' of 2 images have shape \(2, 1\); need \[2, 4\]"):
        dataclasses.replace(own, width=4)(images)


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


# ---------------------------------------------------------------- formats

ARRAYS: Flat = {
    "a.single": np.arange(6, dtype="f4").reshape(2, 3),
    "a.double": np.linspace(0, 1, 5),
    "b.half": np.arange(3, dtype="f2"),
    "b.count": np.array(3),
}


@pytest.mark.fast
@pytest.mark.parametrize("how", ["write_zip", "write_legacy", "write_script"])
def test_tensors_of_all_types(how: str, tmp_path: Path) -> None:
    content = ARRAYS if how == "write_script" else torch_files.state_dict(ARRAYS)
    found = torch_save.read(getattr(torch_files, how)(tmp_path / "file", content))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)
        assert not found[name].flags.writeable


@pytest.mark.fast
@pytest.mark.parametrize("how", ["write_zip", "write_legacy"])
def test_tensors_may_be_views_of_one_storage(how: str, tmp_path: Path) -> None:
    elements = np.arange(24, dtype="f4")
    storage = torch_files.Storage(elements, "0")
    views = {"t": torch_files.Tensor(storage, 4, (3, 2), (1, 3)), "row": torch_files.Tensor(storage, 20, (4,), (1,))}
    found = torch_save.read(getattr(torch_files, how)(tmp_path / "file", OrderedDict(views)))
    np.testing.assert_array_equal(found["t"], elements[4:10].reshape(2, 3).T)
    np.testing.assert_array_equal(found["row"], elements[20:])


def view(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> dict[str, Any]:
    return {"t": torch_files.Tensor(torch_files.Storage(np.arange(6, dtype="f4"), "0"), offset, size, stride)}


class Bomb:
    """What an ordinary reader would run."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("MARKER",)


def entry(name: str, content: bytes | None) -> Callable[[dict[str, bytes]], Any]:
    return lambda entries: entries.pop(name) if content is None else entries.update({name: content})


def wide(count: int) -> dict[str, Any]:
    """Many tensors that are the same bytes."""
    storage = torch_files.Storage(np.arange(600, dtype="f4"), "0")
    return {str(i): torch_files.Tensor(storage, 0, (600,), (1,)) for i in range(count)}


#: content, change of the archive's entries, what the refusal says
BAD_ZIPS: dict[str, tuple[Any, Callable[[dict[str, bytes]], Any] | None, str]] = {
    "a call": ({"t": Bomb()}, None, "'mkdir' is not among what such a file may name"),
    "a call below a module": ({"a": [Bomb()]}, None, "nothing of it is run"),
    "beyond its storage": (view((2, 4), (4, 1)), None, r"'t': a tensor of size \(2, 4\).* is not in its storage of 6"),
    "before its storage": (view((2,), (1,), -1), None, "from element -1"),
    "empty": (view((0,), (1,)), None, "is not in its storage"),
    "huge": (view((2**62,), (0,)), None, "is not in its storage"),
    "more than the file": (wide(1000), None, "all tensors together are larger than the file"),
    "no tensor": ({"t": 3}, None, "'t' is 3, not a tensor"),
    "no dictionary": ([1], None, "the file holds list"),
    "no tensors": ({}, None, "there are 0 tensors"),
    "no pickle": (view((6,), (1,)), entry("data.pkl", None), "has 0 entries NAME/data.pkl"),
    "no storage": (view((6,), (1,)), entry("data/0", None), "no entry 'archive/data/0' of 24 bytes"),
    "a shorter storage": (view((6,), (1,)), entry("data/0", b"\0" * 20), "no entry 'archive/data/0' of 24 bytes"),
    "big-endian": (view((6,), (1,)), entry("byteorder", b"big"), "byte order is not little-endian"),
    "another protocol": (view((6,), (1,)), entry("data.pkl", pickle.dumps({}, 4)), "protocol 4; only 2 is read"),
    "bytes after the pickle": (
        view((6,), (1,)),
        lambda e: e.update({"data.pkl": e["data.pkl"] + b"x"}),
        "1 bytes follow",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD_ZIPS)
def test_hostile_archives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, change, said = BAD_ZIPS[name]
    path = torch_files.write_zip(tmp_path / "file.pth", content, change=change)
    with pytest.raises(WeightsError, match=said):
        torch_save.read(path)
    assert [found.name for found in tmp_path.iterdir()] == ["file.pth"]


@pytest.mark.fast
def test_archives_that_are_compressed_damaged_or_ambiguous(tmp_path: Path) -> None:
    good = torch_files.write_zip(tmp_path / "good", view((6,), (1,)))
    with zipfile.ZipFile(good) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for said, compression, names in (
        ("is compressed", zipfile.ZIP_DEFLATED, {}),
        ("stands twice", zipfile.ZIP_STORED, {"archive/data/0": "archive/data.pkl"}),
        ("has 2 entries NAME/data.pkl", zipfile.ZIP_STORED, {"archive/version": "other/data.pkl"}),
    ):
        with zipfile.ZipFile(tmp_path / "bad", "w", compression) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an entry twice
            for name, content in entries.items():
                archive.writestr(names.get(name, name), content)
        with pytest.raises(WeightsError, match=said):
            torch_save.read(tmp_path / "bad")
    content = bytearray(good.read_bytes())
    content[content.index(np.arange(6, dtype="f4").tobytes()) + 5] ^= 1
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(WeightsError, match="'archive/data/0' is damaged: its checksum differs"):
        torch_save.read(tmp_path / "bad")


@pytest.mark.fast
def test_entries_may_not_share_bytes_nor_be_listed_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"a": np.ones(6, "f4"), "b": np.ones(6, "f4")}
    good = torch_files.write_zip(tmp_path / "good", torch_files.state_dict(arrays))
    content = good.read_bytes()
    with zipfile.ZipFile(good) as archive:
        first, second = (archive.getinfo(f"archive/data/{k}").header_offset for k in (0, 1))
    at = content.rindex(struct.pack("<I", second))  # in the list of entries
    (tmp_path / "bad").write_bytes(content[:at] + struct.pack("<I", first) + content[at + 4 :])
    with pytest.raises(WeightsError, match=r"'archive/data/0' and 'archive/data/1' share bytes"):
        torch_save.read(tmp_path / "bad")
    monkeypatch.setattr(torch_save, "MAX_DIRECTORY", 100)
    with pytest.raises(WeightsError, match="list of entries is longer than 100 bytes"):
        torch_save.read(good)


@pytest.mark.fast
def test_modules_may_be_shared_but_not_without_end(tmp_path: Path) -> None:
    root = torch_files.script({"a.t": np.arange(6, dtype="f4")})
    root.b = root.a
    found = torch_save.read(torch_files.write_zip(tmp_path / "file", root))
    np.testing.assert_array_equal(found["b.t"], found["a.t"])
    below = root
    for _ in range(12):  # two ways down at each of them
        below.l = below.r = below = torch_files.script({"t": np.arange(6, dtype="f4")})
    with pytest.raises(WeightsError, match="or after 8192 others"):
        torch_save.read(torch_files.write_zip(tmp_path / "file", root))
    below.l = root
    with pytest.raises(WeightsError, match="more than 16 deep"):
        torch_save.read(torch_files.write_zip(tmp_path / "file", root))


def legacy(change: Callable[[list[bytes]], Any]) -> bytes:
    parts = torch_files.legacy_parts(view((6,), (1,)))
    change(parts)
    return b"".join(parts)


def replaced(index: int, value: Any) -> Callable[[list[bytes]], Any]:
    return lambda parts: parts.__setitem__(index, value if isinstance(value, bytes) else pickle.dumps(value, 2))


BAD_LEGACY: dict[str, tuple[Callable[[list[bytes]], Any], str]] = {
    "another magic number": (replaced(0, 0x1950A86A20F9469CFC6D), "another format than number 1001"),
    "big-endian": (replaced(2, {"protocol_version": 1001, "little_endian": False}), "little-endian"),
    "no storages": (lambda parts: parts.pop(), "storage 0 of 6 elements is not at byte"),
    "other storages": (replaced(4, ["1"]), "storages that follow are not those"),
    "a shorter storage": (lambda parts: parts.append(parts.pop()[:-4]), "or not whole"),
    "another count": (lambda parts: parts.append(b"\7" + parts.pop()[1:]), "storage 0 of 6 elements is not"),
    "bytes at the end": (lambda parts: parts.append(b"xy"), "2 bytes follow the last storage"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD_LEGACY)
def test_hostile_legacy_files(name: str, tmp_path: Path) -> None:
    change, said = BAD_LEGACY[name]
    (tmp_path / "file").write_bytes(legacy(lambda parts: None))
    np.testing.assert_array_equal(torch_save.read(tmp_path / "file")["t"], np.arange(6))
    (tmp_path / "file").write_bytes(legacy(change))
    with pytest.raises(WeightsError, match=said):
        torch_save.read(tmp_path / "file")


field, constant = torch_files.field, torch_files.constant
FOUR = np.arange(4, dtype="f4").reshape(2, 2)
BAD_GRAPHS = {
    "no node": (field(4, 3), "there are 0 nodes"),
    "cut": (constant("a", FOUR)[:-3], "reaches beyond its message"),
    "too few bytes": (constant("a", FOUR, b"\0" * 12), r"'a' of shape \(2, 2\) has 12 bytes"),
    "no whole number": (b"\x0a" + b"\xff" * 11, "no whole number at byte 1"),
    "a group": (b"\x0a\x02\x0b\x0c", "of type 3"),
    "twice": (constant("a", FOUR) * 2, "'a' stands twice"),
    "a number for a node": (field(1, 5), "a number stands where bytes are needed"),
    "a long name": (constant("a" * 1000, FOUR), "a name of 1000 bytes"),
    "not UTF-8": (field(1, field(1, b"\xff\xfe")), "cannot be read as a graph"),
    "one number for 2^36": (
        constant("a", np.broadcast_to(np.float32(0), (2**36,)), bytes(4)),
        "'a' repeats one number",
    ),
    "one number for many": (
        b"".join(constant(f"a{k}", np.broadcast_to(np.float32(0), (2**23,)), bytes(4)) for k in range(3)),
        "'a2' repeats one number",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD_GRAPHS)
def test_hostile_graphs(name: str, tmp_path: Path) -> None:
    content, said = BAD_GRAPHS[name]
    (tmp_path / "file.pb").write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        graph_def.read(tmp_path / "file.pb")


@pytest.mark.fast
def test_constants_of_a_graph(tmp_path: Path) -> None:
    path = torch_files.write_graph(tmp_path / "file.pb", {"a": FOUR, "b/c": np.ones(3, "f4")})
    one = constant("one", np.zeros((2, 3), "f4"), np.float32(7).tobytes())
    path.write_bytes(path.read_bytes() + one)
    found = graph_def.read(path)  # the other nodes, and the shape in whole numbers, are passed over
    assert list(found) == ["a", "b/c", "one"]
    np.testing.assert_array_equal(found["a"], FOUR)
    np.testing.assert_array_equal(found["one"], np.full((2, 3), 7))


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
