"""Sampled depth for `transformers.Trainer`: a collator that adds the loop count to each batch."""

import math
from collections.abc import Callable

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from .depth import DepthSampler


def stack_rows(rows: list[dict]) -> dict:
    """Rows of `encode_rows` as {"input_ids": (b, T), "shift_labels": (b, 1), "logits_to_keep": 1}, without padding.

    Raises ValueError for rows of different lengths.
    """
    lengths = sorted({len(row["input_ids"]) for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"a batch holds rows of one length, got {lengths}: keep one hop count, or use HopBatches.")
    return {
        "input_ids": torch.tensor([row["input_ids"] for row in rows]),
        "shift_labels": torch.tensor([row["shift_labels"] for row in rows]),
        "logits_to_keep": 1,
    }


class LoopCollator:
    """Adds `num_loops` = `depth(update)` to the batches that `collate` makes: sampled depth for stock Trainer.

    All micro-batches of an update have the same loop count, on every rank. The collator counts its calls from
    `start_at`; `LoopCollatorCallback(collator)` keeps that count right when a Trainer resumes or evaluates. For hop
    rows also set `TrainingArguments(label_names=["shift_labels"])`: Trainer drops columns that it does not know.
    """

    def __init__(self, depth: DepthSampler, collate: Callable[[list], dict] = stack_rows):
        self.depth, self.collate = depth, collate
        self.drawing, self.label_smoothing = True, 0.0
        self.start_at(0)

    def start_at(self, update: int, accumulation_steps: int = 1, passed_over: int = 0):
        """The next batch is the first micro-batch of `update`.

        passed_over: micro-batches before it that Trainer collates and throws away.
        """
        self._next, self._accumulation_steps = update * accumulation_steps - passed_over, accumulation_steps
        self._calls = 0

    def __call__(self, rows: list) -> dict:
        batch = self.collate(rows)
        if self.label_smoothing and "labels" not in batch:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing} smooths `labels`, which these rows do not have: give "
                "them `labels` instead of `shift_labels`, or leave it out."
            )
        if not self.drawing:
            return batch
        worker = torch.utils.data.get_worker_info()
        # Each worker of a DataLoader has its own copy of this object and collates every num_workers-th batch.
        micro_batch = self._calls if worker is None else self._calls * worker.num_workers + worker.id
        self._calls += 1
        return batch | {"num_loops": self.depth((self._next + micro_batch) // self._accumulation_steps)}


class LoopCollatorCallback(TrainerCallback):
    """Tells a `LoopCollator` which update the Trainer is at, so that a resumed training replays the same loop counts.

    Evaluation batches get no `num_loops` (the model's default is used) and are not counted. Raises ValueError for
    settings under which the count would be wrong: persistent workers, a stream that one process reads for others,
    `label_smoothing_factor` without `labels`.
    """

    def __init__(self, collator: LoopCollator):
        self.collator = collator
        self._in_epoch = self._resumes = False

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if args.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers must be off: such workers never learn the update they are at."
            )
        if args.world_size > 1 and isinstance(train_dataloader, DataLoaderDispatcher):
            raise ValueError(
                "dispatch_batches must be off: one process would read the stream, and draw depths, for all. Set "
                'accelerator_config={"dispatch_batches": False}.'
            )
        self.collator.drawing = self._in_epoch = False
        self.collator.label_smoothing = args.label_smoothing_factor
        self._resumes = state.global_step > 0 and not args.ignore_data_skip

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        streams = train_dataloader is not None and isinstance(train_dataloader.dataset, IterableDataset)
        passed_over = self._passed_over(args, state, train_dataloader) if streams and self._resumes else 0
        self.collator.start_at(state.global_step, args.gradient_accumulation_steps, passed_over)
        self.collator.drawing = self._in_epoch = True
        self._resumes = False

    def _passed_over(self, args, state, train_dataloader) -> int:
        """Micro-batches of a stream that Trainer collates, and throws away, to resume within an epoch."""
        accumulated = args.gradient_accumulation_steps
        updates = math.ceil(len(train_dataloader) / accumulated) if has_length(train_dataloader) else state.max_steps
        return state.global_step % updates * accumulated

    def on_step_end(self, args, state, control, **kwargs):
        self.collator.drawing = not control.should_evaluate

    def on_evaluate(self, args, state, control, **kwargs):
        self.collator.drawing = self._in_epoch

    def on_epoch_end(self, args, state, control, **kwargs):
        self.collator.drawing = self._in_epoch = False
