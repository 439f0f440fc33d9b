"""Mixed precision: autocast to bfloat16, and losses scaled by a GradScaler."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autospec

from .families import (
    LABELS,
    Bert,
    Calls,
    E,
    LanguageModel,
    N,
    Stepwise,
    T,
    convolutional_network,
    normal,
    weighted,
    whole_numbers,
)
from .oracle import error, members, spectrum, svdvals

TABLE = members(LABELS, N)
BF16 = torch.finfo(torch.bfloat16).eps
MODELS = {
    "Linear": lambda: (nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)), normal(N, 7)),
    "convolutions": lambda: (convolutional_network(2), normal(N, 2, 6, 6)),
    "embedding": lambda: (LanguageModel(), whole_numbers(20, N, T)),
    "BERT": lambda: (Bert(dropout=0.0), whole_numbers(20, N, T)),
    "attention": lambda: (
        Calls(nn.MultiheadAttention(E, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
        normal(N, T, E),
    ),
    "RNN": lambda: (Calls(nn.RNN(4, 5, 2, batch_first=True, bidirectional=True)), normal(N, T, 4)),
    "GRU": lambda: (Calls(nn.GRU(4, 5, batch_first=True)), normal(N, T, 4)),
    "LSTM": lambda: (Calls(nn.LSTM(4, 5, 2, batch_first=True)), normal(N, T, 4)),
    "LSTMCell": lambda: (Stepwise(nn.LSTMCell(4, 5)), normal(N, T, 4)),
    "GRUCell": lambda: (Stepwise(nn.GRUCell(4, 5)), normal(N, T, 4)),
}


def make(case):
    torch.manual_seed(0)
    model, x = MODELS[case]()
    if case == "LSTM":
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                model(x)
        except RuntimeError as error:  # torch alone, nothing is watched: oneDNN has it from AVX-512 on
            pytest.skip(f"torch cannot run nn.LSTM in bfloat16 on this processor: {error}")
    return model, x


def autocast_steps(model, x, labels=LABELS, scaler=None, count=1):
    """Train some steps with autocast, watched if there are labels; return the tree and the first gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = None if labels is None else autospec.watch(model, labels, quiet=True)
    first = None
    torch.manual_seed(0)
    with watcher or torch.enable_grad():
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = weighted(model(x))
            (loss if scaler is None else scaler.scale(loss)).backward()
            if watcher:
                watcher.step()
            if first is None:
                scale = 1.0 if scaler is None else scaler.get_scale()
                first = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    return watcher and watcher.trajectories, first


@pytest.mark.parametrize("case", MODELS)
def test_under_autocast_the_record_is_that_of_the_gradient_within_its_rounding(case):
    model, x = make(case)
    tree, gradients = autocast_steps(model, x)
    for name in tree["layers"].children:
        expected = svdvals(gradients[name].flatten(1))
        recorded = spectrum(tree, name, "gradient")
        assert len(recorded) == len(expected)
        assert error(recorded, expected) < 4 * BF16, name
    assert tree.attrs["audit"]["outside"] == {}
    assert tree.attrs["audit"]["largest_error"] < 1e-6


@pytest.mark.parametrize("case", MODELS)
def test_under_autocast_the_record_is_near_that_of_single_precision(case):
    model, x = make(case)
    twin = copy.deepcopy(model)
    tree, _ = autocast_steps(model, x)
    with autospec.watch(twin, LABELS, quiet=True) as watcher:
        weighted(twin(x)).backward()
        watcher.step()
    for name in tree["layers"].children:
        for statistic in ("gradient", "activation", "adjoint"):
            for group in TABLE:
                expected = spectrum(watcher.trajectories, name, statistic, group)
                assert error(spectrum(tree, name, statistic, group), expected) < 0.05, (name, statistic, group)
        for statistic in ("gradient", "activation", "adjoint"):
            half, single = (t[f"layers/{name}"].to_dataset() for t in (tree, watcher.trajectories))
            floor = half[f"{statistic}_noise_floor"]
            assert (floor > 1e3 * single[f"{statistic}_noise_floor"]).all()
            assert (floor < half[statistic].sel(index=1)).all()  # something is above it
            assert (abs(half[statistic] - single[statistic]).max("index") < floor).all(), statistic  # and no rounding


PRODUCTS = {"many rows": ((60, 70), 100 * N), "rows that stay the same": ((400, 16), 20 * N)}


@pytest.mark.parametrize("case", [*MODELS, *PRODUCTS])
def test_the_backward_pass_and_step_may_be_within_autocast(case, monkeypatch):
    """torch would multiply in half precision whatever is multiplied there."""
    monkeypatch.setattr("autospec.introspection.shares.SMALL", 0)  # which is in float64
    monkeypatch.setattr("autospec.introspection.shares.LARGEST_KEPT", 0)  # which would be formed again

    def trained(watched):
        torch.manual_seed(0)
        if case in MODELS:
            model, x = make(case)
        else:
            (inputs, outputs), rows = PRODUCTS[case]
            model, x = nn.Sequential(nn.Linear(inputs, outputs)), normal(rows, inputs)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watcher = autospec.watch(model, LABELS * (len(x) // N), audit=1, quiet=True) if watched else None
        with watcher or contextlib.nullcontext():
            for _ in range(2):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    weighted(model(x)).backward()
                    if watched:
                        watcher.step()
                optimizer.step()
        return watched and watcher.trajectories.attrs["audit"], list(model.parameters())

    (audit, parameters), (_, expected) = trained(True), trained(False)
    assert audit["largest_error"] < 1e-6
    assert audit["outside"] == {}
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


def test_under_autocast_a_linear_layer_is_exact_for_the_rounded_rows_of_the_step():
    torch.manual_seed(0)
    model, x = nn.Linear(7, 5), normal(N, 7)
    twin, rows = copy.deepcopy(model), x.bfloat16()
    tree, _ = autocast_steps(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        output = F.linear(x, twin.weight, twin.bias)
        output.retain_grad()
        weighted(output).backward()
    assert output.grad.dtype == torch.bfloat16
    for group, member in TABLE.items():
        a, d = rows[torch.from_numpy(member)].double(), output.grad[torch.from_numpy(member)].double()
        for statistic, matrix in (("gradient", d.T @ a), ("activation", a), ("adjoint", d)):
            assert error(spectrum(tree, "weight", statistic, group), svdvals(matrix)) < 1e-6, (group, statistic)


class BehindALinearLayer(nn.Module):
    """A recurrent layer or cell that is given rows in half precision, and a state of any type."""

    def __init__(self, kind, state):
        super().__init__()
        self.first, self.last, self.state = nn.Linear(4, 4), nn.Linear(6, 3), state
        self.inner = getattr(nn, kind)(4, 6) if "Cell" in kind else getattr(nn, kind)(4, 6, batch_first=True)

    def forward(self, x):
        x, state = self.first(x), None
        if self.state is not None:
            state = (
                torch.linspace(-1, 1, 6)
                .to(self.state)
                .expand(*(() if "Cell" in type(self.inner).__name__ else (1,)), len(x), 6)
            )
            state = (state, state / 2) if "LSTM" in type(self.inner).__name__ else state
        if not isinstance(self.inner, nn.RNNCellBase):
            return self.last(self.inner(x, state)[0])
        for step in x.unbind(1):
            state = self.inner(step, state)
        return self.last(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_under_autocast_states_may_have_another_type_than_the_rows(kind, state, low):
    torch.manual_seed(0)
    model, x = BehindALinearLayer(kind, state), normal(N, T, 4)

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", low):
            loss = weighted(model(x))
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.ndim == 2}

    try:
        plain = gradients()
    except RuntimeError as error_of_torch:
        pytest.skip(f"torch alone cannot do this: {error_of_torch}")
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        watched = gradients()
        watcher.step()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert watcher.trajectories.attrs["audit"]["outside"] == {}
    for name, gradient in plain.items():
        assert error(spectrum(watcher.trajectories, name, "gradient"), svdvals(gradient)) < 4 * torch.finfo(low).eps, (
            name
        )


@pytest.mark.parametrize("case", MODELS)
def test_under_autocast_training_is_bitwise_unchanged(case):
    model, x = make(case)
    twin = copy.deepcopy(model)
    autocast_steps(model, x, LABELS, count=3)
    autocast_steps(twin, x, None, count=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("case", MODELS)
def test_a_scaled_loss_gives_the_spectra_of_the_unscaled_one(case):
    model, x = make(case)
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    scaled, _ = autocast_steps(model, x, scaler=scaler, count=3)
    plain, _ = autocast_steps(twin, x, count=3)
    assert scaler.get_scale() == 2.0**13
    for name in plain["layers"].children:
        for statistic in ("gradient", "activation", "adjoint"):
            expected = plain[f"layers/{name}/{statistic}"].values
            found = scaled[f"layers/{name}/{statistic}"].values
            np.testing.assert_allclose(found, expected, rtol=0, atol=BF16 * np.nanmax(expected), err_msg=name)
    assert scaled.attrs["audit"]["outside"] == {}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_loss_that_is_scaled_is_told_from_one_that_is_not():
    torch.manual_seed(0)
    model, x = nn.Linear(7, 5), normal(N, 7)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for scale in (None, scaler, None):
            model.zero_grad()
            loss = weighted(model(x))
            (loss if scale is None else scale.scale(loss)).backward()
            watcher.step()
    first, second, third = watcher.trajectories["layers/weight/gradient"].values
    np.testing.assert_allclose(second, first, rtol=1e-6)
    assert np.array_equal(first, third)
    assert torch.amp.GradScaler.scale.__module__ == "torch.amp.grad_scaler"


def test_a_step_whose_scaled_gradients_overflow_is_recorded_as_nan_and_skipped_as_without_watching():
    torch.manual_seed(0)
    model, x = nn.Linear(7, 5), normal(N, 7)
    before = model.weight.detach().clone()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1e38), torch.optim.SGD(model.parameters(), 0.1)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        scaler.scale(weighted(model(x)) * 1e4).backward()
        with pytest.warns(UserWarning, match="not finite"):
            watcher.step()
        scaler.step(optimizer)
        scaler.update()
    assert watcher.trajectories["layers/weight/gradient"].isnull().any()
    assert torch.equal(model.weight, before)
    assert scaler.get_scale() < 1e38
