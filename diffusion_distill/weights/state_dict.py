"""Reads the weights of other programs by their own names: files of PyTorch, safetensors, folders of diffusers.

The first bytes of a file tell its format, not its name. A safetensors file is its tensors. What a PyTorch file holds
decides which of its tensors are taken, unless `entry` names one of its state dicts (dictionaries of tensors):

    a state dict      it, as it is
    a list            its last element, if that is a state dict: the average (EMA). Else its first element
    a dictionary      the first of the names `AVERAGES` that is in it, else the first of `NETWORKS`

If all names of a state dict from a list or a dictionary begin with "module.", which PyTorch's data-parallel wrapper
puts there, they lose it. A folder of diffusers has a description and the weights, in the first of these that is there:

    config.json
    diffusion_pytorch_model.safetensors, *.safetensors.index.json with the files that it lists,
    diffusion_pytorch_model.fp16.safetensors, diffusion_pytorch_model.bin

and a folder with model_index.json is a pipeline, whose subfolder `unet` or `transformer` is read. Nothing in a file is
executed. Arrays are read-only views of the memory-mapped files, which must not be changed while they are in use.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from diffusion_distill.base.errors import WeightsError, near_matches
from diffusion_distill.base.files import stand_in_of, user_path
from diffusion_distill.formats import safetensors_file, strict_json, torch_save
from diffusion_distill.formats.mapped import mapped
from diffusion_distill.formats.pickle_stream import kind_of

Tensors = dict[str, np.ndarray]

AVERAGES = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "model_ema_state_dict", "params_ema")
NETWORKS = ("state_dict", "model", "model_state_dict", "net", "network", "params")
PREFIX = "module."
CONFIG, PIPELINE = "config.json", "model_index.json"
STEM = "diffusion_pytorch_model"
INDEX = ".safetensors.index.json"
PARTS = ("unet", "transformer")  # of a pipeline
MAX_CONFIG = 2**20  # bytes
MAX_INDEX = 2**21  # bytes
MAX_FILES = 2**10  # that an index lists
LISTED = 8  # names in an error
READ = "Read are files of PyTorch (.pt, .pth, .ckpt, .bin), safetensors, and folders of diffusers with a config.json."
BY_HAND = "In PyTorch, save what is meant with torch.save(model.state_dict(), path)."
BY_NAME = "Name the one that is meant with entry=..."


class StateDict(
    # A call, since only the command line has variables called `config`, which are then its own; a test reads that.
    NamedTuple("StateDict", [("tensors", Tensors), ("config", dict[str, Any] | None), ("facts", dict[str, Any])])
):
    """The tensors that were read.

    Attributes:
      tensors: read-only views of the file, by the names in it, in its order; in the layout and type of the file.
      config: what a folder's config.json says; None if a file was read.
      facts: where they are from, JSON-ready: `files`, their names; `format`, 'torch' or 'safetensors'; `entry`, what
        was taken of a list or dictionary, else None; `prefix`, what was removed from all names; `subfolder`, of a
        pipeline, else None.
    """

    __slots__ = ()


def read(path: str | Path, *, entry: str | None = None) -> StateDict:
    """Reads a file or a folder; see above.

    Args:
      entry: the state dict to take of a PyTorch file that holds several: a name in its dictionary, or an index of its
        list, such as "0" or "-1".

    Raises:
      WeightsError: the file or folder is damaged, exceeds a limit, or is of another kind; it has no such entry, or no
        state dict where one is needed. The message says what was found and what to do.
      OSError: it cannot be opened.
    """
    path = user_path(path)
    return _read_folder(path, entry) if path.is_dir() else _read_file(path, entry)


def is_known(path: Path) -> bool:
    """Whether a file begins as those that are read here do."""
    with open(path, "rb") as file:
        begin = file.read(safetensors_file.LENGTH + 1)
    return torch_save.is_torch(begin) or safetensors_file.is_safetensors(begin)


# ---------------------------------------------------------------- files


def _read_file(path: Path, entry: str | None) -> StateDict:
    with open(path, "rb") as file:
        begin = file.read(safetensors_file.LENGTH + 1)
    facts = {"files": [path.name], "format": "torch", "entry": None, "prefix": "", "subfolder": None}
    if torch_save.is_torch(begin):
        try:
            found = torch_save.read_object(path)
        except WeightsError as error:
            raise WeightsError(f"{error} Download it again, if it is not whole. {BY_HAND}") from error
        tensors, taken = _chosen(found, entry, path)
        prefix = PREFIX if taken is not None and all(name.startswith(PREFIX) for name in tensors) else ""
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        facts |= {"entry": taken, "prefix": prefix}
    elif safetensors_file.is_safetensors(begin):
        _need_no(entry, path)
        tensors = safetensors_file.read(path)
        facts |= {"format": "safetensors"}
    else:
        raise WeightsError(f"{path} is {stand_in_of(path) or f'of a kind that begins with {begin!r}'}. {READ}")
    return StateDict(_checked(tensors, path), None, facts)


def _need_no(entry: str | None, path: Path) -> None:
    if entry is not None:
        raise WeightsError(f"{path} is of safetensors, which have no entries. Leave out entry={entry!r}.")


def _checked(tensors: Tensors, path: Path) -> Tensors:
    if not tensors:
        raise WeightsError(f"{path} holds no tensors. Download it again.")
    for name in tensors:
        if not name or not name.isprintable():
            raise WeightsError(f"{path}: a tensor is called {name[:80]!r}; names are text that can be printed.")
    return tensors


def _chosen(found: Any, entry: str | None, path: Path) -> tuple[Tensors, str | None]:
    """The state dict that is meant in the object of a PyTorch file, and its name or index in it."""
    if entry is None and _is_state_dict(found):
        return found, None
    if isinstance(found, list | tuple):
        named = {str(index): value for index, value in enumerate(found)}
        default = "-1" if found and _is_state_dict(found[-1]) else "0"
        named |= {"-1": found[-1]} if found else {}
    elif isinstance(found, dict):
        named = {str(name): value for name, value in found.items()}
        default = _known(named, path) if entry is None else ""
    else:
        raise WeightsError(f"{path} holds {kind_of(found)}, no state dict. {READ} {BY_HAND}")
    name = default if entry is None else entry
    if not _is_state_dict(value := named.get(name)):
        what = f"its entry {name!r} is {kind_of(value)}" if name in named else f"it has no entry {name!r}"
        raise WeightsError(f"{path}: {what}.{near_matches(name, named)} {_listed(named)} {BY_NAME} {BY_HAND}")
    return value, name


def _known(named: dict[str, Any], path: Path) -> str:
    """The first known name of a dictionary that is not a state dict itself."""
    for name in (*AVERAGES, *NETWORKS):
        if _is_state_dict(value := named.get(name)):
            return name
        if name in AVERAGES and isinstance(value, dict | list | tuple) and value:
            raise WeightsError(
                f"{path}: its entry {name!r} seems to hold an average of the weights, but is no state dict, and the "
                f"other weights are not the ones to sample with. {_listed(named)} {BY_NAME}"
            )
    known = ", ".join((*AVERAGES, *NETWORKS))
    raise WeightsError(
        f"{path}: it is no state dict, and no entry of a known name ({known}) is one. {_listed(named)} {BY_NAME} "
        f"{BY_HAND}"
    )


def _is_state_dict(value: Any) -> TypeGuard[Tensors]:
    """Whether it is a dictionary of tensors by name, and not empty."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, np.ndarray) for name, tensor in value.items())


def _listed(named: dict[str, Any]) -> str:
    """A sentence with the entries of an object."""
    said = [
        f"{name[:40]!r}: {f'a state dict of {len(value)} tensors' if _is_state_dict(value) else kind_of(value)}"
        for name, value in list(named.items())[:LISTED]
    ]
    more = f" and {len(named) - LISTED} more" if len(named) > LISTED else ""
    return f"It holds {{{', '.join(said)}}}{more}."


# ---------------------------------------------------------------- folders


def _read_folder(folder: Path, entry: str | None, subfolder: str | None = None) -> StateDict:
    if (folder / PIPELINE).is_file() and not (folder / CONFIG).is_file() and subfolder is None:
        listed = _json(folder / PIPELINE, MAX_CONFIG)
        part = next((part for part in PARTS if part in listed and (folder / part).is_dir()), None)
        if part is None:
            raise WeightsError(
                f"{folder} is a pipeline of {_names(listed)} and has none of the subfolders {', '.join(PARTS)}, which "
                "are read. Give the folder of its network, or download it again."
            )
        return _read_folder(folder / part, entry, part)
    if not (folder / CONFIG).is_file():
        raise WeightsError(f"{folder} has no {CONFIG}, but {_names(_files(folder))}. {READ} Give a file of it.")
    described = _json(folder / CONFIG, MAX_CONFIG)
    found = _read_weights(folder, entry)
    return found._replace(config=described, facts=found.facts | {"subfolder": subfolder})


def _read_weights(folder: Path, entry: str | None) -> StateDict:
    """The weights of a folder, in the first of the forms that is there."""
    files = _files(folder)
    index = [f"{STEM}{INDEX}"] if f"{STEM}{INDEX}" in files else [name for name in files if name.endswith(INDEX)]
    if len(index) > 1:
        raise WeightsError(f"{folder} has several indices: {_names(index)}. Leave the one that is meant.")
    for name in (f"{STEM}.safetensors", *index, f"{STEM}.fp16.safetensors", f"{STEM}.bin"):
        if name in files and name in index:
            _need_no(entry, folder / name)
            return _read_index(folder / name)
        if name in files:
            return _read_file(folder / name, entry)
    raise WeightsError(
        f"{folder} has no weights, but {_names(files)}. Read are {STEM}.safetensors, *{INDEX}, "
        f"{STEM}.fp16.safetensors and {STEM}.bin. Download the folder again, or give the file itself."
    )


def _read_index(path: Path) -> StateDict:
    """The tensors of several files, each of which holds exactly those that the index says."""
    places = _json(path, MAX_INDEX).get("weight_map")
    if type(places) is not dict or not places or not all(type(place) is str for place in places.values()):
        raise WeightsError(f"{path} has no weight_map, {{name: file}}. Download the folder again.")
    files = list(dict.fromkeys(places.values()))
    wrong = [file for file in files if Path(file).name != file or "\\" in file or not file.endswith(".safetensors")]
    if wrong or len(files) > MAX_FILES:
        raise WeightsError(
            f"{path} lists {len(files)} files, among them {_names(wrong or files)}; read are up to {MAX_FILES} "
            "safetensors files beside the index, without folders in their names. Download the folder again."
        )
    if absent := [file for file in files if not (path.parent / file).is_file()]:
        raise WeightsError(f"{path.parent} lacks {_names(absent)}, which {path.name} lists. Download them too.")
    found: Tensors = {}
    for file in files:
        tensors = safetensors_file.read(path.parent / file)
        listed = {name for name, place in places.items() if place == file}
        if differing := sorted(listed ^ tensors.keys()):
            raise WeightsError(
                f"{path.parent / file} and {path.name} do not name the same tensors: {_names(differing)} "
                f"{'is' if len(differing) == 1 else 'are'} in one of them only. Download the folder again."
            )
        found |= tensors
    facts = {"files": [path.name, *files], "format": "safetensors", "entry": None, "prefix": "", "subfolder": None}
    return StateDict(_checked({name: found[name] for name in places}, path), None, facts)


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def _json(path: Path, most: int) -> dict[str, Any]:
    try:
        return strict_json.loads(mapped(path), most)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}. Download it again.") from error


def _names(names: Iterable[str]) -> str:
    """Names for an error, the first of them."""
    listed = list(names)
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return ", ".join(repr(name[:80]) for name in listed[:LISTED]) + more if listed else "nothing"
