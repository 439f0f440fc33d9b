"""Which parameters of a model are watched, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from .errors import WatchError
from .layers import NO_MATRIX, rule_for


class WatchedParameter:
    """A weight matrix of the model.

    Attributes
    ----------
    name : str
        Qualified name, such as ``encoder.0.weight``.
    also : list of str
        Its other names, where weights are tied.
    places : list of (str, str)
        Module and parameter name of every module that holds it.
    shape : (int, int)
        Shape of ``p.reshape(p.shape[0], -1)``.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name = name
        self.parameter = parameter
        self.also: list[str] = []
        self.places: list[tuple[str, str]] = []
        self.shape: tuple[int, int] = (parameter.shape[0], parameter[0].numel())


def find_parameters(model: nn.Module, selected: Sequence[str] | None, unknown: str) -> list[WatchedParameter]:
    """List the matrices of a model that have a rule.

    Parameters
    ----------
    model : nn.Module
        The model.
    selected : sequence of str, optional
        Names or patterns; every matrix by default.
    unknown : {"refuse", "skip"}
        What to do with matrices that have no rule.

    Raises
    ------
    WatchError
        If a matrix without a rule is not to be skipped, a name fits nothing, or nothing remains.
    """
    if isinstance(selected, str):
        raise WatchError(f"layers={selected!r}: give a list of parameter names.")
    found: dict[int, WatchedParameter] = {}
    without_rule: dict[int, list[str]] = {}
    visited: set[nn.Module] = set()
    for module_name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, NO_MATRIX):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            raise WatchError(
                f"{f'{module_name!r}' if module_name else 'the model'} is TorchScript, whose layers cannot be watched: watch the "
                "model that it was made of."
            )
        rule = rule_for(module)
        known = () if rule is None else rule.parameters(module)
        # A weight that is computed from others, as by weight_norm, is no parameter; those others are unknown.
        known = tuple(key for key in known if _is_parameter(module, key))
        own = [key for key, _ in module.named_parameters(recurse=False)]
        for key in dict.fromkeys((*own, *known)):
            parameter = module.get_parameter(key)
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise WatchError(
                    f"{type(module).__name__} '{module_name}' has no weights yet: call the model once before watch()."
                )
            if not parameter.numel() or (key not in known and not _may_be_a_matrix(parameter)):
                continue
            name = f"{module_name}.{key}" if module_name else key
            if key not in known:
                without_rule.setdefault(id(parameter), []).append(f"'{name}' ({type(module).__name__})")
            if id(parameter) not in found:
                found[id(parameter)] = WatchedParameter(name, parameter)
            elif name not in (found[id(parameter)].name, *found[id(parameter)].also):
                found[id(parameter)].also.append(name)
            if module not in visited:  # what stands in several places has several names, but is hooked once
                found[id(parameter)].places.append((module_name, key))
        visited.add(module)
    if selected is not None:
        found = _selected(found, selected)
    refused = [name for key in found for name in without_rule.get(key, [])]
    if refused and unknown == "refuse":
        raise WatchError(
            f"there is no rule for {', '.join(refused)}: select other layers with layers=, or leave what is "
            "unknown out with unknown='skip'."
        )
    watched = [parameter for key, parameter in found.items() if key not in without_rule]
    for parameter in watched:
        if parameter.parameter.is_complex():
            raise WatchError(
                f"'{parameter.name}' is complex, and only real parameters can be watched: leave it out with layers=."
            )
        if any(getattr(model.get_submodule(place), "scale_grad_by_freq", False) for place, _ in parameter.places):
            raise WatchError(
                f"'{parameter.name}' is an nn.Embedding with scale_grad_by_freq=True and divides its gradient by counts of the batch, "
                "so it has no group shares: leave it out with layers=."
            )
    if not watched:
        raise WatchError(
            f"{type(model).__name__} has no matrix parameter that can be watched: "
            "a model needs at least one layer with a weight matrix."
        )
    return watched


def _is_parameter(module: nn.Module, key: str) -> bool:
    path, _, own = key.rpartition(".")
    return own in module.get_submodule(path)._parameters


def _may_be_a_matrix(parameter: nn.Parameter) -> bool:
    """Whether an unknown layer's parameter has at least two dimensions that are not of size 1, unlike a bias or a token."""
    return sum(size > 1 for size in parameter.shape) >= 2


def _selected(found: dict[int, WatchedParameter], selected: Sequence[str]) -> dict[int, WatchedParameter]:
    names = [name for parameter in found.values() for name in (parameter.name, *parameter.also)]
    for pattern in selected:
        if not fnmatch.filter(names, pattern):
            raise WatchError(f"layers= names '{pattern}', but the model has no such matrix parameter.")
    return {
        key: parameter
        for key, parameter in found.items()
        if any(fnmatch.filter((parameter.name, *parameter.also), pattern) for pattern in selected)
    }
