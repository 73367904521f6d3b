"""What the Hub asks of the metadata of a card, as far as it is documented, without asking the Hub.

Models, datasets and Spaces: https://huggingface.co/docs/hub/repositories-cards and its pages. The lists here hold the
words that this project may use, and not all that the Hub knows.
"""

import math
import re

import yaml
from huggingface_hub import DatasetCard, ModelCard, SpaceCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

CARDS = {"model": ModelCard, "dataset": DatasetCard, "space": SpaceCard}
LICENCES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "gpl-3.0", "openrail", "unknown", "other",
}  # fmt: skip
TASKS = {"text-generation", "text-classification", "token-classification", "question-answering", "feature-extraction"}
SIZES = {"n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M"}
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
KNOWN = {
    "model": {"license", "base_model", "library_name", "pipeline_tag", "tags", "datasets", "metrics", "model-index"},
    "dataset": {"license", "pretty_name", "task_categories", "size_categories", "tags", "configs"},
    "space": {
        "title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "app_file", "license", "models", "datasets",
        "tags", "short_description", "python_version", "pinned",
    },
}  # fmt: skip


def card_problems(content: str, repo_type: str) -> list[str]:
    """What is wrong with a card; nothing where the Hub would take it."""
    block = REGEX_YAML_BLOCK.search(content)
    if block is None:
        return ["there is no metadata block"]
    try:
        data = yaml.safe_load(block[2])
    except yaml.YAMLError as error:
        return [f"the metadata are not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata are no mapping"]
    problems = [f"{mark!r} was left in the text" for mark in ("{{", "{%", "}}", "%}") if mark in content]
    problems += [f"{name} is not metadata of a {repo_type}" for name in sorted(set(data) - KNOWN[repo_type])]
    # A model without a licence is one that nobody may use, and the Hub takes it.
    if data.get("license", "unknown" if repo_type == "model" else None) not in LICENCES:
        problems.append(f"license {data.get('license')!r} is not one of the Hub's")
    tags = data.get("tags", [])
    if not all(isinstance(tag, str) for tag in tags) or len(set(tags)) < len(tags):
        problems.append("tags are not distinct words")
    problems += {"model": model_problems, "dataset": dataset_problems, "space": space_problems}[repo_type](data)
    if not problems and CARDS[repo_type](content).data.to_dict() != data:
        problems.append("huggingface_hub reads the metadata otherwise than they are written")
    return problems


def model_problems(data: dict) -> list[str]:
    problems = []
    if data.get("pipeline_tag") not in TASKS:
        problems.append(f"pipeline_tag {data.get('pipeline_tag')!r} is not one of the Hub's")
    if not isinstance(data.get("library_name"), str):
        problems.append("library_name is no word")
    for repo_id in data.get("datasets", []):
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            problems.append(f"datasets: {error}")
    return problems + index_problems(data.get("model-index", []))


def index_problems(index: list) -> list[str]:
    problems = []
    for model in index:
        if not isinstance(model.get("name"), str) or not model.get("results"):
            problems.append("model-index needs a name and results")
            continue
        for result in model["results"]:
            if result.get("task", {}).get("type") not in TASKS:
                problems.append(f"model-index: {result.get('task')} is no task")
            if not {"name", "type"} <= set(result.get("dataset", {})):
                problems.append("model-index: a dataset needs name and type")
            for metric in result.get("metrics") or [{}]:
                value = metric.get("value")
                number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                if not isinstance(metric.get("type"), str) or not number:
                    problems.append(f"model-index: {metric} has no type, or no finite value")
    if index and not problems and eval_results_to_model_index(*model_index_to_eval_results(index)) != index:
        problems.append("model-index is not what huggingface_hub makes of it")
    return problems


def dataset_problems(data: dict) -> list[str]:
    problems = [f"size_categories {size!r} is none" for size in data.get("size_categories", []) if size not in SIZES]
    problems += [f"{task!r} is no task" for task in data.get("task_categories", []) if task not in TASKS]
    for config in data.get("configs", []):
        files = config.get("data_files", [])
        if not re.fullmatch(r"[\w.-]+", config.get("config_name", "")) or not files:
            problems.append(f"config {config} needs a name and files")
        problems += [f"{file} needs split and path" for file in files if set(file) != {"split", "path"}]
    return problems


def space_problems(data: dict) -> list[str]:
    problems = [
        f"{name} {data.get(name)!r} is no colour" for name in ("colorFrom", "colorTo") if data.get(name) not in COLOURS
    ]
    problems += [
        f"{name} is missing" for name in ("title", "emoji", "sdk", "sdk_version", "app_file") if name not in data
    ]
    return problems
