"""The tracked solver against the exact one, along whole trainings."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import autospec
from autospec.introspection import tracked as tracked_module
from autospec.introspection.tracked import leading_values

N, WIDTH = 300, 320
LABELS = ["a"] * 90 + ["b"] * 210


def autoencoder():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH))


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, 20, generator=generator) @ torch.randn(20, WIDTH, generator=generator) / 4


def train(model, x, steps, watcher, optimizer):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        watcher.step()
        optimizer.step()


def recorded(steps=60, rate=3e-3, **options):
    model, x = autoencoder(), data()
    with autospec.watch(model, LABELS, quiet=True, **options) as watcher:
        train(model, x, steps, watcher, torch.optim.Adam(model.parameters(), rate))
    return watcher


@pytest.mark.parametrize("rate", [1e-3, 3e-2], ids=["slow", "fast"])
def test_every_value_of_a_whole_training_is_that_of_a_decomposition(rate):
    exact, tracked = (recorded(rate=rate, solver=solver) for solver in ("exact", "tracked"))
    followed = tracked._measurement.iterations
    assert sum(count for iterations, count in followed.items() if iterations) > 50, followed
    for layer in ("0.weight", "2.weight"):
        for statistic in ("gradient", "activation", "adjoint"):
            one, other = (each.trajectories[f"layers/{layer}/{statistic}"].values for each in (exact, tracked))
            assert one.shape == other.shape
            assert (np.abs(one - other) / one[..., :1]).max() < 1e-6, (layer, statistic)


def test_where_the_weights_move_slowly_one_iteration_does():
    followed = recorded(rate=1e-3, solver="tracked")._measurement.iterations
    assert followed[1] > 0.9 * sum(followed.values())


def test_a_matrix_of_lower_rank_than_the_block_is_followed():
    torch.manual_seed(5)
    left, right = torch.randn(150, 5), torch.randn(5, 200)
    found = leading_values([left @ right], 8, None)
    for _ in range(5):
        left += 0.001 * torch.randn(150, 5)
        found = leading_values([left @ right], 8, found.block)
        expected = torch.linalg.svdvals((left @ right).double())[:8]
        assert found.iterations
        assert float((found.values[0] - expected).abs().max() / expected[0]) < 1e-6


@pytest.mark.parametrize("active", [3, 5, 11])
def test_what_appears_where_all_was_zero_is_seen(active):
    """As when a loss begins to reach outputs that it did not: no direction of a small block would lie there."""
    torch.manual_seed(7)
    first, second = torch.zeros(2, 300, 200)
    first[:150, :active] = torch.randn(150, active)
    second[150:, 60 : 60 + active] = 2 * torch.randn(150, active)
    found = None
    for step in range(8):
        matrix = first + 1e-3 * step * first.roll(1, 0) + (second if step >= 4 else 0)
        found = leading_values([matrix], 5, None if found is None else found.block)
        expected = torch.linalg.svdvals(matrix.double())[:5]
        assert float((found.values[0] - expected).abs().max() / expected[0]) < 1e-6, step


def test_training_is_unchanged_bit_by_bit():
    models = []
    for solver in ("exact", "tracked"):
        model, x = autoencoder(), data()
        with autospec.watch(model, LABELS, quiet=True, solver=solver) as watcher:
            train(model, x, 5, watcher, torch.optim.Adam(model.parameters(), 1e-2))
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_resumed_training_goes_on_with_the_same_vectors():
    whole = recorded(steps=20, solver="tracked").trajectories
    model, x = autoencoder(), data()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    with autospec.watch(model, LABELS, quiet=True, solver="tracked") as watcher:
        train(model, x, 9, watcher, optimizer)
        state = copy.deepcopy(watcher.state_dict())
    assert state["solver"]
    with autospec.watch(model, LABELS, quiet=True, solver="tracked") as watcher:
        watcher.load_state_dict(state)
        train(model, x, 11, watcher, optimizer)
    for layer in ("0.weight", "2.weight"):
        for statistic in ("gradient", "activation", "adjoint"):
            path = f"layers/{layer}/{statistic}"
            assert np.array_equal(whole[path].values, watcher.trajectories[path].values), path


def test_of_batches_that_hold_other_groups_each_time_nothing_is_kept():
    x, names = data().repeat(2, 1), ["a", "b", "c", "d"]
    # Which groups each step's batch holds; the last ones stay.
    present = ["ab", "cd", "abc", "bd", "acd", "ab", "abcd", "bc", *["bd"] * 6]
    found, kept, followed = {}, [], []
    for solver in ("exact", "tracked"):
        model = autoencoder()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        with autospec.watch(model, names, solver=solver, singular_values=5, quiet=True) as watcher:
            for groups in present:
                watcher.set_groups(list(groups) * (600 // len(groups)))
                train(model, x, 1, watcher, optimizer)
                kept.append(len(watcher._measurement._blocks))
                followed.append(sum(n for count, n in watcher._measurement.iterations.items() if count))
        found[solver] = watcher.trajectories
    kept, followed = kept[len(present) :], followed[len(present) :]
    assert 0 < max(kept) == min(kept)
    assert followed[len(present) - 6] == 0 < followed[-1]
    for layer in ("0.weight", "2.weight"):
        one, other = (tree[f"layers/{layer}/adjoint"].values for tree in found.values())
        assert np.array_equal(np.isnan(one), np.isnan(other))
        assert np.nanmax(np.abs(one - other) / one[..., :1]) < 1e-6


def test_a_matrix_that_has_become_another_is_decomposed_afresh():
    torch.manual_seed(0)
    first, second = torch.randn(2, 200, 260)
    found = leading_values([first], 8, None)
    again = leading_values([second], 8, found.block)
    expected = torch.linalg.svdvals(second.double())[:8]
    assert again.iterations == 0
    assert float((again.values[0] - expected).abs().max() / expected[0]) < 1e-6


def test_the_bound_holds_for_slowly_turning_matrices():
    torch.manual_seed(1)
    matrix = torch.randn(150, 12) @ torch.randn(12, 200) + 0.3 * torch.randn(150, 200)
    found = leading_values([matrix], 6, None)
    for _ in range(30):
        matrix = matrix + 0.01 * torch.randn(150, 200)
        found = leading_values([matrix], 6, found.block)
        expected = torch.linalg.svdvals(matrix.double())[:6]
        assert float((found.values[0] - expected).abs().max() / expected[0]) < 1e-6


def test_the_audit_compares_what_was_followed_with_a_decomposition(monkeypatch):
    fine = recorded(steps=20, solver="tracked", audit=5).trajectories.attrs["audit"]
    assert fine["largest_error"] < 1e-6
    follow = tracked_module.leading_values

    def wrong(matrices, count, last):
        found = follow(matrices, count, last)
        return dataclasses.replace(found, values=found.values * (1.01 if found.iterations else 1))

    monkeypatch.setattr("autospec.introspection.measure.leading_values", wrong)
    with pytest.warns(UserWarning, match=r"of the \w+ of '\d\.weight' are off by 0\.01 of the largest") as caught:
        spoiled = recorded(steps=20, solver="tracked", audit=5).trajectories.attrs["audit"]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert spoiled["largest_error"] == pytest.approx(0.01, rel=1e-3)


def in_two_parts(part, grown):
    """A matrix, and one that holds something in other columns besides, which no direction of a block sees."""
    torch.manual_seed(2)
    first = torch.randn(150, 40) @ torch.diag(torch.linspace(1, 0.3, 40)) @ torch.randn(40, 200) * part
    hidden = torch.randn(60, 12) @ torch.randn(12, 90) * grown
    return torch.block_diag(first, hidden)


@pytest.mark.parametrize(
    ("part", "grown"), [(1, 1.8), (1, 2), (1, 5), (0.5, 1), (0.3, 0.6), (0.9, 3)], ids=lambda number: f"{number}"
)
def test_what_appears_where_the_block_does_not_see_it_is_found_at_once(part, grown):
    before, after = in_two_parts(1, 0), in_two_parts(part, grown)  # also where all that was there becomes less
    found = leading_values([before, before[:100]], 6, None)
    for _ in range(5):
        found = leading_values([before, before[:100]], 6, found.block)
        assert found.iterations
    found = leading_values([after, after[:100]], 6, found.block)
    expected = torch.linalg.svdvals(after.double())[:6]
    assert float(expected[5] / torch.linalg.svdvals(part * before.double())[5]) > 1.01  # it is among the wanted values
    assert float((found.values[0] - expected).abs().max() / expected[0]) < 1e-6


def test_what_grows_slowly_where_the_block_does_not_see_it_is_found_before_long():
    found, wrong, followed = None, [], 0
    for step in range(220):
        matrix = in_two_parts(1, 0.01 * step)
        found = leading_values([matrix], 6, None if found is None else found.block)
        expected = torch.linalg.svdvals(matrix.double())[:6]
        followed += found.iterations > 0
        if float((found.values[0] - expected).abs().max() / expected[0]) > 1e-6:
            wrong.append(step)
    assert followed > 110
    assert wrong == []


def test_a_loss_that_is_switched_on_later_is_followed():
    """Two cohorts have disjoint regions, so the second one's loss moves columns that were zero."""
    torch.manual_seed(0)
    x, mask = torch.zeros(N, WIDTH), torch.zeros(N, WIDTH)
    for rows, columns in ((slice(0, 150), slice(0, 160)), (slice(150, N), slice(160, WIDTH))):
        x[rows, columns] = torch.randn(150, 40) @ torch.diag(torch.logspace(0, -3, 40)) @ torch.randn(40, 160)
        mask[rows, columns] = 1
    found = {}
    for solver in ("exact", "tracked"):
        model = autoencoder()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        with autospec.watch(model, LABELS, solver=solver, singular_values=5, quiet=True) as watcher:
            for step in range(12):
                optimizer.zero_grad()
                errors = ((model(x) - x).square() * mask).sum(1)
                (errors[:150].mean() + (step >= 6) * errors[150:].mean()).backward()
                watcher.step()
                optimizer.step()
        found[solver] = watcher.trajectories["layers/2.weight/adjoint"].sel(group="all").values
    scale = found["exact"][:, :1]
    assert (np.abs(found["tracked"] - found["exact"]) / scale).max() < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_give_nan_and_the_next_step_is_fine(bad):
    torch.manual_seed(4)
    fine = torch.randn(2, 120, 150)
    found = leading_values(list(fine), 4, None)
    diverged = fine.clone()
    diverged[1, 3, 4] = bad
    found = leading_values(list(diverged), 4, found.block)
    assert found.values[1].isnan().all()
    assert not found.values[0].isnan().any()
    found = leading_values(list(fine), 4, found.block)
    expected = torch.linalg.svdvals(fine.double())[:, :4]
    assert float((found.values - expected).abs().max()) < 1e-5


def test_values_whose_squares_are_beyond_single_precision_are_found():
    torch.manual_seed(6)
    matrix = 1e22 * torch.randn(120, 150)
    found = leading_values([matrix], 4, leading_values([matrix], 4, None).block)
    assert torch.allclose(found.values[0], torch.linalg.svdvals(matrix.double())[:4])


def drifting(kind, generator, steps=8):
    """Matrices that change a little from step to step; in all but two kinds, columns of a block's images nearly depend on each other."""

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    base, left, right = draw(140, 160), draw(140, 2), draw(2, 160)
    rank = torch.rand(140, 1, generator=generator), torch.rand(1, 160, generator=generator)
    rows, columns = torch.zeros(140, 1), torch.zeros(160)
    rows[[69, 139]], columns[:9] = 1, 1
    outer = torch.linalg.qr(draw(140, 140))[0], torch.linalg.qr(draw(160, 140))[0]
    for step in range(steps):
        base = base + 1e-3 * draw(140, 160)
        right = right + 1e-3 * draw(2, 160)
        yield {
            "one direction": rank[0] @ rank[1] * (1 - 1e-3 * step),
            "two directions": left @ right.relu(),
            "two rows": rows * base,
            "two sparse rows": rows * (base.relu() * (torch.arange(160) < 30)),
            "nine columns": columns * base,
            "one more direction, later": left @ right + (step > 4) * 0.1 * (base[:, :1] @ base[:1]),
            "widely spread": (outer[0] * torch.logspace(0, -6, 140)) @ (outer[1].T + 1e-4 * base),
            "less rank, later": base if step < 4 else left[:, :1] @ right[:1],
            "clustered": (outer[0] * torch.cat([torch.ones(11), torch.full((129,), 0.5)])) @ outer[1].T + 1e-3 * base,
        }[kind]


KINDS = [
    "one direction",
    "two directions",
    "two rows",
    "two sparse rows",
    "nine columns",
    "one more direction, later",
    "widely spread",
    "less rank, later",
    "clustered",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e-17, 1e20], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_keeps_to_the_bar_whatever_the_rank_and_the_scale(kind, scale, dtype):
    for seed in range(2):
        found, iterations = None, []
        for step, matrix in enumerate(drifting(kind, torch.Generator().manual_seed(seed))):
            matrices = [scale * matrix.to(dtype), scale * matrix[50:].to(dtype)]
            found = leading_values(matrices, 9, None if found is None else found.block)
            iterations.append(found.iterations)
            for values, each in zip(found.values, matrices, strict=True):
                expected = torch.linalg.svdvals(each.double())[:9]
                assert float((values - expected).abs().max() / expected[0]) < 1e-6, (seed, step, iterations)
        # A low rank is followed: another iteration with better directions does.
        if kind in ("one direction", "two directions", "two rows", "two sparse rows") and scale in (1.0, 1e-10):
            assert all(1 <= count <= 3 for count in iterations[1:]), iterations


def test_zeros_have_a_spectrum_of_zeros():
    found = leading_values([torch.zeros(100, 120)], 4, None)
    found = leading_values([torch.zeros(100, 120)], 4, found.block)
    assert torch.equal(found.values, torch.zeros(1, 4, dtype=torch.float64))
