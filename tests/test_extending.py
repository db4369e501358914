"""docs/extending.md promises how little one writes for a new entry of each kind: here its lines are counted.

tests/test_docs.py runs the page.
"""

from __future__ import annotations

import re

import places
import pytest

PAGE = (places.ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
#: Section -> lines of the class or function that the entry is, imports and blank lines left out.
MOST = {"A noise process": 15, "A prediction": 1, "A solver": 20, "A method": 40, "A network of another kind": 40}


def written(section: str) -> list[str]:
    """The lines of a section's first block that are not imports."""
    text = PAGE.split(f"## {section}\n")[1]
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    lines = [line for line in block.group(1).splitlines() if line.strip()]
    return [line for line in lines if not re.match(r"(from|import) ", line)]


@pytest.mark.fast
@pytest.mark.parametrize(("section", "most"), MOST.items(), ids=MOST)
def test_a_new_entry_is_short(section: str, most: int) -> None:
    assert 0 < len(written(section)) <= most


@pytest.mark.fast
def test_a_condition_needs_no_code() -> None:
    assert "```" not in PAGE.split("## A condition\n")[1]
