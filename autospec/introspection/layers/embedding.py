"""nn.Embedding: the activation is the index as a row with a single one, the adjoint the derivative at the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..factors import Lookup
from ..groups import places
from ..hooks import Hook
from ..workspace import Workspace
from .call import LayerCall, OnCall, hold_nan


class LookupCall(LayerCall):
    """One lookup."""

    parameters = ("weight",)

    def __init__(self, module: nn.Embedding, index: Tensor, output: Tensor) -> None:
        self.module = module
        self.inputs, self.outputs = (index,), (output,)
        self.kept = None if module.padding_idx is None else (index != module.padding_idx).flatten()

    def marks(self, parameter: str) -> Tensor:
        """Whether each vector that was looked up holds a NaN."""
        return hold_nan(self.outputs[0], self.outputs[0].ndim - 1).flatten()

    def samples_of_items(self, parameter: str, samples: np.ndarray) -> np.ndarray:
        """Items are indices; padding has no share in the weight."""
        return samples if self.kept is None else samples[self.kept.cpu().numpy()]

    def positions_of_items(self, parameter: str, samples: np.ndarray) -> tuple[np.ndarray, int] | None:
        """Padding has a position, too."""
        if self.kept is None:
            return None
        positions = places(samples, int(samples.max()) + 1)
        return positions[self.kept.cpu().numpy()], int(positions.max()) + 1

    def layout(self) -> Any:
        """Where the padding is."""
        return None if self.kept is None else self.kept.cpu().numpy().tobytes()

    def factors(self, parameter: str, adjoints: Sequence[Tensor | None], workspace: Workspace) -> Lookup:
        """The indices and the derivative at the output, without padding."""
        adjoint = adjoints[0]
        assert adjoint is not None
        index, adjoint = self.inputs[0].flatten().long(), adjoint.reshape(-1, adjoint.shape[-1])
        if self.kept is not None:
            index, adjoint = index[self.kept], adjoint[self.kept]
        return Lookup(index, adjoint, self.module.num_embeddings)

    def for_each_sample(self, count: int, dim: int, new: bool) -> LookupCall:
        """The same lookup, once for every sample: a table of positions, say, that the whole batch shares.

        Parameters
        ----------
        count : int
            Samples.
        dim : int
            Dimension of the output along which they lie.
        new : bool
            Whether the dimension is put in; otherwise it has size 1.

        Returns
        -------
        LookupCall
            Its output is an expanded view with the same values, to be used instead of the shared output; the sum that
            autograd then forms over the samples is the one that broadcasting would have formed.
        """
        index, output = self.inputs[0], self.outputs[0]
        if new:
            index, output = index.unsqueeze(dim), output.unsqueeze(dim)
        shape = [count if axis == dim else size for axis, size in enumerate(output.shape)]
        return LookupCall(self.module, index.expand(shape[:-1]), output.expand(shape))

    def constant(self, parameter: str) -> Tensor | None:
        """Nothing: the spectrum of indices is a count."""
        return None


class SpreadCall(LayerCall):
    """A table that meets data elementwise, as learned positions do: a lookup of a row for each row of the data.

    Parameters
    ----------
    parameter : str
        Name of the table in its module.
    data : Tensor
        Shape (..., width); it tells whose rows are whose.
    index : Tensor of int
        Shape (...): which row of the table each row of data meets.
    output : Tensor
        The table, spread over the data.
    rows : int
        Rows of the table.
    narrow : bool
        Whether these are single numbers, of which each meets a whole row of the data.
    """

    def __init__(
        self, parameter: str, data: Tensor, index: Tensor, output: Tensor, rows: int, narrow: bool = False
    ) -> None:
        self.parameters = (parameter,)
        self.inputs, self.outputs = (index,), (output,)
        self.rows, self.narrow = rows, narrow
        self._data: Tensor | None = data

    def marks(self, parameter: str) -> Tensor:
        """Whether each row of data holds a NaN."""
        assert self._data is not None
        return hold_nan(self._data, self._data.ndim - 1)

    def leave_graph(self) -> None:
        """Let go of the data, too."""
        super().leave_graph()
        self._data = None

    def factors(self, parameter: str, adjoints: Sequence[Tensor | None], workspace: Workspace) -> Lookup:
        """The indices, and the derivative at the table as it was spread; of complex numbers their two parts."""
        adjoint = adjoints[0]
        assert adjoint is not None
        adjoint = adjoint.reshape(-1, adjoint.shape[-1])
        adjoint = adjoint.sum(1, keepdim=True) if self.narrow else adjoint
        if adjoint.is_complex():
            adjoint = torch.view_as_real(adjoint.resolve_conj()).flatten(1)
        return Lookup(self.inputs[0].flatten(), adjoint, self.rows)

    def constant(self, parameter: str) -> Tensor | None:
        """Nothing: the spectrum of indices is a count."""
        return None


class BiasCall(LayerCall):
    """A bias that is made of weights: a table of one row, which all rows of a product or entries of a convolution meet.

    Parameters
    ----------
    product : LayerCall
        What is reported of the product or the convolution to which it is added.
    """

    def __init__(self, product: LayerCall) -> None:
        self.product = product
        self.inputs, self.outputs, self.parameters = product.inputs, product.outputs, product.parameters

    def marks(self, parameter: str) -> Tensor:
        """As of the product."""
        return self.product.marks(parameter)

    def entries(self, parameter: str, output: Tensor) -> Tensor:
        """As of the product."""
        return self.product.entries(parameter, output)

    def leave_graph(self) -> None:
        """As the product does."""
        self.product.leave_graph()
        super().leave_graph()

    def release(self) -> None:
        """As the product does."""
        self.product.release()
        super().release()

    def factors(self, parameter: str, adjoints: Sequence[Tensor | None], workspace: Workspace) -> Lookup:
        """Derivatives at the sum, one row for each; of a convolution summed over positions."""
        adjoint = self.product.factors(parameter, adjoints, workspace).adjoint
        adjoint = adjoint.flatten(2).sum(2) if adjoint.ndim > 2 else adjoint
        return Lookup(torch.zeros(len(adjoint), dtype=torch.int64, device=adjoint.device), adjoint, 1)

    def constant(self, parameter: str) -> Tensor | None:
        """Nothing: the spectrum of indices is a count."""
        return None


class EmbeddingRule:
    """nn.Embedding, and subclasses that keep its forward pass."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module computes nn.Embedding's own forward pass."""
        return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        """The table."""
        return ("weight",)

    def attach(self, module: nn.Module, on_call: OnCall) -> list[RemovableHandle]:
        """Report the indices and the output of each forward pass."""
        assert isinstance(module, nn.Embedding)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            return on_call(LookupCall(module, args[0] if args else kwargs["input"], output))

        # After the user's hooks, who are not to see an output that is spread over the samples.
        return [module.register_forward_hook(Hook(hook), with_kwargs=True)]
