"""Cards of a run: what its pages on the Hub say, filled from the files of the run.

    hub_cards/model_card.md        what every model card has: metadata, use, evaluation, training, limits
    hub_cards/model_hops.md, ...   the parts that depend on the task, put into it by Jinja's blocks
    hub_cards/dataset_card.md      of the data that the run's builder makes

    CARDS       task -> the object that knows its template, the values in it, and its evaluation results

The metadata are huggingface_hub's card data; results become the model-index that the Hub reads. Rendering is strict:
a value that a template asks for and nobody gave is an error, where `RepoCard.from_template` would leave a gap.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from datasets import DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from data_builders.builders import TAGS
from looplab.runs.folder import Run
from looplab.runs.seeds import to_markdown

from .evaluation import first_question_beyond, line_order, load_run_task
from .molecule_results import percent
from .results import THRESHOLDS, depth_facts

TEMPLATES = Path(__file__).parents[1] / "hub_cards"

# Figures of a run that a card shows, in this order, and what they show.
FIGURES = {
    "grid": "Accuracy in % over hops and loops; a frame around what was trained",
    "loops": "Accuracy after every loop",
    "hops": "Accuracy by hops, at the loops chosen on the validation questions",
    "halting": "Accuracy against loops used, by halting rule",
    "validity": "Validity, and loss on test molecules, by loops",
    "exits": "Validity against mean loops of a token: halting rules, and fixed loop counts",
    "faults": "What is wrong with the molecules, by loops",
    "molecules": "Some valid molecules that the model wrote",
    "ablations": "Validity without one attention head, by loop and head",
    "readouts": "Validity where every loop is read by a head of its own, or by the last loop's",
    "perplexity": "Perplexity on unseen documents, by loops",
    "learning": "Accuracy by kind of question, over training",
    "training": "Training: loss and held-out measure over time",
    "lens": "Share of chains in which a state reads out the bridge, and the answer",
    "patch": "Share of corrupted runs that give the clean answer after one clean state was put in",
    "swap": "Share of runs that follow the other bridge after its direction was exchanged",
    "probe": "Accuracy of a linear probe for the bridge, and for the answer",
    "stages": "What states say and cause, over training",
}

# What the kinds of test questions are.
KINDS = {
    "khop": {
        "id": "chains that training did not have, of hop counts that its data hold",
        "ood": "chains of more hops than any in its data",
    },
    "composition": {
        "id": "two facts that training composed, but not with each other",
        "ood": "two facts that training never composed with anything",
        "ood_first": "the first of two facts was never composed in training",
        "ood_second": "the second of two facts was never composed in training",
        "pair": "two relations that never follow each other in training",
    },
}

MOST_LOOPS_SHOWN = 5


@dataclass(frozen=True)
class Names:
    """What a card calls things: the repositories (None where there is none) and the licences, as the Hub spells them.

    The licence of the data may be another one than the model's. `base_model` is the model on the Hub that the run
    started from.
    """

    model_id: str
    licence: str
    dataset_id: str | None = None
    data_licence: str | None = None
    base_model: str | None = None


class HopCard:
    """Card of a model that follows chains."""

    template = "model_hops.md"
    metrics = ("accuracy",)

    def results(self, run: Run, names: Names) -> list[EvalResult]:
        """Mean accuracy over hop counts of every held-out kind, at the loops of the grid and the chosen ones."""
        facts, cells = depth_facts(run), {}
        for row in run.grid():
            cells.setdefault(row["split_kind"], {}).setdefault(row["loops"], {})[row["hops"]] = row["accuracy"]
        results = []
        for kind, accuracy in facts["accuracy"].items():
            hops = sorted({count for line in cells[kind].values() for count in line})
            means = {loops: sum(line.values()) / len(line) for loops, line in cells[kind].items()}
            for loops, mean in sorted((means | {facts["loops"]: accuracy}).items()):
                arguments = {"num_loops": loops, "split_kind": kind, "hops": hops}
                name = f"Accuracy, {kind}, {loops} loops"
                results.append(result(run, names, "accuracy", name, round(mean, 4), arguments))
        return results

    def values(self, run: Run) -> dict:
        """What `model_hops.md` asks for beyond `common_values`."""
        task, grid, facts, summary = load_run_task(run), run.grid(), depth_facts(run), run.summary()
        evaluation, (low, high) = run.evaluation(), run.trained_loops()
        question = first_question_beyond(task["test"], summary["trained_hops"])
        number = task["test"]["text"][:].index(question)
        words = {word for text in task["train"]["text"][:] for word in text.split()}
        measured = {row["split_kind"] for row in grid}
        depth = max(summary["trained_hops"])
        return {
            "task_text": {
                "khop": f"Its graph is permutations, and it was trained on chains of up to {depth} hops.",
                "composition": "It was trained on single facts and on pairs of some; others it never saw in a pair.",
            }[run.task()],
            "question": question,
            "answer": task["test"]["answer"][number],
            "loops_shown": spread({row["loops"] for row in grid}),
            "chance": f"{100 * evaluation['chance']:.1f}",
            "kinds": {kind: text for kind, text in KINDS[run.task()].items() if kind in measured},
            "table": grid_markdown(grid, low, high),
            "loops": facts["loops"],
            "reach": " / ".join(str(facts["reach"][threshold]) for threshold in THRESHOLDS),
            "learnable_depth": facts["learnable_depth"],
            "entities": sum(word[0] == "e" for word in words),
            "relations": sum(word[0] == "r" for word in words),
            "hops_text": between(min(summary["trained_hops"]), depth),
            "limit": evaluation["limit"],
            "limit_of": "questions per hop count and kind",
        }


class TextCard:
    """Card of a model of text."""

    template = "model_text.md"
    metrics = ("perplexity",)

    def results(self, run: Run, names: Names) -> list[EvalResult]:
        """Perplexity at every loop count that was measured."""
        return [
            result(
                run, names, "perplexity", f"Perplexity, {row['loops']} loops", round(row["perplexity"], 3),
                {"num_loops": row["loops"]},
            )
            for row in run.text()
        ]  # fmt: skip

    def values(self, run: Run) -> dict:
        """What `model_text.md` asks for beyond `common_values`."""
        rows, summary, evaluation = run.text(), run.summary(), run.evaluation()
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


class MoleculeCard:
    """Card of a model that writes molecules."""

    template = "model_molecules.md"
    metrics = ("validity", "uniqueness", "novelty", "diversity", "fcd")

    def results(self, run: Run, names: Names) -> list[EvalResult]:
        """Every measure of every way of sampling, at every loop count."""
        settings = {setting["name"]: setting for setting in run.evaluation()["settings"]}
        results = []
        for row in run.molecules():
            setting = settings[row["setting"]]
            arguments = {name: setting[name] for name in ("temperature", "top_k")}
            arguments |= {"num_loops": row["loops"], "samples": row["n"]}
            for metric in self.metrics:
                value = row["fcd"] if metric == "fcd" else row[metric]["share"]
                if value is not None:
                    name = f"{metric.capitalize()}, {row['setting']}, {row['loops']} loops"
                    results.append(result(run, names, metric, name, round(value, 4), arguments))
        return results

    def values(self, run: Run) -> dict:
        """What `model_molecules.md` asks for beyond `common_values`."""
        rows, summary, evaluation = run.molecules(), run.summary(), run.evaluation()
        low, high = run.trained_loops()
        titles = {"valid": "validity", "unique": "uniqueness", "new": "novelty", "diversity": "diversity"}
        table = []
        for row in rows:
            cells = {"sampling": f"`{row['setting']}`", "samples": f"{row['n']:,}"}
            cells["loops"] = f"[{row['loops']}]" if low <= row["loops"] <= high else str(row["loops"])
            cells |= {title: percent(row[measure]) for title, measure in titles.items()}
            table.append(cells | {"FCD": "-" if row["fcd"] is None else f"{row['fcd']:.2f}"})
        return {
            "parameters_layers": f"{evaluation['parameters']['layers']:,}",
            "tokens": f"{summary['tokens']:,}",
            "loops_shown": spread({row["loops"] for row in rows}),
            "settings": {
                setting["name"]: f"temperature {setting['temperature']}, "
                + (f"the {setting['top_k']} most probable tokens" if setting["top_k"] else "all tokens")
                for setting in evaluation["settings"]
            },
            "table": to_markdown(table),
            "limit": evaluation["limit"],
            "limit_of": "samples",
        }


CARDS = {"khop": HopCard(), "composition": HopCard(), "text": TextCard(), "molecules": MoleculeCard()}
Card = HopCard | TextCard | MoleculeCard


def card_of(run: Run) -> Card:
    """ValueError for a task without a card."""
    if run.task() not in CARDS:
        raise ValueError(f"{run.folder} is a run on {run.task()}: there are cards for {', '.join(CARDS)}.")
    return CARDS[run.task()]


def model_card(run: Run, names: Names) -> ModelCard:
    """The card of a run's model.

    Raises:
        ValueError: the run has not finished, has not been evaluated, or there is no card for its task.
    """
    card = card_of(run)
    metadata = ModelCardData(
        license=names.licence,
        base_model=names.base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["looped-transformers", "recurrent-depth", "custom_code", *TAGS[run.task()]],
        datasets=[names.dataset_id] if names.dataset_id else None,
        metrics=list(card.metrics),
        model_name=names.model_id.partition("/")[2],
        eval_results=card.results(run, names),
    )
    values = common_values(run, names) | card.values(run)
    return ModelCard(render(card.template, metadata=metadata.to_yaml(), **values))


def common_values(run: Run, names: Names) -> dict:
    """What `model_card.md` asks for."""
    summary, recipe = run.summary(), run.recipe()
    config = json.loads((run.model_folder() / "config.json").read_text(encoding="utf-8"))
    trained, layers = summary["trained_loops"], config["num_core_layers"]
    hardware, versions = summary["hardware"], summary["versions"]
    start = [] if recipe["init_from"] is None else [("started from", f"`{Path(recipe['init_from']).name}`")]
    return {
        "name": names.model_id.partition("/")[2],
        "model_id": names.model_id,
        "dataset_id": names.dataset_id,
        "parameters": f"{summary['parameters']:,}",
        "layers": "layer runs" if layers == 1 else f"{layers} layers run",
        "looped": trained["maximum"] > 1,
        "max_num_loops": config.get("max_num_loops"),
        "figures": [
            {"path": f"figures/{name}.png", "caption": caption}
            for name, caption in FIGURES.items()
            if (run.folder / "figures" / f"{name}.png").is_file()
        ],
        "training": dict(
            [
                ("task", f"`{run.task()}`"),
                *start,
                ("updates", f"{summary['steps']:,} of {recipe['batch_size']} rows, {summary['tokens']:,} tokens"),
                ("time", f"{summary['seconds'] / 60:.1f} minutes, {recipe['precision']}"),
                ("hardware", f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['device']}, "
                             f"processes: {hardware['processes']}"),
                ("seeds", f"{summary['seed']} (weights and order), {recipe['data']['seed']} (data)"),
                ("commit", f"`{summary['commit']}`" if summary["commit"] else "none: not from a repository"),
                ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
            ]
        ),
        "loops_text": between(trained["minimum"], trained["maximum"]),
        "mean_loops": f"{trained['mean']:.1f}",
    }  # fmt: skip


def result(run: Run, names: Names, metric: str, name: str, value: float, arguments: dict) -> EvalResult:
    """One line of the model-index; the measured data are those of the run's test split."""
    _, config, _ = run_data(run)
    return EvalResult(
        task_type="text-generation",
        dataset_type=names.dataset_id or run.task(),
        dataset_name=run.task(),
        dataset_config=config,
        dataset_split="test",
        metric_type=metric,
        metric_name=name,
        metric_value=value,
        metric_args=arguments,
    )


def run_data(run: Run) -> tuple[str, str, dict]:
    """Task, config and fields that `data_builders.task_builder` made the run's data from."""
    task, data = run.task(), run.recipe()["data"]
    overrides, config = {"seed": data["seed"]} | data["overrides"], data["config"]
    if data["files"] is not None or "dataset" in overrides:
        config = "files"
        overrides |= {} if data["files"] is None else {"files": data["files"]}
    elif task == "text":
        config = "corpus"
    return task, config, overrides


def dataset_card(run: Run, names: Names, exported: DatasetCard, dataset: DatasetDict) -> DatasetCard:
    """The card of a run's data.

    Args:
        exported: the card that `data_builders.export_parquet` wrote beside the data: its configs and text go on.
        dataset: the rows.
    """
    task, config, _ = run_data(run)
    total = sum(len(rows) for rows in dataset.values())
    metadata = DatasetCardData(
        license=names.data_licence,
        pretty_name=f"{task} ({config})",
        task_categories=["text-generation"],
        size_categories=[size_category(total)],
        tags=exported.data.tags,
        configs=exported.data.configs,
    )
    splits = [{"split": split, "rows": f"{len(rows):,}"} for split, rows in dataset.items()]
    columns = [{"column": name, "type": f"`{kind}`"} for name, kind in dataset["train"].features.items()]
    text = render(
        "dataset_card.md",
        metadata=metadata.to_yaml(),
        description=exported.text.strip(),
        dataset_id=names.dataset_id,
        model_id=names.model_id,
        config=config,
        task=task,
        splits=to_markdown(splits),
        columns=to_markdown(columns),
        licence=names.data_licence,
    )
    return DatasetCard(text)


def size_category(rows: int) -> str:
    """The Hub's word for a number of rows."""
    bounds = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10**7: "1M<n<10M"}
    return next((word for bound, word in bounds.items() if rows < bound), "10M<n<100M")


def render(template: str, **values) -> str:
    """A template of hub_cards/, filled; an error where a value is missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def grid_markdown(rows: Sequence[dict], low: int, high: int) -> str:
    """Accuracies in %: a line per (split kind, hops), a column per loop count; of trained facts, too."""
    cells = {(row["split_kind"], row["hops"], row["loops"]): row for row in rows}
    loops = sorted({row["loops"] for row in rows})
    lines = []
    for line in sorted({key[:2] for key in cells}, key=line_order):
        row = cells[(*line, loops[0])]
        cell = {"questions": line[0], "hops": f"{line[1]}{'*' if row['trained'] else ''}", "n": str(row["n"])}
        for count in loops:
            name = f"[{count}]" if low <= count <= high else str(count)
            cell[name] = f"{100 * cells[(*line, count)]['accuracy']:.1f}"
        lines.append(cell)
    return to_markdown(lines)


def spread(loops: set[int]) -> tuple[int, ...]:
    """At most `MOST_LOOPS_SHOWN` of the loop counts, the least and the largest among them."""
    ordered = sorted(loops)
    if len(ordered) <= MOST_LOOPS_SHOWN:
        return tuple(ordered)
    last = MOST_LOOPS_SHOWN - 1
    return tuple(ordered[round(i * (len(ordered) - 1) / last)] for i in range(MOST_LOOPS_SHOWN))


def between(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
