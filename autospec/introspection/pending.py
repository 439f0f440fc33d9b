"""What has arrived for one parameter since the last step, by cell of samples.

Everything adds up over the uses of the parameter and over micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .factors import Computed, Factors, Lookup, Product
from .shares import Shares
from .sorting import Sorting
from .stacks import IndexStack, RowStack, row_count
from .workspace import Workspace


class Pending:
    """What has arrived for one parameter since the last step.

    Parameters
    ----------
    shape : (int, int)
        Shape of the parameter's matrix.
    workspace : Workspace
        Memory for what lasts until the step is closed.
    """

    takes_grids: ClassVar[bool] = True
    """Whether `add` takes items that were left in a `Grid`."""

    def __init__(self, shape: tuple[int, int], workspace: Workspace) -> None:
        self.shape, self.workspace = shape, workspace
        self.shares = Shares(shape, workspace)
        self.stacks: dict[str, dict[int, dict[bytes, RowStack]]] = {"activation": {}, "adjoint": {}}
        self.indices: dict[int, dict[bytes, IndexStack]] = {}
        self.by_position: dict[bytes, Tensor] = {}
        self.rows: dict[bytes, int] = {}
        self.dtype: torch.dtype | None = None
        self.exact: dict[bytes, Tensor] = {}
        self.arrived: Tensor | None = None
        self.walk: Tensor | float = 0.0
        self.unnoted = self.began_empty = self.computed = False
        self.by_kernel: Tensor | None = None
        self.left_out: Tensor | None = None
        self._widths: dict[str, dict[int, int]] = {"activation": {}, "adjoint": {}}
        self._given_up: set[str] = set()

    def give_up(self, statistic: str) -> None:
        """Record nothing of a factor in this step."""
        self._given_up.add(statistic)
        self.stacks[statistic] = {}

    def note_width(self, statistic: str, width: int) -> None:
        """Note that there are rows of that width."""
        self._widths[statistic][width] = width

    def widths(self) -> dict[str, int]:
        """How many singular values the activation and the adjoint can have."""
        return {statistic: sum(forms) for statistic, forms in self._widths.items()}

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
        """Add one use of the parameter in one backward pass.

        Parameters
        ----------
        factors : Factors
            Items sorted by cell.
        sorting : Sorting
            Items of each cell.
        shares : bool
            Whether the groups' shares are needed.
        statistics : sequence of str
            Which of the factors' spectra are recorded.
        constant : bool
            Whether the activation is a copy of data that may be the same as in the last step.
        follows : callable, optional
            Says of the rows of each cell and their width whether to keep them as they are, for the tracked solver.
        backward : int
            Number of the backward pass.
        counted : bool
            Whether the rows count: not those that an earlier backward pass has added.
        """
        factors = self._kept(factors, sorting, constant, follows is not None)
        if shares:
            # Of a product that is transposed the activation is the other factor of the share.
            self.shares.constant = constant and not (isinstance(factors, Product) and factors.transposed)
            self.shares.add(factors, sorting, backward)
        for key, count in zip(sorting.keys, sorting.counts, strict=True):
            self.rows[key] = self.rows.get(key, 0) + factors.rows_of(count) * counted
        statistics = [statistic for statistic in statistics if statistic not in self._given_up]
        parts = factors.split(sorting.counts) if statistics else []
        for statistic in statistics:
            used = factors.of_weight if isinstance(factors, Computed) else factors
            if statistic == "activation" and isinstance(used, Lookup):
                self.note_width(statistic, used.size)
                indices = self.indices.setdefault(used.size, {})
                for key, part in zip(sorting.keys, parts, strict=True):
                    indices.setdefault(key, IndexStack(used.size)).add(part.activation)
                continue
            rows = [part.activation_rows() if statistic == "activation" else part.adjoint_rows() for part in parts]
            width = rows[0].shape[1]
            self.note_width(statistic, width)
            stacks = self.stacks[statistic].setdefault(width, {})
            keep = constant and statistic == "activation"
            keep = keep or (follows is not None and follows([row_count(some) for some in rows], width))
            for key, some in zip(sorting.keys, rows, strict=True):
                stacks.setdefault(key, RowStack(width, self.workspace)).add(some, keep)

    @property
    def keeps_rows(self) -> bool:
        """Whether rows that were added are still needed."""
        shares = self.shares.held is not None or bool(self.shares.products or self.shares.lookups)
        stacks = (stack for kind in self.stacks.values() for by_cell in kind.values() for stack in by_cell.values())
        return shares or any(stack.rows for stack in stacks)

    def _kept(self, factors: Factors, sorting: Sorting, constant: bool, followed: bool) -> Factors:
        """What is kept until the step is closed must not change with the user's tensors."""
        if sorting.order is not None or sorting.grid is not None:
            return factors
        widths = factors.activation.shape[1:2] + factors.adjoint.shape[1:2] + self.shape
        few = max(map(factors.rows_of, sorting.counts)) < max(widths)
        if isinstance(factors, Lookup) or few or ((constant or followed) and isinstance(factors, Product)):
            activation = factors.activation if constant else factors.activation.clone()
            return factors.with_(activation, factors.adjoint.clone())
        return factors

    def add_by_position(
        self,
        factors: Factors,
        sorting: Sorting,
        first: int,
        before: int = 0,
        after: int = 0,
    ) -> int:
        """Add the shares of each position of one use.

        Parameters
        ----------
        factors : Factors
            Items sorted by cell.
        sorting : Sorting
            Items of each cell.
        first : int
            Positions of the uses before it.
        before, after : int
            Uses before and after it that have no share but positions, as many as this one.

        Returns
        -------
        int
            Positions so far.
        """
        found = [
            part.shares_by_position(sorting.by_position(cell, part.adjoint.device))
            for cell, part in enumerate(factors.split(sorting.counts))
        ]
        length = max(map(len, found))
        first += before * length
        last = first + (1 + after) * length
        for key, shares in zip(sorting.keys, found, strict=True):
            total = self.by_position.get(key, shares.new_zeros(0, *self.shape))
            end = last if after else first + len(shares)
            if len(total) < end:
                total = torch.cat([total, shares.new_zeros(end - len(total), *self.shape)])
            total[first : first + len(shares)] += shares
            self.by_position[key] = total
        return last

    def add_exact(self, factors: Factors, sorting: Sorting) -> None:
        """Add the same in float64, for the audit."""
        for key, part in zip(sorting.keys, factors.split(sorting.counts), strict=True):
            exact = part.in_float64().share()
            self.exact[key] = self.exact[key] + exact if key in self.exact else exact
