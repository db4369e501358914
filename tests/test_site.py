"""The documentation as a site (mkdocs.yml): every page is in its navigation, and it builds without a warning.

The build needs the extra [docs], here or in the Python that DOCS_PYTHON names.
"""

from __future__ import annotations

import html
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

import diffusion_distill as dd

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
PYTHON = os.environ.get("DOCS_PYTHON", sys.executable)


def navigation(text: str) -> list[str]:
    """The pages that the navigation of a mkdocs.yml names, in their order; comments are left out."""
    nav = text.partition("\nnav:\n")[2].partition("\n\n")[0]
    return re.findall(r"^ +- [^#\n]*?([\w/]+\.md)$", nav, re.MULTILINE)


def described() -> list[str]:
    """What the API reference describes: dotted names of modules, classes and functions."""
    return [name for path in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", path.read_text(), re.M)]


@pytest.mark.fast
def test_the_navigation_has_every_page_once() -> None:
    assert sorted(navigation((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))) == PAGES


@pytest.mark.fast
def test_comments_are_no_entries() -> None:
    text = "a: 1\nnav:\n  - A:\n      - B: b/c.md\n      # - D: d.md\n  - e.md\n\nf: g.md\n"
    assert navigation(text) == ["b/c.md", "e.md"]


@pytest.mark.fast
def test_the_reference_describes_all_that_the_package_offers() -> None:
    names = described()
    offered = {name: getattr(dd, name) for name in dd.__all__}
    modules = {n: o.__module__ for n, o in offered.items() if inspect.isclass(o) or inspect.isfunction(o)}
    assert len(modules) > 30
    assert [n for n, module in modules.items() if module not in names and f"{module}.{n}" not in names] == []
    assert all(pkgutil.resolve_name(name) is not None for name in names) and len(set(names)) == len(names)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    needed = [PYTHON, "-c", "import material, mkdocs, mkdocstrings_handlers.python"]
    if subprocess.run(needed, capture_output=True).returncode:
        pytest.skip("needs the extra [docs], or DOCS_PYTHON")
    command = [PYTHON, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in PAGES:
        folder = tmp_path / page.removesuffix(".md").removesuffix("index")
        assert (folder / "index.html").is_file(), page
    reference = (tmp_path / "api" / "functions" / "index.html").read_text(encoding="utf-8")
    entries = re.findall(r'<li class="doc-section-item.*?</li>', reference, re.DOTALL)
    shown = {" ".join(html.unescape(re.sub("<[^>]+>", "", entry)).split()) for entry in entries}
    assert {"log_every, checkpoint_every – in updates.", "batch_size (int) – images, B."} <= shown  # griffe_names.py
    assert 'id="where-is-"' in (tmp_path / "architecture" / "index.html").read_text(encoding="utf-8")  # as on GitHub
