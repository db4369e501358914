"""What every golden check is written with: a fixture that accounts for its arrays, tolerances, precisions.

A check is a function (fixture, mode) that reads inputs from the fixture, calls the package and hands results
to `Fixture.compare`. It runs once in float64 (NumPy in; JAX code under x64) and once in float32 (JAX in).
It contains no formula of diffusion.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.arrays import enable_x64
from diffusion_distill.denoisers.model import Denoiser
from diffusion_distill.methods.phases import updates_for
from diffusion_distill.process.predictions import SIGMA_DATA
from diffusion_distill.process.processes import PROCESSES, Process

Check = Callable[["Fixture", "Mode"], None]


# ---------------------------------------------------------------------------------------------- precisions


@dataclass(frozen=True)
class Mode:
    """A precision: 'float64' gives NumPy arrays (x64 where JAX takes over), 'float32' JAX arrays."""

    name: str

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Everything of this mode happens inside, with equal settings in tests and on the command line."""
        settings = (jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"))
        with enable_x64(self is FLOAT64), settings[0], settings[1]:
            yield

    def array(self, value: Any) -> Any:
        """Floats in this precision; whole numbers stay as they are."""
        value = np.asarray(value)
        if self is FLOAT64:
            return value.astype(np.float64) if value.dtype.kind == "f" else value
        return jnp.asarray(value, jnp.float32) if value.dtype.kind == "f" else jnp.asarray(value, jnp.int32)

    def tree(self, tree: Any) -> Any:
        """The same for every array of a tree."""
        return jax.tree.map(self.array, tree)


FLOAT64, FLOAT32 = Mode("float64"), Mode("float32")
MODES = (FLOAT64, FLOAT32)


# ---------------------------------------------------------------------------------------------- tolerances


class Rule(NamedTuple):
    """An allowed error: |got - reference| <= bound·scale(reference), elementwise."""

    bound: float
    text: str
    scale: Callable[[np.ndarray], Any]


def absolute(bound: float, text: str = " absolute") -> Rule:
    """The same for every element."""
    return Rule(bound, text, lambda ref: 1.0)


def relative(bound: float) -> Rule:
    """Relative to each element."""
    return Rule(bound, "·|ref|", np.abs)


def of_each(bound: float) -> Rule:
    """Relative to each element, but not below 1."""
    return Rule(bound, "·max(1, |ref|)", lambda ref: np.maximum(1, np.abs(ref)))


def of_largest(bound: float) -> Rule:
    """Relative to the largest element, but not below 1."""
    return Rule(bound, "·max(1, max|ref|)", lambda ref: max(1.0, _largest(ref)))


def of_scale(bound: float, text: str) -> Rule:
    """Relative to the largest element, however small."""
    return Rule(bound, f"·max|ref| ({text})", _largest)


def exact() -> Rule:
    """Equal."""
    return absolute(0.0, " exact")


#: What the rules for a checker prescribe where a README is silent.
DEFAULT_FLOAT32 = of_largest(2e-6)._replace(text="·max(1, max|ref|) (the README gives none)")


def _largest(ref: np.ndarray) -> float:
    return float(np.max(np.abs(ref), initial=0.0))


def measure(got: np.ndarray, reference: np.ndarray, rule: Rule) -> float:
    """The largest error in units of the rule's scale; infinite where a value is not finite but should be."""
    same = (got == reference) | (np.isnan(got) & np.isnan(reference))
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(same, 0.0, np.abs(got - reference) / rule.scale(reference))
    return float(np.max(np.where(np.isnan(error), np.inf, error), initial=0.0))


# ---------------------------------------------------------------------------------------------- fixtures


class Line(NamedTuple):
    """One line of the report."""

    file: str
    array: str
    verdict: str  # PASS, FAIL, NOT HANDLED or skipped
    text: str = ""
    share: float = 0.0  # error / tolerance

    def __str__(self) -> str:
        return f"{self.file}  {self.array}  {self.text}{'  ' if self.text else ''}{self.verdict}"


@dataclass
class Fixture:
    """One data file, and what has become of each of its arrays.

    The arrays of a JSON file are its values, called by their paths ("cifar/params/conv_in/bias"); `meta` is all of it.
    """

    path: Path
    name: str  # relative to the checked folder
    data: Path  # where data packs lie
    emit: Callable[[Line], None]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    accounted: dict[str, str] = field(default_factory=dict)  # array -> input, compared, skipped

    def __post_init__(self) -> None:
        if self.path.suffix == ".json":
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.meta = content if isinstance(content, dict) else {"": content}
            self.arrays = dict(_leaves(self.meta))
        if self.path.suffix != ".npz":
            return
        with np.load(self.path) as stored:
            self.arrays = {key: stored[key] for key in stored.files if key != "meta"}
            self.meta = json.loads(str(stored["meta"])) if "meta" in stored.files else {}

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def input(self, key: str) -> np.ndarray:
        """An array that a computation starts from."""
        self.accounted.setdefault(key, "input")
        return self.arrays[key]

    def matches(self, pattern: str) -> list[re.Match[str]]:
        """Matches of a regular expression with whole keys."""
        return [match for key in self.arrays if (match := re.fullmatch(pattern, key))]

    def compare(self, key: str, got: Any, mode: Mode, rule: Rule) -> None:
        """Reports whether a result agrees with an array; does nothing if the file has no such array."""
        if key not in self.arrays:
            return
        self.accounted[key] = "compared"
        got, reference = np.asarray(got), self.arrays[key]
        if got.shape != reference.shape:
            self.fail(key, f"{mode.name}  shape {got.shape} instead of {reference.shape}")
            return
        self.report(key, measure(got.astype(np.float64), reference.astype(np.float64), rule), mode, rule)

    def equal(self, key: str, got: Any) -> None:
        """Reports whether something, such as words or whole numbers, is the same as an array; else as `compare`."""
        if key not in self.arrays:
            return
        self.accounted[key] = "compared"
        same = np.array_equal(np.asarray(got), self.arrays[key])
        text = "equal" if same else f"{str(got)[:100]} instead of {str(self.arrays[key])[:100]}"
        self.emit(Line(self.name, key, "PASS" if same else "FAIL", text, 0.0 if same else np.inf))

    def report(self, what: str, error: float, mode: Mode, rule: Rule, note: str = "") -> None:
        """Reports an error that was measured elsewhere."""
        text = f"{mode.name}  error {error:.2e}  tolerance {rule.bound:.2e}{rule.text}{note}"
        share = error / rule.bound if rule.bound else np.inf if error else 0.0
        self.emit(Line(self.name, what, "PASS" if np.isfinite(error) and error <= rule.bound else "FAIL", text, share))

    def fail(self, what: str, text: str) -> None:
        """Reports something that could not be measured."""
        self.emit(Line(self.name, what, "FAIL", text, np.inf))

    @contextlib.contextmanager
    def attempt(self, what: str, mode: Mode) -> Iterator[None]:
        """Reports an exception inside as a failure of this part only: one broken part must not hide the others."""
        try:
            yield
        except Exception as error:
            text = f"{mode.name}  {type(error).__name__}: {str(error).strip()[:300]}"
            self.fail(what, " ".join(text.split()))

    def skip(self, keys: Sequence[str], reason: str) -> None:
        """Leaves arrays out, with the reason."""
        for key in keys:
            if self.accounted.setdefault(key, "skipped") == "skipped":
                self.emit(Line(self.name, key, "skipped", reason))

    def finish(self) -> None:
        """Reports every array that nothing was done with."""
        for key in self.arrays:
            if key not in self.accounted:
                self.emit(Line(self.name, key, "NOT HANDLED"))


def _leaves(content: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """What a JSON file holds, by path: values, and lists of values as arrays."""
    if isinstance(content, list) and any(isinstance(value, dict | list) for value in content):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        yield path, np.asarray(content)
        return
    for name, value in content.items():
        yield from _leaves(value, f"{path}/{name}" if path else str(name))


@dataclass(frozen=True)
class Kind:
    """A kind of file, recognised by its own content, with its check and what of it is left out."""

    name: str
    recognise: Callable[[Fixture], bool]
    check: Check
    skips: Callable[[Fixture], Sequence[tuple[Sequence[str], str]]] = lambda fixture: ()
    modes: tuple[Mode, ...] = MODES


def run(kind: Kind, fixture: Fixture) -> None:
    """Checks one file completely."""
    for mode in kind.modes:
        with fixture.attempt("-", mode), mode.active():
            kind.check(fixture, mode)
    for keys, reason in kind.skips(fixture):
        fixture.skip(keys, reason)
    fixture.finish()


def keys_like(fixture: Fixture, *patterns: str) -> list[str]:
    """Keys that match one of the shell patterns."""
    return [key for key in fixture.arrays if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)]


# ---------------------------------------------------------------------------------------------- shared parts


def phase_at(progress: float, count: int) -> int:
    """The phase of a run of `count` equal ones at a progress in [0, 1]; a border still belongs to the one before."""
    ends = np.cumsum(updates_for(count * 10**9, 1, (1,) * count))
    return int(np.searchsorted(ends, progress * (1 - 1e-9) * ends[-1], side="right"))


def process_of(description: dict[str, Any]) -> Process:
    """The process that a file's meta names, with its range."""
    ranges = {key: float(description[key]) for key in ("logsnr_min", "logsnr_max") if key in description}
    return PROCESSES[description.get("name", "cosine")](**ranges)


@dataclass(frozen=True)
class Formula:
    """A network given by a function, in the place of a `Model` in a `Denoiser`."""

    function: Callable[..., Any]
    prediction: str
    process: Any = None
    sigma_data: float = SIGMA_DATA
    adapter: ClassVar[Any] = SimpleNamespace(drops=False)  # there is no network, and so no dropout

    def raw(self, params: Any, z: Any, level: Any, labels: Any, dropout: Any) -> Any:
        """The network's output."""
        return self.function(self.prediction, params, z, level, labels)

    def denoiser(self, params: Any, dropout: Any = None) -> Denoiser:
        """As `Model.denoiser`."""
        return Denoiser(params=params, model=self)


@jax.jit
def _losses(method, *arguments):
    return method.value.losses_at(*arguments)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Static:
    value: Any


def losses_at(method: Any, *arguments: Any) -> Any:
    """method.losses_at compiled, as in training."""
    return _losses(_Static(method), *arguments)
