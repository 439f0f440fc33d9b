"""Weights that a model itself multiplies with data are watched as those of torch's layers are."""

import contextlib
import copy
import gc
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

import autospec.testing
from autospec.introspection import WatchError
from autospec.introspection.copies import copy_model
from autospec.introspection.layers import readings
from autospec.introspection.sample_shares import sample_shares

from .oracle import Problem, error, members, record, spectrum, svdvals, weights_after_training

N, T, INPUTS, OUTPUTS = 9, 4, 5, 6
LABELS = ["a", "b", "b"] * 3
STATISTICS = ("gradient", "activation", "adjoint")


class Own(nn.Module):
    """A layer whose forward pass is a function of its input, its weight and its bias."""

    def __init__(self, use, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / 2)
        self.bias, self.use = nn.Parameter(torch.randn(OUTPUTS)), use

    def forward(self, x):
        return self.use(x, self.weight, self.bias)


def conv1d_of_gpt2(x, w, b):
    return torch.addmm(b, x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], -1)


INPUTS_FIRST = {
    "matmul": lambda x, w, b: x @ w + b,
    "mm of each sample": lambda x, w, b: torch.stack([torch.mm(sample, w) for sample in x]) + b,
    "addmm": conv1d_of_gpt2,
    "einsum": lambda x, w, b: torch.einsum("... i, i o -> ... o", x, w) + b,
    "einsum, positions last": lambda x, w, b: torch.einsum("io,bti->bot", w, x).mT + b,
    "bmm, spread over the batch": lambda x, w, b: torch.bmm(x, w.expand(len(x), -1, -1)) + b,
    "with data transposed": lambda x, w, b: (w.T @ x.mT).mT + b,
    "in parts": lambda x, w, b: x[..., :2] @ w[:2] + x[..., 2:] @ w[2:] + b,
    "in place afterwards": lambda x, w, b: torch.einsum("bti,io->bot", x, w).mT.add_(b),
    "tensordot": lambda x, w, b: torch.tensordot(x, w, dims=1) + b,
}
OUTPUTS_FIRST = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "linear by name": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "inner": lambda x, w, b: torch.inner(x, w) + b,
    "transposed": lambda x, w, b: torch.matmul(x, w.t()) + b,
    "from the left": lambda x, w, b: (w @ x.mT).mT + b,
    "tensordot": lambda x, w, b: torch.tensordot(w, x, dims=([1], [2])).permute(1, 2, 0) + b,
    "a vector from the right": lambda x, w, b: torch.stack([torch.stack([w @ t for t in s]) for s in x]) + b,
    "parts of it": lambda x, w, b: torch.cat([F.linear(x, part) for part in w.chunk(3)], -1) + b,
    "in another shape": lambda x, w, b: F.linear(x, w.view(OUTPUTS, 1, INPUTS).squeeze(1), b),
}


def own_and_torchs(name):
    """A network with such a layer, and one of torch's layers that computes the same."""
    torch.manual_seed(0)
    first = name in INPUTS_FIRST
    shape = (INPUTS, OUTPUTS) if first else (OUTPUTS, INPUTS)
    own = Own((INPUTS_FIRST if first else OUTPUTS_FIRST)[name], *shape)
    layer = nn.Linear(INPUTS, OUTPUTS)
    with torch.no_grad():
        layer.weight.copy_(own.weight.T if first else own.weight)
        layer.bias.copy_(own.bias)
    rest = (nn.Tanh(), nn.Linear(OUTPUTS, 3))
    return nn.Sequential(own, *rest), nn.Sequential(layer, *rest), torch.randn(N, T, INPUTS)


def loss_of(output):
    return loss_by_sample(output).sum()


def loss_by_sample(output):
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)
    return (weights * (output - 0.3).square()).flatten(1).sum(1)


def assert_definition(tree, model, x, labels=LABELS):
    """Where samples meet in no layer, a group's share is the gradient of its part of the loss, here in float64."""
    twin = copy_model(model).double()
    for group, member in members(labels, len(x)).items():
        inside = torch.from_numpy(member)
        names, weights = zip(*((name, twin.get_parameter(name)) for name in tree["layers"].children), strict=True)
        x_wide = x.double() if x.is_floating_point() else x
        shares = torch.autograd.grad(loss_by_sample(twin(x_wide))[inside].sum(), weights)
        for name, share in zip(names, shares, strict=True):
            assert error(spectrum(tree, name, "gradient", group), svdvals(share.reshape(len(share), -1))) < 1e-6, name


@pytest.mark.parametrize("name", [*INPUTS_FIRST, *OUTPUTS_FIRST])
def test_a_product_is_watched_as_a_linear_layer_is(name):
    own, torchs, x = own_and_torchs(name)
    tree, expected = record(Problem(own, x, loss_of, LABELS)), record(Problem(torchs, x, loss_of, LABELS))
    assert_definition(tree, own, x)
    for statistic in STATISTICS:
        for group in ("all", "a", "b"):
            wanted = spectrum(expected, "0.weight", statistic, group)
            found = spectrum(tree, "0.weight", statistic, group)
            if "part" not in name or statistic == "gradient":  # rows of each part are rows
                assert error(found, wanted[: len(found)]) < 1e-6
    assert tree.attrs["audit"]["outside"] == {}


def constrained(x, layer):
    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 1.0)
    return nn.Conv1d.forward(layer, x)


class Subclass(nn.Conv1d):
    """As networks for EEG have it: a largest norm of the weight, or padding of the past alone."""

    def __init__(self, use, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.use = use

    def forward(self, x):
        return self.use(x, self)


CONVOLUTIONS = {
    "largest norm": (constrained, {}),
    "causal": (lambda x, layer: nn.Conv1d.forward(layer, F.pad(x, (4, 0))), {"dilation": 2}),
    "with groups and stride": (lambda x, layer: nn.Conv1d.forward(layer, x) * 2, {"groups": 2, "stride": 2}),
    "same padding": (lambda x, layer: F.conv1d(x, layer.weight, None, padding="same", dilation=(3,)), {}),
    "even kernel, same padding": (lambda x, layer: F.conv1d(x, layer.weight, padding="same"), {"kernel_size": 4}),
    "transposed": (lambda x, layer: F.conv_transpose1d(x, layer.weight, None, 2, 1, 1), {}),
    "one image": (lambda x, layer: torch.stack([F.conv1d(each, layer.weight) for each in x]), {}),
    "in two dimensions": (lambda x, layer: F.conv2d(x.unsqueeze(2), layer.weight.unsqueeze(2)).squeeze(2), {}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_watched_as_a_layer_is(name):
    torch.manual_seed(0)
    use, options = CONVOLUTIONS[name]
    layer = Subclass(use, 4, 4, **{"kernel_size": 3, **options})
    model = nn.Sequential(layer, nn.Tanh(), nn.Conv1d(4, 3, 2))
    x = torch.randn(N, 4, 12)
    tree = record(Problem(model, x, loss_of, LABELS))
    assert_definition(tree, model, x)
    rows = x.movedim(1, 2).flatten(0, 1) if name != "causal" else F.pad(x, (4, 0)).movedim(1, 2).flatten(0, 1)
    assert error(spectrum(tree, "0.weight", "activation"), svdvals(rows)) < 1e-6


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Projections(nn.Module):
    """One weight for queries, keys and values, and one of three dimensions for the heads."""

    def __init__(self):
        super().__init__()
        self.packed = nn.Parameter(torch.randn(18, 6) / 2)
        self.heads = nn.Parameter(torch.randn(6, 2, 3) / 2)

    def forward(self, x):
        query, key, value = (F.linear(x, part) for part in self.packed.chunk(3))
        attended = F.scaled_dot_product_attention(query, key, value)
        return torch.einsum("bti,ihk->bthk", attended, self.heads).flatten(2)


class Recurrence(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_input, self.of_state = (nn.Parameter(torch.randn(6, 6) / 3) for _ in range(2))

    def forward(self, x):
        state = x.new_zeros(len(x), 6)  # rows that no sample reaches
        for t in range(x.shape[1]):
            state = torch.tanh(x[:, t] @ self.of_input + torch.einsum("bi,io->bo", state, self.of_state))
        return state


class OfChild(nn.Module):
    """As BEiT calls its projection."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        bias = torch.cat([self.bias, torch.zeros_like(self.bias)])
        return self.out(torch.tanh(F.linear(input=x, weight=self.qkv.weight, bias=bias)))


class Tied(nn.Module):
    """A decoder whose weight is the encoder's, transposed."""

    def __init__(self):
        super().__init__()
        self.encoder, self.middle = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(torch.tanh(self.middle(torch.tanh(self.encoder(x)))), self.encoder.weight.t())


class Transposed(nn.Linear):
    """The same, by a property."""

    def __init__(self, encoder):
        nn.Module.__init__(self)
        self.__dict__["encoder"], self.in_features, self.out_features = encoder, *encoder.weight.shape
        self.bias = nn.Parameter(torch.zeros(self.out_features))

    @property
    def weight(self):
        return self.encoder.weight.t()


class OfAnother(nn.Module):
    """The same, by a parametrization."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def forward(self, _):
        return self.other.weight.t()


def tied(by):
    encoder = nn.Linear(6, 4)
    decoder = Transposed(encoder) if by == "property" else nn.Linear(4, 6)
    if by == "parametrization":
        nn.utils.parametrize.register_parametrization(decoder, "weight", OfAnother(encoder))
    return nn.Sequential(encoder, nn.Tanh(), decoder)


def replaced_forward():
    layer = nn.Linear(6, 6)
    layer.forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), layer)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 2))


MODELS = {
    "attention": lambda: nn.Sequential(nn.Linear(6, 6), OwnAttention(6, 2, batch_first=True)),
    "attention, time first": lambda: nn.Sequential(nn.Linear(6, 6), TimeFirst(OwnAttention(6, 2))),
    "projections": Projections,
    "recurrence": Recurrence,
    "of a child": OfChild,
    "tied, transposed": Tied,
    "tied by a property": lambda: tied("property"),
    "tied by a parametrization": lambda: tied("parametrization"),
    "a forward pass of its own": replaced_forward,
    "the model itself": lambda: Own(lambda x, w, b: (x @ w).sum(1) + b, 6, OUTPUTS),
}
WATCHED = {
    "attention": ["0.weight", "1.in_proj_weight", "1.out_proj.weight"],
    "attention, time first": ["0.weight", "1.inner.in_proj_weight", "1.inner.out_proj.weight"],
    "projections": ["packed", "heads"],
    "recurrence": ["of_input", "of_state"],
    "of a child": ["qkv.weight", "out.weight"],
    "tied, transposed": ["encoder.weight", "middle.weight"],
    "tied by a property": ["0.weight"],
    "tied by a parametrization": ["0.weight"],
    "a forward pass of its own": ["0.weight", "2.weight"],
    "the model itself": ["weight"],
}


class TimeFirst(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("groups", [LABELS, None], ids=["groups", "no groups"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_wherever_a_model_keeps_and_uses_them(name, groups):
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(N, T, 6)
    options = {"unknown": "skip"} if name == "tied by a parametrization" else {}
    tree = record(Problem(model, x, loss_of, groups), **options)
    assert list(tree["layers"].children) == WATCHED[name]
    assert_definition(tree, model, x, groups)
    assert tree.attrs["audit"]["outside"] == {}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "tied by a parametrization"])
def test_check_proves_it_and_the_training_is_unchanged(name):
    torch.manual_seed(0)
    normalised = nn.Sequential(nn.BatchNorm1d(T), nn.Dropout(0.2), MODELS[name]())
    found = autospec.testing.check(normalised, torch.randn(N, T, 6), LABELS, quiet=True)
    assert found.passed
    assert found.unchanged
    assert {layer for layer, _ in found.errors} == {f"2.{layer}" for layer in WATCHED[name]}


def test_check_sees_what_is_recorded_wrongly(monkeypatch):
    report = readings._product
    monkeypatch.setattr(readings, "_product", lambda rows, *others, **more: report(rows + 1, *others, **more))
    torch.manual_seed(0)
    model = nn.Sequential(Own(lambda x, w, b: x @ w + b, INPUTS, OUTPUTS))
    with pytest.warns(UserWarning, match="comes from no sample's row"):
        found = autospec.testing.check(model, torch.randn(N, T, INPUTS), LABELS, quiet=True)
    assert not found.passed


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


def test_an_embedding_that_is_the_output_layer_too_by_a_product():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 6)

        def forward(self, tokens):
            return torch.tanh(self.inner(self.table(tokens))) @ self.table.weight.t()

    torch.manual_seed(0)
    model, tokens = Language(), torch.randint(0, 11, (N, T))
    tree = record(Problem(model, tokens, loss_of, LABELS))
    assert list(tree["layers"].children) == ["table.weight", "inner.weight"]
    assert_definition(tree, model, tokens)


def watched_training(model, x, labels, call=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    block = contextlib.nullcontext() if labels is None else autospec.watch(model, labels, quiet=True, **options)
    with block as watcher:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of((call or model)(x)).backward()
            if watcher is not None:
                watcher.step()
            optimizer.step()
    return watcher.trajectories if watcher is not None else None


@pytest.mark.parametrize("name", ["recurrence", "projections", "tied, transposed"])
@pytest.mark.parametrize("options", [{}, {"every": 2}, {"solver": "tracked", "singular_values": 2}])
def test_training_is_bitwise_unchanged_and_nothing_is_left_behind(name, options):
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(N, T, 6)
    other = copy.deepcopy(model)
    watched_training(model, x, LABELS, **options)
    watched_training(other, x, None)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch._C._len_torch_function_stack() == 0


def test_after_an_interruption_nobody_looks_on():
    def stop(x, w, b):
        if stopping:
            raise KeyboardInterrupt
        return x @ w + b

    stopping = True
    model, x = Own(stop, INPUTS, OUTPUTS), torch.randn(N, T, INPUTS)
    with autospec.watch(model, None, quiet=True) as watcher:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                model(x)
            assert torch._C._len_torch_function_stack() == 1
        stopping = False
        loss_of(model(x)).backward()
        assert torch._C._len_torch_function_stack() == 0
        watcher.step()
        stopping = True
        with pytest.raises(KeyboardInterrupt):
            model(x)
        with torch.device("cpu"):
            watcher._capture._look_away()
            assert [type(mode).__name__ for mode in modes()] == ["DeviceContext"]
    assert modes() == []
    assert_definition(watcher.trajectories, model_after(model), x, None)


def model_after(model):
    twin = copy.deepcopy(model)
    twin.use = lambda x, w, b: x @ w + b
    return twin


def modes():
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


def test_positions_are_those_of_a_linear_layer():
    own, torchs, x = own_and_torchs("matmul")
    options = {"per_position": True}
    tree, expected = (record(Problem(each, x, loss_of, LABELS), **options) for each in (own, torchs))
    found, wanted = (each["layers/0.weight/gradient_by_position"].values for each in (tree, expected))
    assert found.shape == (1, 3, T, INPUTS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_padding_and_shares_of_samples_are_those_of_a_linear_layer():
    own, torchs, x = own_and_torchs("einsum")
    valid = torch.arange(T) < torch.arange(1, N + 1).clamp(max=T).unsqueeze(1)

    def loss(output):
        return loss_of(output[valid].unsqueeze(0))

    trees = [record(Problem(model, x, loss, LABELS), valid=valid) for model in (own, torchs)]
    for statistic in STATISTICS:
        found, wanted = (tree[f"layers/0.weight/{statistic}"].values for tree in trees)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    shares = [sample_shares(model, lambda twin: loss_of(twin(x)), N)["0.weight"] for model in (own, torchs)]
    first, second = (each.weighted_sums(torch.eye(N, dtype=torch.float64)[[0, 4]]) for each in shares)
    torch.testing.assert_close(first.mT, second, rtol=1e-5, atol=1e-6)


def test_under_autocast_and_checkpointing():
    own, torchs, x = own_and_torchs("addmm")

    def run(model):
        with autospec.watch(model, LABELS, quiet=True) as watcher:
            with torch.autocast("cpu", torch.bfloat16):
                half = model(x)
            loss_of(half.float()).backward()
            watcher.step()
            checkpointed = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            loss_of(checkpointed).backward()
            watcher.step()
        return watcher.trajectories["layers/0.weight/gradient"].values

    found, wanted = run(own), run(torchs)
    np.testing.assert_allclose(found[0], wanted[0], rtol=0.05)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4)


def test_learned_queries_are_rows_like_others():
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 2, 6))
            self.of_query, self.of_key = (nn.Parameter(torch.randn(6, 6) / 2) for _ in range(2))

        def forward(self, x):
            query = self.query.expand(len(x), -1, -1) @ self.of_query
            return F.scaled_dot_product_attention(query, x @ self.of_key, x)

    torch.manual_seed(0)
    model, x = Pooling(), torch.randn(N, T, 6)
    tree = record(Problem(model, x, loss_of, LABELS))
    assert list(tree["layers"].children) == ["of_query", "of_key"]
    assert_definition(tree, model, x)


@pytest.mark.parametrize("heads", [1, 2])
def test_learned_queries_of_heads_are_traced_though_kernels_of_attention_lose_nan(heads):
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.of_query = nn.Parameter(torch.randn(1, 2, 6)), nn.Linear(6, 6)
            self.of_key = nn.Parameter(torch.randn(6, 6) / 2)

        def forward(self, x):
            query, key, value = self.of_query(self.query.expand(len(x), -1, -1)), x @ self.of_key, x
            query, key, value = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (query, key, value))
            return F.scaled_dot_product_attention(query, key, value)

    torch.manual_seed(0)
    model, x = Pooling(), torch.randn(N, T, 6)
    tree = record(Problem(model, x, loss_of, LABELS))
    assert list(tree["layers"].children) == ["of_key", "of_query.weight"]
    assert_definition(tree, model, x)


def test_rows_may_be_given():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6) / 2)

        def forward(self, x):
            return x.nan_to_num() @ self.weight

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(N, 6)
    tree = record(Problem(model, x, loss_of, LABELS), rows={"weight": np.arange(N)})
    assert_definition(tree, model, x)


def test_a_buffer_that_the_batch_is_written_into_is_data():
    class Static(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5) / 2)
            self.register_buffer("room", torch.zeros(N, 6))

        def forward(self, x):
            self.room.copy_(x)
            return self.room @ self.weight

    torch.manual_seed(0)
    model, x = Static(), torch.randn(N, 6)
    tree = record(Problem(model, x, loss_of, LABELS))
    assert_definition(tree, model, x)


@pytest.mark.parametrize("buffer", [True, False])
def test_a_state_that_is_carried_on_is_data(buffer):
    class Carried(nn.Module):
        def __init__(self):
            super().__init__()
            self.of_input, self.of_state = (nn.Parameter(torch.randn(6, 6) / 3) for _ in range(2))
            if buffer:
                self.register_buffer("state", torch.zeros(N, 6))
            else:
                self.state = torch.zeros(N, 6)

        def forward(self, x):
            made = torch.tanh(x @ self.of_input + self.state @ self.of_state)
            self.state = made.detach()
            return made

    torch.manual_seed(0)
    model, x = Carried(), torch.randn(N, 6)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for _ in range(3):
            before = model.state.clone()
            loss_of(model(x)).backward()
            watcher.step()
            model.zero_grad()
    found = watcher.trajectories["layers/of_state/activation"].sel(group="all").values[-1]
    assert error(found[~np.isnan(found)], svdvals(before)) < 1e-6


def test_a_mean_teachers_weights_are_not_the_models():
    own, _, x = own_and_torchs("linear")
    plain = record(Problem(own, x, loss_of, LABELS))
    teacher = {name: each.detach() * 0.9 for name, each in own.named_parameters()}

    def loss(output):
        return loss_of(output) + 0 * torch.func.functional_call(own, teacher, (x,)).sum()

    tree = record(Problem(own, x, loss, LABELS))
    np.testing.assert_array_equal(tree["layers/0.weight/gradient"], plain["layers/0.weight/gradient"])


class Positions(nn.Module):
    """A transformer block by hand: learned positions, used twice, biases of the attention scores, and a gate."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.positions, self.gate = nn.Parameter(torch.randn(T, 6)), nn.Parameter(torch.randn(T, 6))
        self.scores = nn.Parameter(torch.randn(2, T, T))

    def forward(self, x):
        hidden = torch.tanh(self.inner(x + self.positions)) * torch.sigmoid(self.gate)
        heads = hidden.unflatten(2, (2, 3)).transpose(1, 2)
        attended = (heads @ heads.mT + self.scores.masked_fill(torch.eye(T).bool(), 0.5)).softmax(-1) @ heads
        attended = attended.transpose(1, 2).flatten(2)
        attended += self.positions[: x.shape[1]].unsqueeze(0)
        return self.out(torch.where(torch.arange(6) > 2, attended, -self.positions))


class TimeFirstPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.out = nn.Parameter(torch.randn(T, 6)), nn.Linear(6, 6)

    def forward(self, x):
        series = torch.sub(x.transpose(0, 1), self.positions.unsqueeze(1), alpha=2)
        return self.out(series).transpose(0, 1)


class Kept(nn.Module):
    """Positions that are put beside the data, not added, after a mask that is made anew."""

    def __init__(self):
        super().__init__()
        self.positions, self.out = nn.Parameter(torch.randn(T, 6)), nn.Linear(6, 6)

    def forward(self, x):
        return self.out(torch.tanh(x * (self.positions * torch.ones(T, 1)))) / (self.positions.exp() + 1)


ELEMENTWISE = {"a block": Positions, "time first": TimeFirstPositions, "computed": Kept}


@pytest.mark.parametrize("groups", [LABELS, None], ids=["groups", "no groups"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_tables_that_all_samples_meet_elementwise(name, groups):
    torch.manual_seed(0)
    model, x = ELEMENTWISE[name](), torch.randn(N, T, 6)
    other = copy.deepcopy(model)
    tree = record(Problem(model, x, loss_of, groups))
    assert list(tree["layers"].children) == [n for n, p in model.named_parameters() if p.ndim > 1]
    assert_definition(tree, model, x, groups)
    assert tree.attrs["audit"]["outside"] == {}
    loss_of(other(x)).backward()
    for mine, plain in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, plain.grad)
    assert autospec.testing.check(model, x, groups, quiet=True).passed


def test_positions_as_a_parameter_are_those_of_an_embedding():
    class Added(nn.Module):
        def __init__(self, embedding):
            super().__init__()
            self.positions = nn.Embedding(T, 6) if embedding else nn.Parameter(torch.randn(T, 6))
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            looked_up = isinstance(self.positions, nn.Embedding)
            return self.out(torch.tanh(x + (self.positions(torch.arange(T)) if looked_up else self.positions)))

    torch.manual_seed(0)
    table, parameter, x = Added(True), Added(False), torch.randn(N, T, 6)
    parameter.out.load_state_dict(table.out.state_dict())
    parameter.positions.data.copy_(table.positions.weight)
    expected, tree = (record(Problem(each, x, loss_of, LABELS)) for each in (table, parameter))
    for statistic in STATISTICS:
        found, wanted = tree[f"layers/positions/{statistic}"], expected[f"layers/positions.weight/{statistic}"]
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


class Late(nn.Module):
    """Uses its weight, or a layer's, as a function says, which may do something else at a later step."""

    def __init__(self, use, **parameters):
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(6, 6) / 2), nn.Linear(6, 6)
        self.use, self.epoch = use, 0
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x):
        return self.layer(torch.tanh(self.use(self, x)))


def changed_in_place(model, x):
    weight = model.weight.clone()
    weight.mul_(1 + model.epoch)
    return x @ weight


def elementwise_later(model, x):
    return x @ model.weight + (model.weight[:1] if model.epoch else 0)


def in_training_alone(model, x):
    return x @ model.weight * (1 + model.weight[1] if model.training else 1)


LATER = {
    "changed in place": changed_in_place,
    "changed through a view": lambda m, x: F.linear(x, m.weight.clone().t().mul_(1 + m.epoch)),
    "elementwise later": elementwise_later,
    "in training alone": in_training_alone,
    "another function later": lambda m, x: x @ (m.weight.exp() if m.epoch else m.weight),
}


def own_losses(model, x, steps):
    """Spectra of each group at each step, in float64, and what was recorded, of the weight."""
    labels, expected = LABELS, []
    with autospec.watch(model, labels, quiet=True) as watcher:
        for step in range(steps):
            model.epoch = step
            model.zero_grad()
            loss_of(model(x)).backward()
            watcher.step()
            twin = copy_model(model).double()
            losses = loss_by_sample(twin(x.double()))
            of_groups = [losses[torch.from_numpy(member)].sum() for member in members(labels, len(x)).values()]
            gradients = [torch.autograd.grad(each, twin.weight, retain_graph=True)[0] for each in of_groups]
            expected.append(np.stack([svdvals(each) for each in gradients]))
    return watcher.trajectories["layers/weight/gradient"].values, np.stack(expected)


@pytest.mark.parametrize("name", LATER)
def test_what_a_model_does_later_is_seen(name):
    torch.manual_seed(0)
    model, x = Late(LATER[name]), torch.randn(N, 6)
    if name == "in training alone":
        with pytest.raises(WatchError, match="'weight' was used more often in training than in evaluation mode"):
            own_losses(model, x, 3)
        return
    found, expected = own_losses(model, x, 3)
    assert np.abs(found - expected).max() < 1e-6 * expected[..., 0].min()


def test_what_a_model_cannot_be_watched_doing_later_is_refused_then():
    model = Late(lambda m, x: x @ m.weight + (torch.cdist(x, m.weight) if m.epoch else 0))
    with pytest.raises(WatchError, match=r"uses 'weight' in cdist\(\)"):
        own_losses(model, torch.randn(N, 6), 2)


def written(model, x):
    model.room[:, :3] = x[:, :3]
    return model.room @ model.weight


def with_bias(model, x):
    return F.linear(x, model.weight @ model.layer.weight, (model.weight @ model.layer.bias).tanh())


USES = {
    "a bias made of weights": with_bias,
    "a bias of a convolution": lambda m, x: F.conv1d(x[:, None], m.weight[:, None, :3], -m.weight[:, 0]).sum(2),
    "not differentiable": lambda m, x: x @ m.weight + x @ (m.weight > 0).to(x.dtype),
    "another parameter": lambda m, x: x @ (m.weight * m.gain.exp()) + x @ (2 * m.frozen * m.weight),
    "low rank": lambda m, x: x @ (m.frozen + m.weight @ m.frozen.t()),
    "a state": lambda m, x: (
        x @ m.weight + torch.zeros(len(x), 6, dtype=x.dtype) @ m.weight + x.new_zeros(len(x), 6) @ m.weight.t()
    ),
    "types": lambda m, x: x.to(m.weight) @ m.weight.type_as(x),
    "softmax with a type": lambda m, x: x @ (torch.softmax(m.weight, 0, dtype=m.weight.dtype) @ m.frozen),
    "implicit einsum": lambda m, x: torch.einsum("ni,io", x, m.weight),
    "matrix and vector": lambda m, x: torch.stack([torch.mv(m.weight, each) for each in x]),
    "one column": lambda m, x: torch.stack([x @ m.weight[i] for i in range(6)], 1),
    "a long chain": lambda m, x: x @ long_chain(m.weight),
    "told to learn": lambda m, x: x @ torch.tanh(m.weight.requires_grad_()),
    "baddbmm": lambda m, x: torch.baddbmm(x[:, None], x[:, None], m.weight.expand(len(x), 6, 6))[:, 0],
}


def long_chain(weight):
    for _ in range(400):
        weight = weight * 1.0
    return weight


@pytest.mark.parametrize("name", USES)
def test_ways_to_use_a_weight(name):
    torch.manual_seed(0)
    model, x = Late(USES[name], gain=torch.randn(6), frozen=torch.randn(6, 6)), torch.randn(N, 6)
    model.frozen.requires_grad_(False)
    tree = record(Problem(model, x, loss_of, LABELS))
    assert_definition(tree, model, x)
    assert tree.attrs["audit"]["outside"] == {}
    found = autospec.testing.check(model, x, LABELS, quiet=True)
    assert found.errors
    assert max(found.errors.values()) < 1e-5


def test_what_is_written_into_a_part_of_a_buffer_makes_it_data():
    torch.manual_seed(0)
    model, x = Late(written), torch.randn(N, 6)
    model.register_buffer("room", torch.zeros(N, 6))
    tree = record(Problem(model, x, loss_of, LABELS))
    assert_definition(tree, model, x)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_, weight):
        return weight.sign()

    @staticmethod
    def backward(_, gradient):
        return gradient


REFUSED = {
    "a function of autograd's own": (lambda m, x: x @ StraightThrough.apply(m.weight), r"autograd\.Function"),
    "vmap": (lambda m, x: torch.vmap(lambda each: each @ m.weight)(x), r"'weight' in (matmul|mv|mm)\(\)"),
    "drawn of a weight": (lambda m, x: x @ torch.normal(m.weight, 0.1), r"draws parts of 'weight' at random"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_uses_that_are_refused(name):
    use, said = REFUSED[name]
    with pytest.raises(WatchError, match=said):
        record(Problem(Late(use), torch.randn(N, 6), loss_of, LABELS))


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


def test_elementwise_in_a_checkpoint_is_refused_where_more_would_be_kept():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.positions, self.out = (
                nn.Parameter(torch.randn(T, 6)),
                nn.Parameter(torch.randn(T, 6)),
                nn.Linear(6, 2),
            )
            self.gated = True

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

        def inner(self, x):
            return self.out(torch.tanh((x + self.positions) * (self.gate if self.gated else 1)))

    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(N, T, 6)
    with pytest.raises(WatchError, match=r"'gate' in mul\(\)"):
        record(Problem(model, x, loss_of, LABELS))
    model.gated = False
    tree = record(Problem(model, x, loss_of, LABELS), layers=["!gate"])
    assert_definition(tree, model, x)


class Shared(nn.Module):
    """Layers are applied to what all samples share, and what they return meets data."""

    def __init__(self, given, meets):
        super().__init__()
        if given == "prototypes":
            self.constants = nn.Parameter(torch.randn(T, INPUTS))
        else:
            self.register_buffer("constants", torch.randn(T, INPUTS))
        self.positions = nn.Embedding(T, INPUTS) if given == "positions" else None
        self.given, self.meets = given, meets
        self.project = nn.Sequential(
            nn.Linear(INPUTS, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, OUTPUTS, bias=False)
        )
        self.first = nn.Linear(INPUTS, OUTPUTS)
        if meets in ("graph", "queries"):
            self.a, self.b = nn.Linear(OUTPUTS, 5), nn.Linear(OUTPUTS, 5)
        self.head = nn.Linear(T if meets == "prototypes" else OUTPUTS, 3)

    def forward(self, x):
        given = self.constants if self.positions is None else self.positions(torch.arange(T))
        shared, data = self.project(given.unsqueeze(0) if self.given == "for a batch" else given), self.first(x)
        if self.meets == "sum":
            data = data + shared
        elif self.meets == "a number":
            data = data + shared.square().mean()
        elif self.meets == "prototypes":
            data = data @ shared.mT
        elif self.meets == "graph":
            data = torch.softmax(self.a(shared) @ self.b(shared).mT, -1) @ data
        elif self.meets == "queries":
            data = torch.softmax(self.a(shared) @ self.b(data).mT, -1) @ data
        elif self.meets == "kernel":
            kernel = shared.T.reshape(OUTPUTS, 1, T)
            data = F.conv1d(data.mT, kernel, padding=T - 1, groups=OUTPUTS)[..., :T].mT
        elif self.meets == "the same layer":
            data = data * self.project(x) + shared
        return self.head(torch.tanh(data))


SHARED = ["constants", "prototypes", "positions", "for a batch"]
MEETS = ["sum", "a number", "graph", "queries", "the same layer", "prototypes", "kernel"]
# The last two take a matrix.
MET = [(given, meets) for given in SHARED for meets in MEETS[: -2 if given == "for a batch" else None]]


@pytest.mark.parametrize(("given", "meets"), MET)
def test_a_layer_may_be_given_what_all_samples_share(given, meets):
    torch.manual_seed(0)
    model, x = Shared(given, meets), torch.randn(N, T, INPUTS)
    tree = record(Problem(model, x, loss_of, LABELS))
    names = {"project.0.weight", "project.3.weight", "first.weight", "head.weight"}
    names |= {"constants"} if given == "prototypes" else set()
    names |= {"positions.weight"} if given == "positions" else set()
    names |= {"a.weight", "b.weight"} if meets in ("graph", "queries") else set()
    assert set(tree["layers"].children) == names
    assert_definition(tree, model, x)
    assert tree.attrs["audit"]["outside"] == {}
    assert_same_training(model, x)


PARTS, PART = 5, 3  # regions, and numbers of each


class Parts(nn.Module):
    """Data of regions, of which each has weights of its own."""

    def __init__(self, use, *shape):
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape)), use
        self.first, self.head = nn.Linear(PART, PART), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.use(self.first(x), self.weight)))


# Data have the shape (samples, regions, numbers).
OF_PARTS = {
    "einsum": (lambda x, w: torch.einsum("bpi,pio->bpo", x, w), (PARTS, PART, 2)),
    "einsum, weights first": (lambda x, w: torch.einsum("poi,...pi->p...o", w, x).transpose(0, 1), (PARTS, 2, PART)),
    "einsum of a vector each": (
        lambda x, w: torch.einsum("bpi,pi->bp", x, w)[..., :4].unflatten(1, (2, 2)),
        (PARTS, PART),
    ),
    "bmm": (lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (PARTS, PART, 2)),
    "matmul": (lambda x, w: (x.unsqueeze(-2) @ w).squeeze(-2), (PARTS, PART, 2)),
    "matmul from the left": (lambda x, w: (w @ x.unsqueeze(-1)).squeeze(-1), (PARTS, 2, PART)),
    "the same data for all": (lambda x, w: (x.unsqueeze(1) @ w).sum(1), (4, PART, 2)),
    "normalised": (lambda x, w: torch.einsum("bpi,pio->bpo", x, w / w.norm(dim=1, keepdim=True)), (PARTS, PART, 2)),
    "in place afterwards": (lambda x, w: torch.einsum("bpi,pio->bpo", x, w).add_(1.0), (PARTS, PART, 2)),
}


@pytest.mark.parametrize("name", OF_PARTS)
def test_weights_for_each_part_of_the_data(name):
    torch.manual_seed(0)
    use, shape = OF_PARTS[name]
    model, x = Parts(use, *shape), torch.randn(N, PARTS, PART)
    tree = record(Problem(model, x, loss_of, LABELS))
    assert set(tree["layers"].children) == {"weight", "first.weight", "head.weight"}
    assert_definition(tree, model, x)
    assert tree.attrs["audit"]["outside"] == {}
    assert_same_training(model, x)
    found = autospec.testing.check(model, x, LABELS, quiet=True)
    assert found.passed
    assert ("weight", "a") in found.errors


def test_rows_of_weights_for_each_part_are_those_of_a_grouped_convolution():
    torch.manual_seed(0)
    own, x = Parts(OF_PARTS["einsum"][0], PARTS, PART, 2), torch.randn(N, PARTS, PART)
    torchs = copy.deepcopy(own)
    torchs.weight = None
    torchs.grouped = nn.Conv1d(PARTS * PART, PARTS * 2, 1, groups=PARTS, bias=False)
    torchs.grouped.weight.data.copy_(own.weight.detach().transpose(1, 2).reshape(PARTS * 2, PART, 1))
    torchs.use = lambda x, _: torchs.grouped(x.flatten(1).unsqueeze(-1)).view(N, PARTS, 2)
    tree, expected = (record(Problem(model, x, loss_of, LABELS)) for model in (own, torchs))
    for statistic in ("activation", "adjoint"):
        for group in ("all", "a", "b"):
            wanted = spectrum(expected, "grouped.weight", statistic, group)
            assert error(spectrum(tree, "weight", statistic, group)[: len(wanted)], wanted) < 1e-6


def test_a_bilinear_layer_is_a_product_with_all_products_of_two():
    class Two(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.first, self.second = nn.Linear(INPUTS, 4), nn.Linear(INPUTS, 3)
            self.both = nn.Bilinear(4, 3, OUTPUTS) if own else nn.Linear(12, OUTPUTS)

        def forward(self, x):
            one, other = self.first(x), torch.tanh(self.second(x))
            if isinstance(self.both, nn.Bilinear):
                return self.both(one, other)
            return self.both((one.unsqueeze(-1) * other.unsqueeze(-2)).flatten(-2))

    torch.manual_seed(0)
    own, torchs, x = Two(True), Two(False), torch.randn(N, T, INPUTS)
    torchs.load_state_dict(
        {name: each.flatten(1) if each.ndim > 2 else each for name, each in own.state_dict().items()}
    )
    tree, expected = (record(Problem(model, x, loss_of, LABELS)) for model in (own, torchs))
    assert_definition(tree, own, x)
    assert_same_training(own, x)
    for statistic in STATISTICS:
        found, wanted = (spectrum(each, "both.weight", statistic, "a") for each in (tree, expected))
        assert error(found, wanted[: len(found)]) < 1e-6
    assert autospec.testing.check(own, x, LABELS, quiet=True).passed


class BySubject(nn.Module):
    """Weights that are looked up by the number of a subject or a site, of which several samples may be."""

    def __init__(self, use, *shape):
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape)), use
        self.first, self.head = nn.Linear(INPUTS, INPUTS), nn.Linear(2 if len(shape) > 2 else INPUTS, 3)

    def forward(self, x, subjects):
        return self.head(torch.tanh(self.use(self.first(x), self.weight, subjects)))


LOOKED_UP = {
    "its index": (lambda x, w, s: x + w[s].unsqueeze(1), (4, INPUTS)),
    "index_select": (lambda x, w, s: x * w.index_select(0, s).unsqueeze(1), (4, INPUTS)),
    "embedding": (lambda x, w, s: x + F.embedding(s, torch.sigmoid(w)).unsqueeze(1), (4, INPUTS)),
    "matrices": (lambda x, w, s: torch.bmm(x, w[s]), (4, INPUTS, 2)),
    "matrices, gathered": (
        lambda x, w, s: torch.einsum("bti,bio->bto", x, w.gather(0, s.view(-1, 1, 1).expand(-1, *w.shape[1:]))),
        (4, INPUTS, 2),
    ),
    "parts of a matrix": (lambda x, w, s: x @ w[s, :, 1:3], (4, INPUTS, 4)),
}


@pytest.mark.parametrize("name", [name for name in LOOKED_UP if name != "parts of a matrix"])
def test_weights_that_are_looked_up_by_samples_indices(name):
    torch.manual_seed(0)
    use, shape = LOOKED_UP[name]
    model, x, subjects = BySubject(use, *shape), torch.randn(N, T, INPUTS), torch.tensor([0, 1, 1, 3, 0, 2, 2, 1, 3])
    watched, twin = copy.deepcopy(model), copy.deepcopy(model).double()
    with autospec.watch(watched, LABELS, singular_values="all", quiet=True) as watcher:
        loss_of(watched(x, subjects)).backward()
        watcher.step()
    loss_of(model(x, subjects)).backward()
    assert torch.equal(model.weight.grad, watched.weight.grad)
    for group, member in members(LABELS, N).items():
        losses = loss_by_sample(twin(x.double(), subjects))[torch.from_numpy(member)].sum()
        (share,) = torch.autograd.grad(losses, twin.weight)
        found = spectrum(watcher.trajectories, "weight", "gradient", group)
        assert error(found, svdvals(share.reshape(4, -1))) < 1e-6
    assert autospec.testing.check(model, (x, subjects), LABELS, quiet=True).passed


COLUMNS = torch.stack([torch.randperm(INPUTS, generator=torch.Generator().manual_seed(i)) for i in range(N)])
NOT_ROWS = {
    "a padding index": lambda x, w, s: x + F.embedding(s, w, padding_idx=0).unsqueeze(1),
    "columns by an ellipsis": lambda x, w, s: x + w[s[:, None], COLUMNS, ...].unsqueeze(1),
}


@pytest.mark.parametrize("name", NOT_ROWS)
def test_lookups_that_do_not_give_whole_rows_are_refused_by_name(name):
    model, subjects = BySubject(NOT_ROWS[name], 4, INPUTS), torch.tensor([0, 1, 1, 3, 0, 2, 2, 1, 3])
    with autospec.watch(model, LABELS, quiet=True), pytest.raises(WatchError, match=r"'weight' in \w+\(\)"):
        model(torch.randn(N, T, INPUTS), subjects)


BROADCAST = {
    "one part for all": (lambda x, w: torch.einsum("bpi,pio->bpo", x, w), (1, PART, 2)),
    "a vector with many matrices": (lambda x, w: (x.mean((0, 1)) @ w).mean(0) + x[..., :2], (4, PART, 2)),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_products_that_broadcast_are_refused_by_name(name):
    use, shape = BROADCAST[name]
    model = Parts(use, 2, *shape[1:])
    model.weight = nn.Parameter(torch.randn(shape)) if shape[0] > 1 else nn.Parameter(torch.randn(2, PART, 2))
    model.use = use if shape[0] > 1 else (lambda x, w: use(x, w[:1]) + use(x, w[1:]))
    with autospec.watch(model, LABELS, quiet=True), pytest.raises(WatchError, match=r"'weight' in (einsum|matmul)\(\)"):
        model(torch.randn(N, PARTS, PART))


@pytest.mark.parametrize("count", [4, 3, 1])
def test_a_batch_of_another_size_has_the_rows_of_its_parts(count):
    """Matrices that were stacked are no tokens, though the batch has as many samples as they have rows."""

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterList([nn.Parameter(torch.randn(4, 2)) for _ in range(3)])

        def forward(self, x):
            return torch.einsum("bpi,pio->bpo", x, torch.stack(list(self.parts)))

    torch.manual_seed(0)
    model, batches = Stacked(), [torch.randn(many, 3, 4) for many in (N, count)]
    labels = [LABELS, LABELS[:count]]
    with autospec.watch(model, ["a", "b"], statistics=STATISTICS, singular_values="all", quiet=True) as watcher:
        for x, groups in zip(batches, labels, strict=True):
            watcher.set_groups(groups)
            loss_of(model(x)).backward()
            watcher.step()
    found = watcher.trajectories["layers/parts.0/activation"].isel(step=1).sel(group="all").dropna("index").values
    assert error(found, svdvals(batches[1].flatten(1))) < 1e-6


def test_an_input_that_was_taken_for_one_of_the_samples_is_noticed_at_the_next_size():
    class Dots(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.place = nn.Linear(INPUTS, 4), nn.Linear(3, 4)

        def forward(self, x, coordinates):
            return self.first(x) @ self.place(coordinates).T

    torch.manual_seed(0)
    model, coordinates = Dots(), torch.randn(6, 3)
    twin = copy.deepcopy(model).double()
    batches = [torch.randn(count, INPUTS) for count in (6, 9, 6)]
    with autospec.watch(model, ["a", "b"], singular_values="all", quiet=True) as watcher:
        for step, x in enumerate(batches):
            watcher.set_groups(LABELS[: len(x)])
            model.zero_grad()
            said = pytest.warns(UserWarning, match="in batches of 6") if step == 1 else contextlib.nullcontext()
            with said:
                output = model(x, coordinates)
            loss_of(output).backward()
            watcher.step()
    for step in (1, 2):
        losses = loss_by_sample(twin(batches[step].double(), coordinates.double()))
        inside = torch.tensor([label == "a" for label in LABELS[: len(losses)]])
        (share,) = torch.autograd.grad(losses[inside].sum(), twin.place.weight)
        found = watcher.trajectories["layers/place.weight/gradient"].isel(step=step).sel(group="a").dropna("index")
        assert error(found.values, svdvals(share)) < 1e-6


def test_columns_that_are_looked_up_are_refused_by_name():
    use, shape = LOOKED_UP["parts of a matrix"]
    subjects = torch.tensor([0, 1, 1, 3, 0, 2, 2, 1, 3])
    model = BySubject(use, *shape)
    with (
        autospec.watch(model, LABELS, quiet=True),
        pytest.raises(WatchError, match=r"'weight' in __getitem__\(\).*layers=\['!weight'\]"),
    ):
        model(torch.randn(N, T, INPUTS), subjects)


class Joined(nn.Module):
    """Learned tokens, which a layer has made and which are spread over the batch, join the samples' own."""

    def __init__(self, spread, join):
        super().__init__()
        self.tokens, self.make, self.norm = nn.Parameter(torch.randn(3, 5)), nn.Linear(5, 8), nn.LayerNorm(8)
        self.read, self.mix, self.head = nn.Linear(INPUTS, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True) if join in ("keys", "queries") else None
        self.spread, self.join = spread, join

    def forward(self, x):
        tokens = self.spread(self.norm(self.make(self.tokens)), len(x))
        data = self.read(x)
        if self.join == "cat":
            data = self.mix(torch.cat([tokens, data], 1))
        elif self.join == "stack":
            data = self.mix(torch.stack([data, tokens.mean(1, keepdim=True).expand_as(data)], 1)).flatten(1, 2)
        elif self.join == "written":
            data = data.clone()
            data[:, :3] = tokens
            data = self.mix(data)
        elif self.join == "keys":
            data = self.mix(self.attend(data, tokens, tokens)[0])
        elif self.join == "queries":
            data = self.mix(self.attend(tokens, data, data)[0])
        else:
            heads = [each.unflatten(-1, (2, 4)).transpose(1, 2) for each in (data, tokens, self.mix(tokens))]
            data = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.head(torch.tanh(data))


SPREAD = {
    "expand": lambda tokens, samples: tokens.expand(samples, -1, -1),
    "repeat": lambda tokens, samples: tokens.unsqueeze(0).repeat(samples, 1, 1),
    "ones": lambda tokens, samples: torch.ones(samples, 1, 1, dtype=tokens.dtype) * tokens,
}


@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("join", ["cat", "stack", "written", "keys", "queries", "keys and values"])
def test_tokens_join_those_of_each_sample(spread, join):
    torch.manual_seed(0)
    model, x = Joined(SPREAD[spread], join), torch.randn(N, T, INPUTS)
    tree = record(Problem(model, x, loss_of, LABELS))
    names = {"tokens", "make.weight", "read.weight", "mix.weight", "head.weight"}
    names |= {"attend.in_proj_weight", "attend.out_proj.weight"} if join in ("keys", "queries") else set()
    assert set(tree["layers"].children) == names
    assert_definition(tree, model, x)
    assert tree.attrs["audit"]["outside"] == {}
    assert_same_training(model, x)
    if spread != "ones":  # that it is spread shows without the number of samples, too
        assert_definition(record(Problem(model, x, loss_of, None)), model, x, None)


def assert_same_training(model, x):
    """Watching leaves the weights after a few steps as they are, bitwise."""
    states = []
    for labels in (None, LABELS):
        torch.manual_seed(3)
        states.append(weights_after_training(copy.deepcopy(model), x, loss_of, labels, steps=3, lr=0.1))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


class BiasedScores(nn.Module):
    """Attention whose scores have learned biases, given as a mask; as of a network of the distances of positions."""

    def __init__(self, kind):
        super().__init__()
        self.read, self.head, self.kind = nn.Linear(INPUTS, 8), nn.Linear(8, 3), kind
        self.register_buffer("distances", torch.randn(T, T, 2))
        if kind == "made by layers":
            self.make = nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, 2))
        else:
            self.mask = nn.Parameter(torch.randn(T, T) if kind == "for all heads" else torch.randn(2, T, T))

    def forward(self, x):
        mask = self.make(self.distances).permute(2, 0, 1) if self.kind == "made by layers" else self.mask
        mask = mask.expand(len(x), -1, -1, -1) if self.kind == "spread" else mask
        data = self.read(x).unflatten(-1, (2, 4)).transpose(1, 2)
        data = F.scaled_dot_product_attention(data, data, data, mask)
        return self.head(data.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["for all heads", "for each head", "spread", "made by layers"])
def test_learned_masks_of_an_attention(kind):
    torch.manual_seed(0)
    model, x = BiasedScores(kind), torch.randn(N, T, INPUTS)
    tree = record(Problem(model, x, loss_of, LABELS))
    own = {"make.0.weight", "make.2.weight"} if kind == "made by layers" else {"mask"}
    assert set(tree["layers"].children) == {"read.weight", "head.weight"} | own
    assert_definition(tree, model, x)
    assert_same_training(model, x)


@pytest.mark.parametrize("regions", [T, N], ids=["fewer than samples", "as many"])
def test_an_input_that_all_samples_share(regions):
    """Coordinates of regions, by which a network weights what it passes from region to region."""

    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.mask = nn.Linear(3, 6), nn.Parameter(torch.randn(regions, regions))
            self.read, self.head = nn.Linear(INPUTS, 6), nn.Linear(6, 3)

        def forward(self, x, coordinates):
            place = self.place(coordinates)
            graph = torch.softmax(place @ place.T + self.mask * (coordinates @ coordinates.T), -1)
            return self.head(torch.tanh(graph @ (self.read(x) + place)))

    torch.manual_seed(0)
    model, x, coordinates = Regions(), torch.randn(N, regions, INPUTS), torch.randn(regions, 3)
    twin, trained = copy_model(model), copy_model(model)
    with autospec.watch(trained, LABELS, batch_dim=0, singular_values="all", quiet=True) as watcher:
        loss_of(trained(x, coordinates)).backward()
        watcher.step()
    twin.forward = lambda x: Regions.forward(twin, x, coordinates.to(x))
    twin.double()
    for group, member in members(LABELS, N).items():
        weights = {name: each for name, each in twin.named_parameters() if each.ndim == 2}
        losses = loss_by_sample(twin.forward(x.double()))[torch.from_numpy(member)].sum()
        shares = torch.autograd.grad(losses, list(weights.values()))
        for name, share in zip(weights, shares, strict=True):
            assert error(spectrum(watcher.trajectories, name, "gradient", group), svdvals(share)) < 1e-6, name
    assert autospec.testing.check(model, (x, coordinates), LABELS, batch_dim=0, quiet=True).passed


class Placed(nn.Module):
    """Coordinates of regions are an argument; there is an output for each region."""

    def __init__(self, first):
        super().__init__()
        self.place, self.read, self.head, self.first = nn.Linear(3, 6), nn.Linear(INPUTS, 6), nn.Linear(6, 3), first

    def forward(self, *given):
        coordinates, x = given if self.first else given[::-1]
        return self.head(torch.tanh(self.read(x) + self.place(coordinates)))


@pytest.mark.parametrize(("first", "options"), [(False, {}), (True, {}), (True, {"batch_dim": 0})])
def test_a_batch_of_as_many_samples_as_regions_is_read_as_the_one_before(first, options):
    torch.manual_seed(0)
    regions, labels = 6, {9: LABELS, 6: LABELS[:6]}
    model, coordinates = Placed(first), torch.randn(regions, 3)
    batches = [torch.randn(count, regions, INPUTS) for count in (9, 6)]
    watched, twin = copy.deepcopy(model), copy.deepcopy(model).double()
    with autospec.watch(watched, ["a", "b"], singular_values="all", quiet=True, **options) as watcher:
        for x in batches:
            watcher.set_groups(labels[len(x)])
            loss_of(watched(*((coordinates, x) if first else (x, coordinates)))).backward()
            watcher.step()
            watched.zero_grad()
    for step, x in enumerate(batches):
        wide = (coordinates.double(), x.double())
        losses = loss_by_sample(twin(*(wide if first else wide[::-1])))
        for group, member in members(labels[len(x)], len(x)).items():
            (share,) = torch.autograd.grad(losses[torch.from_numpy(member)].sum(), twin.place.weight, retain_graph=True)
            found = (
                watcher.trajectories["layers/place.weight/gradient"].isel(step=step).sel(group=group).dropna("index")
            )
            assert error(found.values, svdvals(share)) < 1e-6


@pytest.mark.parametrize("first", [True, False])
def test_as_many_regions_as_samples_at_once_are_refused_or_told_apart(first):
    torch.manual_seed(0)
    model, coordinates, x = Placed(first), torch.randn(N, 3), torch.randn(N, N, INPUTS)
    given = (coordinates, x) if first else (x, coordinates)
    with (
        autospec.watch(model, LABELS, quiet=True),
        pytest.raises(WatchError, match=r"more than one dimension.*batch_dim="),
    ):
        model(*given)
    check = autospec.testing.check(model, given, LABELS, batch_dim=0, quiet=True)
    assert check.passed
    assert check.not_compared == {}


UNKNOWN = {
    "new_ones": lambda model, x: x.new_ones(N, 3),
    "ones_like": lambda model, x: torch.ones_like(x[0, :, :3]),
    "a list": lambda model, x: model.listed[0],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_constants_that_are_not_known_for_such_decide_nothing(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.read, self.head = nn.Linear(3, 6), nn.Linear(INPUTS, 6), nn.Linear(6, 3)
            self.listed = [torch.randn(N, 3)]

        def forward(self, x):
            return self.head(torch.tanh(self.read(x) + self.place(UNKNOWN[name](self, x))))

    torch.manual_seed(0)
    model, x = Model(), torch.randn(N, N, INPUTS)
    with (
        autospec.watch(model, LABELS, quiet=True),
        pytest.raises(WatchError, match=r"more than one dimension.*batch_dim="),
    ):
        model(x)


def test_a_batch_of_one_sample_has_the_tokens_for_itself():
    torch.manual_seed(0)
    model, batches = Joined(SPREAD["expand"], "cat"), [torch.randn(count, T, INPUTS) for count in (N, 1)]
    watched, twin = copy.deepcopy(model), copy.deepcopy(model).double()
    with autospec.watch(watched, ["a", "b"], singular_values="all", quiet=True) as watcher:
        for x in batches:
            watcher.set_groups(LABELS[: len(x)])
            watched.zero_grad()
            loss_of(watched(x)).backward()
            watcher.step()
    names = list(watcher.trajectories["layers"].children)
    loss_of(twin(batches[1].double())).backward()
    for name in names:
        found = watcher.trajectories[f"layers/{name}/gradient"].isel(step=1).sel(group="a").dropna("index").values
        assert error(found, svdvals(twin.get_parameter(name).grad)) < 1e-6, name


def test_outputs_that_are_joined_along_the_samples_have_their_own_adjoints():
    """Where derivatives lie in memory one after the other, that of the second is a part of a larger tensor."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(INPUTS, 6), nn.Linear(INPUTS, 6), nn.Linear(6, 3)

        def forward(self, x):
            both = torch.cat([self.first(x), self.second(x)], 0)
            return self.head(torch.tanh(both).unflatten(0, (2, len(x))).sum(0))

    torch.manual_seed(0)
    model, x = Branches(), torch.randn(N, T, INPUTS)
    tree = record(Problem(model, x, loss_of, LABELS))
    assert_definition(tree, model, x)
    assert tree.attrs["audit"]["outside"] == {}


GRID = torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1]])


class OfConstants(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.register_buffer("constants", torch.randn(T, INPUTS))
        self.first, self.second, self.read = nn.Linear(INPUTS, 7), nn.Linear(7, 6), nn.Linear(INPUTS, 6)
        self.table, self.head, self.kind = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3), kind

    def forward(self, x):
        hidden = self.first(self.constants)
        if self.kind == "in place":
            hidden = F.relu(hidden, inplace=True)
        elif self.kind == "in place, by position":
            hidden = nn.functional.leaky_relu(hidden, 0.1, True)
        elif self.kind == "dropout":
            hidden = F.dropout(hidden, 0.4, self.training)
        shared, data = self.second(hidden), self.read(x)
        if self.kind == "tied":
            data = torch.tanh(data @ self.second.weight) @ self.second.weight.T
        elif self.kind == "an index from elsewhere":  # of the table's rows
            shared = shared + self.table[GRID].sum(1)
        return self.head(torch.tanh(data + shared))


@pytest.mark.parametrize("kind", ["in place", "in place, by position", "tied", "an index from elsewhere", "dropout"])
def test_what_is_computed_of_constants_in_several_ways(kind):
    torch.manual_seed(0)
    model, x = OfConstants(kind), torch.randn(N, T, INPUTS)
    model.table.requires_grad_(kind == "an index from elsewhere")
    assert_same_training(model, x)
    own = copy.deepcopy(model).double()
    state = torch.get_rng_state()
    with autospec.watch(model, LABELS, singular_values="all", quiet=True) as watcher:
        loss_of(model(x)).backward()
        watcher.step()
    torch.set_rng_state(state)
    mask = F.dropout(torch.ones(T, 7), 0.4)  # what was drawn
    if kind == "dropout":
        own.kind, own.first = "", nn.Sequential(own.first, Times(mask.double()))
    losses = loss_by_sample(own(x.double()))
    for group, member in members(LABELS, N).items():
        for name in watcher.trajectories["layers"].children:
            weight = own.get_parameter(name if kind != "dropout" else name.replace("first.", "first.0."))
            (share,) = torch.autograd.grad(losses[torch.from_numpy(member)].sum(), weight, retain_graph=True)
            assert error(spectrum(watcher.trajectories, name, "gradient", group), svdvals(share)) < 1e-6, name
    if kind != "dropout":
        assert autospec.testing.check(model, x, LABELS, quiet=True).passed


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_the_reason_is_said_why_a_layer_of_constants_cannot_be_followed():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("times", torch.linspace(0, 1, T).unsqueeze(1))
            self.make, self.head = nn.Linear(1, INPUTS), nn.Linear(INPUTS, 3)

        def forward(self, x):
            kernel = torch.fft.rfft(self.make(self.times), n=2 * T, dim=0)
            return self.head(torch.fft.irfft(torch.fft.rfft(x, n=2 * T, dim=1) * kernel, n=2 * T, dim=1)[:, :T])

    model = Kernel()
    said = r"'make\.weight' in mul\(\).*layers=\['!make\.weight'\]"
    with autospec.watch(model, LABELS, quiet=True), pytest.raises(WatchError, match=said):
        model(torch.randn(N, T, INPUTS))


@pytest.mark.parametrize("case", ["positions-the same layer", "prototypes-graph", "cat", "queries", "made by layers"])
def test_the_check_compares_what_is_made_of_what_all_samples_share(case):
    torch.manual_seed(0)
    given, _, meets = case.partition("-")
    if meets:
        model = Shared(given, meets)
    else:
        model = BiasedScores(case) if case == "made by layers" else Joined(SPREAD["repeat"], case)
    check = autospec.testing.check(model, torch.randn(N, T, INPUTS), LABELS, quiet=True)
    assert check.passed
    assert check.not_compared == {}


@pytest.mark.parametrize("tokens", [N, T], ids=["as many as samples", "fewer"])
def test_as_many_constants_as_samples_are_no_samples(tokens):
    """Where a loss is taken of each time step, either dimension might be that of the samples."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("constants", torch.randn(tokens, INPUTS))
            self.place, self.read, self.head = nn.Linear(INPUTS, 6), nn.Linear(INPUTS, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.read(x) + self.place(self.constants)))

    torch.manual_seed(0)
    model, x = Positions(), torch.randn(N, tokens, INPUTS)
    if tokens == N:
        with pytest.raises(WatchError, match=r"more than one dimension.*batch_dim="):
            record(Problem(model, x, loss_of, LABELS))
    assert_definition(record(Problem(model, x, loss_of, LABELS), batch_dim=0), model, x)


def test_a_width_that_is_the_number_of_samples_makes_no_state_of_a_constant():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(N, N)), nn.Tanh(), nn.Linear(N, 3))
    x = torch.randn(N, N, N)
    tree = record(Problem(model, x, loss_of, LABELS), batch_dim=0)
    assert_definition(tree, model, x)


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


class Mine(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [lambda use: Own(use, 6, 6), lambda use: Attended(use)], ids=["own", "attention"])
def test_modes_of_the_users_own_are_left_after_an_interruption(make):
    def stop(x, *_):
        raise KeyboardInterrupt

    model, x = make(stop), torch.randn(N, T, 6)
    with torch.device("cpu"), autospec.watch(model, None, quiet=True), pytest.raises(KeyboardInterrupt), Mine():
        model(x)
    assert modes() == []


class Attended(nn.Module):
    """Stops within an attention, by a hook on what it returns."""

    def __init__(self, stop):
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)
        self.stop = stop

    def forward(self, x):
        return self.inner(x, x, x, attn_mask=self.stop(x))


def wrote(model, x):
    adjacency = torch.zeros(6, 6, dtype=x.dtype)
    adjacency[1:4] = model.weight[:3]
    return model.alpha * (x @ adjacency) + x @ model.weight


def clamped(model, x):
    made = model.weight.tanh()
    with torch.no_grad():
        model.weight.clamp_(-model.limit, model.limit)
    return x @ made


SILENT = {
    "written into a constant": (wrote, r"'weight' in matmul\(\)"),
    "a factor beside a sum": (
        lambda m, x: torch.addmm(m.weight[0], x, m.weight.t(), beta=2),
        r"'weight' in addmm\(\)",
    ),
    "factors by position": (lambda m, x: torch.addmm(1.0, x, 2.0, x, m.weight), r"'weight' in addmm\(\)"),
    "clamped in between": (clamped, r"'weight' in matmul\(\)"),
}


@pytest.mark.parametrize("groups", [LABELS, None], ids=["groups", "no groups"])
@pytest.mark.parametrize("name", SILENT)
def test_what_cannot_be_followed_is_refused_though_nothing_comes_of_it_at_first(name, groups):
    use, said = SILENT[name]
    model = Late(use, alpha=torch.zeros(1))
    model.limit = 0.1
    with pytest.raises(WatchError, match=said):
        record(Problem(model, torch.randn(N, 6), loss_of, groups))


TABLES = {
    "numbers of heads": (
        (2, T, 1),
        lambda p, x: (x.unflatten(2, (2, 3)).transpose(1, 2) * p).transpose(1, 2).flatten(2),
    ),
    "a column": ((T, 3), lambda p, x: x + p[:, :1]),
    "one for each row": ((T, 1), lambda p, x: x * p),
    "one of its numbers": ((T, 3), lambda p, x: x * p[0, 1] + p.norm()),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_which_a_number_meets_a_whole_row(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            shape, self.use = TABLES[name]
            self.table, self.other, self.out = (
                nn.Parameter(torch.randn(shape)),
                nn.Parameter(torch.randn(6, 6)),
                nn.Linear(6, 2),
            )

        def forward(self, x):
            return self.out(torch.tanh(self.use(self.table, x) @ self.other))

    torch.manual_seed(0)
    model, x = Model(), torch.randn(N, T, 6)
    tree = record(Problem(model, x, loss_of, LABELS))
    assert ("table" in tree["layers"].children) == (model.table.ndim > 1 and model.table[0].numel() > 1)
    assert_definition(tree, model, x)


class Constants(nn.Module):
    """Positions that are made of a constant, which is as long as the batch is large."""

    def __init__(self, use):
        super().__init__()
        self.weight, self.out, self.use = nn.Parameter(torch.randn(3, 6) / 2), nn.Linear(6, 2), use
        self.table = nn.Embedding(N, 6)
        self.register_buffer("basis", torch.randn(N, 3))
        self.register_buffer("places", torch.arange(N))

    def forward(self, x):
        return self.out(torch.tanh(self.use(self, x)))


PLACES = torch.arange(N)
AS_LONG_AS_THE_BATCH = {
    "a basis": lambda m, x: x + m.basis @ m.weight,
    "positions with a dimension afterwards": lambda m, x: x + m.table(torch.arange(N)).unsqueeze(0),
    "positions in a buffer": lambda m, x: x + m.table(m.places)[None],
    "positions that are nobody's": lambda m, x: x + (2 * m.table(PLACES))[None],
    "positions by which data are multiplied": lambda m, x: torch.tanh(m.table(torch.arange(N)))[None] * x,
}


@pytest.mark.parametrize("name", AS_LONG_AS_THE_BATCH)
def test_what_is_as_long_as_the_batch_is_large_is_no_guess(name):
    torch.manual_seed(0)
    model, x = Constants(AS_LONG_AS_THE_BATCH[name]), torch.randn(N, N, 6)
    layers = ["!table.weight"] if name == "a basis" else ["!weight"]
    tree = record(Problem(model, x, loss_of, LABELS), batch_dim=0, layers=layers)
    assert_definition(tree, model, x)
    try:
        tree = record(Problem(model, x, loss_of, LABELS), layers=layers)
    except WatchError as error_:
        assert "more than one dimension" in str(error_)  # noqa: PT017
    else:
        assert_definition(tree, model, x)


def test_as_many_prototypes_as_samples_are_no_samples():
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.centres = nn.Linear(6, 6), nn.Embedding(N, 6)

        def forward(self, x):
            return torch.tanh(self.inner(x)) @ self.centres(torch.arange(N)).T

    torch.manual_seed(0)
    model, x = Prototypes(), torch.randn(N, 6)
    assert_definition(record(Problem(model, x, loss_of, LABELS)), model, x)


def test_gradients_of_gradients_through_a_table_are_refused():
    torch.manual_seed(0)
    model, x = ELEMENTWISE["computed"](), torch.randn(N, T, 6)
    with (
        autospec.watch(model, LABELS, quiet=True),
        pytest.raises(WatchError, match=r"gradients of gradients pass by 'positions'"),
    ):
        torch.autograd.grad(loss_of(model(x)), list(model.parameters()), create_graph=True)


def test_check_of_a_checkpointed_model_with_weights_of_its_own():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Own(lambda x, w, b: x @ w + b, 6, OUTPUTS), nn.Tanh(), nn.Linear(OUTPUTS, 2))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    torch.manual_seed(0)
    assert autospec.testing.check(Checkpointed(), torch.randn(N, T, 6), LABELS, quiet=True).passed


def test_a_weight_that_is_used_in_no_way_that_can_be_watched_is_refused_at_the_first_pass():
    torch.manual_seed(0)
    model = Own(lambda x, w, b: torch.cdist(x, w), OUTPUTS, INPUTS)
    with pytest.raises(
        WatchError, match=r"uses 'weight' in cdist\(\), where it cannot be watched.*layers=\['!weight'\]"
    ):
        record(Problem(model, torch.randn(N, INPUTS), loss_of, LABELS))
