"""What compares groups and factors: contrast, cosine, principal angles, alignment."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import autospec
from autospec.introspection import STATISTICS

from .families import FAMILIES, LABELS, Calls, N, T, normal, problem
from .oracle import captures, error, members, record, share_by_copies, svdvals

CROSSED = {"diagnosis": ["SZ", "HC", "SZ", "BP"] * 3, "sex": ["F", "F", "M"] * 4}
COMPARED = ["Linear", "Linear, tied", "1-D network", "Embedding, tied to the output", "LSTM, bidirectional", "Encoder"]


def input_directions(share, count):
    """Leading directions of inputs, which a share (outputs, inputs) has."""
    return torch.linalg.svd(share, full_matrices=False)[2][:count].mT.numpy()


@pytest.mark.parametrize("case", COMPARED)
def test_contrast_cosine_and_angles_are_those_of_the_shares(case):
    made = FAMILIES[case]()
    made.model.double()
    tree = record(made, statistics=["gradient", "contrast", "cosine", "angles"], angles=3)
    table = members(LABELS, N)
    shares = {group: share_by_copies(made, member) for group, member in table.items()}
    pairs = list(itertools.combinations("abc", 2))
    assert list(tree["contrasts"].children) == [f"{a} - {b}" for a, b in pairs]
    for a, b in pairs:
        assert set(tree[f"contrasts/{a} - {b}"].children) == set(tree["layers"].children)
        for layer in tree["layers"].children:
            node, first, second = tree[f"contrasts/{a} - {b}/{layer}"], shares[a][layer], shares[b][layer]
            expected = svdvals(first / table[a].sum() - second / table[b].sum())
            assert node.gradient.dims == ("step", "index")
            assert error(node.gradient.values[0].astype(float), expected) < 1e-7
            assert node.cosine.dims == ("step",)
            cosine = float((first * second).sum() / (first.norm() * second.norm()))
            assert float(node.cosine[0]) == pytest.approx(cosine, abs=1e-6)
            if isinstance(made.model.get_submodule(layer.rpartition(".")[0]), nn.ConvTranspose1d):
                first, second = first.mT, second.mT  # its weight has the inputs first
            count = min(3, first.shape[0], first.shape[1] - 1)
            angles = node.angles.values[0]
            assert np.isnan(angles[count:]).all()
            bases = [input_directions(share, count) for share in (first, second)]
            np.testing.assert_allclose(angles[:count], scipy.linalg.subspace_angles(*bases)[::-1], atol=1e-5)
            floor = float(node.gradient_noise_floor[0])
            assert 0 < floor < expected[0]


def test_an_angle_stands_at_its_own_number():
    made = FAMILIES["Linear"]()
    every, chosen = (
        record(made, statistics=["angles"], angles=3, singular_values=wanted)["contrasts/a - b/0.weight"].angles[0]
        for wanted in (None, [1, 3])
    )
    assert chosen.index.values.tolist() == [1, 3]
    np.testing.assert_array_equal(chosen, every.sel(index=[1, 3]))
    assert every.sel(index=2) < every.sel(index=3)


def prescribed(a, d, labels, dtype=torch.float32, **options):
    """Record a product with these very rows."""
    a, d = torch.as_tensor(a, dtype=dtype), torch.as_tensor(d, dtype=dtype)
    layer = nn.Linear(a.shape[1], d.shape[1], bias=False, dtype=dtype)
    with autospec.watch(layer, labels, quiet=True, batch_dim=0, **{"statistics": STATISTICS, **options}) as watcher:
        (layer(a) * d).sum().backward()
        watcher.step()
    return watcher.trajectories


def orthonormal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def test_equal_spectra_may_point_in_opposite_directions():
    a, d = normal(4, 6), normal(4, 3, seed=2)
    tree = prescribed(torch.cat([a, a]), torch.cat([d, -d]), list("aaaabbbb"))
    gradient = tree["layers/weight/gradient"]
    assert np.array_equal(gradient.sel(group="a"), gradient.sel(group="b"))
    node = tree["contrasts/a - b/weight"]
    assert float(node.cosine[0]) == pytest.approx(-1, abs=1e-6)
    np.testing.assert_allclose(node.gradient.values[0], gradient.sel(group="a").values[0] / 2, rtol=1e-5)
    np.testing.assert_allclose(node.angles.values[0], 0, atol=1e-5)


def test_groups_of_the_same_share_per_sample_have_no_contrast_whatever_their_sizes():
    a, d = normal(4, 6), normal(4, 3, seed=2)
    tree = prescribed(torch.cat([a, a, a]), torch.cat([d, d, d]), list("aaaabbbbbbbb"))
    node = tree["contrasts/a - b/weight"]
    assert (node.gradient.values[0] < float(node.gradient_noise_floor[0])).all()
    assert float(node.cosine[0]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("angle", [0.0, 1e-8, 1e-4, 0.3, 1.5, np.pi / 2])
def test_an_angle_between_two_directions_is_found_small_or_large(angle):
    direction = [np.cos(angle), np.sin(angle), 0]
    tree = prescribed([[1, 0, 0], direction], [[1.0, 0], [0, 2]], ["a", "b"], torch.float64, angles=1)
    found = tree["contrasts/a - b/weight"].angles.values[0]
    assert found[0] == pytest.approx(angle, rel=1e-3, abs=1e-12)
    assert np.isnan(found[1:]).all()


@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(st.integers(2, 8), st.integers(2, 8)), count=st.integers(1, 9), seed=st.integers(0, 1000))
def test_angles_of_any_shares_are_those_of_scipy(shape, count, seed):
    generator = torch.Generator().manual_seed(seed)
    a, d = (torch.randn(20, size, generator=generator) for size in shape)
    tree = prescribed(a, d, ["a", "b"] * 10, torch.float64, angles=count)
    inputs, outputs = shape
    count = min(count, outputs, max(inputs - 1, 1))  # the whole space would have no angle to itself
    bases = [input_directions(d[i::2].double().T @ a[i::2].double(), count) for i in (0, 1)]
    found = tree["contrasts/a - b/weight"].angles.values[0]
    np.testing.assert_allclose(found[:count], scipy.linalg.subspace_angles(*bases)[::-1], atol=1e-6)
    assert np.isnan(found[count:]).all()


def test_directions_that_a_share_does_not_have_leave_the_angles_open():
    tree = prescribed(normal(6, 5), normal(6, 4, seed=2), list("abbbbb"), angles=2)
    assert np.isnan(tree["contrasts/a - b/weight"].angles).all()  # one sample has one direction
    assert float(tree["contrasts/a - b/weight"].cosine[0]) != 0


def test_directions_that_are_rounding_of_half_precision_leave_the_angles_open():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.half = nn.Sequential(nn.Linear(40, 2), nn.Linear(2, 24), nn.Linear(24, 40)), False

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                return self.layers(x).float()

    torch.manual_seed(0)
    model, x, labels = Narrow(), 10 * normal(200, 40), ["a", "b"] * 100
    angles = {}
    for model.half, count in itertools.product((False, True), (3, 5)):
        with autospec.watch(model, labels, statistics=["angles"], angles=count, quiet=True) as watcher:
            model.zero_grad()
            (model(x) - x).square().mean().backward()
            watcher.step()
        angles[model.half, count] = watcher.trajectories["contrasts/a - b/layers.2.weight"].angles.values[0]
    # The input of the last layer lies in a plane, so that with its mean it has three directions.
    assert np.isnan(angles[False, 5]).all()
    assert np.isnan(angles[True, 5]).all()
    np.testing.assert_allclose(angles[True, 3][:3], angles[False, 3][:3], atol=0.02)


def test_comparisons_stay_within_a_grouping_and_crossed_groups_are_groups_of_their_own():
    made = problem(nn.Linear(6, 5), normal(N, 6))
    made.labels = CROSSED
    tree = record(made, statistics=["contrast", "cosine"], crossed=[("diagnosis", "sex")])
    groups = [str(g) for g in tree.group.values]
    by_grouping = {str(g): str(of) for g, of in zip(groups, tree.grouping.values, strict=True)}
    expected = {f"{a} - {b}" for a, b in itertools.combinations(groups[1:], 2) if by_grouping[a] == by_grouping[b]}
    assert set(tree["contrasts"].children) == expected
    assert "diagnosis=BP - diagnosis=HC" in expected
    assert not any("diagnosis=BP - sex" in pair for pair in expected)
    diagnosis, sex = (np.array(CROSSED[name]) for name in CROSSED)
    for a, b in (("HC", "SZ"), ("BP", "SZ")):
        first, second = ((diagnosis == d) & (sex == "F") for d in (a, b))
        expected_share = [share_by_copies(made, member)["weight"] / member.sum() for member in (first, second)]
        node = tree[f"contrasts/diagnosis={a} & sex=F - diagnosis={b} & sex=F/weight"]
        assert error(node.gradient.values[0], svdvals(expected_share[0] - expected_share[1])) < 2e-5
    # gradient spectra were not asked for
    assert "gradient" not in tree["layers/weight"]


def test_a_group_without_a_sample_in_the_batch_has_no_contrast_at_that_step():
    model, x = nn.Linear(6, 5), normal(N, 6)
    with autospec.watch(model, LABELS, statistics=["cosine", "contrast"], quiet=True) as watcher:
        for rows in ([0, 1, 2, 4], [0, 1, 3, 7]):
            watcher.set_groups([LABELS[i] for i in rows])
            model.zero_grad()
            model(x[rows]).square().sum().backward()
            watcher.step()
    tree = watcher.trajectories
    assert np.isnan(tree["contrasts/a - c/weight"].cosine.values).tolist() == [True, False]
    assert np.isnan(tree["contrasts/b - c/weight"].gradient.values).any(1).tolist() == [True, False]
    assert tree["contrasts/a - b/weight"].cosine.notnull().all()


def test_without_groups_there_is_nothing_to_compare():
    made = problem(nn.Linear(6, 5), normal(N, 6))
    made.labels = None
    tree = record(made, statistics=["gradient", "contrast"])
    assert "contrasts" not in tree.children
    assert tree["layers/weight/gradient"].notnull().all()


# ---------------------------------------------------------------------- alignment


def test_alignment_is_one_where_the_factors_share_their_left_singular_vectors():
    left = orthonormal(12, 4, 1)
    a = left @ torch.diag(torch.tensor([5.0, 3, 2, 1])).double() @ orthonormal(7, 4, 2).T
    d = left @ torch.diag(torch.tensor([4.0, 2, 1, 0.5])).double() @ orthonormal(5, 4, 3).T
    tree = prescribed(a, d, None)
    assert float(tree["layers/weight/alignment"].sel(group="all")[0]) == pytest.approx(1, abs=1e-6)
    # and there, as the paper's Eq. 4 says, values of the gradient are products of the factors' values
    products = tree["layers/weight/activation"].values[0, 0] * tree["layers/weight/adjoint"].values[0, 0]
    np.testing.assert_allclose(tree["layers/weight/gradient"].values[0, 0, :4], products[:4], rtol=1e-5)


def test_alignment_of_the_counterexample_is_a_tenth():
    tree = prescribed(np.diag([10.0, 1.0]), [[0.0], [1.0]], ["a", "b"])
    node = tree["layers/weight"]
    assert node.gradient.sel(group="all").values.tolist() == [[1.0]]
    assert node.activation.sel(group="all").values.tolist() == [[10.0]]
    assert float(node.alignment.sel(group="all")[0]) == pytest.approx(0.1)
    assert np.isnan(float(node.alignment.sel(group="a")[0]))  # its gradient and its adjoint are zero
    assert float(node.alignment.sel(group="b")[0]) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 30), shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 1000))
def test_alignment_is_von_neumanns_ratio_and_lies_between_zero_and_one(rows, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    a, d = (torch.randn(rows, size, generator=generator) for size in shape)
    found = float(prescribed(a, d, None)["layers/weight/alignment"][0, 0])
    count = min(rows, *shape)
    expected = svdvals(d.double().T @ a.double()).sum() / (svdvals(a)[:count] * svdvals(d)[:count]).sum()
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < found <= 1 + 1e-6


def test_alignment_of_random_factors_is_far_from_one():
    tree = prescribed(normal(512, 32), normal(512, 32, seed=2), None)
    assert 0.05 < float(tree["layers/weight/alignment"][0, 0]) < 0.5


@pytest.mark.parametrize("statistics", [["gradient", "activation"], ["activation", "adjoint"], ["gradient"]], ids=str)
def test_alignment_needs_all_three_spectra(statistics):
    assert "alignment" not in record(problem(nn.Linear(6, 5), normal(N, 6)), statistics=statistics)["layers/weight"]


ALIGNED = {
    "Linear": True,
    "Linear, 3-D": True,
    "Linear, twice": True,
    "LSTM, plain": True,
    "Embedding": True,
    "Attention, three inputs": True,
    "Conv1d, plain": False,
    "ConvTranspose1d, plain": False,
    "Embedding, tied to the output": False,
}


@pytest.mark.parametrize("case", ALIGNED)
def test_alignment_is_recorded_where_the_gradient_is_the_product_of_the_recorded_factors(case):
    tree = record(FAMILIES[case]())
    node = next(iter(tree["layers"].children.values()))
    assert ("alignment" in node) == ALIGNED[case]
    if ALIGNED[case]:
        assert (node.alignment > 0).all()
        assert (node.alignment <= 1 + 1e-6).all()


def test_alignment_of_leading_values_is_that_of_all():
    made = problem(nn.Linear(6, 5), normal(N, 6))
    few, all_values = record(made, singular_values=1), record(made, singular_values="all")
    np.testing.assert_allclose(few["layers/weight/alignment"], all_values["layers/weight/alignment"], rtol=1e-6)


# ---------------------------------------------------------------------- positions of linear layers


def test_the_share_of_a_position_is_that_of_its_rows_in_a_linear_layer():
    made = problem(nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)), normal(N, T, 7))
    tree = record(made, per_position=True)
    for layer, (use,) in captures(made).items():
        recorded = tree[f"layers/{layer}/gradient_by_position"]
        assert recorded.dims == ("step", "group", "position", "index")
        for group, member in members(LABELS, N).items():
            inside = torch.from_numpy(member)
            a, d = (rows[inside].double().transpose(0, 1) for rows in (use.x, use.delta))
            expected = torch.linalg.svdvals(d.mT @ a).numpy()
            found = recorded.sel(group=group).values[0]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * expected.max())


def test_a_layer_called_in_a_loop_has_a_position_for_each_call():
    layer = nn.Linear(7, 5)
    whole = problem(layer, normal(N, T, 7))
    loop = problem(Calls(layer, lambda m, x: torch.stack([m(x[:, t]) for t in range(T)], 1)), normal(N, T, 7))
    found = [record(made, per_position=True)["layers"].children for made in (whole, loop)]
    first, second = (next(iter(nodes.values()))["gradient_by_position"].values for nodes in found)
    assert first.shape[2] == T
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6 * first.max())


@pytest.mark.parametrize("used", [[0, 1, 2], [2, 4], [3]], ids=["the first", "some", "one"])
@pytest.mark.parametrize("passes", ["one backward pass", "a backward pass each"])
def test_calls_that_the_loss_does_not_use_keep_their_positions(used, passes):
    class Steps(nn.Module):
        def __init__(self, loop):
            super().__init__()
            self.layer, self.loop = nn.Linear(7, 5), loop

        def forward(self, x):
            return [self.layer(x[:, t]).tanh() for t in range(T)] if self.loop else self.layer(x).tanh().unbind(1)

    found = []
    for loop in (False, True):
        torch.manual_seed(0)
        model = Steps(loop)
        with autospec.watch(model, LABELS, per_position=True, statistics=["gradient"], quiet=True) as watcher:
            outputs = model(normal(N, T, 7))
            losses = [outputs[t].square().mean() * (t + 1) for t in used]
            for loss in [sum(losses)] if passes == "one backward pass" else reversed(losses):
                loss.backward(retain_graph=True)
            watcher.step()
        found.append(watcher.trajectories["layers/layer.weight/gradient_by_position"].values)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-6 * found[0].max())
    assert set(np.flatnonzero(found[1][0, 0, :, 0]).tolist()) == set(used)


def test_a_series_of_length_one_has_one_position():
    model = nn.Linear(7, 5)
    with autospec.watch(model, LABELS, per_position=True, quiet=True) as watcher:
        for steps in (1, T, 1):
            model.zero_grad()
            model(normal(N, steps, 7)).square().mean().backward()
            watcher.step()
    node = watcher.trajectories["layers/weight"]
    for step in (0, 2):
        by_position = node["gradient_by_position"].values[step]
        np.testing.assert_allclose(by_position[:, 0], node["gradient"].values[step], rtol=0, atol=1e-6)
        assert np.isnan(by_position[:, 1:]).all()


def test_at_a_step_of_length_one_too_a_table_has_the_positions_of_the_output_layer_alone():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.output = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.output.weight = self.table.weight

        def forward(self, index):
            return self.output(self.table(index).tanh())

    model, index = Words(), torch.randint(9, (N, 1))
    with autospec.watch(model, LABELS, per_position=True, quiet=True) as watcher:
        output = model(index)
        output.retain_grad()
        output.square().sum().backward()
        watcher.step()
    alone = output.grad.flatten(0, 1).T @ model.table(index).tanh().flatten(0, 1)
    found = watcher.trajectories["layers/table.weight/gradient_by_position"].sel(group="all").values[0, 0]
    expected = torch.linalg.svdvals(alone.double()).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * expected.max())


def test_a_layer_without_positions_has_none():
    tree = record(problem(nn.Linear(7, 5), normal(N, 7)), per_position=True)
    assert "gradient_by_position" not in tree["layers/weight"]


def test_very_many_pairs_of_groups_are_warned_of():
    labels = [f"site {i}" for i in range(25)]
    with pytest.warns(UserWarning, match="contrast: 300 pairs of groups are compared"):
        autospec.watch(torch.nn.Linear(3, 2), labels, statistics=["gradient", "contrast"])
