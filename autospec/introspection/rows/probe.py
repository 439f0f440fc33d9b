"""Forward passes in which some samples are NaN, and what they tell of rows.

Each sample has a code word, the passes in which it is NaN; where the rows of a layer's input turn NaN tells whose rows they are.
All code words have the same number of ones, so the union of two of them is no code word, and a row that
mixes samples is recognised instead of being given to a third one.  Sperner's theorem makes this cheap: about
log2(samples) + 2 passes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from ..arguments import can_be_nan, instances_in, replaced, tensors_in
from ..copies import unchanged, without_validation
from ..errors import UntracedRows, WatchError
from ..layers import FunctionalUses, LayerCall, SpreadCall, layers_noted, rule_for, weights_by_layer
from ..layers.call import hold_nan, qualified_name
from .lookups import Along, Origin, Place, lookups_in, lookups_marked, origins_of

# Characters of another error that a sentence quotes.
LONGEST_QUOTED = 160
# Stands for what the model returns, among places.
RETURNED: Place = ("", "")


@dataclass(frozen=True)
class Reading:
    """One way to read the inputs.

    Attributes
    ----------
    dims : tuple of int or None
        The dimension of each floating-point input that indexes samples.
    lookups : mapping of (str, str) to Along
        How lookups hold them.
    shared : tuple of int
        Which of the inputs can only be of all samples, having no dimension of their number.
    """

    dims: tuple[int | None, ...]
    lookups: Mapping[Place, Along]
    shared: tuple[int, ...] = field(default=(), compare=False)

    def shared_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """These among the model's arguments."""
        inputs = inputs_in(args, kwargs)
        return [inputs[number] for number in self.shared]

    @property
    def batch_dims(self) -> tuple[int, ...]:
        """The dimensions, of inputs and then of lookups."""
        of_lookups = dict.fromkeys(along.dim for along in self.lookups.values() if along.along_samples)
        return (*(dim for dim in self.dims if dim is not None), *of_lookups)


def inputs_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The floating-point tensors among the model's arguments, complex ones too."""
    return [t for t in tensors_in((args, kwargs)) if can_be_nan(t)]


def code_words(count: int) -> np.ndarray:
    """Distinct binary words of equal weight.

    Parameters
    ----------
    count : int
        How many words are needed.

    Returns
    -------
    ndarray of bool, shape (length, count)
        ``words[b, i]``: whether sample i is marked in pass b.
    """
    length = 1
    while math.comb(length, (length + 1) // 2) < count:
        length += 1
    words = np.zeros((length, count), dtype=bool)
    choices = itertools.combinations(range(length), (length + 1) // 2)
    for sample, ones in enumerate(itertools.islice(choices, count)):
        words[list(ones), sample] = True
    return words


def decode(patterns: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Read the samples of rows from the passes in which the rows were NaN.

    Parameters
    ----------
    patterns : ndarray of bool, shape (length, rows)
        Whether each row was NaN in each pass.
    words : ndarray of bool, shape (length, samples)
        The code words.

    Returns
    -------
    ndarray of int, shape (rows,)
        The sample of each row; -1 where a row depends on no sample, -2 where it mixes several.
    """
    powers = 1 << np.arange(len(words), dtype=np.int64)
    sample_of_code = {int(code): sample for sample, code in enumerate(powers @ words)}
    sample_of_code[0] = -1
    return np.array([sample_of_code.get(int(code), -2) for code in powers @ patterns], dtype=np.int64)


@dataclass(frozen=True)
class OwnUses:
    """Which weights a model uses itself, outside of a layer's rule.

    Attributes
    ----------
    places : frozenset of (str, str)
        All of them.
    spread : frozenset of (str, str)
        Those that meet data elementwise.
    followed : frozenset of (str, str)
        Those of layers that are applied to what all samples share, such as positions: what they return is followed until it meets data.
    states : bool
        Whether what is made of nothing, or held in a buffer, is data where it has a dimension of the number of samples and is
        multiplied with a weight, as a state is.
    took_states : bool
        Whether there was any.
    """

    places: frozenset[Place] = frozenset()
    spread: frozenset[Place] = frozenset()
    followed: frozenset[Place] = frozenset()
    states: bool = True
    took_states: bool = False


def weights_at(model: nn.Module, places: Collection[Place]) -> dict[nn.Parameter, Place]:
    """Parameters with their places; of several places of one the first in the alphabet."""
    return {model.get_submodule(name).get_parameter(key): (name, key) for name, key in sorted(places, reverse=True)}


@dataclass(frozen=True, eq=False)
class Probe:
    """A copy of a model, the batch it is called with, and one way to read that.

    Attributes
    ----------
    twin : nn.Module
        The copy.
    args, kwargs
        What it is called with.
    inputs : sequence of Tensor
        The floating-point tensors among them, complex ones too.
    reading : Reading
        Where these hold the samples.
    watched : collection of (str, str)
        Module and parameter names of the matrices that are watched.
    uses : OwnUses
        Those that the model uses itself.
    origins : mapping of (str, str) to list of Origin
        From which entries of the inputs the indices of lookups come, where these are followed.
    as_given : set of (str, str)
        Lookups whose indices are inputs as they were given.
    plain_attention : bool
        Whether attention is computed step by step, which takes room, instead of by kernels that give zeros for a query that is NaN.
    shapes : dict of (str, str) to list of tuple of int
        Shapes of what each use of each watched matrix received in the last pass.
    unreached : dict of ((str, str), int) to Tensor
        What a use received, by its number, where no NaN was in it.
    constant : dict of (str, str) to bool
        Matrices of which a use received rows none of which a sample reaches, but whose samples `rows` has found by what they reach; and
        whether they were the same for all samples, as what is spread over the batch.
    untraced : set of (str, str)
        Matrices of which a use received such rows, whose samples it has not found.
    """

    twin: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Sequence[Tensor]
    reading: Reading
    watched: Collection[Place]
    uses: OwnUses
    origins: Mapping[Place, list[Origin]]
    as_given: set[Place]
    plain_attention: bool = False
    shapes: dict[Place, list[tuple[int, ...]]] = field(default_factory=dict)
    unreached: dict[tuple[Place, int], Tensor] = field(default_factory=dict)
    constant: dict[Place, bool] = field(default_factory=dict)
    untraced: set[Place] = field(default_factory=set)

    def anew(self, **changes: Any) -> Probe:
        """The same with some changes, which has seen nothing."""
        return replace(self, shapes={}, unreached={}, constant={}, untraced=set(), **changes)

    def given(self, others: Mapping[int, Tensor | np.ndarray], samples: int) -> Probe:
        """The same with other tensors in place of some, by their identities; raise WatchError if lookups get them otherwise."""
        args, kwargs = replaced(self.args, others), replaced(self.kwargs, others)

        def forward() -> None:
            with unchanged(self.twin):
                self.twin(*args, **kwargs)

        try:
            lookups = lookups_in(self.twin, args, kwargs, forward)
        except Exception as error:
            raise WatchError("the model failed on other numbers.") from error
        if self.as_given != {place for place, lookup in lookups.items() if lookup.given}:
            raise WatchError("the model brings other numbers to its lookups in another way.")
        origins = origins_of(self.twin, args, kwargs, samples, self.origins)
        return self.anew(args=args, kwargs=kwargs, origins=origins)

    def reached(
        self, word: np.ndarray, begun: tuple[Place, int, np.ndarray] | None = None
    ) -> dict[Place, list[np.ndarray]]:
        """Where NaN comes, as for `_nan_rows`, in a forward pass in which the samples of a word are NaN.

        Or, with the place and the number of one use and a mask, these rows of its output.
        """
        marked: dict[int, Tensor | np.ndarray] = {}
        packed = {id(each.data): each for each in instances_in((self.args, self.kwargs), PackedSequence)}
        for tensor, dim in zip(self.inputs, self.reading.dims, strict=True):
            marked[id(tensor)] = data = finite(tensor.detach())
            if dim is not None:
                marks = word[_samples_of_packed(packed[id(tensor)])] if id(tensor) in packed else word
                chosen = torch.from_numpy(np.flatnonzero(marks)).to(tensor.device)
                data.index_fill_(dim, chosen, complex(math.nan, math.nan) if data.is_complex() else math.nan)
        args, kwargs = replaced(self.args, marked), replaced(self.kwargs, marked)
        looked_up = lookups_marked(self.twin, self.reading.lookups, len(word), word, self.origins)
        self.shapes.clear()
        if begun is None:
            self.unreached.clear()
        seeing = self._nan_rows(args, kwargs, len(word), begun)
        attention = sdpa_kernel(SDPBackend.MATH) if self.plain_attention else nullcontext()
        with (
            unchanged(self.twin),
            without_validation(),
            attention,
            looked_up,
            seeing as seen,
            _begun(self.twin, begun, seen),
        ):
            returned = self.twin(*args, **kwargs)
        seen[RETURNED] = [
            (hold_nan(each, each.ndim - 1) if each.ndim > 1 else each.isnan()).cpu().numpy()
            for each in tensors_in(returned)
            if can_be_nan(each)
        ]
        return seen

    @contextmanager
    def _nan_rows(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        samples: int,
        begun: tuple[Place, int, np.ndarray] | None,
    ) -> Iterator[dict[Place, list[np.ndarray]]]:
        """Collect, for each use of each watched parameter, which entries of its batch hold a NaN, its input's shape, and that without any.

        Where NaN is to begin in a use that is no layer's, it begins here.
        """
        twin, uses = self.twin, self.uses
        seen: dict[Place, list[np.ndarray]] = {}
        handles: list[RemovableHandle] = []

        def note(place: Place, call: LayerCall, parameter: str) -> None:
            marks = call.marks(parameter).cpu().numpy()
            if begun is None and not marks.any():
                given = call.inputs[0].detach()
                self.unreached[place, len(seen.get(place, ()))] = (
                    given.unsqueeze(-1) if isinstance(call, SpreadCall) else given
                )
            seen.setdefault(place, []).append(marks)
            self.shapes.setdefault(place, []).append(tuple(call.inputs[0].shape))

        def on_use(place: Place, call: LayerCall, output: Tensor) -> Tensor | None:
            note(place, call, place[1])
            if begun is None or begun[:2] != (place, len(seen[place]) - 1):
                return None
            output = output.detach().clone()
            entries = call.entries(place[1], output)
            if entries.untyped_storage().data_ptr() != output.untyped_storage().data_ptr():
                raise WatchError("only what is a view of an output can be made NaN.")
            entries[torch.from_numpy(begun[2]).to(output.device)] = math.nan
            return output

        weights = weights_at(twin, uses.places)
        followed = weights_at(twin, uses.followed)
        mode = (
            FunctionalUses(twin, weights, samples, uses.states, on_use, lambda *_: None, followed) if weights else None
        )
        if mode is not None:
            mode.receive((args, kwargs), self.reading.shared_inputs(args, kwargs))
            handles += layers_noted(weights_by_layer(twin, set(map(id, weights))), lambda: mode.within)
        for name, module in twin.named_modules():
            rule = rule_for(module)
            if rule is None:
                continue

            def on_call(call: LayerCall, name: str = name) -> None:
                if not torch.is_grad_enabled():  # such a call is none in training
                    return
                for parameter in call.parameters:
                    if (name, parameter) in self.watched and (name, parameter) not in uses.followed:
                        note((name, parameter), call, parameter)

            handles += rule.attach(module, on_call)
        try:
            with mode or nullcontext():
                yield seen
        finally:
            for handle in handles:
                handle.remove()

    def rows(self, words: np.ndarray) -> dict[Place, list[np.ndarray]]:
        """Sample of each row, in every use of every watched matrix; raise WatchError if a row is not one sample's."""
        passes = []
        for word in words:
            try:
                passes.append(self.reached(word))
            except Exception as error:
                raise WatchError(
                    f"the model failed on a batch in which some samples are NaN ({said(error)}), so the rows of its layers could not be "
                    "traced to samples: give rows= for every watched layer, or let it accept NaN."
                ) from error
        found: dict[Place, list[np.ndarray]] = {}
        for key in dict.fromkeys(itertools.chain(*passes)):
            if len({tuple(marks.shape for marks in seen.get(key, ())) for seen in passes}) > 1:
                if key == RETURNED:
                    continue
                raise WatchError(
                    f"How many rows '{key[0] or key[1]}' receives depends on the numbers in the batch, as where samples are sent to "
                    "experts, or is drawn at random: leave it out with layers=."
                )
            found[key] = []
            for call, marks in enumerate(passes[0][key]):
                patterns = np.stack([seen[key][call] for seen in passes])
                decoded = decode(patterns.reshape(len(words), -1), words).reshape(marks.shape)
                found[key].append(_filled(decoded, patterns, words))
                if key != RETURNED and (found[key][-1] == -2).any():
                    raise UntracedRows(f"Rows of the input of '{key[0] or key[1]}' mix several samples.")
        unknown = [(key, call) for key, calls in found.items() for call, of in enumerate(calls) if (of == -1).any()]
        refusal: UntracedRows | None = None
        for key, call in unknown:
            if key == RETURNED:
                continue
            none = bool((found[key][call] == -1).all())
            try:
                found[key][call] = self._by_what_they_reach(key, call, found, words)
            except UntracedRows as error:
                refusal = refusal or error
                self.untraced.update([key] if none else ())
            else:
                if none:
                    self.constant[key] = self.constant.get(key, True) and self._same_for_all(key, call, words.shape[1])
        if refusal is not None:
            raise refusal
        alike: dict[bytes, np.ndarray] = {}  # most layers have the same rows
        return {
            key: [alike.setdefault(of.tobytes(), of.reshape(-1)) for of in calls]
            for key, calls in found.items()
            if key != RETURNED
        }

    def _by_what_they_reach(
        self, place: Place, call: int, found: Mapping[Place, list[np.ndarray]], words: np.ndarray
    ) -> np.ndarray:
        """Give rows of one use that no sample reaches, such as a first state of zeros, to the samples that they reach.

        NaN that begins at the output of row i, or of as many rows for each i, has to come to sample i and to no other.
        """
        samples = found[place][call]
        unknown = samples == -1
        for expected in _in_order(samples.shape, words.shape[1]):
            reached = np.zeros(words.shape[1], dtype=bool)
            fits = (unknown | (samples == expected)).all() and all(
                self._reaches((place, call, unknown & word[expected]), found, word, reached) for word in words
            )
            if fits and reached[expected[unknown]].all():
                return expected
        if place in self.uses.places:
            raise UntracedRows(
                f"Rows of '{qualified_name(place)}' are given to samples, as by a lookup or expand(), but which sample gets which cannot "
                "be told."
            )
        raise UntracedRows(
            f"Rows of the input of '{place[0] or place[1]}' belong to no sample: NaN of none reaches them, as where "
            "they are made of whole numbers or of weights alone, or NaN is replaced, and what they reach does not tell either."
        )

    def _same_for_all(self, place: Place, call: int, samples: int) -> bool:
        """Whether one use received the same rows for each sample, but not all the same, so along one dimension of that size alone.

        Or zeros, as a first state is.
        """
        given = self.unreached[place, call]
        if not given.any():
            return True
        sizes = list(enumerate(given.shape[:-1]))
        alike = [dim for dim, _ in sizes if torch.equal(given, given.narrow(dim, 0, 1).expand_as(given))]
        return len(alike) < len(sizes) and [given.shape[dim] for dim in alike if given.shape[dim] > 1] == [samples]

    def _reaches(
        self,
        begun: tuple[Place, int, np.ndarray],
        found: Mapping[Place, list[np.ndarray]],
        word: np.ndarray,
        reached: np.ndarray,
    ) -> bool:
        """Whether NaN that begins in a use comes to samples of a word alone; notes which it comes to."""
        try:
            seen = self.reached(np.zeros_like(word), begun)
        except Exception:
            return False
        for key, calls in found.items():
            if [marks.shape for marks in seen.get(key, ())] != [samples.shape for samples in calls]:
                return False
            for samples, marks in zip(calls, seen[key], strict=True):
                come_to = samples[marks & (samples >= 0)]
                if not word[come_to].all():
                    return False
                reached[come_to] = True
        return True


def _in_order(shape: tuple[int, ...], samples: int) -> Iterator[np.ndarray]:
    """Ways in which entries of that shape may lie sample by sample, or have one after the other of each."""
    for axis, size in enumerate(shape):
        for repeated in (np.repeat, np.tile)[: 1 if size == samples else 2] if size and size % samples == 0 else ():
            along = repeated(np.arange(samples), size // samples)
            yield np.broadcast_to(along.reshape([-1 if other == axis else 1 for other in range(len(shape))]), shape)


@contextmanager
def _begun(
    twin: nn.Module, begun: tuple[Place, int, np.ndarray] | None, seen: Mapping[Place, list[np.ndarray]]
) -> Iterator[None]:
    """Make rows of the output of one use of a layer NaN; uses are counted by what `Probe._nan_rows` has seen."""
    if begun is None:
        yield
        return
    place, number, mask = begun
    first = 0
    module = twin.get_submodule(place[0])
    if rule_for(module) is None:
        yield
        return
    if isinstance(module, nn.MultiheadAttention) and module.batch_first and mask.ndim == 2:
        mask = mask.T  # its rule sees time first
    if isinstance(module, nn.RNNBase) and not module.batch_first:
        mask = mask[None]  # its rule sees sequences

    def count(*_: Any) -> None:
        nonlocal first
        first = len(seen.get(place, ()))

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if not first <= number < len(seen.get(place, ())):
            return None
        # An attention returns its weights, too.
        rows, *others = output if isinstance(output, tuple) else (output,)
        marks: np.ndarray = mask
        if isinstance(module, nn.MultiheadAttention) and mask.ndim == 2:
            tokens = 1 if module.batch_first else 0
            if mask.shape[tokens] != rows.shape[tokens]:  # each query of a sample meets each of its keys and values
                marks = np.any(mask, axis=tokens, keepdims=True)
        if not isinstance(rows, Tensor) or any(
            size not in (1, there) for size, there in zip(marks.shape, rows.shape, strict=False)
        ):
            raise WatchError("only rows of an output can be made NaN.")
        rest = [1] * (rows.ndim - marks.ndim)
        rows = rows.masked_fill(torch.from_numpy(marks).to(rows.device).view(*marks.shape, *rest), math.nan)
        return (rows, *others) if isinstance(output, tuple) else rows

    handles = [module.register_forward_pre_hook(count), module.register_forward_hook(hook)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _filled(samples: np.ndarray, patterns: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Give rows that depend on no sample to the sample of their slice; such as a learned token put before each sequence.

    Or on none in some passes, such as tokens of which some are masked at random; or windows that are filled up at the edge of a
    picture.  This needs one dimension along which slice i, or the i-th slices of as many, holds rows of no other sample than i,
    and in each pass in which sample i is marked a row that shows it.
    """
    unknown = samples < 0
    count = words.shape[1]
    if not unknown.any() or unknown.all():
        return samples
    for dim, size in enumerate(samples.shape):
        if size % count or (samples.ndim == 1 and size == count):
            continue
        if size > count:
            apart = (*samples.shape[:dim], count, size // count, *samples.shape[dim + 1 :])
            found = _filled(samples.reshape(apart), patterns.reshape(len(words), *apart), words)
            if (found >= 0).all():
                return found.reshape(samples.shape)
            continue
        shape = [count if axis == dim else 1 for axis in range(samples.ndim)]
        expected = np.arange(count).reshape(shape)
        others = tuple(axis + 1 for axis in range(samples.ndim) if axis != dim)
        of_another = (patterns & ~words.reshape(len(words), *shape)).any(0)
        known = (samples == expected) | (unknown & ~of_another)
        if known.all() and np.array_equal(patterns.any(axis=others), words):
            return np.where(unknown, expected, samples)
    return samples


def sequences_in(packed: PackedSequence) -> int:
    """How many sequences are packed together."""
    return int(packed.batch_sizes[0])


def _samples_of_packed(packed: PackedSequence) -> np.ndarray:
    """The sample of each row of its data: rows lie time first, longer sequences before shorter ones."""
    order = np.arange(sequences_in(packed))
    if packed.sorted_indices is not None:
        order = packed.sorted_indices.cpu().numpy()
    return np.concatenate([order[:count] for count in packed.batch_sizes.tolist()])


def said(error: Exception) -> str:
    """What an error is and says, on one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:LONGEST_QUOTED].rstrip(": ")


def finite(tensor: Tensor) -> Tensor:
    """Copy with zeros where it was not finite: NaN must mean a marked sample and nothing else."""
    return torch.where(torch.isfinite(tensor), tensor, 0) if can_be_nan(tensor) else tensor.clone()
