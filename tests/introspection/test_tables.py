"""Tables that all samples meet: number by number, or spread over the batch, as positions, tokens and masks of scores."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import autospec.testing
from autospec.introspection import WatchError

from .oracle import Problem, error, record, svdvals
from .own_weights import (
    INPUTS,
    LABELS,
    SPREAD,
    STATISTICS,
    BiasedScores,
    Joined,
    N,
    Positions,
    T,
    assert_definition,
    assert_same_training,
    loss_of,
)


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


@pytest.mark.parametrize("kind", ["for all heads", "for each head", "spread", "made by layers"])
def test_learned_masks_of_an_attention(kind):
    torch.manual_seed(0)
    model, x = BiasedScores(kind), torch.randn(N, T, INPUTS)
    tree = record(Problem(model, x, loss_of, LABELS))
    own = {"make.0.weight", "make.2.weight"} if kind == "made by layers" else {"mask"}
    assert set(tree["layers"].children) == {"read.weight", "head.weight"} | own
    assert_definition(tree, model, x)
    assert_same_training(model, x)


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


def test_gradients_of_gradients_through_a_table_are_refused():
    torch.manual_seed(0)
    model, x = ELEMENTWISE["computed"](), torch.randn(N, T, 6)
    with (
        autospec.watch(model, LABELS, quiet=True),
        pytest.raises(WatchError, match=r"gradients of gradients pass by 'positions'"),
    ):
        torch.autograd.grad(loss_of(model(x)), list(model.parameters()), create_graph=True)
