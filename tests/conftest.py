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


@pytest.fixture(scope="session")
def toy_runs(tmp_path_factory):
    """The folder of `toy_runs.make_toy_runs`, to look at: what a test breaks or writes, it copies."""
    from toy_runs import make_toy_runs

    folder = tmp_path_factory.mktemp("toy_runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        make_toy_runs(folder)
    return folder


@pytest.fixture
def toy_cache(toy_runs, monkeypatch):
    """The cache of `datasets` that the toy runs were trained from."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", toy_runs / "cache")
