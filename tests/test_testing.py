"""autospec.testing.check: the proof on a user's own model."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autospec
from autospec.introspection import WatchError
from autospec.introspection.shares import Shares
from autospec.testing import check

LABELS = list("aabbbc") * 4
N = len(LABELS)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 6, 2, bidirectional=True, batch_first=True, dropout=0.3), nn.Linear(12, 3)

    def forward(self, x, scale=1.0):
        return {"scores": self.head(self.rnn(x)[0].mean(1)) * scale}


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self(torch.randn(N, 5))

    def forward(self, x):
        self.kept = torch.softmax(self.inner(x), 1)
        return self.head(self.kept)


CASES = {
    "convolution, BatchNorm and Dropout": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(48, 5)
        ),
        lambda: torch.randn(N, 4, 10),
    ),
    "recurrent, inputs by name": (Recurrent, lambda: {"x": torch.randn(N, 7, 5), "scale": 2.0}),
    "an activation that is kept": (Keeps, lambda: torch.randn(N, 5)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True),
        lambda: (torch.randn(N, 7, 8),),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_supported_models_pass_and_stay_as_they_are(case, capsys):
    make, batch = CASES[case]
    torch.manual_seed(0)
    model, given = make(), batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = check(model, given, LABELS)
    assert found.passed, str(found)
    assert found.unchanged
    assert found.not_compared == {}
    assert found.cost > 0
    once = check(model, given, LABELS, steps=1, quiet=True)
    assert once.passed
    assert math.isnan(once.cost)
    assert "times as long" in str(found)
    assert "times as long" not in str(once)
    assert {group for _, group in found.errors} == {"all", "a", "b", "c"}
    printed = capsys.readouterr().out
    assert "bitwise unchanged: yes" in printed
    assert printed.strip().endswith("passed")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


def test_rows_given_to_the_wrong_samples_fail():
    torch.manual_seed(1)
    model, x = nn.Linear(5, 4), torch.randn(N, 5)
    wrong = {"weight": (torch.arange(N) + 1) % N}
    assert check(model, x, LABELS, quiet=True).passed
    assert not check(model, x, LABELS, rows=wrong, quiet=True).passed


def test_weights_that_are_computed_from_others_are_left_out_here_too():
    torch.manual_seed(2)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)), nn.Tanh(), nn.Linear(7, 4))
    found = check(model, torch.randn(N, 5), LABELS, unknown="skip", quiet=True)
    assert found.passed
    assert {name for name, _ in found.errors} == {"2.weight"}


class SortedWords(nn.Module):
    """Only what comes after the words were put back has the samples in the batch's order."""

    def __init__(self, heads=1):
        super().__init__()
        self.words, self.inner = nn.Embedding(9, 4), nn.Linear(4, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(heads))

    def forward(self, words, lengths):
        order = lengths.argsort()
        hidden = torch.tanh(self.inner(self.words(words[order]))).mean(1)[order.argsort()]
        return [head(hidden) for head in self.heads] or hidden


def sorted_words():
    torch.manual_seed(3)
    return torch.randint(1, 9, (N, 7)), torch.randperm(N)


def test_a_model_with_activation_checkpointing_is_compared():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.LSTM(6, 4, batch_first=True)

        def forward(self, x):
            return checkpoint(lambda h: self.second(h)[0], self.first(x).tanh(), use_reentrant=False)

    result = check(Model(), torch.randn(8, 3, 5), ["a", "b"] * 4, quiet=True)
    assert result.passed
    assert len(result.errors) == 9  # three matrices, three groups


def test_what_cannot_be_compared_is_said():
    found = check(SortedWords(heads=0), sorted_words(), LABELS, quiet=True)
    assert set(found.not_compared) == {"words.weight", "inner.weight"}
    assert "in the batch's order" in found.not_compared["inner.weight"]
    assert not found.passed
    assert "FAILED" not in str(found)
    assert "no layer could be compared" in str(found)


@pytest.mark.parametrize("wanted", [[2, 3], 2, "all"])
def test_singular_values_are_compared_by_their_number(wanted):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    result = check(model, torch.randn(N, 6), LABELS, quiet=True, singular_values=wanted)
    assert result.passed
    assert len(result.errors) == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"statistics": ["activation"]}, "name 'gradient' among statistics="),
        ({"store": "x.zarr"}, "leave out store="),
        ({"steps": 0}, "steps=0 is not a whole number of at least 1"),
    ],
    ids=["no gradients", "a store", "no step"],
)
def test_options_that_leave_nothing_to_compare_are_refused(options, says):
    with pytest.raises(WatchError, match=says):
        check(nn.Linear(5, 3), torch.randn(N, 5), LABELS, quiet=True, **options)


def test_a_frozen_layer_is_said_to_be_frozen():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    model[0].requires_grad_(False)
    assert check(model, torch.randn(N, 6), LABELS, quiet=True).not_compared == {"0.weight": "it is frozen"}


def test_models_that_draw_from_pythons_and_numpys_generators_pass():
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x):
            x = torch.tanh(self.first(x)) * (1 + random.random())
            return self.second(x) * float(np.random.rand())  # noqa: NPY002

    torch.manual_seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    found = check(Drawing(), torch.randn(N, 6), LABELS, quiet=True)
    assert found.passed, str(found)
    assert found.reproducible
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002


def test_a_model_that_learns_nothing_is_refused():
    with pytest.raises(WatchError, match="all of the model's are frozen"):
        check(nn.Linear(6, 4).requires_grad_(False), torch.randn(N, 6), LABELS, quiet=True)


@pytest.mark.filterwarnings("ignore:the .* of 'weight' holds values that are not finite")
def test_a_gradient_that_is_not_finite_is_not_compared():
    found = check(nn.Linear(6, 4), torch.full((N, 6), torch.nan), LABELS, quiet=True)
    assert found.not_compared == {"weight": "its gradient is not finite"}
    assert not found.passed


def test_a_layer_that_cannot_be_compared_does_not_keep_others_from_it():
    found = check(SortedWords(), sorted_words(), LABELS, quiet=True)
    assert found.passed
    assert {name for name, _ in found.errors} == {"heads.0.weight"}
    assert set(found.not_compared) == {"words.weight", "inner.weight"}


def test_as_many_features_as_samples_are_told_apart_by_moving_the_samples():
    found = check(nn.Linear(N, N), torch.randn(N, N), LABELS, batch_dim=0, quiet=True)
    assert found.passed
    assert not found.not_compared


def test_layers_after_something_drawn_at_random_are_compared():
    class Sampling(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.decoder = nn.Linear(5, 3), nn.Linear(3, 5)

        def forward(self, x):
            mean = self.mean(x)
            return self.decoder(mean + torch.randn_like(mean))

    found = check(Sampling(), torch.randn(N, 5), LABELS, quiet=True)
    assert found.passed
    assert {name for name, _ in found.errors} == {"mean.weight", "decoder.weight"}


def test_a_loss_is_asked_for_where_the_output_has_no_gradient():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 4)

        def forward(self, x):
            return self.inner(x).argmax(1)

    with pytest.raises(autospec.introspection.WatchError, match="give check\\(\\) a loss"):
        check(Counts(), torch.randn(N, 5), LABELS)


def test_a_forward_pass_may_use_gradients():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            states = torch.tanh(self.first(x))
            states.retain_grad()
            return self.second(states)

    assert check(Looking(), torch.randn(6, 5), ["a", "b"] * 3, quiet=True).passed


class Windows(nn.Module):
    """Rows of several windows of each sample, one after the other, as encoders of fMRI have them."""

    def __init__(self, how):
        super().__init__()
        self.encoder, self.how = nn.Linear(5, 3), how

    def forward(self, x):
        if self.how == "sample by sample":
            return self.encoder(x.flatten(0, 1)).view(N, -1, 3).tanh().mean(1)
        if self.how == "window by window":
            return self.encoder(x.transpose(0, 1).flatten(0, 1)).view(-1, N, 3).tanh().mean(0)
        return self.encoder(torch.cat([x[:, 0], x[:, 1]])).tanh()


@pytest.mark.parametrize("how", ["sample by sample", "window by window", "two views"])
def test_rows_of_several_windows_of_each_sample_are_compared(how):
    found = check(Windows(how), torch.randn(N, 4, 5), LABELS, loss=lambda y: (y**3).sum(), quiet=True)
    assert found.passed, str(found)
    assert found.not_compared == {}


def test_rows_that_are_given_are_used_where_the_outputs_do_not_show_them():
    class Graphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.node, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, nodes, graph):
            hidden = torch.tanh(self.node(nodes))
            return self.head(hidden.new_zeros(N, 4).index_add(0, graph, hidden))

    graph = torch.arange(N).repeat_interleave(torch.arange(N) % 3 + 2)
    given = torch.randn(len(graph), 5), graph
    rows = {"node.weight": graph.tolist(), "head.weight": range(N)}
    found = check(Graphs(), given, LABELS, rows=rows, quiet=True)
    assert found.passed, str(found)
    assert found.not_compared == {}


def test_weights_that_the_model_changes_before_it_uses_them_are_compared():
    class LargestNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            with torch.no_grad():
                self.layer.weight.renorm_(2, 0, 0.25)
            return self.layer(x).tanh()

    found = check(LargestNorm(), torch.randn(N, 5), LABELS, quiet=True)
    assert found.passed, str(found)


def test_samples_that_the_model_exchanges_are_not_taken_for_others():
    class Negatives(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.layer(x) * self.layer(x.roll(1, 0)) + self.head(x)

    found = check(Negatives(), torch.randn(N, 5), LABELS, quiet=True)
    assert found.passed, str(found)
    assert list(found.not_compared) == ["layer.weight"]
    assert str(found).endswith("passed, for 1 of 2 matrices")


def test_a_gradient_that_cancels_to_rounding_is_not_called_wrong():
    """An instance norm undoes the scale of a convolution of one channel: the residual branches of DynUNet and UNETR."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 4, 1, bias=False), nn.InstanceNorm3d(4), nn.LeakyReLU(), nn.Conv3d(4, 2, 3))
    nn.init.ones_(model[0].weight)
    found = check(model, torch.randn(8, 1, 16, 16, 16), list("abbabbab"), loss=lambda y: y.square().mean(), quiet=True)
    assert found.passed, str(found)
    assert found.not_compared["0.weight"].startswith("its gradient cancels")
    assert {name for name, _ in found.errors} == {"3.weight"}


def test_a_layer_of_training_alone_is_said_to_be_one():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head, self.extra = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            hidden = self.layer(x).tanh()
            return (self.head(hidden), self.extra(hidden)) if self.training else self.head(hidden)

    found = check(Auxiliary(), torch.randn(N, 5), LABELS, rows={"extra.weight": range(N)}, quiet=True)
    assert found.passed
    assert list(found.not_compared) == ["extra.weight"]
    assert "not called in evaluation mode" in found.not_compared["extra.weight"]


@pytest.mark.parametrize("samples", [1, 2])
def test_batches_of_one_and_two_samples_are_compared(samples):
    found = check(nn.Linear(5, 3), torch.randn(samples, 5), list("ab")[:samples], quiet=True)
    assert found.passed, str(found)
    assert found.not_compared == {}


def test_layers_that_begin_with_zeros_are_compared():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2 * N))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    found = check(model, torch.randn(N, 5), LABELS, loss=lambda y: (y - 1).square().mean(), quiet=True)
    assert found.passed, str(found)
    assert found.not_compared == {"0.weight": "its gradient is zero"}
    assert str(found).endswith("passed")


def test_a_wrong_record_is_not_excused_in_half_precision(monkeypatch):
    grams = Shares.grams
    monkeypatch.setattr(Shares, "grams", lambda *args: [(some, 1.5 * gram) for some, gram in grams(*args)])
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).bfloat16()
    found = check(model, torch.randn(N, 5).bfloat16(), LABELS, quiet=True)
    assert not found.passed
    assert str(found).endswith("FAILED")
