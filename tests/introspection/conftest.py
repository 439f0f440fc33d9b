import pytest
import torch

from autospec.introspection.rows import map_rows


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, so that two trainings have the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def probes(monkeypatch):
    """What rows were traced for, call by call."""
    calls = []

    def counted(*args):
        calls.append(args)
        return map_rows(*args)

    monkeypatch.setattr("autospec.introspection.rows.row_maps.map_rows", counted)
    return calls
