"""Molecules as a task: its verbs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from looplab.runs.folder import Run
from looplab.tasks.base import refuse_hop_options
from looplab.tasks.data import Curriculum

from .data import MoleculeData

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from looplab.bench.pair import Workload


class MoleculeReader:
    """Runs on molecules; `limit` and `masked` count samples, other arguments mean what they do to `HopReader`."""

    Data, Curriculum = MoleculeData, Curriculum

    def training(self, recipe, splits, depth, accelerator, kept_tokenizer):
        """The task in training, see `tasks.training.TaskTraining`."""
        from .training import MoleculeTraining

        return MoleculeTraining(recipe, splits, depth, accelerator, kept_tokenizer)

    def evaluate(self, run: Run, *, loops, limit, max_loops, max_hops, masked) -> Path:
        """Write the files of `evaluation.evaluate_molecules`.

        Raises:
            ValueError: `max_loops` or `max_hops` is given.
        """
        from .evaluation import evaluate_molecules

        refuse_hop_options(run, max_loops, max_hops)
        return evaluate_molecules(run.folder, loops=loops, limit=limit, masked=masked)

    def halting(self, run: Run, *, limit, max_loops, max_hops) -> tuple[Path, str]:
        """Write RUN/halting.jsonl by `exits.exits_of_molecules`; returns it and what it says.

        Raises:
            ValueError: `max_hops` is given.
        """
        from .exits import exits_of_molecules, molecule_exits_text

        refuse_hop_options(run, None, max_hops)
        path = exits_of_molecules(run.folder, num_loops=max_loops, limit=limit)
        return path, molecule_exits_text(run.halting())

    def show(self, run: Run) -> None:
        from .results import molecules_text

        print(f"\n{run.folder}\n{molecules_text(run)}")

    def table(self, runs: Sequence[Run], against: str | None) -> str:
        """A Markdown line per group of seeds, each also compared to the group `against` where it is given."""
        from .results import molecules_table

        return molecules_table(runs, against)

    def plot(self, runs: Sequence[Run], output: str | Path | None) -> list[Path]:
        from .figures import plot_molecule_runs

        return plot_molecule_runs(runs, output)


def molecule_prompts(run: Run, tokenizer: "PreTrainedTokenizerBase", work: "Workload") -> "torch.Tensor":
    """(molecules, molecule_prompt): `<bos>` and the first tokens of molecules of the test split."""
    import torch

    from data_builders import PackedMolecules
    from data_builders.text_batches import spread_blocks

    from .held_out import run_molecules

    test = PackedMolecules(run_molecules(run)["test"], tokenizer, run.recipe()["data"]["sequence_length"])
    begun = work.molecule_prompt - 1
    numbers = spread_blocks(len(test), work.molecules).tolist()
    return torch.tensor([[tokenizer.bos_token_id, *test.tokens(number)[:begun].tolist()] for number in numbers])
