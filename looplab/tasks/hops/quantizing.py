"""`looped quantize` on hops: calibrates on training questions, and measures test questions of trained hop counts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplab.instruments.at_loops import at_loops
from looplab.runs.folder import Run
from looplab.tasks.quantizing import Quantizing

from .rows import BATCH, answered, groups_of, load_run_task


class HopQuantizing(Quantizing):
    """Questions, in batches of one hop count; the loss is that of the answer."""

    rows, unit = "the training questions", "answer"

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase):
        task, trained = load_run_task(run), run.summary()["trained_hops"]
        self.train, self.test = (
            [group for group in groups_of(task[split], tokenizer) if group.hops in trained]
            for split in ("train", "test")
        )
        self.owner = torch.cat([torch.full((len(group.answers),), i) for i, group in enumerate(self.train)])
        self.row = torch.cat([torch.arange(len(group.answers)) for group in self.train])
        self.test_tokens = sum(group.input_ids.numel() for group in self.test)

    def __len__(self) -> int:
        return len(self.owner)

    def calibration(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        chosen = [self.row[numbers[self.owner[numbers] == i]] for i in range(len(self.train))]
        parts = [group.input_ids[rows] for group, rows in zip(self.train, chosen, strict=True) if len(rows)]
        return [batch for part in parts for batch in part.split(BATCH)]

    @torch.inference_mode()
    def losses(self, model: PreTrainedModel, loops: Sequence[int]) -> dict[int, torch.Tensor]:
        parts = []
        for group in self.test:
            for ids, answers in zip(group.input_ids.split(BATCH), group.answers.split(BATCH), strict=True):

                def read(logits: torch.Tensor, answers: torch.Tensor = answers) -> torch.Tensor:
                    return F.cross_entropy(logits[:, -1].float().cpu(), answers, reduction="none").double()

                parts.append(at_loops(model, loops, read, input_ids=ids.to(model.device), logits_to_keep=1))
        return {count: torch.cat([part[count] for part in parts]) for count in loops}

    def measure(self, model: PreTrainedModel, num_loops: int, losses: torch.Tensor) -> dict:
        right = [answered(model, each.input_ids, each.answers, num_loops=num_loops)[0] for each in self.test]
        return {"accuracy": torch.cat(right).double().mean().item(), "loss": losses.mean().item()}
