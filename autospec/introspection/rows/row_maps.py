"""Whose rows are whose in the batches that a model is called with: each kind of batch is traced once."""

from __future__ import annotations

import warnings
from collections.abc import Set as AbstractSet
from typing import Any

from torch import nn

from ..arguments import as_array, content_of, signature_of, whole_numbers
from .lookups import Place
from .tracing import RowMap, map_rows

# Row maps of batches of different shapes, before the oldest are given up.
ROW_MAPS_KEPT = 512
# Batches that differ in plain numbers alone and are traced before it is said how to spare that.
NUMBERS_TRACED = 10


class RowMaps:
    """The row maps of the batches that a model has been called with.

    Parameters
    ----------
    model : nn.Module
        The model.
    batch_dim : int or None
        The dimension that indexes samples, where the user gave it.
    """

    def __init__(self, model: nn.Module, batch_dim: int | None) -> None:
        self._model, self._batch_dim = model, batch_dim
        self._sorts = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._maps: dict[Any, RowMap] = {}
        self._forms: dict[Any, set[Any]] = {}
        self._by_content: dict[Any, tuple[int, ...]] = {}
        self._certain: RowMap | None = None

    @property
    def shared_inputs(self) -> frozenset[int]:
        """Numbers of the floating-point inputs that hold no samples, as the last batch was read whose rows were traced."""
        dims = list(self._maps.values())[-1].reading.dims if self._maps else ()
        return frozenset(number for number, dim in enumerate(dims) if dim is None)

    def of_batch(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        samples: int,
        watched: AbstractSet[Place],
        again: bool = False,
        all_hooks: bool = False,
    ) -> tuple[RowMap, bool]:
        """The map of a batch, and whether it has been traced now.

        Parameters
        ----------
        args, kwargs, samples, watched, all_hooks
            As for `map_rows`.
        again : bool
            Trace such a batch even if one has been traced before.

        Raises
        ------
        WatchError
            As for `map_rows`.
        """
        signature = self._signature(args, kwargs, samples, watched)
        if len(self._maps) > ROW_MAPS_KEPT:
            del self._maps[next(iter(self._maps))]
            self._forms.clear()
        content = self._content(signature, args, kwargs)
        if not again and (signature, content) in self._maps:
            return self._maps[signature, content], False
        self._count_numbers((samples, signature_of((args, kwargs), self._sorts, samples, numbers=False)), signature)
        found = map_rows(self._model, args, kwargs, samples, watched, self._batch_dim, all_hooks, self._certain)
        self._certain = found if found.certain else self._certain
        self._drop_what_was_misread(found)
        if found.by_content:  # what one batch does not show, another has shown
            self._by_content[signature] = tuple(sorted({*self._by_content.get(signature, ()), *found.by_content}))
        self._maps[signature, self._content(signature, args, kwargs)] = found
        return found, True

    def note_all_content(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int, watched: AbstractSet[Place]
    ) -> None:
        """From now on rows of such a batch are known for what all its whole numbers hold."""
        signature = self._signature(args, kwargs, samples, watched)
        self._by_content[signature] = tuple(range(len(whole_numbers(args, kwargs))))

    def _drop_what_was_misread(self, found: RowMap) -> None:
        """Forget maps in which an input holds samples that, as a batch of another size shows, all samples share."""
        wrong = {
            key: dims
            for key, each in self._maps.items()
            if len(dims := each.reading.dims) == len(found.reading.dims)
            and any(dims[number] is not None for number in found.reading.shared)
        }
        for key in wrong:
            del self._maps[key]
        if wrong:
            sizes = sorted({signature[0] for signature, _ in wrong})
            warnings.warn(
                f"an input that all samples share was taken for one of the samples in batches of {', '.join(map(str, sizes))}, which have as "
                "many: what was recorded of these is wrong. Begin with a batch of another size, or leave out the layers that it enters.",
                stacklevel=2,
            )

    def _count_numbers(self, form: Any, signature: Any) -> None:
        """Say, once, how to spare that rows are traced anew at each step because a number that counts steps is another one."""
        seen = self._forms.setdefault(form, set())
        if signature in seen or len(seen) == NUMBERS_TRACED:
            return
        seen.add(signature)
        if len(seen) == NUMBERS_TRACED:
            warnings.warn(
                f"rows were traced {NUMBERS_TRACED} times for batches of one form, because a whole number or a text among the "
                "model's arguments was another one each time, and might decide where rows lie: where it does not, as with the "
                "number of a step or the name of a file, give a number as a float, or keep it in an attribute of the model's "
                "(said once).",
                stacklevel=2,
            )

    def _signature(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int, watched: AbstractSet[Place]
    ) -> tuple[Any, ...]:
        """What batches have in common whose rows may be traced once."""
        return samples, signature_of((args, kwargs), self._sorts, samples), frozenset(watched)

    def _content(self, signature: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What the inputs contain that the rows go by, as far as is known of inputs of this kind."""
        chosen = self._by_content.get(signature, ())
        numbers = whole_numbers(args, kwargs) if chosen else []
        return tuple((i, content_of(as_array(numbers[i]))) for i in chosen)
