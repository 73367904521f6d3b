"""The model card of a run on text."""

from huggingface_hub import EvalResult

from looplab.runs.folder import Run
from looplab.runs.seeds import to_markdown
from looplab.tasks.card import Card, Names, spread

from .data import TextData
from .records import EVALUATION, PERPLEXITY


class TextCard(Card):
    """The card of a model of text."""

    Data = TextData
    template = "model_text.md"
    metrics = ("perplexity",)

    def results(self, run: Run, names: Names) -> list[EvalResult]:
        """Perplexity at every measured loop count."""
        return [
            self.result(
                run, names, "perplexity", f"Perplexity, {row['loops']} loops", round(row["perplexity"], 3),
                {"num_loops": row["loops"]},
            )
            for row in run.read(PERPLEXITY)
        ]  # fmt: skip

    def values(self, run: Run) -> dict:
        """The values of `model_text.md` beyond `common_values`."""
        rows, summary, evaluation = run.read(PERPLEXITY), run.summary(), run.read(EVALUATION)
        low, high = run.trained_loops()
        table = [
            {
                "loops": f"[{row['loops']}]" if low <= row["loops"] <= high else str(row["loops"]),
                "perplexity": f"{row['perplexity']:.2f}",
                "95 % interval": " - ".join(f"{bound:.2f}" for bound in row["interval"]),
                "nats per token": f"{row['loss']:.4f}",
            }
            for row in rows
        ]
        return {
            "parameters_one_vocabulary": f"{evaluation['parameters']['one_vocabulary']:,}",
            "parameters_layers": f"{evaluation['parameters']['layers']:,}",
            "tokens": f"{summary['tokens']:,}",
            "test_tokens": f"{rows[0]['tokens']:,}",
            "sequence_length": run.recipe()["data"]["sequence_length"],
            "loops_shown": spread({row["loops"] for row in rows}),
            "table": to_markdown(table),
            "limit": evaluation["limit"],
            "limit_of": "blocks of text",
        }
