"""Writes snapshot files of EDM's structure without PyTorch: what a pickler sees is made of stand-ins with its names.

The structure is that of the recorded files in golden/edm, whose reading the tests check first.
"""

from __future__ import annotations

import contextlib
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

Arrays = Mapping[str, np.ndarray]

CODES = {"f4": "FloatStorage", "f8": "DoubleStorage", "f2": "HalfStorage"}
HOOKS = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


class Call:
    """Something that is pickled as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def stand_in(module: str, name: str) -> Any:
    """A function that pickles name so."""
    function = lambda *arguments: None  # noqa: E731
    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function


RECONSTRUCT = stand_in("torch_utils.persistence", "_reconstruct_persistent_obj")
REBUILD_PARAMETER = stand_in("torch._utils", "_rebuild_parameter")
REBUILD_TENSOR = stand_in("torch._utils", "_rebuild_tensor_v2")
LOAD_FROM_BYTES = stand_in("torch.storage", "_load_from_bytes")
ModuleDict = type("ModuleDict", (), {"__module__": "torch.nn.modules.container"})


def storage(elements: np.ndarray, **changes: Any) -> bytes:
    """PyTorch's legacy format of a storage; `changes` for damaged ones."""
    facts: dict[str, Any] = {"count": elements.size, "after": elements.size, "name": CODES[elements.dtype.str[1:]]}
    facts |= {"magic": 0x1950A86A20F9469CFC6C, "protocol": 1001, "key": "94", "keys": ["94"], "little_endian": True}
    facts |= changes
    text = lambda words: b"X" + struct.pack("<I", len(words)) + words.encode()  # noqa: E731
    identity = b"(" + text("storage") + f"ctorch\n{facts['name']}\n".encode() + text(facts["key"]) + text("cpu")
    count = pickle.dumps(facts["count"], 2)[2:-1]
    system = {"protocol_version": 1001, "little_endian": facts["little_endian"]}
    system["type_sizes"] = {"short": 2, "int": 4, "long": 4}
    parts = [pickle.dumps(facts["magic"], 2), pickle.dumps(facts["protocol"], 2), pickle.dumps(system, 2)]
    parts += [b"\x80\x02" + identity + count + b"NtQ.", pickle.dumps(facts["keys"], 2)]
    return b"".join((*parts, struct.pack("<q", facts["after"]), elements.tobytes()))


def tensor(array: np.ndarray, parameter: bool = True) -> Call:
    """A contiguous tensor with a storage of its own."""
    strides = tuple(step // array.itemsize for step in np.ascontiguousarray(array).strides)
    made = view(storage(np.ascontiguousarray(array).reshape(-1)), 0, array.shape, strides)
    return Call(REBUILD_PARAMETER, made, False, OrderedDict()) if parameter else made


def view(content: bytes, offset: int, size: tuple[int, ...], strides: tuple[int, ...]) -> Call:
    return Call(REBUILD_TENSOR, Call(LOAD_FROM_BYTES, content), offset, size, strides, False, OrderedDict())


def state(attributes: Mapping[str, Any], parameters: Any = (), buffers: Any = (), modules: Any = ()) -> dict[str, Any]:
    """The attributes of a module."""
    private = {name: OrderedDict() for name in HOOKS} | {"_non_persistent_buffers_set": set()}
    stored = {"training": False, "_parameters": OrderedDict(parameters), "_buffers": OrderedDict(buffers)}
    return {**stored, **private, "_modules": OrderedDict(modules), **attributes}


def persistent(class_name: str, content: dict[str, Any], version: int = 6) -> Call:
    """An object of torch_utils.persistence."""
    facts = {"type": "class", "version": version, "module_src": "# not this\n", "class_name": class_name}
    return Call(RECONSTRUCT, {**facts, "state": content})


def network(class_name: str, kwargs: Mapping[str, Any], tensors: Arrays) -> Call:
    """A network from its tensors by name, with the parts that their names tell."""
    tree: dict[str, Any] = {}
    for name, array in tensors.items():
        *modules, leaf = name.split(".")
        inner = tree
        for module in modules:
            inner = inner.setdefault(module, {})
        inner[leaf] = array
    if "map_noise" not in tree:
        tree = {"map_noise": {}, **tree}
    return _module(class_name, "", tree, {"_init_args": (), "_init_kwargs": dict(kwargs)}, class_name)


def _module(class_name: str, name: str, tree: dict[str, Any], attributes: dict[str, Any], network_class: str) -> Any:
    arrays = {leaf: value for leaf, value in tree.items() if not isinstance(value, dict)}
    modules = {}
    for inner, below in tree.items():
        if isinstance(below, dict):
            kind = _class_of(inner, below)
            modules[inner] = _module(kind, inner, below, _attributes(kind, below, network_class), network_class)
    buffers = {leaf: tensor(a, parameter=False) for leaf, a in arrays.items() if leaf in ("resample_filter", "freqs")}
    parameters = {leaf: tensor(a) for leaf, a in arrays.items() if leaf not in buffers}
    content = state(attributes, parameters, buffers, modules)
    if class_name != "ModuleDict":
        return persistent(class_name, content)
    made = ModuleDict()
    vars(made).update(content)
    return made


def _class_of(name: str, below: dict[str, Any]) -> str:
    """The class of a part, from its name and what is in it."""
    if name in ("enc", "dec"):
        return "ModuleDict"
    if name == "map_noise":
        return "FourierEmbedding" if below else "PositionalEmbedding"
    if "norm0" in below:
        return "UNetBlock"
    if "norm" in name:
        return "GroupNorm"
    return "Linear" if "weight" in below and below["weight"].ndim == 2 else "Conv2d"


def _attributes(kind: str, below: dict[str, Any], network_class: str) -> dict[str, Any]:
    song = network_class == "SongUNet"
    own: dict[str, Any] = {"_init_args": (), "_init_kwargs": {}}
    if kind == "PositionalEmbedding":
        own |= {"max_positions": 10000, "endpoint": song}
    elif kind == "GroupNorm":
        own |= {"num_groups": min(32, below["weight"].size // 4), "eps": 1e-6 if song else 1e-5}
    elif kind == "UNetBlock":
        channels = below["conv1"]["bias"].size
        heads = (1 if song else channels // 64) if "qkv" in below else 0
        own |= {"num_heads": heads, "adaptive_scale": not song, "skip_scale": np.sqrt(0.5) if song else 1}
    return own


def snapshot(wrapper: Call) -> dict[str, Any]:
    """The content of a file."""
    loss = persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5})
    return {"ema": wrapper, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {"resolution": 8}}


def wrapped(
    class_name: str, kwargs: Mapping[str, Any], inner: Any, attributes: Mapping[str, Any], buffers: Arrays | None = None
) -> Call:
    """A wrapper around a network."""
    shared = {name: kwargs.get(name, 0) for name in ("img_resolution", "img_channels", "label_dim")}
    own = {**shared, "use_fp16": False, **attributes, "_init_args": (), "_init_kwargs": dict(kwargs)}
    stored = {name: tensor(array, parameter=False) for name, array in (buffers or {}).items()}
    return persistent(class_name, state(own, (), stored, {"model": inner}))


def write(path: Path, content: Any) -> Path:
    """Pickles as the published program did, protocol 4."""
    with _stand_ins(), path.open("wb") as file:
        pickle.dump(content, file, 4)
    return path


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """The modules that a pickler looks for when it writes a name."""
    modules: dict[str, ModuleType] = {}
    for thing in (RECONSTRUCT, REBUILD_PARAMETER, REBUILD_TENSOR, LOAD_FROM_BYTES, ModuleDict):
        parts = thing.__module__.split(".")
        for depth in range(len(parts)):
            modules.setdefault(name := ".".join(parts[: depth + 1]), ModuleType(name))
        setattr(modules[thing.__module__], thing.__name__, thing)
    with mock.patch.dict(sys.modules, modules):
        yield


def facts_of(made: Any, path: str = "") -> dict[str, Any]:
    """What a persistent object in a wrapper is pickled with, to be changed; path as in a state_dict, or ""."""
    for name in filter(None, path.split(".")):
        content = vars(made) if isinstance(made, ModuleDict) else facts_of(made)["state"]
        made = content["_modules"][name]
    return made.reduced[1][0]
