"""Several processes that work together: when one is lost, the others say so and end.

A process that is killed leaves the others waiting in a sum over all devices; after a while JAX ends them with a stack
trace of C++. Here each process writes into the key-value store of JAX's coordinator every `EVERY` seconds, and reads
what the others wrote:

    a number that grows   it is alive
    done, failed          it has ended, and has said so itself
    lost N                it found that process N is gone

A process whose number has not changed in `PATIENCE` readings is lost. The store lies in process 0; whether that is
alive shows in the connection to it (`base/relay.py`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax

from diffusion_distill.base.relay import Relay, relayed

#: Seconds between two signs of life.
EVERY = 2.0
#: A process is lost after so many readings without a sign of it.
PATIENCE = 18
#: Seconds in which a process may meet the error of another one itself, and tell it, before it is ended.
GRACE = 10.0
#: Seconds after which JAX itself takes a process for lost. It ends the others with a stack trace then, and it counts
#: seconds: after its usual 100 a machine that stood still for so long, with all its processes, could not go on.
JAX_PATIENCE = 1800
#: Variables that tell of the processes where no cluster does: HOST:PORT of process 0, their number, and this one's.
TOLD = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
#: Exit status of a process that ends because another one did: the same command may succeed.
EXIT_STATUS = 75

FOLDER = "diffusion_distill/alive"
ENDED = ("done", "failed")


@contextmanager
def joined(**how: Any) -> Iterator[None]:
    """Joins the other processes (`how` as in `jax.distributed.initialize`), works, and leaves together with them.

    What is not given is what the environment says, see `told`; else JAX asks the cluster that it finds itself in.

    Ends this process with `EXIT_STATUS` and a message if another one is lost or has failed. An error in here is printed
    and ends it with status 1, unless the loss of another process is the reason. Processes are numbered from 0.

    Raises:
      ValueError, RuntimeError: neither tells which processes there are, or they do not answer.
    """
    with relayed() as relays:
        jax.distributed.initialize(**{"heartbeat_timeout_seconds": JAX_PATIENCE, **told(), **how})
    client = _client()
    if client is None or jax.process_count() == 1:
        yield
        return
    watch = Watch(client, jax.process_index(), jax.process_count(), relays[-1] if relays else None)
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int))):
            watch.fail(error)
        watch.leave()
        raise
    watch.leave()


def told() -> dict[str, Any]:
    """What the environment variables in `TOLD` say of the processes; nothing without the last two.

    Raises:
      ValueError: one of the three is missing, or no number.
    """
    found = {name: os.environ.get(variable, "") for name, variable in TOLD.items()}
    if not (found["num_processes"] or found["process_id"]):
        return {}  # JAX itself reads the first one
    for name, variable in TOLD.items():
        if not found[name] or (name != "coordinator_address" and not found[name].isdecimal()):
            raise ValueError(f"{', '.join(TOLD.values())} tell of several processes together; {variable} is "
                             f"{found[name]!r}.")  # fmt: skip
    numbers = {name: int(text) for name, text in found.items() if name != "coordinator_address"}
    return {**found, **numbers, "cluster_detection_method": "deactivate"}


def _client() -> Any:
    """JAX's client of the coordinator; None if this version of JAX has none with a store that can be listed."""
    try:
        from jax._src.distributed import global_state  # JAX has no public name for it
    except ImportError:
        return None
    client = getattr(global_state, "client", None)
    return client if hasattr(client, "key_value_dir_get") and hasattr(client, "key_value_set") else None


class Watch:
    """Signs of life of `count` processes, of which this is number `here`; it begins at once, in threads."""

    def __init__(self, client: Any, here: int, count: int, relay: Relay | None = None):
        self._client, self._here, self._count, self._relay = client, here, count, relay
        self._said = dict.fromkeys((n for n in range(count) if n != here), "")  # what each other process wrote last
        self._changes = dict.fromkeys(self._said, 0)  # how often that has changed
        self._silent = dict.fromkeys(self._said, 0)  # in how many readings it has not changed since
        self._own, self._number, self._unanswered, self._failed_for = "", 0, 0, 0.0
        self._stopped, self._ending, self._writing = threading.Event(), threading.Lock(), threading.Lock()
        for target in (self._beat, self._judge):
            threading.Thread(target=target, name="processes", daemon=True).start()

    # ------------------------------------------------------------ ends of this process

    def leave(self) -> None:
        """Says that this process is done, waits for the others, and leaves the group.

        If one of them was lost meanwhile, `_judge` ends this process: leaving the group would wait for it.
        """
        self._say("done")
        while not all(word in ENDED for word in self._said.values()):
            time.sleep(EVERY / 10)
        self._stopped.set()
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process with its error, unless that comes from the loss of another one, which `_judge` then tells.

        A process that shows two more signs of life after the error is alive.
        """
        before = dict(self._changes)
        while any(self._changes[n] < before[n] + 2 and self._said[n] not in ENDED for n in self._said):
            time.sleep(EVERY / 10)
        with self._ending:
            if isinstance(error, SystemExit):
                print(error.code, file=sys.stderr)
            else:
                traceback.print_exception(error)
            self._end("failed", 1)

    def _end(self, word: str, status: int) -> NoReturn:
        """Ends at once: JAX's own end would wait for the others. Process 0 stays until they have read its word."""
        saying = threading.Thread(target=self._say, args=(word,), daemon=True)
        saying.start()
        saying.join(EVERY)  # longer only where process 0 does not answer
        lost = int(word.split()[1]) if word.startswith("lost") else None
        deadline = time.monotonic() + GRACE + 2 * EVERY
        while self._here == 0 and time.monotonic() < deadline and not self._all_ended(but=lost):
            time.sleep(EVERY / 10)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(status)

    def _all_ended(self, but: int | None = None) -> bool:
        return all(word.startswith((*ENDED, "lost")) for number, word in self._said.items() if number != but)

    # ------------------------------------------------------------ signs of life

    def _say(self, word: str) -> None:
        with self._writing:  # else a number that is on its way could arrive after the word
            self._own = word
            self._client.key_value_set(f"{FOLDER}/{self._here}", word, allow_overwrite=True)

    def _beat(self) -> None:
        while not self._stopped.is_set():
            with suppress(jax.errors.JaxRuntimeError):  # process 0 does not answer: `_judge` counts
                with self._writing:
                    if not self._own:
                        self._number += 1
                        self._client.key_value_set(f"{FOLDER}/{self._here}", str(self._number), allow_overwrite=True)
                self._read(self._client.key_value_dir_get(FOLDER))
                self._unanswered = 0
            self._stopped.wait(EVERY)

    def _read(self, entries: list[tuple[str, str]]) -> None:
        words = {int(key.rsplit("/", 1)[-1]): word for key, word in entries}
        for number, before in self._said.items():
            word = words.get(number, "")
            self._silent[number] = 0 if word != before else self._silent[number] + 1
            self._changes[number] += word != before
            self._said[number] = word

    # ------------------------------------------------------------ ends of others

    def _judge(self) -> None:
        while not self._stopped.wait(EVERY / 4):
            self._unanswered += 1
            self._failed_for += EVERY / 4 if "failed" in self._said.values() else 0.0
            verdict = self._verdict()
            if verdict and not self._stopped.is_set():
                with self._ending:
                    print(self._in_words(*verdict), file=sys.stderr, flush=True)
                    self._end(f"lost {verdict[0]}" if verdict[1] == "lost" else "failed", EXIT_STATUS)

    def _verdict(self) -> tuple[int, str] | None:
        """(process, what became of it) if there is a reason to end; else None."""
        told = [int(word.split()[1]) for word in self._said.values() if word.startswith("lost")]
        if told:
            return told[0], "lost"
        failed = [n for n, word in self._said.items() if word == "failed"]
        if failed and (self._failed_for > GRACE or self._out_of_reach()):
            return failed[0], "failed"
        if self._out_of_reach():
            return 0, "lost"
        silent = [n for n, readings in self._silent.items() if readings > PATIENCE and self._said[n] not in ENDED]
        return (silent[0], "lost") if silent else None

    def _out_of_reach(self) -> bool:
        """Whether process 0 is gone: it has closed the connection, or has not answered for as long as `PATIENCE`."""
        broken = self._relay is not None and self._relay.broken.is_set()
        return self._here > 0 and (broken or self._unanswered > 4 * PATIENCE)

    def _in_words(self, number: int, fate: str) -> str:
        what = "was lost (killed, or its machine cannot be reached)" if fate == "lost" else "ended with an error"
        if number == self._here:  # it stood still, and has woken up after the others gave it up
            what = "gave no sign of life for so long that the others ended"
        return (
            f"Process {number} of {self._count} {what}, so process {self._here} ends as well. What was saved stays: "
            "the same command, started for every process, goes on from the newest checkpoint."
        )
