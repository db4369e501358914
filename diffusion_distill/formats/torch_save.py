"""Reads files of torch.save and torch.jit.save as names and arrays; nothing in a file is executed.

Three formats, told apart by their first bytes:

    legacy        pickles of protocol 2 one after another: a magic number, 1001, {protocol_version, little_endian,
                  type_sizes}, the object, [keys of its storages]; then for each key its count as int64 and its elements
    zip           stored, not compressed: NAME/data.pkl, the object, and NAME/data/KEY, the elements of a storage
    TorchScript   such a zip with program text in NAME/code/, which is never used; the object is a tree of modules,
                  each a class below __torch__ with its attributes

In the pickles a storage is the persistent id ("storage", class, key, location, count), and a tensor the call of
_rebuild_tensor_v2(storage, offset, size, stride, ...), in elements. The object may be a dictionary of tensors, such as
a state_dict, or a tree of modules, whose tensors are named by their paths ("layers.conv.weight"). Arrays are read-only
views of the memory-mapped file, which must not be changed while they are in use.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_distill.base.errors import WeightsError
from diffusion_distill.base.files import stand_in, user_path
from diffusion_distill.formats import pickle_stream, torch_pickle
from diffusion_distill.formats.pickle_stream import Buildable, Dialect, Global, Source, kind_of

Arrays = dict[str, np.ndarray]

LEGACY = b"\x80\x02\x8a\x0a"  # protocol 2 and a whole number of ten bytes
ZIP = b"PK\x03\x04"
STORAGES = {**torch_pickle.STORAGES, "LongStorage": np.dtype("<i8")}
MAX_ENTRIES = 2**13  # of an archive; the network of FID has a thousand
MAX_DIRECTORY = 2**22  # bytes of an archive's list of entries
MAX_TENSORS = 2**13
MAX_DEPTH = 16  # of modules, which may stand in several places
MAX_MODULES = 2**13
SCRIPT = "__torch__"
TYPED_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


def is_torch(content: bytes) -> bool:
    """Whether a file with these first bytes is of one of these formats."""
    return content.startswith((LEGACY, ZIP))


def read(path: str | Path) -> Arrays:
    """The tensors of a file by name, in its order.

    Raises:
      WeightsError: the file is damaged, exceeds a limit, or has unexpected contents; the message says what and where.
      OSError: it cannot be opened.
    """
    path = user_path(path)
    with open(path, "rb") as file:
        size = path.stat().st_size
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    try:
        if content[: len(ZIP)] == ZIP:
            return _read_zip(path, content)
        if content[: len(LEGACY)] == LEGACY:
            return _read_legacy(content)
        raise WeightsError(f"it is {stand_in(bytes(content[:200])) or 'begun as neither of their formats is'}")
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be read as a file of PyTorch: {error}.") from error


# ---------------------------------------------------------------- the formats


def _read_legacy(content: memoryview) -> Arrays:
    source, at, found = Source(content), 0, []
    for _ in range(5):
        value, at = pickle_stream.load(source, DIALECT, at, len(content))
        found.append(value)
    magic, protocol, system, tree, keys = found
    if (magic, protocol) != (torch_pickle.MAGIC, torch_pickle.PROTOCOL) or system != torch_pickle.SYSTEM:
        raise WeightsError(f"another format than number {torch_pickle.PROTOCOL}, little-endian")
    tensors = _tensors(tree)
    announced = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    if any(tensor.storage != announced[tensor.storage.key] for tensor in tensors.values()):
        raise WeightsError("a storage is announced twice, and differently")
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(announced):
        raise WeightsError("the storages that follow are not those that the tensors name")
    storages: Arrays = {}
    for key in keys:
        begin, size = at + 8, announced[key].nbytes
        count = struct.unpack_from("<q", content, at)[0] if len(content) >= begin else -1
        if count != announced[key].count or len(content) - begin < size:
            raise WeightsError(f"storage {key} of {announced[key].count} elements is not at byte {at}, or not whole")
        storages[key] = np.frombuffer(content, announced[key].dtype, count, begin)
        at = begin + size
    if at != len(content):
        raise WeightsError(f"{len(content) - at} bytes follow the last storage")
    return _arrays(tensors, lambda storage: storages[storage.key], len(content))


def _read_zip(path: Path, content: memoryview) -> Arrays:
    entries = _entries(path, content)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"the archive has {len(pickles)} entries NAME/data.pkl instead of one")
    folder = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{folder}byteorder")
    if order is not None and bytes(content[order.begin : min(order.end, order.begin + 9)]) != b"little":
        raise WeightsError("the archive's byte order is not little-endian")
    main = entries[pickles[0]]
    _check_sum(content, pickles[0], main)
    tree, end = pickle_stream.load(Source(content), DIALECT, main.begin, main.end)
    if end != main.end:
        raise WeightsError(f"{main.end - end} bytes follow the end of the pickle")

    checked: dict[_Storage, np.ndarray] = {}

    def elements(storage: _Storage) -> np.ndarray:
        if storage not in checked:
            name = f"{folder}data/{storage.key}"
            entry = entries.get(name)
            if entry is None or entry.end - entry.begin != storage.nbytes:
                raise WeightsError(f"there is no entry {kind_of(name)} of {storage.nbytes} bytes")
            _check_sum(content, name, entry)
            checked[storage] = np.frombuffer(content, storage.dtype, storage.count, entry.begin)
        return checked[storage]

    return _arrays(_tensors(tree), elements, len(content))


class _Entry(NamedTuple):
    """Where an entry's header and bytes lie in the file, and their CRC-32."""

    header: int
    begin: int
    end: int
    crc: int


def _entries(path: Path, content: memoryview) -> dict[str, _Entry]:
    """All entries of an archive by name; no two share bytes, so that reading all of them reads the file once."""
    if _directory_size(content) > MAX_DIRECTORY:  # before zipfile reads it
        raise WeightsError(f"the archive's list of entries is longer than {MAX_DIRECTORY} bytes")
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, ValueError, ArithmeticError, NotImplementedError, OSError, struct.error) as error:
        raise WeightsError(f"the archive is damaged: {error}") from error
    if len(listed) > MAX_ENTRIES:
        raise WeightsError(f"the archive has more than {MAX_ENTRIES} entries")
    found: dict[str, _Entry] = {}
    for entry in listed:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise WeightsError(
                f"the entry {kind_of(entry.filename)} is compressed or encrypted, which PyTorch's are not"
            )
        if entry.filename in found:
            raise WeightsError(f"the entry {kind_of(entry.filename)} stands twice")
        found[entry.filename] = _place(content, entry)
    places = sorted((place.header, place.end, name) for name, place in found.items())
    for (_, end, first), (header, _, second) in pairwise(places):
        if header < end:
            raise WeightsError(f"the entries {kind_of(first)} and {kind_of(second)} share bytes")
    return found


def _directory_size(content: memoryview) -> int:
    """Bytes of an archive's central directory, as its end record and that of ZIP64 say; 0 without an end record."""
    tail = bytes(content[-(22 + 2**16) :])
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + 22 > len(tail):
        return 0
    size = struct.unpack_from("<I", tail, at + 12)[0]
    if at >= 76 and tail[at - 20 : at - 16] == b"PK\6\7" and tail[at - 76 : at - 72] == b"PK\6\6":
        size = struct.unpack_from("<Q", tail, at - 36)[0]
    return size


def _place(content: memoryview, entry: zipfile.ZipInfo) -> _Entry:
    """Where an entry's bytes begin, computed from the entry's own header."""
    header = entry.header_offset
    if not 0 <= header <= len(content) - 30 or content[header : header + 4] != ZIP:
        raise WeightsError(f"the entry {kind_of(entry.filename)} is not where the archive says")
    begin = header + 30 + sum(struct.unpack_from("<HH", content, header + 26))
    if begin + entry.file_size > len(content):
        raise WeightsError(f"the entry {kind_of(entry.filename)} reaches beyond the end of the file")
    return _Entry(header, begin, begin + entry.file_size, entry.CRC)


def _check_sum(content: memoryview, name: str, entry: _Entry) -> None:
    if zlib.crc32(content[entry.begin : entry.end]) != entry.crc:
        raise WeightsError(f"the entry {kind_of(name)} is damaged: its checksum differs")


# ---------------------------------------------------------------- what the pickles may name


@dataclass(frozen=True)
class _Storage:
    """A storage as a persistent id announces it."""

    dtype: np.dtype
    key: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class _Tensor:
    """A tensor before its elements are reached."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Ordered(dict, Buildable):
    """An OrderedDict; its attributes (a state_dict has `_metadata`) are checked but not used."""

    def build(self, state: Any) -> None:
        if type(state) is not dict:
            raise WeightsError(f"the attributes of an OrderedDict are {kind_of(state)}")


class _Script(Buildable):
    """A module of TorchScript."""

    state: dict[str, Any] | None = None

    def build(self, state: Any) -> None:
        if self.state is not None or type(state) is not dict:
            raise WeightsError(f"the state of a module that is {kind_of(state)} or stands twice")
        self.state = state


class _Named(dict):
    """The names that a pickle may use: those of a table, and every class below __torch__, which is read as a module."""

    def get(self, place: Any, default: Any = None) -> Any:
        module, name = place
        if module == SCRIPT or module.startswith(f"{SCRIPT}."):
            return Global(name, new=partial(_empty, _Script))
        return super().get(place, default)


def _empty(kind: Callable[[], Any], arguments: tuple) -> Any:
    if arguments:
        raise WeightsError(f"a container made from {kind_of(arguments[0])}, where it should be empty")
    return kind()


STORAGE_ID = [str, Global, str, str, int]


def _storage(identity: Any) -> _Storage:
    """The storage that a persistent id describes; a sixth item must say that it is not part of another storage."""
    given = list(identity) if type(identity) is tuple else []
    if list(map(type, given)) in (STORAGE_ID, [*STORAGE_ID, type(None)]):
        what, kind, key, _, count, *_ = given
        if what == "storage" and kind.name in STORAGES and count > 0:
            return _Storage(STORAGES[kind.name], key, count)
    raise WeightsError(f"a persistent id of ({', '.join(map(kind_of, given[:8]))}), which is no storage's")


def _tensor(arguments: tuple) -> _Tensor:
    if tuple(map(type, arguments[:4])) != (_Storage, int, tuple, tuple):
        raise WeightsError(f"a tensor of ({', '.join(map(kind_of, arguments[:8]))})")
    storage, offset, size, stride = arguments[:4]
    if not all(type(n) is int for n in (*size, *stride)):
        raise WeightsError("a tensor whose size or strides are not whole numbers")
    return _Tensor(storage, offset, size, stride)


def _wrapped(arguments: tuple) -> Any:
    """A list that TorchScript gives a type."""
    if not arguments:
        raise WeightsError("a list that is not there")
    return arguments[0]


def _parameter(arguments: tuple) -> _Tensor:
    if not arguments or not isinstance(arguments[0], _Tensor):
        raise WeightsError("a parameter that is no tensor")
    return arguments[0]


OPCODES = (
    "PROTO STOP MARK BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL "
    "REDUCE NEWOBJ BUILD BINPERSID"
)
DIALECT = Dialect(
    2,
    frozenset(OPCODES.split()),
    _Named(
        {
            ("collections", "OrderedDict"): Global("OrderedDict", partial(_empty, _Ordered)),
            ("torch._utils", "_rebuild_tensor_v2"): Global("_rebuild_tensor_v2", _tensor),
            ("torch._utils", "_rebuild_parameter"): Global("_rebuild_parameter", _parameter),
            **{("torch", name): Global(name) for name in STORAGES},
            **{("torch.jit._pickle", name): Global(name, _wrapped) for name in TYPED_LISTS},
        }
    ),
    _storage,
)


# ---------------------------------------------------------------- from the object to arrays


def _tensors(tree: Any) -> dict[str, _Tensor]:
    """The tensors of a state_dict, or of a tree of modules, by name."""
    found: dict[str, _Tensor] = {}
    if isinstance(tree, _Script):
        _walk(tree, "", 0, found, [])
    elif isinstance(tree, dict):
        for name, value in tree.items():
            if not isinstance(value, _Tensor):
                raise WeightsError(
                    f"{kind_of(name)} is {kind_of(value)}, not a tensor; read are dictionaries of tensors"
                )
            found[name] = value
    else:
        raise WeightsError(f"the file holds {kind_of(tree)}; read are dictionaries of tensors and trees of modules")
    if not 0 < len(found) <= MAX_TENSORS:
        raise WeightsError(f"there are {len(found)} tensors; read are 1 to {MAX_TENSORS}")
    return found


def _walk(module: _Script, above: str, depth: int, found: dict[str, _Tensor], seen: list[_Script]) -> None:
    """The tensors of a module and of its submodules; other attributes, such as numbers and text, are not weights."""
    if depth > MAX_DEPTH or len(seen) >= MAX_MODULES or len(found) > MAX_TENSORS or module.state is None:
        raise WeightsError(
            f"the module {kind_of(above)} is empty, or lies more than {MAX_DEPTH} deep or after {MAX_MODULES} others"
        )
    seen.append(module)
    for name, value in module.state.items():
        if isinstance(value, _Tensor | _Script) and (not name or "." in name):
            raise WeightsError(f"the module {kind_of(above)} has a part called {kind_of(name)}")
        if isinstance(value, _Tensor):
            found[above + name] = value
        elif isinstance(value, _Script):
            _walk(value, f"{above}{name}.", depth + 1, found, seen)


def _arrays(tensors: Mapping[str, _Tensor], elements: Callable[[_Storage], np.ndarray], size: int) -> Arrays:
    """Tensors as views; together they may not be larger than the file is."""
    found: Arrays = {}
    for name, tensor in tensors.items():
        try:
            found[name] = torch_pickle.as_tensor(elements(tensor.storage), tensor.offset, tensor.size, tensor.stride)
        except WeightsError as error:
            raise WeightsError(f"{kind_of(name)}: {error}") from error
        size -= found[name].nbytes
        if size < 0:
            raise WeightsError(f"{kind_of(name)}: all tensors together are larger than the file")
    return found
