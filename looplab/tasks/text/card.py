"""The model card of a run on text."""

from huggingface_hub import EvalResult

from looplab.runs.folder import Run
from looplab.runs.seeds import to_markdown
from looplab.tasks.card import Card, Names, loops_shown
from modeling_looped.generation_looped import CALIBRATED

from .data import TextData
from .records import EVALUATION, PERPLEXITY


def shown_row(run: Run) -> dict:
    """The line of text.jsonl at the model's own loop count; at the largest, if that was not measured."""
    rows, own = run.read(PERPLEXITY), run.read(EVALUATION)["num_loops"]
    return next((row for row in rows if row["loops"] == own), rows[-1])


class TextCard(Card):
    """The card of a model of text."""

    Data = TextData
    template = "model_text.md"
    metrics = ("perplexity",)

    def results(self, run: Run, names: Names) -> list[EvalResult]:
        """Perplexity at the loop count of `shown_row`."""
        row = shown_row(run)
        loops, value = row["loops"], round(row["perplexity"], 3)
        return [self.result(run, names, "perplexity", f"Perplexity, {loops} loops", value, {"num_loops": loops})]

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
        own, fewest = shown_row(run), rows[0]
        second = (f"{fewest['perplexity']:.2f}", f"perplexity of the same weights, with {fewest['loops']}")
        if fewest["loops"] == own["loops"]:
            second = (f"{summary['tokens']:,}", "tokens of training")
        return {
            "numbers": [
                (f"{own['perplexity']:.2f}", f"perplexity on unseen documents, with {own['loops']} loops"),
                second,
                (f"{summary['parameters']:,}", "parameters"),
            ],
            "parameters_one_vocabulary": f"{evaluation['parameters']['one_vocabulary']:,}",
            "parameters_layers": f"{evaluation['parameters']['layers']:,}",
            "tokens": f"{summary['tokens']:,}",
            "test_tokens": f"{rows[0]['tokens']:,}",
            "sequence_length": run.recipe()["data"]["sequence_length"],
            "loops_shown": loops_shown({row["loops"] for row in rows}),
            "table": to_markdown(table),
            "chat": (run.model_folder() / "chat_template.jinja").is_file(),
            "limit": evaluation["limit"],
            "limit_of": "blocks of text",
        }


def text_part(run: Run) -> dict:
    """The section of demo.json about a run, see `Task.demo_part`."""
    size = "" if run.bare else f" of {run.summary()['parameters']:,} parameters"
    chosen = run.generation_settings().get(CALIBRATED)
    rule = chosen or {"rule": "kl", "kl_threshold": 0.01}
    thresholds = ", ".join(f"{name} {value:.3g}" for name, value in rule.items() if isinstance(value, int | float))
    source = "chosen by looped halting --save" if chosen else "not calibrated for this model: read it with care"
    return {
        "text": f"A looped transformer{size} writes a text on, token by token, and runs as many loops for each token "
        "as you say.",
        "halting": rule,
        "halting_info": f"{rule['rule']}: {thresholds}; {source}.",
    }
