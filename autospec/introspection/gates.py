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
        What the scan back needs.
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
    mode: str, weights: Weights, x: Tensor, first: Tensor, first_cell: Tensor | None, hidden: Tensor | None
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
    """
    of_input = F.linear(x, weights.ih, weights.bias_ih)
    if mode == "LSTM":
        assert first_cell is not None
        return _scan_lstm(weights, of_input, first, first_cell, hidden)
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


def _scan_lstm(weights: Weights, of_input: Tensor, first: Tensor, first_cell: Tensor, hidden: Tensor | None) -> Scan:
    if hidden is not None:
        previous = previous_of(hidden, first)
        gates = of_input + F.linear(previous, weights.hh, weights.bias_hh)
        i, f, g, o = _lstm_gates(gates)
        cells = torch.empty_like(g)
        gained, c = i * g, first_cell
        for step in range(len(cells)):
            c = torch.addcmul(gained[step], f[step], c, out=cells[step])
    else:
        h, c = first, first_cell
        steps: list[tuple[Tensor, ...]] = []
        for step_input in of_input:
            step_gates = _lstm_gates(step_input + F.linear(h, weights.hh, weights.bias_hh))
            i, f, g, o = step_gates
            c = torch.addcmul(i * g, f, c)
            h = o * torch.tanh(c)
            h = h if weights.hr is None else F.linear(h, weights.hr)
            steps.append((*step_gates, c, h))
        i, f, g, o, cells, hidden = (torch.stack(parts) for parts in zip(*steps, strict=True))
        previous = previous_of(hidden, first)
    bounded = torch.tanh(cells)
    before = previous_of(cells, first_cell)
    of_cell = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], 2)
    of_output = bounded * o * (1 - o)
    return Scan(
        previous,
        hidden,
        (of_cell, of_output, o * (1 - bounded * bounded), f),
        None if weights.hr is None else o * bounded,
    )


def _lstm_gates(gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, -1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


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
        Its result.
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
    weights: Weights, scanned: Scan, at_output: Tensor, at_cell: Tensor | None, whole_cell: bool
) -> Adjoints:
    of_cell, of_output, slope, f = scanned.kept
    steps, sequences, _, width = of_cell.shape
    delta = of_cell.new_empty(steps, sequences, 4, width)
    at_hidden = torch.empty_like(at_output) if weights.hr is not None else None
    carried: Tensor | None = None
    for t in range(steps - 1, -1, -1):
        h = at_output[t] if t + 1 == steps else torch.addmm(at_output[t], delta[t + 1].flatten(1), weights.hh)
        if weights.hr is not None and at_hidden is not None:
            at_hidden[t] = h
            h = h @ weights.hr
        if whole_cell and at_cell is not None:
            c = at_cell[t]
        else:
            c = h * slope[t] if carried is None else torch.addcmul(carried, h, slope[t])
            c = c if at_cell is None else c + at_cell[t]
        torch.mul(of_cell[t], c.unsqueeze(1), out=delta[t, :, :3])
        torch.mul(of_output[t], h, out=delta[t, :, 3])
        carried = c * f[t]
    return Adjoints(delta.flatten(2), delta.flatten(2), at_hidden)
