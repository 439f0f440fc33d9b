"""Products and eigenvalues by torch and by numpy: the same values, whichever the threads make the cheaper."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from autospec.introspection import spectra
from autospec.introspection.spectra import column_gram, singular_values, smaller_gram, times_own_transpose
from autospec.introspection.workspace import Workspace

from .families import LABELS, N, T, normal, problem
from .oracle import assert_exact, members, record


@pytest.fixture(params=[False, True], ids=["torch", "numpy"])
def by_numpy(request, monkeypatch):
    monkeypatch.setattr(spectra, "numpy_has_one_thread", lambda: request.param)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 5), (7, 3), (4, 7, 30), (130, 250), (3, 130, 20), (2, 3, 97, 97), (300, 40)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_with_its_own_transpose_is_the_product(shape, turned, by_numpy):
    matrix = draw(*shape).mT if turned else draw(*shape)
    right = np.einsum("...ik,...jk->...ij", matrix.numpy(), matrix.numpy())
    assert np.allclose(times_own_transpose(matrix).numpy(), right, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("size", [3, 40, 300])
def test_leading_eigenpairs_are_those_of_a_whole_decomposition(size, by_numpy):
    matrix = times_own_transpose(draw(size, size + 20))
    values, vectors = spectra.leading_eigenpairs(matrix, 3)
    assert torch.allclose(values, torch.linalg.eigvalsh(matrix).flip(0)[:3], rtol=1e-12)
    assert torch.allclose(matrix @ vectors, vectors * values, atol=1e-10 * float(values[0]))
    assert torch.allclose(vectors.T @ vectors, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shape", [(200, 6), (9, 40), (50, 6, 31)])
def test_gram_matrices_have_the_singular_values_of_float64(shape, by_numpy):
    rows = draw(*shape).float()
    flat = rows if rows.ndim == 2 else rows.movedim(1, 2).flatten(0, 1)
    right = torch.linalg.svdvals(flat.double())
    assert torch.allclose(singular_values([smaller_gram(flat)])[0], right, rtol=1e-12)
    found = singular_values([column_gram(rows, Workspace())])[0]
    assert torch.allclose(found[: len(right)], right, rtol=1e-7)


@pytest.mark.parametrize("size", [20, spectra.SMALLEST_FOR_NUMPY + 10])
def test_what_is_not_finite_gives_nan_and_no_warning(size, by_numpy):
    matrices = draw(2, size, size + 30)
    matrices[1, 3, 4] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = singular_values([smaller_gram(matrices)])[0]
    assert torch.allclose(values[0], torch.linalg.svdvals(matrices[0]), rtol=1e-10)
    assert values[1].isnan().all()


def test_recorded_spectra_are_exact(by_numpy):
    made = problem(
        torch.nn.Sequential(torch.nn.Linear(5, 110), torch.nn.Tanh(), torch.nn.Linear(110, 3)), normal(N, T, 5)
    )
    assert_exact(record(made), made, members(LABELS, N))


def test_numpy_is_asked_only_where_it_has_one_thread():
    for threads in (1, 2):
        spectra.numpy_has_one_thread.cache_clear()
        with threadpool_limits(threads):
            assert spectra.numpy_has_one_thread() == (threads == 1)
    spectra.numpy_has_one_thread.cache_clear()


def test_the_threads_of_a_library_that_scipy_brings_count_before_it_is_loaded():
    code = """
import sys
import torch, numpy
from threadpoolctl import threadpool_limits
threadpool_limits(1)
from autospec.introspection.spectra import numpy_has_one_thread
assert "scipy.linalg" not in sys.modules
print(numpy_has_one_thread())
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    # OpenBLAS starts no more threads than there are cores for it.
    assert done.stdout.strip() == str(len(os.sched_getaffinity(0)) == 1)
