"""`looped frozen RECIPE`: measure what looping a frozen model is worth, in four stages.

    profile   on validation text: how much each layer writes, and how far looping a window moves its output
    sweep     every setting of the grid, on validation rows
    confirm   the best setting of the sweep, and the controls, once on test rows, paired with the base model
    cost      seconds over those of the base model, beside 1 + (K - 1) w / N for K loops of w of N layers

Every measurement is written to runs/NAME/*.jsonl as soon as it is made, and is not made again. The setting is chosen
by the log-probability of the right choice on the benchmarks of the recipe. It is not chosen by the loss on text, which
need not agree with it (arXiv 2605.23872, authors' repository).
"""

import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders import TextBlocks, load_task
from data_builders.fields import Range, check_fields, number, numbers, path
from looplab.runs.field_help import Group, fields_help
from looplab.runs.folder import to_json_lines
from looplab.runs.models import load_model
from looplab.runs.recipes import FROZEN, read_recipe_file
from looplab.runs.sections import build, check_name, expand_paths
from looplab.runs.writing import below, write_whole
from looplab.runs.yaml_text import read_yaml, to_yaml
from modeling_looped import FrozenLoopedConfig, default_window, looped
from modeling_looped.frozen_window_looped import decoder_layers

from .parts import task_names

STAGES = ("profile", "sweep", "confirm", "cost")
SPLITS = {"sweep": "validation", "confirm": "test"}
TEXT = "text"  # stands for text beside the names of the benchmarks


@strict
@dataclass
class LoopSetting:
    """A way to loop a window. horizon: the time that all loops integrate over; one plain run of the window takes 1."""

    window: list[int] | tuple[int, int] | None = numbers(None, at_least=-1)
    num_loops: int = number(3, at_least=1)
    horizon: int | float = number(1, above=0)
    beta: int | float | None = number()
    method: str = "blend"

    def arguments(self) -> dict:
        """The arguments of `looped`."""
        step = None if self.horizon == 1 else self.horizon / self.num_loops
        values = {name: value for name, value in asdict(self).items() if name != "horizon"}
        return values | {"step": step}

    def attached(self, model: PreTrainedModel) -> AbstractContextManager:
        """Within the block, `model` loops."""
        return looped(model, **self.arguments())

    def __str__(self) -> str:
        if self.num_loops == 1:
            return "base model"
        window = f"layers {self.window[0]}-{self.window[1]}" if self.window else "default window"
        parts = [window, self.method, f"K {self.num_loops}"]
        if self.method != "naive":
            parts.append(f"T {self.horizon:g}")
        if self.beta is not None:
            parts.append(f"beta {self.beta:g}")
        return ", ".join(parts)


BASE = LoopSetting(num_loops=1)


@strict
@dataclass
class Cost:
    """The work of the stage cost."""

    loops: list[int] = numbers([2, 3, 6], at_least=2, distinct=True)  # loop counts that are timed
    prompt: int = number(256, at_least=1)  # tokens
    new_tokens: int = number(32, at_least=1)  # tokens
    rounds: int = number(7, at_least=1)  # interleaved pairs of each ratio


@strict
@dataclass
class FrozenRecipe:
    """The recipe of a study."""

    name: str  # folder of the study, below output_dir
    model: str = field(metadata={"path": True})  # folder or Hub name; smollm2 is the folder of `looped fetch smollm2`
    confirm: dict[str, int] = field(metadata={"range": Range(at_least=1)})  # rows per benchmark, and blocks of `text`
    sweep: dict[str, int] = field(default_factory=dict, metadata={"range": Range(at_least=1)})  # the same
    # Without a grid, `confirm` measures the controls alone: settings written down before.
    grid: list[dict] = field(default_factory=list)  # fields of LoopSetting -> a value or values: all combinations
    controls: list[dict] = field(default_factory=list)  # settings that `confirm` measures in any case
    cost: Cost = field(default_factory=Cost)  # what is timed
    text: dict = field(default_factory=dict)  # fields of the text builder; the text of `looped fetch corpus` if empty
    benchmarks: str | None = path()  # folder; the one of `looped fetch benchmarks` unless given
    sequence_length: int = number(256, at_least=1)  # tokens of a block of text
    batch_size: int = number(16, at_least=1)  # answers that are scored at once
    output_dir: str = path("runs")  # folder of runs

    def __post_init__(self):
        check_fields(self)
        expand_paths(self)
        check_name(self.name)
        if not self.grid and (self.sweep or not self.controls):
            raise ValueError(
                "without a grid there is no sweep, and `confirm` measures controls: give the one or the other."
            )
        if self.grid and not set(self.sweep) - {TEXT}:
            raise ValueError("sweep has no task but text, by which no setting may be chosen: add one.")
        known = [TEXT, *task_names()]
        for name in {**self.sweep, **self.confirm}:
            if name not in known:
                raise ValueError(f"{name} is no task of a study: sweep and confirm take {', '.join(known)}.")
        # A setting out of range is refused now, not after hours.
        self.settings()
        for values in self.controls:
            make_setting(values)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def stages(self) -> Sequence[str]:
        """The stages that it has settings for."""
        return STAGES if self.grid else ("confirm",)

    def counts(self, stage: str) -> dict[str, int]:
        """Benchmark -> number of rows that a stage measures; "text" -> number of blocks."""
        return {"sweep": self.sweep, "confirm": self.confirm}[stage]

    def settings(self) -> list[LoopSetting]:
        """All settings of the grid, each once. Raises ValueError as `make_setting`."""
        found = {}
        for block in self.grid:
            if not block or [] in block.values():
                raise ValueError(f"grid has a block without a setting, {block}: give every field of it a value.")
            lists = [value if isinstance(value, list) else [value] for value in block.values()]
            for values in itertools.product(*lists):
                setting = make_setting(dict(zip(block, values, strict=True)))
                found[str(setting)] = setting
        return list(found.values())


def make_setting(values: dict) -> LoopSetting:
    """The setting with the fields `values`. Raises ValueError for a field that is unknown or out of range."""
    try:
        setting = LoopSetting(**values)
        check_fields(setting)
        FrozenLoopedConfig(**setting.arguments())
        return setting
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(
            f"{values} is not a setting ({error}): its fields are {list(LoopSetting.__annotations__)}."
        ) from error


def recipe_help() -> str:
    """The fields of a recipe of a study, as text."""
    whole = Group("fields of a recipe of `looped frozen`", FrozenRecipe, flags=False)
    return fields_help([whole, Group("cost", Cost, "cost.", flags=False)])


def read_recipe(path: str | Path) -> FrozenRecipe:
    """The recipe in a file, or of that name.

    Raises ValueError for a recipe that does not exist, and a field that is unknown, missing, of wrong type or out of
    range.
    """
    path, values = read_recipe_file(path, FROZEN)
    try:
        return build(values, FrozenRecipe)
    except ValueError as error:
        raise ValueError(f"{path} is not a recipe of `looped frozen`: {error}") from error


def load(recipe: FrozenRecipe, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's model in float32, in evaluation mode, and its tokenizer. Raises ValueError as `load_model`."""
    from .parts import PARTS, fetched

    folder = fetched(recipe.model) if recipe.model in PARTS else recipe.model
    return load_model(folder, "name another `model` in the recipe.", trust_remote_code, torch.float32)


class TextRows:
    """Blocks of text, evenly spread over a split, and the log-probabilities (T, V) of the base model on each."""

    def __init__(self, recipe: FrozenRecipe, stage: str, model, tokenizer):
        split, count, length = SPLITS[stage], recipe.counts(stage)[TEXT], recipe.sequence_length
        rows = load_task("text", "files" if recipe.text else "corpus", **recipe.text)[split]
        blocks = TextBlocks(rows, tokenizer, length)
        if count > len(blocks):
            raise ValueError(f"{split} text has {len(blocks)} blocks of {length} tokens, {count} were asked for.")
        self.rows = blocks.rows(torch.linspace(0, len(blocks) - 1, count).long())  # strictly rising: each block once
        self.model = model
        self.base = [log_probabilities(model, ids) for ids in self.rows["input_ids"]]

    def __len__(self) -> int:
        return len(self.base)

    def score(self, block: int) -> dict:
        """Compare the model as it loops now with the base model, on one block.

        nll: loss in nats per token. agreement: share of positions at which both predict the same token. kl: KL of the
        model from the base model, in nats per token.
        """
        here, base = log_probabilities(self.model, self.rows["input_ids"][block]), self.base[block]
        return {
            "nll": F.nll_loss(here, self.rows["shift_labels"][block]).item(),
            "agreement": (here.argmax(-1) == base.argmax(-1)).float().mean().item(),
            "kl": F.kl_div(here, base, log_target=True, reduction="batchmean").item(),
        }


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (T, V) of the next tokens, for ids (T,)."""
    return model(ids[None], use_cache=False).logits[0].log_softmax(-1)


def read_rows(path: Path) -> list[dict]:
    """The lines of a .jsonl file; none if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def measure(recipe: FrozenRecipe, stage: str, settings: Sequence[LoopSetting], model, tokenizer) -> list[dict]:
    """Measure every setting on every benchmark of a stage, but for those on file, and return all lines of the file:

    {"name": of the setting, "setting": its fields, "task": benchmark or "text", "rows": what was measured on each row}
    """
    from .harness import score

    path, counts = recipe.folder / f"{stage}.jsonl", recipe.counts(stage)
    measured = read_rows(path)
    done = {(row["name"], row["task"]) for row in measured}
    wanted = [(setting, task) for task in counts for setting in settings if (str(setting), task) not in done]
    text = None
    for setting, task in tqdm(wanted, desc=stage, unit="setting"):
        if task == TEXT and text is None:
            text = TextRows(recipe, stage, model, tokenizer)
        with setting.attached(model):
            if task == TEXT:
                rows = [text.score(block) for block in range(len(text))]
            else:
                split, data = SPLITS[stage], recipe.benchmarks
                rows = score(model, tokenizer, task, split, counts[task], recipe.batch_size, data)
        measured.append({"name": str(setting), "setting": asdict(setting), "task": task, "rows": rows})
        write_whole(path, to_json_lines(measured))
    return measured


def gains(rows: Sequence[dict], task: str) -> dict[str, tuple[dict, float]]:
    """Name of a setting -> (its fields, mean gain over the base model on `task`).

    The gain is in nats of the log-probability of the right choice, or in nats per token of text. rows: of `measure`.
    """
    from .harness import answer_logprob

    def values(row: dict) -> list[float]:
        return [-each["nll"] if task == TEXT else answer_logprob(each) for each in row["rows"]]

    of_task = {row["name"]: row for row in rows if row["task"] == task}
    base = values(of_task[str(BASE)])
    return {
        name: (row["setting"], float(np.mean(np.subtract(values(row), base))))
        for name, row in of_task.items()
        if name != str(BASE)
    }


def best(recipe: FrozenRecipe, rows: Sequence[dict]) -> LoopSetting:
    """The setting of the sweep with the largest gain, averaged over the benchmarks. rows: of `measure`."""
    per_task = [gains(rows, task) for task in recipe.sweep if task != TEXT]
    mean = {name: statistics.fmean(task[name][1] for task in per_task) for name in per_task[0]}
    return make_setting(per_task[0][max(mean, key=lambda name: mean[name])][0])


def run_sweep(recipe: FrozenRecipe, model, tokenizer) -> list[dict]:
    """`measure` the base model and all settings of the grid."""
    return measure(recipe, "sweep", [BASE, *recipe.settings()], model, tokenizer)


def run_confirm(recipe: FrozenRecipe, model, tokenizer) -> list[dict]:
    """`measure` the base model, the best setting of the sweep on file if there is a grid, and the controls."""
    chosen = [best(recipe, read_rows(recipe.folder / "sweep.jsonl"))] if recipe.grid else []
    settings = {str(setting): setting for setting in [BASE, *chosen, *map(make_setting, recipe.controls)]}
    return measure(recipe, "confirm", list(settings.values()), model, tokenizer)


@contextmanager
def last_calls(layers: Sequence[torch.nn.Module]) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Within the block, layer number -> (input, output) of the layer's last call.

    The last layer of a looped window returns the result of all loops as the output of its last call.
    """
    calls = {}

    def keep(index, module, args, output):
        calls[index] = args[0], output[0] if isinstance(output, tuple) else output

    handles = [layer.register_forward_hook(partial(keep, index)) for index, layer in enumerate(layers)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def distance(moved: torch.Tensor, unit: torch.Tensor) -> float:
    """|moved| / |unit|, averaged over tokens; both are (T, D)."""
    return (moved.norm(dim=-1) / unit.norm(dim=-1)).mean().item()


def run_profile(recipe: FrozenRecipe, model, tokenizer) -> list[dict]:
    """Measure the depth profile, unless it is on file: a row per layer, then a row per window, looped by default.

    {"layer", "update"}     |L(x) - x| / |x| of a layer L, averaged over tokens
    {"window", "shift",     how far looping moves the output of the window, in units of what the window writes
     "agreement", "kl",     see `TextRows.score`
     "nll_change"}          change of the loss, in nats per token
    """
    path = recipe.folder / "profile.jsonl"
    if path.exists():
        return read_rows(path)
    text = TextRows(recipe, "sweep", model, tokenizer)
    layers, blocks = decoder_layers(model), range(len(text))
    natural, scores = [], []
    with last_calls(layers) as calls:
        for block in blocks:
            scores.append(text.score(block))
            natural.append(dict(calls))
    updates = [[distance(after - before, before) for before, after in calls.values()] for calls in natural]
    rows = [
        {"layer": layer, "update": statistics.fmean(each)} for layer, each in enumerate(zip(*updates, strict=True))
    ]
    base_nll = statistics.fmean(score["nll"] for score in scores)
    first, last = default_window(len(layers))
    for start in tqdm(range(1, len(layers) - (last - first)), desc="profile", unit="window"):
        end, shifts, scores = start + last - first, [], []
        with looped(model, (start, end)), last_calls(layers) as calls:
            for block in blocks:
                scores.append(text.score(block))
                window_input, window_output = natural[block][start][0], natural[block][end][1]
                shifts.append(distance(calls[end][1] - window_output, window_output - window_input))
        row = {"window": [start, end], "shift": statistics.fmean(shifts)}
        row |= {name: statistics.fmean(score[name] for score in scores) for name in ("agreement", "kl")}
        rows.append(row | {"nll_change": statistics.fmean(score["nll"] for score in scores) - base_nll})
    write_whole(path, to_json_lines(rows))
    return rows


@torch.no_grad()
def run_cost(recipe: FrozenRecipe, model, tokenizer) -> list[dict]:
    """Time the model with the default window looped, unless that is on file: a row for prefill and one for decode, per
    loop count.

    {"part", "loops", "ratio": seconds over those of the base model, median of interleaved pairs, "lowest", "highest",
     "formula": 1 + (loops - 1) w / N, "base_seconds"}
    """
    path, asked = recipe.folder / "cost.jsonl", recipe.cost
    if path.exists():
        return read_rows(path)
    config = model.config.get_text_config(decoder=True)
    ids = torch.randint(config.vocab_size, (1, asked.prompt), generator=torch.Generator().manual_seed(0))

    def prefill(num_loops: int) -> None:
        model(ids, logits_to_keep=1, num_loops=num_loops)

    def decode(num_loops: int) -> None:
        model.generate(
            ids[:, :16], max_new_tokens=asked.new_tokens, min_new_tokens=asked.new_tokens, do_sample=False,
            num_loops=num_loops, pad_token_id=0,
        )  # fmt: skip

    rows = []
    with looped(model):
        first, last = model.loop.config.window
        share = (last - first + 1) / config.num_hidden_layers
        for part, call in (("prefill", prefill), ("decode", decode)):
            seconds: dict[int, list[float]] = {loops: [] for loops in (1, *asked.loops)}
            for _ in tqdm(range(asked.rounds + 1), desc=f"cost of {part}", unit="round"):
                for loops, times in seconds.items():
                    began = time.perf_counter()
                    call(loops)
                    times.append(time.perf_counter() - began)
            for loops in asked.loops:
                pairs = zip(seconds[loops][1:], seconds[1][1:], strict=True)  # the first round warms up
                ratios = sorted(looped_time / base_time for looped_time, base_time in pairs)
                rows.append(
                    {
                        "part": part, "loops": loops, "ratio": statistics.median(ratios), "lowest": ratios[0],
                        "highest": ratios[-1], "formula": 1 + (loops - 1) * share,
                        "base_seconds": statistics.median(seconds[1][1:]),
                    }
                )  # fmt: skip
    write_whole(path, to_json_lines(rows))
    return rows


def text_comparison(base: Sequence[dict], other: Sequence[dict], seed: int = 0) -> str:
    """One line on the text scores of `other` beside those of the base model on the same blocks: the change of the loss
    with its 95 % bootstrap interval and Wilcoxon's p, mean agreement and mean KL."""
    from looplab.runs.intervals import bootstrap_intervals

    from .harness import wilcoxon_p

    changes = np.subtract([row["nll"] for row in other], [row["nll"] for row in base])
    [(low, high)] = bootstrap_intervals(changes[None], seed)
    agreement, kl = (statistics.fmean(row[name] for row in other) for name in ("agreement", "kl"))
    return (
        f"{statistics.fmean(row['nll'] for row in base):.4f} {changes.mean():+.4f} nats per token "
        f"[{low:+.4f}, {high:+.4f}] (Wilcoxon p {wilcoxon_p(changes):.3g}, {len(changes)} blocks); agreement "
        f"{100 * agreement:.1f} %, KL {kl:.4f}"
    )


def report(recipe: FrozenRecipe) -> str:
    """The study on file as Markdown: the gains of the sweep, the comparisons of `confirm`, and the cost."""
    from .harness import compare

    lines = [f"# {recipe.name}"]
    sweep = read_rows(recipe.folder / "sweep.jsonl")
    for task in [task for task in recipe.sweep if any(row["task"] == task for row in sweep)]:
        ranked = sorted(gains(sweep, task).items(), key=lambda item: -item[1][1])
        unit = "nats per token" if task == TEXT else "nats on the right choice"
        lines += [f"\n## sweep, {task} (validation), gain over the base model in {unit}\n"]
        lines += [f"- {name}: {gain:+.4f}" for name, (_, gain) in ranked]
    confirm = read_rows(recipe.folder / "confirm.jsonl")
    base = {row["task"]: row["rows"] for row in confirm if row["name"] == str(BASE)}
    for task in base:
        lines += [f"\n## confirm, {task} (test), paired with the base model\n"]
        for row in confirm:
            if row["task"] == task and row["name"] != str(BASE):
                said = text_comparison(base[task], row["rows"]) if task == TEXT else compare(base[task], row["rows"])
                lines.append(f"- {row['name']}: {said}")
    cost = read_rows(recipe.folder / "cost.jsonl")
    if cost:
        lines += ["\n## cost, wall time over the base model\n", "| | loops | measured | range | 1 + (K - 1) w / N |"]
        lines += ["|---|---|---|---|---|"]
    for row in cost:
        between = f"{row['lowest']:.2f} to {row['highest']:.2f}"
        lines.append(f"| {row['part']} | {row['loops']} | {row['ratio']:.2f} | {between} | {row['formula']:.2f} |")
    return "\n".join(lines) + "\n"


def study(
    path: str | Path, stages: Sequence[str] | None = None, trust_remote_code: bool = False, format: str = "png"
) -> Path:
    """Run the stages of a recipe that are not on file yet, draw the figures, and return the path of the report.

    Args:
        path: of the recipe.
        stages: those of the recipe unless given.
        trust_remote_code: run the model's own code, see `load_model`.
        format: of the figures, see `drawing.save`.

    Raises:
        ValueError: the recipe is not valid, its folder holds the study of another recipe, or a part was not fetched.
    """
    from looplab.instruments.drawing import save

    from .study_figures import profile_figure, sweep_figure

    recipe = read_recipe(path)
    figures = below(recipe.folder, "figures")
    kept = recipe.folder / "recipe.yaml"
    fixed = {name: value for name, value in asdict(recipe).items() if name not in ("grid", "controls", "output_dir")}
    if kept.exists() and read_yaml(kept) != fixed:
        raise ValueError(f"{recipe.folder} holds a study of another recipe: give this one another name, or delete it.")
    stages = recipe.stages if stages is None else stages
    if without := sorted(set(stages) - set(recipe.stages)):
        raise ValueError(
            f"{recipe.name} has no grid, which {without[0]} goes with: give it one, or leave the stage out."
        )
    if recipe.grid and "confirm" in stages and "sweep" not in stages and not (recipe.folder / "sweep.jsonl").exists():
        raise ValueError(
            f"confirm takes the setting that the sweep chose, and {recipe.folder} has no sweep: run it first."
        )
    if "profile" in stages and TEXT not in recipe.sweep:
        raise ValueError("the profile is measured on text: add text to sweep, with a number of blocks.")
    model, tokenizer = load(recipe, trust_remote_code)
    write_whole(kept, to_yaml(fixed))
    runs = {"profile": run_profile, "sweep": run_sweep, "confirm": run_confirm, "cost": run_cost}
    for stage in [stage for stage in STAGES if stage in stages]:
        runs[stage](recipe, model, tokenizer)
    profile, sweep = (read_rows(recipe.folder / f"{stage}.jsonl") for stage in ("profile", "sweep"))
    if profile:
        save(profile_figure(profile), figures / "profile.png", format)
    for task in {row["task"] for row in sweep if row["name"] != str(BASE)}:
        save(sweep_figure(gains(sweep, task), task), figures / f"sweep_{task}.png", format)
    return write_whole(recipe.folder / "report.md", report(recipe))
