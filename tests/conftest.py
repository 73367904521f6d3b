"""Settings of the whole suite."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that wait for each other on a busy machine are slower than one by far."""
    torch.set_num_threads(1)
