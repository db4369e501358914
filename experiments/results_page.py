"""Puts the collected tables into docs/results.md: python -m experiments.results_page

The page's sentences are written by hand. A table stands between `<!-- NAME SCALE -->` and `<!-- end -->`, and is copied
from experiments/results/NAME/SCALE/table.md.
"""

from __future__ import annotations

import re
from pathlib import Path

from .common.runner import RESULTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
PLACE = re.compile(r"(<!-- (\w+) (paper|gpu|cpu) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with the tables of the results; a table that is not there yet leaves a line that says so."""

    def table(found: re.Match[str]) -> str:
        path = RESULTS / found[2] / found[3] / "table.md"
        content = path.read_text(encoding="utf-8") if path.is_file() else "\nNot run yet.\n"
        return f"{found[1]}\n{content.strip()}\n\n{found[4]}"

    return PLACE.sub(table, text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"The tables in {PAGE} are those of {RESULTS}.")
