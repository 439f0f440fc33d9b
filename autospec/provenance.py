"""Code fingerprints: what makes a stage's results out of date, beside its settings and its inputs.

A fingerprint covers the syntax trees, without comments and docstrings, of every module of autospec that a
stage's module imports, directly or not, and the installed versions of the other packages those modules
import.  Formatting, comments and docstrings change nothing; an edit of the plotting code changes the figures'
fingerprint alone.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

PACKAGE = "autospec"
# Distributions with another name than what is imported; those not listed here are looked for, which takes a while.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "PyYAML"}
ROOT = Path(__file__).resolve().parent.parent


@cache
def fingerprint(*modules: str, root: Path = ROOT) -> str:
    """Fingerprint of the code behind some modules.

    Parameters
    ----------
    *modules : str
        Names such as ``autospec.training``.
    root : Path
        The folder that holds the package.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    closure, packages = import_closure(modules, root)
    parts = {name: _module(name, root).digest for name in sorted(closure)}
    versions = {name: _version(name) for name in sorted(packages)}
    return hashlib.sha256(json.dumps([parts, versions], sort_keys=True).encode()).hexdigest()[:16]


def import_closure(modules: tuple[str, ...], root: Path = ROOT) -> tuple[set[str], set[str]]:
    """Modules of the package that are reached by static imports, and the other packages they import."""
    reached: set[str] = set()
    packages: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        parents = name.split(".")[:-1]
        waiting += [".".join(parents[: i + 1]) for i in range(len(parents))]
        for imported in _module(name, root).imports:
            if imported.split(".")[0] != PACKAGE:
                packages.add(imported.split(".")[0])
            elif _module_file(imported, root) is not None:
                waiting.append(imported)
    return reached, packages - set(sys.stdlib_module_names)


class _Module(NamedTuple):
    """What a fingerprint takes of a module: absolute names of all it imports, wherever in it, and a digest of its code."""

    imports: tuple[str, ...]
    digest: str


@cache
def _module(name: str, root: Path) -> _Module:
    file = _module_file(name, root)
    if file is None:
        raise ModuleNotFoundError(f"{name} is no module below {root}")
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    # Collecting garbage meanwhile takes longer than parsing, and a tree is none until it is dropped as a whole.
    collecting = gc.isenabled()
    gc.disable()
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        return _Module(tuple(_imports(tree, package)), _code_digest(tree))
    finally:
        if collecting:
            gc.enable()


def _imports(tree: ast.Module, package: str) -> list[str]:
    found: list[str] = []
    for node in _run_time_nodes(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found.append(base)
            if base.split(".")[0] == PACKAGE:  # "from autospec.x import y": y may be a module
                found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree's statements without what stands under ``if TYPE_CHECKING``, which never runs."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):  # holds no statement
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from _run_time_nodes(other)
        else:
            yield from _run_time_nodes(child)


@cache
def _module_file(name: str, root: Path) -> Path | None:
    base = root.joinpath(*name.split("."))
    for file in (base / "__init__.py", base.with_suffix(".py")):
        if file.is_file():
            return file
    return None


def _code_digest(tree: ast.Module) -> str:
    """Digest of the code without docstrings, which are taken out of the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


@cache
def _version(package: str) -> str:
    """Installed version of the distribution that provides an import name."""
    try:
        return metadata.version(DISTRIBUTIONS.get(package, package))
    except metadata.PackageNotFoundError:
        names = _distributions().get(package)
        return metadata.version(names[0]) if names else "not installed"


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())
