"""Training on sequences of tokens in which every token predicts the next: the base of text and molecules."""

from collections.abc import Collection, Iterable, Iterator

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from data_builders import PackedMolecules, TextBlocks
from looplab.instruments.at_loops import at_loops
from looplab.tasks.training import State, TaskTraining
from modeling_looped import LoopedForCausalLM
from modeling_looped.losses_looped import exit_distribution

# Held-out tokens in one forward pass; its logits have this many times the vocabulary numbers.
CHECKED_TOKENS = 2048


class LanguageTraining(TaskTraining):
    """Every token has a label, there are no stages, and the held-out check is the loss.

    Attributes:
        held_out: the blocks or molecules of the split validation.
        num_held_out: how many of them are measured.
    """

    logits_to_keep = 0  # all positions
    held_out: TextBlocks | PackedMolecules
    num_held_out: int

    def check(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """Nats per token at `num_loops` and each of `eval_loops`; with an exit gate, also `held_out_exits`."""
        loops = dict.fromkeys([num_loops, *self.recipe.eval_loops])
        losses = held_out_loss(self.accelerator, model, self.held_out_rows(), loops)
        state.gate = {str(count): losses[count] for count in loops}
        row = self.measured(state, num_loops)
        if model.config.exit_gate:
            row["exits"] = held_out_exits(self.accelerator, model, self.held_out_rows(), num_loops)
        return row

    def measured(self, state: State, num_loops: int) -> dict:
        """Nats per token and perplexity of the last check."""
        # math.exp would raise for the huge loss of a model that went astray.
        values = {r: {"loss": loss, "perplexity": torch.tensor(loss).exp().item()} for r, loss in state.gate.items()}
        row = {"held_out": values[str(num_loops)]}
        if self.recipe.eval_loops:
            row["held_out_at_loops"] = {str(loops): values[str(loops)] for loops in self.recipe.eval_loops}
        return row

    def progress(self, state: State) -> dict:
        return {"held_out": next(iter(state.gate.values()), None)}

    def held_out_rows(self) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's share of the held-out sequences on its device, about CHECKED_TOKENS tokens at a time."""
        share = torch.arange(self.num_held_out)[self.accelerator.process_index :: self.accelerator.num_processes]
        for chosen in share.split(max(1, int(CHECKED_TOKENS / self.held_out.mean_length))):
            if len(chosen):  # a process may have none
                yield {name: value.to(self.accelerator.device) for name, value in self.held_out.rows(chosen).items()}


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator, model: LoopedForCausalLM, rows: Iterable[dict[str, torch.Tensor]], loops: Collection[int]
) -> dict[int, float]:
    """Loop count -> mean cross-entropy in nats per token, over the labels of all batches of all ranks."""
    counts = sorted(loops)
    totals = torch.zeros(len(counts), dtype=torch.float64, device=accelerator.device)
    number = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
    model.eval()
    for batch in rows:
        labels = batch.pop("shift_labels").flatten()

        def read(logits: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:  # (b, T, V)
            return F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")

        totals += torch.stack(list(at_loops(model, counts, read, **batch).values()))
        number += (labels >= 0).sum()
    model.train()
    means = accelerator.reduce(totals) / accelerator.reduce(number)
    return dict(zip(counts, means.tolist(), strict=True))


@torch.no_grad()
def held_out_exits(
    accelerator: Accelerator, model: LoopedForCausalLM, rows: Iterable[dict[str, torch.Tensor]], num_loops: int
) -> dict[str, float]:
    """What tokens would do under the exit gate, as means over the labels of all batches of all ranks.

    expected_loss: loss after the loop at which a token halts, in nats. mean_loop: that loop, from 1 to num_loops.
    entropy: entropy of the gate's distribution over loops, in nats.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    model.eval()
    for batch in rows:
        gate_logits, losses = model.exits(**batch, num_loops=num_loops)  # (b, T, R)
        p, loops = exit_distribution(gate_logits), torch.arange(1, num_loops + 1, device=gate_logits.device)
        each = torch.stack([(p * losses).sum(-1), (p * loops).sum(-1), torch.special.entr(p).sum(-1)])
        kept = batch["shift_labels"] != -100
        totals += torch.cat([each[:, kept].double().sum(1), kept.sum().double()[None]])
    model.train()
    *sums, tokens = accelerator.reduce(totals).tolist()
    return dict(zip(("expected_loss", "mean_loop", "entropy"), (value / tokens for value in sums), strict=True))
