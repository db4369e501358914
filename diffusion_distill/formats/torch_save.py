"""Reads files of torch.save and torch.jit.save as plain values and arrays; nothing in a file is executed.

Three formats, told apart by their first bytes:

    legacy        pickles of protocol 2 one after another: a magic number, 1001, {protocol_version, little_endian,
                  type_sizes}, the object, [keys of its storages]; then for each key its count as int64 and its elements
    zip           stored, not compressed: NAME/data.pkl, the object, and NAME/data/KEY, the elements of a storage
    TorchScript   such a zip with program text in NAME/code/, which is never used and may be compressed; the object is
                  a tree of modules, each a class below __torch__ with its attributes

In the pickles a storage is the persistent id ("storage", class, key, location, count), and a tensor the call of
_rebuild_tensor_v2(storage, offset, size, stride, ...), in elements; `torch_objects` has all that they may hold. Arrays
are read-only views of the memory-mapped file, which must not be changed while they are in use.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_distill.base.errors import WeightsError
from diffusion_distill.base.files import stand_in, user_path
from diffusion_distill.base.zip_end import directory_size
from diffusion_distill.formats import pickle_stream, torch_pickle
from diffusion_distill.formats.mapped import elements, mapped
from diffusion_distill.formats.pickle_stream import Source, kind_of
from diffusion_distill.formats.torch_objects import Script, Storage, Storages, Tensor, dialect

Arrays = dict[str, np.ndarray]
#: A storage -> its elements.
Elements = Callable[[Storage], np.ndarray]

LEGACY = b"\x80\x02\x8a\x0a"  # protocol 2 and a whole number of ten bytes
ZIP = b"PK\x03\x04"
MAX_ENTRIES = 2**14  # of an archive: with its optimizer, a network of a thousand tensors has four thousand
MAX_DIRECTORY = 2**22  # bytes of an archive's list of entries
MAX_TENSORS = 2**14
MAX_VALUES = 2**17  # numbers, texts, tensors and containers in an object, each counted where it stands
MAX_DEPTH = 16  # of modules, lists and dictionaries, which may stand in several places
MAX_MODULES = 2**13
MAX_REPEATED = 2**24  # elements of a tensor that repeats those of its storage
MAX_SHARED = 2**20  # bytes that all tensors may have beyond twice the file's, because they share or repeat elements


def is_torch(content: bytes) -> bool:
    """Whether a file with these first bytes is of one of these formats."""
    return content.startswith((LEGACY, ZIP))


def read(path: str | Path) -> Arrays:
    """The tensors of a file by name, in its order.

    The object must be a dictionary of tensors, such as a state_dict, or a tree of modules, whose tensors are named by
    their paths ("layers.conv.weight").

    Raises:
      WeightsError: as `read_object`; or the file holds something else.
      OSError: it cannot be opened.
    """
    found = read_object(path)
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: the file holds {kind_of(found)}; read are dictionaries of tensors and modules.")
    for name, value in found.items():
        if not isinstance(value, np.ndarray):
            raise WeightsError(
                f"{path}: {kind_of(name)} is {kind_of(value)}, not a tensor; read are dictionaries of tensors."
            )
    if not found:
        raise WeightsError(f"{path}: there are 0 tensors; at least one is needed.")
    return found


def read_object(path: str | Path) -> Any:
    """The object that was saved, as plain values.

    Returns:
      An array, a number, text, a truth value or None; or lists, tuples and dictionaries of these, whose keys are text
      or whole numbers. An OrderedDict is a dictionary, a parameter is its tensor. A tree of modules is the dictionary
      of its tensors by their paths.

    Raises:
      WeightsError: the file is damaged, exceeds a limit, or has unexpected contents; the message says what and where.
      OSError: it cannot be opened.
    """
    path = user_path(path)
    content = mapped(path)
    try:
        if content[: len(ZIP)] == ZIP:
            return _read_zip(path, content)
        if content[: len(LEGACY)] == LEGACY:
            return _read_legacy(content)
        raise WeightsError(f"it is {stand_in(bytes(content[:200])) or 'begun as neither of their formats is'}")
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be read as a file of PyTorch: {error}.") from error


# ---------------------------------------------------------------- the formats


def _read_legacy(content: memoryview) -> Any:
    source, storages, at, found = Source(content), Storages(), 0, []
    pickles = dialect(storages)
    for _ in range(5):
        value, at = pickle_stream.load(source, pickles, at, len(content))
        found.append(value)
    magic, protocol, system, tree, keys = found
    if (magic, protocol) != (torch_pickle.MAGIC, torch_pickle.PROTOCOL) or system != torch_pickle.SYSTEM:
        raise WeightsError(f"another format than number {torch_pickle.PROTOCOL}, little-endian")
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages.whole):
        raise WeightsError("the storages that follow are not those that the tensors name")
    arrays: Arrays = {}
    for key in keys:
        storage, begin = storages.whole[key], at + 8
        count = struct.unpack_from("<q", content, at)[0] if len(content) >= begin else -1
        if count != storage.count or len(content) - begin < storage.nbytes:
            raise WeightsError(f"storage {key} of {storage.count} elements is not at byte {at}, or not whole")
        arrays[key] = elements(content, storage.dtype, count, begin)
        at = begin + storage.nbytes
    if at != len(content):
        raise WeightsError(f"{len(content) - at} bytes follow the last storage")
    return _Plain(lambda storage: arrays[storage.key], len(content)).object(tree)


def _read_zip(path: Path, content: memoryview) -> Any:
    entries = _entries(path, content)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"the archive has {len(pickles)} entries NAME/data.pkl instead of one")
    folder = pickles[0].removesuffix("data.pkl")
    order = entries.get(name := f"{folder}byteorder")
    if order is not None and bytes(_checked(content, name, order)[:9]) != b"little":
        raise WeightsError("the archive's byte order is not little-endian")
    main = entries[pickles[0]]
    _checked(content, pickles[0], main)
    tree, end = pickle_stream.load(Source(content), dialect(Storages()), main.begin, main.end)
    if end != main.end:
        raise WeightsError(f"{main.end - end} bytes follow the end of the pickle")

    checked: dict[Storage, np.ndarray] = {}

    def stored(storage: Storage) -> np.ndarray:
        if storage not in checked:
            name = f"{folder}data/{storage.key}"
            entry = None if "/" in storage.key else entries.get(name)
            if entry is None or (entry.plain and entry.end - entry.begin != storage.nbytes):
                raise WeightsError(f"there is no entry {kind_of(name)} of {storage.nbytes} bytes")
            _checked(content, name, entry)
            checked[storage] = elements(content, storage.dtype, storage.count, entry.begin)
        return checked[storage]

    return _Plain(stored, len(content)).object(tree)


class _Entry(NamedTuple):
    """Where an entry's header and bytes lie, their CRC-32, and whether they are neither compressed nor encrypted."""

    header: int
    begin: int
    end: int
    crc: int
    plain: bool


def _entries(path: Path, content: memoryview) -> dict[str, _Entry]:
    """All entries of an archive by name; no two share bytes, so that reading all of them reads the file once."""
    with open(path, "rb") as file:
        if directory_size(file, len(content)) > MAX_DIRECTORY:  # before zipfile reads it
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
        if entry.filename in found:
            raise WeightsError(f"the entry {kind_of(entry.filename)} stands twice")
        found[entry.filename] = _place(content, entry)
    places = sorted((place.header, place.end, name) for name, place in found.items())
    for (_, end, first), (header, _, second) in pairwise(places):
        if header < end:
            raise WeightsError(f"the entries {kind_of(first)} and {kind_of(second)} share bytes")
    return found


def _place(content: memoryview, entry: zipfile.ZipInfo) -> _Entry:
    """Where an entry's bytes begin, computed from the entry's own header."""
    header = entry.header_offset
    if not 0 <= header <= len(content) - 30 or content[header : header + 4] != ZIP:
        raise WeightsError(f"the entry {kind_of(entry.filename)} is not where the archive says")
    begin = header + 30 + sum(struct.unpack_from("<HH", content, header + 26))
    if begin + entry.compress_size > len(content):
        raise WeightsError(f"the entry {kind_of(entry.filename)} reaches beyond the end of the file")
    plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
    return _Entry(header, begin, begin + entry.compress_size, entry.CRC, plain)


def _checked(content: memoryview, name: str, entry: _Entry) -> memoryview:
    """The bytes of an entry, which must be neither compressed nor damaged."""
    if not entry.plain:
        raise WeightsError(f"the entry {kind_of(name)} is compressed or encrypted, which PyTorch's are not")
    if zlib.crc32(found := content[entry.begin : entry.end]) != entry.crc:
        raise WeightsError(f"the entry {kind_of(name)} is damaged: its checksum differs")
    return found


# ---------------------------------------------------------------- from the pickle's values to plain ones


@dataclass
class _Plain:
    """A walk over the object in a file, whose values may be shared or contain themselves.

    Attributes:
      elements: gives the elements of a storage, and checks them.
      size: bytes of the file.
      values, tensors, modules, claimed: what was met so far; the last is the bytes of all tensors.
    """

    elements: Elements
    size: int
    values: int = 0
    tensors: int = 0
    modules: int = 0
    claimed: int = 0

    def object(self, tree: Any) -> Any:
        """The whole object."""
        if not isinstance(tree, Script):
            return self.value(tree, "", 0)
        found: Arrays = {}
        self.module(tree, "", 0, found)
        return found

    def value(self, value: Any, where: str, depth: int) -> Any:
        """A value and everything in it; `where` is its name in the dictionary around it."""
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            raise WeightsError(f"there are more than {MAX_VALUES} values, or some lie more than {MAX_DEPTH} deep")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            return self.array(value, where)
        if isinstance(value, dict):
            return {name: self.value(inner, str(name), depth + 1) for name, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.value(inner, where, depth + 1) for inner in value)
        raise WeightsError(f"{kind_of(where)} is {kind_of(value)}; read are tensors, numbers, text and containers")

    def module(self, module: Script, above: str, depth: int, found: Arrays) -> None:
        """The tensors of a module and of its submodules; other attributes, numbers and text, are not weights."""
        self.modules += 1
        if depth > MAX_DEPTH or self.modules > MAX_MODULES or module.state is None:
            raise WeightsError(
                f"the module {kind_of(above)} is empty, or lies more than {MAX_DEPTH} deep or after {MAX_MODULES} "
                "others"
            )
        for name, value in module.state.items():
            if isinstance(value, Tensor | Script) and (not name or "." in str(name)):
                raise WeightsError(f"the module {kind_of(above)} has a part called {kind_of(name)}")
            if isinstance(value, Tensor):
                found[f"{above}{name}"] = self.array(value, f"{above}{name}")
            elif isinstance(value, Script):
                self.module(value, f"{above}{name}.", depth + 1, found)

    def array(self, tensor: Tensor, where: str) -> np.ndarray:
        """A tensor as a view; together they may not be much larger than the file is."""
        self.tensors += 1
        if self.tensors > MAX_TENSORS:
            raise WeightsError(f"there are more than {MAX_TENSORS} tensors")
        part = tensor.part
        try:
            storage = self.elements(part.storage)[part.begin : part.begin + part.count]
            found = torch_pickle.as_tensor(storage, tensor.offset, tensor.size, tensor.stride, MAX_REPEATED)
        except WeightsError as error:
            raise WeightsError(f"{kind_of(where)}: {error}") from error
        self.claimed += found.nbytes
        if self.claimed > 2 * self.size + MAX_SHARED:
            raise WeightsError(f"{kind_of(where)}: all tensors together are larger than the file, even twice")
        return found
