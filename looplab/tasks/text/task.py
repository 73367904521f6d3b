"""Text as a task: its verbs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from looplab.runs.folder import Run
from looplab.tasks.base import refuse_hop_options, refuse_masked
from looplab.tasks.data import Curriculum

from .data import TextData

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from looplab.bench.pair import Workload


class TextReader:
    """Runs on text; the arguments mean what they do to `HopReader`."""

    Data, Curriculum = TextData, Curriculum

    def training(self, recipe, splits, depth, accelerator, kept_tokenizer):
        """The task in training, see `tasks.training.TaskTraining`."""
        from .training import TextTraining

        return TextTraining(recipe, splits, depth, accelerator, kept_tokenizer)

    def evaluate(self, run: Run, *, loops, limit, max_loops, max_hops, masked) -> Path:
        """Write the files of `perplexity.evaluate_text`.

        Raises:
            ValueError: `max_loops`, `max_hops` or `masked` is given: text has no chains to follow and no molecules.
        """
        from .perplexity import evaluate_text

        refuse_hop_options(run, max_loops, max_hops)
        refuse_masked(run, masked)
        return evaluate_text(run.folder, loops=loops, limit=limit)

    def halting(self, run: Run, *, limit, max_loops, max_hops) -> tuple[Path, str]:
        """Write RUN/halting.jsonl by `exits.exits_run`; returns it and what it says.

        Raises:
            ValueError: `max_hops` is given.
        """
        from looplab.tasks.language.exits import exits_text

        from .exits import exits_run

        refuse_hop_options(run, None, max_hops)
        path = exits_run(run.folder, num_loops=max_loops, limit=limit)
        return path, exits_text(run.halting())

    def show(self, run: Run) -> None:
        from .results import loops_text

        print(f"\n{run.folder}\n{loops_text(run)}")

    def table(self, runs: Sequence[Run], against: str | None) -> str:
        """A Markdown line per group of seeds, each also compared to the group `against` where it is given."""
        from .results import text_table

        return text_table(runs, against)

    def plot(self, runs: Sequence[Run], output: str | Path | None) -> list[Path]:
        from .figures import plot_text_runs

        return plot_text_runs(runs, output)


def text_prompts(run: Run, tokenizer: "PreTrainedTokenizerBase", work: "Workload") -> "torch.Tensor":
    """(prompts, prompt) tokens of the test split of a run on text."""
    from data_builders.text_batches import spread_blocks

    from .perplexity import run_blocks

    blocks = run_blocks(run, tokenizer)["test"]
    return blocks.rows(spread_blocks(len(blocks), work.prompts))["input_ids"][:, : work.prompt]
