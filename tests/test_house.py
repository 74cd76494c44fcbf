"""The house rules that a machine can keep: who imports whom, what is documented, what runs."""

from __future__ import annotations

import ast
import doctest
import graphlib
import importlib
import inspect
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import permgraph as pg
from permgraph import display

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "permgraph"
SOURCES = sorted(PACKAGE.rglob("*.py"))

#: The packages in the order in which data walks through them, and what each may import besides itself, `errors`,
#: `display` and `conventions`. An import counts wherever it stands: at the top, in a function, or for types
#: alone.
ARROWS = {
    "algebra": "",
    "assignment": "",
    "io": "",
    "weights": "",
    "structures": "",
    "rules": "algebra",
    "capture": "weights",
    "spec": "io weights structures",
    "inference": "algebra rules capture spec structures",
    "networks": "spec weights",
    "transporting": "io spec structures weights",
    "pictures": "spec weights io",
    "matching": "assignment io weights spec structures networks pictures capture inference transporting",
    "merging": "weights spec networks matching transporting capture inference",
    "connectivity": "weights spec networks pictures matching transporting",
    "verification": "capture rules spec inference",
    "verify": "verification",
    "studies": "io weights spec networks pictures inference matching connectivity",
    "cli": "io weights spec networks rules capture inference pictures matching merging connectivity verification "
    "studies transporting",
    "__main__": "cli",
}
FOR_ALL = {"errors", "display", "conventions"}
TOP = {"__init__", "__main__", "verify", "errors", "display"}  # the only modules outside a package


def _module_name(source: Path) -> str:
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(source: Path) -> str:
    return source.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(tree: ast.AST, *, inside_functions: bool, for_types: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports, by their full names; under ``if TYPE_CHECKING`` only `for_types`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            branches = [*(node.body if for_types else []), *node.orelse]
            yield from _imports(ast.Module(branches, []), inside_functions=inside_functions, for_types=for_types)
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _imports(node, inside_functions=inside_functions, for_types=for_types)


def _imports_of(source: Path, *, inside_functions: bool, for_types: bool = False) -> list[str]:
    tree = ast.parse(source.read_text())
    return list(_imports(tree, inside_functions=inside_functions, for_types=for_types))


def _is_one_of(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def test_the_import_finder_finds_imports() -> None:
    text = """
if TYPE_CHECKING:
    import a
else:
    import b
try:
    import c.d
except ImportError:
    from e import f
def g():
    import h
class I:
    def j(self):
        from k import l
"""
    assert list(_imports(ast.parse(text), inside_functions=False)) == ["b", "c.d", "e.f"]
    assert list(_imports(ast.parse(text), inside_functions=True)) == ["b", "c.d", "e.f", "h", "k.l"]
    both = list(_imports(ast.parse(text), inside_functions=True, for_types=True))
    assert both == ["a", "b", "c.d", "e.f", "h", "k.l"]


def _packages_of(source: Path) -> set[str]:
    """The packages that a file imports, aside from those that all may."""
    names = _imports_of(source, inside_functions=True, for_types=True)
    packages = {name.split(".")[1] for name in names if name.startswith("permgraph.")}
    return packages - FOR_ALL - {"__version__", _room(source)}


def test_no_module_is_outside_a_package() -> None:
    assert {_room(source) for source in SOURCES if source.parent == PACKAGE} == TOP
    assert {_room(source) for source in SOURCES} - TOP - FOR_ALL == set(ARROWS) - TOP


@pytest.mark.parametrize("source", SOURCES, ids=_module_name)
def test_packages_import_only_what_the_table_allows(source: Path) -> None:
    assert _packages_of(source) <= set(ARROWS.get(_room(source), "").split())


def test_the_table_has_no_cycle_and_no_arrow_that_is_not_used() -> None:
    table = {package: set(allowed.split()) for package, allowed in ARROWS.items()}
    list(graphlib.TopologicalSorter(table).static_order())  # which raises CycleError
    used: dict[str, set[str]] = {package: set() for package in ARROWS}
    for source in SOURCES:
        used.get(_room(source), set()).update(_packages_of(source))
    assert used == table


def test_pictures_that_are_drawn_by_name_are_there() -> None:
    for picture in display.PICTURES.values():
        module, _, function = picture.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("source", SOURCES, ids=_module_name)
def test_symbols_know_no_numbers(source: Path) -> None:
    """What infers a specification reads no weights, so it needs no solver of scipy."""
    if _room(source) in ("algebra", "rules", "capture", "inference"):
        assert not [n for n in _imports_of(source, inside_functions=True, for_types=True) if _is_one_of(n, ("scipy",))]


@pytest.mark.parametrize("source", SOURCES, ids=_module_name)
def test_optional_dependencies_are_imported_where_they_are_used(source: Path) -> None:
    optional = ("matplotlib", "torchvision", "timm", "transformers", "rich", "sklearn", "joblib", "fsspec", "pyarrow")
    assert not [name for name in _imports_of(source, inside_functions=False) if _is_one_of(name, optional)]


def _modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(pg.__path__, prefix="permgraph.")
    return [pg, *(importlib.import_module(module.name) for module in found if not module.name.endswith("__main__"))]


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(set(pg.__all__)) == sorted(pg.__all__)
    for name in pg.__all__:
        value = getattr(pg, name)
        assert name == "errors" or not isinstance(value, ModuleType), (
            f"permgraph.{name} is a module, not what it should name"
        )
        if name.startswith("__"):
            continue
        assert inspect.getdoc(value), f"permgraph.{name} has no docstring"
        if inspect.isclass(value):
            for member, thing in vars(value).items():
                if not member.startswith("_") and (inspect.isfunction(thing) or isinstance(thing, property)):
                    assert inspect.getdoc(thing), f"permgraph.{name}.{member} has no docstring"


def test_every_error_is_a_permgraph_error() -> None:
    errors = [value for _, value in inspect.getmembers(importlib.import_module("permgraph.errors"), inspect.isclass)]
    assert errors
    assert all(issubclass(error, pg.errors.PermgraphError) and error.__doc__ for error in errors)


def test_every_module_says_what_it_is() -> None:
    assert not [module.__name__ for module in _modules() if not module.__doc__]


def test_examples_in_docstrings_run() -> None:
    """With ``torch``, ``nn`` and ``pg`` at hand, as the documentation says."""
    tried = 0
    for module in _modules():
        names = {"torch": torch, "nn": torch.nn, "pg": pg}
        result = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        assert result.failed == 0, f"an example in {module.__name__} does not run as written (see above)"
        tried += result.attempted
    assert tried > 10


def _tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return [ROOT / line for line in listed.splitlines()]
    except (OSError, subprocess.CalledProcessError):  # an unpacked source archive
        return [path for path in ROOT.rglob("*") if not any(part.startswith(".") for part in path.parts)]


def test_no_paths_of_anybody_s_machine() -> None:
    home = re.compile(r"(/home/\w+|/root/|/Users/\w+|/work/|[A-Z]:\\Users)")
    texts = {".py", ".md", ".toml", ".yml", ".txt", ".html", ".json", ".css", ""}
    readable = [path for path in _tracked() if path.suffix in texts and path.is_file() and path != Path(__file__)]
    lines = ((path.relative_to(ROOT), line) for path in readable for line in path.read_text().splitlines())
    assert not [f"{path}: {line}" for path, line in lines if home.search(line)]
