"""Tables: rows of results as aligned plain text or as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from diffusion_distill.base.errors import choose

Row = Mapping[str, Any]


def format_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """An aligned plain text table: a line of headings, a rule, one line per row.

    Numbers are aligned right with 4 significant digits, whole numbers in full; everything else is aligned left.
    A missing value, or None, is shown as "-".

    Args:
      rows: one mapping column -> value per line.
      columns: which columns, in this order; None takes all, in the order in which they first appear.

    Raises:
      ValueError: no rows, or a column that no row has.
    """
    columns = columns_of(rows, columns)
    cells, right = cells_of(rows, columns)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(_aligned(*cell) for cell in zip(line, widths, right, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def columns_of(rows: Sequence[Row], columns: Sequence[str] | None) -> list[str]:
    """The columns that are asked for, or all of them; raises ValueError as `format_table`."""
    if not rows:
        raise ValueError("There are no rows. Pass at least one mapping {column: value}.")
    known = {str(column): column for row in rows for column in row}
    return [choose("column", column, known) for column in (known if columns is None else columns)]


def cells_of(rows: Sequence[Row], columns: Sequence[str]) -> tuple[list[list[str]], list[bool]]:
    """Headings and rows as text, and which columns hold numbers only."""
    values = [[row.get(column) for column in columns] for row in rows]
    right = [all(value is None or is_number(value) for value in column) for column in zip(*values, strict=True)]
    return [list(columns), *([_text(value) for value in line] for line in values)], right


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if is_number(value) and not isinstance(value, Integral):
        return f"{float(value):.4g}"
    return str(value)


def _aligned(cell: str, width: int, at_right: bool) -> str:
    return cell.rjust(width) if at_right else cell.ljust(width)
