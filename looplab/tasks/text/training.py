"""Training on plain text: blocks of one length, cut from a stream of tokens."""

from pathlib import Path

from accelerate import Accelerator
from datasets import DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_builders import DepthSampler, dataset_byte_bpe
from looplab.runs.models import blaming
from looplab.tasks.language.training import LanguageTraining
from looplab.tasks.training import State, TrainingRecipe, load_tokenizer
from modeling_looped import LoopedForCausalLM


class TextTraining(LanguageTraining):
    """Plain text."""

    generation = {}  # noqa: RUF012

    def __init__(
        self,
        recipe: TrainingRecipe,
        splits: DatasetDict,
        depth: DepthSampler,
        accelerator: Accelerator,
        kept_tokenizer: Path | None,
    ):
        self.recipe, self.accelerator = recipe, accelerator
        length, source = recipe.data.sequence_length, recipe.data.source
        with accelerator.main_process_first():
            self.tokenizer = find_tokenizer(recipe, splits, kept_tokenizer)
            self.batches = source.batches(
                splits["train"],
                self.tokenizer,
                recipe,
                depth,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
            )
            self.held_out = source.blocks(splits["validation"], self.tokenizer)
            # `looped eval` needs a block of the split test: raise now, not when the training is done.
            source.blocks(splits["test"], self.tokenizer)
        self.num_held_out = len(self.held_out)
        if recipe.data.validation_tokens is not None:
            self.num_held_out = min(self.num_held_out, max(1, recipe.data.validation_tokens // length))

    def sizes(self, batch: dict) -> tuple[int, int]:
        return batch["num_labels"], batch["input_ids"].numel() * self.accelerator.num_processes

    def rows_of(self, step: int) -> list[int]:
        return self.batches.chosen(step).tolist()

    def summary(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """The result of the last check, after the last update, and the numbers of tokens."""
        held_out = {"held_out_tokens": self.num_held_out * self.held_out.sequence_length}
        return self.measured(state, num_loops) | self.trained_on() | held_out

    def trained_on(self) -> dict:
        """The numbers of the training text for summary.json."""
        return {"train_tokens": self.batches.blocks.num_tokens}

    def headline(self, summary: dict) -> str:
        loss, perplexity = summary["held_out"].values()
        return (
            f"held-out text {loss:.3f} nats per token, perplexity {perplexity:.1f}, at {summary['gate_loops']} loops"
        )


def find_tokenizer(
    recipe: TrainingRecipe, splits: DatasetDict, kept_tokenizer: Path | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names; else the one that the run began with; else one learnt from the text."""
    tokens = None if recipe.data.tokens is None else f"{recipe.data.tokens}/tokenizer"
    named = {"init_from": recipe.init_from, "data.tokenizer": recipe.data.tokenizer, "data.tokens": tokens}
    for name, folder in named.items():
        if folder is not None and (kept_tokenizer is None or Path(folder).is_dir()):
            return load_tokenizer(name, folder)
    if kept_tokenizer is None:
        return dataset_byte_bpe(splits["train"], recipe.data.vocab_size)
    with blaming(kept_tokenizer, "delete it, and the tokenizer is learnt again."):
        return AutoTokenizer.from_pretrained(kept_tokenizer, trust_remote_code=False)
