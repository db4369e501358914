"""The float constants of a frozen TensorFlow graph, read as names and arrays; the graph is not run.

Such a file is a protocol buffer. A message is a list of fields: a whole number 8·number + type, then a whole number
(type 0), 8 bytes (1), 4 bytes (5), or a length and as many bytes (2). Whole numbers are written seven bits at a time.
Only these fields of a graph are read, listed by number:

    graph   1 node         node        1 name   2 operation   5 attribute (1 key, 2 value, whose 8 is a tensor)
                           tensor      1 type (1: float32)   2 shape (2 dimension, whose 1 is a size)   4 content, as
                                       bytes, or 5, as numbers: all of them, or one for all

Arrays are read-only views of the memory-mapped file, which must not be changed while they are in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffusion_distill.base.errors import WeightsError
from diffusion_distill.base.files import user_path
from diffusion_distill.formats.mapped import mapped

FLOAT32 = 1
MAX_NODES = 2**14  # the network of FID has a thousand
MAX_FIELDS = 2**20  # of one file
MAX_NAME = 200
MAX_DIMENSIONS = 8
MAX_REPEATED = 2**24  # values of all constants that one number stands for; a few bytes may ask for any shape
#: The bytes of a field, or its number.
Value = tuple[int, int] | int


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The float32 constants of a graph, by name.

    Raises:
      WeightsError: the file is damaged, exceeds a limit, or is no graph; the message says where.
      OSError: it cannot be opened.
    """
    path = user_path(path)
    content = mapped(path)
    try:
        return _Graph(content).constants()
    except (WeightsError, ValueError) as error:  # ValueError: a name that is not UTF-8
        raise WeightsError(f"{path} cannot be read as a graph of TensorFlow: {error}.") from error


class _Graph:
    """The bytes of a file, how many fields were read, and how many values single numbers stood for."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.fields_read, self.repeated = content, 0, 0

    def constants(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        nodes = self.all((0, len(self.content)), 1)
        if not 0 < len(nodes) <= MAX_NODES:
            raise WeightsError(f"there are {len(nodes)} nodes; read are 1 to {MAX_NODES}")
        for node in nodes:
            name, operation = self.text(node, 1), self.text(node, 2)
            if operation == "Const" and (array := self.constant(name, node)) is not None:
                if name in found:
                    raise WeightsError(f"the constant {name!r} stands twice")
                found[name] = array
        return found

    def constant(self, name: str, node: Value) -> np.ndarray | None:
        """The array of a node; None if it is of another type, or empty."""
        for attribute in self.all(node, 5):
            if self.text(attribute, 1) != "value":
                continue
            for value in self.all(attribute, 2):
                for tensor in self.all(value, 8):
                    content = self.all(tensor, 4) or self.all(tensor, 5)
                    if self.all(tensor, 1) == [FLOAT32] and content:
                        return self.array(name, tensor, content)
        return None

    def array(self, name: str, tensor: Value, content: list[Value]) -> np.ndarray:
        sizes = [self.all(size, 1) for shape in self.all(tensor, 2) for size in self.all(shape, 2)]
        shape = tuple(size[0] for size in sizes if len(size) == 1 and isinstance(size[0], int))
        begin, end = self.bytes_of(content[0])
        if len(content) > 1 or len(shape) < len(sizes) or len(shape) > MAX_DIMENSIONS:
            raise WeightsError(f"the constant {name!r} has no single content or shape")
        numbers = (end - begin) // 4
        if (end - begin) % 4 or not numbers or numbers not in (1, math.prod(shape)):
            raise WeightsError(f"the constant {name!r} of shape {shape} has {end - begin} bytes")
        array = np.frombuffer(self.content, "<f4", numbers, begin)
        self.repeated += math.prod(shape) - numbers
        if self.repeated > MAX_REPEATED:
            raise WeightsError(f"the constant {name!r} repeats one number over the shape {shape}: too large")
        return array.reshape(shape) if numbers == math.prod(shape) else np.broadcast_to(array, shape)

    # ------------------------------------------------------------ fields

    def all(self, message: Value, number: int) -> list[Value]:
        """The values of all fields of a message with a number."""
        return [value for found, value in self.fields(*self.bytes_of(message)) if found == number]

    def text(self, message: Value, number: int) -> str:
        """The only value of a number, as text; "" if there is none."""
        values = self.all(message, number)
        if len(values) > 1:
            raise WeightsError(f"field {number} stands twice at byte {self.bytes_of(message)[0]}")
        begin, end = self.bytes_of(values[0]) if values else (0, 0)
        if end - begin > MAX_NAME:
            raise WeightsError(f"a name of {end - begin} bytes at byte {begin}; at most {MAX_NAME} are read")
        return str(self.content[begin:end], "utf-8")

    def bytes_of(self, value: Value) -> tuple[int, int]:
        if isinstance(value, int):
            raise WeightsError("a number stands where bytes are needed")
        return value

    def fields(self, begin: int, end: int) -> Iterator[tuple[int, Value]]:
        """(number, value) of each field between two bytes."""
        at = begin
        while at < end:
            self.fields_read += 1
            if self.fields_read > MAX_FIELDS:
                raise WeightsError(f"more than {MAX_FIELDS} fields")
            tag, at = self.whole(at, end)
            kind = tag & 7
            if kind == 0:
                value, at = self.whole(at, end)
                yield tag >> 3, value
                continue
            length = {1: 8, 5: 4}.get(kind)
            if kind == 2:
                length, at = self.whole(at, end)
            if length is None or length > end - at:
                raise WeightsError(f"the field before byte {at} is of type {kind} or reaches beyond its message")
            yield tag >> 3, (at, at + length)
            at += length

    def whole(self, at: int, end: int) -> tuple[int, int]:
        """The whole number at a byte, and the byte after it."""
        value = 0
        for i in range(10):
            if at + i >= end:
                break
            byte = self.content[at + i]
            value |= (byte & 127) << 7 * i
            if byte < 128:
                return value, at + i + 1
        raise WeightsError(f"there is no whole number at byte {at}")
