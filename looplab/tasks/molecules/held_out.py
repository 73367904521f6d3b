"""Held-out molecules: nats per token and per molecule."""

import math
from collections.abc import Sequence

import datasets
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders import PackedMolecules
from data_builders.molecule_batches import IGNORED
from looplab.runs.folder import Run

from .data import MoleculeData

LOSS_MOLECULES = 2_000


@torch.inference_mode()
def loss_of_molecules(model: PreTrainedModel, molecules: PackedMolecules, num_loops: int, limit: int) -> float:
    """Nats per token of the first `limit` molecules."""
    total = count = 0
    for numbers in torch.arange(min(limit, len(molecules))).split(64):
        rows = {name: value.to(model.device) for name, value in molecules.rows(numbers).items()}
        labels = rows.pop("shift_labels").flatten()
        logits = model(**rows, num_loops=num_loops, use_cache=False).logits.flatten(0, 1).float()
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels >= 0).sum())
    return total / count


class HeldOut:
    """Molecules whose every token a model predicts, one to a row: `nats` of each, in the order of the molecules.

    labels (M,): the tokens, `<eos>` included. owner (M,): the molecule that each belongs to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, smiles: Sequence[str], rows: int = 100):
        texts = [torch.tensor(tokenizer(text)["input_ids"]) for text in smiles]  # they begin with <bos>
        labels = [F.pad(text[1:], (0, 1), value=tokenizer.eos_token_id) for text in texts]
        self.labels = torch.cat(labels)
        self.owner = torch.repeat_interleave(torch.tensor([len(text) for text in texts]))
        self.batches = [
            # No token looks at what is filled up on the right.
            (
                pad_sequence(texts[start : start + rows], True, tokenizer.pad_token_id),
                pad_sequence(labels[start : start + rows], True, IGNORED),
            )
            for start in range(0, len(texts), rows)
        ]

    @torch.inference_mode()
    def nats(self, model: PreTrainedModel, num_loops: int) -> torch.Tensor:
        """(M,) cross-entropy of each token."""
        parts = []
        for ids, labels in self.batches:
            logits = model(ids.to(model.device), num_loops=num_loops, use_cache=False).logits
            real = labels >= 0
            parts.append(F.cross_entropy(logits[real.to(model.device)].float().cpu(), labels[real], reduction="none"))
        return torch.cat(parts)

    def mean_of(self, values: torch.Tensor, chosen: torch.Tensor) -> tuple[float, list[float]]:
        """Mean of the `chosen` (M,) of the values (M,), and its 95 % interval over molecules; of none, nan."""
        if not chosen.any():
            return math.nan, [math.nan] * 2
        molecules = int(self.owner.max()) + 1
        mean = values[chosen].mean()
        # How far each molecule pulls the ratio of sums, to first order.
        pulls = torch.zeros(molecules).index_add(0, self.owner[chosen], values[chosen] - mean)
        half = 1.96 * float(pulls.std()) * molecules**0.5 / int(chosen.sum())
        return float(mean), [float(mean) - half, float(mean) + half]


def run_molecules(run: Run) -> datasets.DatasetDict:
    """The splits of a run's molecules, as its recipe names them.

    Raises:
        ValueError: they are not those it was trained on (files changed, or another working folder).
    """
    splits = MoleculeData.of(run).load()
    trained_on = run.summary()["train_molecules"]
    if len(splits["train"]) != trained_on:
        raise ValueError(
            f"{run.folder} was trained on {trained_on} molecules and its recipe now gives {len(splits['train'])}, so "
            "that what is new cannot be told: restore the files its recipe names, or train again."
        )
    run.check_data(splits)
    return splits
