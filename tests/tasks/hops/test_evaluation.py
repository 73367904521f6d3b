"""Laws of evaluation: what an oracle scores, what a toy of limited depth scores, and that it sees what ships."""

from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import torch
import yaml

import looplab.tasks.hops.evaluation
from data_builders import hop_tokenizer, load_task
from looplab.instruments.traces import Trace, trace
from looplab.runs.folder import open_run
from looplab.tasks.hops.ask import true_path
from looplab.tasks.hops.evaluation import (
    accuracy_grid,
    grid_table,
    hops_solved,
    loop_rows,
    trace_groups,
    wilson_interval,
)
from looplab.tasks.hops.rows import RowGroup, facts_of_task, groups_of, load_run_task
from toys import make_ids, make_model

WRONG = 0  # the padding id, which is never an answer


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    sizes = {"num_entities": 8, "num_relations": 2, "train_hops": 3, "max_hops": 5, "test_per_hop": 12}
    return load_task("khop", "quickstart", cache_dir=folder, **sizes)


@pytest.fixture(scope="module")
def tokenizer():
    return hop_tokenizer(8, 2)


@pytest.fixture(scope="module")
def groups(task, tokenizer):
    return groups_of(task["train"], tokenizer) + groups_of(task["test"], tokenizer)


def chain_follower(groups, hops_per_loop):
    """Predictions of a toy that looks up one atomic fact after the other, at most `hops_per_loop(loops)`."""
    facts = {}
    for group in groups:
        if group.split_kind == "atomic":
            for (entity, relation, _), answer in zip(group.input_ids.tolist(), group.answers.tolist(), strict=True):
                facts[entity, relation] = answer

    def predictions(group):
        """(8, N): what it says after each of 8 loops."""
        answers = []
        for entity, *relations, _ in group.input_ids.tolist():
            for relation in relations:
                entity = facts[entity, relation]
            reached = [len(relations) <= hops_per_loop(loops) for loops in range(1, 9)]
            answers.append([entity if there else WRONG for there in reached])
        return torch.tensor(answers).T

    return [predictions(group) for group in groups]


def test_an_oracle_scores_one_everywhere(groups):
    rows = accuracy_grid(groups, chain_follower(groups, lambda loops: 99), [1, 3], trained_hops=[1, 2, 3])
    assert {row["accuracy"] for row in rows} == {1.0}


def test_a_toy_of_k_loops_scores_exactly_the_hops_up_to_k(groups):
    rows = accuracy_grid(groups, chain_follower(groups, lambda loops: loops), [1, 2, 4, 8], trained_hops=[1, 2, 3])
    for row in rows:
        assert row["accuracy"] == (row["hops"] <= row["loops"]), row


def test_grid_rows_have_the_agreed_fields_and_count_every_row_once(groups, task):
    rows = accuracy_grid(groups, chain_follower(groups, lambda loops: loops), [2], trained_hops=[1, 2])
    for row in rows:
        types = {"loops": int, "hops": int, "split_kind": str, "accuracy": float, "n": int, "trained": bool}
        assert {name: type(value) for name, value in row.items()} == types
        assert row["trained"] == (row["hops"] <= 2)
    assert sum(row["n"] for row in rows) == len(task["train"]) + len(task["test"])
    kinds = {(row["split_kind"], row["hops"]) for row in rows}
    assert kinds == {("atomic", 1), *(("train", k) for k in (2, 3)), ("id", 2), ("id", 3), ("ood", 4), ("ood", 5)}


def test_the_batch_size_does_not_change_a_trace(groups):
    model, few = make_model(), groups[:2]
    whole, small = (trace_groups(model, few, [3, 2], batch_size=size) for size in (2048, 5))
    for one, other, group, loops in zip(whole, small, few, (3, 2), strict=True):
        assert one.prediction.shape == (loops, len(group.answers))
        assert torch.equal(one.prediction, other.prediction)


def test_loop_rows_are_the_means_over_the_rows_of_a_group(groups):
    group = RowGroup(2, "id", torch.zeros(4, 3), torch.tensor([5, 6, 7, 8]))
    prediction = torch.tensor([[5, 1, 1, 1], [5, 6, 1, 1], [1, 6, 7, 1]])  # the first answer is lost again
    margin = torch.arange(12.0).view(3, 4)
    rows = loop_rows("test", group, Trace(prediction, margin, margin, margin, margin, margin))
    assert rows[0] == {"split": "test", "split_kind": "id", "hops": 2, "loops": 1, "accuracy": 0.25, "n": 4} | {
        "margin": 1.5,
        "first_correct": 0.25,
    }
    assert [row["accuracy"] for row in rows] == [0.25, 0.5, 0.5]
    assert [row["first_correct"] for row in rows] == [0.25, 0.25, 0.25]
    assert [row["margin"] for row in rows] == [1.5, 5.5, 9.5]


def test_a_limit_takes_the_same_rows_every_time_from_every_group(task, tokenizer):
    first, again = (groups_of(task["test"], tokenizer, limit=4) for _ in range(2))
    assert [(group.hops, len(group.answers)) for group in first] == [(2, 4), (3, 4), (4, 4), (5, 4)]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, again, strict=True))


def test_rows_of_one_group_must_have_one_length(tokenizer):
    rows = {"text": ["e1 r0", "e1 r0 r1"], "answer": ["e2", "e3"], "hops": [2, 2], "split_kind": ["id", "id"]}
    with pytest.raises(ValueError, match=r"2 hops \(id\) differ in length"):
        groups_of(datasets.Dataset.from_dict(rows), tokenizer)


@pytest.mark.parametrize(
    ("text", "answer", "word"), [("e9 r0 r1", "e2", "e9"), ("e1 r0 r9", "e2", "r9"), ("e1 r0 r1", "e9", "e9")]
)
def test_a_word_of_another_graph_is_named(text, answer, word):
    rows = {"text": ["e1 r0 r1", text], "answer": ["e2", answer], "hops": [2, 2], "split_kind": ["id", "id"]}
    with pytest.raises(ValueError, match=rf"no token for '{word}'"):
        groups_of(datasets.Dataset.from_dict(rows), hop_tokenizer(5, 2))


def test_a_prediction_is_the_token_that_generate_produces():
    model, ids = make_model(), make_ids()
    traced = trace(model, ids, ids[:, 0], 5)
    for loops in (1, 3, 5):
        generated = model.generate(ids, num_loops=loops, max_new_tokens=1, do_sample=False, eos_token_id=None)
        assert torch.equal(traced.prediction[loops - 1], generated[:, -1])


def test_deeper_test_chains_leave_the_others_as_they_were(tmp_path):
    overrides = {"test_per_hop": 5, "max_hops": 12}
    recipe = {"data": {"task": "khop", "config": "quickstart", "seed": 3, "overrides": overrides}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shallow, deep = (load_run_task(open_run(tmp_path), max_hops=max_hops)["test"] for max_hops in (None, 14))
    assert deep[: len(shallow)] == shallow[:]
    assert set(deep["hops"][len(shallow) :]) == {13, 14}
    named = load_run_task(open_run(tmp_path), held_out_hops=[300, 13, 4])
    assert named["test"]["hops"][:] == [4] * 5 + [13] * 5 + [300] * 5
    assert named["test"][:10] == deep.select([i for i, hops in enumerate(deep["hops"][:]) if hops in (4, 13)])[:]
    assert set(named["validation"]["hops"]) == {4, 13, 300}
    assert set(named["train"]["hops"]) == set(range(1, 9))
    recipe["data"] |= {"task": "composition", "config": "cpu", "overrides": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="unknown field of composition: 'max_hops'"):
        load_run_task(open_run(tmp_path), max_hops=14)


def test_the_metric_agrees_with_counting_by_hand():
    metric = evaluate.load(
        str(Path(looplab.tasks.hops.evaluation.__file__).parent / "hop_accuracy"), keep_in_memory=True
    )
    result = metric.compute(
        predictions=[1, 2, 3, 4], references=[1, 0, 3, 0], hops=[1, 1, 2, 2], split_kind=["id", "id", "id", "ood"]
    )
    assert result == {
        "accuracy": 0.5,
        "n": 4,
        "groups": [
            {"hops": 1, "split_kind": "id", "accuracy": 0.5, "n": 2},
            {"hops": 2, "split_kind": "id", "accuracy": 1.0, "n": 1},
            {"hops": 2, "split_kind": "ood", "accuracy": 0.0, "n": 1},
        ],
    }


def test_the_true_path_is_the_one_the_data_was_built_from(task):
    for row in task["test"]:
        assert true_path(facts_of_task(task), row["text"]) == [f"e{entity}" for entity in row["path"]]
    assert true_path(facts_of_task(task), "r0 r1") is None


def test_the_wilson_interval_covers_95_percent_of_samples():
    for share, n in ((0.5, 40), (0.95, 100), (0.02, 375)):
        hits = np.random.default_rng(0).binomial(n, share, size=4000)
        bounds = np.array([wilson_interval(hit / n, n) for hit in hits])
        covered = ((bounds[:, 0] <= share) & (share <= bounds[:, 1])).mean()
        assert 0.92 < covered < 0.98
    assert wilson_interval(1.0, 10)[0] < 1.0 == wilson_interval(1.0, 10)[1]
    assert wilson_interval(0.0, 10)[0] == 0.0 < wilson_interval(0.0, 10)[1]


def grid_of(accuracies, loops=2, kind="id"):
    return [
        {"loops": loops, "hops": hops, "split_kind": kind, "accuracy": accuracy, "n": 50, "trained": hops < 3}
        for hops, accuracy in accuracies.items()
    ]


def test_hops_are_solved_up_to_the_first_gap():
    rows = grid_of({2: 1.0, 3: 0.95, 4: 0.5, 5: 0.99}) + grid_of({2: 0.0}, kind="train")
    assert hops_solved(rows, 2, 0.9) == 3
    assert hops_solved(rows, 2, 0.99) == 2
    assert hops_solved([*rows, *grid_of({2: 0.1}, kind="ood")], 2, 0.6) == 0
    assert hops_solved([*rows, *grid_of({2: 0.1}, kind="ood_first"), *grid_of({2: 0.1}, kind="pair")], 2, 0.9) == 3


def test_the_table_lists_split_kinds_from_known_to_new_in_one_width():
    kinds = ["atomic", "train", "id", "ood_first", "ood_second", "ood", "pair"]
    rows = [row for kind in sorted(kinds) for row in grid_of({2: 0.5}, kind=kind)]
    lines = grid_table(rows, chance=0.05, trained_loops=(2, 8)).splitlines()[1:]
    assert [line.split()[0] for line in lines[1 : 1 + len(kinds)]] == kinds
    assert len({line.index("|") for line in lines}) == 1


def test_the_table_marks_what_was_trained():
    rows = grid_of({2: 1.0, 3: 0.5}, loops=2) + grid_of({2: 0.9, 3: 0.9}, loops=12)
    header, *lines = grid_table(rows, chance=0.05, trained_loops=(2, 8)).splitlines()[1:]
    assert "[2]" in header
    assert " 12 " in header
    assert "best" not in header
    assert "at 12 loops" in header
    assert "2*" in lines[0]
    assert "3*" not in lines[1]
    assert "50.0" in lines[1]


def test_a_group_holds_what_its_columns_say(groups):
    group = next(group for group in groups if group.hops == 4)
    assert isinstance(group, RowGroup)
    assert group.input_ids.shape == (12, 6)  # entity, four relations, readout
    assert group.answers.shape == (12,)
