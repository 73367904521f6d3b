"""The task text, see `tasks.base.Task`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from looplab.runs.folder import Run
from looplab.tasks.base import Argument, Drafting, Figure, Task
from looplab.tasks.language.options import ASKING, ASKING_DEFAULTS

from .data import TextData
from .records import EVALUATION, HALTING, RECORDS
from .sources import Stream

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class TextTask(Task):
    """Plain text."""

    name = kind = "text"
    Data = TextData
    records = RECORDS
    figures: ClassVar = {
        "perplexity": Figure("Perplexity on unseen documents, by loops"),
        "lens": Figure("Likeliest next token after every loop, and how far each loop is from the last", "lens"),
        "training": Figure("Training: loss and held-out measure over time"),
        "dynamics": Figure("How the state moves from loop to loop", "dynamics"),
    }
    defaults: ClassVar = {
        "eval --loops": "the model's own and the recipe's eval_loops",
        "halting --limit": "64 blocks",
        "halting --max-loops": "the model's own loops",
        "lens --limit": "32 blocks",
        **ASKING_DEFAULTS,
    }
    arguments: ClassVar = ASKING | {("lens", "text"): Argument("look at this text, not at test rows", "TEXT", str)}
    measured = "perplexity"
    drafting = Drafting(texts=4, prompt=16, drawn={}, ends=False)

    def training(self, recipe, splits, depth, accelerator, kept_tokenizer):
        if isinstance(recipe.data.source, Stream):
            from .stream_training import StreamTraining

            return StreamTraining(recipe, splits, depth, accelerator, kept_tokenizer)
        from .training import TextTraining

        return TextTraining(recipe, splits, depth, accelerator, kept_tokenizer)

    def evaluate(self, run: Run, *, loops: Sequence[int] | None = None, limit: int | None = None) -> Path:
        """Write the files of `perplexity.evaluate_run`."""
        from .perplexity import evaluate_run

        return evaluate_run(run, loops, limit)

    def show(self, run: Run) -> str:
        from looplab.tasks.language.exits import halted_text

        from .results import loops_text

        halting = run.read(EVALUATION).get("halting")
        return loops_text(run) if halting is None else f"{loops_text(run)}\n{halted_text(halting)}"

    def table(self, runs: Sequence[Run], *, against: str | None = None) -> str:
        from .results import markdown_table

        return markdown_table(runs, against)

    def plot(self, runs: Sequence[Run], output: str | Path | None, *, format: str = "png") -> list[Path]:
        from .figures import plot_runs

        return plot_runs(runs, output, format)

    def halting(self, run: Run, *, limit: int | None = None, max_loops: int | None = None) -> tuple[Path, str]:
        """Write RUN/halting.jsonl by `exits.halting_run`."""
        from looplab.tasks.language.exits import exits_text

        from .exits import halting_run

        return halting_run(run, max_loops, limit), exits_text(run.read(HALTING))

    def own_loss(self, run: Run) -> float:
        from .results import own_row

        return own_row(run)["loss"]

    def best_rule(self, run: Run) -> tuple[Mapping | None, str]:
        from looplab.tasks.language.exits import best_rule

        return best_rule(run.read(HALTING))

    def lens(
        self,
        run: Run,
        *,
        loops: int | None = None,
        limit: int | None = None,
        text: str | None = None,
        format: str = "png",
    ) -> list[Path]:
        """Write and draw what `lens.lens_run` measures."""
        from .lens import lens_run

        return lens_run(run, text, loops, limit, format)

    def ask(
        self,
        run: Run,
        question: str | None,
        *,
        loops: Sequence[int] | None = None,
        new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> None:
        """Print what `language.ask` writes after `question`; unless given, after the first words of a test text."""
        if question is None:
            from .perplexity import first_words

            question = first_words(run)
        if not question:
            raise ValueError("there is no text to go on from: give some, in quotes.")
        from looplab.runs.models import load_run_model
        from looplab.tasks.language.ask import ask

        ask(*load_run_model(run, *(loops or ()), frozen=True), question, loops, new_tokens, temperature, seed)

    def measure(self, run: Run, tokenizer: "PreTrainedTokenizerBase", limit: int | None):
        from .perplexity import TextMeasure

        return TextMeasure(run, tokenizer, limit)

    def quantizing(self, run: Run, tokenizer: "PreTrainedTokenizerBase"):
        from .perplexity import TextQuantizing

        return TextQuantizing(run, tokenizer)

    def sorts(self, run: Run, tokenizer: "PreTrainedTokenizerBase", limit: int):
        """Blocks of test text, one at a time."""
        from data_builders.text_batches import spread_blocks

        from .perplexity import run_blocks

        blocks = run_blocks(run, tokenizer)["test"]
        return {"text": list(blocks.rows(spread_blocks(len(blocks), limit))["input_ids"].split(1))}

    def prompts(self, run: Run, tokenizer: "PreTrainedTokenizerBase", count: int, length: int) -> "torch.Tensor":
        from data_builders.text_batches import spread_blocks

        from .perplexity import run_blocks

        blocks = run_blocks(run, tokenizer)["test"]
        return blocks.rows(spread_blocks(len(blocks), count))["input_ids"][:, :length]

    def card(self):
        from .card import TextCard

        return TextCard()

    def demo_part(self, run: Run, config: dict) -> dict:
        from .card import text_part

        return text_part(run)
