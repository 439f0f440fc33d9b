"""Gradients of a convolution's kernel: torch's own sum, and one of sums over few enough positions to be exact."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .factors import squares_by_item

# Sums of small kernels over some positions are formed side by side, so many numbers of them in a call, of factors of so many numbers;
# other kernels' one after the other, over so many positions of several items.
SMALL_KERNEL, SOME_POSITIONS, SUMS, NUMBERS, POSITIONS = 2**15, 2**7, 2**18, 2**20, 2**9
# Rounding, in units of eps, beyond which fewer positions are summed; and positions that are not cut.
LARGEST_ROUNDING, FEWEST = 4.0, 2**5
# Entries of a kernel on which the rounding is measured, and by how much it is taken for larger.
ENTRIES, ALLOWANCE = 64, 1.5
# Numbers of the patches that torch makes of an image in float64.
UNFOLDED = 2**22
# Numbers that are drawn for an item at most, of those that a larger one has.
LARGEST_DRAWN = 2**24


@dataclass(frozen=True)
class Kernel:
    """A kernel, and how it moves over an image.

    Attributes
    ----------
    shape : tuple of int
        Of the kernel: channels of the rows, channels of the image within a group, and its size.
    stride, padding, dilation : tuple of int
        One number a dimension of space.
    groups : int
        Number of separate convolutions.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def reach(self, positions: Sequence[int]) -> list[int]:
        """How far so many positions see, in each dimension."""
        each = zip(positions, self.shape[2:], self.stride, self.dilation, strict=True)
        return [(count - 1) * step + (size - 1) * spread + 1 for count, size, step, spread in each]

    def margins(self, positions: Sequence[int], space: Sequence[int]) -> list[tuple[int, int]]:
        """What an image lacks before and after it, in each dimension; less than nothing where no position sees the end."""
        each = zip(self.padding, self.reach(positions), space, strict=True)
        return [(before, seen - before - there) for before, seen, there in each]


@dataclass(frozen=True)
class Summation:
    """How a kernel's gradient is summed.

    Attributes
    ----------
    lengths : tuple of int
        Positions of a part of an item, in each dimension, whose terms torch sums at once.
    parts : int
        How many of them are summed at once, of one item or several.
    roundings : (float, float)
        How far such a sum is rounded, in units of eps: of what it would be if its terms had no common direction, and where they
        have one, of the sum.
    """

    lengths: tuple[int, ...]
    parts: int
    roundings: tuple[float, float] = (math.nan, math.nan)


def kernel_gradient(
    adjoint: Tensor,
    image: Tensor,
    kernel: Kernel,
    output_padding: Sequence[int] | None = None,
) -> Tensor:
    """Gradient of a convolution's kernel, summed by torch.

    Parameters
    ----------
    adjoint : Tensor
        Derivative at the output, shape (items, outputs, *space).
    image : Tensor
        Input, shape (items, inputs, *space).
    kernel : Kernel
        And how it moves over the image.
    output_padding : sequence of int, optional
        Of a transposed convolution.

    Returns
    -------
    Tensor
        Shape (first dimension of the kernel, its others).
    """
    gradient = torch.ops.aten.convolution_backward(
        adjoint,
        image,
        adjoint.new_empty(1).expand(kernel.shape),
        None,
        kernel.stride,
        kernel.padding,
        kernel.dilation,
        output_padding is not None,
        (0,) * len(kernel.stride) if output_padding is None else output_padding,
        kernel.groups,
        [False, True, False],
    )[1]
    return gradient.reshape(kernel.shape[0], -1)


def in_parts(rows: Tensor, image: Tensor, lengths: Sequence[int], kernel: Kernel) -> tuple[Tensor, Tensor, Kernel]:
    """Cut each item's positions into parts, with what each part sees of the image, as if they were items.

    Parameters
    ----------
    rows : Tensor
        What the kernel's first dimension belongs to, shape (items, channels, *positions).
    image : Tensor
        What the positions see, shape (items, channels, *space).
    lengths : sequence of int
        Positions of a part.
    kernel : Kernel
        And how it moves over the image.

    Returns
    -------
    rows : Tensor
        Shape (items x parts, channels, *lengths).
    image : Tensor
        Shape (items x parts, channels, *space of a part).
    kernel : Kernel
        With the padding that is still to come.
    """
    parts = [-(-there // length) for there, length in zip(rows.shape[2:], lengths, strict=True)]
    taken = [count * length for count, length in zip(parts, lengths, strict=True)]
    margins = kernel.margins(taken, image.shape[2:])
    whole = math.prod(parts) == 1
    if whole and all(
        before - step < after <= before for (before, after), step in zip(margins, kernel.stride, strict=True)
    ):
        return rows, image, kernel
    image = _padded(image, margins)
    if not whole:
        missing = [last - there for last, there in zip(taken, rows.shape[2:], strict=True)]
        rows = F.pad(rows, [number for last in reversed(missing) for number in (0, last)])
        each = zip(lengths, kernel.reach(lengths), kernel.stride, strict=True)
        for axis, (length, seen, step) in enumerate(each, start=2):
            # Parts in place of the dimension, and the positions of a part at the end.
            rows, image = rows.unfold(axis, length, length), image.unfold(axis, seen, length * step)
        rows, image = (side.movedim(1, 1 + len(parts)).flatten(0, len(parts)) for side in (rows, image))
    return rows, image, replace(kernel, padding=(0,) * len(parts))


def items_of_call(entries: int, numbers: int) -> int:
    """How many items' sums one call forms, each with so many entries and factors of so many numbers."""
    return min(SUMS // entries, NUMBERS // numbers)


def summed(
    rows: Tensor, image: Tensor, counts: Sequence[int], totals: Sequence[Tensor], how: Summation, kernel: Kernel
) -> list[Tensor]:
    """Add the gradient of a kernel to float64 matrices, as torch's sums over parts of items.

    Parameters
    ----------
    rows, image, kernel
        As for `in_parts`.
    counts : sequence of int
        Items in each run.
    totals : sequence of Tensor
        The matrix for each run, shape (first dimension of the kernel, its others), float64.
    how : Summation
        Which parts.

    Returns
    -------
    list of Tensor, shape (2,)
        Of each run, what the rounding of its sums is in proportion to: the square of what they would be if their terms had no
        common direction, and that of the sums (Frobenius).
    """
    outputs, *others = kernel.shape
    size, entries = math.prod(others[1:]), math.prod(kernel.shape)
    parts = math.prod(-(-there // length) for there, length in zip(rows.shape[2:], how.lengths, strict=True))
    squares = [rows.new_zeros(2) for _ in counts]
    ends = list(itertools.accumulate(counts))
    runs = [(end - count, end) for end, count in zip(ends, counts, strict=True)]
    if how.parts > 1:
        items = max(2, how.parts // parts)
        spans = [(first, min(first + items, end)) for start, end in runs for first in range(start, end, items)]
    else:  # of one alone, without groups, torch has a slow way
        items = max(1 + (parts == 1), items_of_call(entries * parts, rows[0].numel() + image[0].numel()))
        spans = [(first, min(first + items, len(rows))) for first in range(0, len(rows), items)]
    for first, last in spans:
        *sides, alone = in_parts(rows[first:last], image[first:last], how.lengths, kernel)
        calls = max(1, len(sides[0]) // how.parts) if how.parts > 1 else 1
        for some, seen in zip(*(side.tensor_split(calls) for side in sides), strict=True):
            sums = len(some) if how.parts == 1 else 1
            left, right = (
                squares_by_item(side.reshape(len(side) * kernel.groups, 1, -1)).view(sums, -1, kernel.groups).sum(1)
                for side in (some, seen)
            )
            walks = (left * right).sum(1) * (size * sums / (len(seen) * math.prod(seen.shape[2:])))
            # Convolutions side by side are one of more groups, so that many sums take one call.
            some, seen = (side.reshape(-1, sums * side.shape[1], *side.shape[2:]) for side in (some, seen))
            side_by_side = replace(alone, shape=(sums * outputs, *others), groups=sums * kernel.groups)
            products = kernel_gradient(some, seen, side_by_side).view(sums, outputs, -1)
            both = torch.stack([walks, squares_by_item(products)])
            for i in range(bisect.bisect_right(ends, first), bisect.bisect_left(ends, last) + 1):
                start, end = runs[i]
                its = slice((max(start, first) - first) * parts, (min(end, last) - first) * parts)
                its = its if how.parts == 1 else slice(None)
                totals[i].add_(products[0] if sums == 1 else products[its].sum(0, dtype=torch.float64))
                squares[i] += both[:, its].sum(1)
    return squares


def add_gradient_of_parts(
    rows: Tensor, image: Tensor, counts: Sequence[int], totals: Sequence[Tensor], kernel: Kernel
) -> list[Tensor]:
    """Add the gradient of a kernel to float64 matrices, as sums over so few positions that torch's rounding of them is small.

    Parameters
    ----------
    rows : Tensor
        What the kernel's first dimension belongs to, shape (items, channels, *positions): the derivative at the output, or a
        transposed convolution's input.
    image : Tensor
        What the kernel moves over, shape (items, channels, *space): the input, or the derivative at a transposed convolution's
        output.
    counts : sequence of int
        Items in each run.
    totals : sequence of Tensor
        The matrix for each run, shape (first dimension of the kernel, its others), float64.
    kernel : Kernel
        And how it moves over the image.

    Returns
    -------
    list of Tensor
        Of each run the square of what the rounding of its gradient may be (Frobenius).
    """
    how = summation(tuple(rows.shape[2:]), tuple(image.shape[2:]), kernel)
    of_walk, of_sums = ((rounding * ALLOWANCE * torch.finfo(rows.dtype).eps) ** 2 for rounding in how.roundings)
    squares = summed(rows, image, counts, totals, how, kernel)
    # Sums without a common direction are as large as the walk, for which their rounding counts already.
    return [of_walk * walk + of_sums * (whole - walk).clamp(min=0) for walk, whole in squares]


def add_wide_gradient(rows: Tensor, image: Tensor, total: Tensor, kernel: Kernel) -> None:
    """Add the gradient of a kernel to a float64 matrix, in float64; all as for one run in `add_gradient_of_parts`.

    torch unfolds images for that, so it sees few positions at a time.
    """
    lengths = _cut(rows.shape[2:], UNFOLDED // (math.prod(kernel.shape[1:]) * kernel.groups))
    items = max(1, NUMBERS // (rows[0].numel() + image[0].numel()))
    for some_rows, some_image in zip(rows.split(items), image.split(items), strict=True):
        *sides, alone = in_parts(some_rows, some_image, lengths, kernel)
        few = max(1, NUMBERS // (sides[0][0].numel() + sides[1][0].numel()))
        for some, seen in zip(*(side.split(few) for side in sides), strict=True):
            total += kernel_gradient(some.double(), seen.double(), alone)


@functools.lru_cache(maxsize=1024)
def summation(positions: tuple[int, ...], space: tuple[int, ...], kernel: Kernel) -> Summation:
    """Find parts of an item that torch sums exactly enough, by sums of random numbers.

    Which of its ways torch takes it alone knows.  Some sum one term after the other: over the 50,000 voxels of an image that is
    35 eps off, where other ways are 2 eps off.

    Parameters
    ----------
    positions, space : tuple of int
        Positions of what the kernel's first dimension belongs to, and of the image.
    kernel : Kernel
        And how it moves over the image.
    """
    outputs, inputs = kernel.shape[0], kernel.shape[1] * kernel.groups
    lengths = _cut(positions, LARGEST_DRAWN // (outputs + inputs))
    if lengths != positions:
        space, kernel = tuple(kernel.reach(lengths)), replace(kernel, padding=(0,) * len(space))
    count = math.prod(lengths)
    apart = math.prod(kernel.shape) <= SMALL_KERNEL and count >= SOME_POSITIONS
    how = Summation(lengths, 1 if apart else max(2, POSITIONS // count))
    items = items_of_call(math.prod(kernel.shape), outputs * count + inputs * math.prod(space))
    draw = torch.Generator().manual_seed(0)
    rows, image = (
        torch.randn(max(2, how.parts, items), channels, *there, generator=draw, dtype=torch.float32, device="cpu")
        for channels, there in ((outputs, lengths), (inputs, space))
    )
    entries = [torch.randint(size, (ENTRIES,), generator=draw, device="cpu").tolist() for size in kernel.shape]

    def rounding(how: Summation) -> float:
        """Rounding of sums, in units of eps and of the sums; torch may have another way for many at a time than for two."""
        found = []
        for items in {2, len(rows)}:
            total = rows.new_zeros(outputs, math.prod(kernel.shape[1:]), dtype=torch.float64)
            (squares,) = summed(rows[:items], image[:items], [items], [total], how, kernel)
            exact = torch.stack(
                [_entry(rows[:items], image[:items], entry, kernel) for entry in zip(*entries, strict=True)]
            )
            error = (total.reshape(kernel.shape)[tuple(entries)] - exact).square().mean() * math.prod(kernel.shape)
            sums = max(float(squares[1]), torch.finfo(rows.dtype).tiny)  # none where padding alone is seen
            found.append(math.sqrt(float(error) / sums) / torch.finfo(rows.dtype).eps)
        return max(found)

    while (found := rounding(how)) > LARGEST_ROUNDING and math.prod(how.lengths) > FEWEST:
        # Where one term is summed after the other, rounding is in proportion to the root of their number.
        wanted = math.prod(how.lengths) * how.parts * min(0.5, (LARGEST_ROUNDING / found) ** 2)
        parts = min(how.parts, 2)
        how = Summation(_cut(how.lengths, max(wanted, FEWEST) / parts), parts)
    for side in (rows, image):
        side.abs_().add_(1)
    return replace(how, roundings=(found, rounding(how)))


def _cut(lengths: Sequence[int], positions: float) -> tuple[int, ...]:
    """Halve the longest dimension of a part until it has no more than so many positions."""
    lengths = list(lengths)
    while math.prod(lengths) > max(positions, 1):
        longest = lengths.index(max(lengths))
        lengths[longest] = -(-lengths[longest] // 2)
    return tuple(lengths)


def _padded(image: Tensor, margins: Sequence[tuple[int, int]]) -> Tensor:
    """An image with zeros before and after it in its last dimensions, or with less at its end, which may be all of it."""
    padded = F.pad(image, [max(number, 0) for margin in reversed(margins) for number in margin])
    for axis, (_, after) in enumerate(margins, start=padded.ndim - len(margins)):
        padded = padded.narrow(axis, 0, padded.shape[axis] + min(after, 0))
    return padded


def _entry(rows: Tensor, image: Tensor, entry: Sequence[int], kernel: Kernel) -> Tensor:
    """One entry of a kernel's gradient, in float64."""
    channel, within, *offsets = entry
    group = channel // (kernel.shape[0] // kernel.groups)
    seen = image[:, group * kernel.shape[1] + within]
    seen = _padded(seen, kernel.margins(rows.shape[2:], image.shape[2:]))
    each = zip(offsets, kernel.dilation, kernel.stride, rows.shape[2:], strict=True)
    for axis, (offset, spread, step, count) in enumerate(each, start=1):
        seen = seen.narrow(axis, offset * spread, (count - 1) * step + 1)[
            (slice(None),) * axis + (slice(None, None, step),)
        ]
    return torch.dot(rows[:, channel].double().flatten(), seen.double().flatten())
