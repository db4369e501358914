"""Writes files of PyTorch's formats, and a frozen graph, without PyTorch and TensorFlow.

What Python's pickler sees is made of stand-ins with PyTorch's names; where the bytes go is PyTorch's documented layout.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from diffusion_distill.weights import FAMILIES

Arrays = Mapping[str, np.ndarray]

CLASSES = {
    "f4": "FloatStorage", "f8": "DoubleStorage", "f2": "HalfStorage", "V2": "BFloat16Storage", "i8": "LongStorage",
    "i4": "IntStorage", "i2": "ShortStorage", "i1": "CharStorage", "u1": "ByteStorage", "b1": "BoolStorage",
}  # fmt: skip


def function(name: str) -> Callable[..., None]:
    """A stand-in for a function of torch._utils."""
    made = lambda *arguments: None  # noqa: E731
    made.__module__, made.__qualname__, made.__name__ = "torch._utils", name, name
    return made


Rebuild, RebuildParameter = function("_rebuild_tensor_v2"), function("_rebuild_parameter")
KINDS = {code: type(name, (), {"__module__": "torch"}) for code, name in CLASSES.items()}


class Storage:
    """Elements that pickles name by a key; `view`, in the legacy format only, says that a part of them is meant."""

    def __init__(self, elements: np.ndarray, key: str, view: tuple[str, int, int] | None = None) -> None:
        self.elements, self.key, self.view = elements, key, view


class Tensor:
    """A view of a storage; `changes` of (offset, size, stride) for damaged ones."""

    def __init__(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.arguments = (storage, offset, size, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return Rebuild, self.arguments


class Parameter:
    """A tensor that is trained."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return RebuildParameter, (self.tensor, True, OrderedDict())


class Pickler(pickle.Pickler):
    """PyTorch's: storages are persistent ids, of six items in the legacy format."""

    def __init__(self, file: Any, legacy: bool) -> None:
        super().__init__(file, 2)
        self.legacy, self.storages = legacy, {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        self.storages[obj.key] = obj.elements
        kind = KINDS[obj.elements.dtype.str[1:]]
        return ("storage", kind, obj.key, "cpu", obj.elements.size) + (obj.view,) * self.legacy


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Contiguous tensors, each with a storage of its own."""
    made = {}
    for i, (name, array) in enumerate(arrays.items()):
        array = np.asarray(array, order="C")
        strides = tuple(step // array.itemsize for step in array.strides)
        made[name] = Tensor(Storage(array.reshape(-1), str(i)), 0, array.shape, strides)
    return made


def state_dict(arrays: Arrays) -> Any:
    """As torch.nn.Module.state_dict gives it: ordered, with versions of the modules as an attribute."""
    made = OrderedDict(tensors(arrays))
    modules = {name.rpartition(".")[0]: {"version": 1} for name in arrays}
    made._metadata = OrderedDict({"": {"version": 1}, **modules})  # type: ignore[attr-defined]
    return made


def script(arrays: Arrays) -> Any:
    """A tree of TorchScript's modules, from the names of its tensors."""
    made = tensors(arrays)
    root = _script_module("")
    for name, tensor in made.items():
        *folders, leaf = name.split(".")
        module = root
        for folder in folders:
            module = vars(module).setdefault(folder, _script_module(folder))
        setattr(module, leaf, tensor)
    return root


@cache
def _script_class(name: str) -> type:
    return type(f"Module_{name}", (), {"__module__": f"__torch__.torch.nn.{name or 'root'}"})


def _script_module(name: str) -> Any:
    module = _script_class(name)()
    vars(module).update(training=False, _is_full_backward_hook=None)
    return module


def pickled(content: Any, legacy: bool) -> tuple[bytes, dict[str, np.ndarray]]:
    """The pickle, and the storages that it names."""
    stream = io.BytesIO()
    pickler = Pickler(stream, legacy)
    with mock.patch.dict(sys.modules, _modules(content)):
        pickler.dump(content)
    return stream.getvalue(), pickler.storages


def _modules(content: Any) -> dict[str, ModuleType]:
    """The modules that a pickler looks for when it writes a name."""
    things, todo, seen = [Rebuild, RebuildParameter, *KINDS.values()], [content], set()
    while todo:
        module = todo.pop()
        if type(module).__module__.startswith("__torch__") and id(module) not in seen:
            seen.add(id(module))
            things.append(type(module))
            todo += vars(module).values()
    modules: dict[str, ModuleType] = {}
    for thing in things:
        parts = thing.__module__.split(".")
        for depth in range(len(parts)):
            modules.setdefault(name := ".".join(parts[: depth + 1]), ModuleType(name))
        setattr(modules[thing.__module__], thing.__qualname__, thing)
    return modules


def write_zip(path: Path, content: Any, folder: str = "archive", change: Callable[[dict], None] | None = None) -> Path:
    """torch.save's format since 1.6; `change` gets {entry without its folder: bytes} for damaged ones."""
    data, storages = pickled(content, legacy=False)
    entries = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
    entries |= {f"data/{key}": elements.tobytes() for key, elements in storages.items()}
    if change:
        change(entries)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            compression = zipfile.ZIP_DEFLATED if name.startswith("code/") else zipfile.ZIP_STORED  # as PyTorch does
            archive.writestr(f"{folder}/{name}", content, compression)
    return path


def write_script(path: Path, arrays: Arrays) -> Path:
    """torch.jit.save's format: the same with program text and constants."""

    def more(entries: dict[str, bytes]) -> None:
        entries["code/__torch__/root.py"] = b"raise SystemExit\n" * 99
        entries["constants.pkl"] = pickle.dumps((), 2)

    return write_zip(path, script(arrays), "inception", more)


def legacy_parts(content: Any) -> list[bytes]:
    """torch.save's format before 1.6: five pickles, then the storages."""
    data, storages = pickled(content, legacy=True)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps(system, 2)]
    keys = sorted(storages)
    tail = [struct.pack("<q", storages[key].size) + storages[key].tobytes() for key in keys]
    return [*head, data, pickle.dumps(keys, 2), *tail]


def write_legacy(path: Path, content: Any) -> Path:
    path.write_bytes(b"".join(legacy_parts(content)))
    return path


# ---------------------------------------------------------------- TensorFlow


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return _whole(8 * number) + _whole(value)
    return _whole(8 * number + 2) + _whole(len(value)) + value


def _whole(value: int) -> bytes:
    digits = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([digit | 128 for digit in digits[:-1]] + digits[-1:])


def constant(name: str, array: np.ndarray, content: bytes | None = None) -> bytes:
    """A node of a graph."""
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    kind = {"f4": 1, "i4": 3}[array.dtype.str[1:]]
    tensor = field(1, kind) + field(2, shape) + field(4, array.tobytes() if content is None else content)
    dtype = field(5, field(1, b"dtype") + field(2, field(6, kind)))
    return node(name, b"Const", dtype + field(5, field(1, b"value") + field(2, field(8, tensor))))


def node(name: str, operation: bytes, more: bytes = b"") -> bytes:
    return field(1, field(1, name.encode()) + field(2, operation) + more)


def write_graph(path: Path, arrays: Arrays) -> Path:
    """A frozen graph of these constants, with nodes of other kinds between them."""
    nodes = [node("ExpandDims", b"ExpandDims", field(3, b"input"))]
    nodes += [constant(name, array) for name, array in arrays.items()]
    nodes += [constant("pool_3/_reshape/shape", np.array([1, 2048], "<i4")), node("softmax", b"Softmax")]
    path.write_bytes(b"".join(nodes) + field(4, field(1, 8)))
    return path


#: Arguments of a small network of ADM, and of its classifier.
ADM = {
    "image_size": 64, "model_channels": 64, "out_channels": 3, "num_res_blocks": 1, "attention_resolutions": [],
    "channel_mult": [1], "num_head_channels": 64,
}  # fmt: skip
CLASSIFIER = {**ADM, "out_channels": 10, "pool": "adaptive"}


def write_adm(network: Path, classifier: Path) -> None:
    """Files of such a network, and of a classifier, with random weights."""
    rng = np.random.default_rng(0)
    for path, family, arguments in (
        (network, "guided_diffusion", ADM),
        (classifier, "guided_diffusion_classifier", CLASSIFIER),
    ):
        entries = FAMILIES[family].entries(arguments)
        arrays = {entry.name: 0.1 * rng.standard_normal(entry.shape).astype(np.float32) for entry in entries}
        write_zip(path, state_dict(arrays))
