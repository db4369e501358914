"""A relay between this process and JAX's coordinator, so that the loss of process 0 can be told in plain words.

JAX's client ends the program with a stack trace of C++ as soon as its connection to process 0 breaks. With a relay, the
client holds a connection to a thread of its own process, which passes the bytes on. When process 0 is gone, only the
relay's connection breaks: it says so, keeps the client's open, and leaves time for a message and an orderly end.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Relay:
    """Passes bytes between connections on this machine, at `address`, and `target` (HOST:PORT)."""

    def __init__(self, target: str):
        host, _, port = target.rpartition(":")
        self._target = host.strip("[]"), int(port)
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        #: Set once the target has closed a connection that this process still wants.
        self.broken = threading.Event()
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def _accept(self) -> None:
        while True:
            inner, _ = self._door.accept()
            try:
                outer = socket.create_connection(self._target, timeout=10)
                for end in (inner, outer):
                    end.settimeout(None)
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:  # the coordinator is not up yet: the client tries again
                inner.close()
                continue
            threading.Thread(target=self._to_target, args=(inner, outer), name="relay", daemon=True).start()
            threading.Thread(target=self._from_target, args=(outer, inner), name="relay", daemon=True).start()

    def _to_target(self, inner: socket.socket, outer: socket.socket) -> None:
        with suppress(OSError):
            _pass_on(inner, outer)
            outer.shutdown(socket.SHUT_RDWR)  # the client has closed; the other thread ends as well

    def _from_target(self, outer: socket.socket, inner: socket.socket) -> None:
        with suppress(OSError):
            _pass_on(outer, inner)
        if not _closed(inner):  # the client's end stays open, and JAX waits
            self.broken.set()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    while data := source.recv(1 << 16):
        sink.sendall(data)


def _closed(connection: socket.socket) -> bool:
    """Whether the other end of a connection has been closed."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextmanager
def relayed() -> Iterator[list[Relay]]:
    """While it lasts, clients that JAX makes connect through a relay, which is put into the list.

    The list stays empty in process 0, and with versions of JAX that make their client in another way: these end as JAX
    ends them.
    """
    relays: list[Relay] = []
    try:
        from jax._src.distributed import _jax as library  # JAX has no public name for it

        make = library.get_distributed_runtime_client
    except (ImportError, AttributeError):
        yield relays
        return

    def connect(address: str, number: int, *rest: Any, **named: Any) -> Any:
        if number > 0 and "/" not in address:  # gRPC has addresses with a scheme, dns:///…, which are not for sockets
            with suppress(OSError, ValueError):
                relays.append(Relay(address))
        return make(relays[-1].address if relays else address, number, *rest, **named)

    library.get_distributed_runtime_client = connect
    try:
        yield relays
    finally:
        library.get_distributed_runtime_client = make
