"""Kills a small journey at random moments, damages its folder, lets it go on, and compares the end with a quiet one.

    python tests/torture.py --minutes=30 [--seed=0] [--cycles=N]

The journey distils a toy teacher in two phases, with evaluations and pictures, draws samples, exports and imports the
student, and downloads a file. A cycle runs it one to four times, each time with SIGKILL at a random moment: after a
random time, or at a random operation on a file (opening to write, renaming, making or removing), so that kills fall
inside saves too. Between two runs the newest checkpoint, run.json or metrics.jsonl may be damaged. Then it runs to its
end. What it leaves must be, bit for bit, what a run leaves that nobody disturbed: parameters, samples, records of
metrics (their times aside), the imported artefact and the download; and nothing half-written may be left.

Every run is a fork of this process, which has imported everything but not started JAX, so a cycle takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import orbax.checkpoint  # noqa: E402, F401  (imported before the forks, which then begin sooner)
import toys  # noqa: E402

from diffusion_distill import NETWORKS, Settings, Tract, api  # noqa: E402
from diffusion_distill.base.seeds import generator_of  # noqa: E402
from diffusion_distill.data.image_writer import save_images  # noqa: E402
from diffusion_distill.denoisers.model import Model  # noqa: E402
from diffusion_distill.training.artefact import Artefact  # noqa: E402
from diffusion_distill.training.logs import read_figures  # noqa: E402
from diffusion_distill.weights import download  # noqa: E402

NETWORKS["perceptron"] = toys.Perceptron
DOWNLOAD = "file.bin"
#: Operations on files that Python tells of, before they happen.
TOUCHING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
TIMES = ("images_per_second", "seconds")


# ---------------------------------------------------------------- the journey


def journey(folder: Path, url: str) -> None:
    """All that leaves files."""
    model = Model(toys.Perceptron(1), (2, 2, 1), prediction="v")
    weights = {name: generator_of(0, 0).normal(size=a.shape) for name, a in sorted(_shapes(model).items())}
    teacher = Artefact(model, _nested(weights))
    source = toys.GaussianSource(toys.Gaussian(0.1, 0.4), size=20)
    settings = Settings(batch_size=8, log_every=1, checkpoint_every=2, evaluate_every=24)
    students = api.distill(teacher, source, Tract((4, 2, 1), length=80), settings, folder / "run")
    download.fetch(url, folder / "download")
    drawn = api.sample(students[1], 8)
    save_images(drawn, folder / "drawn", "npz", None, True)
    exported = api.export_weights(students[1], folder / "student.safetensors")
    api.import_weights(exported, folder / "imported")


def _shapes(model: Model) -> dict[str, Any]:
    from diffusion_distill import weights

    return {name: np.empty(shape) for name, shape in weights.shapes_of(model).items()}


def _nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    from diffusion_distill.weights.matching import unflatten

    return unflatten({name: np.float32(0.3 * array) for name, array in flat.items()})


def left(folder: Path) -> dict[str, Any]:
    """What a journey has left, for a comparison."""
    found: dict[str, Any] = {}
    for name in ("run/student_2", "run/student_1", "imported"):
        found[name] = _bytes(Artefact.load(folder / name).params)
    with np.load(folder / "drawn" / "samples.npz") as drawn:
        found["drawn"] = {name: drawn[name].tobytes() for name in drawn.files}
    records = read_figures(folder / "run" / "metrics.jsonl")
    found["metrics"] = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
    found["download"] = (folder / "download" / DOWNLOAD).read_bytes()
    found["half-written"] = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".unfinished", ".replaced")
    )
    found["pictures"] = sorted(path.name for path in (folder / "run" / "samples").iterdir())
    return found


def _bytes(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _bytes(value) for name, value in tree.items()}
    return np.asarray(tree).tobytes().hex()


# ---------------------------------------------------------------- running and killing


def forked(work: Callable[[], object], log: Path, kill: tuple[str, float] = ("never", 0)) -> int:
    """The exit status of a fork that does the work; it is killed after kill[1] seconds or operations on files."""
    child = os.fork()
    if child == 0:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        try:
            if kill[0] == "operation":
                _kill_at(int(kill[1]))
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if kill[0] == "time":
        time.sleep(kill[1])
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(number: int) -> None:
    """From now on this process kills itself before its operation `number` on files outside the cache of programs."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[1], str) and not set("wax+").isdisjoint(arguments[1])
        if (event in TOUCHING or writes) and ".jax_cache" not in str(arguments[0]):
            count += 1
            if count >= number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


# ---------------------------------------------------------------- damage


def damage(run: Path, chance: random.Random) -> str:
    """Damages something that a run can mend; says what, or nothing."""
    checkpoints = sorted((p for p in run.glob("checkpoints/*") if p.name.isdecimal()), key=lambda p: int(p.name))
    what = chance.choice(["nothing", "nothing", "checkpoint", "run.json", "metrics"])
    if what == "checkpoint" and len(checkpoints) > 1:
        files = [path for path in sorted(checkpoints[-1].rglob("*")) if path.is_file() and path.stat().st_size]
        _spoil(chance.choice(files), chance)
        return what
    if what == "run.json" and (run / what).exists() and checkpoints:
        (run / what).write_bytes(chance.choice([b"", b"\0" * 200, b'{"model": {', b"[]"]))
        return what
    if what == "metrics" and (run / "metrics.jsonl").exists():
        with open(run / "metrics.jsonl", "ab") as file:
            file.write(chance.choice([b"\0" * 100 + b"\n", b'{"update": 3, "lo', b"{}\n", b"\xff\xfe\n"]))
        return what
    return "nothing"


def _spoil(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    kind = chance.choice(["cut", "flip", "zero"])
    if kind == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes({"cut": content[: len(content) // 2], "flip": content, "zero": bytes(len(content))}[kind])


# ---------------------------------------------------------------- cycles


def cycle(folder: Path, url: str, whole: dict[str, Any], length: tuple[float, int], chance: random.Random) -> list[str]:
    """One journey with kills; returns what was done to it. Raises AssertionError if its end is another."""
    log, done = folder.with_suffix(".log"), []
    for _ in range(chance.choice([1, 1, 2, 3])):
        how = chance.choice(["time", "operation"])
        at = chance.uniform(0, length[0]) if how == "time" else chance.randrange(1, length[1])
        status = forked(lambda: journey(folder, url), log, (how, at))
        done.append(f"{how} {at:.2f}" if status == -signal.SIGKILL else f"ended with {status}")
        assert status in (0, -signal.SIGKILL), f"{done}\n{log.read_text()[-3000:]}"
        done.append(damage(folder / "run", chance))
    status = forked(lambda: journey(folder, url), log)
    assert status == 0, f"{done}, and then the run ended with {status}\n{log.read_text()[-3000:]}"
    end = compared(folder)
    differing = [name for name in whole if end.get(name) != whole[name]]
    assert not differing, f"{done}: {differing} differ: {[str(end.get(name))[:2000] for name in differing]}"
    return done


def compared(folder: Path) -> dict[str, Any]:
    """`left`, in a fork, so that JAX does not start here."""
    place = folder.with_suffix(".json")
    status = forked(lambda: place.write_text(json.dumps(left(folder), default=lambda b: b.hex())), place)
    assert status == 0, place.read_text()[-3000:]
    return json.loads(place.read_text())


def torture(place: Path, cycles: int, minutes: float, seed: int) -> Counter[str]:
    """Runs cycles until their number or the time is over; returns how often what was done."""
    site, counts, chance = place / "site", Counter(), random.Random(seed)
    site.mkdir(parents=True)
    (site / DOWNLOAD).write_bytes(random.Random(0).randbytes(3 * 10**6))
    port = 20000 + os.getpid() % 20000
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", site, str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/{DOWNLOAD}"
    try:
        seconds = float("inf")  # of the quicker one, as the machine may have stood still: kills must not come too late
        for name in ("compiling", "whole"):
            begun = time.monotonic()
            status = forked(lambda name=name: journey(place / name, url), place / f"{name}.log")
            assert status == 0, (place / f"{name}.log").read_text()[-3000:]
            seconds = min(seconds, time.monotonic() - begun)
        whole = compared(place / "whole")
        end = time.monotonic() + 60 * minutes
        while counts["cycles"] < cycles and time.monotonic() < end:
            folder = place / f"cycle_{counts['cycles']}"
            done = cycle(folder, url, whole, (seconds, 220), chance)
            counts.update(["cycles", *(word.split()[0] for word in done)])
            shutil.rmtree(folder)
    finally:
        server.kill()
        server.wait()
    return counts


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--cycles", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        counts = torture(Path(place), asked.cycles, asked.minutes, asked.seed)
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
