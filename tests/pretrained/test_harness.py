"""Multiple-choice benchmarks: the data say what the files say, the harness computes what is computed here by hand."""

import gzip
import json
import logging
from math import comb, exp

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_builders import MultipleChoice
from looplab.cli import main
from looplab.pretrained import harness
from looplab.pretrained.harness import answer_logprob, compare, mcnemar_p, score
from looplab.pretrained.parts import task_names
from looplab.runs import intervals as bootstrap
from toy_questions import toy_tokenizer
from toys import FP32, SIZES, make_model


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


def dataset(benchmarks, cache, name="arc_easy", **fields):
    builder = MultipleChoice(config_name=name, data_dir=str(benchmarks), cache_dir=str(cache), **fields)
    builder.download_and_prepare()
    return builder.as_dataset()


def test_rows_are_those_of_the_file(benchmarks, cache):
    """Question, choices and answer of every row, found again by its id in the file."""
    path = benchmarks / "piqa/val_rc_5shot/requests.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    published = {f"val-{line['doc_id']}": line["doc"] for line in lines if line["doc_id"] < 1_000_000}
    rows = dataset(benchmarks, cache, "piqa")["test"].to_list()
    assert {row["id"] for row in rows} == set(published)
    for row in rows:
        document = published[row["id"]]
        assert document["query"] == f"Goal: {row['question']}\nAnswer:"
        assert (row["choices"], row["answer"]) == (document["choices"], document["gold"])


@pytest.mark.parametrize("name", sorted(MultipleChoice.builder_configs))
def test_no_question_is_in_both_splits(benchmarks, cache, name):
    """Validation loses the question that test has too, and nothing else."""
    rows = dataset(benchmarks, cache, name)
    questions = {split: set(rows[split]["question"]) for split in rows}
    assert not questions["validation"] & questions["test"]
    assert (len(questions["validation"]), len(questions["test"])) == (11, 9)


def test_the_order_is_random_and_the_seed_repeats_it(benchmarks, cache, tmp_path):
    first = dataset(benchmarks, cache)["test"]["id"][:]
    assert first != [f"test-{i}" for i in range(9)]
    assert dataset(benchmarks, tmp_path)["test"]["id"][:] == first
    other = dataset(benchmarks, cache, seed=1)["test"]["id"][:]
    assert other != first
    assert sorted(other) == sorted(first)
    assert len(dataset(benchmarks, cache, max_validation=5)["validation"]) == 5


def test_files_that_are_missing_or_of_another_form_are_named(benchmarks, tmp_path):
    with pytest.raises(ValueError, match=r"has no arc_easy/val_rc_5shot.*looped fetch benchmarks"):
        MultipleChoice(config_name="arc_easy", data_dir=str(tmp_path), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="max_validation must be a whole number"):
        MultipleChoice(config_name="arc_easy", data_dir=str(benchmarks), cache_dir=str(tmp_path), max_validation=0)
    builder = MultipleChoice(config_name="arc_easy", data_dir=str(benchmarks), cache_dir=str(tmp_path), prefix="Q: ")
    with pytest.raises(ValueError, match=r"row 0: .* is not of the form of arc_easy"):
        list(builder.rows("test"))


PROMPTS = {
    "arc_challenge": "Question: {}\nAnswer:",
    "arc_easy": "Question: {}\nAnswer:",
    "commonsense_qa": "Question: {}\nAnswer:",
    "hellaswag": "{}",
    "openbookqa": "{}",
    "piqa": "Question: {}\nAnswer:",
}


def by_hand(model, tokenizer, prompt: str, choice: str) -> float:
    """Sum of the log-probabilities of the choice's tokens, one sequence at a time and nothing padded."""
    before, after = (tokenizer(text)["input_ids"] for text in (prompt, choice))
    with torch.no_grad():
        logprobs = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return float(sum(logprobs[len(before) + i - 1, token] for i, token in enumerate(after)))


def llama():
    torch.manual_seed(0)
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "initializer_range")}
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, **sizes)
    ).eval()


@pytest.mark.parametrize("task", sorted(PROMPTS))
@pytest.mark.parametrize("make", [llama, make_model], ids=["llama", "looped"])
def test_a_choice_scores_the_sum_of_its_log_probabilities(benchmarks, cache, make, task):
    """Of every item, every choice; acc takes the largest sum, acc_norm the largest per character."""
    model, tokenizer = make(), toy_tokenizer()
    rows = score(model, tokenizer, task, "test", batch_size=3, data=benchmarks, cache_dir=cache)
    documents = dataset(benchmarks, cache, task)["test"].to_list()
    assert [row["id"] for row in rows] == [document["id"] for document in documents]
    for row, document in zip(rows, documents, strict=True):
        prompt = PROMPTS[task].format(document["question"])
        expected = [by_hand(model, tokenizer, prompt, choice) for choice in document["choices"]]
        np.testing.assert_allclose(row["logprobs"], expected, **FP32)
        per_character = [value / len(choice) for value, choice in zip(expected, document["choices"], strict=True)]
        assert row["answer"] == document["answer"]
        assert row["acc"] == (np.argmax(expected) == document["answer"])
        assert row["acc_norm"] == (np.argmax(per_character) == document["answer"])
    assert {row["acc"] for row in rows} == {True, False}


def test_the_model_and_the_tokenizer_are_left_as_they_were(benchmarks, cache):
    """Scoring attaches nothing, moves nothing, and is blind to what the caller has attached: it is called as it is."""
    model, tokenizer = llama().to(torch.bfloat16).train(), toy_tokenizer()
    calls = []
    with model.model.layers[1].register_forward_hook(lambda module, args, output: calls.append(module.training)):
        rows = score(model, tokenizer, "arc_easy", limit=2, data=benchmarks, cache_dir=cache)
    assert len(rows) == 2
    assert calls
    assert not any(calls)
    assert model.training
    assert model.dtype == torch.bfloat16
    assert tokenizer.pad_token is None


def test_a_limit_is_a_beginning_and_batches_do_not_matter(benchmarks, cache):
    model, tokenizer = llama(), toy_tokenizer()
    whole = score(model, tokenizer, "piqa", data=benchmarks, cache_dir=cache)
    part = score(model, tokenizer, "piqa", limit=4, batch_size=1, data=benchmarks, cache_dir=cache)
    assert [row["id"] for row in part] == [row["id"] for row in whole[:4]]
    for one, other in zip(part, whole, strict=False):
        np.testing.assert_allclose(one["logprobs"], other["logprobs"], **FP32)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"task": "arc_esy"}, "there is no task 'arc_esy'; there are arc_challenge"),
        ({"split": "train"}, "split must be validation or test"),
        ({"limit": 0}, "limit must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
    ],
)
def test_a_wrong_argument_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        score(None, None, **{"task": "arc_easy", **wrong})


def test_every_benchmark_has_a_task_file_and_no_other():
    assert task_names() == sorted(MultipleChoice.builder_configs) == sorted(PROMPTS)


def test_the_command_writes_a_row_per_item(benchmarks, tmp_path, monkeypatch, capsys):
    llama().save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(harness, "fetched", lambda name: benchmarks)
    level = logging.getLogger("lm_eval").level
    options = ["--task", "hellaswag", "--split", "test", "--limit", "3", "--output", str(tmp_path / "rows.jsonl")]
    try:
        assert main(["harness", str(tmp_path / "model"), *options]) == 0
    finally:
        logging.getLogger("lm_eval").setLevel(level)
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"id", "answer", "logprobs", "acc", "acc_norm"}] * 3
    share = sum(row["acc"] for row in rows) / 3
    assert f"hellaswag test: acc {100 * share:.1f} +- " in said
    assert main(["harness", str(tmp_path / "none"), "--task", "hellaswag"]) == 2
    assert "there is no run folder" in capsys.readouterr().err


def rows_of(right, said) -> list[dict]:
    """Items with two choices, the first one right; said is its probability."""
    logprobs = np.stack([np.log(said), np.log1p(-np.array(said))], axis=1).tolist()
    return [
        {"id": str(i), "answer": 0, "logprobs": pair, "acc": bool(is_right), "acc_norm": not is_right}
        for i, (is_right, pair) in enumerate(zip(right, logprobs, strict=True))
    ]


def test_a_comparison_counts_what_changed():
    first = rows_of([1, 1, 0, 0, 0], [0.5] * 5)
    second = rows_of([1, 0, 1, 1, 0], [0.6, 0.4, 0.7, 0.7, 0.5])
    found = compare(first, second)
    assert (found.items, found.gained, found.lost) == (5, 2, 1)
    assert (found.first, found.second) == (0.4, 0.6)
    assert found.points == pytest.approx(20)
    assert found.mcnemar_p == 1.0
    assert found.nats == pytest.approx(np.mean(np.log(np.array([0.6, 0.4, 0.7, 0.7, 0.5]) / 0.5)))
    norm = compare(first, second, "acc_norm")
    assert (norm.points, norm.gained, norm.lost) == (pytest.approx(-20), 1, 2)
    assert compare(first, second) == found
    assert "40.0 -> 60.0 %: +20.00 points" in str(found)


def test_equal_models_do_not_differ():
    rows = rows_of([1, 0, 1], [0.9, 0.2, 0.8])
    found = compare(rows, rows)
    assert (found.points, found.points_interval, found.mcnemar_p, found.wilcoxon_p) == (0, (0, 0), 1, 1)


def test_the_answers_log_probability_is_among_the_choices():
    row = {"answer": 1, "logprobs": [-7.0, -6.0, -8.0]}
    assert exp(answer_logprob(row)) == pytest.approx(exp(-6) / (exp(-7) + exp(-6) + exp(-8)))


def test_mcnemar_is_the_coin():
    """p is the chance that as many or more of the differing items fall to one side, either one."""
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(1, 9) == mcnemar_p(9, 1) == pytest.approx(2 * (comb(10, 0) + comb(10, 1)) / 2**10)
    assert mcnemar_p(600, 700) == pytest.approx(0.006, abs=5e-4)  # far beyond what a float holds of 2**1300


def test_an_interval_holds_the_truth_as_often_as_it_says(monkeypatch):
    """95 % of the intervals hold the true difference, give or take four standard errors of 120 draws."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    held = []
    for _ in range(120):
        first, second = rng.random(60) < 0.5, rng.random(60) < 0.7
        low, high = compare(rows_of(first, [0.5] * 60), rows_of(second, [0.5] * 60)).points_interval
        held.append(low <= 20 <= high)
    assert np.mean(held) >= 0.87


@pytest.mark.parametrize("second", [[], [{"id": "1"}], [{"id": "0"}, {"id": "1"}]])
def test_other_items_are_not_compared(second):
    with pytest.raises(ValueError, match="same items in the same order"):
        compare([{"id": "0"}], second)
    with pytest.raises(ValueError, match="metric must be acc or acc_norm"):
        compare([{"id": "0"}], second, "accuracy")
