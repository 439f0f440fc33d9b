"""Scaling to z-scores, per subject and over a cohort."""

import numpy as np
import pytest
from scipy import stats

from autospec.errors import UserError
from autospec.ica.cleaning import remove_trends
from autospec.ica.scaling import cohort_modes, mode, scale_maps, scale_timecourses, shift_and_scale_maps


@pytest.fixture
def maps():
    """Skewed, so that mean and mode differ."""
    return np.random.default_rng(1).gamma(2.0, size=(3, 5000)).astype(np.float32)


def test_maps_become_z_scores(maps):
    scaled = scale_maps(maps)
    assert scaled.dtype == np.float32
    assert np.allclose(scaled, stats.zscore(maps.astype("f8"), axis=1, ddof=1), atol=1e-5)


def test_time_courses_lose_trends_and_get_unit_variance():
    courses = np.random.default_rng(0).normal(size=(80, 3)).cumsum(axis=0) * [1, 10, 100]
    scaled = scale_timecourses(courses)
    assert np.allclose(scaled.std(axis=0, ddof=1), 1)
    assert np.allclose(scaled * remove_trends(courses).std(axis=0, ddof=1), remove_trends(courses))


def test_neither_trends_nor_confounds_remain_in_time_courses():
    generator = np.random.default_rng(0)
    confounds = generator.normal(size=(80, 2)).cumsum(axis=0)  # slow, so with trends of their own
    courses = generator.normal(size=(80, 3)) + confounds @ generator.normal(size=(2, 3)) + 100
    scaled = scale_timecourses(courses, confounds)
    assert np.allclose(scaled.std(axis=0, ddof=1), 1)
    assert np.abs(confounds.T @ scaled).max() < 1e-9 * np.abs(confounds).max() * 80
    assert np.allclose(remove_trends(scaled), scaled)
    # Confounds that are trends themselves change nothing.
    trends = np.column_stack([np.full(80, 5.3), np.linspace(1, 2, 80), confounds])
    assert np.allclose(scale_timecourses(courses, trends), scaled)


def test_gifts_scaling_follows_its_formula(maps):
    shifts = np.array([0.1, 0.2, 0.3])
    scaled = shift_and_scale_maps(maps, shifts)
    for row, shift, found in zip(maps.astype("f8"), shifts, scaled, strict=True):
        v = row - shift
        assert np.allclose(found, v / np.sqrt(np.sum(v**2) / (len(v) - 1)), atol=1e-5)


def test_the_mode_is_where_values_are_densest(maps):
    # A gamma distribution of shape 2 has its mode at 1 and its mean at 2.
    assert mode(maps.ravel()) == pytest.approx(1.0, abs=0.15)
    generator = np.random.default_rng(0)
    values = np.r_[generator.normal(size=9000), generator.normal(loc=8, size=1000)]
    assert mode(values) == pytest.approx(0, abs=0.2)
    assert mode(values + 5) == pytest.approx(mode(values) + 5, abs=1e-6)
    kernel = stats.gaussian_kde(values)
    grid = np.linspace(-1, 1, 201)
    assert mode(values) == pytest.approx(grid[kernel(grid).argmax()], abs=0.2)
    assert mode(np.full(50, 3.0)) == 3.0
    # More than half of the values are the same: their interquartile range is 0.
    assert mode(np.r_[np.zeros(900), generator.normal(loc=5, size=100)]) == pytest.approx(0, abs=0.2)


def test_the_cohorts_modes_are_those_of_its_mean_maps(maps):
    subjects = [maps, maps + 1, 2 * maps]
    assert np.allclose(cohort_modes(iter(subjects)), [mode(row) for row in np.mean(subjects, axis=0)])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: scale_maps(np.ones((2, 9))), "map of network 1 is constant"),
        (lambda m: cohort_modes([]), "at least one subject"),
        (lambda m: cohort_modes([m, m[:, 1:]]), "all subjects need the same voxels"),
    ],
)
def test_what_cannot_be_scaled_is_refused(maps, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(maps)
