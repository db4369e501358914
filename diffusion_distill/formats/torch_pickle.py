"""PyTorch modules in pickles of NVIDIA's snapshot format, read as names, numbers and arrays.

Such a file is one dictionary. Each module in it is a call of torch_utils.persistence._reconstruct_persistent_obj with
{type: "class", version: 6, module_src, class_name, state}. The source text in `module_src` is what an ordinary reader
would execute; here it is text that is never used. `state` holds the module's attributes: `_parameters`, `_buffers`
and `_modules` by name, `_init_kwargs`, public numbers and text, and private things such as hooks, which are left out.

A tensor is (storage, offset, size, stride), in elements, and a storage is a pickle in the pickle, PyTorch's format
before its version 1.6:

    1950a86a20f9469cfc6c   1001   {protocol_version, little_endian, type_sizes}      three pickles of protocol 2
    ("storage", class, key, location, count, None) as a persistent id   [key]        two more
    count as int64, and the elements up to the end of the bytes

Arrays are read-only views of the memory-mapped file, which must not be changed while they are in use.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_distill.base.errors import WeightsError
from diffusion_distill.base.files import stand_in_of, user_path
from diffusion_distill.formats import pickle_stream
from diffusion_distill.formats.mapped import mapped
from diffusion_distill.formats.pickle_stream import Buildable, Bytes, Dialect, Global, Source, Stateful, kind_of

MAX_DEPTH = 16  # of modules, and of lists and dictionaries in their attributes
MAX_MODULES = 2**12
MAX_VALUES = 2**17  # numbers, texts and containers in all attributes of a file
MAX_TEXT = 1000  # characters of a text among them, or of a class
MAX_DIMENSIONS = 8
VERSION = 6  # of the persistent objects
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of a storage
SYSTEM = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
STORAGES = {"FloatStorage": np.dtype("<f4"), "DoubleStorage": np.dtype("<f8"), "HalfStorage": np.dtype("<f2")}
Plain = Any  # None, bool, int, float, text, or lists, tuples and dictionaries of these


@dataclass
class Module:
    """A PyTorch module.

    Attributes:
      class_name: as in the file.
      init_kwargs: the arguments it was made with.
      attributes: its public numbers and text.
      parameters, buffers: read-only views of the file, in the file's order.
      modules: its submodules.
    """

    class_name: str
    init_kwargs: dict[str, Plain] = field(default_factory=dict)
    attributes: dict[str, Plain] = field(default_factory=dict)
    parameters: dict[str, np.ndarray] = field(default_factory=dict)
    buffers: dict[str, np.ndarray] = field(default_factory=dict)
    modules: dict[str, Module] = field(default_factory=dict)

    def walk(self, above: str = "") -> list[tuple[str, Module]]:
        """(prefix of its names in a state_dict, module) of this module and all below it, in the file's order."""
        found: list[tuple[str, Module]] = [(above, self)]
        for name, module in self.modules.items():
            found += module.walk(f"{above}{name}.")
        return found

    def tensors(self) -> dict[str, np.ndarray]:
        """Parameters and buffers as in a state_dict: by their paths, joined by dots."""
        return {
            prefix + name: array
            for prefix, module in self.walk()
            for name, array in (module.parameters | module.buffers).items()
        }


def read(path: str | Path, entry: str = "ema") -> Module:
    """Reads one module of a snapshot file; nothing in the file is executed.

    Args:
      entry: its name in the file's dictionary; the other entries are only checked.

    Raises:
      WeightsError: the file is damaged, exceeds a limit, or has unexpected contents; the message says what and where.
      OSError: it cannot be opened.
    """
    path = user_path(path)
    content = mapped(path)
    source = Source(content)
    try:
        if content[:1] != b"\x80":
            raise WeightsError(f"it is {stand_in_of(path) or 'no pickle'}")
        tree, end = pickle_stream.load(source, _outer(source), 0, len(content))
        if end != len(content):
            raise WeightsError(f"{len(content) - end} bytes follow the end of the pickle, at byte {end}")
        if type(tree) is not dict:
            raise WeightsError(f"it holds {kind_of(tree)}, not a dictionary with a network called {entry!r}")
        if not isinstance(tree.get(entry), _Object):
            entries = ", ".join(f"{kind_of(name)}: {kind_of(value)}" for name, value in list(tree.items())[:8])
            raise WeightsError(
                f"it holds no network as its entry {entry!r}, as NVIDIA's snapshots do, but {{{entries}}}"
            )
        return _Modules(len(content)).module(tree[entry], entry)
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be read as a snapshot of PyTorch modules: {error}.") from error


def as_tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], most: int | None = None
) -> np.ndarray:
    """The elements offset + sum(index·stride) of a storage, an array [count], as a read-only view [*size].

    Args:
      most: if given, a tensor may be empty, and one that repeats elements (a stride of 0) may have up to this many. By
        default neither occurs.

    Raises:
      WeightsError: it has too many elements, or reaches beyond the storage.
    """
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS or min((offset, *stride), default=0) < 0:
        raise WeightsError(f"a tensor of size {_said(size)} with strides {_said(stride)} from element {offset}")
    fewest, count = (1, storage.size) if most is None else (0, max(most, storage.size))
    within = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    last = offset - 1 if 0 in size else offset + within
    if min(size, default=1) < fewest or math.prod(max(n, 1) for n in size) > count or last >= storage.size:
        raise WeightsError(
            f"a tensor of size {_said(size)} with strides {_said(stride)} from element {offset} is not in its storage "
            f"of {storage.size} elements"
        )
    steps = [step * storage.itemsize if n > 1 else 0 for n, step in zip(size, stride, strict=True)]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


# ---------------------------------------------------------------- what the pickle may name


@dataclass(frozen=True)
class _Object:
    """A persistent object."""

    class_name: str
    state: dict[str, Any]


class _ModuleDict(Stateful):
    """torch.nn.ModuleDict, which is pickled without a source text."""

    what = "a ModuleDict"


class _Float64(Buildable):
    """numpy.dtype("<f8")."""

    built = False

    def build(self, state: Any) -> None:
        kinds = (int, str, *[type(None)] * 3, int, int, int)
        if _arguments("a NumPy type", state, *kinds) != (3, "<", None, None, None, -1, -1, 0):
            raise WeightsError("a NumPy type that is not little-endian float64")
        self.built = True


def _outer(source: Source) -> Dialect:
    """The stream of a whole file."""
    scalar = Global("scalar", partial(_scalar, source))
    named = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): Global("_reconstruct_persistent_obj", _object),
        ("collections", "OrderedDict"): Global("OrderedDict", _empty(dict)),
        ("dnnlib.util", "EasyDict"): Global("EasyDict", new=_empty(dict)),
        ("torch._utils", "_rebuild_parameter"): Global("_rebuild_parameter", _parameter),
        ("torch._utils", "_rebuild_tensor_v2"): Global("_rebuild_tensor_v2", _tensor),
        ("torch.storage", "_load_from_bytes"): Global("_load_from_bytes", partial(_storage, source)),
        ("torch.nn.modules.container", "ModuleDict"): Global("ModuleDict", new=_empty(_ModuleDict)),
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy._core.multiarray", "scalar"): scalar,  # NumPy 2
        ("numpy", "dtype"): Global("dtype", _dtype),
    }
    return Dialect(4, frozenset(OUTER_OPCODES.split()), named)


OUTER_OPCODES = (
    "PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST "
    "APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS STACK_GLOBAL REDUCE NEWOBJ BUILD"
)


def _arguments(what: str, arguments: Any, *kinds: type) -> tuple:
    """A tuple whose items are of exactly these types."""
    given = arguments if type(arguments) is tuple else ()
    if [type(argument) for argument in given] != list(kinds):
        raise WeightsError(f"{what} of ({', '.join(map(kind_of, given[:8]))}), which such a file does not have")
    return given


def _empty(kind: Callable[[], Any]) -> Callable[[tuple], Any]:
    def make(arguments: tuple) -> Any:
        _arguments("an empty container", arguments)
        return kind()

    return make


def _object(arguments: tuple) -> _Object:
    [facts] = _arguments("a persistent object", arguments, dict)
    names = ("type", "version", "module_src", "class_name", "state")
    if facts.keys() != set(names):
        raise WeightsError(f"a persistent object of {', '.join(map(kind_of, list(facts)[:8]))}")
    parts = _arguments("a persistent object", tuple(facts[name] for name in names), str, int, str, str, dict)
    if parts[:2] != ("class", VERSION) or len(parts[3]) > MAX_TEXT:
        said = f"type {kind_of(parts[0])}, version {parts[1]}"
        raise WeightsError(f"a persistent object of {said}; read is type 'class', version {VERSION}")
    return _Object(*parts[3:])


def _dtype(arguments: tuple) -> _Float64:
    if _arguments("a NumPy type", arguments, str, bool, bool) != ("f8", False, True):
        raise WeightsError(f"a NumPy type {kind_of(arguments[0])}; only f8 is read")
    return _Float64()


def _scalar(source: Source, arguments: tuple) -> float:
    dtype, content = _arguments("a NumPy number", arguments, _Float64, Bytes)
    if not dtype.built or content.end - content.begin != 8:
        raise WeightsError("a NumPy number that is not of 8 bytes")
    return struct.unpack_from("<d", source.content, content.begin)[0]


def _parameter(arguments: tuple) -> np.ndarray:
    return _arguments("a parameter", arguments, np.ndarray, bool, dict)[0]


def _tensor(arguments: tuple) -> np.ndarray:
    storage, offset, size, stride, *_ = _arguments("a tensor", arguments, _Storage, int, tuple, tuple, bool, dict)
    if not all(type(n) is int for n in (*size, *stride)):
        raise WeightsError("a tensor whose size or strides are not whole numbers")
    return as_tensor(storage.elements, offset, size, stride)


# ---------------------------------------------------------------- storages


@dataclass(frozen=True)
class _Storage:
    """The storage that tensors are views of."""

    elements: np.ndarray


@dataclass(frozen=True)
class _Announced:
    """A storage before its elements are reached."""

    dtype: np.dtype
    key: str
    count: int


def _storage(source: Source, arguments: tuple) -> _Storage:
    [content] = _arguments("a storage", arguments, Bytes)
    at, found = content.begin, []
    for _ in range(5):
        value, at = pickle_stream.load(source, STORAGE, at, content.end)
        found.append(value)
    magic, protocol, system, storage, keys = found
    if (magic, protocol) != (MAGIC, PROTOCOL) or system != SYSTEM:
        raise WeightsError(f"a storage of another format than PyTorch's number {PROTOCOL}, little-endian")
    if type(storage) is not _Announced or keys != [storage.key]:
        raise WeightsError("bytes that are not of one storage")
    size = content.end - at - 8
    count = struct.unpack_from("<q", source.content, at)[0] if size >= 0 else -1
    width = storage.dtype.itemsize
    if not 0 < count == storage.count == size / width:
        raise WeightsError(f"a storage of {storage.count} or {count} elements of {width} bytes, in {size} bytes")
    return _Storage(np.frombuffer(source.content, storage.dtype, count, at + 8))


def _announced(identity: Any) -> _Announced:
    """The storage that a persistent id describes."""
    kinds = (str, Global, str, str, int, type(None))
    what, kind, key, _, count, _ = _arguments("a persistent id", identity, *kinds)
    if what != "storage":
        raise WeightsError(f"a persistent id of {kind_of(what)}, not of a storage")
    return _Announced(STORAGES[kind.name], key, count)


STORAGE_OPCODES = (
    "PROTO STOP LONG1 BININT1 BININT2 BININT EMPTY_DICT BINPUT BINGET MARK BINUNICODE NEWTRUE SETITEMS GLOBAL NONE "
    "TUPLE BINPERSID EMPTY_LIST APPEND"
)
STORAGE = Dialect(
    2, frozenset(STORAGE_OPCODES.split()), {("torch", name): Global(name) for name in STORAGES}, _announced
)


# ---------------------------------------------------------------- modules


@dataclass
class _Modules:
    """A walk over the modules of a file; the tensors found may not be larger than the file is."""

    size: int
    values: int = 0
    seen: set[int] = field(default_factory=set)

    def module(self, value: Any, where: str, depth: int = 0) -> Module:
        """The module that a value of the pickle describes."""
        state = value.state if isinstance(value, _Object | _ModuleDict) else None
        if state is None or depth > MAX_DEPTH or len(self.seen) >= MAX_MODULES or id(value) in self.seen:
            raise WeightsError(
                f"{where} is {kind_of(value)} and no module, stands twice, or lies more than {MAX_DEPTH} deep or after "
                f"{MAX_MODULES} others"
            )
        self.seen.add(id(value))
        module = Module(value.class_name if isinstance(value, _Object) else "ModuleDict")
        if kind_of(state.get("_init_args", ())) != "tuple" or state.get("_init_args"):
            raise WeightsError(f"{where} was made with arguments without names, which are not read")
        module.init_kwargs = self.plain(_dictionary(state, "_init_kwargs", where), f"{where}._init_kwargs")
        public = {name: value for name, value in state.items() if not name.startswith("_")}
        module.attributes = self.plain(public, where)
        module.parameters = self.tensors(_dictionary(state, "_parameters", where), where)
        module.buffers = self.tensors(_dictionary(state, "_buffers", where), where)
        children = _dictionary(state, "_modules", where)
        module.modules = {n: self.module(v, f"{where}.{n}", depth + 1) for n, v in children.items() if v is not None}
        names = [*module.parameters, *module.buffers, *module.modules]
        if len(set(names)) < len(names) or not all(name and "." not in name for name in names):
            raise WeightsError(f"{where} has something without a name, or two things of one name")
        return module

    def tensors(self, entries: dict[str, Any], where: str) -> dict[str, np.ndarray]:
        """The tensors that exist; an absent one is stored as None and left out."""
        found = {name: value for name, value in entries.items() if value is not None}
        for name, value in found.items():
            if not isinstance(value, np.ndarray):
                raise WeightsError(f"{where}.{name} is {kind_of(value)}, not a tensor")
            self.size -= value.nbytes
            if self.size < 0:
                raise WeightsError(f"{where}.{name}: all tensors together are larger than the file")
        return found

    def plain(self, value: Any, where: str, depth: int = 0) -> Any:
        """A copy of numbers and text, in lists, tuples and dictionaries."""
        self.values += 1
        if value is None or type(value) in (bool, int, float) or (type(value) is str and len(value) <= MAX_TEXT):
            return value
        if depth < MAX_DEPTH and self.values <= MAX_VALUES:
            if type(value) is dict:
                return {name: self.plain(inner, f"{where}.{name}", depth + 1) for name, inner in value.items()}
            if type(value) in (list, tuple):
                return type(value)(self.plain(inner, where, depth + 1) for inner in value)
        raise WeightsError(
            f"{where} is {kind_of(value)}; read are numbers and texts of up to {MAX_TEXT} characters, {MAX_DEPTH} deep "
            f"and {MAX_VALUES} in all"
        )


def _dictionary(state: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    entries = state.get(name, {})
    if type(entries) is not dict:
        raise WeightsError(f"{where}.{name} is {kind_of(entries)}, not a dictionary")
    return entries


def _said(size: tuple[int, ...]) -> str:
    return str(size[:MAX_DIMENSIONS])[:200]
