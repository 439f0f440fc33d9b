"""The simulated device."""

import pytest
import torch

from tests.conftest import need

from . import simulated


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """The device, which torch knows until the process ends."""
    need("g++", "as root on Debian, run  apt-get update && apt-get install g++")
    simulated.library()
    return torch.device(simulated.NAME)
