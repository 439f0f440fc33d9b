"""Attention against the same function written out, tokens, and a model from Hugging Face."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import autospec
from autospec.introspection import WatchError

from .families import (
    ATTENTIONS,
    LABELS,
    LENGTHS,
    Bert,
    E,
    N,
    T,
    attention,
    normal,
    padding_mask,
    problem,
    weighted,
    whole_numbers,
)
from .oracle import (
    WrittenOut,
    assert_exact,
    assert_shares,
    error,
    members,
    record,
    sample_second,
    shared_by,
    spectrum,
    svdvals,
)

TABLE = members(LABELS, N)
WITHOUT_DROPOUT = [
    name
    for name in ATTENTIONS
    if (name.startswith("Attention, ") and "checkpointed" not in name) or "evaluation mode" in name
]


def written_out(made):
    """Run the problem in float64 with its attention written out; return the loss and the layers' projections."""
    twin = copy.deepcopy(made)
    twin.model.double()
    layers = {name: m for name, m in twin.model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    for layer in layers.values():
        layer.forward = WrittenOut(layer)
    return twin.loss(), {name: layer.forward.projections for name, layer in layers.items()}


@pytest.mark.parametrize("case", WITHOUT_DROPOUT)
def test_factors_are_what_enters_each_projection_and_the_derivative_at_its_output(case):
    made = ATTENTIONS[case]()
    double = copy.deepcopy(made)
    double.model.double()
    loss, layers = written_out(made)
    assert loss.item() == pytest.approx(made.loss(copy.deepcopy(double.model)).item(), rel=1e-10)
    loss.backward()
    seen = set()
    for tolerance, tree in ((2e-5, record(made)), (1e-7, record(double))):
        for module, projections in layers.items():
            for name in {p.name for p in projections if p.zeros.grad is not None}:
                seen.add(f"{module}.{name}")
                node = tree[f"layers/{module}.{name}"]
                for group, member in TABLE.items():
                    parts = [p.factors(member) for p in projections if p.name == name]
                    a, d = (torch.cat(rows) for rows in zip(*parts, strict=True))
                    for statistic, matrix in (("gradient", d.T @ a), ("activation", a), ("adjoint", d)):
                        recorded = spectrum(tree, f"{module}.{name}", statistic, group)
                        assert len(recorded) == min(*matrix.shape, *node.attrs["shape"]), (name, group, statistic)
                        assert error(recorded, svdvals(matrix)) < tolerance, (name, group, statistic)
    assert len(seen) >= 1 + ("alone" not in case)


def test_in_an_encoder_layer_the_linear_layers_are_exact_beside_the_attention():
    made = ATTENTIONS["EncoderLayer, norm first, evaluation mode"]()
    tree = record(made)
    assert_exact(tree, made, TABLE)
    assert set(tree["layers"].children) == {
        "0.self_attn.in_proj_weight",
        "0.self_attn.out_proj.weight",
        "0.linear1.weight",
        "0.linear2.weight",
        "1.weight",
    }


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_share_of_a_token_is_that_of_its_rows(batch_first):
    made = attention(batch_first=batch_first)
    tree = record(made, per_position=True)
    loss, layers = written_out(made)
    loss.backward()
    for projection in layers["layer"]:
        recorded = tree[f"layers/layer.{projection.name}/gradient_by_position"]
        assert recorded.sizes["position"] == T
        for group, member in TABLE.items():
            inside = torch.from_numpy(member)
            a, d = projection.x[inside].transpose(0, 1), projection.zeros.grad[inside].transpose(0, 1)
            expected = torch.linalg.svdvals(d.mT @ a).numpy()
            found = recorded.sel(group=group).values[0]
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * expected.max())


@pytest.mark.parametrize("equal", ["key and value", "value", "query and key"])
def test_queries_keys_and_values_of_a_token_have_one_position(equal):
    """However many of them are one tensor: where positions are added to queries and keys alone, they are two."""

    class Attends(nn.Module):
        def __init__(self, copied):
            super().__init__()
            self.layer, self.copied = nn.MultiheadAttention(E, 2, batch_first=True), copied

        def forward(self, x):
            other = x * 1.0 if self.copied else x
            query, key, value = {
                "key and value": (x, other, other),
                "value": (x, other, x + 0.0 if self.copied else x),
                "query and key": (x, x, other),
            }[equal]
            return self.layer(query, key, value)[0]

    found = []
    for copied in (False, True):
        torch.manual_seed(0)
        tree = record(problem(Attends(copied), normal(N, T, E)), per_position=True)
        found.append(tree["layers/layer.in_proj_weight/gradient_by_position"].values)
    assert found[0].shape[2] == T
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=2e-5 * found[0].max())


@pytest.mark.parametrize("sample_dim", [0, 1])
def test_as_many_tokens_as_samples_is_resolved_because_attention_mixes_tokens(sample_dim):
    layer = nn.MultiheadAttention(E, 2, batch_first=not sample_dim)

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, nn.Linear(E, 3)

        def forward(self, x):
            return self.head(self.layer(x, x, x)[0])

    where = {"layer": (sample_dim, 0), "head": sample_second if sample_dim else 0}
    made = problem(Attending(), normal(N, N, E), where)
    tree = record(made)
    assert tree.attrs["audit"]["batch_dims"] == [sample_dim]
    assert_shares({2e-5: tree}, made, TABLE)


def test_attention_between_samples_is_refused():
    made = attention(batch_first=False)
    made.x = normal(N, T, E)  # the layer takes the samples for tokens
    with pytest.raises(WatchError, match=r"'layer' mix several samples.*batch_dim= or rows="):
        record(made)


class ClassToken(nn.Module):
    """A learned token stands before those of each sample, as in vision transformers."""

    def __init__(self, batch_first):
        super().__init__()
        self.token = nn.Parameter(normal(1, 1, E))
        self.layer = nn.TransformerEncoderLayer(E, 2, 12, batch_first=batch_first, dropout=0.0)
        self.head, self.first = nn.Linear(E, 3), batch_first

    def forward(self, x):
        token = self.token.expand(*((len(x), 1) if self.first else (1, x.shape[1])), -1)
        hidden = self.layer(torch.cat([token, x], 1 if self.first else 0))
        return self.head(hidden[:, 0] if self.first else hidden[0])


class MaskToken(nn.Module):
    """A learned token stands in for some of each sample's, as in masked autoencoders."""

    def __init__(self):
        super().__init__()
        self.token, self.inner = nn.Parameter(normal(E)), nn.Linear(E, E)
        self.layer = nn.TransformerEncoderLayer(E, 2, 12, batch_first=True, dropout=0.0)

    def forward(self, x):
        hidden = self.inner(torch.where(padding_mask().unsqueeze(-1), self.token, x))
        return torch.tanh(self.layer(hidden)) * x


@pytest.mark.parametrize(
    "case", ["class token", "class token, time first", "class token, time first, N in all", "mask token"]
)
def test_the_rows_of_a_learned_token_are_those_of_the_sample_that_it_stands_with(case):
    axis = 1 if "time" in case else 0
    model = MaskToken() if case == "mask token" else ClassToken(not axis)
    where = {"layer.self_attn": (axis, 0), "layer.linear1": axis, "layer.linear2": axis}
    tokens = N - 1 if "in all" in case else T
    made = problem(model, normal(tokens, N, E) if axis else normal(N, tokens, E), where)
    tree = record(made)
    assert_shares({2e-5: tree}, made, TABLE)
    assert tree.attrs["audit"]["outside"] == {}


def test_tokens_that_are_not_valid_are_left_out_everywhere():
    x = whole_numbers(19, N, T) + 1
    valid = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)
    x[~valid] = 0

    class Masked(Bert):
        def forward(self, x):
            hidden = self.encoder(self.norm(self.words(x)), src_key_padding_mask=x == 0)
            return torch.tanh(self.pooler(hidden)) * (x != 0).unsqueeze(-1)

    made = problem(Masked(1, dropout=0.0), x)
    made.samples = {"encoder.layers.0.self_attn": (0, 0)}
    whole, tree = record(made), record(made, valid=valid)
    loss, layers = written_out(made)
    loss.backward()
    for projection in layers["encoder.layers.0.self_attn"]:
        name = f"encoder.layers.0.self_attn.{projection.name}"
        for group, member in TABLE.items():
            kept = torch.from_numpy(member).unsqueeze(1) & valid
            a, d = projection.x[kept], projection.zeros.grad[kept]
            for statistic, matrix in (("gradient", d.T @ a), ("activation", a), ("adjoint", d)):
                assert error(spectrum(tree, name, statistic, group), svdvals(matrix)) < 2e-5
            assert int(tree[f"layers/{name}"].rank_limit.sel(group=group)) == min(E, len(a))
    activation = "layers/encoder.layers.0.linear1.weight/activation"
    assert not np.allclose(tree[activation], whole[activation], rtol=1e-2)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x, padding=None):
        states = self.encoder(x, src_key_padding_mask=padding)
        if padding is not None:  # torch cuts off what is padding in every sequence
            states = states.masked_fill(padding[:, : states.shape[1], None], 0)
        return self.head(states.mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", ["validation", "padded", "frozen", "attention", "within training"])
def test_where_torch_takes_a_short_cut_the_watcher_changes_nothing(case):
    """It computes a layer in one call, which hooks would prevent: last digits of a validation loss would differ."""
    torch.manual_seed(0)
    x = torch.randn(N, 9, 8)
    padding = torch.arange(9) >= torch.randint(3, 8, (N, 1)) if case in ("padded", "frozen") else None
    model = nn.MultiheadAttention(8, 2, batch_first=True) if case == "attention" else Encoder()
    if case == "frozen":
        model.encoder.requires_grad_(False)

    def run(watcher):
        results = []
        for _ in range(2):
            model.train()
            if case == "frozen":
                model.encoder.eval()
            model.zero_grad()
            torch.manual_seed(1)
            output = model(x, x, x)[0] if case == "attention" else model(x, padding)
            output.square().sum().backward()
            watcher.step()
            model.eval()
            if case == "within training":
                model.head.train()
            with torch.no_grad():
                results += [output, (model(x, x, x)[0] if case == "attention" else model(x, padding))]
        return results

    class Nobody:
        def step(self):
            pass

    before = copy.deepcopy(model.state_dict())
    expected = run(Nobody())
    model.load_state_dict(before)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        found = run(watcher)
        assert all(module._forward_hooks for module in model.modules() if type(module) is nn.Linear)  # they are back
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_bert_from_hugging_face_is_watched_like_any_other_model():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=E,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=T + 3,
    )

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert, self.head = transformers.BertModel(config), nn.Linear(E, 3)

        def forward(self, x):
            found = self.bert(input_ids=x, attention_mask=(x != 0).long())
            return [self.head(found.last_hidden_state), torch.tanh(found.pooler_output)]

    made = problem(Wrapped(), whole_numbers(20, N, T))
    made.samples = {"bert.embeddings.position_embeddings": shared_by(N)}
    tree = record(made)
    assert len(tree["layers"].children) == 3 + 2 * 6 + 2
    assert tree.attrs["audit"]["outside"] == {}
    assert_shares({2e-5: tree}, made, TABLE)
    assert_exact(tree, made, TABLE)

    def train(watched):
        model = copy.deepcopy(made.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        watcher = autospec.watch(model, LABELS, quiet=True) if watched else None
        with watcher or torch.enable_grad():
            for _ in range(2):
                optimizer.zero_grad()
                weighted(model(made.x)).backward()
                if watcher:
                    watcher.step()
                optimizer.step()
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


class Pooled(nn.Module):
    """Attention pooling: learned queries, the same for all samples, as in a Perceiver."""

    def __init__(self, batch_first):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 2, 8))
        self.attention, self.batch_first = nn.MultiheadAttention(8, 2, batch_first=batch_first), batch_first

    def forward(self, x):
        queries = self.queries.expand(len(x), -1, -1)
        if self.batch_first:
            return self.attention(queries, x, x)[0]
        return self.attention(queries.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("tokens", [2, 5])
def test_learned_queries_belong_to_the_sample_whose_output_they_make(tokens, batch_first):
    torch.manual_seed(0)
    model, labels = Pooled(batch_first), list("abbaba")
    x = torch.randn(6, tokens, 8)
    with autospec.watch(model, labels, unknown="skip", quiet=True) as watcher:
        model(x).pow(3).sum().backward()
        watcher.step()
    for group in "ab":
        model.zero_grad()
        model(x)[[label == group for label in labels]].pow(3).sum().backward()
        for name in ("in_proj_weight", "out_proj.weight"):
            exact = torch.linalg.svdvals(model.attention.get_parameter(name).grad.double()).numpy()
            found = watcher.trajectories[f"layers/attention.{name}/gradient"].sel(group=group).values[0]
            assert np.abs(found - exact[: len(found)]).max() < 1e-5 * exact[0], (group, name)
