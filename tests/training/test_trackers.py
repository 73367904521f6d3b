"""Trackers get every row of metrics.jsonl, under project and run of the recipe, and are closed however a run ends; a
resumed run goes on in them; a missing one is said before any work."""

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, register_tracker_class
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from looplab.runs.sections import flatten
from looplab.training.trackers import arguments_of, check_trackers
from toy_runs import measured, reset_accelerator, rows_of
from train import main

pytestmark = pytest.mark.slow


class Notes(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory, main_process_only = "notes", False, True
    made: list = []  # noqa: RUF012

    def __init__(self, project: str, **arguments):
        super().__init__()
        self.project, self.rows, self.config, self.closed = project, [], None, 0
        Notes.made.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.rows.append((step, values))

    def finish(self):
        self.closed += 1


@pytest.fixture
def notes():
    register_tracker_class(Notes)
    Notes.made = []
    yield Notes.made
    del LOGGER_TYPE_TO_CLASS["notes"]


def test_a_tracker_gets_every_row(hops, tmp_path, notes):
    main(hops("walk_seed3", "--trackers=[notes]", "--log_every=5"))
    (tracker,) = notes
    assert (tracker.project, tracker.closed, tracker.config["optim.kind"]) == ("walk", 1, "muon")
    rows = rows_of(tmp_path / "walk_seed3" / "metrics.jsonl")
    for row, (step, values) in zip(rows, tracker.rows, strict=True):
        assert step == row["step"]
        assert values == {name: v for name, v in flatten(row).items() if name != "step" and v is not None}


def test_the_norm_is_that_of_the_gradients_before_they_are_clipped_and_reading_it_changes_nothing(hops, tmp_path):
    main(hops("bound", "--optim.clip=1e30"))
    main(hops("free", "--optim.clip=null"))
    main(hops("seldom", "--optim.clip=null", "--log_every=1000", "--check_every=1"))
    norms = measured(tmp_path / "bound", "grad_norm")
    assert norms == measured(tmp_path / "free", "grad_norm")
    assert measured(tmp_path / "bound") == measured(tmp_path / "free")
    assert measured(tmp_path / "free", "gate")[-1] == measured(tmp_path / "seldom", "gate")[-1]
    main(hops("tight", "--optim.clip=1e-3"))
    assert measured(tmp_path / "tight", "grad_norm")[0] == norms[0]


def test_trackers_are_closed_where_a_run_dies(hops, notes):
    with pytest.raises(FloatingPointError):
        main(hops("dies", "--trackers=[notes]", "--optim.muon_lr=1e30", "--optim.clip=null", "--optim.lr=1e30"))
    assert [tracker.closed for tracker in notes] == [1]


def test_a_resumed_run_goes_on_in_the_same_tensorboard_run(hops, tmp_path):
    for steps in (10, 20):
        main(hops("run", "--trackers=[tensorboard]", f"--max_steps={steps}"))
        reset_accelerator()
    found = EventAccumulator(str(tmp_path / "run" / "tracker" / "run")).Reload()
    points = [(event.step, event.value) for event in found.Scalars("loss")]
    assert [step for step, _ in points] == list(range(1, 21))
    assert [value for _, value in points] == pytest.approx([loss for _, loss in measured(tmp_path / "run")])
    assert found.Scalars("tokens_per_second")[0].value > 0


@pytest.mark.parametrize("name", sorted(set(LoggerType.list()) - {"all"}))
def test_a_missing_package_is_an_error_before_any_work(hops, tmp_path, monkeypatch, name):
    monkeypatch.setattr("looplab.training.trackers.get_available_trackers", list)
    with pytest.raises(
        ValueError, match=rf"^trackers: {name} is not installed: run `pip install {name.replace('_', '-')}`"
    ):
        main(hops("run", f"--trackers=[{name}]"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorbord", "", "None"])
def test_an_unknown_tracker_is_refused_with_the_nearest(name):
    with pytest.raises(ValueError, match=r"^trackers has no .*; did you mean '\w+'\?"):
        check_trackers([name])


@pytest.mark.parametrize("name", sorted(arguments_of("run", 3)))
def test_arguments_are_for_trackers_that_accelerate_has(name):
    assert name in LOGGER_TYPE_TO_CLASS
    assert arguments_of("run", 0)["trackio"]["resume"] == "never"
