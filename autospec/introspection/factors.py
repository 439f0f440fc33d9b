"""The ways in which a matrix enters a network, and its share of the gradient for some of the samples.

Every family of layers comes down to three: a product with rows (linear and recurrent layers, attention), a convolution,
and a lookup.  Each holds the activation and the adjoint of one use of the parameter, cut into items that belong to
one sample each.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .spectra import float64, irregular
from .workspace import Workspace

# Numbers in the patches that are multiplied at a time: about what a core's cache holds; and positions, whose products are
# summed in float32.
PATCHES, TERMS = 2**19, 2**12
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

    @abstractmethod
    def share(self) -> Tensor:
        """The items' share of the gradient as a matrix, as torch stores the parameter."""

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


def walk(factors: Factors) -> Tensor:
    """Square of what a share would be if its terms had no common direction: how far their sum may be rounded is in proportion."""
    if isinstance(factors, Lookup):
        return square(factors.adjoint)
    if isinstance(factors, Computed):
        share = factors.of_weight.share()
        some = irregular(share.numel(), share.dtype).to(share.device).view_as(share)
        # What is carried back is rounded even where nothing comes of it, as of a softmax over numbers with one derivative.
        before = walk(factors.of_weight) + square(share)
        return before * square(factors.pulled_back(some)) / square(some)
    times = math.prod(factors.kernel[2:]) if isinstance(factors, Convolution) else 1
    return square(factors.adjoint) * square(factors.activation) * (times / max(factors.rows, 1))


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
class Convolution(Factors):
    """A convolution, transposed or not; an item is one entry of the convolution's batch.

    Attributes
    ----------
    activation : Tensor
        Shape (items, inputs, *space).
    adjoint : Tensor
        Shape (items, outputs, *space).
    kernel : tuple of int
        Shape of the parameter.
    stride, padding, dilation : tuple of int
        One number a dimension of space.
    groups : int
        Number of separate convolutions.
    transposed : bool
        Whether the layer is a ConvTranspose.
    output_padding : tuple of int
        Of a ConvTranspose.
    margins : (tuple of int, str) or None
        Padding that is not of zeros on both sides, as `torch.nn.functional.pad` takes it; ``padding`` is 0 then.
    unfolded : bool
        Whether a row of the activation is a patch, the true left factor, and not the channels at one position.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    margins: tuple[tuple[int, ...], str] | None = None
    unfolded: bool = False

    def rows_of(self, items: int) -> int:
        """Items x positions x groups."""
        positions = (self.activation if self.transposed else self.adjoint).shape[2:]
        return items * math.prod(positions) * self.groups

    def share(self) -> Tensor:
        """Compute the weight's gradient from these items alone, shape (first dimension, others)."""
        gradient = torch.ops.aten.convolution_backward(
            self.adjoint,
            self._padded(),
            self.adjoint.new_empty(1).expand(self.kernel),
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            [False, True, False],
        )[1]
        return gradient.reshape(self.kernel[0], -1)

    @property
    def in_pieces(self) -> bool:
        """In one and two dimensions on the CPU patches cost little, and sums of short products are exact where long are not."""
        return len(self.kernel) <= 4 and self.groups == 1 and self.adjoint.device.type == "cpu"

    def add_pieces(
        self, counts: Sequence[int], totals: Sequence[Tensor], workspace: Workspace, exact: bool = False
    ) -> list[Tensor]:
        """Add the shares as products of rows and patches of a few items each, which stay in the processor's cache."""
        rows, image = (self.activation, self.adjoint) if self.transposed else (self.adjoint, self._padded())
        space, positions = self.kernel[2:], rows.shape[2:]
        outputs, inputs = self.kernel[:2]
        size, many = math.prod(space), math.prod(positions)
        count = min(max(1, min(PATCHES // (inputs * size), TERMS) // many), max(counts))
        exact = exact or narrow(outputs, inputs * size, count * many)
        dtype = torch.float64 if exact else rows.dtype
        within, padded = [slice(None), slice(None)], [count, inputs]
        for length, taken, stride, padding, dilation, there in zip(
            space, positions, self.stride, self.padding, self.dilation, image.shape[2:], strict=True
        ):
            reach = (taken - 1) * stride + (length - 1) * dilation + 1  # as far as the last position sees
            within.append(slice(padding, padding + there))
            padded.append(max(reach, padding + there))
        room = workspace.scratch("image", tuple(padded), image.dtype, image.device).zero_()
        inside = room[tuple(within)]
        item, channel, *steps = room.stride()
        windows = room.as_strided(
            (inputs, *space, count, *positions),
            (
                channel,
                *(step * dilation for step, dilation in zip(steps, self.dilation, strict=True)),
                item,
                *(step * stride for step, stride in zip(steps, self.stride, strict=True)),
            ),
        )
        patches = workspace.scratch("patches", (inputs * size * count * many,), dtype, image.device)
        sides = workspace.scratch("rows", (outputs * count * many,), dtype, image.device)

        @functools.cache
        def places(items: int) -> tuple[Tensor, ...]:
            """Where so many items lie: images, what positions see of them, the same and rows by item, and as matrices."""
            window = windows.narrow(1 + len(space), 0, items)
            patch, side = patches[: window.numel()], sides[: outputs * items * many]
            by_item = side.view(outputs, items, *positions).transpose(0, 1)
            matrices = side.view(outputs, -1), patch.view(inputs * size, -1).T
            return inside[:items], window, patch.view(window.shape), by_item, *matrices

        squares = []
        for total, some_rows, some_image in zip(totals, rows.split(counts), image.split(counts), strict=True):
            products = rows.new_empty(-(-len(some_rows) // count), outputs, inputs * size, dtype=dtype)
            parts = zip(products, some_rows.split(count), some_image.split(count), strict=True)
            for product, some, seen in parts:
                images, window, patch, by_item, left, right = places(len(some))
                images.copy_(seen)
                patch.copy_(window)
                by_item.copy_(some)
                torch.mm(left, right, out=product)
            total += products.sum(0, dtype=torch.float64)
            if exact:
                squares.append(total.new_zeros(()))
            else:
                times = size / max(len(some_rows) * many, 1)
                squares.append(rounding(some_rows, some_image, square(products), times))
        return squares

    def as_product(self) -> Product:
        """The same for a single group with one row for each item and position, one item after the other."""
        rows = self.activation if self.transposed else self.adjoint
        return Product(self.patches().flatten(0, 1), rows.flatten(2).movedim(2, 1).flatten(0, 1).contiguous())

    def activation_rows(self) -> Tensor:
        """Channels at each position, shape (items, inputs, positions), or patches (items x positions, inputs)."""
        if self.unfolded and not self.transposed:
            return self.patches().flatten(0, 1)
        return self.activation.flatten(2)

    def adjoint_rows(self) -> Tensor:
        """Channels at each position, shape (items, outputs, positions)."""
        return self.adjoint.flatten(2)

    def _padded(self) -> Tensor:
        """The activation as the kernel meets it."""
        return self.activation if self.margins is None else F.pad(self.activation, self.margins[0], self.margins[1])

    def patches(self) -> Tensor:
        """What each output position of the convolution sees, shape (items, positions, inputs x kernel).

        For a transposed convolution these are the outputs that each input position reaches.
        """
        space = self.kernel[2:]
        image = self.adjoint if self.transposed else self._padded()
        positions = (self.activation if self.transposed else self.adjoint).shape[2:]
        margins = [margin for size in reversed(self.padding) for margin in (size, size)]
        image = F.pad(image, margins)
        for axis, (size, stride, dilation, count) in enumerate(
            zip(space, self.stride, self.dilation, positions, strict=True), start=2
        ):
            short = (count - 1) * stride + (size - 1) * dilation + 1 - image.shape[axis]
            if short > 0:  # an output padding lengthens a transposed convolution
                image = F.pad(image, [0, 0] * (image.ndim - 1 - axis) + [0, short])
            starts = torch.arange(count, device=image.device) * stride
            wanted = starts[:, None] + torch.arange(size, device=image.device) * dilation
            # (…, positions, …) and the kernel's offsets at the end
            image = image.index_select(axis, wanted.flatten()).unflatten(axis, wanted.shape).movedim(axis + 1, -1)
        dimensions = len(space)
        image = image.movedim(1, 1 + dimensions)  # (items, *positions, channels, *kernel)
        return image.flatten(1, dimensions).flatten(2)

    def shares_by_position(self) -> Tensor:
        """One share for each output position, shape (positions, first dimension, others)."""
        patches = self.patches()
        rows = (self.activation if self.transposed else self.adjoint).flatten(2).movedim(2, 1)
        if self.groups == 1:
            return torch.einsum("npo,npi->poi", rows, patches)
        rows = rows.unflatten(2, (self.groups, -1))
        patches = patches.unflatten(2, (self.groups, -1))
        return torch.einsum("npgo,npgi->pgoi", rows, patches).flatten(1, 2)


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

    def activation_rows(self) -> Tensor:
        """As of the weight."""
        return self.of_weight.activation_rows()

    def adjoint_rows(self) -> Tensor:
        """As of the weight."""
        return self.of_weight.adjoint_rows()


def shares_by_position(factors: Factors, table: Tensor) -> Tensor:
    """Shares of each position along the tying dimension, shape (positions, *shape of the matrix).

    Parameters
    ----------
    factors : Product, Convolution or Computed
        Rows of one cell; for a convolution each position in space.
    table : Tensor of int, shape (positions, most rows)
        Rows at each position; -1 where there are fewer.
    """
    if isinstance(factors, Computed):
        return torch.stack(list(map(factors.pulled_back, shares_by_position(factors.of_weight, table))))
    if isinstance(factors, Convolution):
        return factors.shares_by_position()
    factors = factors.as_stored()
    assert isinstance(factors, Product)
    rows = []
    for side in (factors.adjoint_rows(), factors.activation_rows()):
        rows.append(torch.cat([side, side.new_zeros(1, side.shape[1])])[table])
    return rows[0].mT @ rows[1]
