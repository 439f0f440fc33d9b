"""Hedges' g against its definition, and the coverage of its interval."""

import math

import numpy as np
import pytest
from scipy import special, stats

from autospec.statistics.effects import hedges_g, small_sample_factor


def test_g_is_t_rescaled_and_corrected():
    generator = np.random.default_rng(1)
    a, b = generator.normal(1, 2, size=(9, 5)), generator.normal(0, 2, size=(13, 5))
    g, low, high = hedges_g(a, b)
    d = stats.ttest_ind(a, b).statistic * math.sqrt(1 / 9 + 1 / 13)
    assert g == pytest.approx(d * special.gamma(10) / (math.sqrt(10) * special.gamma(9.5)))
    assert small_sample_factor(20) == pytest.approx(1 - 3 / (4 * 20 - 1), abs=1e-3)
    assert ((low < g) & (g < high)).all()
    assert hedges_g(a.T, b.T, axis=1)[0] == pytest.approx(g)
    assert np.isnan(hedges_g(np.ones(4), np.zeros(4))[0])


def test_g_has_no_bias_and_its_interval_covers_the_truth():
    generator = np.random.default_rng(2)
    truth, n, m, count = 0.7, 12, 20, 4000
    a, b = generator.normal(truth, 1, size=(n, count)), generator.normal(0, 1, size=(m, count))
    g, low, high = hedges_g(a, b)
    assert g.mean() == pytest.approx(truth, abs=4 * g.std() / math.sqrt(count))
    covered = int(((low <= truth) & (truth <= high)).sum())
    assert 0.94 < covered / count < 0.965
