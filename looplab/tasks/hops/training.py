"""Training on chains of hops: the answer is read at one token, and deeper chains are added when shallower ones are
learnt."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import DatasetDict

from data_builders import DepthSampler, HopBatches, dataset_tokenizer, encode_groups
from looplab.instruments.at_loops import at_loops
from looplab.tasks.stages import Stages
from looplab.tasks.training import StagedTraining, State, TrainingRecipe, load_tokenizer
from modeling_looped import LoopedForCausalLM

# Held-out rows in one forward pass.
CHECKED_ROWS = 512


class HopTraining(StagedTraining):
    """Stage k trains on 1 .. k hops. The held-out check is measured on the split validation, never on test."""

    logits_to_keep = 1
    generation = {"max_new_tokens": 1}  # noqa: RUF012

    def __init__(
        self,
        recipe: TrainingRecipe,
        splits: DatasetDict,
        depth: DepthSampler,
        accelerator: Accelerator,
        kept_tokenizer: Path | None,
    ):
        self.recipe, self.depth, self.accelerator = recipe, depth, accelerator
        readout, curriculum = recipe.data.readout, recipe.curriculum
        self.padding = None if recipe.data.pad_to is None else "data.pad_to"
        if recipe.init_from is None:
            self.tokenizer = dataset_tokenizer(splits, readout=readout)
        else:
            self.tokenizer = load_tokenizer("init_from", recipe.init_from)
            if bool(self.tokenizer("")["input_ids"]) != (readout == "token"):
                raise ValueError(
                    f"data.readout is {readout}, but the tokenizer in {recipe.init_from} has the other one."
                )
        self.train_rows = splits["train"]
        self.held_out = encode_groups(splits["validation"], self.tokenizer)
        self.held_out_hops = sorted({hops for hops, _ in self.held_out})
        self.train_hops = sorted(self.train_rows.unique("hops"))
        deepest = self.train_hops[-1]
        self.stages = Stages(
            curriculum, self.train_hops, self.held_out_hops, curriculum.start_hops or deepest,
            curriculum.stop_hops or deepest, ("start_hops", "stop_hops", "hops"),
        )  # fmt: skip

    def begin(self, state: State) -> None:
        """Train on 1 .. `state.stage` hops."""
        data = self.recipe.data
        self.batches = HopBatches(
            self.train_rows, self.tokenizer, self.recipe.batch_size, self.recipe.seed, self.depth,
            hops=[k for k in self.train_hops if k <= state.stage], rank=self.accelerator.process_index,
            world=self.accelerator.num_processes, weighting=data.weighting, at_least_hops=data.at_least_hops,
            pad_to=data.pad_to,
        )  # fmt: skip

    def most_loops(self) -> dict[str, int]:
        return {"data.at_least_hops": self.stages.stop} if self.recipe.data.at_least_hops else {}

    def rows_of(self, step: int) -> list[int]:
        return self.batches.chosen(step).tolist()

    def describe(self, batch: dict, state: State) -> dict:
        return {"stage": state.stage, "hops": batch["hops"]}

    def check(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """Accuracy of each hop count up to the stage's, also at each of `eval_loops`."""
        hops = [k for k in self.held_out_hops if k <= state.stage]
        accuracy = self.accuracy(model, hops, [num_loops, *self.recipe.eval_loops])
        row = {"stage": state.stage} | by_kind(accuracy[num_loops])
        state.gate = row["gate"]
        if self.recipe.eval_loops:
            row["gate_at_loops"] = {str(loops): accuracy[loops] for loops in self.recipe.eval_loops}
        return row

    def accuracy(
        self, model: LoopedForCausalLM, hops: Sequence[int], loops: Sequence[int]
    ) -> dict[int, dict[str, float]]:
        return held_out_accuracy(self.accelerator, model, self.held_out, hops, loops)

    def summary(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """The stage reached, the accuracy of all hop counts, and the trained hop counts."""
        return {
            "stage": state.stage,
            "learnable_depth": state.learnable_depth,
            **by_kind(self.accuracy(model, self.held_out_hops, [num_loops])[num_loops]),
            "trained_hops": [k for k in self.train_hops if k <= state.stage],
        }

    def headline(self, summary: dict) -> str:
        return f"learnable depth {summary['learnable_depth']}, held-out accuracy {summary['gate']}"


def by_kind(accuracy: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The result of `held_out_accuracy` as fields of metrics.jsonl: by hop count, and by hop count and split kind."""
    return {
        "gate": {key: value for key, value in accuracy.items() if key.isdigit()},
        "gate_by_split_kind": {key: value for key, value in accuracy.items() if not key.isdigit()},
    }


@torch.no_grad()
def held_out_accuracy(
    accelerator: Accelerator,
    model: LoopedForCausalLM,
    rows: Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]],
    hops: Sequence[int],
    loops: Sequence[int],
) -> dict[int, dict[str, float]]:
    """Loop count -> share of rows whose answer is the argmax over the vocabulary at the readout. The ranks divide the
    rows.

    rows: (hops, split_kind) -> (input_ids (N, T), answers (N,)). Shares have the keys "2", "3" .. for hop counts and
    "2 id", "2 ood" .. for their split kinds.
    """
    counts = sorted(set(loops))
    right, total = Counter(), Counter()
    model.eval()
    for (k, split_kind), group in rows.items():
        if k not in hops:
            continue
        correct = torch.zeros(len(counts), device=accelerator.device)
        share = (part[accelerator.process_index :: accelerator.num_processes].split(CHECKED_ROWS) for part in group)
        for input_ids, answers in zip(*share, strict=True):
            if not len(answers):  # a process may have none
                continue
            input_ids, answers = input_ids.to(accelerator.device), answers.to(accelerator.device)

            def read(logits: torch.Tensor, answers: torch.Tensor = answers) -> torch.Tensor:  # (b, 1, V)
                return (logits[:, -1].argmax(-1) == answers).sum()

            said = at_loops(model, counts, read, logits_to_keep=1, input_ids=input_ids)
            correct += torch.stack(list(said.values()))
        found = dict(zip(counts, accelerator.reduce(correct).tolist(), strict=True))
        for key in (str(k), f"{k} {split_kind}"):
            total[key] += len(group[1])
            for count in counts:
                right[count, key] += found[count]
    model.train()
    return {count: {key: right[count, key] / total[key] for key in total} for count in counts}
