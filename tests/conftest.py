"""Settings of the whole suite."""

import os

import pytest
import torch

# Read when huggingface_hub is imported: the Hub of these tests (hub_server.py) speaks plain HTTP, and no Xet.
os.environ["HF_HUB_DISABLE_XET"] = "1"


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that wait for each other on a busy machine are slower than one by far."""
    torch.set_num_threads(1)
