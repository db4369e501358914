"""Real processes of one machine that work together: how they end when one is killed, fails, or is done early."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import places
import pytest

from diffusion_distill.api.classifier import ClassifierSettings, TrainedClassifier, _init
from diffusion_distill.base import processes
from diffusion_distill.base.processes import EXIT_STATUS
from diffusion_distill.training.artefact import Artefact

#: Joins, by an address or as the environment says, and does what its last argument says; its patience is short.
SMALL = """
import sys, time, jax
jax.config.update("jax_platforms", "cpu")
from diffusion_distill.base import processes
processes.EVERY, processes.GRACE = 0.5, 2.0
number, address, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
told = {"coordinator_address": address, "num_processes": 2, "process_id": number} if address else {}
with processes.joined(**told, initialization_timeout=600):
    print("joined", flush=True)
    if what == "count":
        print(jax.process_index(), "of", jax.process_count())
    if what == "wait":
        time.sleep(1000)
    if what == "fail":
        raise ValueError("an error of its own")
    if what == "late":
        time.sleep(12)  # longer than the patience
"""


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def begin(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """A process whose output, errors too, can be read line by line."""
    usual = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=places.ROOT,
        env={**usual, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(places.ROOT), **environment},
    )  # fmt: skip


def begin_small(*what: str) -> list[subprocess.Popen[str]]:
    """Both small processes, once they have joined."""
    address = free_address()
    begun = [begin(["-c", SMALL, str(number), address, word]) for number, word in enumerate(what)]
    for process in begun:
        assert process.stdout
        assert any(line == "joined\n" for line in process.stdout)
    return begun


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit status, the rest of its output) of a process that ends within the promised minute."""
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


@pytest.mark.fast  # it takes longer, but depends on names that JAX may change
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_ends(victim: int) -> None:
    begun = begin_small("wait", "wait")
    begun[victim].kill()
    status, said = end_of(begun[1 - victim])
    assert end_of(begun[victim])[0] == -signal.SIGKILL
    assert status == EXIT_STATUS, said
    assert said.startswith(f"Process {victim} of 2 was lost (killed,") and said.count("\n") == 1


def test_an_error_of_one_ends_both_and_only_that_one_tells_it() -> None:
    begun = begin_small("wait", "fail")
    (waiting, said), (failed, error) = map(end_of, begun)
    assert waiting == EXIT_STATUS and said.startswith("Process 1 of 2 ended with an error, so process 0")
    assert failed == 1 and error.endswith("ValueError: an error of its own\n")


def test_an_error_of_both_is_told_by_both() -> None:
    for status, said in map(end_of, begin_small("fail", "fail")):
        assert status == 1 and said.endswith("ValueError: an error of its own\n")


@pytest.mark.slow
def test_a_process_that_stood_still_ends_after_the_others() -> None:
    begun = begin_small("wait", "wait")
    begun[0].send_signal(signal.SIGSTOP)  # in it lies the store: process 1 has no answer
    status, said = end_of(begun[1])
    begun[0].send_signal(signal.SIGCONT)
    assert status == EXIT_STATUS and said.startswith("Process 0 of 2 was lost"), said
    status, said = end_of(begun[0])
    assert status == EXIT_STATUS and said.startswith("Process "), said


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_is_done_is_not_taken_for_a_lost_one(late: int) -> None:
    begun = begin_small(*("late" if number == late else "done" for number in range(2)))
    assert [end_of(process) for process in begun] == [(0, ""), (0, "")]


def under_slurm(number: int, port: int) -> dict[str, str]:
    """What Slurm sets; JAX makes the port from the number of the job."""
    job = port - (2**16 - 2**12)
    names = {"JOB_ID": job, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": number, "LOCALID": number}
    return {f"SLURM_{name}": str(value) for name, value in names.items()}


def under_open_mpi(number: int, port: int) -> dict[str, str]:
    """What Open MPI sets; of its own number of a job JAX takes what Slurm calls the job."""
    job = (port - (2**16 - 2**12)) * 2**12
    names = {"SIZE": 2, "RANK": number, "LOCAL_RANK": number}
    found = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}
    return {"OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:1", **found}


def told_by_variables(number: int, port: int) -> dict[str, str]:
    """What a JobSet of Kubernetes can set without more rights, and any other starter of processes."""
    address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    return {**address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}


def under_gke(number: int, port: int) -> dict[str, str]:
    """What GKE sets for the two hosts of one slice of TPUs; JAX_FORCE_TPU_INIT makes JAX take this for one of them."""
    own = {"TPU_WORKER_ID": str(number), "TPU_WORKER_HOSTNAMES": "localhost,localhost", **slices(1, 0)}
    return {"JAX_FORCE_TPU_INIT": "1", "JAX_COORDINATOR_PORT": str(port), **own}


def under_a_job_set_of_slices(number: int, port: int) -> dict[str, str]:
    """What it sets for two slices of one host each."""
    own = {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost", **slices(2, number)}
    return {"JAX_FORCE_TPU_INIT": "1", "JAX_COORDINATOR_PORT": str(port), **own}


def slices(count: int, number: int) -> dict[str, str]:
    """What a JobSet sets for several slices; for what is not set JAX asks a server of Google's cloud."""
    names = {"NUM_SLICES": str(count), "SLICE_ID": str(number), "COORDINATOR_ADDRESS": "localhost"}
    return {f"MEGASCALE_{name}": value for name, value in names.items()}


def free_port_of_a_job() -> int:
    """A free port of those that JAX makes from the numbers of jobs."""
    while True:
        port = random.Random().randrange(2**16 - 2**12, 2**16)
        with socket.socket() as tried:
            if tried.connect_ex(("localhost", port)):  # nobody listens
                return port


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [under_slurm, under_open_mpi, told_by_variables, under_gke, under_a_job_set_of_slices]
)
def test_processes_find_each_other_without_being_told(environment: Any) -> None:
    port = free_port_of_a_job()
    begun = [begin(["-c", SMALL, str(number), "", "count"], **environment(number, port)) for number in range(2)]
    assert [end_of(process) for process in begun] == [(0, f"joined\n{number} of 2\n") for number in range(2)]


@pytest.mark.fast
def test_jax_waits_longer_than_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stood still goes on: its processes count signs of life, where JAX counts seconds."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: told.append(how))
    monkeypatch.setattr(processes, "_client", lambda: None)
    for how in ({}, {"heartbeat_timeout_seconds": 5}):
        with processes.joined(**how):
            pass
    assert told[0]["heartbeat_timeout_seconds"] > 600 and told[1] == {"heartbeat_timeout_seconds": 5}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, {}),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}),  # JAX reads it, and asks the cluster for the rest
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is ''"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is ''"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "PROCESSES is 'two'"),
    ],
)
def test_variables_tell_of_processes_together_or_not_at_all(
    variables: dict[str, str], said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in processes.TOLD.values():
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if said == {}:
        assert processes.told() == {}
    else:
        with pytest.raises(ValueError, match=said):
            processes.told()


class Store:
    """A coordinator's store in which the other process has written a word."""

    def __init__(self, word: str):
        self.entries = {f"{processes.FOLDER}/0": word}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        self.entries[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return list(self.entries.items())


def test_a_process_that_was_given_up_while_it_ends_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told that it was lost, and ends as such; leaving the group would end in JAX's stack trace."""
    ended, left = threading.Event(), []
    monkeypatch.setattr(processes, "EVERY", 0.1)
    monkeypatch.setattr(processes.Watch, "_end", lambda self, word, status: ended.set() or self._stopped.set())
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: left.append(True))
    watch = processes.Watch(Store("lost 1"), 1, 2)
    leaving = threading.Thread(target=watch.leave, daemon=True)
    leaving.start()
    assert ended.wait(10) and not left
    watch._said[0] = "done"
    leaving.join(10)


#: Reads a classifier from a folder, with all devices of all processes, and says what its features are.
FEATURES = """
import sys, numpy as np, jax
jax.config.update("jax_platforms", "cpu")
from diffusion_distill.api.classifier import TrainedClassifier
from diffusion_distill.base import processes
processes.EVERY = 0.5
with processes.joined(coordinator_address=sys.argv[2], num_processes=2, process_id=int(sys.argv[1])):
    images = np.linspace(-1, 1, 3 * 64).reshape(3, 8, 8, 1)
    np.save(f"{sys.argv[3]}/{sys.argv[1]}.npy", TrainedClassifier.load(sys.argv[3]).features(images))
"""


@pytest.mark.slow
def test_a_classifier_from_disk_measures_on_several_processes(tmp_path: Path) -> None:
    settings = ClassifierSettings(ch=4, ch_mult=(1,), norm_groups=2)
    params = _init(settings.network(3), (8, 8, 1), jax.random.key(0))
    trained = TrainedClassifier(settings.network(3), params, (8, 8, 1))
    trained.save(tmp_path)
    expected = trained.features(np.linspace(-1, 1, 3 * 64).reshape(3, 8, 8, 1))
    address = free_address()
    begun = [begin(["-c", FEATURES, str(number), address, str(tmp_path)]) for number in range(2)]
    for process in begun:
        status, said = end_of(process)
        assert status == 0, said
    for number in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{number}.npy"), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------ whole runs


def begin_run(workdir: Path) -> list[subprocess.Popen[str]]:
    """Two processes of the command line, which learn of each other as under Open MPI."""
    command = (
        "-m diffusion_distill.main --mode=train --distributed --config=configs/digits_teacher.py "
        "--config.run.batch_size=8 --config.method.length=1K --config.run.checkpoint_every=20 --config.run.log_every=20"
    )
    address = free_address()
    return [
        begin(
            [*command.split(), f"--workdir={workdir}"],
            JAX_COORDINATOR_ADDRESS=address, OMPI_MCA_orte_hnp_uri="1.0;tcp://127.0.0.1:1", OMPI_COMM_WORLD_SIZE="2",
            OMPI_COMM_WORLD_RANK=str(number), OMPI_COMM_WORLD_LOCAL_RANK=str(number),
        )
        for number in range(2)
    ]  # fmt: skip


def finish(begun: list[subprocess.Popen[str]]) -> None:
    for process in begun:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(begin_run(workdir))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_training_goes_on(victim: int, undisturbed: Path, tmp_path: Path) -> None:
    begun = begin_run(tmp_path)
    deadline = time.monotonic() + 300
    while not any((tmp_path / "checkpoints").glob("[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    begun[victim].kill()
    status, said = end_of(begun[1 - victim])
    assert end_of(begun[victim])[0] == -signal.SIGKILL
    assert status == EXIT_STATUS and f"Process {victim} of 2 was lost" in said.splitlines()[-1], said
    finish(begin_run(tmp_path))
    expected, found = (Artefact.load(workdir / "teacher").params for workdir in (undisturbed, tmp_path))
    # Sums over processes are rounded anew in each run; the distances seen were 2e-5 and 1e-4 of the norm.
    away = optax.tree.norm(jax.tree.map(jnp.subtract, found, expected))
    assert away < 1e-3 * optax.tree.norm(expected)
