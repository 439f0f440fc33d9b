"""The copy of a model that is probed: it runs, and tells which weights the model uses itself."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..copies import copy_model, unchanged
from ..errors import FailedCopy, WatchError
from ..hooks import Hook
from ..layers import FunctionalUses, LayerCall, SpreadCall, layers_noted, weights_by_layer
from ..layers.call import qualified_name
from .lookups import Indices, Place, lookups_in
from .probe import OwnUses, finite, said, weights_at


@dataclass(frozen=True)
class Way:
    """A way to trace rows.

    Attributes
    ----------
    followed, states
        As for `OwnUses`.
    shared : frozenset of int
        Numbers of inputs that are taken to be of all samples, though they have a dimension of their number.
    """

    followed: frozenset[Place] = frozenset()
    states: bool = True
    shared: frozenset[int] = frozenset()


def _twin(model: nn.Module, all_hooks: bool = False) -> nn.Module:
    """A copy in evaluation mode, all of whose weights are finite: a diverged model's rows can be traced all the same.

    Hooks stay behind, unless they are asked for or are the model's own: they act on what is outside, where a feature extractor's
    list would receive the copy's activations.
    """
    own = set(model.modules())
    try:
        twin = copy_model(model, lambda hook: all_hooks or _is_part_of(own, hook))
    except Exception as error:
        raise WatchError(
            f"the model cannot be copied to find which rows belong to which sample ({error}): give rows=."
        ) from error
    twin.eval()
    with torch.no_grad():
        for tensor in itertools.chain(twin.parameters(), twin.buffers()):
            if tensor.layout == torch.strided and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                tensor.copy_(finite(tensor))
    return twin


def running_twin(
    model: nn.Module,
    copied: set[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shared: Sequence[Tensor],
    samples: int,
    watched: Collection[Place],
    all_hooks: bool,
    way: Way,
) -> tuple[nn.Module, dict[Place, Indices], OwnUses, bool]:
    """A copy that runs, what it looks up in tables, which weights it uses itself, and whether it has all hooks.

    Gradients are enabled, so that what a model does without them can be told apart, but the copy's weights need none, which
    spares the graph.  If that fails, as where a model asks for a gradient in its forward pass, or lacks a hook that brings its
    input into form, it is tried as it trains; raises FailedCopy if that fails, too.
    """
    for hooks, learns in dict.fromkeys([(all_hooks, False), (all_hooks, True), (True, True)]):
        twin = _twin(model, hooks)
        copied.update(twin.modules())
        if not learns:
            for parameter in twin.parameters():
                if parameter.is_leaf:  # those of a copied TorchScript part are none
                    parameter.requires_grad_(False)
        try:
            uses = _Uses(twin, samples, watched, way)
            passed = functools.partial(uses.find, args, kwargs, shared)
            lookups = lookups_in(twin, args, kwargs, passed, uses.mode.is_constant)
            spread = frozenset(place for place, elementwise in uses.found.items() if elementwise)
            took_states = uses.mode.took_states
            return twin, lookups, OwnUses(frozenset(uses.found), spread, way.followed, way.states, took_states), hooks
        except WatchError:
            raise
        except Exception as error:
            if hooks and learns:
                raise FailedCopy(
                    f"the model failed in evaluation mode, in which rows are traced to samples ({said(error)}): let it accept in "
                    "that mode what it is trained with, or give rows= for every watched layer."
                ) from error
    raise AssertionError("unreachable")


def fix_statistics(twin: nn.Module) -> None:
    """Have normalisation of the batch that keeps no running statistics use fixed ones in evaluation mode, as other does."""
    some = next(twin.parameters())
    for module in twin.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None and module.running_var is None:
            like = some if module.weight is None else module.weight
            module.running_mean, module.running_var = (like.new_full((module.num_features,), v) for v in (0.0, 1.0))


def _is_part_of(modules: Collection[nn.Module], hook: Callable) -> bool:
    """Whether a hook is torch's, as for weight normalisation or pruning, or a method of one of a model's modules.

    Or the watcher's, which does nothing in a copy, but shows torch.compile that there are hooks.
    """
    of = getattr(hook, "__self__", None)
    torchs = type(hook).__module__.startswith("torch.")
    watchers = isinstance(hook, Hook) or isinstance(of, nullcontext)  # what is left of it where it was pickled
    return torchs or watchers or (isinstance(of, nn.Module) and of in modules)


def modules_with_other_hooks(model: nn.Module) -> Iterator[str]:
    """Modules with hooks that act on what is outside of the model."""
    own = set(model.modules())
    for name, module in model.named_modules():
        hooks = itertools.chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
        if any(not _is_part_of(own, hook) for hook in hooks):
            yield name


class _Uses:
    """Finds which weights a model itself uses, and whether elementwise.

    Within a layer that has a rule its own weights may meet data, those of another, as a decoder's that is the encoder's transposed,
    may do so in what can be watched.
    """

    def __init__(self, twin: nn.Module, samples: int, watched: Collection[Place], way: Way) -> None:
        self.twin = twin
        self.found: dict[Place, bool] = {}
        self._refused: dict[Place, str] = {}
        weights, followed = weights_at(twin, watched), weights_at(twin, way.followed)
        refuse = self._refused.setdefault
        self.mode = FunctionalUses(twin, weights, samples, way.states, self._on_call, refuse, followed, compare=True)

    def _on_call(self, place: Place, call: LayerCall, _: Tensor) -> None:
        self.found[place] = self.found.get(place, False) or isinstance(call, SpreadCall)

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any], shared: Sequence[Tensor]) -> None:
        """Make a forward pass; refuse what cannot be watched."""
        handles = layers_noted(weights_by_layer(self.twin), lambda: self.mode.within)
        self.mode.receive((args, kwargs), shared)
        try:
            with unchanged(self.twin), self.mode:
                self.twin(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if self._refused:
            raise refused_uses(self._refused)


def refused_uses(refused: Mapping[Place, str]) -> WatchError:
    """What is said of weights that meet data in functions in which they cannot be watched."""
    names = {qualified_name(place): of for place, of in refused.items()}
    uses = ", and ".join(f"'{name}' in {of}()" for name, of in names.items())
    return WatchError(
        f"the model uses {uses}, where it cannot be watched in that form: outside of torch's layers products and convolutions of data "
        "with a weight can be, or with what is computed of weights and constants alone, and sums and products number by number. Call a "
        "layer instead, detach the weight where nothing is learned of it, or leave it out with "
        f"layers={[f'!{name}' for name in names]}."
    )
