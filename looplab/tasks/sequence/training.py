"""Training on questions: the answer is learnt token by token, and harder grades are added when easier ones are
learnt."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from data_builders import DepthSampler, OneLength, PackedSequences, sequence_bpe, sequence_tokenizer
from looplab.runs.models import blaming
from looplab.tasks.stages import Stages
from looplab.tasks.training import StagedTraining, State, TrainingRecipe, load_tokenizer
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.masks_looped import PATTERNS, Pattern

from .data import LEARNT
from .measures import said_at
from .rows import encoded, groups_of


class SequenceTraining(StagedTraining):
    """Stage g trains on the grades up to g. The held-out check is measured on the split validation, never on test."""

    logits_to_keep = 0  # answers differ in length

    def __init__(
        self,
        recipe: TrainingRecipe,
        splits: DatasetDict,
        depth: DepthSampler,
        accelerator: Accelerator,
        kept_tokenizer: Path | None,
    ):
        self.recipe, self.depth, self.accelerator = recipe, depth, accelerator
        data, curriculum = recipe.data, recipe.curriculum
        self.pattern = attention_pattern(recipe)
        self.padding = "data.batching packed" if data.batching == "packed" else None
        with accelerator.main_process_first():
            self.tokenizer = find_tokenizer(recipe, splits, kept_tokenizer)
            # `looped eval` needs the split test: raise now, not when the training is done.
            self.rows = encoded(data, splits, self.tokenizer, longest=longest_row(recipe), limit=LIMIT)
        train, held_out = self.rows["train"], self.rows["validation"]
        self.groups = groups_of(held_out, data.validation_rows)
        self.train_grades = sorted(set(train.grades.tolist()))
        self.stages = Stages(
            curriculum, self.train_grades, sorted({grade for grade, _ in self.groups}),
            curriculum.start_grade if curriculum.start_grade is not None else self.highest_of(curriculum.stop_grade),
            curriculum.stop_grade if curriculum.stop_grade is not None else self.highest_of(curriculum.start_grade),
            ("start_grade", "stop_grade", "grades"),
        )  # fmt: skip
        longest = max(int((rows.lengths - rows.firsts).max()) for rows in self.rows.values())
        self.generation = {} if data.in_place else {"max_new_tokens": longest}

    def highest_of(self, other: int | None) -> int | None:
        """The highest grade in training, where the `other` end of the curriculum is given."""
        return None if other is None else self.train_grades[-1]

    def begin(self, state: State) -> None:
        """Train on the grades up to that of `state.stage`."""
        data = self.recipe.data
        settings = {
            "grades": [grade for grade in self.train_grades if grade <= state.stage],
            "rank": self.accelerator.process_index,
            "world": self.accelerator.num_processes,
            "learn_all": data.loss == "all",
            "at_least_grade": data.at_least_grade,
            "token_types": self.pattern.tells_prompts,
        }
        rows, draws = self.rows["train"], (self.recipe.batch_size, self.recipe.seed, self.depth)
        if data.batching == "packed":
            length = data.sequence_length or int(rows.lengths.max())
            self.batches = PackedSequences(rows, length, *draws, **settings)
        else:
            self.batches = OneLength(rows, *draws, **settings)

    def most_loops(self) -> dict[str, int]:
        return {"data.at_least_grade": self.stages.stop} if self.recipe.data.at_least_grade else {}

    def sizes(self, batch: dict) -> tuple[int, int]:
        """Padding is counted among the input tokens, those of this rank for all ranks alike."""
        return batch["num_labels"], batch["input_ids"].numel() * self.accelerator.num_processes

    def rows_of(self, step: int) -> list[int]:
        return self.batches.chosen(step).tolist()

    def describe(self, batch: dict, state: State) -> dict:
        return {"stage": state.stage, "grade": batch["grade"]}

    def check(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """Share of right answers by grade up to the stage's, also at each of `eval_loops`; and nats per token."""
        held_out = sorted({grade for grade, _ in self.groups})
        grades = [grade for grade in held_out if grade <= state.stage] or held_out
        found = self.measured(model, grades, [num_loops, *self.recipe.eval_loops])
        row = {"stage": state.stage} | by_kind(found[num_loops])
        state.gate = row["gate"]
        if self.recipe.eval_loops:
            at_loops = {str(loops): by_kind(found[loops]) for loops in self.recipe.eval_loops}
            row["gate_at_loops"] = {loops: each["gate"] for loops, each in at_loops.items()}
            row["held_out_at_loops"] = {loops: each["held_out"] for loops, each in at_loops.items()}
        return row

    @torch.no_grad()
    def measured(self, model: LoopedForCausalLM, grades: Sequence[int], loops: Sequence[int]) -> dict[int, dict]:
        """Loop count -> `exact`, by "3" for a grade and "3 KIND" for a kind; `tokens`, the share of right tokens; and
        `loss` in nats per token. The ranks divide the rows."""
        counts, held_out = sorted(set(loops)), self.rows["validation"]
        lines = [line for line in self.groups if line[0] in grades]
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        model.eval()
        sums = torch.zeros(len(lines), len(counts), 5, dtype=torch.float64, device=self.accelerator.device)
        for i, line in enumerate(lines):
            said = said_at(model, held_out, self.groups[line][share], counts, one_pass=True)
            for j, count in enumerate(counts):
                each = said[count]
                parts = (each.exact, torch.ones(len(each.right)), each.right, each.labels, each.loss)
                sums[i, j] = torch.stack([part.double().sum() for part in parts])
        model.train()
        sums = self.accelerator.reduce(sums).cpu()
        return {count: shares(lines, sums[:, j]) for j, count in enumerate(counts)}

    def summary(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """The stage reached, the share of right answers of all grades, and the trained grades."""
        grades = sorted({grade for grade, _ in self.groups})
        return {
            "stage": state.stage,
            "learnable_depth": state.learnable_depth,
            **by_kind(self.measured(model, grades, [num_loops])[num_loops]),
            "trained_grades": [grade for grade in self.train_grades if grade <= state.stage],
            "rows": {name: len(rows) for name, rows in self.rows.items()},
        }

    def headline(self, summary: dict) -> str:
        gate, trained = summary["gate"], set(map(str, summary["trained_grades"]))
        known = [value for grade, value in gate.items() if grade in trained] or list(gate.values())
        return (
            f"{100 * sum(known) / len(known):.1f} % of the held-out answers right at {summary['gate_loops']} loops, "
            "mean over trained grades"
        )


def shares(lines: Sequence[tuple[int, str]], sums: torch.Tensor) -> dict:
    """The result of `SequenceTraining.measured` at one loop count. sums: (lines, 5) of right answers, answers, right
    tokens, tokens, nats."""
    totals = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
    for (grade, kind), values in zip(lines, sums, strict=True):
        for key in dict.fromkeys([str(grade), f"{grade} {kind}".strip()]):
            totals[key] += values
    whole = sums.sum(0)
    exact = {key: float(values[0] / values[1]) for key, values in totals.items()}
    return {"exact": exact, "tokens": float(whole[2] / whole[3]), "loss": float(whole[4] / whole[3])}


def by_kind(found: dict) -> dict[str, dict]:
    """The result of `shares` as fields of metrics.jsonl: by grade, by grade and kind, and of all tokens."""
    kinds = {key: value for key, value in found["exact"].items() if not key.isdigit()}
    return {
        "gate": {key: value for key, value in found["exact"].items() if key.isdigit()},
        **({"gate_by_kind": kinds} if kinds else {}),
        "held_out": {"tokens": found["tokens"], "loss": found["loss"]},
    }


LIMIT = "data.sequence_length or model.max_position_embeddings"


def model_field(recipe: TrainingRecipe, name: str):
    """A field of the model's configuration: of the folder `init_from`, or of the recipe, or its default."""
    default = LoopedConfig().to_dict()[name]
    if recipe.init_from is None:
        return recipe.model.get(name, default)
    with blaming(recipe.init_from, "name another folder in init_from."):
        return json.loads((Path(recipe.init_from) / "config.json").read_text(encoding="utf-8")).get(name, default)


def attention_pattern(recipe: TrainingRecipe) -> Pattern:
    """The attention pattern of the model. Raises ValueError for one that the answers cannot be read from."""
    pattern = PATTERNS[model_field(recipe, "attention_pattern")]
    if not pattern.takes_cache and not recipe.data.in_place:
        raise ValueError(
            "model.attention_pattern bidirectional sees the answer that it has to write: set data.answers in_place, "
            "or model.attention_pattern prefix."
        )
    if pattern.tells_prompts and (recipe.data.in_place or recipe.data.loss == "all"):
        said = "data.answers in_place" if recipe.data.in_place else "data.loss all"
        raise ValueError(
            f"model.attention_pattern prefix lets the prompt see itself, and {said} has labels there: use "
            f"{'bidirectional' if recipe.data.in_place else 'data.loss answer'}."
        )
    return pattern


def longest_row(recipe: TrainingRecipe) -> int:
    """The most tokens that a row may read: those that the model has positions for, or fewer if the recipe says so."""
    positions = model_field(recipe, "max_position_embeddings")
    return min(positions, recipe.data.sequence_length or positions)


def find_tokenizer(
    recipe: TrainingRecipe, splits: DatasetDict, kept_tokenizer: Path | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names, or one made of the split train.

    kept_tokenizer: in place of a folder that is gone.
    """
    data = recipe.data
    named = {"init_from": recipe.init_from, "data.tokenizer": data.tokenizer if data.cut is None else None}
    for name, folder in named.items():
        if folder is not None:
            gone = kept_tokenizer is not None and not Path(folder).is_dir()
            return load_tokenizer(name, str(kept_tokenizer) if gone else folder)
    texts = (text for row in splits["train"] for text in (row["prompt"], row["answer"]))
    readout = not data.in_place
    if data.cut == LEARNT:
        return sequence_bpe(texts, data.vocab_size, readout)
    return sequence_tokenizer(texts, data.cut, readout)
