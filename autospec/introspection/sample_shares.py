"""Every sample's own share of the gradient of every watched parameter, and weighted sums of the shares.

A permutation test asks for the shares of thousands of groups at one step.  They are sums over samples, so each sample's
share is kept, as a matrix or as its factors, and the groups' shares are products with a matrix of weights.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import as_array
from .audit import GUARD_TOLERANCE, deviation_of_sum, rounding_of_sum
from .capture import Capture
from .copies import copy_model, kept_apart
from .errors import NoSamples, WatchError
from .factors import Factors, Lookup, Product
from .gathering import Gathering
from .generators import generators_kept
from .groups import Assignment, Groups
from .parameters import find_parameters
from .pending import Pending
from .sorting import Sorting
from .spectra import BLOCKS, CANCELLED, SMALLEST_IN_BLOCKS, float64, smaller_gram
from .uses import WatchedLayer
from .workspace import Workspace

# Numbers formed at a time by `group_sums`; and of groups' inner products on the processor, about what its cache holds.
CHUNK, IN_CACHE = 2**22, 2**19
# Groups with more rows than this part of all, and narrow factors, are summed with weights, which spares the copy of rows.
MANY_ROWS = 0.75
FEW_COLUMNS = 32


class SampleShares(ABC):
    r"""The share of every sample in the gradient of one parameter.

    Attributes
    ----------
    shape : (int, int)
        Shape of a share.
    rows : ndarray of int, shape (samples,)
        Rows that each sample contributed.
    dtype : torch.dtype
        The type in which the model computed.
    computed : bool
        Whether the weight is computed of the parameter, which may raise the rank of a share above the number of rows.
    """

    shape: tuple[int, int]
    rows: np.ndarray
    dtype: torch.dtype
    computed: bool = False

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.rows)

    @property
    def ranks(self) -> np.ndarray:
        """How large the rank of each sample's share can be at most, shape (samples,); of a sum of shares, the sum of these."""
        return np.where(self.rows > 0, min(self.shape), 0) if self.computed else self.rows

    @abstractmethod
    def weighted_sums(self, weights: Tensor) -> Tensor:
        r"""Compute :math:`\sum_i w_{bi} G_i` for each row of weights.

        Parameters
        ----------
        weights : Tensor
            Shape (B, samples), float64, on the shares' device.

        Returns
        -------
        Tensor
            Shape (B, m, n), float64.
        """

    @abstractmethod
    def of_units(self, unit: np.ndarray) -> SampleShares:
        """Add up the shares of the samples of one unit, such as a subject's sessions.

        Parameters
        ----------
        unit : ndarray of int, shape (samples,)
            Number of each sample's unit, from 0; -1 leaves the sample out.
        """

    @abstractmethod
    def reduced(self) -> SampleShares:
        """The same without directions in which every share is zero.

        Singular values and inner products of all weighted sums stay as they are; entries do not.
        """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the shares are."""

    @property
    def numbers_formed(self) -> int:
        """Numbers that `group_sums` forms for each group."""
        return max(1, self.shape[0] * self.shape[1])

    def group_sums(self, members: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
        """Sums over the members of many groups, in bounded memory.

        Parameters
        ----------
        members : ndarray of bool, shape (groups, samples)
            Who is in each group.

        Yields
        ------
        slice, Tensor
            Which groups, and their shares, shape (groups, m, n), float64.
        """
        count = max(1, CHUNK // self.numbers_formed)
        for start in range(0, len(members), count):
            part = slice(start, min(start + count, len(members)))
            yield part, self._sums(members[part])

    def _sums(self, members: np.ndarray) -> Tensor:
        return self.weighted_sums(torch.from_numpy(members.astype(np.float64)).to(self.device))

    def group_grams(self, members: np.ndarray) -> Iterator[tuple[slice, Tensor, Tensor]]:
        r"""Gram matrices of many groups' shares, on the smaller side, in bounded memory.

        Parameters
        ----------
        members : ndarray of bool, shape (groups, samples)
            Who is in each group.

        Yields
        ------
        slice, Tensor, Tensor
            Which groups; :math:`G G^\top` of their shares G, of which the lower triangle is valid; and
            :math:`G S^\top + S G^\top` with the sum S of all shares; each of shape (groups, s, s), float64.
        """
        total = self.total()
        for part, sums in self.group_sums(members):
            yield part, *_grams(sums, total)

    def total(self) -> Tensor:
        """Sum of all shares, shape (m, n), float64."""
        return self.weighted_sums(torch.ones(1, self.samples, dtype=torch.float64, device=self.device))[0]


def _grams(sums: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices of shares on the smaller side, lower triangles, and the symmetric products with their total."""
    if total.shape[0] > total.shape[1]:
        sums, total = sums.mT, total.mT
    cross = sums @ total.mT
    return smaller_gram(sums), cross + cross.mT


class StackedShares(SampleShares):
    """One matrix for each sample.

    Parameters
    ----------
    matrices : Tensor
        Shape (samples, m, n), float64.
    rows : ndarray of int, shape (samples,)
        Rows that each sample contributed.
    dtype : torch.dtype
        The type in which the model computed.
    computed : bool
        Whether the weight is computed of the parameter.
    """

    def __init__(self, matrices: Tensor, rows: np.ndarray, dtype: torch.dtype, computed: bool = False) -> None:
        self.matrices, self.rows, self.dtype, self.computed = matrices, rows, dtype, computed
        self.shape = (matrices.shape[1], matrices.shape[2])

    def weighted_sums(self, weights: Tensor) -> Tensor:  # noqa: D102
        return (weights @ self.matrices.flatten(1)).unflatten(1, self.shape)

    def of_units(self, unit: np.ndarray) -> StackedShares:  # noqa: D102
        kept = np.flatnonzero(unit >= 0)
        if np.array_equal(unit[kept], np.arange(len(kept))):
            matrices = self.matrices if len(kept) == len(unit) else self.matrices[torch.from_numpy(kept)]
        else:
            matrices = self.matrices.new_zeros(int(unit.max()) + 1, *self.shape)
            target = torch.from_numpy(unit[kept]).to(self.device)
            everyone = len(kept) == len(unit)
            matrices.index_add_(0, target, self.matrices if everyone else self.matrices[torch.from_numpy(kept)])
        rows = np.bincount(unit[kept], self.rows[kept]).astype(np.int64)
        return StackedShares(matrices, rows, self.dtype, self.computed)

    def reduced(self) -> StackedShares:
        """The same without rows and columns that are zero in every share, such as words that do not occur."""
        used = self.matrices != 0
        first, second = used.any(2).any(0), used.any(1).any(0)
        if not bool(first.any()):  # a matrix has a row and a column
            first[:1] = second[:1] = True
        if bool(first.all()) and bool(second.all()):
            return self
        return StackedShares(self.matrices[:, first][:, :, second], self.rows, self.dtype, self.computed)

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.matrices.device


class FactoredShares(SampleShares):
    r"""Shares :math:`\Delta_i^\top A_i` as their factors, for few rows a sample.

    Parameters
    ----------
    activation : Tensor
        Shape (rows, inputs), float64.
    adjoint : Tensor
        Shape (rows, outputs), float64.
    sample : ndarray of int, shape (rows,)
        Sample of each row.
    samples : int
        Number of samples.
    dtype : torch.dtype
        The type in which the model computed.
    """

    def __init__(
        self, activation: Tensor, adjoint: Tensor, sample: np.ndarray, samples: int, dtype: torch.dtype
    ) -> None:
        self.activation, self.adjoint, self.sample, self.dtype = activation, adjoint, sample, dtype
        self.shape = (adjoint.shape[1], activation.shape[1])
        self.rows = np.bincount(sample, minlength=samples)
        self._index = torch.from_numpy(sample).to(activation.device)

    def weighted_sums(self, weights: Tensor) -> Tensor:
        """Weigh the rows of the narrower factor; all products with the other one are one product."""
        narrow, wide = self._narrow_and_wide()
        weighted = weights[:, self._index].unsqueeze(1) * narrow.T.contiguous()  # (B, narrow, rows)
        return self._as_stored((weighted.flatten(0, 1) @ wide).unflatten(0, weighted.shape[:2]))

    def _sums(self, members: np.ndarray) -> Tensor:
        """Products of the rows of the members, or of the others where these are fewer."""
        narrow, wide = self._narrow_and_wide()
        if self._fewest(members) > MANY_ROWS * len(self.sample) or narrow.shape[1] <= FEW_COLUMNS:
            return super()._sums(members)
        others, index, rows = self._fewer_rows(members)
        product = rows.mT @ wide[index]
        return self._as_stored(narrow.T @ wide - product if others else product)

    def _fewest(self, members: np.ndarray) -> int:
        """Most rows that a group has, or that its others have: whichever is fewer."""
        counts = members[:, self.sample].sum(1)
        return min(int(counts.max(initial=0)), int((len(self.sample) - counts).max(initial=0)))

    def _fewer_rows(self, members: np.ndarray) -> tuple[bool, Tensor, Tensor]:
        """Rows of the members, or of the others where these are fewer.

        Returns
        -------
        bool, Tensor, Tensor
            Whether they are the others'; their numbers, shape (groups, most); the narrower factor there, zero where a
            group with fewer rows is filled up with rows that are not its own.
        """
        of_rows = members[:, self.sample]
        counts = of_rows.sum(1)
        others = bool(len(self.sample) - counts.min() < counts.max())
        if others:
            of_rows, counts = ~of_rows, len(self.sample) - counts
        most = int(counts.max())
        index = torch.from_numpy(np.argsort(~of_rows, axis=1, kind="stable")[:, :most].copy()).to(self.device)
        rows = self._narrow_and_wide()[0][index]
        if counts.min() < most:
            rows[torch.arange(most)[None] >= torch.from_numpy(counts)[:, None]] = 0
        return others, index, rows

    def group_grams(self, members: np.ndarray) -> Iterator[tuple[slice, Tensor, Tensor]]:
        r"""As of any shares; from inner products of the wider factor's rows where a group has fewer of them than columns.

        With D the group's rows of the narrower factor and A those of the wider, :math:`G G^\top = D^\top (A A^\top) D`,
        and the inner products are the same for all groups.
        """
        narrow, wide = self._narrow_and_wide()
        most = self._fewest(members)
        if narrow.shape[1] <= FEW_COLUMNS or most >= min(wide.shape[1], MANY_ROWS * len(self.sample)):
            yield from super().group_grams(members)
            return
        inner = wide @ wide.T
        total = narrow.T @ wide
        with_total = wide @ total.T
        whole = total @ total.T
        # Mean product of a row's squared norms: a share far below it has cancelled, and is formed before it is squared.
        usual = inner.trace() * narrow.square().sum() / len(narrow) ** 2
        numbers = most * (len(narrow) + most + 2 * narrow.shape[1]) + 3 * narrow.shape[1] ** 2
        count = max(1, CHUNK // numbers)
        few = max(1, IN_CACHE // numbers) if self.device.type == "cpu" else count
        for start in range(0, len(members), count):
            part = slice(start, min(start + count, len(members)))
            others, index, rows = self._fewer_rows(members[part])
            both = whole.new_empty(len(index), len(whole), 2 * len(whole))
            for some, which, out in zip(rows.split(few), index.split(few), both.split(few), strict=True):
                torch.bmm(some.mT, torch.cat([_half_of_products(inner, which, some), with_total[which]], 2), out=out)
            own, cross = (each + each.mT for each in both.split(len(whole), 2))
            if not bool((own.diagonal(dim1=1, dim2=2).sum(1) > CANCELLED**2 * usual * index.shape[1]).all()):
                yield part, *_grams(self._sums(members[part]), self.total())
                continue
            yield (part, whole - cross + own, 2 * whole - cross) if others else (part, own, cross)

    def _narrow_and_wide(self) -> tuple[Tensor, Tensor]:
        """The factor with fewer columns, and the other one."""
        return (self.adjoint, self.activation) if self.shape[0] <= self.shape[1] else (self.activation, self.adjoint)

    def _as_stored(self, products: Tensor) -> Tensor:
        return products if self.shape[0] <= self.shape[1] else products.mT

    def of_units(self, unit: np.ndarray) -> FactoredShares:  # noqa: D102
        units = unit[self.sample]
        kept = torch.from_numpy(np.flatnonzero(units >= 0)).to(self.device)
        return FactoredShares(
            self.activation[kept], self.adjoint[kept], units[units >= 0], int(unit.max()) + 1, self.dtype
        )

    def reduced(self) -> FactoredShares:
        """The same without columns of zeros, and with few rows of a factor in a basis of the space that they span.

        A unit that is off for every sample has a column of zeros in both layers beside it.
        """
        activation, adjoint = (_reduced(side) for side in (self.activation, self.adjoint))
        return FactoredShares(activation, adjoint, self.sample, self.samples, self.dtype)

    def stacked(self) -> StackedShares:
        """One matrix for each sample."""
        order = np.argsort(self.sample, kind="stable")
        index = torch.from_numpy(order).to(self.device)
        counts = self.rows.tolist()
        matrices = self.activation.new_zeros(self.samples, *self.shape)
        parts = zip(self.adjoint[index].split(counts), self.activation[index].split(counts), matrices, strict=True)
        for adjoint, activation, matrix in parts:
            torch.mm(adjoint.T, activation, out=matrix)
        return StackedShares(matrices, self.rows, self.dtype)

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.activation.device

    @property
    def numbers_formed(self) -> int:  # noqa: D102
        return max(1, (len(self.sample) + min(self.shape)) * sum(self.shape))


class LookedUpShares(SampleShares):
    """Shares in a table of which some rows are looked up: zero in all others.

    Parameters
    ----------
    of_used : StackedShares
        The shares in the rows that are looked up, each of shape (used, width).
    used : Tensor of int, shape (used,)
        Which rows of the table these are.
    size : int
        Rows of the table.
    """

    def __init__(self, of_used: StackedShares, used: Tensor, size: int) -> None:
        self.of_used, self.used = of_used, used
        self.rows, self.dtype = of_used.rows, of_used.dtype
        self.shape = (size, of_used.shape[1])

    def weighted_sums(self, weights: Tensor) -> Tensor:  # noqa: D102
        sums = self.of_used.weighted_sums(weights)
        return sums.new_zeros(len(sums), *self.shape).index_copy_(1, self.used, sums)

    def of_units(self, unit: np.ndarray) -> LookedUpShares:  # noqa: D102
        return LookedUpShares(self.of_used.of_units(unit), self.used, self.shape[0])

    def reduced(self) -> StackedShares:
        """The same without rows that are not looked up."""
        return self.of_used.reduced()

    def stacked(self) -> StackedShares:
        """One matrix for each sample."""
        everyone = torch.eye(self.samples, dtype=torch.float64, device=self.device)
        return StackedShares(self.weighted_sums(everyone), self.rows, self.dtype)

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.used.device


def _reduced(rows: Tensor) -> Tensor:
    """Rows with the same inner products and no more columns than needed."""
    used = (rows != 0).any(0)
    used[:1] |= ~used.any()  # a matrix has a column
    rows = rows if bool(used.all()) else rows[:, used]
    if 0 < len(rows) < rows.shape[1] and bool(torch.isfinite(rows).all()):  # LAPACK may not return from NaN
        return torch.linalg.qr(rows.T, mode="r").R.T.contiguous()
    return rows


def _half_of_products(inner: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Multiply rows with a half of their inner products, which with its transpose makes the whole: lower blocks, half of the diagonal's.

    Parameters
    ----------
    inner : Tensor
        Inner products of all rows, symmetric.
    index : Tensor of int
        Which of them each group has, shape (groups, count).
    rows : Tensor
        What is multiplied, shape (groups, count, s).
    """
    size = index.shape[1]
    result = torch.empty_like(rows)
    block = max(size, 1) if size < SMALLEST_IN_BLOCKS else -(-size // BLOCKS)
    for start in range(0, size, block):
        stop = min(start + block, size)
        columns = index[:, None, :stop].expand(-1, stop - start, -1)
        between = inner[index[:, start:stop]].gather(2, columns)
        between[:, :, start:] /= 2
        result[:, start:stop] = between @ rows[:, :stop]
    return result


class _Gathered(Pending):
    """What has arrived of each sample, instead of sums over groups."""

    takes_grids = False

    def __init__(self, shape: tuple[int, int], workspace: Workspace, samples: int) -> None:
        super().__init__(shape, workspace)
        self.samples = samples
        self.products: list[tuple[Product, np.ndarray]] = []
        self.lookups: list[tuple[Lookup, np.ndarray]] = []
        self.matrices: Tensor | None = None

    def add(
        self,
        factors: Factors,
        sorting: Sorting,
        shares: bool,
        statistics: Sequence[str],
        constant: bool,
        follows: Callable[[Sequence[int], int], bool] | None = None,
        backward: int = -1,
        counted: bool = True,
    ) -> None:
        """Add one use of the parameter: rows of products and lookups as they are, other shares as matrices."""
        numbers = [_sample_number(key) for key in sorting.keys]
        factors = factors.as_stored()
        for key, count in zip(sorting.keys, sorting.counts, strict=True):
            self.rows[key] = self.rows.get(key, 0) + factors.rows_of(count) * counted
        if isinstance(factors, Product):
            self.products.append((factors, np.repeat(numbers, sorting.counts)))
            return
        if isinstance(factors, Lookup):
            self.lookups.append((factors, np.repeat(numbers, sorting.counts)))
            return
        for number, part in zip(numbers, factors.split(sorting.counts), strict=True):
            share = part.in_float64().share()
            if self.matrices is None:
                self.matrices = share.new_zeros(self.samples, *self.shape)
            self.matrices[number] += share

    @property
    def keeps_rows(self) -> bool:
        return bool(self.products or self.lookups)

    def result(self) -> SampleShares:
        """What has arrived, in the form in which sums over samples cost least."""
        dtype = self.dtype or torch.float32
        parts: list[StackedShares] = []
        rows = np.zeros(self.samples, dtype=np.int64)
        rows[[_sample_number(key) for key in self.rows]] = list(self.rows.values())
        if self.matrices is not None:
            parts.append(StackedShares(self.matrices, rows, dtype, self.computed))
        if self.products:
            activation = torch.cat([float64(factors.activation) for factors, _ in self.products])
            adjoint = torch.cat([float64(factors.adjoint_rows()) for factors, _ in self.products])
            sample = np.concatenate([numbers for _, numbers in self.products])
            products = FactoredShares(activation, adjoint, sample, self.samples, dtype)
            # Multiplications for one row of weights: with the reduced factors, or with a matrix a sample.
            factored = len(sample) * min(self.shape) * min(len(sample), max(self.shape))
            if not parts and factored <= self.samples * self.shape[0] * self.shape[1]:
                return products
            parts.append(products.stacked())
        if self.lookups:
            looked_up = self._looked_up(rows, dtype)
            if not parts:
                return looked_up
            parts.append(looked_up.stacked())
        if len(parts) == 1:
            return parts[0]
        return StackedShares(torch.stack([part.matrices for part in parts]).sum(0), rows, dtype, self.computed)

    def _looked_up(self, rows: np.ndarray, dtype: torch.dtype) -> LookedUpShares:
        adjoint = torch.cat([float64(factors.adjoint) for factors, _ in self.lookups])
        index = torch.cat([factors.activation for factors, _ in self.lookups]).to(adjoint.device)
        sample = np.concatenate([numbers for _, numbers in self.lookups])
        used, place = torch.unique(index, return_inverse=True)
        place = place + torch.from_numpy(sample).to(index.device) * len(used)
        matrices = adjoint.new_zeros(self.samples * len(used), adjoint.shape[1]).index_add_(0, place, adjoint)
        shares = StackedShares(matrices.unflatten(0, (self.samples, len(used))), rows, dtype)
        return LookedUpShares(shares, used, self.shape[0])


def sample_shares(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    samples: int,
    *,
    layers: Sequence[str] | None = None,
    valid: Any = None,
    batch_dim: int | None = None,
    rows: Mapping[str, Any] | None = None,
    unknown: str = "refuse",
) -> dict[str, SampleShares]:
    """Run one forward and backward pass and return every sample's share of every watched parameter's gradient.

    What of a gradient comes from no sample's row, as of a penalty on the weights, is in no share; a warning says so.

    The share of a sample is that of a group to which it belongs alone: with its own copy of the parameter, all
    copies equal, the derivative of the loss of the whole batch with respect to that copy.

    Parameters
    ----------
    model : nn.Module
        The model, in the mode in which it trains.  A copy of it runs: weights, buffers, gradients, hooks and random
        number generators stay as they are.
    loss : callable
        ``loss(model)`` calls the model that it is given once, on the whole batch, and returns the loss.
    samples : int
        Number of samples of the batch.
    layers, valid, batch_dim, rows, unknown
        As for `autospec.watch`.

    Returns
    -------
    dict of str to SampleShares
        By parameter; without those that the loss does not reach.

    Raises
    ------
    WatchError
        If the model cannot be watched, or the rows of a layer cannot be traced to samples.
    """
    frozen = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if frozen:
        raise WatchError(
            f"'{frozen[0]}' was made under torch.inference_mode(), so nothing can be differentiated with respect to it: make, or load, "
            "the model outside of it."
        )
    twin = copy_model(model)
    watched = [WatchedLayer(parameter) for parameter in find_parameters(twin, layers, unknown)]
    given = {name: as_array(value).reshape(-1) for name, value in (rows or {}).items()}
    gathering = Gathering(watched, ("gradient",))
    gathering.make_pending = functools.partial(_Gathered, samples=samples)
    capture = Capture(twin, gathering, given, batch_dim)
    capture.groups = Groups(None)
    capture.assignment = _each_sample_a_cell(samples)
    capture.recording = gathering.guard_due = True
    if valid is not None:
        mask = as_array(valid).astype(bool)
        if mask.ndim != 2 or len(mask) != samples:
            raise WatchError(f"valid= has the shape {mask.shape}: give one row for each of the {samples} samples.")
        capture.valid = mask
    learned = [layer for layer in watched if layer.parameter.requires_grad]
    if not learned:
        raise WatchError("no watched parameter of the model learns: let them, with requires_grad_().")
    capture.attach()
    try:
        with generators_kept(list(twin.parameters())), torch.enable_grad(), kept_apart(model) as copied:
            copied.update(twin.modules())
            try:
                value = loss(twin)
            except NoSamples as error:
                raise WatchError(
                    f"samples={samples} does not fit the batch: no input with which loss(model) calls the model has a dimension of that size."
                ) from error
            if not capture.forwards:
                raise WatchError("no call of the model was seen: loss(model) must call the model that it is given.")
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                what = type(value).__name__
                if isinstance(value, Tensor):
                    what = (
                        f"a tensor of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a gradient'}"
                    )
                raise WatchError(
                    f"loss(model) returned {what}: return the loss of the whole batch, one number, as backward() would be called on it."
                )
            try:
                torch.autograd.backward(value, inputs=[layer.parameter for layer in learned])
            except RuntimeError as error:
                if "backward through the graph a second time" not in str(error):
                    raise
                raise WatchError(
                    "loss(model) has called backward() by itself: let it return the loss alone."
                ) from error
        if capture.valid is not None and not gathering.masked:
            raise WatchError(
                f"valid= has {capture.valid.shape[1]} positions, but no watched layer has as many rows a sample."
            )
        gathered = {layer.name: layer.pending for layer in learned if isinstance(layer.pending, _Gathered)}
        found = {name: pending.result() for name, pending in gathered.items()}
        _warn_of_what_is_outside(gathered, found)
        return found
    finally:
        capture.detach()


def _warn_of_what_is_outside(pending: Mapping[str, Pending], found: Mapping[str, SampleShares]) -> None:
    """Warn of gradients a part of which is in no share; in the same words at each step, so that Python says it once."""
    outside = []
    for name, shares in found.items():
        total = shares.total()
        deviation, _ = deviation_of_sum(pending[name], total, rounding_of_sum(pending[name], [total]))
        if deviation > GUARD_TOLERANCE:
            outside.append(name)
    if outside:
        warnings.warn(
            f"a part of the gradient of {', '.join(map(repr, outside))} comes from no sample's row, and is in no sample's share: leave a "
            "penalty on weights out of the loss that is given here, or, where there is none, such layers with layers=.",
            stacklevel=3,
        )


def _each_sample_a_cell(samples: int) -> Assignment:
    """Cells of one sample each, whose groups are the ones in the sample's binary number."""
    bits = max(1, (samples - 1).bit_length())
    numbers = np.arange(samples)
    return Assignment(numbers, (numbers[:, None] >> np.arange(bits)) % 2 == 1)


def _sample_number(key: bytes) -> int:
    """The sample whose cell it is."""
    ones = np.flatnonzero(np.frombuffer(key, dtype=bool))
    return int((1 << ones).sum())
