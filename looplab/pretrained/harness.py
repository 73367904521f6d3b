"""Score a loaded model on a multiple-choice benchmark with lm-evaluation-harness (Gao et al. 2024, arXiv 2405.12256),
and compare two models item by item.

benchmarks/NAME.yaml says how a row of `data_builders.MultipleChoice` becomes a prompt. The score of a choice is the
sum of the log-probabilities of its tokens after the prompt, in nats. `acc` takes the choice with the largest score,
`acc_norm` the one with the largest score per character.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from lm_eval import evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from scipy.stats import wilcoxon
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders import MultipleChoice
from data_builders.builders import build_splits
from looplab.runs.intervals import bootstrap_intervals
from looplab.runs.yaml_text import read_yaml
from modeling_looped import LoopedForCausalLM
from modeling_looped.depth_looped import generation_count
from modeling_looped.frozen_looped import FrozenLooped

from .parts import BENCHMARK_FILES, fetched, task_names


@dataclass(frozen=True)
class Comparison:
    """The second model compared with the first on the same items; the intervals are bootstrap intervals at 95 %."""

    items: int
    first: float  # accuracy
    second: float  # accuracy
    points: float  # second - first, in percentage points
    points_interval: tuple[float, float]
    gained: int  # items that only the second model has right
    lost: int  # items that only the first model has right
    mcnemar_p: float  # exact, two-sided
    nats: float  # mean gain in log-probability of the right choice, given that one of the choices follows
    nats_interval: tuple[float, float]
    wilcoxon_p: float  # of the gains in nats, two-sided

    def __str__(self) -> str:
        return (
            f"{100 * self.first:.1f} -> {100 * self.second:.1f} %: {self.points:+.2f} points "
            f"[{self.points_interval[0]:+.2f}, {self.points_interval[1]:+.2f}], {self.gained} gained and {self.lost} "
            f"lost of {self.items} (McNemar p {self.mcnemar_p:.3g}); {self.nats:+.4f} nats "
            f"[{self.nats_interval[0]:+.4f}, {self.nats_interval[1]:+.4f}] (Wilcoxon p {self.wilcoxon_p:.3g})"
        )


def settle_depth(model: PreTrainedModel) -> None:
    """Let `forward`, which scores the choices, run as many loops as `generate` would by the generation config."""
    if isinstance(model, LoopedForCausalLM):
        model.config.num_loops = generation_count(model.config, model.generation_config)
    elif isinstance(model, FrozenLooped):
        model.loop.config.num_loops = generation_count(model.loop.config, model.generation_config)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    split: Literal["validation", "test"] = "validation",
    limit: int | None = None,
    batch_size: int = 8,
    data: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> list[dict]:
    """A dict for each row of a split, in order: id, answer, logprobs (nats, one per choice), acc and acc_norm.

    The model is scored on its device and in its dtype, with any hooks that its caller attached. It is in evaluation
    mode meanwhile.

    Args:
        limit: score the first rows only; the order of the rows is seeded, so that they are a fair sample.
        batch_size: choices in a forward pass.
        data: the folder that `looped fetch benchmarks` made; the one in the user's cache unless given.
        cache_dir: of the `datasets` library.

    Raises:
        ValueError: unknown task or split, limit or batch_size below 1, or the benchmarks were not fetched.
    """
    if task not in task_names():
        raise ValueError(f"there is no task {task!r}; there are {', '.join(task_names())}.")
    if split not in ("validation", "test"):
        raise ValueError(f"split must be validation or test, got {split!r}.")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}.")
    folder = fetched("benchmarks") if data is None else Path(data)
    builder = MultipleChoice(config_name=task, data_dir=str(folder), cache_dir=cache_dir)
    rows = build_splits(builder)

    config = read_yaml(BENCHMARK_FILES / f"{task}.yaml")
    # The harness always evaluates its test split, so `split` goes by that name.
    harness_task = ConfigurableTask(config=config | {"custom_dataset": lambda: rows, "test_split": split})
    training = model.training
    # The harness may set a padding token: it gets a copy.
    language_model = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    try:
        results = evaluate(language_model, {"tasks": {task: harness_task}}, limit=limit, bootstrap_iters=0)
    finally:
        model.train(training)
    return [
        {
            "id": sample["doc"]["id"],
            "answer": sample["doc"]["answer"],
            "logprobs": [logprob for logprob, _ in sample["filtered_resps"]],
            "acc": bool(sample["acc"]),
            "acc_norm": bool(sample["acc_norm"]),
        }
        for sample in results["samples"][task]
    ]


def compare(
    first: Sequence[dict], second: Sequence[dict], metric: Literal["acc", "acc_norm"] = "acc", seed: int = 0
) -> Comparison:
    """Compare two models item by item. first, second: what `score` returned for each.

    Raises:
        ValueError: the items differ or come in another order, there are none, or the metric is unknown.
    """
    if metric not in ("acc", "acc_norm"):
        raise ValueError(f"metric must be acc or acc_norm, got {metric!r}.")
    if not first or [row["id"] for row in first] != [row["id"] for row in second]:
        raise ValueError("the two models must be scored on the same items in the same order: same task, split, limit.")
    right = np.array([[row[metric] for row in rows] for rows in (first, second)], dtype=float)  # (2, N)
    logprobs = np.array([[answer_logprob(row) for row in rows] for rows in (first, second)])  # (2, N)
    gains = np.stack([100 * (right[1] - right[0]), logprobs[1] - logprobs[0]])  # (2, N): points and nats
    items = gains.shape[1]
    points_interval, nats_interval = bootstrap_intervals(gains, seed)
    gained, lost = int((gains[0] > 0).sum()), int((gains[0] < 0).sum())
    return Comparison(
        items=items,
        first=float(right[0].mean()),
        second=float(right[1].mean()),
        points=float(gains[0].mean()),
        points_interval=points_interval,
        gained=gained,
        lost=lost,
        mcnemar_p=mcnemar_p(gained, lost),
        nats=float(gains[1].mean()),
        nats_interval=nats_interval,
        wilcoxon_p=wilcoxon_p(gains[1]),
    )


def wilcoxon_p(gains: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on gains (N,); 1 if all gains are 0, which leaves nothing to rank."""
    return float(wilcoxon(gains).pvalue) if gains.any() else 1.0


def answer_logprob(row: dict) -> float:
    """Log-probability of the right choice in nats, given that one of the choices follows."""
    return row["logprobs"][row["answer"]] - float(np.logaddexp.reduce(row["logprobs"]))


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact p of McNemar's test: gained and lost items are equally likely if the two models are equal."""
    differ = gained + lost
    tail = sum(math.comb(differ, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**differ)


def accuracies(rows: Sequence[dict]) -> str:
    """acc and acc_norm with their standard errors, in %, as text."""
    said = []
    for metric in ("acc", "acc_norm"):
        share = sum(row[metric] for row in rows) / len(rows)
        said.append(f"{metric} {100 * share:.1f} +- {100 * math.sqrt(share * (1 - share) / len(rows)):.1f} %")
    return f"{', '.join(said)} of {len(rows)} items"
