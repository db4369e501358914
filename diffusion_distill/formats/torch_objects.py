"""What the pickle in a file of torch.save may hold, and what stands for it here.

Names are matched exactly, as pairs of module and name, and nothing is ever imported: a storage class becomes the dtype
of its elements, the functions that rebuild tensors and parameters become `Tensor`, an OrderedDict becomes a dictionary,
and every class below __torch__ (the modules of TorchScript) becomes `Script`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.errors import WeightsError
from diffusion_distill.formats import torch_pickle
from diffusion_distill.formats.pickle_stream import Buildable, Dialect, Global, Stateful, kind_of

STORAGES = {
    **torch_pickle.STORAGES,
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
MAX_NAME = 250  # characters of a tensor's name
SCRIPT = "__torch__"
TYPED_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


@dataclass(frozen=True)
class Storage:
    """A storage as persistent ids announce it, before its elements are reached."""

    dtype: np.dtype
    key: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """The elements [begin, begin + count) of a storage, which tensors count from; files before 2017 have such views."""

    storage: Storage
    begin: int
    count: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage, in elements."""

    part: Part
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Ordered(dict, Buildable):
    """An OrderedDict; its attributes (a state_dict has `_metadata`) are checked but not used."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        if type(state) is not dict:
            raise WeightsError(f"the attributes of an OrderedDict are {kind_of(state)}")


class Script(Stateful):
    """A module of TorchScript."""

    what = "a module"


@dataclass
class Storages:
    """The storages that the pickles of a file announce, by key, and the parts of them, by theirs."""

    whole: dict[str, Storage] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)

    def announced(self, identity: Any) -> Part:
        """What a persistent id describes: ("storage", class, key, location, count) with, in the legacy format, a sixth
        item, which is None or (key of the part, begin, count). The location, such as "cuda:0", does not matter."""
        given = list(identity) if type(identity) is tuple else []
        view = given.pop() if len(given) == 6 else None
        kinds = [str, Global, str, str, int]
        if list(map(type, given)) != kinds or given[0] != "storage" or given[1].name not in STORAGES or given[4] < 0:
            said = identity[:8] if type(identity) is tuple else (identity,)
            raise WeightsError(f"a persistent id of ({', '.join(map(kind_of, said))}), which is no storage's")
        storage = Storage(STORAGES[given[1].name], given[2], given[4])
        if self.whole.setdefault(storage.key, storage) != storage:
            raise WeightsError(f"the storage {kind_of(storage.key)} is announced twice, and differently")
        return Part(storage, 0, storage.count) if view is None else self.part(storage, view)

    def part(self, storage: Storage, view: Any) -> Part:
        if type(view) is not tuple or list(map(type, view)) != [str, int, int]:
            raise WeightsError(f"a part of a storage that is {kind_of(view)}, not (key, begin, count)")
        key, begin, count = view
        part = Part(storage, begin, count)
        if min(begin, count) < 0 or begin + count > storage.count or self.parts.setdefault(key, part) != part:
            raise WeightsError(
                f"the part {kind_of(key)} of {count} elements from element {begin} is not in its storage of "
                f"{storage.count} elements, or is announced twice, and differently"
            )
        return part


def dialect(storages: Storages) -> Dialect:
    """The pickles of a file; the storages that they announce are added to `storages`."""
    return Dialect(2, frozenset(OPCODES.split()), NAMES, storages.announced, MAX_NAME, whole_numbers_as_keys=True)


# ---------------------------------------------------------------- the replacements


class _Named(dict):
    """A table of names, and every class below __torch__."""

    def get(self, place: Any, default: Any = None) -> Any:
        module: str = place[0]
        if module == SCRIPT or module.startswith(f"{SCRIPT}."):
            return MODULE
        return super().get(place, default)


def _empty(kind: Callable[[], Any], arguments: tuple) -> Any:
    if arguments:
        raise WeightsError(f"a container made from {kind_of(arguments[0])}, where it should be empty")
    return kind()


def _tensor(arguments: tuple) -> Tensor:
    """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks); a seventh argument would say that the
    elements are to be negated or conjugated, which is not done here."""
    if [type(argument) for argument in arguments] != [Part, int, tuple, tuple, bool, Ordered]:
        raise WeightsError(f"a tensor of ({', '.join(map(kind_of, arguments[:8]))})")
    part, offset, size, stride = arguments[:4]
    if not all(type(n) is int for n in (*size, *stride)):
        raise WeightsError("a tensor whose size or strides are not whole numbers")
    return Tensor(part, offset, size, stride)


def _parameter(arguments: tuple) -> Tensor:
    """_rebuild_parameter(tensor, requires_grad, hooks)"""
    if [type(argument) for argument in arguments] != [Tensor, bool, Ordered]:
        raise WeightsError(f"a parameter of ({', '.join(map(kind_of, arguments[:8]))})")
    return arguments[0]


def _wrapped(arguments: tuple) -> Any:
    """A list that TorchScript gives a type."""
    if not arguments:
        raise WeightsError("a list that is not there")
    return arguments[0]


MODULE = Global("a module", new=partial(_empty, Script))
OPCODES = (
    "PROTO STOP MARK BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL "
    "REDUCE NEWOBJ BUILD BINPERSID"
)
NAMES = _Named(
    {
        ("collections", "OrderedDict"): Global("OrderedDict", partial(_empty, Ordered)),
        ("torch._utils", "_rebuild_tensor_v2"): Global("_rebuild_tensor_v2", _tensor),
        ("torch._utils", "_rebuild_parameter"): Global("_rebuild_parameter", _parameter),
        **{("torch", name): Global(name) for name in STORAGES},
        **{("torch.jit._pickle", name): Global(name, _wrapped) for name in TYPED_LISTS},
    }
)
