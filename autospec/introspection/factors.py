"""The ways in which a matrix enters a network, and its share of the gradient for some of the samples.

Every family of layers comes down to three: a product with rows (linear and recurrent layers, attention), a convolution,
and a lookup.  Each holds the activation and the adjoint of one use of the parameter, cut into items that belong to
one sample each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .spectra import PIECE, float64, irregular
from .workspace import Workspace

# Rows whose products are summed in float32.
TERMS = 2**12
# Fewer outputs or inputs than this, and more terms: there MKL sums one term after the other (measured: 9 eps where they agree).
NARROW, MANY_TERMS = 16, 2**9
# Rounding of a product of that size in float32, in units of eps: of sums whose terms are of either sign, relative to the
# root of the terms' squares, and of sums whose terms agree, relative to the sum (measured: 2.3 and 1.4).  Of sums of few
# terms, one after the other, that many times the root of their number (measured: 0.15 and 0.13).
ROUNDING_OF_WALK, ROUNDING_OF_SUM = 2.5, 1.5
ROUNDING_OF_SHORT_WALK, ROUNDING_OF_SHORT_SUM = 0.2, 0.17
# Positions of a sample whose product is formed at once, where samples have many; and numbers in such products.
SHORTEST, LONGEST, PRODUCTS = 32, 100, 2**18


@dataclass(frozen=True)
class Factors(ABC):
    """Activation and adjoint of one use of a parameter, item by item.

    Attributes
    ----------
    activation : Tensor
        What enters the layer.
    adjoint : Tensor
        Derivative of the loss at the output of the layer's affine map.
    """

    activation: Tensor
    adjoint: Tensor

    def with_(self, activation: Tensor, adjoint: Tensor) -> Self:
        """The same use with other items."""
        return replace(self, activation=activation, adjoint=adjoint)

    def in_float64(self) -> Self:
        """The same use, whose share is then summed in float64."""
        return self.converted(float64)

    def converted(self, convert: Callable[[Tensor], Tensor]) -> Self:
        """The same use with floating-point numbers of another type."""
        return self.with_(convert(self.activation), convert(self.adjoint))

    def split(self, counts: Sequence[int]) -> list[Self]:
        """Cut into runs of items."""
        counts = list(counts)
        parts = zip(self.activation.split_with_sizes(counts), self.adjoint.split_with_sizes(counts), strict=True)
        return [self.with_(activation, adjoint) for activation, adjoint in parts]

    def rows_of(self, items: int) -> int:
        """Rank that so many items allow their share at most, as far as their number goes."""
        return items

    @property
    def rows(self) -> int:
        """The same for all the items."""
        return self.rows_of(len(self.activation))

    def as_stored(self) -> Factors:
        """The same use, whose share is formed as the parameter is stored."""
        return self

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that is used: of the share, but where that is carried back to a parameter."""

    @abstractmethod
    def share(self) -> Tensor:
        """The items' share of the gradient as a matrix, as torch stores the parameter."""

    @abstractmethod
    def walk(self) -> Tensor:
        """Square of what the share would be if its terms had no common direction: its rounding is in proportion."""

    def shares_by_position(self, table: Tensor) -> Tensor:
        """Shares of each position along the tying dimension, shape (positions, *shape of the matrix).

        Parameters
        ----------
        table : Tensor of int, shape (positions, most rows)
            Items at each position; -1 where there are fewer.  Images know their positions themselves.
        """
        raise RuntimeError("these have no positions")

    @property
    def in_pieces(self) -> bool:
        """Whether `add_pieces` is the way to the share."""
        return False

    def add_pieces(
        self, counts: Sequence[int], totals: Sequence[Tensor], workspace: Workspace, exact: bool = False
    ) -> list[Tensor]:
        """Add the shares of runs of items to float64 matrices, piece by piece.

        Parameters
        ----------
        counts : sequence of int
            Items of each run.
        totals : sequence of Tensor
            The matrix for each run.
        workspace : Workspace
            Memory for the pieces.
        exact : bool
            Form the products in float64 too.

        Returns
        -------
        list of Tensor
            For each run, the square of what the share's rounding may be (Frobenius).
        """
        raise RuntimeError("this share is not formed in pieces")

    def activation_rows(self) -> Tensor:
        """Rows of the activation, shape (rows, inputs), or (items, inputs, positions) for an image."""
        return self.activation

    def adjoint_rows(self) -> Tensor:
        """Rows of the adjoint, shape (rows, outputs), or (items, outputs, positions) for an image."""
        return self.adjoint


def square(tensor: Tensor) -> Tensor:
    """Sum of the squares of a tensor's numbers."""
    numbers = tensor.reshape(-1)
    return torch.dot(numbers, numbers)


def squares_by_item(tensor: Tensor) -> Tensor:
    """Sum of the squares of each item's numbers, shape (items,) for (items, rows, width)."""
    if tensor.is_contiguous():
        return torch.linalg.vector_norm(tensor.flatten(1), dim=1).square()
    return torch.linalg.vector_norm(tensor, dim=2).square().sum(1)


def narrow(outputs: int, inputs: int, terms: int) -> bool:
    """Whether a product on the CPU is formed in float64 for its shape, which costs little there."""
    return min(outputs, inputs) < NARROW and terms > MANY_TERMS


def rounding(left: Tensor, right: Tensor, sums: Tensor | float, times: float | None = None) -> Tensor:
    """Square of what the rounding of products that are summed in pieces may be (Frobenius).

    Parameters
    ----------
    left, right : Tensor
        The factors.
    sums : Tensor or float
        Square of the products of the pieces, before they are summed (Frobenius).
    times : float, optional
        How often an entry of one factor meets one of the other, over the number of terms of a sum; 1 / rows by default.
    """
    walk = square(left) * square(right) * (1 / max(len(left), 1) if times is None else times)
    return torch.finfo(left.dtype).eps ** 2 * (ROUNDING_OF_WALK**2 * walk + ROUNDING_OF_SUM**2 * sums)


def add_wide_product(total: Tensor, adjoint: Tensor, activation: Tensor, workspace: Workspace) -> None:
    """Add a product of rows to a float64 matrix, in float64."""
    count = max(1, PIECE // max(adjoint.shape[1], activation.shape[1]))
    for some, seen in zip(adjoint.split(count), activation.split(count), strict=True):
        left = workspace.scratch("adjoint", tuple(some.shape), torch.float64, total.device).copy_(some)
        right = workspace.scratch("activation", tuple(seen.shape), torch.float64, total.device).copy_(seen)
        total.addmm_(left.T, right)


@dataclass(frozen=True)
class Grid:
    """Rows that lie sample by sample, as many of each.

    Attributes
    ----------
    positions : int
        Rows of each sample.
    cells : Tensor of int, shape (samples,)
        The cell of each sample.
    """

    positions: int
    cells: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """View of the rows, shape (samples, positions, width)."""
        return rows.reshape(len(self.cells), self.positions, rows.shape[1])

    @property
    def terms(self) -> int:
        """Positions whose product is formed at once: few enough for an exact sum, and a part of all of them."""
        parts = [n for n in range(1, self.positions // SHORTEST + 1) if self.positions % n == 0]
        return self.positions // next((n for n in parts if self.positions // n <= LONGEST), parts[-1])


def single(tensor: Tensor) -> Tensor:
    """Half precision, in which training may compute but nothing should be summed, as float32."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@dataclass(frozen=True)
class Product(Factors):
    """A product of rows with the parameter, ``x @ p.T``; an item is a row.

    Attributes
    ----------
    activation : Tensor
        Shape (rows, inputs).
    adjoint : Tensor
        Shape (rows, outputs).
    outputs : (int, int) or None
        First output and number of outputs of the whole parameter, where only a part of it was used, such as the part
        of an attention's packed weight that makes the queries.
    transposed : bool
        Whether the parameter has its inputs first, ``x @ p``; ``outputs`` counts its inputs then, which are its rows.
    """

    outputs: tuple[int, int] | None = None
    transposed: bool = False

    def as_stored(self) -> Product:
        """The same use as a product whose outputs come first in the parameter: transposed, the factors change places."""
        return Product(self.adjoint, self.activation, self.outputs) if self.transposed else self

    def share(self) -> Tensor:
        r"""Compute :math:`\Delta^\top A` (paper, Eq. 1), or, transposed, :math:`A^\top \Delta`, shape of the parameter."""
        if self.transposed:
            return self.as_stored().share()
        product = self.adjoint.T @ self.activation
        if self.outputs is None:
            return product
        first, total = self.outputs
        return F.pad(product, (0, 0, first, total - first - len(product)))

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the whole parameter, or, transposed, inputs and outputs."""
        stored = self.as_stored()
        return stored.adjoint.shape[1] if stored.outputs is None else stored.outputs[1], stored.activation.shape[1]

    def walk(self) -> Tensor:
        """Each row's activation meets its adjoint once."""
        return square(self.adjoint) * square(self.activation) * (1 / max(self.rows, 1))

    def shares_by_position(self, table: Tensor) -> Tensor:
        """Products of each position's rows."""
        stored = self.as_stored()
        sides = (stored.adjoint_rows(), stored.activation_rows())
        left, right = (torch.cat([side, side.new_zeros(1, side.shape[1])])[table] for side in sides)
        return left.mT @ right

    def add_pieces(
        self, counts: Sequence[int], totals: Sequence[Tensor], workspace: Workspace, exact: bool = False
    ) -> list[Tensor]:
        """Add the products of some rows at a time: long sums lose digits in single precision, more on some processors."""
        if self.transposed:
            return self.as_stored().add_pieces(counts, totals, workspace, exact)
        squares = []
        sides = (self.adjoint.split_with_sizes(list(counts)), self.activation.split_with_sizes(list(counts)))
        for total, adjoint, activation in zip(totals, *sides, strict=True):
            if self.outputs is not None:
                total = total.narrow(0, self.outputs[0], adjoint.shape[1])
            squares.append(total.new_zeros(()))
            if exact:
                add_wide_product(total, adjoint, activation, workspace)
                continue
            wide = narrow(adjoint.shape[1], activation.shape[1], TERMS)
            for some, seen in zip(adjoint.split(TERMS), activation.split(TERMS), strict=True):
                if wide:
                    total.addmm_(float64(some).T, float64(seen))
                    continue
                # With the longer side last products of many terms take a fifth less time.
                product = some.T @ seen if some.shape[1] <= seen.shape[1] else (seen.T @ some).T
                total += product
                squares[-1] += rounding(some, seen, square(product))
        return squares

    def add_by_sample(self, grid: Grid, total: Tensor, workspace: Workspace) -> np.ndarray:
        """Add the product of each sample's rows to the matrix of its cell, without any row being moved.

        Parameters
        ----------
        grid : Grid
            Where each sample's rows lie, and its cell.
        total : Tensor, float64
            Shape (cells, outputs, inputs); zero.
        workspace : Workspace
            Memory for some products.

        Returns
        -------
        ndarray, shape (cells,)
            Square of what the rounding of each matrix may be (Frobenius).
        """
        terms, outputs, inputs = grid.terms, self.adjoint.shape[1], self.activation.shape[1]
        adjoint, activation = self.adjoint.reshape(-1, terms, outputs), self.activation.reshape(-1, terms, inputs)
        cells = grid.cells.repeat_interleave(grid.positions // terms)
        roundings = []
        walk, whole = ROUNDING_OF_SHORT_WALK**2 * terms, ROUNDING_OF_SHORT_SUM**2 * terms
        walk, whole = min(walk, ROUNDING_OF_WALK**2), min(whole, ROUNDING_OF_SUM**2)
        count = max(1, PRODUCTS // (outputs * inputs))
        for some, seen, where in zip(*(side.split(count) for side in (adjoint, activation, cells)), strict=True):
            form = (len(some), outputs, inputs)
            products = workspace.scratch("products", form, some.dtype, some.device)
            torch.bmm(some.mT, seen, out=products)
            wide = products
            if wide.dtype != torch.float64:
                wide = workspace.scratch("wide products", form, torch.float64, some.device).copy_(products)
                rounded = squares_by_item(some) * squares_by_item(seen) * (walk / terms)
                roundings.append(torch.stack([rounded, squares_by_item(products)]))
            total.index_add_(0, where, wide)
        if not roundings:
            return np.zeros(len(total))
        walks, sums = torch.cat(roundings, 1).numpy()
        # What is the same product, of padding say, has the same rounding, which adds up as the products do.
        _, which, times = np.unique(sums, return_inverse=True, return_counts=True)
        squares = np.bincount(cells.numpy(), (walks + whole * sums) * times[which.reshape(-1)], len(total))
        return squares * torch.finfo(self.adjoint.dtype).eps ** 2

    def activation_rows(self) -> Tensor:
        """The activation, with zeros for inputs that were not used."""
        return self._whole(self.activation) if self.transposed else self.activation

    def adjoint_rows(self) -> Tensor:
        """The adjoint, with zeros for outputs that were not used."""
        return self.adjoint if self.transposed else self._whole(self.adjoint)

    def _whole(self, rows: Tensor) -> Tensor:
        if self.outputs is None:
            return rows
        first, total = self.outputs
        return F.pad(rows, (first, total - first - rows.shape[1]))


@dataclass(frozen=True)
class Lookup(Factors):
    """A lookup of the parameter's rows; an item is an index.

    Attributes
    ----------
    activation : Tensor of int
        Shape (items,): which row was looked up.
    adjoint : Tensor
        Shape (items, width).
    size : int
        Number of rows of the parameter.
    """

    size: int

    def converted(self, convert: Callable[[Tensor], Tensor]) -> Self:
        """The same with adjoints of another type; indices stay whole numbers."""
        adjoint = convert(self.adjoint)
        return self.with_(self.activation.to(adjoint.device), adjoint)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width of the table."""
        return self.size, self.adjoint.shape[1]

    def walk(self) -> Tensor:
        """Each adjoint goes to one row."""
        return square(self.adjoint)

    def share(self) -> Tensor:
        """Sum the adjoints of each row, shape (size, width)."""
        return self.adjoint.new_zeros(self.size, self.adjoint.shape[1]).index_add_(0, self.activation, self.adjoint)

    def activation_rows(self) -> Tensor:
        """Rows with a one where they point, shape (items, size)."""
        return F.one_hot(self.activation, self.size).to(self.adjoint.dtype)


@dataclass(frozen=True)
class Computed(Factors):
    """A use of a weight that was computed of the parameter.

    Attributes
    ----------
    use : Factors
        The same use of the weight itself, of whatever items.
    pulled_back : callable
        Gives the parameter's share from that of the weight, in which it is linear.
    """

    use: Factors
    pulled_back: Callable[[Tensor], Tensor]

    @property
    def of_weight(self) -> Factors:
        """The use of the weight, of these items."""
        return self.use.with_(self.activation, self.adjoint)

    def converted(self, convert: Callable[[Tensor], Tensor]) -> Self:
        """The same with numbers of another type."""
        use = self.of_weight.converted(convert)
        return self.with_(use.activation, use.adjoint)

    def rows_of(self, items: int) -> int:
        """The same as of the weight, though the parameter's share may have a higher rank."""
        return self.of_weight.rows_of(items)

    def share(self) -> Tensor:
        """Carry the weight's share back."""
        return self.pulled_back(self.of_weight.share())

    @property
    def shape(self) -> tuple[int, int]:
        """As of the weight."""
        return self.of_weight.shape

    def walk(self) -> Tensor:
        """What is carried back is rounded even where nothing comes of it, as of a softmax over numbers with one derivative."""
        share = self.of_weight.share()
        return (self.of_weight.walk() + square(share)) * self.gain(share)

    def shares_by_position(self, table: Tensor) -> Tensor:
        """Carry each position's share back."""
        return torch.stack(list(map(self.pulled_back, self.of_weight.shares_by_position(table))))

    @property
    def in_pieces(self) -> bool:
        """Products too, whose rounding is then known."""
        return self.use.in_pieces or (isinstance(self.use, Product) and self.adjoint.is_cpu)

    def add_pieces(
        self, counts: Sequence[int], totals: Sequence[Tensor], workspace: Workspace, exact: bool = False
    ) -> list[Tensor]:
        """Form the weight's shares in pieces, and carry them back."""
        shares = [self.adjoint.new_zeros(self.of_weight.shape, dtype=torch.float64) for _ in counts]
        roundings = self.of_weight.add_pieces(counts, shares, workspace, exact)
        for total, share in zip(totals, shares, strict=True):
            total += self.pulled_back(share)
        gain = self.gain(shares[0])
        return [rounded * gain for rounded in roundings]

    def gain(self, share: Tensor) -> Tensor:
        """How much larger the square of a share without structure is when it is carried back; of a share of that form."""
        some = irregular(share.numel(), share.dtype).to(share.device).view_as(share)
        return square(self.pulled_back(some)) / square(some)

    def activation_rows(self) -> Tensor:
        """As of the weight."""
        return self.of_weight.activation_rows()

    def adjoint_rows(self) -> Tensor:
        """As of the weight."""
        return self.of_weight.adjoint_rows()
