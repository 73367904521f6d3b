"""The loss of held-out molecules, in nats per token."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import datasets
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders import PackedMolecules
from data_builders.packing import IGNORED
from looplab.instruments.at_loops import at_loops
from looplab.runs.folder import Run

from .data import MoleculeData

LOSS_MOLECULES = 2_000  # test molecules that `looped eval` measures the loss on


@torch.inference_mode()
def loss_of_molecules(
    model: PreTrainedModel, molecules: PackedMolecules, loops: Collection[int], limit: int
) -> dict[int, float]:
    """Loop count -> nats per token of the first `limit` molecules."""
    totals, count = Counter(), 0
    number = min(limit, len(molecules))
    with tqdm(total=number, desc="loss", unit="molecule", mininterval=1) as bar:
        for numbers in torch.arange(number).split(64):
            rows = {name: value.to(model.device) for name, value in molecules.rows(numbers).items()}
            labels = rows.pop("shift_labels").flatten()

            def read(logits: torch.Tensor, labels: torch.Tensor = labels) -> float:  # (b, T, V)
                return F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum").item()

            totals.update(at_loops(model, loops, read, **rows))
            count += int((labels >= 0).sum())
            bar.update(len(numbers))
    return {num_loops: total / count for num_loops, total in totals.items()}


class HeldOut:
    """Molecules, one per batch row; `nats` gives the loss of each of their M tokens, molecule after molecule.

    labels (M,): the tokens, with `<eos>`. owner (M,): number of the molecule that a token belongs to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, smiles: Sequence[str], rows: int = 100):
        texts = [torch.tensor(tokenizer(text)["input_ids"]) for text in smiles]  # they begin with <bos>
        labels = [F.pad(text[1:], (0, 1), value=tokenizer.eos_token_id) for text in texts]
        self.labels = torch.cat(labels)
        self.owner = torch.repeat_interleave(torch.tensor([len(text) for text in texts]))
        self.batches = [
            # Padding is on the right, where no token attends to it.
            (
                pad_sequence(texts[start : start + rows], True, tokenizer.pad_token_id),
                pad_sequence(labels[start : start + rows], True, IGNORED),
            )
            for start in range(0, len(texts), rows)
        ]

    def inputs(self) -> Iterator[dict[str, torch.Tensor]]:
        """The molecules as inputs of calls, `input_ids` and `shift_labels` (b, T) each."""
        for ids, labels in self.batches:
            yield {"input_ids": ids, "shift_labels": labels}

    @torch.inference_mode()
    def nats(self, model: PreTrainedModel, num_loops: int) -> torch.Tensor:
        """Cross-entropy (M,) of each token, in nats."""
        parts = []
        for ids, labels in self.batches:
            logits = model(ids.to(model.device), num_loops=num_loops, use_cache=False).logits
            real = labels >= 0
            parts.append(F.cross_entropy(logits[real.to(model.device)].float().cpu(), labels[real], reduction="none"))
        return torch.cat(parts)

    def mean_of(self, values: torch.Tensor, chosen: torch.Tensor) -> tuple[float, list[float]]:
        """Mean of the values (M,) where `chosen` (M,) is True, and its 95 % interval over molecules; nan of none."""
        if not chosen.any():
            return math.nan, [math.nan] * 2
        molecules = int(self.owner.max()) + 1
        mean = values[chosen].mean()
        # Influence of each molecule on the ratio of sums, to first order.
        pulls = torch.zeros(molecules).index_add(0, self.owner[chosen], values[chosen] - mean)
        half = 1.96 * float(pulls.std()) * molecules**0.5 / int(chosen.sum())
        return float(mean), [float(mean) - half, float(mean) + half]


def run_molecules(run: Run) -> datasets.DatasetDict:
    """The splits of a run's molecules, by its recipe.

    Raises:
        ValueError: the run was trained on other molecules (files changed, or another working folder).
    """
    splits = MoleculeData.of(run).splits_of(run)
    trained_on = run.summary()["train_molecules"]
    if len(splits["train"]) != trained_on:
        raise ValueError(
            f"{run} was trained on {trained_on} molecules and its recipe now gives {len(splits['train'])}, so "
            f"that what is new cannot be told{run.data_changes(splits)}: restore the files its recipe names, say by "
            "--data.files where they are now, or train again."
        )
    run.check_data(splits)
    return splits
