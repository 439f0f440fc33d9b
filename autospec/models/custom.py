"""A user's own network, given by the path of its class."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autospec.custom_model import module_file, split_path
from autospec.errors import UserError
from autospec.introspection.generators import generators_kept

SAMPLES = 2


def build_custom(
    path: str, task: str, shape: Sequence[int], classes: int, hidden: Sequence[int], activation: str
) -> nn.Module:
    """Build a user's own network, and see that it returns what its task needs.

    Parameters
    ----------
    path : str
        ``package.module:Class``; the module is looked for in the current folder first, then among the installed packages.
    task, shape, classes, hidden, activation
        As for `autospec.models.build_model`.  The class is given, by name, those of them that its signature names, or
        all if it takes ``**options``; ``activation`` is the word.

    Raises
    ------
    UserError
        If the class cannot be imported or built, is no ``nn.Module``, or returns another shape.
    """
    offered = {
        "task": task,
        "shape": tuple(shape),
        "classes": classes,
        "hidden": list(hidden),
        "activation": activation,
    }
    model = _built(path, load_class(path), offered)
    wanted = (SAMPLES, classes) if task == "classifier" else (SAMPLES, *shape)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"the model '{path}' has no parameter to train: assign its layers to self in __init__.")
    _require_output(path, model, task, tuple(shape), wanted)
    return model


def load_class(path: str) -> type[nn.Module]:
    """Import a user's class.

    Parameters
    ----------
    path : str
        ``package.module:Class``.

    Raises
    ------
    UserError
        If the module or the class is not there, cannot be imported, or is no ``nn.Module``.
    """
    name, class_name = split_path(path)
    file = module_file(path)
    with _first_on_the_path(Path.cwd()):
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise UserError(f"{file} cannot be imported ({_said(error)}): correct it.") from error
    imported = getattr(module, "__file__", None) or "one of Python's own"
    if Path(imported).resolve() != file.resolve():
        raise UserError(f"{name} is the name of another module too, {imported}: rename {file}.")
    found = getattr(module, class_name, None)
    if found is None:
        raise UserError(f"there is no class {class_name} in {file}: check the model '{path}'.")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"{class_name} in {file} is not a class derived from torch.nn.Module: derive it from that.")
    return found


@contextmanager
def _first_on_the_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _built(path: str, network: type[nn.Module], offered: dict[str, Any]) -> nn.Module:
    # A class without an __init__ of its own seems to take anything, since nn.Module's does so to complain about it.
    own = network.__init__ is not nn.Module.__init__
    parameters = inspect.signature(network).parameters.values() if own else []
    named = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters)
    given = {name: value for name, value in offered.items() if takes_all or name in named}
    try:
        return network(**given)
    except Exception as error:
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise UserError(
            f"the model '{path}' cannot be built with ({arguments}): {_said(error)}; of its arguments only "
            f"{', '.join(offered)} are given, so others need defaults."
        ) from error


def _require_output(path: str, model: nn.Module, task: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Run two samples through a copy, so that buffers stay as they are, with random numbers put back afterwards.

    Lazy layers get their weights before, from a first call of the model itself.
    """
    x = torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
                with _evaluated(model):
                    model(x)
            with generators_kept([]):
                output = copy.deepcopy(model).eval()(x)
        except Exception as error:
            raise UserError(
                f"the model '{path}' fails with samples of shape {tuple(x.shape)}, the first dimension counting them: "
                f"{_said(error)}; correct its forward()."
            ) from error
    came = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if not isinstance(output, Tensor) or tuple(output.shape) != wanted:
        raise UserError(
            f"the model '{path}' returns {came} for samples of shape {tuple(x.shape)}, but its task, {task}, needs a "
            f"tensor of shape {wanted}: correct its forward()."
        )


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each layer keeps its own mode, as a backbone that is never trained."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _said(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(".")
