"""Weights that a model itself multiplies with data are watched as those of torch's layers are."""

import contextlib
import copy
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import autospec.testing
from autospec.introspection import WatchError
from autospec.introspection.copies import copy_model
from autospec.introspection.layers import readings
from autospec.introspection.sample_shares import sample_shares

from .oracle import Problem, error, members, record, spectrum, svdvals
from .own_weights import (
    INPUTS,
    LABELS,
    OUTPUTS,
    STATISTICS,
    Late,
    N,
    Own,
    T,
    assert_definition,
    loss_by_sample,
    loss_of,
)


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


def test_a_mean_teachers_weights_are_not_the_models():
    own, _, x = own_and_torchs("linear")
    plain = record(Problem(own, x, loss_of, LABELS))
    teacher = {name: each.detach() * 0.9 for name, each in own.named_parameters()}

    def loss(output):
        return loss_of(output) + 0 * torch.func.functional_call(own, teacher, (x,)).sum()

    tree = record(Problem(own, x, loss, LABELS))
    np.testing.assert_array_equal(tree["layers/0.weight/gradient"], plain["layers/0.weight/gradient"])


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
