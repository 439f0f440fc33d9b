"""Each sample's share against its definition, run literally, and weighted sums of shares against plain sums."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import autospec
from autospec.introspection import WatchError
from autospec.introspection.sample_shares import FactoredShares, LookedUpShares, StackedShares, sample_shares

from .families import FAMILIES, N
from .oracle import Problem, share_by_copies

MEMBERS = {"one sample": np.arange(N) == 3, "several": np.arange(N) % 5 < 2}


def weights(*members):
    return torch.from_numpy(np.stack(members).astype(np.float64))


@pytest.mark.parametrize("name", FAMILIES)
def test_shares_are_those_of_the_definition(name):
    problem = FAMILIES[name]()
    problem.model.double()
    found = sample_shares(problem.model, problem.loss, N)
    for which, member in MEMBERS.items():
        expected = share_by_copies(problem, member)
        assert expected.keys() == found.keys()
        for key, share in expected.items():
            (mine,) = found[key].weighted_sums(weights(member))
            assert float((mine - share).abs().max()) <= 1e-9 * float(share.abs().max()), (which, key)


class Reversed(nn.Module):
    """Layers that see many tokens of each sample, the last sample first."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.flip(0))))


def test_samples_of_many_tokens_in_another_order_keep_their_shares():
    torch.manual_seed(0)
    x, weight = torch.randn(N, 40, 3).double(), torch.randn(N, 40, 4).double()
    problem = Problem(Reversed().double(), x, lambda output: (output * weight).sum(), ["a", "b"] * (N // 2))
    found = sample_shares(problem.model, problem.loss, N)
    for member in MEMBERS.values():
        turned = member[::-1].copy()  # the definition takes a layer's first row for the first sample's
        for key, share in share_by_copies(problem, turned).items():
            (mine,) = found[key].weighted_sums(weights(member))
            assert float((mine - share).abs().max()) <= 1e-9 * float(share.abs().max()), key


def test_in_single_precision_shares_are_exact_to_its_rounding():
    problem = FAMILIES["2-D network"]()
    found = sample_shares(problem.model, problem.loss, N)
    for key, share in share_by_copies(problem, MEMBERS["several"]).items():
        (mine,) = found[key].weighted_sums(weights(MEMBERS["several"]))
        assert mine.dtype == torch.float64
        assert found[key].dtype == torch.float32
        assert float((mine - share).abs().max()) <= 1e-5 * float(share.abs().max())


def everything(model):
    tensors = {**model.state_dict(), **{f"{key}.grad": p.grad for key, p in model.named_parameters()}}
    return {key: None if value is None else value.clone() for key, value in tensors.items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        (a is None and second[key] is None) or torch.equal(a, second[key]) for key, a in first.items()
    )


def test_the_model_its_buffers_gradients_and_random_numbers_stay_as_they_are():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    x = torch.randn(10, 5)
    model(x).sum().backward()
    before, states = everything(model), (torch.get_rng_state(), random.getstate())
    drawn = []

    def loss(model):
        random.random()
        output = model(x)
        drawn.append(output.detach())
        return output.square().mean()

    sample_shares(model, loss, 10)
    assert model.training
    assert same(before, everything(model))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert torch.equal(drawn[0], model(x).detach())  # the units that the next training step will drop


def test_a_watcher_around_the_same_model_records_as_if_nothing_had_happened():
    def run(asks):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6)), torch.randn(9, 6)
        optimizer = torch.optim.Adam(model.parameters())
        with autospec.watch(model, ["a", "b", "b"] * 3, quiet=True) as watcher:
            for _ in range(3):
                optimizer.zero_grad()
                loss = (model(x) - x).square().mean()
                if asks:
                    sample_shares(model, lambda model: (model(x) - x).square().mean(), 9)
                loss.backward()
                if asks:
                    sample_shares(model, lambda model: (model(x) - x).square().mean(), 9)
                watcher.step()
                optimizer.step()
        return watcher.trajectories

    plain, asked = run(False), run(True)
    for name in ("0.weight", "2.weight"):
        assert plain[f"layers/{name}"].to_dataset().equals(asked[f"layers/{name}"].to_dataset())


def test_few_rows_stay_factors_and_many_become_matrices():
    linear = nn.Sequential(nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, 30))
    x = torch.randn(8, 30)
    for each in sample_shares(linear, lambda model: model(x).square().mean(), 8).values():
        assert isinstance(each, FactoredShares)
    recurrent, series = nn.RNN(6, 5, batch_first=True), torch.randn(8, 20, 6)
    for each in sample_shares(recurrent, lambda model: model(series)[0].square().mean(), 8).values():
        assert isinstance(each, StackedShares)


@pytest.fixture
def forms():
    """The same shares as factors, with one to three rows a sample, and as matrices."""
    generator = torch.Generator().manual_seed(1)
    sample = np.array([2, 0, 1, 1, 3, 4, 2, 2, 5])
    activation, adjoint = (torch.randn(len(sample), width, generator=generator).double() for width in (11, 3))
    factored = FactoredShares(activation, adjoint, sample, 6, torch.float32)
    expected = torch.zeros(6, 3, 11, dtype=torch.float64)
    for row, number in enumerate(sample):
        expected[number] += torch.outer(adjoint[row], activation[row])
    return factored, factored.stacked(), expected


def test_weighted_sums_are_plain_sums(forms):
    *shares, expected = forms
    w = torch.randn(7, 6, generator=torch.Generator().manual_seed(2)).double()
    right = torch.einsum("bi,imn->bmn", w, expected)
    for each in shares:
        assert each.shape == (3, 11)
        assert each.rows.tolist() == [1, 2, 3, 1, 1, 1]
        assert torch.allclose(each.weighted_sums(w), right, atol=1e-12)
        transposed = FactoredShares(forms[0].adjoint, forms[0].activation, forms[0].sample, 6, torch.float32)
        assert torch.allclose(transposed.weighted_sums(w), right.mT, atol=1e-12)


# Samples 0 to 5 have 1, 2, 3, 1, 1 and 1 rows.
MEMBERSHIPS = {
    "fewer rows": [[0, 1], [3], [0, 4, 5]],
    "more rows": [[0, 1, 2, 3], [1, 2, 5], [0, 1, 2, 3, 5]],
    "both": [[0], [1, 2, 3, 4, 5], []],
}


@pytest.mark.parametrize("groups", MEMBERSHIPS.values(), ids=MEMBERSHIPS)
@pytest.mark.parametrize("together", [1, 2, 10])
def test_sums_over_groups_in_bounded_memory(forms, monkeypatch, groups, together):
    members = np.zeros((len(groups), 6), dtype=bool)
    for row, group in zip(members, groups, strict=True):
        row[group] = True
    right = torch.stack([forms[2][group].sum(0) for group in groups])
    high = FactoredShares(forms[0].adjoint, forms[0].activation, forms[0].sample, 6, torch.float32)
    for each, expected in ((forms[0], right), (high, right.mT), (forms[1], right)):
        monkeypatch.setattr("autospec.introspection.sample_shares.CHUNK", together * each.numbers_formed)
        parts = list(each.group_sums(members))
        assert [part.start for part, _ in parts] == list(range(0, 3, together))
        assert torch.allclose(torch.cat([sums for _, sums in parts]), expected, atol=1e-12)


@pytest.fixture(params=["narrow", "wide", "several rows a sample", "cancelled"])
def many(request):
    """Shares of forty samples, and their definition: wide enough for inner products of rows, or not."""
    generator = torch.Generator().manual_seed(5)
    sample = np.arange(40) if request.param != "several rows a sample" else np.sort(np.arange(60) % 40)
    columns = 8 if request.param == "narrow" else 36
    activation, adjoint = (torch.randn(len(sample), width, generator=generator).double() for width in (90, columns))
    if request.param == "cancelled":  # every share is nearly that of another sample, turned round
        activation[20:] = activation[:20] + 1e-6 * activation[20:]
        adjoint[20:] = -adjoint[:20]
    shares = FactoredShares(activation, adjoint, sample, 40, torch.float32)
    return request.param, shares, shares.stacked().matrices


@pytest.mark.parametrize("in_blocks", [False, True])
def test_gram_matrices_of_groups_are_those_of_their_sums(many, in_blocks, monkeypatch):
    name, shares, matrices = many
    if in_blocks:
        monkeypatch.setattr("autospec.introspection.sample_shares.SMALLEST_IN_BLOCKS", 4)
        monkeypatch.setattr("autospec.introspection.sample_shares.IN_CACHE", 1)
    members = np.random.default_rng(0).permuted(np.tile(np.arange(40) % 2 == 0, (7, 1)), axis=1)
    if name == "cancelled":
        members[:] = np.arange(40) % 20 < 8
    members[0] = np.arange(40) < 12  # another size
    asked = []
    plain = FactoredShares._sums
    monkeypatch.setattr(FactoredShares, "_sums", lambda self, each: asked.append(len(each)) or plain(self, each))
    monkeypatch.setattr("autospec.introspection.sample_shares.CHUNK", 2 * 10**4)
    total = matrices.sum(0)
    # Of shares a million times smaller than their parts, ten digits are left; squared before they cancel, none.
    tolerance = 1e-10 if name == "cancelled" else 1e-13
    for form in (shares, FactoredShares(shares.adjoint, shares.activation, shares.sample, 40, torch.float32)):
        asked.clear()
        parts = list(form.group_grams(members))
        assert len(parts) > 1
        assert (sum(asked) > 0) == (name in ("narrow", "cancelled"))
        for part, own, cross in parts:
            sums = torch.einsum("bi,imn->bmn", torch.from_numpy(members[part]).double(), matrices)
            right = sums @ sums.mT
            size = float(right.diagonal(dim1=1, dim2=2).sum(1).max())
            assert float((own.tril() - right.tril()).abs().max()) < tolerance * size
            right = sums @ total.T
            assert float((cross - right - right.mT).abs().max()) < 10 * tolerance * max(size, float(right.abs().max()))


@pytest.mark.parametrize("everyone", [False, True])
def test_groups_without_rows_have_no_gram_matrix(everyone):
    """As a group may be none of whose samples an expert has seen, or the other of two."""
    activation, adjoint = torch.randn(4, 60).double(), torch.randn(4, 40).double()
    shares = FactoredShares(activation, adjoint, np.arange(4), 40, torch.float32)
    members = np.full((3, 40), everyone)
    members[:, 30:] = not everyone  # of samples without rows
    ((part, own, cross),) = shares.group_grams(members)
    whole = (total := shares.total()) @ total.T
    assert (part.start, part.stop) == (0, 3)
    for found, right in ((own, whole), (cross, 2 * whole)):
        torch.testing.assert_close(found.tril(), (right * everyone).tril().expand(3, -1, -1), rtol=1e-12, atol=1e-12)


def test_units_add_up_and_samples_are_left_out(forms):
    unit = np.array([1, 0, -1, 1, 0, 2])
    expected = torch.stack([forms[2][unit == number].sum(0) for number in range(3)])
    for each in forms[:2]:
        units = each.of_units(unit)
        assert units.rows.tolist() == [3, 2, 1]
        assert torch.allclose(units.weighted_sums(torch.eye(3, dtype=torch.float64)), expected, atol=1e-12)
        kept = each.of_units(np.array([0, 1, -1, 2, 3, 4]))
        assert kept.samples == 5
        assert torch.allclose(kept.weighted_sums(torch.eye(5).double()), forms[2][[0, 1, 3, 4, 5]], atol=1e-12)


def test_reduced_shares_keep_singular_values_and_inner_products(forms):
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    full = forms[1].weighted_sums(w)
    sparse = torch.zeros(6, 5, 12, dtype=torch.float64)
    sparse[:, 1:4, :11] = forms[2]  # rows and columns that no sample reaches
    for each in (forms[0], StackedShares(sparse, forms[0].rows, torch.float32)):
        reduced = each.reduced()
        assert reduced.shape == ((3, 9) if each is forms[0] else (3, 11))
        mine = reduced.weighted_sums(w)
        assert torch.allclose(torch.linalg.svdvals(mine), torch.linalg.svdvals(full), atol=1e-12)
        assert torch.allclose(mine.flatten(1) @ mine.flatten(1).T, full.flatten(1) @ full.flatten(1).T, atol=1e-11)


def test_a_unit_that_is_off_for_every_sample_is_left_out(forms):
    adjoint = torch.cat([forms[0].adjoint, torch.zeros(9, 2).double()], 1)[:, [0, 3, 1, 2, 4]]
    reduced = FactoredShares(forms[0].activation, adjoint, forms[0].sample, 6, torch.float32).reduced()
    assert reduced.shape == (3, 9)
    spectra = torch.linalg.svdvals(forms[2])
    assert torch.allclose(torch.linalg.svdvals(reduced.stacked().matrices), spectra, atol=1e-12)
    nothing = FactoredShares(forms[0].activation, torch.zeros_like(adjoint), forms[0].sample, 6, torch.float32)
    assert nothing.reduced().shape == (1, 9)


def test_reduced_shares_that_are_not_finite_stay_as_they_are(forms):
    activation = forms[0].activation.clone()
    activation[2, 3] = torch.nan
    broken = FactoredShares(activation, forms[0].adjoint, forms[0].sample, 6, torch.float32)
    assert broken.reduced().shape == (3, 11)


def test_what_cannot_be_traced_is_refused():
    model, x = nn.Linear(5, 2), torch.randn(10, 5)
    with pytest.raises(WatchError, match="samples=9 does not fit the batch"):
        sample_shares(model, lambda model: model(x).sum(), 9)
    with pytest.raises(WatchError, match="valid= has the shape"):
        sample_shares(model, lambda model: model(x).sum(), 10, valid=np.ones(10))
    with pytest.raises(WatchError, match="no watched layer has as many rows"):
        sample_shares(model, lambda model: model(x).sum(), 10, valid=np.ones((10, 3)))
    twin = copy.deepcopy(model)
    with pytest.raises(WatchError, match="no call of the model"):
        sample_shares(model, lambda model: twin(x).sum(), 10)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv1d(4, 3, 2)], ids=["product", "convolution"])
def test_a_part_of_a_gradient_that_comes_from_no_sample_is_said_once(layer):
    x = torch.randn(10, 4) if isinstance(layer, nn.Linear) else torch.randn(10, 4, 6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for weight in (0.1, 1.0, 2.0):
            shares = sample_shares(layer, lambda m, w=weight: m(x).square().mean() + w * m.weight.square().sum(), 10)
    ((sentence, file),) = [(str(each.message), each.filename) for each in said]
    assert sentence.startswith("a part of the gradient of 'weight' comes from no sample's row")
    assert file == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = sample_shares(layer, lambda model: model(x).square().mean(), 10)
    torch.testing.assert_close(shares["weight"].total(), plain["weight"].total())


def gone_backward(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return loss


LOSSES = {
    "a number": (lambda model, x: float(model(x).sum()), "returned float: return the loss"),
    "a loss of each sample": (
        lambda model, x: model(x).square().mean(1),
        r"returned a tensor of shape \(10,\): return the loss",
    ),
    "detached": (lambda model, x: model(x).sum().detach(), "without a gradient: return the loss"),
    "of a part of the batch": (
        lambda model, x: model(x[:9]).sum(),
        "samples=10 does not fit the batch",
    ),
    "gone backward": (gone_backward, r"has called backward\(\) by itself"),
    "of another model": (lambda model, x: x.sum(), "no call of the model was seen"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_that_do_not_fit_are_refused(loss):
    of, said = LOSSES[loss]
    x = torch.randn(10, 4)
    with pytest.raises(WatchError, match=said):
        sample_shares(nn.Linear(4, 3), lambda model: of(model, x), 10)


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = nn.Linear(4, 3)
    with pytest.raises(WatchError, match=r"'weight' was made under torch.inference_mode\(\)"):
        sample_shares(model, lambda model: model(torch.randn(9, 4)).sum(), 9)


def test_a_model_of_which_nothing_learns_is_refused():
    with pytest.raises(WatchError, match="no watched parameter of the model learns"):
        sample_shares(nn.Linear(4, 3).requires_grad_(False), lambda model: model(torch.randn(9, 4)).sum(), 9)


def test_a_large_table_takes_room_for_the_rows_that_are_looked_up():
    table = nn.Embedding(10**6, 3, padding_idx=0)  # 2 GB, were there a matrix for each of the samples
    ids = torch.randint(1, 10**6, (100, 4))
    ids[:, 3], ids[7] = ids[0, 0], 0
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(12, 2))
    shares = sample_shares(model, lambda model: model(ids).tanh().square().mean(), 100)["0.weight"]
    assert isinstance(shares, LookedUpShares)
    assert (shares.shape, shares.samples, shares.rows[7]) == ((10**6, 3), 100, 0)
    assert shares.reduced().matrices.numel() < 100 * 400 * 3
    unit = np.arange(100) % 50 - 1  # two sessions of each, and two samples of nobody
    member = (np.arange(49) < 20)[None]
    (gradient,) = torch.autograd.grad(
        model.double()(ids).tanh().square().flatten(1).sum(1)[torch.from_numpy(np.isin(unit, np.arange(20)))].sum()
        / 200,
        table.weight,
    )
    units = shares.of_units(unit)
    for each in (units, units.reduced()):
        ((_, sums),) = each.group_sums(member)
        expected = torch.linalg.svdvals(gradient)
        torch.testing.assert_close(torch.linalg.svdvals(sums[0]), expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(sums[0].norm(), gradient.norm(), rtol=1e-5, atol=0)
    ((_, sums),) = units.group_sums(member)
    torch.testing.assert_close(sums[0], gradient, rtol=1e-4, atol=1e-9)
