"""The floors: a module imports only from lower floors, and configs are read at the top only.

The table names every module or folder of the package with its floor. Files of one row are a concept: they may
import places
import each other, but not in a circle. Everything is read from the source, nothing is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import places
import pytest

PACKAGE = "diffusion_distill"
ROOT = places.ROOT / PACKAGE

#: (floor, the modules or folders of one concept)
FLOORS = [
    (0, ("base", "version")),
    (1, ("process",)),
    (1, ("networks",)),
    (1, ("data",)),
    (2, ("report",)),
    (1, ("formats",)),
    (2, ("denoisers",)),
    (3, ("solvers",)),
    (4, ("evaluation",)),
    (4, ("methods",)),
    (4, ("torch",)),
    (5, ("weights",)),
    (5, ("training",)),
    (6, ("api",)),
    (7, ("studies",)),
    (8, ("cli",)),
    (9, ("main",)),
    (9, ("",)),  # the package's own __init__: what a notebook imports
]
CONFIG_FLOOR = 8
#: Libraries that belong to one room or to nobody.
FORBIDDEN = {"torch", "diffusers", "jax", "tensorflow"}
OWNED = {"torch": {"torch", "diffusers"}}
LAZY = {"tensorflow_datasets", "grain", "tensorboardX", "wandb", "PIL", "matplotlib", "sklearn", "tqdm", "safetensors"}


def concept(module: str) -> tuple[int, tuple[str, ...]]:
    """(floor, concept) of a dotted module name of the package."""
    part = module.removeprefix(PACKAGE).strip(".").split(".")[0]
    for floor, names in FLOORS:
        if part in names:
            return floor, names
    raise AssertionError(f"{module} has no floor: add it to the table in {Path(__file__).name}.")


def imports(source: str, module: str, modules: set[str]) -> Iterator[tuple[str, int]]:
    """(imported module of the package, line); `from package import name` counts as the module `name` if it is one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{module}:{node.lineno} imports relatively; write the full name.")
            if (node.module or "").split(".")[0] == PACKAGE:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield (full if full in modules else str(node.module)), node.lineno


def violations(sources: dict[str, str]) -> list[str]:
    """What breaks the rule of the floors in {module: source}."""
    found, modules = [], set(sources)
    inside: dict[str, set[str]] = {}
    for module, source in sources.items():
        floor, names = concept(module)
        for imported, line in imports(source, module, modules):
            below, other = concept(imported)
            if other == names:
                inside.setdefault(module, set()).add(imported)
            elif below >= floor:
                found.append(f"{module}:{line} (floor {floor}) imports {imported} (floor {below})")
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        found.append(f"imports in a circle: {' -> '.join(error.args[1])}")
    return found


def config_readers(source: str) -> list[int]:
    """Lines that name a `config` variable or argument, or import what configs are made of."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        named = (isinstance(node, ast.Name) and node.id in ("config", "ConfigDict")) or (
            isinstance(node, ast.arg) and node.arg == "config"
        )
        libraries = set()
        if isinstance(node, ast.Import):
            libraries = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            libraries = {(node.module or "").split(".")[0]}
        if named or libraries & {"absl", "ml_collections"}:
            lines.append(getattr(node, "lineno", 0))
    return lines


def config_fields(source: str) -> list[int]:
    """Lines that read a field of a variable `config`."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Attribute, ast.Subscript))]
    return [n.lineno for n in nodes if isinstance(n.value, ast.Name) and n.value.id == "config"]


def eager_libraries(source: str) -> set[str]:
    """Top-level names of libraries that are imported when the module is (not in functions or for types only)."""
    tree = ast.parse(source)
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    later = {id(inner) for node in (*functions, *for_types) for inner in ast.walk(node)}
    outside = [node for node in ast.walk(tree) if id(node) not in later]
    names = [alias.name for node in outside if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in outside if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def package_sources() -> dict[str, str]:
    """{dotted module: source} of the whole package; a folder's __init__ goes by the folder's name."""
    named = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return named


@pytest.mark.fast
def test_modules_import_only_from_lower_floors() -> None:
    sources = package_sources()
    assert len(sources) > 30
    assert not violations(sources)


@pytest.mark.fast
def test_configs_are_read_at_the_top_only() -> None:
    readers = {module: config_readers(source) for module, source in package_sources().items()}
    assert readers[f"{PACKAGE}.cli.build"]
    assert not [f"{m}:{lines}" for m, lines in readers.items() if lines and concept(m)[0] < CONFIG_FLOOR]
    assert [m for m, source in package_sources().items() if config_fields(source)] == [f"{PACKAGE}.cli.build"]


@pytest.mark.fast
def test_heavy_libraries_are_imported_where_they_are_used_or_never() -> None:
    for module, source in package_sources().items():
        assert not eager_libraries(source) & LAZY, module
        imported = {n.split(".")[0] for n in _all_imports(source)}
        own = OWNED.get(concept(module)[1][0], {"jax"})
        assert not imported & (FORBIDDEN - own), module


def _all_imports(source: str) -> list[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return names + [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]


FABRICATED = {
    "up": ({"solvers": "from diffusion_distill.training import step", "training.step": ""}, "floor 3"),
    "up, inside a function": ({"base": "def f():\n    import diffusion_distill.api", "api": ""}, "base:2"),
    "sideways": ({"process.grids": "from diffusion_distill.networks.unet import UNet"}, "floor 1"),
    "a circle": (
        {
            "process.grids": "from diffusion_distill.process import noising",
            "process.noising": "from diffusion_distill.process.grids import uniform",
        },
        "circle",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize(("sources", "said"), FABRICATED.values(), ids=FABRICATED)
def test_the_rule_catches(sources: dict[str, str], said: str) -> None:
    [found] = violations({f"{PACKAGE}.{module}": source for module, source in sources.items()})
    assert said in found


@pytest.mark.fast
def test_the_rule_lets_pass_what_is_allowed_and_wants_every_module_in_the_table() -> None:
    allowed = {"methods.tract": "from diffusion_distill.methods import targets", "methods.targets": ""}
    assert not violations({f"{PACKAGE}.{module}": source for module, source in allowed.items()})
    with pytest.raises(AssertionError, match="has no floor"):
        concept(f"{PACKAGE}.elsewhere.file")
    with pytest.raises(AssertionError, match="relatively"):
        violations({f"{PACKAGE}.base": "from . import arrays"})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("source", "reads"),
    [
        ("def f(config): pass", True),
        ("steps = config.sample.steps", True),
        ("from ml_collections import ConfigDict", True),
        ("import jax\njax.config.update('a', 1)", False),
    ],
)
def test_the_search_for_configs(source: str, reads: bool) -> None:
    assert bool(config_readers(source)) == reads
