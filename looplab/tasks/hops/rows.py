"""The questions of a run, as groups of rows with one hop count and split kind."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders import encode_groups
from looplab.runs.folder import Run

from .data import HopData

BATCH = 512  # rows that go through the model at once


@dataclass(frozen=True)
class RowGroup:
    """Rows of one hop count and split kind: `input_ids` (N, T) ending in the readout token, `answers` (N,)."""

    hops: int
    split_kind: str
    input_ids: torch.Tensor
    answers: torch.Tensor


def groups_of(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[RowGroup]:
    """`rows` in groups by (split_kind, hops), sorted; of a larger group `limit` rows, the same every time.

    Raises:
        ValueError: two questions of one group have different lengths, or one has a word that the tokenizer lacks.
    """
    hops, kinds = np.array(rows["hops"][:]), np.array(rows["split_kind"][:])
    groups = []
    for kind, count in sorted(set(zip(kinds.tolist(), hops.tolist(), strict=True))):
        members = np.flatnonzero((kinds == kind) & (hops == count))
        if limit is not None and limit < len(members):
            members = np.sort(np.random.default_rng(0).choice(members, limit, replace=False))
        chosen = rows.select(members)
        if len({len(text.split()) for text in chosen["text"]}) > 1:
            raise ValueError(f"questions of {count} hops ({kind}) differ in length; a group must have one length.")
        groups.append(RowGroup(count, kind, *encode_groups(chosen, tokenizer)[count, kind]))
    return groups


def load_run_task(run: Run, **held_out) -> datasets.DatasetDict:
    """The splits of a run, from its recipe; on the machine that trained it, they are in the `datasets` cache.

    Args:
        held_out: fields of the builder that say which hop counts validation and test have, in place of the recipe's:
            max_hops, held_out_hops. Those that are None are left out. The rows of a hop count stay the same.

    Raises:
        ValueError: the builder lacks a field, max_hops is below the trained hop counts, or the run was trained on
            other data.
    """
    changed = {name: value for name, value in held_out.items() if value is not None}
    task = HopData.of(run).splits_of(run, **changed)
    run.check_data(task, only="train" if changed else None)
    return task


@torch.inference_mode()
def answered(
    model: PreTrainedModel, input_ids: torch.Tensor, answers: torch.Tensor, **arguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) bool, whether the argmax over the vocabulary at the readout is the answer; and (N,) loops used for it.

    Args:
        input_ids: (N, T), ending in the readout token.
        answers: (N,).
        arguments: of the model's forward: num_loops, halting.
    """
    right, loops = [], []
    for ids, gold in zip(input_ids.split(BATCH), answers.split(BATCH), strict=True):
        output = model(ids.to(model.device), logits_to_keep=1, use_cache=False, **arguments)
        right.append(output.logits[:, -1].argmax(-1).cpu() == gold)
        loops.append(output.loops_used[:, -1].cpu())
    return torch.cat(right), torch.cat(loops)


def facts_of_task(task: datasets.DatasetDict) -> dict[str, dict[str, str]]:
    """Entity -> relation -> entity: the graph of a hop task, from its training rows, which have every fact."""
    train = task["train"].select(np.flatnonzero(np.array(task["train"]["hops"][:]) == 1))
    facts = {}
    for text, answer in zip(train["text"][:], train["answer"][:], strict=True):
        entity, relation = text.split()
        facts.setdefault(entity, {})[relation] = answer
    return facts


def line_order(line: tuple[str, int]) -> tuple[int, str, int]:
    """Sorting key of a line (split kind, hops): trained kinds first, then held-out kinds, easy before hard."""
    kinds = ["atomic", "train", "id", "ood_first", "ood_second", "ood", "pair"]
    return kinds.index(line[0]) if line[0] in kinds else len(kinds), line[0], line[1]


def first_question_beyond(test_rows: datasets.Dataset, trained_hops: Sequence[int]) -> str:
    """The first test question with the smallest hop count that was not trained, or with the deepest if all were."""
    hops = test_rows["hops"][:]
    deepest = min(set(hops) - set(trained_hops), default=max(hops))
    return test_rows[hops.index(deepest)]["text"]


KIND_WORDS = {"atomic": "facts", "train": "training rows", "id": "held out", "ood": "out of distribution"}
