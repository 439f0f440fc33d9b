"""The ways in which shares are formed: products spared, sums in pieces; each against float64."""

import contextlib
import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autospec
from autospec.introspection import convolutions, factors
from autospec.introspection.audit import Audit
from autospec.introspection.convolutions import Convolution
from autospec.introspection.factors import Product
from autospec.introspection.pending import Pending
from autospec.introspection.shares import Shares
from autospec.introspection.sorting import Sorting
from autospec.introspection.spectra import gram_by_rows, singular_values
from autospec.introspection.stacks import together
from autospec.introspection.workspace import Workspace

from .oracle import members

CELLS = [b"a", b"b"]


def sorting(*counts):
    return Sorting(None, list(counts), CELLS[: len(counts)], np.zeros(sum(counts), dtype=np.int64))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient_noted(scale=1.0, outside=None):
    """Shares of two cells of 40 and 30 rows in a 200 x 90 matrix, with the gradient that is said to have arrived."""
    activation, adjoint = draw(70, 90), draw(70, 200, seed=1)
    shares = Shares((200, 90), Workspace())
    shares.add(Product(activation, adjoint), sorting(40, 30))
    exact = adjoint.double().T @ activation.double()
    arrived = scale * (adjoint.T @ activation)
    shares.note_gradient(arrived if outside is None else arrived + outside)
    return shares, exact


def spectra(shares, groups):
    found = {}
    for places, grams in shares.grams(groups):
        for place, values in zip(places, singular_values([grams])[0], strict=True):
            found[place] = values
    return [found[i] for i in range(len(groups))]


@pytest.mark.parametrize("wrong", ["nothing", "scaled", "penalty", "one entry"])
def test_the_gradient_that_arrived_stands_for_the_batch_only_if_it_is_the_sum_of_the_shares(wrong, monkeypatch):
    outside = {"penalty": 1e-4 * draw(200, 90, seed=2), "one entry": torch.zeros(200, 90)}.get(wrong)
    if wrong == "one entry":
        outside[17, 5] = 0.05
    formed = []
    monkeypatch.setattr(
        Shares, "matrices", lambda self, groups, of=Shares.matrices: formed.append(groups) or of(self, groups)
    )
    shares, exact = gradient_noted(1.0001 if wrong == "scaled" else 1.0, outside)
    values = spectra(shares, [CELLS, [CELLS[0]], [CELLS[1]]])
    assert bool(formed) == (wrong != "nothing")
    right = torch.linalg.svdvals(exact)
    assert float((values[0][:70] - right[:70]).abs().max() / right[0]) < 2e-7


def test_a_batch_whose_shares_nearly_cancel_is_formed_and_not_taken_from_the_gradient():
    activation, adjoint = draw(40, 90), draw(40, 200, seed=1)
    both = torch.cat([activation, activation])
    opposed = torch.cat([adjoint, -adjoint + 1e-4 * draw(40, 200, seed=2)])
    shares = Shares((200, 90), Workspace())
    shares.add(Product(both, opposed), sorting(40, 40))
    shares.note_gradient(opposed.T @ both)
    right = torch.linalg.svdvals(opposed.double().T @ both.double())
    values = spectra(shares, [CELLS, [CELLS[0]], [CELLS[1]]])[0]
    assert float((values - right).abs().max() / right[0]) < 1e-6


def test_a_second_use_makes_the_first_gradient_stale():
    shares, exact = gradient_noted()
    activation, adjoint = draw(20, 90, seed=5), draw(20, 200, seed=6)
    shares.add(Product(activation, adjoint), sorting(12, 8))
    right = torch.linalg.svdvals(exact + adjoint.double().T @ activation.double())
    values = spectra(shares, [CELLS, [CELLS[0]], [CELLS[1]]])[0]
    assert float((values - right).abs().max() / right[0]) < 2e-7


def test_a_penalty_that_begins_after_the_audited_step_is_in_no_spectrum():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 100), nn.Tanh(), nn.Linear(100, 150))
    x, labels = draw(60, 150), ["a", "b", "c"] * 20
    twin = copy.deepcopy(model)
    with autospec.watch(model, labels, statistics=("gradient",), quiet=True) as watcher:
        for step in range(3):
            model.zero_grad()
            loss = F.mse_loss(model(x), x)
            (loss + 1e-3 * model[0].weight.square().sum() if step else loss).backward()
            watcher.step()
    twin = twin.double()
    F.mse_loss(twin(x.double()), x.double()).backward()
    right = torch.linalg.svdvals(twin[0].weight.grad)
    recorded = watcher.trajectories["layers/0.weight/gradient"].sel(group="all").values
    for step in range(3):
        assert np.abs(recorded[step, :60] - right[:60].numpy()).max() / float(right[0]) < 1e-6


@pytest.mark.parametrize("inputs", [784, 130])
def test_a_share_of_unchanging_input_without_the_product(inputs):
    activation, adjoint = draw(128, inputs), draw(128, 32, seed=1)
    gram = gram_by_rows(adjoint, activation, Workspace())
    right = torch.linalg.svdvals(adjoint.double().T @ activation.double())
    values = singular_values([gram])[0]
    assert float((values - right).abs().max() / right[0]) < 1e-12


@pytest.mark.parametrize("crossed", [(), (("diagnosis", "sex"),)])
def test_an_unchanging_wide_input_gives_the_shares_of_every_grouping(crossed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 8), nn.Tanh(), nn.Linear(8, 2))
    x = draw(50, 300)
    labels = {"diagnosis": ["SZ", "HC"] * 25, "sex": ["F", "F", "M", "M", "M"] * 10}
    exact = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    states = []
    with autospec.watch(model, labels, statistics=("gradient",), crossed=crossed, quiet=True) as watcher:
        for _ in range(3):
            states.append(copy.deepcopy(model.state_dict()))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            watcher.step()
            optimizer.step()
    tree = watcher.trajectories
    for step, state in enumerate(states):
        exact.load_state_dict(state)
        hidden = exact[0](x.double())
        hidden.retain_grad()
        exact[2](torch.tanh(hidden)).square().mean().backward()
        columns = {name: np.array(values) for name, values in labels.items()}
        for group in tree.group.values:
            rows = np.ones(50, dtype=bool)
            for part in [] if group == "all" else group.split(" & "):
                name, label = part.split("=")
                rows &= columns[name] == label
            share = hidden.grad[rows].T @ x.double()[rows]
            right = torch.linalg.svdvals(share).numpy()
            found = tree["layers/0.weight/gradient"].sel(group=group).values[step]
            assert np.abs(found - right).max() / right[0] < 1e-6, (step, group)


FORMS = {
    "plain": {},
    "padding": {"padding": 2},
    "stride": {"stride": 3, "padding": 1},
    "dilation": {"dilation": 2, "padding": 4},
    "longer than the kernel needs": {"stride": 4},
    "circular": {"padding": 2, "padding_mode": "circular"},
}
TRANSPOSED = {
    "plain": {},
    "padding": {"padding": 2},
    "stride": {"stride": 3, "padding": 1},
    "output padding": {"stride": 3, "padding": 1, "output_padding": 2},
    "dilation": {"dilation": 2, "padding": 3},
}


UNEVEN = {
    "uneven": {"stride": (3, 1), "padding": (0, 2), "dilation": (1, 2)},
    "uneven, circular": {"stride": (1, 2), "padding": (2, 1), "padding_mode": "circular"},
}
UNEVEN_TRANSPOSED = {"uneven": {"stride": (3, 1), "padding": (0, 2), "output_padding": (2, 0), "dilation": (1, 2)}}


@pytest.mark.parametrize("piece", [convolutions.PATCHES, 400])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.Conv1d, form) for form in FORMS.values()]
    + [(nn.ConvTranspose1d, form) for form in TRANSPOSED.values()]
    + [(nn.Conv2d, form) for form in (FORMS | UNEVEN).values()]
    + [(nn.ConvTranspose2d, form) for form in (TRANSPOSED | UNEVEN_TRANSPOSED).values()],
    ids=[
        *FORMS,
        *(f"transposed, {form}" for form in TRANSPOSED),
        *(f"2-D, {form}" for form in FORMS | UNEVEN),
        *(f"2-D, transposed, {form}" for form in TRANSPOSED | UNEVEN_TRANSPOSED),
    ],
)
def test_a_convolution_in_pieces_has_the_gradient_that_autograd_has(kind, options, piece, monkeypatch):
    monkeypatch.setattr(convolutions, "PATCHES", piece)
    torch.manual_seed(0)
    flat = kind in (nn.Conv1d, nn.ConvTranspose1d)
    layer = kind(4, 6, 5 if flat else (5, 3), **options).double()
    found = []
    original = Convolution.add_pieces
    monkeypatch.setattr(
        Convolution, "add_pieces", lambda self, *rest, **options: found.append(self) or original(self, *rest, **options)
    )
    x = draw(9, 4, 23).double() if flat else draw(9, 4, 13, 11).double()
    with autospec.watch(layer, ["a", "b", "b"] * 3, statistics=("gradient",), quiet=True) as watcher:
        output = layer(x)
        (output * draw(*output.shape, seed=3)).sum().backward()
        gradient = layer.weight.grad.clone()
        watcher.step()
    assert found, "this form is not formed in pieces"
    right = torch.linalg.svdvals(gradient.reshape(gradient.shape[0], -1))
    recorded = watcher.trajectories["layers/weight/gradient"].sel(group="all").values[0]
    assert np.abs(recorded - right.numpy()).max() / float(right[0]) < 1e-6  # recorded as float32


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_sum_over_many_images_keeps_its_digits(kind, layout):
    """Terms that agree, 50,000 of them: what torch sums in float32 is off by up to 1e-5, according to the processor."""
    torch.manual_seed(0)
    layer, x = kind(3, 4, 3, padding=1), torch.rand(256, 3, 14, 14).to(memory_format=layout)
    with autospec.watch(layer, ["a"] * 100 + ["b"] * 156, statistics=("gradient",), quiet=True) as watcher:
        (layer(x) * torch.rand(256, 4, 14, 14)).mean().backward()
        watcher.step()
    torch.manual_seed(0)
    exact = kind(3, 4, 3, padding=1)
    torch.rand(256, 3, 14, 14)
    factor = torch.rand(256, 4, 14, 14).double()
    exact = exact.double()
    for group, inside in (("all", slice(None)), ("a", slice(0, 100)), ("b", slice(100, None))):
        exact.zero_grad()
        (exact(x[inside].double()) * factor[inside]).sum().div(factor.numel()).backward()
        right = torch.linalg.svdvals(exact.weight.grad.flatten(1)).numpy()
        recorded = watcher.trajectories["layers/weight/gradient"].sel(group=group).values[0]
        assert np.abs(recorded[: len(right)] - right).max() / right[0] < 2e-7


@pytest.mark.parametrize("uses", [1, 2])
def test_a_product_of_many_rows_is_summed_in_pieces(uses, monkeypatch):
    """Rows of two kinds that oppose each other a hundred times as much as their sum is large, more than a piece of each."""
    monkeypatch.setattr("autospec.introspection.shares.TERMS", 64)
    monkeypatch.setattr("autospec.introspection.factors.TERMS", 64)
    activation = draw(1200, 12) + 2
    adjoint = (draw(1200, 9, seed=1) + 1) * torch.tensor([1.0, -1.0]).repeat(600)[:, None]
    shares = Shares((9, 12), Workspace())
    exact = torch.zeros(2, 9, 12, dtype=torch.float64)
    for use in range(uses):
        factor = adjoint * (1 + use)
        shares.add(Product(activation, factor), sorting(700, 500))
        for cell, part in enumerate((slice(0, 700), slice(700, 1200))):
            exact[cell] += factor[part].double().T @ activation[part].double()
    assert shares.room.dtype == torch.float64
    for cell, key in enumerate(CELLS[:2]):
        error = float((shares.matrix([key]) - exact[cell]).norm())
        assert error < 3e-8 * float(activation.norm() * adjoint.norm())
        assert error < float(shares.squares[key]) ** 0.5
    values = spectra(shares, [CELLS, [CELLS[0]], [CELLS[1]]])
    for found, share in zip(values, (exact.sum(0), *exact), strict=True):
        right = torch.linalg.svdvals(share)
        assert float((found - right).abs().max() / right[0]) < 2e-7


def test_sums_in_pieces_keep_to_the_bar_where_groups_cancel():
    """The shares of two classes oppose each other a hundred times as much as their sum is large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(5, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 8, 5, padding=2))
    exact = copy.deepcopy(model).double()
    half = draw(30, 5, 120)
    x = torch.cat([half, half + 1e-3 * draw(30, 5, 120, seed=1)])
    sign = torch.cat([torch.ones(30), -torch.ones(30)])[:, None, None]
    with autospec.watch(model, ["a"] * 30 + ["b"] * 30, statistics=("gradient",), quiet=True) as watcher:
        (model(x) * sign).mean().backward()
        adjoint = sign.expand(60, 8, 120).double() / (60 * 8 * 120)
        watcher.step()
    hidden = torch.relu(model[0](x)).double()
    weight = exact[2].weight.detach().requires_grad_()
    F.conv1d(hidden, weight, padding=2).backward(adjoint)
    right = torch.linalg.svdvals(weight.grad.reshape(8, -1)).numpy()
    recorded = watcher.trajectories["layers/2.weight/gradient"]
    assert recorded.sel(group="a").values[0, 0] > 50 * right[0]
    # The first value alone: the sum has rank one, and what lies below is the rounding of the adjoints themselves.
    assert abs(recorded.sel(group="all").values[0, 0] - right[0]) / right[0] < 1e-6


@pytest.mark.parametrize("data", [True, False], ids=["data", "hidden"])
@pytest.mark.parametrize("within", [True, False], ids=["within groups", "between groups"])
@pytest.mark.parametrize("largest", [1e-2, 1e-6])
@pytest.mark.parametrize(
    "labels",
    [None, ["a", "b"] * 100, ["a"] * 100 + ["b"] * 99 + [None], {"x": ["a", "b"] * 100, "y": ["c"] * 50 + ["d"] * 150}],
    ids=["no groups", "groups", "a label is missing", "two groupings"],
)
def test_near_a_stationary_point_every_share_keeps_to_the_bar(labels, largest, within, data):
    """Rows oppose each other, the samples of a group too: products of float32 matrices lose what is left of them."""
    torch.manual_seed(0)
    half, weights = draw(100, 300), draw(100, 40, seed=1)
    x = torch.cat([half, half + largest * draw(100, 300, seed=2)])
    sign = torch.cat([torch.ones(100), -torch.ones(100)])[:, None] * torch.cat([weights, weights])
    # Opposed rows are neighbours, of one group or of two, or lie far apart.
    order = torch.arange(200).reshape(2, 100).T.flatten() if not within else torch.arange(200)
    x, sign = x[order], sign[order]
    model = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 40, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(300))
    watched = model[1:] if data else model
    options = {"statistics": ["gradient"], "layers": ["1.weight"], "audit": 1, "quiet": True}
    with warnings.catch_warnings(), autospec.watch(watched, labels, **options) as watcher:
        warnings.simplefilter("error")
        (watched(x) * sign).sum().backward()
        watcher.step()
    tree = watcher.trajectories
    for group, member in members(labels, 200).items():
        rows = torch.from_numpy(member)
        right = torch.linalg.svdvals(sign[rows].double().T @ x[rows].double()).numpy()
        recorded = tree["layers/1.weight/gradient"].sel(group=group).values[0]
        assert np.abs(recorded - right).max() / right[0] < 1e-6, group
    assert tree.attrs["audit"]["outside"] == {}
    assert tree.attrs["audit"]["largest_error"] < 1e-6


def test_the_rounding_of_pieces_is_estimated_on_the_safe_side():
    """Both kinds of sums, of terms of either sign and of terms that agree, against float64."""
    for seed, mean in ((0, 0.0), (1, 1.0)):
        part = Convolution(
            draw(40, 12, 150, seed=seed) + mean,
            draw(40, 16, 146, seed=seed + 10) + mean,
            (16, 12, 5), (1,), (0,), (1,), 1, False, (0,),
        )  # fmt: skip
        total = torch.zeros(16, 60, dtype=torch.float64)
        (square,) = part.add_pieces([40], [total], Workspace())
        right = part.with_(part.activation.double(), part.adjoint.double()).share()
        error = float((total - right).norm())
        assert error < float(square) ** 0.5 < 30 * error


@pytest.mark.parametrize("opposition", [0.4, 0.15, 0.01])
def test_shares_are_formed_again_only_where_rounding_would_show(opposition, monkeypatch):
    """Two groups that oppose each other: their sum is small, but as a rule resolved in single precision."""
    repaired = []
    original = Shares._wide_share
    monkeypatch.setattr(Shares, "_wide_share", lambda self, cells: repaired.append(cells) or original(self, cells))
    half, other = draw(300, 40).abs(), draw(300, 60, seed=1).abs()
    activation, adjoint = torch.cat([half, half]), torch.cat([other, other * (opposition - 1)])
    shares = Shares((60, 40), Workspace())
    shares.add(Product(activation, adjoint), sorting(300, 300))
    right = torch.linalg.svdvals(adjoint.double().T @ activation.double())
    values = spectra(shares, [CELLS, [CELLS[0]], [CELLS[1]]])[0]
    assert float((values - right).abs().max() / right[0]) < 1e-6
    assert bool(repaired) == (opposition == 0.01)


def test_the_rounding_of_products_is_estimated_on_the_safe_side():
    """Of one product a cell, as of pieces, against float64."""
    for seed, mean in ((0, 0.0), (1, 1.0)):
        activation, adjoint = draw(900, 40, seed=seed) + mean, draw(900, 60, seed=seed + 10) + mean
        shares = Shares((60, 40), Workspace())
        shares.add(Product(activation, adjoint), sorting(500, 400))
        assert shares.room.dtype == torch.float32
        norms = [float(shares.matrix([key]).norm()) for key in CELLS]
        estimated = shares.rounding_of_products(CELLS, sum(norm**2 for norm in norms)) ** 0.5
        error = float((shares.matrices([CELLS])[0] - adjoint.double().T @ activation.double()).norm())
        assert error < estimated < 30 * error


class Tokens(nn.Module):
    """Layers that see every token: data, one that is used twice, an attention with a packed weight, a plain and a narrow one."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(6, 20), nn.Linear(20, 20)
        self.attention = nn.MultiheadAttention(20, 2, batch_first=True)
        self.wide, self.last = nn.Linear(20, 17), nn.Linear(17, 9)

    def forward(self, x):
        x = self.again(torch.tanh(self.first(x.flip(0))))  # the last sample first
        x = self.again(torch.tanh(x))
        return self.last(self.wide(x + self.attention(x, x, x, need_weights=False)[0]))


@pytest.mark.parametrize("positions", [33, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_by_sample_have_the_spectra_that_sorted_rows_have(positions, dtype, monkeypatch):
    """The first recorded step is audited and sorts rows by cell; the second, of the same batch, leaves them where they are."""
    torch.manual_seed(0)
    model, x = Tokens().to(dtype), draw(20, positions, 6).to(dtype)
    labels = {"group": ["a", "b", "b", "c", None] * 4, "sex": ["f"] * 9 + ["m"] * 11}
    used = []
    monkeypatch.setattr(
        Product, "add_by_sample", lambda self, *rest, of=Product.add_by_sample: used.append(1) or of(self, *rest)
    )
    weight = draw(*model(x).shape, seed=1).to(dtype)
    with autospec.watch(model, labels, statistics=("gradient",), quiet=True) as watcher:
        for step in range(2):
            model.zero_grad()
            (model(x) * weight).sum().backward()
            watcher.step()
            assert bool(used) == bool(step)
    for name in ("again.weight", "attention.in_proj_weight", "attention.out_proj.weight", "wide.weight", "last.weight"):
        recorded = watcher.trajectories[f"layers/{name}/gradient"]
        assert (np.abs(recorded[0] - recorded[1]) <= 1e-6 * recorded[0].max("index")).all(), name
    assert watcher.trajectories.attrs["audit"]["outside"] == {}


def test_a_group_that_diverged_spares_the_others_where_products_are_formed_by_sample():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 7)), draw(8, 40, 5)
    with autospec.watch(model, ["a", "b"] * 4, statistics=("gradient",), quiet=True) as watcher:
        for step in range(2):
            x[2, 3] = torch.nan if step else 1.0
            model.zero_grad()
            with pytest.warns(UserWarning, match="not finite") if step else contextlib.nullcontext():
                model(x).square().mean().backward()
                watcher.step()
                _ = watcher.trajectories
    recorded = watcher.trajectories["layers/2.weight/gradient"][1]
    assert recorded.sel(group=["all", "a"]).isnull().all()
    assert recorded.sel(group="b").notnull().all()


@pytest.mark.parametrize("opposition", [0.3, 1e-4])
def test_products_by_sample_are_formed_again_where_groups_cancel(opposition, monkeypatch):
    repaired = []
    original = factors.add_wide_product
    monkeypatch.setattr(
        "autospec.introspection.shares.add_wide_product", lambda *rest: repaired.append(1) or original(*rest)
    )
    grid = factors.Grid(50, torch.tensor([0, 1, 0, 1, 2, 2]))
    members = [[True, True, False], [True, True, True], [True, False, True]]  # all, a or b, b or c
    keys = [np.array(member).tobytes() for member in members]
    layout = Sorting(None, [100, 100, 100], keys, np.arange(300) % 50, grid=grid)
    activation, adjoint = draw(6, 50, 30).abs(), draw(6, 50, 40, seed=1).abs()
    activation[[1, 3]], adjoint[[1, 3]] = activation[[0, 2]], adjoint[[0, 2]] * (opposition - 1)
    shares = Shares((40, 30), Workspace())
    product = Product(activation.flatten(0, 1), adjoint.flatten(0, 1))
    exact = {
        samples: torch.linalg.svdvals(
            adjoint[list(samples)].flatten(0, 1).double().T @ activation[list(samples)].flatten(0, 1).double()
        )
        for samples in ((0, 1, 2, 3), (0, 2), (4, 5))
    }
    shares.add(product, layout)
    activation.zero_()  # the user's memory is not needed any more
    adjoint.zero_()
    values = spectra(shares, [keys[:2], keys[:1], keys[2:]])
    assert bool(repaired) == (opposition == 1e-4)
    for found, right in zip(values, exact.values(), strict=True):
        assert float((found - right).abs().max() / right[0]) < 1e-6


@pytest.mark.parametrize("same", [False, True], ids=["samples that differ", "samples that are the same"])
def test_the_rounding_of_products_by_sample_is_estimated_on_the_safe_side(same):
    for seed, mean in ((0, 0.0), (1, 1.0)):
        activation, adjoint = draw(12, 90, 30, seed=seed) + mean, draw(12, 90, 40, seed=seed + 10) + mean
        if same:
            activation, adjoint = activation[:1].expand(12, 90, 30), adjoint[:1].expand(12, 90, 40)
        activation, adjoint = activation.flatten(0, 1), adjoint.flatten(0, 1)
        total = torch.zeros(1, 40, 30, dtype=torch.float64)
        grid = factors.Grid(90, torch.zeros(12, dtype=torch.int64))
        (square,) = Product(activation, adjoint).add_by_sample(grid, total, Workspace())
        error = float((total[0] - adjoint.double().T @ activation.double()).norm())
        assert error < square**0.5 < 30 * error


def test_a_weight_that_is_looked_up_and_multiplied_is_formed_again_in_float64():
    torch.manual_seed(0)
    table = nn.Embedding(300, 24)
    words = torch.randint(300, (16, 40))
    words[8:] = words[:8]
    model = nn.Sequential(table, nn.Linear(24, 300, bias=False))
    model[1].weight = table.weight
    labels, sign = ["a"] * 8 + ["b"] * 8, torch.cat([torch.ones(8), torch.full((8,), -0.9)])[:, None, None]
    with autospec.watch(model, labels, statistics=("gradient",), quiet=True) as watcher:
        for _ in range(2):
            model.zero_grad()
            (model(words).square() * sign).sum().backward()
            watcher.step()
    weight = table.weight.detach().double().requires_grad_()
    (F.linear(F.embedding(words, weight), weight).square() * sign).sum().backward()
    right = torch.linalg.svdvals(weight.grad).numpy()
    recorded = watcher.trajectories["layers/0.weight/gradient"]
    assert np.abs(recorded.sel(group="all").values - right).max() / right[0] < 1e-5
    assert recorded.sel(group="a").values[0, 0] > 5 * right[0]


def test_uses_of_one_weight_that_oppose_each_other_stay_exact_after_the_audited_step():
    """Sorted rows of data and hidden tokens of the same weight: neither is left to the rounding of the other."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 48)
    half = draw(10, 40, 48)
    x = torch.cat([half, half])
    sign = torch.cat([torch.ones(10), torch.full((10,), -0.999)])[:, None, None]
    weight = draw(20, 40, 48, seed=1)[:10].repeat(2, 1, 1)
    with autospec.watch(layer, ["a"] * 10 + ["b"] * 10, statistics=("gradient",), quiet=True) as watcher:
        for _ in range(2):
            layer.zero_grad()
            (layer(x) * weight * sign).sum().backward()
            watcher.step()
    adjoint = (weight * sign).double().flatten(0, 1)
    right = torch.linalg.svdvals(adjoint.T @ x.double().flatten(0, 1)).numpy()
    recorded = watcher.trajectories["layers/weight/gradient"].sel(group="all").values
    assert np.abs(recorded - right).max() / right[0] < 1e-6


@pytest.mark.parametrize(("positions", "terms"), [(140, 70), (100, 100), (33, 33), (149, 149), (1000, 100)])
def test_samples_of_many_positions_are_cut_into_equal_parts(positions, terms):
    assert factors.Grid(positions, torch.zeros(2, dtype=torch.int64)).terms == terms


def test_repair_is_told_by_the_rounding_of_pieces(monkeypatch):
    """A sum that the pieces' rounding would spoil is formed again."""
    monkeypatch.setattr("autospec.introspection.shares.ROUNDED", 1e-30)
    repaired = []
    original = Shares._wide_share
    monkeypatch.setattr(Shares, "_wide_share", lambda self, cells: repaired.append(cells) or original(self, cells))
    torch.manual_seed(0)
    layer = nn.Conv1d(3, 4, 3)
    with autospec.watch(layer, ["a", "b"] * 4, statistics=("gradient",), quiet=True) as watcher:
        layer(draw(8, 3, 20)).square().mean().backward()
        watcher.step()
    assert repaired


@pytest.mark.parametrize("rows", [1000, 9000])
@pytest.mark.parametrize("shape", [(2, 40), (40, 9), (3, 3)])
def test_many_terms_that_agree_keep_to_the_bar_in_narrow_products(shape, rows):
    """A head of two classes, say: some processors' products are not exact there."""
    activation, adjoint = draw(2 * rows, shape[1]).abs() + 1, draw(2 * rows, shape[0], seed=1).abs() + 1
    shares = Shares(shape, Workspace())
    shares.add(Product(activation, adjoint), sorting(rows, rows))
    values = spectra(shares, [CELLS, [CELLS[0]], [CELLS[1]]])
    for found, part in zip(values, (slice(None), slice(0, rows), slice(rows, None)), strict=True):
        right = torch.linalg.svdvals(adjoint[part].double().T @ activation[part].double())
        assert float((found - right).abs().max() / right[0]) < 1e-8


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_many_terms_that_agree_keep_to_the_bar_in_narrow_convolutions(kind):
    """The last layer of an autoencoder of images, which has one channel."""
    torch.manual_seed(0)
    layer, x = kind(8, 1, 3, padding=1), torch.rand(200, 8, 20, 20) + 1
    factor = torch.rand(200, 1, 20, 20) + 1
    with autospec.watch(layer, ["a", "b"] * 100, statistics=("gradient",), quiet=True) as watcher:
        (layer(x) * factor).sum().backward()
        watcher.step()
    layer = layer.double()
    for group, inside in (("all", slice(None)), ("a", slice(0, None, 2)), ("b", slice(1, None, 2))):
        layer.zero_grad()
        (layer(x[inside].double()) * factor[inside]).sum().backward()
        right = torch.linalg.svdvals(layer.weight.grad.flatten(1)).numpy()
        recorded = watcher.trajectories["layers/weight/gradient"].sel(group=group).values[0]
        assert np.abs(recorded[: len(right)] - right).max() / right[0] < 1e-7


@pytest.mark.parametrize("outside", [0.0, 1e-3])
def test_the_guard_does_not_blame_the_model_for_the_rounding_of_torchs_own_kernel(outside):
    """Some processors' convolutions are off by 1e-4 in long sums: what the same kernel makes of the rows decides."""
    exact = draw(4, 9).double()
    shares = Pending((4, 9), Workspace())
    shares.shares.put(CELLS[0], exact, 100)
    shares.rows[CELLS[0]] = 100
    shares.by_kernel = (exact * (1 + 1e-3 * draw(4, 9, seed=1).double())).float()
    shares.arrived = shares.by_kernel.double() + outside
    audit = Audit(None)
    if outside:
        with pytest.warns(UserWarning, match="of the gradient of 'weight' comes from no sample's row"):
            audit.guard("weight", shares)
    else:
        audit.guard("weight", shares)
    found = audit.summary()["outside"]
    assert list(found) == ["weight"] * bool(outside)
    if outside:
        assert found["weight"] == pytest.approx(6 * outside / float(exact.norm()), rel=0.01)


def test_rows_that_lie_one_after_the_other_are_not_copied():
    whole = draw(9, 4)
    first, second, third = whole.split([2, 3, 4])
    for parts, copied in (
        ([first, second, third], False),
        ([second, third], False),
        ([third], False),
        ([second, first], True),
        ([first, third], True),
        ([first, second.clone()], True),
        ([first.mT.contiguous().mT, second], True),
        ([first[:, :2], second[:, :2]], True),
    ):
        found = together(parts)
        assert torch.equal(found, torch.cat(parts))
        assert (found.data_ptr() == parts[0].data_ptr()) is not copied
