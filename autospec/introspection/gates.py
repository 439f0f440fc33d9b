r"""Adjoints of recurrent layers, computed again from what a fused kernel was given: pure functions on tensors.

nn.RNN, nn.GRU and nn.LSTM run as one kernel, inside which no hook sees anything.  With the inputs known, the gates of one
direction of one layer follow by a scan over time, and with the derivative at its outputs a scan back gives the
derivative at each gate's affine map, which is the adjoint:

.. math:: \Delta_t = \partial L / \partial (W_{ih} x_t + W_{hh} h_{t-1} + b)

Tensors are (time, sequence, width); sequences that end early stand at the beginning of their row, and what is beyond
their end is ignored because its derivative is zero.  The formulas are those of torch's documentation of the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .workspace import Workspace

# Numbers in an LSTM's gates that are computed at a time.
NUMBERS = 2**18


@dataclass(frozen=True)
class Weights:
    """Parameters of one direction of one layer; ``hr`` is the LSTM's projection."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None = None


@dataclass
class Scan:
    """What one direction of one layer computed.

    Attributes
    ----------
    previous : Tensor
        h at the step before, shape (time, sequence, hidden).
    hidden : Tensor
        h at each step.
    kept : tuple of Tensor
        What the scan back needs, and may overwrite.
    projected : Tensor or None
        What the LSTM's projection is applied to.
    """

    previous: Tensor
    hidden: Tensor
    kept: tuple[Tensor, ...]
    projected: Tensor | None = None


@dataclass
class Adjoints:
    """Derivatives at the affine maps, shape (time, sequence, gates): of the input, of h, and of the projection."""

    ih: Tensor
    hh: Tensor
    hr: Tensor | None = None


def previous_of(hidden: Tensor, first: Tensor) -> Tensor:
    """Shift by one step: what each step found, given what it left; shape (time, sequence, hidden)."""
    return torch.cat([first.unsqueeze(0), hidden[:-1]])


def scan(
    mode: str,
    weights: Weights,
    x: Tensor,
    first: Tensor,
    first_cell: Tensor | None,
    hidden: Tensor | None,
    workspace: Workspace,
) -> Scan:
    """Compute one direction of one layer.

    Parameters
    ----------
    mode : {"RNN_TANH", "RNN_RELU", "GRU", "LSTM"}
        As in ``module.mode``.
    weights : Weights
        Its parameters.
    x : Tensor
        Shape (time, sequence, inputs).
    first : Tensor
        h before the first step, shape (sequence, hidden).
    first_cell : Tensor or None
        c before the first step, for the LSTM.
    hidden : Tensor or None
        h at each step where it is known; without it the steps are computed one after the other.
    workspace : Workspace
        Memory.
    """
    if mode == "LSTM":
        assert first_cell is not None
        return _scan_lstm(weights, x, first, first_cell, hidden, workspace)
    of_input = F.linear(x, weights.ih, weights.bias_ih)
    if mode == "GRU":
        return _scan_gru(weights, of_input, first, hidden)
    activation = torch.tanh if mode == "RNN_TANH" else torch.relu
    if hidden is None:
        h, steps = first, []
        for step in of_input:
            h = activation(step + F.linear(h, weights.hh, weights.bias_hh))
            steps.append(h)
        hidden = torch.stack(steps)
    slope = 1 - hidden * hidden if mode == "RNN_TANH" else (hidden > 0).to(hidden.dtype)
    return Scan(previous_of(hidden, first), hidden, (slope,))


def _scan_lstm(
    weights: Weights,
    x: Tensor,
    first: Tensor,
    first_cell: Tensor,
    hidden: Tensor | None,
    workspace: Workspace,
) -> Scan:
    steps, sequences, width = len(x), x.shape[1], first_cell.shape[-1]

    def room(*shape: int) -> Tensor:
        return workspace.take(shape, x.dtype, x.device)

    bias = None if weights.bias_ih is None or weights.bias_hh is None else weights.bias_ih + weights.bias_hh
    found = room(steps, sequences, first.shape[-1]) if hidden is None else hidden
    previous = room(steps, sequences, first.shape[-1])
    previous[0] = first
    if hidden is not None:
        previous[1:] = hidden[:-1]
    forget, slope = room(steps, sequences, width), room(steps, sequences, width)
    # The derivative at each gate is one of these slopes times the derivative at c, or at h for the output gate.
    slopes = room(steps, sequences, 4, width)
    projected = None if weights.hr is None else room(steps, sequences, width)
    # Where h is known, gates of several steps at once: as many as stay in the processor's cache until all is done with them.
    count = steps if not x.is_cpu else max(1, NUMBERS // (sequences * 4 * width))
    count = 1 if hidden is None else min(count, steps)

    def scratch(purpose: str, *shape: int) -> Tensor:
        return workspace.scratch(purpose, shape, x.dtype, x.device)

    rows_room = scratch("gates", count * sequences, 4 * width)
    g_room, bounded_room = scratch("new cell", count, sequences, width), scratch("cell", count, sequences, width)
    cells = scratch("cells", count + 1, sequences, width)
    cells[0] = first_cell
    backward = torch.ops.aten
    for begin in range(0, steps, count):
        now = slice(begin, min(begin + count, steps))
        many = now.stop - begin
        rows, g, bounded = rows_room[: many * sequences], g_room[:many], bounded_room[:many]
        flat = x[now].reshape(many * sequences, -1)
        if bias is None:
            torch.mm(flat, weights.ih.T, out=rows)
        else:
            torch.addmm(bias, flat, weights.ih.T, out=rows)
        rows.addmm_(previous[now].flatten(0, 1), weights.hh.T)
        gates = rows.view(many, sequences, 4, width)
        i, f, _, o = gates.unbind(2)
        gates[:, :, :2].sigmoid_()
        o.sigmoid_()
        _tanh(gates[:, :, 2], g)
        gained = torch.mul(i, g, out=bounded)
        c = cells[0]
        for gained_now, f_now, cell in zip(gained.unbind(0), f.unbind(0), cells[1 : many + 1].unbind(0), strict=True):
            c = torch.addcmul(gained_now, f_now, c, out=cell)
        _tanh(cells[1 : many + 1], bounded)
        backward.sigmoid_backward.grad_input(g, i, grad_input=slopes[now, :, 0])
        backward.sigmoid_backward.grad_input(cells[:many], f, grad_input=slopes[now, :, 1])
        backward.tanh_backward.grad_input(i, g, grad_input=slopes[now, :, 2])
        backward.sigmoid_backward.grad_input(bounded, o, grad_input=slopes[now, :, 3])
        backward.tanh_backward.grad_input(o, bounded, grad_input=slope[now])  # of h over c
        forget[now] = f
        cells[0] = c
        if projected is not None:
            torch.mul(o, bounded, out=projected[now])
        if hidden is None:
            h = o[0] * bounded[0]
            found[begin] = h if weights.hr is None else F.linear(h, weights.hr)
            previous[now.stop : now.stop + 1] = found[now][: steps - now.stop]
    return Scan(previous, found, (slopes, slope, forget), projected)


def _tanh(x: Tensor, out: Tensor) -> Tensor:
    """Hyperbolic tangent by exp(2x) - 1, which torch computes in a third of the tangent's time on a processor, to the same digits."""
    if not x.is_cpu:
        return torch.tanh(x, out=out)
    torch.clamp(x, max=40, out=out).mul_(2).expm1_()  # from 40 on it is 1, and exp(2x) still finite
    return out.div_(out + 2)


def _scan_gru(weights: Weights, of_input: Tensor, first: Tensor, hidden: Tensor | None) -> Scan:
    def gates(step_input: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        of_hidden = F.linear(h, weights.hh, weights.bias_hh)
        ir, iz, in_ = step_input.chunk(3, -1)
        hr, hz, hn = of_hidden.chunk(3, -1)
        r = torch.sigmoid(ir + hr)
        return r, torch.sigmoid(iz + hz), torch.tanh(in_ + r * hn), hn

    if hidden is None:
        h, steps = first, []
        for step_input in of_input:
            _, z, n, _ = gates(step_input, h)
            h = n + z * (h - n)
            steps.append(h)
        hidden = torch.stack(steps)
    previous = previous_of(hidden, first)
    r, z, n, hn = gates(of_input, previous)
    of_new = (1 - z) * (1 - n * n)
    slopes = torch.stack([of_new * hn * r * (1 - r), (previous - n) * z * (1 - z), of_new * r], 2)
    return Scan(previous, hidden, (slopes, of_new, z))


def adjoints(
    mode: str,
    weights: Weights,
    scanned: Scan,
    at_output: Tensor,
    at_cell: Tensor | None,
    whole_cell: bool = False,
) -> Adjoints:
    """Scan back.

    Parameters
    ----------
    mode, weights
        As for `scan`.
    scanned : Scan
        Its result, of no use afterwards.
    at_output : Tensor
        Derivative of the loss at each step's h, by way of everything but the next step; shape (time, sequence, hidden).
    at_cell : Tensor or None
        The same at c, for the LSTM.
    whole_cell : bool
        Whether ``at_cell`` holds what comes by way of the same step's h as well.
    """
    if mode == "LSTM":
        return _adjoints_lstm(weights, scanned, at_output, at_cell, whole_cell)
    if mode == "GRU":
        slopes, of_new, z = scanned.kept
        delta = torch.empty_like(slopes)
        at_hidden = torch.empty_like(at_output)
        for t in range(len(delta) - 1, -1, -1):
            h = at_output[t]
            if t + 1 < len(delta):
                h = torch.addmm(h, delta[t + 1].flatten(1), weights.hh).addcmul_(at_hidden[t + 1], z[t + 1])
            at_hidden[t] = h
            torch.mul(slopes[t], h.unsqueeze(1), out=delta[t])
        of_input = torch.cat([delta[:, :, :2], (of_new * at_hidden).unsqueeze(2)], 2)
        return Adjoints(of_input.flatten(2), delta.flatten(2))
    (slope,) = scanned.kept
    delta = torch.empty_like(slope)
    for t in range(len(delta) - 1, -1, -1):
        h = at_output[t] if t + 1 == len(delta) else torch.addmm(at_output[t], delta[t + 1], weights.hh)
        torch.mul(slope[t], h, out=delta[t])
    return Adjoints(delta, delta)


def _adjoints_lstm(
    weights: Weights,
    scanned: Scan,
    at_output: Tensor,
    at_cell: Tensor | None,
    whole_cell: bool,
) -> Adjoints:
    delta, slope, f = scanned.kept  # the derivatives take the place of the gates' slopes
    steps, sequences, _, width = delta.shape
    at_hidden = torch.empty_like(at_output) if weights.hr is not None else None
    carried: Tensor | None = None
    # Taken apart once: an index at each step would cost as much as the arithmetic.
    rows = delta.view(steps, sequences, 4 * width).unbind(0)
    of_cell, of_output = delta[:, :, :3].unbind(0), delta[:, :, 3].unbind(0)
    outputs, slope_now, f_now = at_output.unbind(0), slope.unbind(0), f.unbind(0)
    for t in range(steps - 1, -1, -1):
        h = outputs[t] if t + 1 == steps else torch.addmm(outputs[t], rows[t + 1], weights.hh)
        if weights.hr is not None and at_hidden is not None:
            at_hidden[t] = h
            h = h @ weights.hr
        if whole_cell and at_cell is not None:
            c = at_cell[t]
        else:
            c = h * slope_now[t] if carried is None else carried.addcmul_(h, slope_now[t])
            c = c if at_cell is None else c + at_cell[t]
        of_cell[t].mul_(c.unsqueeze(1))
        of_output[t].mul_(h)
        carried = c * f_now[t]
    whole = delta.flatten(2)
    return Adjoints(whole, whole, at_hidden)
