"""Training on SMILES."""

from accelerate import Accelerator

from data_builders import DepthSampler, MoleculeBatches, PackedMolecules, dataset_smiles_tokenizer, load_molecules
from looplab.tasks.language.training import TextTask
from looplab.tasks.training import State, load_tokenizer
from looplab.training.recipe import Recipe
from looplab.training.run_folder import RunFolder
from modeling_looped import LoopedForCausalLM


class MoleculeTask(TextTask):
    """SMILES: as text, but each molecule is by itself, several of them in a row of one length."""

    # Jindal and Ju 2026, arXiv 2605.06322: how molecules are written.
    generation = {"do_sample": True, "temperature": 0.8, "top_k": 40, "max_new_tokens": 120}  # noqa: RUF012

    def __init__(self, recipe: Recipe, depth: DepthSampler, accelerator: Accelerator, run: RunFolder):
        self.recipe, self.depth, self.accelerator = recipe, depth, accelerator
        data = recipe.data
        with accelerator.main_process_first():
            dataset = load_molecules(data.config, data.files, **({"seed": data.seed} | data.overrides))
            run.check_data(dataset)
            if recipe.init_from is not None:
                self.tokenizer = load_tokenizer("init_from", recipe.init_from)
            else:
                self.tokenizer = dataset_smiles_tokenizer(dataset)
            self.batches = MoleculeBatches(
                dataset["train"], self.tokenizer, data.sequence_length, recipe.batch_size, recipe.seed, depth,
                rank=accelerator.process_index, world=accelerator.num_processes,
                spellings=data.spellings, spelling_seed=data.seed,
            )  # fmt: skip
            self.held_out = PackedMolecules(dataset["validation"], self.tokenizer, data.sequence_length)
            # What `looped eval` measures on: refused now, and not when the training is done.
            for split in dataset.keys() - {"train", "validation"}:
                PackedMolecules(dataset[split], self.tokenizer, data.sequence_length)
        self.num_held_out = len(self.held_out)
        if data.validation_tokens is not None:
            ends = self.held_out.lengths.cumsum()
            self.num_held_out = max(1, int((ends <= data.validation_tokens).sum()))

    def summary(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """The last check, which came after the last step, and how many molecules there were."""
        return self.measured(state, num_loops) | {
            "train_molecules": self.batches.num_molecules,
            "train_tokens": self.batches.num_tokens,
            "held_out_molecules": self.num_held_out,
        }

    def headline(self, summary: dict) -> str:
        return f"held-out molecules {summary['held_out']['loss']:.4f} nats per token, at {summary['gate_loops']} loops"
