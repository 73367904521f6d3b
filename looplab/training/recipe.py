"""The recipe of a run: every number of it, read from a YAML file and from flags put over it.

Its sections `data` and `curriculum` belong to the task: `TASKS[data.task]` has the class of each. torch is imported
when a recipe is made, not with this module: tables of results read no recipe.
"""

import difflib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from data_builders.fields import MOST_LOOPS, Number, check_fields, number, numbers, path
from looplab.mistakes import Parser, sentence
from looplab.runs.field_help import Group, fields_help
from looplab.runs.recipes import TRAIN, read_recipe_file
from looplab.runs.sections import (
    build,
    check_name,
    defaults,
    expand_paths,
    field_types,
    flatten,
    leaves,
    suggestion,
)
from looplab.runs.yaml_text import parse_yaml
from looplab.tasks.data import Curriculum, Data
from looplab.tasks.registry import TASKS

from . import names

logger = logging.getLogger(__name__)


@strict
@dataclass
class Depth:
    """Loops per training batch, see `data_builders.DepthSampler`."""

    kind: Literal["fixed", "uniform", "poisson", "lognormal_poisson"] = "poisson"  # the distribution
    rate: Number | None = number(above=0, at_most=MOST_LOOPS)  # of the Poisson draw, before clipping
    mean: Number | None = number(at_least=1, at_most=MOST_LOOPS)  # of the loops: instead of `rate`, and of kind fixed
    minimum: int | None = number(at_least=1, at_most=MOST_LOOPS)  # fewest loops; not of kind fixed
    maximum: int | None = number(at_least=1, at_most=MOST_LOOPS)  # most loops; not of kind fixed
    sigma: Number | None = number(above=0)  # of kind lognormal_poisson: sd of the logarithm of the rate

    def sampler(self, seed: int):
        """The `DepthSampler`; ValueError for fields that do not go together."""
        from data_builders import DepthSampler

        return DepthSampler(seed=seed, **{name: value for name, value in vars(self).items() if value is not None})


@strict
@dataclass
class Optim:
    """The optimizer and its learning rates, see `optimizers.py`."""

    kind: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the layers, and AdamW for the rest
    lr: Number = number(1e-3, at_least=0)  # learning rate of AdamW
    muon_lr: Number = number(0.02, at_least=0)  # learning rate of Muon
    kv_gate_lr: Number | None = number(at_least=0)  # AdamW's, of the gates of kv_sharing="gated"; None: as any matrix
    betas: list[Number] = numbers([0.9, 0.999], at_least=0, below=1)  # decay of AdamW's two means
    weight_decay: Number = number(0.0, at_least=0)  # of matrices and embeddings; norms and biases have none
    warmup_steps: int = number(0, at_least=0)  # updates of linear warm-up; may be more than the run has
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"  # shape of the rates after the warm-up
    final_share: Number = number(0.0, at_least=0, below=1)  # of the learning rate, where a schedule that falls ends
    label_smoothing: Number = number(0.0, at_least=0, below=1)  # of the cross-entropy, over the vocabulary
    clip: Number | None = number(above=0)  # largest norm of the gradient


@strict
@dataclass
class Distill:
    """Learn from a model with a KV entry per loop to do with one entry per token (MELT), see `distillation.py`."""

    teacher: str | None = path()  # a saved model's folder; None: learn from the labels
    phase: Literal["interpolation", "alignment"] = "alignment"  # of the distillation
    alignment: Number = number(0.1, at_least=0)  # weight of the attention outputs' distance, in the phase alignment
    all_loops: bool = True  # compare what every loop would say; otherwise the last loop


@strict
@dataclass
class Train:
    """What of the weights of `init_from` is trained, see `trained.py`. All but `what` is for LoRA, in PEFT's words."""

    what: Literal["full", "core", "lora"] = "full"  # all weights, those that loop, or adapters by PEFT
    r: int = number(16, at_least=1)  # rank
    lora_alpha: int = number(32, at_least=1)  # adapters are scaled by lora_alpha / r
    lora_dropout: Number = number(0.0, at_least=0, below=1)  # of what the adapters read
    target_modules: list[str] | None = None  # matrices of a layer that get adapters, such as q_proj; None: all
    layers: Literal["core", "all"] = "core"  # whose matrices

    def check(self, init_from: str | None) -> None:
        """Raise ValueError for fields that contradict each other, and for LoRA without its library."""
        if self.what != "full" and init_from is None:
            raise ValueError(f"train.what={self.what} leaves weights as they are: name trained ones in init_from.")
        for item in fields(self):
            value = vars(self)[item.name]
            if self.what != "lora" and item.name != "what" and value != item.default:
                raise ValueError(
                    f"train.{item.name} is for train.what=lora, got train.what={self.what}: leave it out."
                )
        if self.target_modules == []:
            raise ValueError("train.target_modules is empty: name matrices of a layer, or leave it out for all.")
        if self.what == "lora" and find_spec("peft") is None:
            raise ValueError("train.what=lora needs the package peft: pip install 'looped-transformers[lora]'.")


# Fields of LoopedConfig that may differ from those the weights of `init_from` were trained with.
KEEPS_WEIGHTS = frozenset(
    {
        "num_loops", "attention_dropout", "residual_dropout", "embedding_dropout", "kv_sharing", "kv_gate",
        "kv_gate_rank", "prefill_chunk", "sliding_window", "exit_loss", "exit_entropy_weight",
    }
)  # fmt: skip


@strict
@dataclass
class Recipe:
    """Every number of a run. `model` holds fields of LoopedConfig; vocabulary and token ids come from the task."""

    name: str  # folder of the run, below output_dir
    model: dict  # fields of LoopedConfig, such as --model.num_loops
    data: Data  # the task's own, as is `curriculum`
    curriculum: Curriculum  # stages of training, of tasks that have them
    init_from: str | None = path()  # a saved model's folder: its weights, config and tokenizer; see KEEPS_WEIGHTS
    output_dir: str = path("runs")  # folder of runs
    overwrite: bool = field(default=False, metadata={"deletes": True})  # delete an existing run of this name
    seed: int = number(0, at_least=0, below=2**32)  # of weights, batches and loop counts
    depth: Depth = field(default_factory=Depth)  # loops of a training batch
    optim: Optim = field(default_factory=Optim)  # optimizer and learning rates
    distill: Distill = field(default_factory=Distill)  # a teacher
    train: Train = field(default_factory=Train)  # which weights are trained
    batch_size: int = number(256, at_least=1)  # rows, or molecules, of one update, over all ranks and micro-batches
    accumulation_steps: int = number(1, at_least=1)  # micro-batches an update is split into
    max_steps: int | None = number(at_least=1)  # updates of the run; this, max_seconds or both
    max_seconds: Number | None = number(above=0)  # of the training loop, counted across resumes
    num_grad_loops: int | None = number(at_least=1)  # back-propagate through the last loops only
    cut_chunks: bool = False  # with model.prefill_chunk: no gradient through the KV entries of earlier chunks
    precision: Literal["fp32", "bf16"] = "fp32"  # of the computation; weights are float32
    gradient_checkpointing: bool = False  # compute layers again in the backward pass, to save memory
    compile: bool = False  # torch.compile, layer by layer, so that the number of loops may vary
    gate_loops: int | None = number(at_least=1)  # loops of the held-out check; the model's num_loops by default
    eval_loops: list[int] = numbers(at_least=1, distinct=True)  # more loop counts of the held-out check
    log_every: int = number(10, at_least=1)  # updates between records of metrics.jsonl
    check_every: int = number(200, at_least=1)  # updates between held-out checks
    checkpoint_every: int = number(500, at_least=1)  # updates between savings of the whole state
    spike: Number | None = number(10.0, above=0)  # nats above the last losses' mean at which a run stops; None: never
    checkpoint_seconds: Number | None = number(above=0)  # seconds after which to save it, too
    keep_checkpoints: int = number(2, at_least=1)  # the newest of them
    max_shard_size: str = "5GB"  # of a file of weights in model/; larger models are divided
    snapshots: list[int] = numbers(at_least=1, distinct=True)  # updates at which to keep the model, for `looped lens`
    trackers: list[str] = field(default_factory=list)  # of accelerate: tensorboard, trackio, wandb, ...

    def __post_init__(self):
        check_fields(self)
        expand_paths(self)
        check_name(self.name)
        if self.max_steps is None and self.max_seconds is None:
            raise ValueError("the run has no budget: set max_steps, max_seconds, or both.")
        if len(self.optim.betas) != 2:
            raise ValueError(f"optim.betas must be two numbers, got {self.optim.betas}.")
        try:
            self.depth.sampler(self.seed)
        except ValueError as error:
            raise ValueError(f"depth: {error}") from error
        self.curriculum.check()
        self.data.check(self.init_from)
        self.train.check(self.init_from)
        if self.init_from is None:
            from modeling_looped import LoopedConfig

            try:
                LoopedConfig(**self.model)
            except (StrictDataclassError, TypeError, ValueError) as error:
                raise ValueError(f"model: {sentence(error) or error}") from error
        else:
            new = sorted(set(self.model) - KEEPS_WEIGHTS)
            if new:
                raise ValueError(
                    f"model.{new[0]} comes with the weights of {self.init_from}: beside init_from, model takes only "
                    f"{', '.join(sorted(KEEPS_WEIGHTS))}."
                )

    def resolved(self) -> dict:
        """Nested plain values, as recipe.yaml has them."""
        return {name: value for name, value in asdict(self).items() if name not in ("output_dir", "overwrite")}


def own_sections(task: str) -> dict[str, type]:
    """Section -> its class, of the sections that belong to the task."""
    return {"data": TASKS[task].Data, "curriculum": TASKS[task].Curriculum}


def add_recipe(parser: Parser) -> None:
    """The argument of a command that trains. Its flags are what the parser leaves; the help has them, too."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="YAML file of the fields below, a name of `looped recipes`, or a run folder to go on with",
    )
    parser.more = recipe_help


def recipe_help() -> str:
    """The fields of all tasks' recipes, as text."""
    shared = {"data": Data, "curriculum": Curriculum}  # and what a task has beyond it
    groups = [Group("fields of a recipe, as flags: --FIELD VALUE or --FIELD=VALUE", Recipe)]
    for name, form in field_types(Recipe, shared).items():
        if is_dataclass(form):
            groups.append(Group(name, form, f"{name}."))
            owners = {own_sections(task)[name]: TASKS[task].kind for task in TASKS if name in shared}
            owners.pop(form, None)
            groups += [Group(f"{name}, {kind}", own, f"{name}.", beyond=form) for own, kind in owners.items()]
    return fields_help(groups)


def recipe_defaults(task: str) -> dict:
    """Dotted field -> default; a field that the task does not have has the default it has in another task."""
    flat = {}
    for other in [*TASKS, task]:
        flat |= defaults(Recipe, own_sections(other))
    return flat


def build_recipe(values: dict) -> Recipe:
    """A recipe from nested plain values.

    Raises:
        ValueError: a field that is unknown, of another task, or of a wrong type, and a recipe that cannot be run.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected fields and values, got {values!r}.")
    values = {"data": {}, "curriculum": {}} | values
    task = values["data"].get("task", Data.task) if isinstance(values["data"], dict) else Data.task
    if not isinstance(task, str) or task not in TASKS:
        near = difflib.get_close_matches(str(task), TASKS, n=1, cutoff=0)[0]
        raise ValueError(f"data.task must be one of {', '.join(TASKS)}, got {task!r}; did you mean {near}?")
    for section in own_sections(task):
        if isinstance(values[section], dict):
            values[section] = of_task(values[section], section, task)
    return build(values, Recipe, own_sections(task), answer=answer)


def answer(name: str, near: str | None) -> str:
    """The end of a sentence about a name that is no field where it stands: how to say it, or what is most like it."""
    said = names.answer(name)
    if said is not None:
        return f": {said}."
    if near is not None:
        return suggestion(name, near)
    from modeling_looped import LoopedConfig

    if name in {item.name for item in fields(LoopedConfig)}:
        return suggestion(name, f"model.{name}")
    return "; `looped train --help` lists them."


def of_task(values: dict, section: str, task: str) -> dict:
    """The fields of a section, less the fields that only other tasks have.

    Raises:
        ValueError: one of these has another value than its default. Defaults are passed over: older versions
            wrote the fields of all tasks into every recipe.yaml.
    """
    known = {other: defaults(own_sections(other)[section]) for other in TASKS}
    kept = {}
    for name, value in values.items():
        owners = [other for other in TASKS if name in known[other]]
        if task in owners or not owners:
            kept[name] = value
        elif value not in [known[other][name] for other in owners]:
            raise ValueError(
                f"{section}.{name} is not for the task {task}: leave it out; {' and '.join(owners)} have it."
            )
    return kept


def move_check_every(values: dict) -> bool:
    """Put `check_every` beside `log_every`; whether it was in the curriculum, as in older versions."""
    curriculum = values.get("curriculum")
    if not isinstance(curriculum, dict) or "check_every" not in curriculum:
        return False
    values["curriculum"] = {name: value for name, value in curriculum.items() if name != "check_every"}
    values["check_every"] = curriculum["check_every"]
    return True


def switches() -> set[str]:
    """Dotted names of the fields that are true or false. A flag without a value makes one true, but none that deletes:
    that has to be written out."""
    kinds = [kind for task in TASKS for kind in leaves(Recipe, own_sections(task)).items()]
    return {name for name, item in kinds if item.type in (bool, bool | None) and not item.metadata.get("deletes")}


def read_flags(flags: Sequence[str]) -> Iterator[tuple[str, object]]:
    """(name, value) of flags `--section.field value`, `--section.field=value`, and `--field` for true; a name may have
    hyphens.

    Raises:
        ValueError: an argument is no flag, or its value cannot be read as YAML.
    """
    flags = list(flags)
    while flags:
        flag = flags.pop(0)
        spelt, equals, text = flag.partition("=")
        name = names.plain(spelt.removeprefix("--"))
        if not equals and not (flags and not flags[0].startswith("--")):
            text = "true" if name in switches() or names.is_switch(name) else None
        elif not equals:
            text = flags.pop(0)
        if not spelt.startswith("--") or text is None:
            raise ValueError(f"cannot read the argument {flag!r}: expected --section.field value.")
        yield name, parse_yaml(text, f"the argument {spelt}")


def given(name: str, value) -> set[str]:
    """Dotted names of the fields that a value gives, those of a section one by one."""
    return set(flatten({name: value})) if isinstance(value, dict) else {name}


def put(values: dict, name: str, value, spelt: str) -> None:
    """Put a value at a dotted name among nested values. Raises ValueError, with `spelt`, if it is below a value."""
    *sections, leaf = name.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ValueError(f"{spelt}: {section} is a value, it has no fields.")
    place[leaf] = value


def read_recipe(path: str | Path, flags: Sequence[str] = ()) -> Recipe:
    """Recipe in the YAML file `path`, or of that name, with flags put over it, see `read_flags`.

    A name of names.ALIASES may stand for its field, in the file and as a flag.

    Raises:
        ValueError: what is wrong and where, of a file or a flag that cannot be read and a recipe that cannot be run.
    """
    named = Path(path)
    path, values = read_recipe_file(path, TRAIN)
    if path.parent == named:  # a run folder, and the run goes on in it
        values |= {"output_dir": str(path.absolute().parent.parent), "name": path.absolute().parent.name}
    twice = "check_every" in values
    moved = move_check_every(values)
    if moved and twice:
        raise ValueError(f"{path}: check_every and curriculum.check_every name the same thing: leave the second out.")
    written: dict[str, str] = {}  # field -> what was written for it
    for name, value in list(values.items()):
        field_name, value = names.meaning(name, value, f"{path}: {name}")
        if field_name != name:
            del values[name]
            other = written.get(field_name, field_name)
            if field_name in written or names.find(values, field_name) is not None:
                raise ValueError(f"{path}: {other} and {name} name the same field: leave one of them out.")
            put(values, field_name, value, f"{path}: {name}")
            written[field_name] = name
    by_flag: dict[str, str] = {}  # field -> the flag for it
    for name, value in read_flags(flags):
        field_name, value = names.meaning(name, value, f"--{name}")
        for known in given(field_name, value):
            other = by_flag.setdefault(known, name)
            if other != name and (other in names.ALIASES or name in names.ALIASES):
                raise ValueError(f"--{other} and --{name} name the same field: leave one of them out.")
        put(values, field_name, value, f"--{name}")
        written[field_name] = name
        moved |= move_check_every(values)
    if moved:
        logger.warning("curriculum.check_every is now check_every: write it beside log_every.")
    try:
        recipe = build_recipe(values)
    except ValueError as error:
        raise ValueError(names.as_written(str(error), written)) from error
    names.check_meaning(written, flatten(asdict(recipe)))
    return recipe
