"""Laws of the collator for `Trainer`: one length and one depth per update, replayed after a resume."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer, TrainingArguments, default_data_collator

from data_builders import (
    DepthSampler,
    LoopCollator,
    LoopCollatorCallback,
    dataset_tokenizer,
    encode_rows,
    load_task,
)
from modeling_looped import LoopedConfig, LoopedForCausalLM

PAPER_DEPTH = {"kind": "poisson", "rate": 4, "minimum": 2, "maximum": 8}


@pytest.fixture(scope="module")
def dataset():
    return load_task("khop", "quickstart", train_hops=3, max_hops=8)


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return dataset_tokenizer(dataset)


class Rows:
    """The simplest collate function that reaches a worker."""

    def __call__(self, rows: list) -> dict:
        return {"rows": rows}


class Stream(IterableDataset):
    """Rows in their order, every other one to each of two workers."""

    def __init__(self, rows: list):
        self.rows = rows

    def __iter__(self):
        worker = get_worker_info()
        return iter(self.rows if worker is None else self.rows[worker.id :: worker.num_workers])


class Sized(Stream):
    """One that says how long it is, as some streams do: an epoch ends there."""

    def __len__(self):
        return len(self.rows)


def test_collator_batches_equal_lengths_only(dataset, tokenizer):
    rows = encode_rows(dataset["test"], tokenizer).select_columns(["input_ids", "shift_labels"]).to_list()
    collator = LoopCollator(DepthSampler(**PAPER_DEPTH))
    batch = collator(rows[:8])
    assert batch["input_ids"].shape == (8, 4)
    assert batch["shift_labels"].shape == (8, 1)
    assert batch["logits_to_keep"] == 1
    with pytest.raises(ValueError, match=r"one length, got \[4, 5\]"):
        collator(rows[36:44])


def test_collator_draws_one_depth_per_update():
    """Micro-batches of an update share its depth; a counter set to a step goes on as if it had counted there."""
    depth = DepthSampler(**PAPER_DEPTH)
    collator = LoopCollator(depth, collate=lambda rows: {"rows": rows})
    assert [collator([1])["num_loops"] for _ in range(6)] == [depth(step) for step in range(6)]
    collator.start_at(10, accumulation_steps=2)
    assert [collator([1])["num_loops"] for _ in range(6)] == [depth(step) for step in (10, 10, 11, 11, 12, 12)]


def test_collator_counts_over_workers():
    """Each worker of a DataLoader has its own counter; the batches still get the depths of their place."""
    depth = DepthSampler(**PAPER_DEPTH)
    loader = DataLoader(list(range(12)), batch_size=1, num_workers=2, collate_fn=LoopCollator(depth, Rows()))
    assert [batch["num_loops"] for batch in loader] == [depth(step) for step in range(12)]


@pytest.mark.slow
def test_stock_trainer_replays_the_depths_after_a_resume(tmp_path, dataset, tokenizer):
    """Evaluations in between neither move the count nor draw a depth: they run the model's own number of loops."""
    two_hops = encode_rows(dataset["train"].filter(lambda hops: hops == 2, input_columns="hops"), tokenizer)
    depth = DepthSampler(**PAPER_DEPTH, seed=7)

    def train(folder: str, max_steps: int, resume: bool = False) -> tuple[list[int], list[int], torch.Tensor]:
        torch.manual_seed(0)
        config = LoopedConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_attention_heads=2, num_core_layers=1,
            max_position_embeddings=16, num_loops=3, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model = LoopedForCausalLM(config)
        trained, evaluated = [], []

        def note(module, args, kwargs):
            (trained if module.training else evaluated).append(kwargs.get("num_loops"))

        model.register_forward_pre_hook(note, with_kwargs=True)
        collator = LoopCollator(depth)
        arguments = TrainingArguments(
            output_dir=tmp_path / folder, max_steps=max_steps, per_device_train_batch_size=32, learning_rate=1e-3,
            gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=120,
            save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
            lr_scheduler_type="constant", logging_strategy="no", label_names=["shift_labels"],
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, data_collator=collator, train_dataset=two_hops, eval_dataset=two_hops,
            callbacks=[LoopCollatorCallback(collator)],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        trainer.evaluate()
        trainer.evaluate()
        return trained, evaluated, torch.cat([parameter.flatten() for parameter in model.parameters()])

    # 240 rows are 8 batches, 4 updates an epoch: the run goes through two of them and stops within the second.
    trained, evaluated, weights = train("whole", 7)
    assert trained == [depth(step) for step in range(7) for _ in range(2)]
    assert set(evaluated) == {None}
    train("parts", 3)
    resumed, _, resumed_weights = train("parts", 7, resume=True)
    assert resumed == [depth(step) for step in range(3, 7) for _ in range(2)]
    torch.testing.assert_close(resumed_weights, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulated", "workers", "sized", "skips"),
    [(1, 0, False, True), (2, 0, True, True), (2, 2, False, True), (1, 2, True, True), (1, 0, False, False)],
)
def test_stock_trainer_replays_the_depths_of_a_stream(tmp_path, accumulated, workers, sized, skips):
    """To resume within an epoch of a stream Trainer collates the batches again that were seen: their calls moved the
    count, and the resumed run had other depths."""
    rows = [{"input_ids": [i, i + 1, 3], "labels": [i, i + 1, 3]} for i in range(32)]
    depth = DepthSampler(**PAPER_DEPTH, seed=7)

    def train(max_steps: int, resume: bool = False) -> list[int]:
        config = LoopedConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_attention_heads=2)
        model, trained = LoopedForCausalLM(config), []
        model.register_forward_pre_hook(lambda _, args, given: trained.append(given["num_loops"]), with_kwargs=True)
        collator = LoopCollator(depth, default_data_collator)
        arguments = TrainingArguments(
            tmp_path, max_steps=max_steps, per_device_train_batch_size=4, save_steps=3, report_to=[],
            gradient_accumulation_steps=accumulated, dataloader_num_workers=workers, ignore_data_skip=not skips,
            disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_strategy="no",
            remove_unused_columns=False,
        )  # fmt: skip
        stream = (Sized if sized else Stream)(rows)
        trainer = Trainer(
            model, arguments, data_collator=collator, train_dataset=stream, callbacks=[LoopCollatorCallback(collator)]
        )
        trainer.train(resume_from_checkpoint=resume)
        return trained

    expected = [depth(step) for step in range(6) for _ in range(accumulated)]
    assert train(3) == expected[: 3 * accumulated]
    assert train(6, resume=True) == expected[3 * accumulated :]
