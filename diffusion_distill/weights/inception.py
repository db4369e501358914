"""Reads InceptionV3's published weights, in any of their layouts, as parameters of our network.

    layout        names                                              kernels              gamma     made for the rule
    pytorch_fid   Mixed_5b.branch5x5_1.conv.weight, .bn.weight, ...  (out, in, kh, kw)    stored    pytorch_fid
    nvidia        layers.mixed.tower.conv.weight, .beta, .mean, ...  (out, in, kh, kw)    1         tensorflow
    tensorflow    mixed/tower/conv/conv2d_params, .../beta, ...      (kh, kw, in, out)    1         tensorflow

The second is the layout of NVIDIA's TorchScript file and of OpenAI's state dict, the third that of the original graph
of 2015-12-05. The names in a file show its layout, its first bytes the file format (`torch_save`, `graph_def`). Every
parameter is filled by an array of its shape. `num_batches_tracked`, which only training uses, and the parts of a graph
that are not weights are ignored; anything else in a file is an error that names it.

Parameters that were read are kept in a folder:

    FOLDER/inception.safetensors   the parameters, with what follows in its metadata
    FOLDER/inception.json          layout, rule, and the source file's name, sha256 and size in bytes
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.errors import choose
from diffusion_distill.base.files import read_json, stand_in_of, user_path
from diffusion_distill.base.typing import Params
from diffusion_distill.base.whole import write_json
from diffusion_distill.evaluation.inception_network import BLOCKS, SIZE, Branch, Conv, InceptionV3
from diffusion_distill.formats import graph_def, torch_save
from diffusion_distill.weights import download, exchange
from diffusion_distill.weights.matching import Shape, WeightsError, flatten, match, unflatten

Arrays = dict[str, np.ndarray]

PARAMETERS, FACTS = "inception.safetensors", "inception.json"
KIND = "inception-2015-12-05"


class InceptionWeights(NamedTuple):
    """The contents of a file of InceptionV3's weights.

    Attributes:
      params: nested dictionaries of float32 NumPy arrays with the names and shapes of `InceptionV3`.
      layout: a key of `LAYOUTS`.
      rule: the input rule, a key of `features.RULES`, that the file's publisher uses.
      facts: file, sha256 and bytes of the source, and url and name if it was downloaded; JSON-ready.
    """

    params: Params
    layout: str
    rule: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class InceptionFile:
    """A published file.

    Attributes:
      url: where it is.
      rule: the input rule that its publisher uses it with.
      source: who published it.
      sha256: the beginning of its hash, as far as it is known.
    """

    url: str
    rule: str
    source: str
    sha256: str = ""


#: Names for `fetch`.
INCEPTION_FILES = {
    "inception-pytorch-fid": InceptionFile(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "pytorch_fid",
        "pytorch-fid (Seitzer), converted from Google's graph; TRACT's too",
        "6726825d",
    ),
    "inception-torch-fidelity": InceptionFile(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "tensorflow",
        "torch-fidelity (Obukhov et al.): pytorch-fid's file with the original graph's resize",
        "6726825d",
    ),
    "inception-nvidia": InceptionFile(
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "tensorflow",
        "NVIDIA (StyleGAN2-ADA), as TorchScript; EDM uses the same network",
    ),
    "inception-openai": InceptionFile(
        "https://openaipublic.blob.core.windows.net/consistency/inception/inception-2015-12-05.pt",
        "tensorflow",
        "OpenAI (consistency models), as a state dict with NVIDIA's names",
    ),
    "inception-tensorflow": InceptionFile(
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb",
        "tensorflow",
        "Google's graph of 2015-12-05, as OpenAI's evaluator uses it",
    ),
}


def read(path: str | Path) -> InceptionWeights:
    """Reads a file of weights in any layout; nothing in it is executed.

    Raises:
      WeightsError: the file is damaged or of an unknown format or layout; or arrays are missing, left over, of another
        shape or type, not finite, or, of variances, negative.
      OSError: it cannot be opened.
    """
    path = user_path(path)
    with open(path, "rb") as file:
        begin = file.read(4)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    stored = _stored(path, begin)
    name = next((name for name, layout in LAYOUTS.items() if layout.first in stored), None)
    if name is None:
        listed = ", ".join(repr(key[:60]) for key in list(stored)[:4])
        known = ", ".join(repr(layout.first) for layout in LAYOUTS.values())
        raise WeightsError(
            f"{path} holds none of {known}, but {listed}: these are not the weights of FID's InceptionV3."
        )
    layout = LAYOUTS[name]
    params = _params(layout, stored, f"{path}, layout {name}")
    facts = {"file": path.name, "sha256": sha256, "bytes": path.stat().st_size}
    return InceptionWeights(params, name, layout.rule, facts)


def fetch(name: str, folder: str | Path, report: download.Report | None = None) -> InceptionWeights:
    """Downloads one of `INCEPTION_FILES` into a folder, or finds it there, and reads it.

    Raises:
      ValueError: an unknown name.
      WeightsError: see `download.fetch` and `read`; or the file's hash is not the one in its name.
    """
    entry = choose("file of InceptionV3's weights", name, INCEPTION_FILES)
    fetched = download.fetch(entry.url, folder, report=report)
    if not fetched.sha256.startswith(entry.sha256):
        fetched.path.unlink()
        fetched.path.with_name(f"{fetched.path.name}.json").unlink(missing_ok=True)
        raise WeightsError(
            f"{entry.url} has sha256 {fetched.sha256}, which does not begin with {entry.sha256} as its name says: the "
            f"file was changed or damaged, and is removed. {download.BY_HAND}"
        )
    found = read(fetched.path)
    return found._replace(rule=entry.rule, facts={"name": name, "url": entry.url, **found.facts})


def save_inception(weights: InceptionWeights, folder: str | Path) -> Path:
    """Writes parameters and their origin into a folder, see above; returns the folder.

    Raises:
      ImportError: safetensors is not installed.
      OSError: the folder cannot be written.
    """
    folder = user_path(folder)
    about = {"kind": KIND, "layout": weights.layout, "rule": weights.rule, "source": dict(weights.facts)}
    exchange.save(folder / PARAMETERS, weights.params, about)
    write_json(folder / FACTS, about)
    return folder


def load_inception(folder: str | Path) -> InceptionWeights:
    """Reads what `save_inception` wrote.

    Raises:
      WeightsError: the folder holds something else, or its two files are not of one network.
      OSError: a file cannot be opened.
    """
    folder = user_path(folder)
    try:
        about = read_json(folder / FACTS, "Import the weights again.")
    except ValueError as error:
        raise WeightsError(f"{folder / FACTS} is damaged: {error}") from error
    params, within = exchange.load(folder / PARAMETERS)
    if about != within or about.get("kind") != KIND:
        raise WeightsError(f"{folder / FACTS} does not describe {PARAMETERS} beside it. Import the weights again.")
    flat = match(flatten(params), shapes(), str(folder / PARAMETERS))
    return InceptionWeights(unflatten(flat), about["layout"], about["rule"], about["source"])


@cache
def shapes() -> dict[str, Shape]:
    """{path: shape} of the network's parameters; none is allocated."""
    made = jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    return {path: leaf.shape for path, leaf in flatten(made["params"]).items()}


# ---------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """The names and the storage of parameters in a file.

    Attributes:
      first: a name that only files of this layout have.
      name: our path -> the file's name, or None if the file has no such array because it is all 1.
      axes: number of dimensions -> permutation of the file's axes that gives ours; none if not listed.
      rule: the input rule that goes with such files.
      passed_over: names that are not parameters and are ignored.
    """

    first: str
    name: Callable[[str], str | None]
    axes: Mapping[int, tuple[int, ...]]
    rule: str
    passed_over: Callable[[str], bool]


TORCH_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}
ENDINGS = {"conv/weight": "weight", "bn/bias": "beta", "bn/running_mean": "mean", "bn/running_var": "var"}
TENSORFLOW_ENDINGS = {
    "weight": "conv2d_params",
    "beta": "batchnorm/beta",
    "mean": "batchnorm/moving_mean",
    "var": "batchnorm/moving_variance",
}


def nvidia_name(path: str) -> str | None:
    """The name of one of our paths in NVIDIA's layout; None for a gamma."""
    if path.startswith("fc/"):
        return path.replace("fc/", "output.")
    module, ending = re.fullmatch(r"(.*)/((?:conv|bn)/\w+)", path).groups()  # type: ignore[union-attr]
    return f"layers.{_places()[module]}.{ENDINGS[ending]}" if ending in ENDINGS else None


def tensorflow_name(path: str) -> str | None:
    """The name of one of our paths in the original graph; None for a gamma."""
    name = nvidia_name(path)
    if name is None or name.startswith("output."):
        return name and {"output.weight": "softmax/weights", "output.bias": "softmax/biases"}[name]
    *place, ending = name.removeprefix("layers.").split(".")
    inner = re.sub(r"^(tower(?:_\d)?)_(mixed_)?(conv.*)$", r"\1/\2\3", place[-1]).replace("mixed_conv", "mixed/conv")
    return "/".join([*place[:-1], inner, TENSORFLOW_ENDINGS[ending]])


@cache
def _places() -> dict[str, str]:
    """{our path of a convolution: where it is in NVIDIA's tree}: towers are counted, and convolutions in them."""
    stem = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
    places = {name: _counted("conv", i) for i, name in enumerate(stem)}
    for i, (block, branches) in enumerate(BLOCKS.items()):
        joint = "_" if block in ("Mixed_7b", "Mixed_7c") else "."
        towers = 0
        for branch in branches:
            tower = _counted("tower", towers) + joint if len(branch) > 1 else ""
            towers += len(branch) > 1
            for conv, name in _names(branch):
                places[f"{block}/{conv.name}"] = f"{_counted('mixed', i)}.{tower}{name}"
    return places


def _names(branch: Branch) -> Iterator[tuple[Conv, str]]:
    """The convolutions of a branch and their names in it."""
    one_by_one = 0
    for step in branch:
        if isinstance(step, Conv):
            yield step, _counted("conv", one_by_one)
            one_by_one += 1
        elif not isinstance(step, str):
            yield from ((conv, f"mixed_{_counted('conv', j)}") for j, conv in enumerate(step))


def _counted(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


LAYOUTS = {
    "pytorch_fid": Layout(
        "Conv2d_1a_3x3.conv.weight",
        lambda path: path.replace("/", "."),
        TORCH_AXES,
        "pytorch_fid",
        lambda name: name.endswith(".num_batches_tracked"),
    ),
    "nvidia": Layout("layers.conv.weight", nvidia_name, TORCH_AXES, "tensorflow", lambda name: False),
    "tensorflow": Layout(
        "conv/conv2d_params",
        tensorflow_name,
        {},
        "tensorflow",
        lambda name: not name.endswith((*TENSORFLOW_ENDINGS.values(), "softmax/weights", "softmax/biases")),
    ),
}

# ---------------------------------------------------------------- parts


def _stored(path: Path, begin: bytes) -> Arrays:
    """The arrays of a file by its own names."""
    if torch_save.is_torch(begin):
        return torch_save.read(path)
    if begin[:1] == b"\x0a":  # field 1 of a graph
        stored = graph_def.read(path)
        scaled = [name for name, array in stored.items() if name.endswith("batchnorm/gamma") and np.any(array != 1)]
        if scaled:
            raise WeightsError(
                f"{path}: {scaled[0]} and {len(scaled) - 1} others are not 1, as they are in FID's graph."
            )
        return stored
    found = stand_in_of(path)
    raise WeightsError(
        f"{path} {f'is {found}' if found else f'begins with {begin!r}'}. Read are PyTorch's files (.pth, .pt, new or "
        "old format, TorchScript) and frozen graphs of TensorFlow (.pb). NVIDIA's .pkl is a program: take its .pt."
    )


def _params(layout: Layout, stored: Arrays, what: str) -> Params:
    """Our parameters, in arrays of their own."""
    names = {path: layout.name(path) for path in shapes()}
    wanted = {name: _theirs(layout, shapes()[path]) for path, name in names.items() if name}
    given = {name: array for name, array in stored.items() if not layout.passed_over(name)}
    found = match(given, wanted, what)
    params: Arrays = {}
    for path, shape in shapes().items():
        name = names[path]
        array = found[name].transpose(layout.axes.get(len(shape), range(len(shape)))) if name else np.ones(shape)
        params[path] = np.array(array, np.float32, order="C")
        if path.endswith("running_var") and (params[path] < 0).any():
            raise WeightsError(f"{what}: {name} has negative variances.")
    return unflatten(params)


def _theirs(layout: Layout, shape: Shape) -> Shape:
    """Our shape with the file's order of axes."""
    axes = layout.axes.get(len(shape), tuple(range(len(shape))))
    return tuple(shape[axes.index(axis)] for axis in range(len(shape)))
