"""Which parameters of a model are watched, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .errors import WatchError
from .layers import FAMILIES, NO_MATRIX, forward_replaced, rule_for


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
    functional : bool
        Whether a module holds it that has no rule, so that it is seen where the model multiplies it with data.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name = name
        self.parameter = parameter
        self.also: list[str] = []
        self.places: list[tuple[str, str]] = []
        self.functional = False
        self.shape: tuple[int, int] = (parameter.shape[0], parameter[0].numel())


def find_parameters(model: nn.Module, selected: Sequence[str] | None, unknown: str) -> list[WatchedParameter]:
    """List the matrices of a model that can be watched, or may turn out to be where the model uses them.

    Parameters
    ----------
    model : nn.Module
        The model.
    selected : sequence of str, optional
        Names or patterns; with ``!`` before it what is left out.  Every matrix by default.
    unknown : {"refuse", "skip"}
        Whether to leave out matrices of layers that have no rule.

    Raises
    ------
    WatchError
        If a name fits nothing, or nothing remains.
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
            if unknown == "refuse" and any(map(_may_be_a_matrix, module.parameters())):
                raise WatchError(
                    f"{f'{module_name!r}' if module_name else 'the model'} is TorchScript, whose layers cannot be watched: watch "
                    "the model that it was made of, or leave it out with unknown='skip'."
                )
            continue
        rule = rule_for(module)
        known = () if rule is None else rule.parameters(module)
        # A weight that is computed from others, as by weight_norm, is no parameter; those others are no layer's.
        known = tuple(key for key in known if _is_parameter(module, key))
        own = [key for key, _ in module.named_parameters(recurse=False)]
        for key in dict.fromkeys((*own, *known)):
            parameter = module.get_parameter(key)
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise WatchError(
                    f"{type(module).__name__} '{module_name}' has no weights yet: call the model once before watch()."
                )
            learns = key in known or parameter.requires_grad  # sines of positions in a parameter do not
            if not parameter.numel() or not learns or (key not in known and not _may_be_a_matrix(parameter)):
                continue
            name = f"{module_name}.{key}" if module_name else key
            if key not in known:
                without_rule.setdefault(id(parameter), []).append(f"'{name}' ({_kind(module)})")
            if id(parameter) not in found:
                found[id(parameter)] = WatchedParameter(name, parameter)
            elif name not in (found[id(parameter)].name, *found[id(parameter)].also):
                found[id(parameter)].also.append(name)
            found[id(parameter)].functional |= key not in known
            if module not in visited:  # what stands in several places has several names, but is hooked once
                found[id(parameter)].places.append((module_name, key))
        visited.add(module)
    if selected is not None:
        found = _selected(found, selected)
    refused = [name for key in found for name in without_rule.get(key, [])]
    watched = [parameter for key, parameter in found.items() if unknown == "refuse" or key not in without_rule]
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
        there = "a model needs at least one layer with a weight matrix."
        raise WatchError(
            f"{type(model).__name__} has no matrix parameter that can be watched: "
            + (f"there is no rule for {', '.join(refused)}, which unknown='skip' leaves out." if refused else there)
        )
    return watched


def _is_parameter(module: nn.Module, key: str) -> bool:
    path, _, own = key.rpartition(".")
    return own in module.get_submodule(path)._parameters


def _kind(module: nn.Module) -> str:
    """Class of a layer without a rule, and why there is none where the name does not tell."""
    kind: Any = type(module)
    family = next((each for each in kind.__mro__ if each in FAMILIES), None)
    if family is None:  # there are other classes of the name Linear
        same_name = getattr(nn, kind.__name__, kind) is not kind
        return f"{kind.__module__}.{kind.__name__}" if same_name else kind.__name__
    same = all(
        getattr(kind, key) is getattr(family, key) for key in ("forward", "_conv_forward") if hasattr(family, key)
    )
    own = "" if same and not forward_replaced(module) else " with a forward pass of its own"
    return f"{kind.__name__}, an nn.{family.__name__}{own}" if kind is not family else f"{kind.__name__}{own}"


def _may_be_a_matrix(parameter: nn.Parameter) -> bool:
    """Whether an unknown layer's parameter has more than one row and one column, unlike a bias, a token, or one of positions."""
    return parameter.ndim > 1 and parameter.shape[0] > 1 and parameter[0].numel() > 1


def _selected(found: dict[int, WatchedParameter], selected: Sequence[str]) -> dict[int, WatchedParameter]:
    chosen: dict[str, set[int]] = {}
    for pattern in selected:
        wanted = pattern.removeprefix("!")
        chosen[pattern] = {
            key
            for key, parameter in found.items()
            if any(name == wanted or fnmatch.fnmatch(name, wanted) for name in (parameter.name, *parameter.also))
        }
        if not chosen[pattern]:
            raise WatchError(f"layers= names '{wanted}', but the model has no such matrix parameter.")
    left_out = set().union(*(keys for pattern, keys in chosen.items() if pattern.startswith("!")))
    named = [keys for pattern, keys in chosen.items() if not pattern.startswith("!")]
    kept = set().union(*named) if named else set(found)
    return {key: parameter for key, parameter in found.items() if key in kept - left_out}
