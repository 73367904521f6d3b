"""Settings of the whole suite."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Read when huggingface_hub is imported: the Hub of these tests (hub_server.py) speaks plain HTTP, and no Xet.
os.environ["HF_HUB_DISABLE_XET"] = "1"


# The same examples in every run of the suite; `--fuzz N` draws N new ones for every law.
SUITE = settings(
    derandomize=True, database=None, deadline=None, max_examples=200, suppress_health_check=list(HealthCheck)
)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, metavar="N", help="draw N new examples for every property")


def pytest_configure(config):
    examples = config.getoption("fuzz")
    fuzz = settings(SUITE, derandomize=False, max_examples=examples or 1, print_blob=True)
    settings.register_profile("looped", SUITE if examples is None else fuzz)
    settings.load_profile("looped")


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
