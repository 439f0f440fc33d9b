"""Shares of one weight's gradient by cell, and their Gram matrices, as exact as the rounding of their sums demands."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .convolutions import Convolution
from .factors import (
    ROUNDING_OF_SUM,
    ROUNDING_OF_WALK,
    TERMS,
    Computed,
    Factors,
    Grid,
    Lookup,
    Product,
    add_wide_product,
    narrow,
    square,
)
from .sorting import Sorting, groups_of_cells
from .spectra import float64, gram_by_rows, gram_of_few, irregular, smaller_gram
from .stacks import together
from .workspace import LARGEST_KEPT, Workspace

# Products of at most this many numbers are formed in float64 from the start; on a GPU, which would have to be waited for to know
# whether they cancel, so are products of more, of convolutions if their patches have no more numbers than this.
SMALL, SMALL_ON_A_GPU, PATCHES_ON_A_GPU = 2**20, 2**28, 2**24
# A sum of shares this much smaller than they are has lost too much to float32, and is formed again in float64.
CANCELLED = 0.2
# The same where the rounding is known, relative to the share: every spectrum keeps to 1e-6; and steps in which its largest value
# is looked for.
ROUNDED, POWER_STEPS = 8e-7, 8
# Square of a share, over those of its factors, below which float64 products with the rows' Gram matrix lose 1e-6 of it.
CANCELLED_BY_ROWS = 1e-9
# Largest deviation of a gradient's product with a vector from that of the rows, in units of rounding (measured: 5.4).
ROUNDING_OF_IMAGE = 8.0
# Below this many rows, as a fraction of the matrix's smaller side, the factors are kept instead of the share.
FEW_ROWS = 0.75
# Convolutions with a smaller side are formed all the same, which takes fewer calls.
FEWEST_CHANNELS = 48


def wide_on_a_gpu(factors: Factors, shape: tuple[int, int]) -> bool:
    """Whether the factors of one use of a parameter of that shape are on a GPU, and few enough to form the share in float64."""
    used = factors.of_weight if isinstance(factors, Computed) else factors
    groups = used.groups if isinstance(used, Convolution) else 1
    if factors.adjoint.is_cpu or factors.rows * math.prod(shape) > SMALL_ON_A_GPU * groups:
        return False
    return not isinstance(used, Convolution) or used.rows * shape[1] <= PATCHES_ON_A_GPU


class Shares:
    """The cells' shares of one weight's gradient: factors while there are few rows, then one matrix a cell.

    Parameters
    ----------
    shape : (int, int)
        Shape of the parameter's matrix.
    workspace : Workspace
        Memory for the matrices.
    """

    def __init__(self, shape: tuple[int, int], workspace: Workspace) -> None:
        self.shape, self.workspace = shape, workspace
        self.counts: dict[bytes, int] = {}
        self.slots: dict[bytes, int] = {}
        self.products: dict[bytes, list[tuple[Tensor, Tensor]]] = {}
        self.lookups: dict[bytes, list[Lookup]] = {}
        self.squares: dict[bytes, Tensor] = {}
        self.room: Tensor | None = None
        self.batch: tuple[Tensor, Tensor] | None = None
        self.formed = False
        self.constant = False
        self.held: list[tuple[Factors, Sorting]] | None = []
        self._backward = -1
        self._matrices: tuple[Tensor, ...] = ()
        self._walks: dict[bytes, float] | None = None

    def add(self, factors: Factors, sorting: Sorting, backward: int = -1) -> None:
        """Add the items of one use in one backward pass, sorted by cell; they may not be modified afterwards."""
        self._walks = None
        given, counts, alone = factors, self.counts, not self.counts
        for key, count in zip(sorting.keys, sorting.counts, strict=True):
            counts[key] = counts.get(key, 0) + factors.rows_of(count)
        factors, sorting = self._by_rows(factors.as_stored(), sorting)
        if sorting.grid is not None:
            assert isinstance(factors, Product)
            self._add_by_sample(factors, sorting, sorting.grid)
            return
        if self.held is not None:
            large = max(given.activation.nbytes, given.adjoint.nbytes) > LARGEST_KEPT
            # Over several backward passes holding everything would cost what micro-batches are to save.
            one_pass = not self.held or backward == self._backward
            # What has cancelled is formed again on the processor alone.
            keep = one_pass and not large and factors.adjoint.is_cpu
            self.held = [*self.held, (factors, sorting)] if keep else None
            self._backward = backward
        if isinstance(factors, Product) and factors.outputs is None:
            parts = zip(
                sorting.keys,
                factors.adjoint.split_with_sizes(sorting.counts),
                factors.activation.split_with_sizes(sorting.counts),
                strict=True,
            )
            self.batch = None  # the gradient of one use alone says what the batch's share is
            few = max(counts.values()) < FEW_ROWS * min(self.shape)
            if factors.adjoint.is_cpu:  # their Gram matrix serves where the share does not nearly cancel
                few = few or (self.constant and not self.products and self._rows_are_cheaper())
            if not self.formed and few:
                for key, adjoint, activation in parts:
                    self.products.setdefault(key, []).append((adjoint, activation))
                return
            self._form()
            if not self._in_pieces(factors, sorting):
                self._add_products(list(parts))
                return
        if self._in_pieces(factors, sorting):
            self._form()
            for key in sorting.keys:
                matrix, first = self._place(key, factors.adjoint, torch.float64)
                if first:
                    matrix.zero_()
            # Where they lie now that all have a place.
            totals = [self._matrices[self.slots[key]] for key in sorting.keys]
            for key, squares in zip(
                sorting.keys, factors.add_pieces(sorting.counts, totals, self.workspace), strict=True
            ):
                self._note_rounding(key, squares)
            if alone and self.held is None:
                self._form_again_at_once(factors, sorting)
            return
        for key, part in zip(sorting.keys, factors.split(sorting.counts), strict=True):
            if isinstance(part, Lookup):
                self.lookups.setdefault(key, []).append(part)
                continue
            self._form()
            matrix, first = self._place(key, part.adjoint)
            share = part.converted(functools.partial(Tensor.to, dtype=matrix.dtype)).share()
            if first:
                matrix.copy_(share)
            else:
                matrix += share

    def _by_rows(self, factors: Factors, sorting: Sorting) -> tuple[Factors, Sorting]:
        """A convolution as a product of patches where these are few, or where the product can be in float64.

        The deep layers of a network have many channels, few positions.
        """
        if not isinstance(factors, Convolution) or factors.groups > 1:
            return factors, sorting
        counts = [factors.rows_of(count) for count in sorting.counts]
        few = not self.formed and min(self.shape) >= FEWEST_CHANNELS and max(counts) < FEW_ROWS * min(self.shape)
        if not few and not wide_on_a_gpu(factors, self.shape):
            return factors, sorting
        return factors.as_product(), replace(sorting, counts=counts, _tables={})

    def _add_by_sample(self, factors: Product, sorting: Sorting, grid: Grid) -> None:
        """Add the products of each sample's rows, which lie where they came and are not needed afterwards."""
        self.held = None
        self._form()
        form = (len(sorting.keys), *self.shape)
        shares = self.workspace.scratch("shares", form, torch.float64, factors.adjoint.device).zero_()
        squares = factors.add_by_sample(grid, shares, self.workspace)
        for cell in self._unresolved(shares, squares, groups_of_cells(tuple(sorting.keys))):
            adjoint, activation = (
                grid.of(side)[grid.cells == cell].flatten(0, 1) for side in (factors.adjoint, factors.activation)
            )
            add_wide_product(shares[cell].zero_(), adjoint, activation, self.workspace)
        for key, share in zip(sorting.keys, shares, strict=True):
            matrix, first = self._place(key, factors.adjoint, torch.float64)
            if first:
                matrix.copy_(share)
            else:
                matrix += share

    def _form_again_at_once(self, factors: Factors, sorting: Sorting) -> None:
        """Form again in float64 what has nearly cancelled, of one use alone, whose factors are not kept."""
        assert self.room is not None
        keys = list(self.slots)
        squares = np.array([float(self.squares[key]) for key in keys])
        for cell in self._unresolved(self.room[1 : len(keys) + 1], squares, groups_of_cells(tuple(keys))):
            share = self._matrices[self.slots[keys[cell]]].zero_()
            self.squares[keys[cell]] = share.new_zeros(())
            for key, part in zip(sorting.keys, factors.split(sorting.counts), strict=True):
                if key == keys[cell]:
                    part.add_pieces([len(part.adjoint)], [share], self.workspace, exact=True)

    def _unresolved(self, shares: Tensor, squares: np.ndarray, groups: Tensor) -> list[int]:
        """Cells of groups whose share is not large enough over its rounding.

        Parameters
        ----------
        shares : Tensor
            Of each cell, shape (cells, outputs, inputs), float64.
        squares : ndarray, shape (cells,)
            Square of what the rounding of each may be (Frobenius).
        groups : Tensor of 0 and 1, shape (groups, cells), float64
            Which cells belong to each.
        """
        rounded = (groups @ torch.from_numpy(squares)).sqrt() * self._largest_of_rounding
        flat = shares.flatten(1)
        norms = (groups @ (flat @ flat.T) @ groups.T).diagonal().clamp(min=0).sqrt()
        # The largest singular value is not below the root of their mean square.
        groups, rounded = (each[rounded * min(self.shape) ** 0.5 > ROUNDED * norms] for each in (groups, rounded))
        if not len(groups):
            return []
        sums = (groups @ flat).unflatten(1, self.shape)
        # The power method: lower bounds of the largest singular value, soon near it where one direction prevails.
        direction = irregular(self.shape[1], torch.float64).expand(len(sums), -1).unsqueeze(2)
        for _ in range(POWER_STEPS):
            image = sums @ direction
            norms = image.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)
            if (rounded <= ROUNDED * norms).all():
                return []
            direction = sums.mT @ image
        # What is not finite cannot be mended.
        return torch.nonzero(groups[rounded > ROUNDED * norms].any(0)).flatten().tolist()

    @property
    def _largest_of_rounding(self) -> float:
        """Largest singular value of rounding, over its norm: it is a matrix without structure."""
        return min(1.0, sum(side**-0.5 for side in self.shape))

    def _rows_are_cheaper(self) -> bool:
        """Whether products with the Gram matrix of rows that stay the same cost less than the shares; float64 counts twice."""
        outputs, inputs = self.shape
        rows = max(self.counts.values())
        by_rows = 4 * rows * (rows + outputs)
        return outputs <= inputs and by_rows < 2 * inputs * (rows + 2 * outputs)

    def note_gradient(self, gradient: Tensor) -> None:
        """Note the gradient that arrived where the rows are kept: it may spare the product for the whole batch.

        What is kept of it is its Gram matrix and its product with one vector, since it belongs to the user, who may change it.
        """
        products = [pair for pairs in self.products.values() for pair in pairs]
        alone = not self.formed and not self.lookups and len(products) == len(self.products)
        if not products or not alone or not gradient.is_cpu or gradient.dtype != products[0][0].dtype:
            return
        if sum(self.counts.values()) < FEW_ROWS * min(self.shape):  # the whole batch's rows are few, too
            return
        matrix = gradient.reshape(self.shape)
        self.batch = (smaller_gram(matrix, self.workspace), matrix @ irregular(self.shape[1], matrix.dtype))

    def _gram_of_batch(self, grams: Mapping[bytes, Tensor]) -> Tensor | None:
        """Gram matrix of the gradient that arrived, if it is the sum of the rows' shares and these do not nearly cancel.

        Two matrices that have the same product with a vector without regularity are the same (Freivalds 1977), to rounding.
        """
        if self.batch is None or set(grams) != set(self.products):
            return None
        gram, image = self.batch
        norm, norms = _norm(gram), list(map(_norm, grams.values()))
        squares = self.rounding_of_products(list(grams), sum(norms) ** 2)
        if not (norm > CANCELLED * sum(norms) if squares is None else self._outweighs(gram, norm, squares)):
            return None
        parts, walk = [], 0.0
        for ((adjoint, activation),) in self.products.values():
            seen = self.workspace.memo(activation, _image, lasting=self.constant)
            parts.append(adjoint.T @ seen)
            walk += float(torch.dot(seen, seen)) * float(square(adjoint)) / len(adjoint)
        images = torch.stack(parts)
        unit = torch.finfo(image.dtype).eps * (math.sqrt(walk) + float(images.norm(dim=1).sum()))
        return gram if float((image - images.sum(0)).norm()) <= ROUNDING_OF_IMAGE * unit else None

    def _form(self) -> None:
        """Form the matrices of the products that were kept; from now on shares are matrices."""
        self.formed = True
        self._add_products([(key, *pair) for key, pairs in self.products.items() for pair in pairs])
        self.products = {}

    def _add_products(self, parts: Sequence[tuple[bytes, Tensor, Tensor]]) -> None:
        r"""Add :math:`\Delta^\top A` of some rows of cells (paper, Eq. 1)."""
        wide = torch.float64 if narrow(*self.shape, max(self.counts.values(), default=0)) else None
        for key, adjoint, activation in parts:
            matrix, first = self._place(key, adjoint, wide if adjoint.is_cpu else None)
            if adjoint.dtype != matrix.dtype:
                adjoint, activation = adjoint.to(matrix.dtype), activation.to(matrix.dtype)
            if first:
                torch.mm(adjoint.T, activation, out=matrix)
            else:
                matrix.addmm_(adjoint.T, activation)

    def _in_pieces(self, factors: Factors, sorting: Sorting) -> bool:
        """Whether shares are, or may be, float64 matrices to which sums of some products each are added."""
        if self.room is not None and self.room.dtype != torch.float64:
            return False
        if isinstance(factors, Product):
            # Others are formed at once, if they are there when they turn out to have cancelled.
            in_pieces = max(sorting.counts) > TERMS or self.held is None
            return factors.adjoint.is_cpu and factors.adjoint.dtype == torch.float32 and in_pieces
        return factors.in_pieces

    def _note_rounding(self, key: bytes, squares: Tensor) -> None:
        """Note the square of what the rounding of an addend to a cell's share may be (Frobenius)."""
        self.squares[key] = self.squares.get(key, 0) + squares

    def _place(self, key: bytes, like: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, bool]:
        """Where the matrix of a cell lies, and whether nothing is there yet; of that type, where it is the first."""
        slot = self.slots.get(key)
        if slot is not None:
            return self._matrices[slot], False
        slot = self.slots[key] = len(self.slots) + 1  # the first place is for the sum
        if self.room is None or len(self.room) <= slot:
            small = sum(self.counts.values()) * math.prod(self.shape) <= SMALL
            if self.room is not None:
                dtype = self.room.dtype
            elif dtype is None:
                dtype = torch.float64 if small else like.dtype
            room = self.workspace.take((max(slot, len(self.counts)) + 1, *self.shape), dtype, like.device)
            if self.room is not None:
                room[:slot] = self.room[:slot]
            self.room, self._matrices = room, room.unbind(0)
        return self._matrices[slot], True

    def put(self, key: bytes, matrix: Tensor, count: int) -> None:
        """Take a cell's share that is known as a matrix."""
        self.counts[key] = count
        self.formed = True
        place, _ = self._place(key, matrix)
        place.copy_(matrix)

    def matrix(self, cells: Sequence[bytes]) -> Tensor:
        """The share of some cells together, shape of the parameter's matrix."""
        total: Tensor | None = None
        slots = [self.slots[key] for key in cells if key in self.slots]
        if slots:
            assert self.room is not None
            total = self.room[slots[0]] if len(slots) == 1 else self.room[slots].sum(0)
        pairs = [pair for key in cells for pair in self.products.get(key, ())]
        if pairs:
            adjoint, activation = (together(side) for side in zip(*pairs, strict=True))
            total = adjoint.T @ activation if total is None else total.addmm(adjoint.T, activation)
        for key in cells:
            for lookup in self.lookups.get(key, ()):
                share = lookup.in_float64().share()
                total = share if total is None else float64(total) + share
        if total is None:
            raise RuntimeError("a share without rows has no matrix")
        return total

    def matrices(self, groups: Sequence[Sequence[bytes]]) -> Tensor:
        """Shares of groups of cells in float64, shape (groups, *shape of the matrix); valid until the step's end.

        Cells may cancel each other, so they are summed in float64.
        """
        every = list(self.slots)
        if not self.formed or self.lookups or any(key not in self.slots for cells in groups for key in cells):
            return torch.stack([self._wide_sum([float64(self.matrix([key])) for key in cells]) for cells in groups])
        assert self.room is not None
        wide = float64(self.room[: len(every) + 1], self.workspace)
        parts = wide.unbind(0)
        if list(groups) == [every, *([key] for key in every)]:  # all, then each cell: as they lie
            self._wide_sum(parts[1:], out=wide[0])
            return wide
        return torch.stack([self._wide_sum([parts[self.slots[key]] for key in cells]) for cells in groups])

    @staticmethod
    def _wide_sum(parts: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        if len(parts) == 1:
            return parts[0] if out is None else out.copy_(parts[0])
        total = torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            total += part
        return total

    def grams(self, groups: Sequence[Sequence[bytes]]) -> list[tuple[list[int], Tensor]]:
        """Gram matrices of the shares of groups of cells.

        Returns
        -------
        list of (list of int, Tensor)
            Positions of groups, and their Gram matrices (groups, s, s), float64: together where sizes are equal.
        """
        if self.lookups and not self.slots and not self.products:
            return [([i], smaller_gram(self._looked_up(cells)).unsqueeze(0)) for i, cells in enumerate(groups)]
        if self.lookups:  # rows of products say nothing of them
            self._form()
        if self.formed:
            grams = smaller_gram(self.matrices(groups), self.workspace)
            self._repair(groups, grams)
            return [(list(range(len(groups))), grams)]
        unions = [cells for cells in groups if 1 < len(cells) < len(self.counts)]
        if unions and max(self.counts.values()) >= FEW_ROWS * min(self.shape):
            self._form()
            return self.grams(groups)
        return self._grams_of_rows(groups)

    def _grams_of_rows(self, groups: Sequence[Sequence[bytes]]) -> list[tuple[list[int], Tensor]]:
        """Gram matrices where the rows are kept: from the rows' own where that is cheaper than the share."""
        found: dict[int, Tensor] = {}
        for i, cells in enumerate(groups):
            pairs = [pair for key in cells for pair in self.products[key]]
            if sum(self.counts[key] for key in cells) < FEW_ROWS * min(self.shape):
                adjoint, activation = pairs[0] if len(pairs) == 1 else tuple(map(together, zip(*pairs, strict=True)))
                found[i] = gram_of_few(activation, adjoint, self.workspace, self.constant and len(pairs) == 1)
            elif len(pairs) == 1 and self.constant:
                found[i] = gram_by_rows(*pairs[0], self.workspace)
                walks = self._walks_of_cells()
                largest = walks[cells[0]] * len(pairs[0][0]) if walks else 0.0
                if 0 < float(found[i].trace()) < CANCELLED_BY_ROWS * largest:
                    found[i] = smaller_gram(self._wide_share(cells))
        of_cells = {groups[i][0]: gram for i, gram in found.items() if len(groups[i]) == 1}
        rest = [i for i in range(len(groups)) if i not in found]
        batch = self._gram_of_batch(of_cells) if rest and len(groups[rest[0]]) == len(self.counts) else None
        if batch is not None:
            found[rest.pop(0)] = batch
        by_size: dict[int, list[int]] = {}
        for i, gram in found.items():
            by_size.setdefault(len(gram), []).append(i)
        results = [(some, torch.stack([found[i] for i in some])) for some in by_size.values()]
        if rest:
            formed = [groups[i] for i in rest]
            grams = smaller_gram(self.matrices(formed), self.workspace)
            self._repair(formed, grams, of_cells)
            results.append((rest, grams))
        return results

    def _repair(
        self, groups: Sequence[Sequence[bytes]], grams: Tensor, known: Mapping[bytes, Tensor] | None = None
    ) -> None:
        """Form again in float64 what has nearly cancelled, as the batch's gradient does near a stationary point."""
        exact = self.room is not None and self.room.dtype == torch.float64 and not self.squares
        if not self.held or exact or not grams.is_cpu:
            return
        norms = grams.diagonal(dim1=1, dim2=2).sum(1).sqrt().tolist()
        of_cell = {key: _norm(gram) for key, gram in (known or {}).items()}
        of_cell |= {cells[0]: norm for cells, norm in zip(groups, norms, strict=True) if len(cells) == 1}
        for i, cells in enumerate(groups):
            squares: float | None
            if not self.lookups and all(key in self.squares for key in cells):
                squares = sum(float(self.squares[key]) for key in cells)
            else:
                unknown = [key for key in cells if key not in of_cell]
                if unknown and not self._walks_of_cells():
                    continue
                parts = [of_cell[key] if key in of_cell else self._norm_of_share(key) for key in cells]
                squares = self.rounding_of_products(cells, sum(part**2 for part in parts))
                if squares is None and (len(cells) == 1 or norms[i] >= CANCELLED * sum(parts)):
                    continue
            if not self._outweighs(grams[i], norms[i], squares):
                grams[i] = smaller_gram(self._wide_share(cells))

    def _norm_of_share(self, key: bytes) -> float:
        """Frobenius norm of the share of a cell that is no group by itself."""
        return float(torch.linalg.vector_norm(self.matrix([key])))

    def rounding_of_products(self, cells: Sequence[bytes], sums: float) -> float | None:
        """Square of what the rounding of some cells' products may be (Frobenius), if that is what their shares are.

        ``sums`` is the square of what is summed up, cell by cell, or in one product for all of them.
        """
        walks = self._walks_of_cells()
        if not walks:
            return None
        squares = ROUNDING_OF_WALK**2 * sum(walks[key] for key in cells) + ROUNDING_OF_SUM**2 * sums
        return torch.finfo(torch.float32).eps ** 2 * squares

    def _walks_of_cells(self) -> dict[bytes, float]:
        """Square of what each cell's share would be if the terms of its products had no common direction; or nothing.

        They are known of products in single precision of few rows, which are held; computed once a step.  Lookups are summed
        in float64, but what they take away from a product was rounded.
        """
        if self._walks is None:
            held = self.held or []
            products = [(factors, sorting) for factors, sorting in held if not isinstance(factors, Lookup)]
            known = all(
                isinstance(factors, Product)
                and factors.adjoint.dtype == torch.float32
                and max(sorting.counts, default=0) <= TERMS
                for factors, sorting in products
            )
            self._walks = dict.fromkeys(self.counts, 0.0) if products and known else {}
            for key in self.lookups if self._walks else ():
                self._walks[key] += (ROUNDING_OF_SUM / ROUNDING_OF_WALK) ** 2 * float(square(self._looked_up([key])))
            for factors, sorting in products if known else ():
                sides = (side.split_with_sizes(sorting.counts) for side in (factors.adjoint, factors.activation))
                for key, adjoint, activation in zip(sorting.keys, *sides, strict=True):
                    seen = self.workspace.memo(activation, _square, lasting=self.constant)
                    self._walks[key] += float(square(adjoint)) * float(seen) / max(len(adjoint), 1)
        return self._walks

    def _outweighs(self, gram: Tensor, norm: float, squares: float | None) -> bool:
        """Whether a share is large enough over its rounding, so far as that is known; what is not finite cannot be mended."""
        if squares is None:
            return False
        rounded = math.sqrt(squares) * self._largest_of_rounding
        if not math.isfinite(rounded) or rounded <= ROUNDED * norm / math.sqrt(len(gram)):
            return True
        least = float(gram.norm()) / norm if norm else 0.0  # at most the share's largest singular value
        return rounded <= ROUNDED * least

    def _wide_share(self, cells: Sequence[bytes]) -> Tensor:
        """The share of some cells from their factors, in float64."""
        assert self.held is not None
        outputs, inputs = self.shape
        # With the longer side last in memory these products take a third less time.
        total = torch.zeros(sorted(self.shape), dtype=torch.float64)
        total = total.mT if outputs > inputs else total
        for factors, sorting in self.held:
            for key, part in zip(sorting.keys, factors.split(sorting.counts), strict=True):
                if key not in cells:
                    continue
                if part.in_pieces or isinstance(part, Product):
                    part.add_pieces([len(part.adjoint)], [total], self.workspace, exact=True)
                else:
                    total += part.in_float64().share()
        return total

    def _looked_up(self, cells: Sequence[bytes]) -> Tensor:
        """Rows of a table's share that are not zero, shape (rows, width), float64."""
        lookups = [lookup for key in cells for lookup in self.lookups[key]]
        index = torch.cat([lookup.activation for lookup in lookups])
        adjoint = torch.cat([float64(lookup.adjoint) for lookup in lookups])
        index, count = index.to(adjoint.device), min(len(index), lookups[0].size)
        if adjoint.is_cpu:
            there, index = torch.unique(index, return_inverse=True)
            count = len(there)
        elif count == len(index):  # counting those that differ would wait for the device
            index = torch.searchsorted(index.sort().values, index)
        return adjoint.new_zeros(count, adjoint.shape[1]).index_add_(0, index, adjoint)


def _norm(gram: Tensor) -> float:
    """Frobenius norm of the matrix with that Gram matrix."""
    return math.sqrt(max(float(gram.trace()), 0.0))


def _square(tensor: Tensor, _: Workspace) -> Tensor:
    """Sum of the squares of a tensor's numbers."""
    return square(tensor)


def _image(activation: Tensor, _: Workspace) -> Tensor:
    """Product of rows with a vector without regularity."""
    return activation @ irregular(activation.shape[1], activation.dtype)
