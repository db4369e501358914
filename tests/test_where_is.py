"""docs/architecture.md answers where things are: files and names are there, as are the files that concepts name."""

from __future__ import annotations

import re

import pytest
from places import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROWS = [
    [re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|")[1:]]
    for line in PAGE.split("## Where is")[1].splitlines()
    if line.startswith("| ") and "`" in line
]
CONCEPTS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "concepts").glob("*.md"))]


@pytest.mark.fast
@pytest.mark.parametrize(("files", "names"), ROWS, ids=[row[0][-1] + "-" + row[1][0] for row in ROWS])
def test_an_answer_is_where_the_page_says(files: list[str], names: list[str]) -> None:
    text = "\n".join((ROOT / "diffusion_distill" / name).read_text(encoding="utf-8") for name in files)
    assert len(files) <= 2
    assert all(re.search(rf"\b{re.escape(name)}\b", text) for name in names), (files, names)


@pytest.mark.fast
def test_every_room_and_file_that_the_page_names_is_there() -> None:
    package = ROOT / "diffusion_distill"
    rooms = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    named = set(re.findall(r"`(\w+)/`", PAGE))
    assert len(ROWS) >= 10 and rooms <= named
    for name in re.findall(r"`(?!tests/|configs/)([\w/]+\.py)`", "".join([PAGE, *CONCEPTS])):
        assert (package / name).is_file(), name
