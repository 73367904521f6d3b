"""`looped quantize` on molecules: training molecules to calibrate on, test molecules to measure on."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders import PackedMolecules
from looplab.instruments.at_loops import at_loops
from looplab.runs.folder import Run
from looplab.tasks.quantizing import Quantizing

from .data import MoleculeData
from .held_out import LOSS_MOLECULES, run_molecules

BATCH = 64  # molecules that go through the model at once


class MoleculeQuantizing(Quantizing):
    """Molecules, in batches of one length."""

    rows, unit = "the training molecules", "token"

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase):
        splits, length = run_molecules(run), MoleculeData.of(run).sequence_length
        self.bos = tokenizer.bos_token_id
        self.train, test = (PackedMolecules(splits[split], tokenizer, length) for split in ("train", "test"))
        numbers = range(min(len(test), LOSS_MOLECULES))
        self.test = one_length(test, numbers, self.bos)
        self.test_tokens = sum(labels.numel() for _, labels in self.test)

    def __len__(self) -> int:
        return len(self.train)

    def calibration(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        return [ids for ids, _ in one_length(self.train, numbers.tolist(), self.bos)]

    @torch.inference_mode()
    def losses(self, model: PreTrainedModel, loops: Sequence[int]) -> dict[int, torch.Tensor]:
        parts = []
        for ids, labels in self.test:

            def read(logits: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:
                each = F.cross_entropy(logits.float().cpu().flatten(0, 1), labels.flatten(), reduction="none")
                return each.view_as(labels).double().mean(1)

            parts.append(at_loops(model, loops, read, input_ids=ids.to(model.device)))
        return {count: torch.cat([part[count] for part in parts]) for count in loops}

    def measure(self, model: PreTrainedModel, num_loops: int, losses: torch.Tensor) -> dict:
        return {"loss": losses.mean().item()}


def one_length(
    molecules: PackedMolecules, numbers: Iterable[int], bos: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) (b, T) of some molecules in batches of one length; they begin with <bos> and end with <eos>."""
    by_length = defaultdict(list)
    for number in numbers:
        tokens = molecules.tokens(number)
        by_length[len(tokens)].append(torch.tensor([bos, *tokens.tolist()]))
    rows = [part for _, same in sorted(by_length.items()) for part in torch.stack(same).split(BATCH)]
    return [(part[:, :-1], part[:, 1:]) for part in rows]
