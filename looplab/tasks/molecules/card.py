"""The model card and the section of demo.json of a run on molecules."""

from huggingface_hub import EvalResult

from data_builders import Molecules
from looplab.runs.folder import Run
from looplab.runs.seeds import to_markdown
from looplab.tasks.card import Card, Names, loops_shown

from .data import MoleculeData
from .records import EVALUATION, MOLECULES
from .results import percent


def first_row(run: Run) -> dict:
    """The line of molecules.jsonl of the first sampling setting, at the model's own loop count; at the largest, if
    that was not measured."""
    evaluation = run.read(EVALUATION)
    rows = [row for row in run.read(MOLECULES) if row["setting"] == evaluation["settings"][0]["name"]]
    return next((row for row in rows if row["loops"] == evaluation["num_loops"]), rows[-1])


class MoleculeCard(Card):
    """The card of a model that writes molecules."""

    Data = MoleculeData
    template = "model_molecules.md"
    tags = Molecules.TAGS
    papers = ("2605.06322",)
    metrics = ("validity", "uniqueness", "novelty", "diversity", "fcd")

    def results(self, run: Run, names: Names) -> list[EvalResult]:
        """Every measure of the first sampling setting, at the loop count of `first_row`."""
        setting, row = run.read(EVALUATION)["settings"][0], first_row(run)
        arguments = {name: setting[name] for name in ("temperature", "top_k")}
        arguments |= {"num_loops": row["loops"], "samples": row["n"]}
        values = {metric: row["fcd"] if metric == "fcd" else row[metric]["share"] for metric in self.metrics}
        return [
            self.result(
                run, names, metric, f"{metric.capitalize()}, {row['setting']}, {row['loops']} loops", round(value, 4),
                arguments,
            )
            for metric, value in values.items()
            if value is not None
        ]  # fmt: skip

    def values(self, run: Run) -> dict:
        """The values of `model_molecules.md` beyond `common_values`."""
        rows, summary, evaluation = run.read(MOLECULES), run.summary(), run.read(EVALUATION)
        low, high = run.trained_loops()
        titles = {"valid": "validity", "unique": "uniqueness", "new": "novelty", "diversity": "diversity"}
        table = []
        for row in rows:
            cells = {"sampling": f"`{row['setting']}`", "samples": f"{row['n']:,}"}
            cells["loops"] = f"[{row['loops']}]" if low <= row["loops"] <= high else str(row["loops"])
            cells |= {title: percent(row[measure]) for title, measure in titles.items()}
            table.append(cells | {"FCD": "-" if row["fcd"] is None else f"{row['fcd']:.2f}"})
        first = first_row(run)
        shares = {
            measure: "none" if first[measure]["share"] is None else f"{100 * first[measure]['share']:.1f} %"
            for measure in ("validity", "novelty")
        }
        return {
            "numbers": [
                (shares["validity"], f"of its samples are valid molecules, with {first['loops']} loops"),
                (shares["novelty"], "of the distinct ones are not in its training data"),
                (f"{summary['parameters']:,}", "parameters"),
            ],
            "parameters_layers": f"{evaluation['parameters']['layers']:,}",
            "tokens": f"{summary['tokens']:,}",
            "loops_shown": loops_shown({row["loops"] for row in rows}),
            "settings": {
                setting["name"]: f"temperature {setting['temperature']}, "
                + (f"the {setting['top_k']} most probable tokens" if setting["top_k"] else "all tokens")
                for setting in evaluation["settings"]
            },
            "table": to_markdown(table),
            "limit": evaluation["limit"],
            "limit_of": "samples",
        }


def molecules_part(run: Run, config: dict) -> dict:
    """The section of demo.json about a run, see `Task.demo_part`."""
    return {
        "text": f"A looped transformer of {run.summary()['parameters']:,} parameters writes molecules token by token, "
        "and runs as many loops for each token as you say.",
    }
