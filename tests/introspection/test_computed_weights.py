"""Weights that are computed of parameters and constants: parametrizations, masks, slices, products of weights."""

import copy
import gc
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import autospec.testing
from autospec.introspection import WatchError
from autospec.introspection.copies import copy_model
from autospec.introspection.sample_shares import sample_shares

from .oracle import Problem, error, record, spectrum, svdvals
from .own_weights import LABELS, Late, N, Own, T, assert_definition, loss_by_sample, loss_of


class LargestNorm(nn.Module):
    """As braindecode's constraint."""

    def forward(self, weight):
        return weight.renorm(2, 0, 0.7)


def parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", LargestNorm())
    return layer


class Combined(nn.Module):
    """Two convolutions in time and in space whose kernels are multiplied first, as in ShallowFBCSPNet."""

    def __init__(self):
        super().__init__()
        self.time, self.space = nn.Conv2d(1, 4, (5, 1), bias=False), nn.Conv2d(4, 3, (1, 6), bias=False)

    def forward(self, x):
        kernel = self.space.weight.squeeze(2).permute(0, 2, 1) @ self.time.weight.view(4, 5)
        return F.conv2d(x.unsqueeze(1), kernel.permute(0, 2, 1).unsqueeze(1))


class Masked(nn.Module):
    """Experts in one tensor, a mask in a buffer, columns of a weight, and a weight that is used twice, as it is and scaled."""

    def __init__(self):
        super().__init__()
        self.experts, self.twice = nn.Parameter(torch.randn(2, 6, 4) / 2), nn.Parameter(torch.randn(4, 4) / 2)
        self.scale = nn.Parameter(torch.rand(4, 1))
        self.mask = (torch.arange(16).reshape(4, 4) % 3 > 0).float()

    def forward(self, x):
        first = torch.tanh(x @ self.experts[0] + F.linear(x[..., :3], self.experts[1, :3].T))
        second = torch.tanh(F.linear(first, self.twice * self.mask))
        return F.linear(second, self.scale * F.softmax(self.twice, 1)) + second[..., :2] @ self.twice[:, :2].T


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


def between(layer):
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), layer)


COMPUTED = {
    "largest norm": lambda: between(parametrized(nn.Linear(6, 5))),
    "largest norm of a kernel": lambda: between(parametrized(nn.Conv1d(T, 5, 3, padding=1))),
    "weight norm": lambda: between(nn.utils.parametrizations.weight_norm(nn.Conv1d(T, 5, 3))),
    "weight norm by hooks": lambda: between(nn.utils.weight_norm(nn.Linear(6, 5))),
    "spectral norm": lambda: between(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5))),
    "spectral norm by hooks": lambda: between(nn.utils.spectral_norm(nn.Conv1d(T, 5, 3))),
    "orthogonal": lambda: between(nn.utils.parametrizations.orthogonal(nn.Linear(6, 5))),
    "pruned": lambda: between(pruned(nn.Linear(6, 5))),
    "combined kernels": lambda: nn.Sequential(nn.ZeroPad2d((0, 0, 0, 3)), Combined()),
    "masks, columns and parts": Masked,
    "minus its mean": lambda: between(Own(lambda x, w, b: F.linear(x, w - w.mean(1, keepdim=True)), 5, 6)),
    "divided by its norm": lambda: between(Own(lambda x, w, b: x @ (w / w.norm()), 6, 5)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_are_computed_of_others(name):
    torch.manual_seed(0)
    model, x = COMPUTED[name](), torch.randn(N, T, 6)
    other = copy_model(model)
    tree = record(Problem(model, x, loss_of, LABELS))
    large = [name for name, p in model.named_parameters() if p.ndim > 1 and p.shape[0] > 1 and p[0].numel() > 1]
    assert list(tree["layers"].children) == large
    assert tree.attrs["audit"]["outside"] == {}
    loss_of(other(x)).backward()
    for mine, plain in zip(model.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None and plain.grad is None) or torch.equal(mine.grad, plain.grad)
    # Spectral norms move on at each pass in training.
    fixed = other.eval() if "spectral" in name else model
    tree = record(Problem(fixed, x, loss_of, LABELS))
    assert_definition(tree, fixed, x)
    assert autospec.testing.check(fixed, x, LABELS, quiet=True).passed


def test_the_rows_of_a_weight_that_is_computed_are_those_of_its_layer():
    torch.manual_seed(0)
    computed, plain, x = between(parametrized(nn.Linear(6, 5))), between(nn.Linear(6, 5)), torch.randn(N, T, 6)
    with torch.no_grad():
        plain[0].load_state_dict(computed[0].state_dict())
        plain[2].weight.copy_(computed[2].weight)
        plain[2].bias.copy_(computed[2].bias)
    first, second = (record(Problem(each, x, loss_of, LABELS)) for each in (computed, plain))
    name = "2.parametrizations.weight.original"
    for statistic in ("activation", "adjoint"):
        found, wanted = first[f"layers/{name}/{statistic}"], second[f"layers/2.weight/{statistic}"]
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    assert "alignment" not in first[f"layers/{name}"] or first[f"layers/{name}/alignment"].isnull().all()
    assert (first[f"layers/{name}/rank_limit"] == 5).all()


def test_positions_of_a_weight_that_is_computed_add_up():
    torch.manual_seed(0)
    model, x = between(parametrized(nn.Linear(6, 5))), torch.randn(N, T, 6)
    tree = record(Problem(model, x, loss_of, LABELS), per_position=True, layers=["2.*"])
    by_position = tree["layers/2.parametrizations.weight.original/gradient_by_position"]
    twin = copy.deepcopy(model).double()
    weights = torch.linspace(0.5, 1.5, N * T * 5, dtype=torch.float64).reshape(N, T, 5)
    for position in range(T):
        part = (weights * (twin(x.double()) - 0.3).square())[:, position].sum()
        (share,) = torch.autograd.grad(part, twin[2].parametrizations.weight.original)
        assert error(by_position.sel(group="all").values[0, position].astype(float), svdvals(share)) < 1e-6


def test_shares_of_samples_of_a_weight_that_is_computed():
    torch.manual_seed(0)
    model, x = COMPUTED["masks, columns and parts"](), torch.randn(N, T, 6)
    shares = sample_shares(model, lambda twin: loss_of(twin(x)), N)
    for name, found in shares.items():
        for sample, share in enumerate(found.weighted_sums(torch.eye(N, dtype=torch.float64))):
            twin = copy.deepcopy(model).double()
            (expected,) = torch.autograd.grad(loss_by_sample(twin(x.double()))[sample], twin.get_parameter(name))
            torch.testing.assert_close(share, expected.reshape(len(expected), -1), rtol=1e-4, atol=1e-5)


def test_a_mask_that_is_drawn_by_itself_is_what_was_drawn():
    def use(model, x):
        mask = torch.empty_like(model.weight).bernoulli_(0.5) if model.training else 0.5
        return x @ (model.weight * mask)

    torch.manual_seed(0)
    model, x = Late(use), torch.randn(N, 6)
    other = copy.deepcopy(model)
    tree = record(Problem(model, x, loss_of, LABELS))
    torch.manual_seed(11)  # as Problem does
    loss_of(other(x)).backward()
    assert torch.equal(model.weight.grad, other.weight.grad)
    assert error(spectrum(tree, "weight", "gradient"), svdvals(model.weight.grad)) < 1e-6
    assert tree.attrs["audit"]["outside"] == {}


def test_a_generator_of_the_users_own_draws_what_it_would():
    def use(model, x):
        return x @ (model.weight * torch.bernoulli(0.5 + 0 * model.weight, generator=generator))

    generator = torch.Generator().manual_seed(1)
    model = Late(use)
    with pytest.raises(WatchError, match="draws parts of 'weight' at random"):
        record(Problem(model, torch.randn(N, 6), loss_of, LABELS))


@pytest.mark.parametrize("name", ["weight norm", "pruned", "divided by its norm"])
def test_activation_checkpointing_with_weights_that_are_computed(name):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = COMPUTED[name]()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(N, T, 6)
    assert_definition(record(Problem(model, x, loss_of, LABELS)), model, x)


def test_angles_are_those_of_the_inputs_whatever_is_computed_of_a_weight():
    torch.manual_seed(0)
    x, angles = torch.randn(N, T, 6), []
    weight = torch.randn(5, 6) / 2
    for use, shape in (
        (lambda x, w, b: x @ w.T, weight),
        (lambda x, w, b: x @ w, weight.T),
        (lambda x, w, b: x @ (w * 1.0), weight.T),
        (lambda x, w, b: F.linear(x, 1.0 * w), weight),
    ):
        layer = Own(use, *shape.shape)
        layer.weight.data.copy_(shape)
        tree = record(Problem(layer, x, loss_of, LABELS), statistics=["gradient", "angles"], angles=2)
        angles.append(tree["contrasts/a - b/weight/angles"].values[0, :2])
    assert (angles[0] > 1e-3).all()
    for each in angles[1:]:
        np.testing.assert_allclose(each, angles[0], rtol=1e-4)


def test_alignment_is_that_of_plain_uses_alone():
    torch.manual_seed(0)
    model = Late(lambda m, x: x @ (m.weight * m.weight) + x @ m.weight)
    node = record(Problem(model, torch.randn(N, 6), loss_of, LABELS))["layers/weight"]
    assert "alignment" not in node


def test_a_cache_of_parametrizations_is_no_other_training():
    torch.manual_seed(0)
    model, x = between(parametrized(nn.Linear(6, 5))), torch.randn(N, T, 6)
    with nn.utils.parametrize.cached():
        tree = record(Problem(model, x, loss_of, LABELS))
    assert_definition(tree, model, x)
    with nn.utils.parametrize.cached(), autospec.watch(model, LABELS, quiet=True):
        model(x)
        with pytest.raises(WatchError, match=r"within parametrize\.cached\(\) before this forward pass"):
            model(x)


def test_nothing_is_kept_alive_by_weights_that_are_computed():
    torch.manual_seed(0)
    model, x = Late(lambda m, x: x @ (m.weight / m.weight.norm())), torch.randn(N, 6)

    def wide():
        return sum(
            type(each) is torch.Tensor and each.dtype == torch.float64 and each.shape == (6, 6)
            for each in gc.get_objects()
        )

    with autospec.watch(model, LABELS, quiet=True) as watcher:
        counts = []
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                loss_of(model(x)).backward()
                watcher.step()
                model.zero_grad()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    counts.append(wide())
        finally:
            gc.enable()
    assert counts[1:] == counts[1:2] * 4


class Assigned(nn.Module):
    """A soft assignment of inputs to outputs."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return F.linear(x, self.weight.softmax(0))


@pytest.mark.parametrize("shape", [(64, 48), (200, 3)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_that_is_rounding_of_nothing_is_not_said_to_come_from_elsewhere(shape, seed):
    torch.manual_seed(seed)
    model, x = Assigned(*shape), torch.randn(200, shape[1]) + 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with autospec.watch(model, ["a", "b"] * 100, quiet=True) as watcher:
            model(x).sum(1).mean().backward()  # each input is assigned as a whole, whatever the weight
            watcher.step()
        sample_shares(model, lambda model: model(x).sum(1).mean(), 200)
    assert model.weight.grad.any()
    assert watcher.trajectories.attrs["audit"]["outside"] == {}
