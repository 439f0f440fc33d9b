"""nn.RNN, nn.GRU, nn.LSTM and their cells: input-to-hidden, hidden-to-hidden and projection weights apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from ..errors import WatchError
from ..factors import Product, single
from ..gates import Adjoints, Scan, Weights, adjoints, scan
from ..hooks import Hook
from ..workspace import Workspace, to_device
from .call import LayerCall, OnCall, hold_nan

# Deviation of the layer's output, computed again, that only another dropout mask explains.
SAME_OUTPUT = 1e-3
CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
CELLS: dict[Any, str] = {nn.RNNCell: "", nn.GRUCell: "GRU", nn.LSTMCell: "LSTM"}


def _matrices(module: Any) -> tuple[str, ...]:
    """Names of the weights that are parameters, and not computed from others."""
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    return tuple(name for name in module._flat_weights_names if name in own and name.startswith("weight"))


class _Sequences:
    """The layout of a batch of sequences: (time, sequence, width), short sequences filled up with zeros."""

    def __init__(self, module: Any, given: Tensor | PackedSequence) -> None:
        self.packed = isinstance(given, PackedSequence)
        self.order: Tensor | None = None
        self.lengths: Tensor | None = None
        if isinstance(given, PackedSequence):
            counts = given.batch_sizes
            self.valid = torch.arange(int(counts[0])) < counts.unsqueeze(1)
            self.lengths = self.valid.sum(0)
            self.order = given.sorted_indices
            # Known here, so that nothing waits for a GPU to count them.
            self.places = to_device(self.valid.flatten().nonzero().squeeze(1), given.data.device)
            self.valid = to_device(self.valid, given.data.device)
        self.first, self.single = module.batch_first, not self.packed and given.ndim == 2  # type: ignore[union-attr]

    def apart(self, tensor: Tensor) -> Tensor:
        """Bring data, an output or the derivative at it, into the layout."""
        if self.packed:
            steps, sequences = self.valid.shape
            filled = tensor.new_zeros(steps * sequences, tensor.shape[-1]).index_copy_(0, self.places, tensor)
            return filled.unflatten(0, (steps, sequences))
        if self.single:
            return tensor.unsqueeze(1)
        return tensor.transpose(0, 1) if self.first else tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """Rows of valid steps, time first; shape (rows, width)."""
        return tensor.flatten(0, 1).index_select(0, self.places) if self.packed else tensor.flatten(0, 1)

    def state(self, tensor: Tensor) -> Tensor:
        """Bring a first or last state, or the derivative at it, into the layout: (layers, sequence, width)."""
        tensor = tensor.unsqueeze(1) if tensor.ndim == 2 else tensor
        return tensor if self.order is None else tensor.index_select(1, self.order)

    def turned(self, tensor: Tensor) -> Tensor:
        """Turn each sequence around within its length."""
        if self.lengths is None:
            return tensor.flip(0)
        steps = torch.arange(len(tensor)).unsqueeze(1)
        source = torch.where(steps < self.lengths, self.lengths - 1 - steps, steps)
        return tensor.gather(0, to_device(source, tensor.device).unsqueeze(-1).expand(tensor.shape))

    def at_end(self, tensor: Tensor, final: Tensor) -> None:
        """Add the derivative at the last state to that at the last step of each sequence, in place."""
        if self.lengths is None:
            tensor[-1] += final
        else:
            last = to_device(self.lengths, tensor.device) - 1
            tensor[last, torch.arange(tensor.shape[1], device=tensor.device)] += final

    def samples_of_rows(self, samples: np.ndarray, steps: int) -> np.ndarray:
        """Sample of each row, given the sample of each sequence."""
        if self.order is not None:
            samples = samples[self.order.cpu().numpy()]
        if self.packed:
            valid = self.valid.cpu().numpy()
            return np.broadcast_to(samples, valid.shape)[valid]
        return np.tile(samples, steps)


class RecurrentCall(LayerCall):
    """One forward pass through nn.RNN, nn.GRU or nn.LSTM."""

    reads_outputs = True

    def __init__(
        self,
        module: Any,
        given: Tensor | PackedSequence,
        state: Any,
        output: Any,
        generator: Tensor | None,
    ) -> None:
        self.module, self.generator = module, generator
        self.sequences = _Sequences(module, given)
        data = given.data if isinstance(given, PackedSequence) else given
        out, last = output
        out = out.data if isinstance(out, PackedSequence) else out
        states: tuple[Tensor, ...] = () if state is None else state if isinstance(state, tuple) else (state,)
        self.outputs = (out, *(last if isinstance(last, tuple) else (last,)))
        self.inputs = (data, *states)
        self.parameters = _matrices(module)
        self.output_version = out._version
        # What the forward pass has just used: a weight that is computed from others, as by orthogonal(), is no parameter, and
        # asking for it would compute it again, which moves spectral normalisation on.
        used = zip(module._flat_weights_names, module._flat_weights, strict=True)
        self._weights = {name: (weight.detach(), weight._version) for name, weight in used if weight is not None}
        self._found: tuple[tuple[Tensor | None, ...], dict[str, Product]] = ((), {})

    def marks(self, parameter: str) -> Tensor:
        """Whether each sequence holds a NaN, in the caller's order."""
        marked = hold_nan(self.sequences.apart(self.inputs[0]), 2).any(0)
        for state in self.inputs[1:]:
            marked = marked | hold_nan(self.sequences.state(state), 2).any(0)
        if self.sequences.order is None:
            return marked
        return torch.empty_like(marked).index_copy_(0, self.sequences.order, marked)

    def samples_of_items(self, parameter: str, samples: np.ndarray) -> np.ndarray:
        """Items are valid steps of sequences, time first."""
        return self.sequences.samples_of_rows(samples, len(self.sequences.apart(self.inputs[0])))

    def positions_of_items(self, parameter: str, samples: np.ndarray) -> tuple[np.ndarray, int] | None:
        """Steps of packed sequences."""
        if not self.sequences.packed:
            return None
        valid = self.sequences.valid.cpu().numpy()
        return np.nonzero(valid)[0], len(valid)

    def factors(self, parameter: str, adjoints: Sequence[Tensor | None], workspace: Workspace) -> Product:
        """Rows of what enters the weight and of the derivative at the gates; computed once for all weights."""
        if not _identical(self._found[0], adjoints):
            with torch.no_grad(), torch.autocast(self.inputs[0].device.type, enabled=False):
                self._found = (tuple(adjoints), self._compute(adjoints, workspace))
        return self._found[1][parameter]

    def layout(self) -> Any:
        """Lengths of the sequences, and the order in which they were packed."""
        lengths, order = self.sequences.lengths, self.sequences.order
        return None if lengths is None else (tuple(lengths.tolist()), None if order is None else tuple(order.tolist()))

    def order_key(self, place: tuple[str, str]) -> tuple[str, ...]:
        """All weights of the module have the same rows."""
        return (place[0],)

    def constant(self, parameter: str) -> Tensor | None:
        """The data, for the first layer."""
        return self.inputs[0] if parameter.startswith("weight_ih_l0") and not self.sequences.packed else None

    def forget(self) -> None:
        """Let go of what was computed."""
        self._found = ((), {})

    # ------------------------------------------------------------------ the scan over layers and directions

    def _compute(self, at: Sequence[Tensor | None], workspace: Workspace) -> dict[str, Product]:
        module, sequences = self.module, self.sequences
        for name, (weight, version) in self._weights.items():
            if weight._version != version:
                raise WatchError(
                    f"'{name}' of a {type(module).__name__} was modified between its forward and its backward pass: "
                    "its adjoints cannot be computed any more."
                )
        directions = 2 if module.bidirectional else 1
        computed = _rounding((*self.outputs, *self.inputs))
        parameters = {name: computed(weight) for name, (weight, _) in self._weights.items()}
        x = sequences.apart(computed(self.inputs[0])).contiguous()  # once for all that needs its rows
        states = [sequences.state(computed(state)) for state in self.inputs[1:]]
        width = module.proj_size or module.hidden_size
        if not states:
            sizes = (width, module.hidden_size)[: 2 if module.mode == "LSTM" else 1]
            states = [x.new_zeros(module.num_layers * directions, x.shape[1], size) for size in sizes]
        known = None
        if self.outputs[0]._version == self.output_version:
            known = sequences.apart(computed(self.outputs[0]))
        inputs: list[Tensor] = []
        scans: list[list[Scan]] = []
        masks = self._dropout_masks(x, width * directions)
        layer_input = x
        for layer in range(module.num_layers):
            inputs.append(layer_input)
            top = layer == module.num_layers - 1
            scans.append([])
            for direction in range(directions):
                number = layer * directions + direction
                hidden = known.split(width, -1)[direction] if known is not None and top and layer == 0 else None
                around = sequences.turned if direction else _same
                scans[-1].append(
                    scan(
                        module.mode,
                        self._weights_of(parameters, layer, direction),
                        around(layer_input),
                        states[0][number],
                        states[1][number] if len(states) > 1 else None,
                        None if hidden is None else around(hidden),
                        workspace,
                    )
                )
            outputs = [
                s.hidden if not direction else sequences.turned(s.hidden) for direction, s in enumerate(scans[-1])
            ]
            layer_input = torch.cat(outputs, -1)
            if not top and masks:
                layer_input = layer_input * masks[layer]
        if masks and known is not None:
            self._same_output(layer_input, known)
        return self._scan_back(parameters, inputs, scans, masks, at, width)

    def _scan_back(
        self,
        parameters: dict[str, Tensor],
        inputs: list[Tensor],
        scans: list[list[Scan]],
        masks: list[Tensor],
        at: Sequence[Tensor | None],
        width: int,
    ) -> dict[str, Product]:
        module, sequences = self.module, self.sequences
        directions = len(scans[0])
        finals = [None if tensor is None else sequences.state(single(tensor)) for tensor in at[1:]]
        shape = (*inputs[0].shape[:2], width * directions)
        at_output = inputs[0].new_zeros(shape) if at[0] is None else sequences.apart(single(at[0]))
        found: dict[str, Product] = {}
        for layer in range(module.num_layers - 1, -1, -1):
            at_input: Tensor | None = None
            for direction, scanned in enumerate(scans[layer]):
                number = layer * directions + direction
                weights = self._weights_of(parameters, layer, direction)
                around = sequences.turned if direction else _same
                at_hidden = around(at_output.split(width, -1)[direction]).clone(memory_format=torch.contiguous_format)
                at_cell = None
                if finals[0] is not None:
                    sequences.at_end(at_hidden, finals[0][number])
                if len(finals) > 1 and finals[1] is not None:
                    at_cell = at_hidden.new_zeros(*at_hidden.shape[:2], module.hidden_size)
                    sequences.at_end(at_cell, finals[1][number])
                delta = adjoints(module.mode, weights, scanned, at_hidden, at_cell)
                self._keep(found, layer, direction, around(inputs[layer]), scanned, delta, around)
                if layer:
                    through = around(delta.ih @ weights.ih)
                    at_input = through if at_input is None else at_input + through
            if layer:
                assert at_input is not None
                at_output = at_input * masks[layer - 1] if masks else at_input
        return found

    def _keep(
        self,
        found: dict[str, Product],
        layer: int,
        direction: int,
        x: Tensor,
        scanned: Scan,
        delta: Adjoints,
        around: Any,
    ) -> None:
        suffix = f"l{layer}{'_reverse' if direction else ''}"
        pairs = {"weight_ih": (x, delta.ih), "weight_hh": (scanned.previous, delta.hh)}
        if scanned.projected is not None and delta.hr is not None:
            pairs["weight_hr"] = (scanned.projected, delta.hr)
        rows: dict[int, Tensor] = {}  # ih and hh of most layers have one adjoint
        for name, (activation, adjoint) in pairs.items():
            if id(adjoint) not in rows:
                rows[id(adjoint)] = self.sequences.rows(around(adjoint))
            found[f"{name}_{suffix}"] = Product(self.sequences.rows(around(activation)), rows[id(adjoint)])

    def _weights_of(self, parameters: dict[str, Tensor], layer: int, direction: int) -> Weights:
        suffix = f"l{layer}{'_reverse' if direction else ''}"
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        ih, hh, bias_ih, bias_hh, hr = (parameters.get(f"{name}_{suffix}") for name in names)
        assert ih is not None
        assert hh is not None
        return Weights(ih, hh, bias_ih, bias_hh, hr)

    def _dropout_masks(self, x: Tensor, width: int) -> list[Tensor]:
        """Draw the masks between layers again, from the generator's state before the forward pass."""
        module = self.module
        if self.generator is None:
            return []
        masks = []
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.generator)
            for _ in range(module.num_layers - 1):
                if self.sequences.packed:
                    ones = x.new_ones(len(self.sequences.places), width)
                    masks.append(self.sequences.apart(F.dropout(ones, module.dropout, True)))
                else:
                    masks.append(F.dropout(x.new_ones(*x.shape[:2], width), module.dropout, True))
        return masks

    def _same_output(self, again: Tensor, known: Tensor) -> None:
        valid = self.sequences.valid.unsqueeze(-1) if self.sequences.packed else torch.ones((), dtype=torch.bool)
        if float((torch.where(valid, again, 0) - torch.where(valid, known, 0)).abs().max()) > SAME_OUTPUT:
            raise WatchError(
                f"the dropout between the layers of a {type(self.module).__name__} cannot be drawn again on this device, so "
                "its adjoints are unknown: set its dropout=0 and put nn.Dropout between layers of one level each."
            )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _rounding(tensors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """How a forward pass rounded what it multiplied, given what went in and came out.

    Under autocast one of them in half precision is enough: a state may be in single precision, and so may what is made of it.
    """
    low = next((tensor.dtype for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)), None)
    return lambda tensor: tensor.detach() if low is None else single(tensor.detach().to(low))


def _identical(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


class RecurrentRule:
    """nn.RNN, nn.GRU and nn.LSTM: layers, directions, projection, packed sequences."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module computes the forward pass of one of torch's recurrent layers."""
        return any(isinstance(module, family) and type(module).forward is family.forward for family in RECURRENT)

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        """Every weight matrix of every layer and direction."""
        return _matrices(module)

    def attach(self, module: nn.Module, on_call: OnCall) -> list[RemovableHandle]:
        """Report input, states and output of each forward pass."""
        assert isinstance(module, nn.RNNBase)
        generators: list[Tensor | None] = []

        def begin(*_: Any) -> None:
            draws = module.training and module.dropout > 0 and module.num_layers > 1
            generators.append(torch.get_rng_state() if draws else None)

        def end(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs["input"]
            state = args[1] if len(args) > 1 else kwargs.get("hx")
            generator = generators[-1] if generators else None
            generators.clear()
            on_call(RecurrentCall(module, given, state, output, generator))

        return [
            module.register_forward_pre_hook(Hook(begin)),
            module.register_forward_hook(Hook(end), with_kwargs=True, prepend=True),
        ]


class CellCall(LayerCall):
    """One step of nn.RNNCell, nn.GRUCell or nn.LSTMCell."""

    parameters = ("weight_ih", "weight_hh")

    def __init__(self, module: Any, mode: str, x: Tensor, state: Any, output: Any) -> None:
        self.module, self.mode = module, mode
        states = () if state is None else state if isinstance(state, tuple) else (state,)
        self.inputs = (x, *states)
        self.outputs = output if isinstance(output, tuple) else (output,)
        self._found: tuple[tuple[Tensor | None, ...], Adjoints | None, Tensor | None] = ((), None, None)
        # Where the cell is made of several operations, c is a step on the way to h and its derivative holds that of h.
        self._whole_cell = len(self.outputs) > 1 and self.outputs[0].grad_fn is not self.outputs[1].grad_fn
        self._versions = [(parameter, parameter._version) for parameter in module.parameters()]
        # A weight that is computed from others, as by orthogonal(), may be another one in the next call.
        self._derived = {name: _derived_weight(module, name) for name in CELL_WEIGHTS if name not in module._parameters}

    def marks(self, parameter: str) -> Tensor:
        """Whether each entry of the batch holds a NaN."""
        marked = torch.zeros((), dtype=torch.bool, device=self.inputs[0].device)
        for tensor in self.inputs:
            marked = marked | hold_nan(tensor.reshape(-1, tensor.shape[-1]), 1)
        return marked

    def factors(self, parameter: str, adjoints: Sequence[Tensor | None], workspace: Workspace) -> Product:
        """Rows of what enters the weight and of the derivative at the gates."""
        if not _identical(self._found[0], adjoints):
            with torch.no_grad(), torch.autocast(self.inputs[0].device.type, enabled=False):
                self._found = (tuple(adjoints), *self._compute(adjoints, workspace))
        _, delta, previous = self._found
        assert delta is not None
        assert previous is not None
        if parameter == "weight_hh":
            return Product(previous, delta.hh.squeeze(0))
        x = self.inputs[0].detach()
        return Product(x.reshape(-1, x.shape[-1]).to(delta.ih.dtype), delta.ih.squeeze(0))

    def constant(self, parameter: str) -> Tensor | None:
        """The data."""
        return self.inputs[0] if parameter == "weight_ih" else None

    def forget(self) -> None:
        """Let go of what was computed."""
        self._found = ((), None, None)

    def _compute(self, at: Sequence[Tensor | None], workspace: Workspace) -> tuple[Adjoints, Tensor]:
        if any(parameter._version != version for parameter, version in self._versions):
            raise WatchError(
                f"a weight of a {type(self.module).__name__} was modified between its forward and its backward pass: its "
                "adjoints cannot be computed any more."
            )
        computed = _rounding((*self.outputs, *self.inputs))
        module = self.module
        names = CELL_WEIGHTS if module.bias else CELL_WEIGHTS[:2]
        ih, hh, *biases = (
            computed(self._derived[name] if name in self._derived else getattr(module, name)) for name in names
        )
        weights = Weights(ih, hh, *(biases or (None, None)))
        x, *states = (computed(tensor).reshape(-1, tensor.shape[-1]) for tensor in self.inputs)
        if not states:
            states = [x.new_zeros(len(x), module.hidden_size)] * 2
        cell = states[1] if self.mode == "LSTM" else None
        scanned = scan(self.mode, weights, x.unsqueeze(0), states[0], cell, None, workspace)
        ends = [None if a is None else single(a).reshape(1, -1, module.hidden_size) for a in at]
        at_hidden = scanned.hidden.new_zeros(scanned.hidden.shape) if ends[0] is None else ends[0]
        at_cell = ends[1] if len(ends) > 1 else None
        return adjoints(self.mode, weights, scanned, at_hidden, at_cell, self._whole_cell), states[0]


def _derived_weight(cell: nn.Module, name: str) -> Tensor:
    """A weight that is no parameter, as the forward pass that has just ended used it.

    In training mode spectral normalisation moves on whenever it is asked for the weight.
    """
    modes = [(module, module.training) for module in cell.modules()]
    cell.eval()
    try:
        with torch.no_grad():
            return getattr(cell, name).detach()
    finally:
        for module, training in modes:
            module.training = training


class CellRule:
    """The cells, called step by step in a loop of the user's own."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module computes the forward pass of one of torch's cells."""
        return any(isinstance(module, cell) and type(module).forward is cell.forward for cell in CELLS)

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        """Input-to-hidden and hidden-to-hidden weights."""
        return ("weight_ih", "weight_hh")

    def attach(self, module: nn.Module, on_call: OnCall) -> list[RemovableHandle]:
        """Report input, state and output of each step."""
        mode = next(mode for cell, mode in CELLS.items() if isinstance(module, cell))
        if isinstance(module, nn.RNNCell):
            mode = f"RNN_{module.nonlinearity.upper()}"

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            state = args[1] if len(args) > 1 else kwargs.get("hx")
            on_call(CellCall(module, mode, args[0] if args else kwargs["input"], state, output))

        return [module.register_forward_hook(Hook(hook), with_kwargs=True, prepend=True)]
