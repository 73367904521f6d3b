"""Training on SMILES: several molecules are packed into a sequence, and none sees another."""

from pathlib import Path

from accelerate import Accelerator
from datasets import DatasetDict

from data_builders import DepthSampler, MoleculeBatches, PackedMolecules, dataset_smiles_tokenizer
from looplab.tasks.language.training import LanguageTraining
from looplab.tasks.training import State, TrainingRecipe, load_tokenizer
from modeling_looped import LoopedForCausalLM


class MoleculeTraining(LanguageTraining):
    """Packed molecules."""

    padding = "packing"
    # Sampling of SMolLM (Jindal and Ju 2026, arXiv 2605.06322).
    generation = {"do_sample": True, "temperature": 0.8, "top_k": 40, "max_new_tokens": 120}  # noqa: RUF012

    def __init__(
        self,
        recipe: TrainingRecipe,
        splits: DatasetDict,
        depth: DepthSampler,
        accelerator: Accelerator,
        kept_tokenizer: Path | None,
    ):
        self.recipe, self.accelerator = recipe, accelerator
        data = recipe.data
        with accelerator.main_process_first():
            if recipe.init_from is not None:
                self.tokenizer = load_tokenizer("init_from", recipe.init_from)
            else:
                self.tokenizer = dataset_smiles_tokenizer(splits)
            self.batches = MoleculeBatches(
                splits["train"], self.tokenizer, data.sequence_length, recipe.batch_size, recipe.seed, depth,
                rank=accelerator.process_index, world=accelerator.num_processes,
                spellings=data.spellings, spelling_seed=data.seed,
            )  # fmt: skip
            self.held_out = PackedMolecules(splits["validation"], self.tokenizer, data.sequence_length)
            # `looped eval` measures on these splits: raise now, not when the training is done.
            for split in splits.keys() - {"train", "validation"}:
                PackedMolecules(splits[split], self.tokenizer, data.sequence_length)
        self.num_held_out = len(self.held_out)
        if data.validation_tokens is not None:
            ends = self.held_out.lengths.cumsum()
            self.num_held_out = max(1, int((ends <= data.validation_tokens).sum()))

    def sizes(self, batch: dict) -> tuple[int, int]:
        """The batch itself says how many labels it has: sequences have padding, and ranks differ in sequences."""
        return batch["num_labels"], batch["num_labels"]

    def rows_of(self, step: int) -> list[int]:
        return self.batches.chosen(step).tolist()

    def summary(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """The result of the last check, after the last update, and the numbers of molecules and tokens."""
        return self.measured(state, num_loops) | {
            "train_molecules": self.batches.num_molecules,
            "train_tokens": self.batches.num_tokens,
            "held_out_molecules": self.num_held_out,
        }

    def headline(self, summary: dict) -> str:
        return f"held-out molecules {summary['held_out']['loss']:.4f} nats per token, at {summary['gate_loops']} loops"
