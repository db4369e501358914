"""Weights from elsewhere to artefacts, and artefacts to formats that other programs read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_distill import weights
from diffusion_distill.base.errors import choose, near_matches
from diffusion_distill.base.files import user_path, writable
from diffusion_distill.base.typing import Params
from diffusion_distill.denoisers.guidance import NoisyLogProb
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process import grids
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.progress import Progress
from diffusion_distill.weights import exports, inception, onnx, published_torch, stablehlo, torch_models
from diffusion_distill.weights.exports import Export
from diffusion_distill.weights.inception import INCEPTION_FILES, InceptionWeights
from diffusion_distill.weights.matching import Checkpoint

SAFETENSORS = ".safetensors"
PICKLE = ".pkl"
#: Formats of exports, with what their names end in.
EXPORTS = {
    "safetensors": SAFETENSORS,
    "stablehlo": ".stablehlo",
    "onnx": ".onnx",
    "diffusers": "-diffusers",
    "pytorch": "-pytorch",
}
PROGRAMS = {"progressive": "progressive distillation (Google)", "edm": "EDM (NVIDIA)"}


def import_weights(
    name: str | Path,
    folder: str | Path,
    model: Model | None = None,
    *,
    family: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Artefact:
    """Turns published or exported weights into an artefact.

    Args:
      name: one of `weights.PUBLISHED`, which is downloaded; or a file: one of Google's (by its published name, or
        with `model`), a '.pkl' of EDM, which says itself what it holds, a '.safetensors' made by `export_weights`,
        a file of PyTorch or safetensors of another program, or a folder of diffusers (`weights.torch_models`).
      folder: becomes the artefact's folder; downloads are kept in FOLDER/download, so that they can be taken up.
      model: what the file holds, if its name does not say; a file that says that it holds another is refused.
      family, arguments: what a file of PyTorch or safetensors does not show, see `weights.torch_models`.

    Raises:
      FileNotFoundError: name is neither published nor a file.
      WeightsError: the file is not what it should be.
    """
    path, folder = user_path(name), writable(folder)
    Artefact.check_place(folder)
    if path.suffix == SAFETENSORS and path.is_file() and weights.exchange.is_ours(path):
        artefact = read_exported(path, model)
    else:
        artefact = _foreign(str(name), folder, model, family, arguments or {})
    artefact.save(folder)
    return artefact


def read_exported(path: Path, model: Model | None = None) -> Artefact:
    """The artefact in a safetensors file made by `export_weights`.

    Raises:
      WeightsError: the file is not what it should be, or holds another model than the one that is given.
    """
    found = weights.exchange.read(path, model)
    return Artefact(found.model, _to_device(found.params), found.steps, found.facts, found.grid)


def read_noisy_classifier(name: str | Path) -> NoisyLogProb:
    """A classifier of noisy images in a file of ADM's program, for `SamplerSpec(guidance={"classifier": ...})`.

    Args:
      name: the file. Its arguments are those published under its name, or stand in a JSON file beside it.

    Raises:
      WeightsError: it is damaged, no such classifier, or its arguments are missing or do not fit.
      OSError: it cannot be opened.
    """
    path = user_path(name)
    return torch_models.read_classifier(path, published_torch.arguments_of_classifier(path))


def is_inception(name: str | Path) -> bool:
    """Whether a published name, or the name of a file, belongs to FID's InceptionV3."""
    path = user_path(name)
    if path.is_file():
        named = path.name in {Path(f.url).name for f in INCEPTION_FILES.values()}
        return named or (path.suffix in (".pth", ".pt", ".pb") and not weights.torch_models.is_known(path))
    return str(name) in INCEPTION_FILES


def import_inception(name: str | Path, folder: str | Path) -> InceptionWeights:
    """Turns one of `INCEPTION_FILES`, which is downloaded, or a file into a folder of InceptionV3's parameters.

    Raises:
      WeightsError: the file is not what it should be.
    """
    folder, path = writable(folder), user_path(name)
    found = inception.read(path) if path.is_file() else inception.fetch(str(name), folder / "download")
    folder.mkdir(parents=True, exist_ok=True)
    inception.save_inception(found, folder)
    return found


def export_weights(artefact: Artefact, path: str | Path, format: str = "safetensors") -> Path:
    """Writes an artefact for other programs, and reads it again; see `exported`, which says how they differ."""
    return exported(artefact, path, format).place


def exported(
    artefact: Artefact, path: str | Path, format: str = "safetensors", results: Sequence[Mapping[str, Any]] = ()
) -> Export:
    """Writes an artefact for other programs, reads it again, and compares.

    Args:
      path: of a '.safetensors', '.stablehlo' or '.onnx' file; of the other formats a folder, which gets a model card
        too. What stands there is replaced if it is a file or an export.
      format: 'safetensors', with this library's own names and description of the model; 'stablehlo', one compiled
        function, see `weights.stablehlo`, and 'onnx', the same in ONNX, see `weights.onnx`; 'diffusers', a folder for
        its `from_pretrained`, and 'pytorch', a folder with the names of ADM's program, see `weights.exports`.
      results: rows of an evaluation, {name: value}, for the model card.

    Raises:
      WeightsError: the other program cannot compute what the model does; the message says why.
      ValueError: an unknown format, or what stands at the path is no export.
      ImportError: safetensors, or what ONNX needs, is not installed.
    """
    ending = choose("format of exports", format, EXPORTS)
    path, provenance = user_path(path), dict(artefact.provenance)
    if ending.startswith(".") and path.suffix != ending:
        raise ValueError(f"Exports of the format {format} are {ending} files, got {path}.")
    if ending.startswith(".") and path.is_dir():
        raise ValueError(f"{path} is a folder; an export of the format {format} is a file. Choose another place.")
    if artefact.model.guided and format not in ("safetensors", "stablehlo"):
        raise weights.WeightsError(
            f"A guided student is told the scale of guidance, for which the format {format} has no place. Export it as "
            "safetensors or stablehlo."
        )
    if format == "stablehlo":
        return stablehlo.save(path, artefact.model, artefact.params)
    if format == "onnx":
        return onnx.save(path, artefact.model, artefact.params)
    if format != "safetensors":
        facts = {**provenance, "results": list(results)}
        found = Checkpoint(artefact.model, artefact.params, artefact.steps, facts=facts, grid=artefact.grid)
        return exports.write(path, found, format)
    about = {"model": artefact.model.to_dict(), "steps": artefact.steps, "grid": grids.to_numbers(artefact.grid)}
    weights.exchange.save(path, artefact.params, about | {"provenance": provenance})
    read = weights.flatten(weights.exchange.load(path)[0])
    pairs = ((np.asarray(value, np.float64), read[name]) for name, value in weights.flatten(artefact.params).items())
    return Export(path, max((float(np.abs(ours - theirs).max(initial=0)) for ours, theirs in pairs), default=0.0))


def _foreign(
    name: str, folder: Path, model: Model | None, family: str | None, arguments: Mapping[str, Any]
) -> Artefact:
    """Weights of another program, by their published name or from a file."""
    path, facts = user_path(name), {}
    published = _published(path) if path.is_file() else weights.PUBLISHED.get(name)
    kind = _kind(path, published)
    if path.is_file():
        with path.open("rb") as file:
            facts = {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    elif published is not None and not path.is_dir():
        path, facts = _download(published, kind, folder / "download")
    elif not path.is_dir():
        raise FileNotFoundError(
            f"{name} is neither a file nor a published model.{near_matches(name, weights.PUBLISHED)} "
            f"Published: {', '.join(weights.PUBLISHED)}."
        )
    if published is not None and (kind == "progressive" or "url" in facts):  # a file of EDM needs no name
        model = model or published.model
    if model is None and kind == "progressive":
        raise weights.WeightsError(
            f"Which network does {path} hold? Name the file as it was published (for example cifar_original), or give "
            "a config that describes the model."
        )
    told = {}
    if kind == "torch":
        if published is not None and ("url" in facts or not (family or arguments)):
            family, arguments = family or published.family, {**published.arguments, **arguments}
        told = {"family": family, "arguments": arguments}
    found = weights.READERS[kind](path, model, **told)
    program = PROGRAMS.get(kind, found.facts.get("family"))
    provenance = {"imported_from": {"program": program, **facts, **found.facts}, "updates": found.step}
    return Artefact(found.model, _to_device(found.params), found.steps, provenance, found.grid)


def _published(path: Path) -> weights.Published | None:
    """The published model whose name or file's name a file has, if it is only one."""
    named = [
        entry
        for name, entry in weights.PUBLISHED.items()
        if name == path.stem or (entry.format == "torch" and Path(entry.url).name == path.name)
    ]
    return named[0] if len(named) == 1 else None


def _kind(path: Path, published: weights.Published | None) -> str:
    """The format of a file, by its beginning, or of a published model: a name in `weights.READERS`."""
    if path.is_dir() or (path.is_file() and path.suffix != PICKLE and weights.state_dict.is_known(path)):
        return "torch"
    return "edm" if path.suffix == PICKLE else published.format if published else "progressive"


def _to_device(params: Params) -> Params:
    """JAX arrays of a tree of NumPy arrays, which is emptied on the way: there is never a second copy of it all."""
    moved = {}
    for name in list(params):
        value = params.pop(name)
        moved[name] = _to_device(value) if isinstance(value, dict) else jnp.asarray(value)
    return moved


def _download(published: weights.Published, kind: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    told = {"family": published.family, "arguments": published.arguments} if kind == "torch" else {}
    progress = Progress(f"downloading {published.name}", 0, unit="MiB")

    def report(done: int, total: int | None) -> None:
        progress.expect((total or 0) >> 20)
        progress.update(done >> 20)

    fetched = weights.fetch(
        published.url, folder, size=published.size, sha256=published.sha256, report=report,
        check=lambda path: weights.READERS[kind](path, published.model, **told),
    )  # fmt: skip
    progress.close()
    return fetched.path, {"name": published.name, "url": published.url, "sha256": fetched.sha256, "bytes": fetched.size}
