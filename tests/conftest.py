"""Settings of the whole suite, and what its modules share: trained runs, a Hugging Face home, a fresh accelerator."""

import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

# Read when huggingface_hub is imported: the Hub of these tests (hub_server.py) speaks plain HTTP, and no Xet.
os.environ["HF_HUB_DISABLE_XET"] = "1"
# One thread for each process that a test starts: two that wait for each other on a busy machine are slower by far.
os.environ["OMP_NUM_THREADS"] = "1"


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
    # The caches of datasets, of models and of their code: nobody's own, and one per process of pytest-xdist. They are
    # read when the libraries are imported, here and in the processes that tests start.
    home = tempfile.TemporaryDirectory(prefix="hf-home-")
    os.environ["HF_HOME"] = home.name
    config.add_cleanup(home.cleanup)


@pytest.fixture(autouse=True)
def one_thread():
    """As OMP_NUM_THREADS says, whatever the test before has set."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Precision and launcher belong to the process in accelerate: every test finds them unset."""
    yield
    from toy_runs import reset_accelerator

    reset_accelerator()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained("hops" | "text" | .., "--field=value", ...) is the folder of such a run: see `TrainedRuns`."""
    from toy_runs import TrainedRuns

    runs = TrainedRuns(tmp_path_factory.mktemp("trained"))
    yield runs
    runs.check_unchanged()


@pytest.fixture
def hops(trained, tmp_path):
    """hops("name", "--field=value", ...): the smoke recipe, its runs below the test's folder."""
    return lambda name, *flags: trained.recipe("hops", f"--output_dir={tmp_path}", f"--name={name}", *flags)


@pytest.fixture
def text(trained, tmp_path):
    """The same of text, on toy pages."""
    return lambda name, *flags: trained.recipe("text", f"--output_dir={tmp_path}", f"--name={name}", *flags)


@pytest.fixture
def molecules(trained, tmp_path):
    """The same of the toy molecules."""
    return lambda name, *flags: trained.recipe("molecules", f"--output_dir={tmp_path}", f"--name={name}", *flags)


@pytest.fixture
def sequence(trained, tmp_path):
    """The same of the toy questions."""
    return lambda name, *flags: trained.recipe("sequence", f"--output_dir={tmp_path}", f"--name={name}", *flags)


@pytest.fixture(scope="session")
def toy_runs(tmp_path_factory, trained):
    """The folder of `toy_runs.make_toy_runs`, to look at: what a test breaks or writes, it copies."""
    from toy_runs import make_toy_runs

    folder = tmp_path_factory.mktemp("toy_runs")
    make_toy_runs(folder, trained)
    return folder


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory):
    """A folder of `toy_questions.write_benchmarks`."""
    from toy_questions import write_benchmarks

    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder
