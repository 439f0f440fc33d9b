"""Convolutions: the share of a kernel's gradient for some of the samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .factors import (
    TERMS,
    Factors,
    Product,
    narrow,
    rounding,
    square,
)
from .kernel_gradients import Kernel, add_gradient_of_parts, add_wide_gradient, kernel_gradient
from .workspace import Workspace

# Numbers in the patches that are multiplied at a time: about what a core's cache holds.
PATCHES = 2**19


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

    @property
    def shape(self) -> tuple[int, int]:
        """First dimension of the kernel, and its others."""
        return self.kernel[0], math.prod(self.kernel[1:])

    def walk(self) -> Tensor:
        """Each position of the activation is seen by all of the kernel."""
        times = math.prod(self.kernel[2:]) / max(self.rows, 1)
        return square(self.adjoint) * square(self.activation) * times

    def share(self) -> Tensor:
        """Compute the weight's gradient from these items alone, shape (first dimension, others)."""
        output_padding = self.output_padding if self.transposed else None
        return kernel_gradient(self.adjoint, self._padded(), self._kernel, output_padding)

    @property
    def _kernel(self) -> Kernel:
        return Kernel(self.kernel, self.stride, self.padding, self.dilation, self.groups)

    @property
    def in_pieces(self) -> bool:
        """On the CPU, where sums of short products are exact and long are not, and patches cost little or none are needed."""
        return self.adjoint.is_cpu

    def add_pieces(
        self, counts: Sequence[int], totals: Sequence[Tensor], workspace: Workspace, exact: bool = False
    ) -> list[Tensor]:
        """Add the shares as products of rows and patches of a few items each, which stay in the processor's cache."""
        if self.groups > 1 or len(self.kernel) > 4:
            return self._add_parts(counts, totals, exact)
        rows, image = self._rows_and_image()
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

    def _add_parts(self, counts: Sequence[int], totals: Sequence[Tensor], exact: bool) -> list[Tensor]:
        """The same without patches, which groups do not need and three dimensions make too many of."""
        rows, image = self._rows_and_image()
        if not exact and self.adjoint.dtype == torch.float32:
            return add_gradient_of_parts(rows, image, counts, totals, self._kernel)
        for total, some, seen in zip(totals, rows.split(list(counts)), image.split(list(counts)), strict=True):
            add_wide_gradient(some, seen, total, self._kernel)
        return [total.new_zeros(()) for total in totals]

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

    def _rows_and_image(self) -> tuple[Tensor, Tensor]:
        """What the kernel's first dimension belongs to, and what the kernel moves over."""
        return (self.activation, self.adjoint) if self.transposed else (self.adjoint, self._padded())

    def _padded(self) -> Tensor:
        """The activation as the kernel meets it."""
        return self.activation if self.margins is None else F.pad(self.activation, self.margins[0], self.margins[1])

    def patches(self) -> Tensor:
        """What each output position of the convolution sees, shape (items, positions, inputs x kernel).

        For a transposed convolution these are the outputs that each input position reaches.
        """
        space = self.kernel[2:]
        rows, image = self._rows_and_image()
        positions = rows.shape[2:]
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

    def shares_by_position(self, table: Tensor) -> Tensor:
        """One share for each output position, shape (positions, first dimension, others), whatever the table."""
        patches = self.patches()
        rows = (self.activation if self.transposed else self.adjoint).flatten(2).movedim(2, 1)
        if self.groups == 1:
            return torch.einsum("npo,npi->poi", rows, patches)
        rows = rows.unflatten(2, (self.groups, -1))
        patches = patches.unflatten(2, (self.groups, -1))
        return torch.einsum("npgo,npgi->pgoi", rows, patches).flatten(1, 2)
