"""Cards of a run: what its pages on the Hub say, filled from the files of the run.

    hub_cards/model_card.md        what every model card has: metadata, use, evaluation, training, limits
    hub_cards/model_hops.md, ...   the parts that depend on the task, put into it by Jinja's blocks
    hub_cards/dataset_card.md      of the data that the run's builder makes

    CARDS       task -> the object that knows its template, the values in it, and its evaluation results

The metadata are huggingface_hub's card data; results become the model-index that the Hub reads. Rendering is strict:
a value that a template asks for and nobody gave is an error, where `RepoCard.from_template` would leave a gap.
"""

import json
from pathlib import Path

import jinja2
from datasets import DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

import hub_cards
from data_builders.builders import TAGS
from looplab.runs.folder import Run
from looplab.runs.seeds import to_markdown
from looplab.tasks.card import Names, between, run_data
from looplab.tasks.hops.card import HopCard
from looplab.tasks.molecules.card import MoleculeCard
from looplab.tasks.text.card import TextCard

TEMPLATES = Path(hub_cards.__file__).parent

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
