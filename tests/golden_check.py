"""The golden check: does the library give the numbers of the authors' own published programs?

    python tests/golden_check.py DIR [--data DIR] [--only PATTERN]... [-v]

DIR is a folder of recorded inputs and outputs, searched recursively. Every array of every data file in it is
an input of a comparison, compared with what the package computes, or left out for a stated reason; anything
else is NOT HANDLED, which counts as failed. The kind of a file, its sizes, schedules and networks come from the
file itself. One line per quantity:

    file  array  precision  error  tolerance  PASS | FAIL | NOT HANDLED

The last line is 'N passed, N failed'; the exit status is 0 only if nothing failed. A new folder of fixtures
is a new file in golden_checks/.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # runs from anywhere, installed or not

import golden_checks  # noqa: E402
from golden_checks.common import Fixture, Kind, Line, run  # noqa: E402

from diffusion_distill.training.sharding import use_cpu_devices  # noqa: E402

#: Data packs: an optional folder beside the checkout.
DEFAULT_DATA = HERE.parent.parent / "shared" / "data"
DOCUMENTS = (".md",)  # READMEs and fact sheets are no data


@dataclass
class Tally:
    """All lines of a check, and what became of the arrays."""

    lines: list[Line] = field(default_factory=list)
    arrays: Counter[str] = field(default_factory=Counter)  # input, compared, skipped

    def count(self, verdict: str) -> int:
        """How many lines have this verdict."""
        return sum(line.verdict == verdict for line in self.lines)

    @property
    def failed(self) -> int:
        """Failures, among them what is not handled."""
        return self.count("FAIL") + self.count("NOT HANDLED")


def kinds() -> list[Kind]:
    """The kinds of all files in golden_checks/."""
    names = sorted(module.name for module in pkgutil.iter_modules(golden_checks.__path__))
    modules = [importlib.import_module(f"golden_checks.{name}") for name in names]
    return [kind for module in modules for kind in getattr(module, "KINDS", [])]


def data_files(directory: Path, only: Sequence[str] = ()) -> list[tuple[str, Path]]:
    """Data files below a directory (or the file it is), with their names in it."""
    found = [directory] if directory.is_file() else sorted(p for p in directory.rglob("*") if p.is_file())
    root = directory.parent if directory.is_file() else directory
    named = [(path.relative_to(root).as_posix(), path) for path in found if path.suffix not in DOCUMENTS]
    return [(name, path) for name, path in named if not only or any(fnmatch.fnmatch(name, p) for p in only)]


def check(
    directory: Path,
    data: Path = DEFAULT_DATA,
    only: Sequence[str] = (),
    show: Callable[[Line], None] = lambda line: None,
) -> Tally:
    """Checks all data files below a directory, or those whose names match one of the patterns."""
    tally, known = Tally(), kinds()

    def emit(line: Line) -> None:
        tally.lines.append(line)
        show(line)

    for name, path in data_files(directory, only):
        try:
            fixture = Fixture(path, name, data, emit)
            kind = next((kind for kind in known if kind.recognise(fixture)), None)
        except Exception as error:  # a damaged file is a failure of this file only
            emit(Line(name, "-", "FAIL", f"cannot be read: {type(error).__name__}: {error}"))
            continue
        if kind is None:
            emit(Line(name, "-", "NOT HANDLED", "no check for this kind of file"))
            continue
        run(kind, fixture)
        tally.arrays.update(fixture.accounted.values())
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Compares the library with recorded numbers.")
    parser.add_argument("directory", type=Path, help="folder of fixtures, or one file")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of data packs (%(default)s)")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="only files named so")
    parser.add_argument("-v", "--verbose", action="store_true", help="also list each skipped array")
    args = parser.parse_args(argv)
    if not args.directory.exists():
        parser.error(f"{args.directory} does not exist.")

    def show(line: Line) -> None:
        if args.verbose or line.verdict != "skipped":
            print(line, flush=True)

    tally = check(args.directory, args.data, args.only, show)
    if not tally.lines:
        print(f"{args.directory} has no data files{' with such a name' if args.only else ''}.")
    for (file, reason), count in Counter((s.file, s.text) for s in tally.lines if s.verdict == "skipped").items():
        print(f"{file}: {count} skipped, {reason}")
    print("arrays: " + ", ".join(f"{tally.arrays[what]} {what}" for what in ("input", "compared", "skipped")))
    print(f"not handled: {tally.count('NOT HANDLED')} (counted as failed)")
    print(f"{tally.count('PASS')} passed, {tally.failed} failed")
    return 0 if tally.lines and not tally.failed else 1


if __name__ == "__main__":
    use_cpu_devices(8)  # recorded steps were made on several
    sys.exit(main())
