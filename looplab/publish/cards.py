"""The cards of a run on the Hub, filled from the files of the run.

    hub_cards/model_card.md        the parts of every model card: metadata, picture, three numbers, lines of code that
                                   run; then what is folded, limits, links, papers
    hub_cards/model_hops.md, ...   the parts of a task, put into it by Jinja's blocks
    hub_cards/dataset_card.md      the card of the data
    hub_cards/papers.bib           the papers that a model's system comes from

The task's `card()` has the template, its values, and the evaluation results. Metadata are huggingface_hub's card data;
results become the model-index that the Hub reads. A missing value is an error, where `RepoCard.from_template` would
leave a gap.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata as packages
from pathlib import Path

import jinja2
from datasets import DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from looplab import __version__
from looplab.runs.folder import Run
from looplab.runs.seeds import to_markdown
from looplab.shipped import shipped
from looplab.tasks.card import Names, between
from looplab.tasks.registry import task_for, task_of

TEMPLATES = shipped("hub_cards")
TAGS = ("looped-transformers", "recurrent-depth", "custom_code")

LOOP = "2604.07822"  # the plain loop, which a model has that none of these is true of
# arXiv number of a paper -> whether a model with these fields of config.json has its system.
SYSTEMS: dict[str, Callable[[Mapping], bool]] = {
    "2604.21254": lambda config: config.get("loop_connection") == "hyper",
    "2607.00341": lambda config: config.get("loop_connection") == "disco",
    "2605.07721": lambda config: config.get("kv_sharing") == "gated",
    "2510.25741": lambda config: bool(config.get("exit_gate")) or config.get("norm_placement") == "sandwich",
}


def model_card(run: Run, names: Names) -> ModelCard:
    """The card of a run's model.

    Raises:
        ValueError: the run has not finished, has not been evaluated, or its task has no card.
    """
    card = task_for("publish", [run]).card()
    results = card.results(run, names)
    metadata = ModelCardData(
        license=names.licence,
        base_model=names.base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, *card.tags],
        datasets=[names.dataset_id] if names.dataset_id else None,
        metrics=list(card.metrics),
        model_name=names.model_id.rpartition("/")[2],
        eval_results=results,
    )
    values = common_values(run, names, card.papers)
    values |= card.values(run)
    return ModelCard(render(card.template, metadata=metadata.to_yaml(), **values))


def common_values(run: Run, names: Names, papers: Iterable[str]) -> dict:
    """The values of `model_card.md`. papers: arXiv numbers of the task's."""
    summary, recipe = run.summary(), run.recipe()
    config = json.loads((run.model_folder() / "config.json").read_text(encoding="utf-8"))
    trained, layers = summary["trained_loops"], config["num_core_layers"]
    hardware, versions = summary["hardware"], summary["versions"]
    start = [] if recipe["init_from"] is None else [("started from", f"`{Path(recipe['init_from']).name}`")]
    made_at = [("commit", f"`{summary['commit']}`")] if summary["commit"] else []
    return base_values(names, config, papers) | {
        "parameters": f"{summary['parameters']:,}",
        "layers": "layer" if layers == 1 else f"{layers} layers",
        "looped": trained["maximum"] > 1,
        "figures": [
            {"path": f"figures/{name}.png", "caption": figure.caption}
            for name, figure in task_of([run]).figures.items()
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
                *made_at,
                ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
            ]
        ),
        "loops_text": between(trained["minimum"], trained["maximum"]),
        "mean_loops": f"{trained['mean']:.1f}",
        "limit": None,
    }  # fmt: skip


def base_values(names: Names, config: Mapping, papers: Iterable[str]) -> dict:
    """The values of `model_card.md` that follow from names and the fields of config.json alone."""
    pin = f', revision="{names.revision}"' if names.revision else ""
    links = project_links()
    if names.space_id:
        links["Move the loops of this model in a Space"] = f"https://huggingface.co/spaces/{names.space_id}"
    if names.dataset_id:
        links["Its data"] = f"https://huggingface.co/datasets/{names.dataset_id}"
    return {
        "name": names.model_id.rpartition("/")[2],
        "source": f'"{names.model_id}"{pin}',
        "revision": names.revision,
        "output": None,
        "max_num_loops": config.get("max_num_loops"),
        "links": links,
        "papers": bibtex([*papers, *systems_of(config)]),
        "version": __version__,
    }


def systems_of(config: Mapping) -> list[str]:
    """arXiv numbers of the papers whose systems a model has. config: the fields of its config.json."""
    return [number for number, has in SYSTEMS.items() if has(config)] or [LOOP]


def bibtex(numbers: Iterable[str]) -> list[str]:
    """The entries of papers.bib with these arXiv numbers, each once."""
    entries = (TEMPLATES / "papers.bib").read_text(encoding="utf-8").strip().split("\n\n")
    return [next(entry for entry in entries if f"{{{number}}}" in entry) for number in dict.fromkeys(numbers)]


def project_links() -> dict[str, str]:
    """Title -> address, of the project's pages that its package names ([project.urls] of pyproject.toml)."""
    try:
        named = packages.metadata("looped-transformers").get_all("Project-URL") or []
    except packages.PackageNotFoundError:  # a checkout on the path that was never installed
        named = []
    return dict(line.split(", ", 1) for line in named)


def dataset_card(run: Run, names: Names, exported: DatasetCard, dataset: DatasetDict) -> DatasetCard:
    """The card of a run's data.

    Args:
        exported: the card that `data_builders.export_parquet` wrote beside the data; its configs and text are kept.
        dataset: the splits.
    """
    task = run.task()
    config, _ = task_of([run]).Data.of(run).preset()
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
    """The Hub's name for a number of rows."""
    bounds = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10**7: "1M<n<10M"}
    return next((word for bound, word in bounds.items() if rows < bound), "10M<n<100M")


def render(template: str, **values) -> str:
    """A template of hub_cards/, filled with `values`. Raises jinja2.UndefinedError if one is missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["fenced"] = fenced
    return environment.get_template(template).render(**values)


def fenced(text: str, language: str) -> str:
    """A block of Markdown that shows a text as it is; its fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
