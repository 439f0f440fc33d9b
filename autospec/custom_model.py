"""Where a user's own network stands: a path such as ``mynetworks:Net``, and the file behind it.

Nothing is imported here, neither the user's module nor torch, so that Snakemake can call it at start-up.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from autospec.errors import UserError

_NAME = r"[^\W\d]\w*"
_PATH = re.compile(rf"({_NAME}(?:\.{_NAME})*):({_NAME})")


def is_path(model: str) -> bool:
    """Whether a model is the path of a user's own network, and not the name of one of ours."""
    return ":" in model


def split_path(path: str) -> tuple[str, str]:
    """Module and class of a path ``package.module:Class``; raises UserError if it has another form."""
    found = _PATH.fullmatch(path)
    if found is None:
        raise UserError(
            f"'{path}' is no path of a class: write the module, a colon and the class, as in mynetworks:Net."
        )
    return found[1], found[2]


def module_file(path: str, folder: str | Path = ".") -> Path:
    """Find the file of a user's module without importing it, or what it lies in.

    Parameters
    ----------
    path : str
        ``package.module:Class``.
    folder : path-like
        The analysis folder, where the module is looked for first; then among the installed packages.

    Returns
    -------
    Path
        The module's file, or a package's ``__init__.py``.

    Raises
    ------
    UserError
        If there is no such module.
    """
    name, _ = split_path(path)
    importlib.invalidate_caches()  # the file may be younger than what was remembered of its folder
    places: list[str] | None = [str(Path(folder).resolve()), *sys.path]
    origin = None
    parts = name.split(".")
    for i in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: i + 1]), places)
        if spec is None:
            break
        # A plain module has no places in which to look further, and an empty list is not None, which means sys.path.
        places, origin = list(spec.submodule_search_locations or []), spec.origin
    if spec is None or origin is None:
        raise UserError(
            f"the module {name} of the model '{path}' is neither in {Path(folder).resolve()} nor installed: "
            "put its file into the analysis folder, or install its package."
        )
    return Path(origin)


def require_class(path: str, folder: str | Path = ".") -> None:
    """Refuse a model whose file is no Python, or plainly lacks the class, without running it.

    Parameters
    ----------
    path, folder
        As for `module_file`.

    Raises
    ------
    UserError
        If there is no such module, it cannot be parsed, or nothing in it has the class' name.
    """
    file, name = module_file(path, folder), split_path(path)[1]
    if file.suffix != ".py":
        return
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(
            f"the model '{path}' cannot be read ({file}{line}: {error.args[0]}): correct the file."
        ) from None
    # It may be imported, or made by a function: only what the text does not mention cannot be there.
    text = file.read_text(encoding="utf-8", errors="replace")
    if not re.search(rf"\b{name}\b|import\s*\*|__getattr__", text):
        classes = ", ".join(f"'{node.name}'" for node in body if isinstance(node, ast.ClassDef)) or "none"
        raise UserError(f"the model '{path}' names a class that {file} does not have: its classes are {classes}.")
