"""Reads a pickle opcode by opcode without executing anything in it.

A pickle is a program for a stack machine (Python's pickletools has its opcodes). Here each opcode makes plain
values only: None, booleans, numbers, text, `Bytes`, tuples, lists, dictionaries, sets. The names that STACK_GLOBAL or
GLOBAL may use are a table of (module, name), matched exactly; functions of ours take their place, and nothing is ever
imported or looked up. Anything that is not in the `Dialect` is refused, and so is a length that reaches beyond the end
of the stream. Bytes are not copied, and work and memory are bounded by the limits below.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusion_distill.base.errors import WeightsError

MAX_OPERATIONS = 2**20  # of one file, streams in streams included; a large network takes 60 thousand
MAX_STACK = 2**14  # items; a pickler writes at most 1000 pairs at once
MAX_TEXT = 2**24  # bytes of all text of one file
MAX_SETS = 2**14  # of one file: an empty one takes some 200 bytes of memory for one in the file
MAX_INTEGER = 10  # bytes of a LONG1
MAX_NAME = 100  # characters in what GLOBAL spells out, and, unless the dialect says more, of a name in a dictionary
MAX_KEY = 2**31  # of whole numbers as keys; larger ones could be chosen to have equal hashes


@dataclass(frozen=True)
class Bytes:
    """A range of bytes in a file, not copied."""

    begin: int
    end: int


@dataclass(frozen=True)
class Global:
    """The replacement for something that a stream names.

    Attributes:
      name: as in the stream.
      reduce: called with the arguments of REDUCE.
      new: called with the arguments of NEWOBJ.
    """

    name: str
    reduce: Callable[[tuple], Any] | None = None
    new: Callable[[tuple], Any] | None = None


class Buildable:
    """A value whose state BUILD sets, once."""

    def build(self, state: Any) -> None:
        """Takes the state or raises WeightsError."""
        raise NotImplementedError


class Stateful(Buildable):
    """An object whose state is a dictionary; `what` is its name in messages."""

    what = "an object"
    state: dict[str, Any] | None = None

    def build(self, state: Any) -> None:
        if self.state is not None or type(state) is not dict:
            raise WeightsError(f"the state of {self.what} that is {kind_of(state)} or stands twice")
        self.state = state


@dataclass(frozen=True)
class Dialect:
    """The contents that a stream may have.

    Attributes:
      protocol: the only one allowed.
      opcodes: names in `OPERATIONS`.
      globals: the names it may use, and their replacements.
      persistent: turns the argument of BINPERSID into a value.
      max_name: characters of a name in a dictionary.
      whole_numbers_as_keys: whether keys of dictionaries may be whole numbers from 0 to `MAX_KEY`, and not only text.
    """

    protocol: int
    opcodes: frozenset[str]
    globals: Mapping[tuple[str, str], Global] = field(default_factory=dict)
    persistent: Callable[[Any], Any] | None = None
    max_name: int = MAX_NAME
    whole_numbers_as_keys: bool = False


@dataclass
class Source:
    """The bytes of a file, and how much of the limits is used up."""

    content: memoryview
    operations: int = 0
    text: int = 0
    sets: int = 0


def load(source: Source, dialect: Dialect, begin: int, end: int) -> tuple[Any, int]:
    """The value of the stream that begins at a byte of a file.

    Args:
      end: the stream must stop before this byte.

    Returns:
      (value, the byte after the stream). A value may be shared or contain itself: walk it with limits.

    Raises:
      WeightsError: the stream is damaged, exceeds a limit or is not of the dialect; the message says at which byte.
    """
    machine = _Machine(source, dialect, begin, end)
    try:
        return machine.run(), machine.at
    except (WeightsError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise WeightsError(f"{machine.doing} at byte {machine.begin}: {error}") from error


def kind_of(value: Any) -> str:
    """A short name for a value of any size, for error messages."""
    if isinstance(value, str | int | float | None):
        return f"{str(value)[:40]!r}" if isinstance(value, str) else str(value)[:40]
    return type(value).__name__


class _Machine:
    """The stack, the marks on it and the memo; `begin` is the byte of the operation it is `doing`."""

    def __init__(self, source: Source, dialect: Dialect, begin: int, end: int) -> None:
        self.source, self.dialect = source, dialect
        self.begin = self.at = begin
        self.end = end
        self.doing = "the first opcode"
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            self.begin = self.at
            self.source.operations += 1
            if self.source.operations > MAX_OPERATIONS:
                raise WeightsError(f"more than {MAX_OPERATIONS} operations")
            if len(self.stack) > MAX_STACK:
                raise WeightsError(f"more than {MAX_STACK} items on the stack")
            name, operation = OPERATIONS.get(code := self.number("<B"), (f"opcode {code:#04x}", None))
            self.doing = name
            if operation is None or name not in self.dialect.opcodes:
                raise WeightsError("this does not occur in such a file, and is not followed")
            if name == "STOP":
                value = self.pop()
                if self.stack or self.marks:
                    raise WeightsError("something is left on the stack")
                return value
            operation(self)

    # ------------------------------------------------------------ bytes

    def skip(self, length: int) -> int:
        """Passes a number of bytes; returns where they begin."""
        begin = self.at
        if not 0 <= length <= self.end - begin:
            raise WeightsError(f"{length} bytes are needed, but only {self.end - begin} are left")
        self.at += length
        return begin

    def number(self, form: str) -> Any:
        """A number of one of the forms of `struct`."""
        begin = self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.source.content, begin)[0]

    def string(self, length: int) -> str:
        """Text of so many bytes."""
        begin = self.skip(length)
        self.source.text += length
        if self.source.text > MAX_TEXT:
            raise WeightsError(f"more than {MAX_TEXT} bytes of text")
        return str(self.source.content[begin : self.at], "utf-8")

    def line(self) -> str:
        """Text up to a newline."""
        ahead = bytes(self.source.content[self.at : min(self.end, self.at + MAX_NAME)])
        if b"\n" not in ahead:
            raise WeightsError(f"a name of more than {MAX_NAME} bytes, or the end of the stream")
        text = self.string(ahead.index(b"\n"))
        self.skip(1)
        return text

    # ------------------------------------------------------------ the stack

    def pop(self) -> Any:
        self.need(1)
        return self.stack.pop()

    def need(self, items: int) -> None:
        """Raises WeightsError unless this many items lie above the last mark."""
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < items:
            raise WeightsError("the stack is empty")

    def above_mark(self) -> list[Any]:
        if not self.marks:
            raise WeightsError("there is no mark")
        begin = self.marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def top(self, kind: type) -> Any:
        """The item that an operation changes."""
        self.need(1)
        if not isinstance(self.stack[-1], kind):
            raise WeightsError(f"a {kind.__name__} is needed, not {kind_of(self.stack[-1])}")
        return self.stack[-1]

    # ------------------------------------------------------------ operations

    def proto(self) -> None:
        if (protocol := self.number("<B")) != self.dialect.protocol:
            raise WeightsError(f"protocol {protocol}; only {self.dialect.protocol} is read")

    def frame(self) -> None:
        length = self.number("<Q")
        if length > self.end - self.at:
            raise WeightsError(f"{length} bytes are announced, but only {self.end - self.at} are left")

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def integer(self) -> None:
        length = self.number("<B")
        if length > MAX_INTEGER:
            raise WeightsError(f"an integer of {length} bytes; at most {MAX_INTEGER} are read")
        begin = self.skip(length)
        self.stack.append(int.from_bytes(self.source.content[begin : self.at], "little", signed=True))

    def get(self, form: str) -> None:
        index = self.number(form)
        if index not in self.memo:
            raise WeightsError(f"the memo has no entry {index}")
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        self.need(1)
        self.memo[index] = self.stack[-1]

    def tuple(self, length: int) -> None:
        self.need(length)
        items = self.stack[len(self.stack) - length :]
        del self.stack[len(self.stack) - length :]
        self.stack.append(tuple(items))

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def update(self, items: list[Any]) -> None:
        entries = self.top(dict)
        if len(items) % 2:
            raise WeightsError("a name without a value")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not self.is_key(name) or name in entries:
                raise WeightsError(f"a name that stands twice, is no text or a very long one: {kind_of(name)}")
            entries[name] = value

    def is_key(self, value: Any) -> bool:
        """Whether a dictionary may have it as a key."""
        if type(value) is int:
            return self.dialect.whole_numbers_as_keys and 0 <= value < MAX_KEY
        return type(value) is str and len(value) <= self.dialect.max_name

    def empty_set(self) -> None:
        self.source.sets += 1
        if self.source.sets > MAX_SETS:
            raise WeightsError(f"more than {MAX_SETS} sets")
        self.stack.append(set())

    def add(self, items: list[Any]) -> None:
        if not all(type(item) is str for item in items):
            raise WeightsError("a set of something else than text")
        self.top(set).update(items)

    def find(self, module: Any, name: Any) -> None:
        place = (module, name)
        found = self.dialect.globals.get(place) if type(module) is type(name) is str else None
        if found is None:
            raise WeightsError(
                f"{kind_of(module)}, {kind_of(name)} is not among what such a file may name, and nothing of it is run"
            )
        self.stack.append(found)

    def reduce(self) -> None:
        function, arguments = self.call()
        if function.reduce is None:
            raise WeightsError(f"{function.name} is not called like this")
        self.stack.append(function.reduce(arguments))

    def new(self) -> None:
        function, arguments = self.call()
        if function.new is None:
            raise WeightsError(f"{function.name} is not made like this")
        self.stack.append(function.new(arguments))

    def call(self) -> tuple[Global, tuple]:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise WeightsError(f"{kind_of(function)} with {kind_of(arguments)} is no call")
        return function, arguments

    def build(self) -> None:
        state = self.pop()
        self.top(Buildable).build(state)

    def persistent(self) -> None:
        if self.dialect.persistent is None:
            raise WeightsError("there are no persistent objects here")
        self.stack.append(self.dialect.persistent(self.pop()))


Operation = Callable[[_Machine], None]


def _value(make: Callable[[_Machine], Any]) -> Operation:
    return lambda machine: machine.stack.append(make(machine))


def _number(form: str) -> Operation:
    return _value(lambda machine: machine.number(form))


def _text(form: str) -> Operation:
    return _value(lambda machine: machine.string(machine.number(form)))


def _bytes(form: str) -> Operation:
    return _value(lambda machine: Bytes(machine.skip(machine.number(form)), machine.at))


def _find(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.find(module, name)


def _pair(machine: _Machine) -> None:
    value, name = machine.pop(), machine.pop()
    machine.update([name, value])


#: code -> (name, what it does); what is not here is never followed.
OPERATIONS: dict[int, tuple[str, Operation]] = {
    0x80: ("PROTO", _Machine.proto),
    0x95: ("FRAME", _Machine.frame),
    ord("."): ("STOP", lambda machine: None),
    ord("("): ("MARK", _Machine.mark),
    0x94: ("MEMOIZE", lambda machine: machine.put(len(machine.memo))),
    ord("q"): ("BINPUT", lambda machine: machine.put(machine.number("<B"))),
    ord("r"): ("LONG_BINPUT", lambda machine: machine.put(machine.number("<I"))),
    ord("h"): ("BINGET", lambda machine: machine.get("<B")),
    ord("j"): ("LONG_BINGET", lambda machine: machine.get("<I")),
    ord("N"): ("NONE", _value(lambda machine: None)),
    0x88: ("NEWTRUE", _value(lambda machine: True)),
    0x89: ("NEWFALSE", _value(lambda machine: False)),
    ord("J"): ("BININT", _number("<i")),
    ord("K"): ("BININT1", _number("<B")),
    ord("M"): ("BININT2", _number("<H")),
    0x8A: ("LONG1", _Machine.integer),
    ord("G"): ("BINFLOAT", _number(">d")),
    0x8C: ("SHORT_BINUNICODE", _text("<B")),
    ord("X"): ("BINUNICODE", _text("<I")),
    ord("C"): ("SHORT_BINBYTES", _bytes("<B")),
    ord("B"): ("BINBYTES", _bytes("<I")),
    0x8E: ("BINBYTES8", _bytes("<Q")),
    ord(")"): ("EMPTY_TUPLE", _value(lambda machine: ())),
    0x85: ("TUPLE1", lambda machine: machine.tuple(1)),
    0x86: ("TUPLE2", lambda machine: machine.tuple(2)),
    0x87: ("TUPLE3", lambda machine: machine.tuple(3)),
    ord("t"): ("TUPLE", lambda machine: machine.stack.append(tuple(machine.above_mark()))),
    ord("]"): ("EMPTY_LIST", _value(lambda machine: [])),
    ord("a"): ("APPEND", lambda machine: machine.extend([machine.pop()])),
    ord("e"): ("APPENDS", lambda machine: machine.extend(machine.above_mark())),
    ord("}"): ("EMPTY_DICT", _value(lambda machine: {})),
    ord("s"): ("SETITEM", _pair),
    ord("u"): ("SETITEMS", lambda machine: machine.update(machine.above_mark())),
    0x8F: ("EMPTY_SET", _Machine.empty_set),
    0x90: ("ADDITEMS", lambda machine: machine.add(machine.above_mark())),
    ord("c"): ("GLOBAL", lambda machine: machine.find(machine.line(), machine.line())),
    0x93: ("STACK_GLOBAL", _find),
    ord("R"): ("REDUCE", _Machine.reduce),
    0x81: ("NEWOBJ", _Machine.new),
    ord("b"): ("BUILD", _Machine.build),
    ord("Q"): ("BINPERSID", _Machine.persistent),
}
