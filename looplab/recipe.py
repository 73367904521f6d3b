"""The recipe of a run: every number of it, read from a YAML file and from flags put over it."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError

Number = int | float


@strict
@dataclass
class Data:
    task: Literal["khop", "composition", "text", "molecules"] = "khop"
    seed: int = 0
    overrides: dict = field(default_factory=dict)  # fields of the builder's config
    # Hops, and molecules where no files are named:
    config: str = "cpu"  # preset of the builder
    # Hops:
    weighting: Literal["rows", "uniform"] = "rows"  # hop count of a step: by the rows each has, or all alike
    readout: Literal["token", "last"] = "token"  # where the answer is read: an appended token, or the last relation
    pad_to: int | None = None  # pad every row to this length and read at its end, as the paper's code does
    at_least_hops: bool = False  # raise a batch's loops to its hop count where fewer were drawn
    # Text, whose tokenizer comes from `init_from`, `tokenizer` or `vocab_size`:
    files: list[str] | None = None  # .txt or .md files and globs; without them what `looped fetch corpus` made
    sequence_length: int | None = None  # tokens of a row
    tokenizer: str | None = None  # a folder with a tokenizer in it
    vocab_size: int | None = None  # of a byte-level BPE that is learnt from the training text
    validation_tokens: int | None = None  # measure on so many held-out tokens, not on all
    # Molecules take `sequence_length`, the tokens of a packed row, `files` (.csv, .smi), `validation_tokens`, and:
    spellings: int | None = None  # train on so many random SMILES of each molecule, another in every epoch, in turn


@strict
@dataclass
class Depth:
    """Loops per training batch, see `data_builders.DepthSampler`."""

    kind: Literal["fixed", "uniform", "poisson", "lognormal_poisson"] = "poisson"
    rate: Number | None = None
    mean: Number | None = None
    minimum: int | None = None
    maximum: int | None = None
    sigma: Number | None = None


@strict
@dataclass
class Optim:
    kind: Literal["adamw", "muon"] = "adamw"
    lr: Number = 1e-3  # of AdamW
    muon_lr: Number = 0.02
    kv_gate_lr: Number | None = None  # AdamW's, of the gates of kv_sharing="gated"; those of their kind if not given
    betas: list[Number] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: Number = 0.0  # of matrices and embeddings; norms and biases have none
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    final_share: Number = 0.0  # of the learning rate, where a schedule that falls ends
    label_smoothing: Number = 0.0  # of the cross-entropy, over the vocabulary
    clip: Number | None = None  # largest norm of the gradient


@strict
@dataclass
class Distill:
    """Learn from a model with a KV row per loop to do with one row per token (MELT), see `looplab/distillation.py`."""

    teacher: str | None = None  # a saved model's folder; None: learn from the labels
    phase: Literal["interpolation", "alignment"] = "alignment"
    alignment: Number = 0.1  # weight of the attention outputs' distance, in the phase of that name
    all_loops: bool = True  # compare what every loop would say; otherwise the last loop


@strict
@dataclass
class Curriculum:
    """Stage k trains on 1..k hops jointly until k passes the gate. Ends default to the deepest hop in the data.

    Text and molecules have no stages: of these fields they take `check_every` only.
    """

    start_hops: int | None = None
    stop_hops: int | None = None
    threshold: Number = 0.95
    check_every: int = 200  # steps
    min_steps: int = 0  # of a stage
    after_last: Literal["stop", "continue"] = "continue"  # when stop_hops passed and budget remains
    restart_optimizer: bool = False  # the paper starts optimizer and warm-up afresh at each stage


# Fields of LoopedConfig that may differ from those the weights of `init_from` were trained with.
KEEPS_WEIGHTS = frozenset(
    {
        "num_loops", "attention_dropout", "residual_dropout", "embedding_dropout", "kv_sharing", "kv_gate",
        "kv_gate_rank", "prefill_chunk", "exit_loss", "exit_entropy_weight",
    }
)  # fmt: skip


@strict
@dataclass
class Recipe:
    """Every number of a run. `model` holds fields of LoopedConfig; vocabulary and token ids come from the task."""

    name: str
    model: dict
    init_from: str | None = None  # a saved model's folder: its weights, config and tokenizer; see KEEPS_WEIGHTS
    output_dir: str = "runs"
    overwrite: bool = False  # delete an existing run of this name
    seed: int = 0
    data: Data = field(default_factory=Data)
    depth: Depth = field(default_factory=Depth)
    optim: Optim = field(default_factory=Optim)
    curriculum: Curriculum = field(default_factory=Curriculum)
    distill: Distill = field(default_factory=Distill)
    batch_size: int = 256  # rows, or molecules, of one update, over all ranks and micro-batches
    accumulation_steps: int = 1  # micro-batches an update is split into
    max_steps: int | None = None
    max_seconds: Number | None = None  # of the training loop, counted across resumes
    num_grad_loops: int | None = None  # back-propagate through the last loops only
    cut_chunks: bool = False  # with model.prefill_chunk: no gradient through the KV rows of earlier chunks
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False  # layer by layer, so that the number of loops may vary
    gate_loops: int | None = None  # loops at which the gate is measured; the model's num_loops if not given
    eval_loops: list[int] = field(default_factory=list)  # more loop counts to measure beside the gate
    log_every: int = 10
    checkpoint_every: int = 500
    snapshots: list[int] = field(default_factory=list)  # steps at which to keep the model, for `looped lens`
    trackers: list[str] = field(default_factory=list)  # of accelerate: tensorboard, trackio, wandb, ...

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                f"name must be a plain folder name, got {self.name!r}: use letters, digits, '_', '-', '.'."
            )
        if self.max_steps is None and self.max_seconds is None:
            raise ValueError("the run has no budget: set max_steps, max_seconds, or both.")
        counts = {name: value for name, value in asdict(self).items() if type(value) is int and name != "seed"}
        counts |= {"curriculum.check_every": self.curriculum.check_every, "eval_loops": min([1, *self.eval_loops])}
        counts |= {"snapshots": min([1, *self.snapshots])}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}.")
        if len(self.optim.betas) != 2:
            raise ValueError(f"optim.betas must be two numbers, got {self.optim.betas}.")
        for name in ("label_smoothing", "final_share"):
            if not 0 <= vars(self.optim)[name] < 1:
                raise ValueError(f"optim.{name} must be in [0, 1), got {vars(self.optim)[name]}.")
        CHECKS[self.data.task](self)
        if self.init_from is not None:
            new = sorted(set(self.model) - KEEPS_WEIGHTS)
            if new:
                raise ValueError(
                    f"model.{new[0]} comes with the weights of {self.init_from}: beside init_from, model takes only "
                    f"{', '.join(sorted(KEEPS_WEIGHTS))}."
                )


def refuse_fields(section_name: str, section, names: Iterable[str], task: str):
    """ValueError if a field of the recipe's section has another value than its default: `task` does not use it."""
    for item in fields(section):
        if item.name in names and vars(section)[item.name] != item.default:
            raise ValueError(f"{section_name}.{item.name} is not for the task {task}: leave it out.")


# Of the data section.
HOP_FIELDS = ("weighting", "readout", "pad_to", "at_least_hops")


def check_unstaged(recipe: Recipe):
    """ValueError for fields of stages in a task without any, and for lengths that cannot be."""
    data = recipe.data
    stages = [item.name for item in fields(Curriculum) if item.name != "check_every"]
    refuse_fields("curriculum", recipe.curriculum, stages, data.task)
    if data.sequence_length is None:
        raise ValueError(f"data.sequence_length must be set for the task {data.task}: the tokens of a row.")
    for name in ("sequence_length", "vocab_size", "validation_tokens", "spellings"):
        value = vars(data)[name]
        if value is not None and value < 1:
            raise ValueError(f"data.{name} must be >= 1, got {value}.")


def check_hops(recipe: Recipe):
    """ValueError for fields that only text and molecules have."""
    text_only = ("files", "sequence_length", "tokenizer", "vocab_size", "validation_tokens", "spellings")
    refuse_fields("data", recipe.data, text_only, recipe.data.task)


def check_text(recipe: Recipe):
    """ValueError for fields that only other tasks have, and for lengths and tokenizers that cannot be."""
    data = recipe.data
    refuse_fields("data", data, ("config", *HOP_FIELDS, "spellings"), "text")
    check_unstaged(recipe)
    sources = {"init_from": recipe.init_from, "data.tokenizer": data.tokenizer, "data.vocab_size": data.vocab_size}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"the tokenizer of a text comes from one of {', '.join(sources)}, got {' and '.join(given) or 'none'}."
        )


def check_molecules(recipe: Recipe):
    """ValueError for fields that only other tasks have, and for lengths that cannot be."""
    refuse_fields("data", recipe.data, (*HOP_FIELDS, "tokenizer", "vocab_size"), "molecules")
    check_unstaged(recipe)


CHECKS = {"khop": check_hops, "composition": check_hops, "text": check_text, "molecules": check_molecules}


class RecipeLoader(yaml.SafeLoader):
    """PyYAML reads `1e-4` as a string (YAML 1.1); here it is a number."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def field_names(section: type = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of the recipe's fields."""
    names = [prefix + item.name for item in fields(section)]
    return names + [
        n for i in fields(section) if is_dataclass(i.type) for n in field_names(i.type, f"{prefix}{i.name}.")
    ]


def build_recipe(values: dict, section: type = Recipe, prefix: str = ""):
    """Recipe from nested plain values; ValueError for an unknown field, with the nearest name, and a wrong type."""
    sections = {item.name: item.type for item in fields(section)}
    built = {}
    for name, value in values.items():
        if name not in sections:
            # Likeness of the whole dotted name and of its last part: `lr` should find `optim.lr`.
            pairs = {known: [(f"{prefix}{name}", known), (str(name), known.split(".")[-1])] for known in field_names()}
            nearest = max(pairs, key=lambda k: sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs[k]))
            raise ValueError(f"{prefix}{name} is not a recipe field; did you mean {nearest}?")
        if is_dataclass(sections[name]) and isinstance(value, dict):
            value = build_recipe(value, sections[name], f"{prefix}{name}.")
        built[name] = value
    try:
        return section(**built)
    except StrictDataclassFieldValidationError as error:
        raise ValueError(
            f"wrong type in the recipe{prefix and ', section ' + prefix[:-1]}: {error.__cause__}"
        ) from error
    except TypeError as error:
        raise ValueError(f"the recipe lacks a field: {error}") from error


def read_recipe(path: str | Path, flags: list[str] = ()) -> Recipe:
    """Recipe in the YAML file `path`, with `--section.field value` or `--section.field=value` flags put over it."""
    values = yaml.load(Path(path).read_text(), RecipeLoader)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: expected fields and values, got {values!r}.")
    flags = iter(flags)
    for flag in flags:
        name, equals, text = flag.partition("=")
        text = text if equals else next(flags, None)
        if not name.startswith("--") or text is None:
            raise ValueError(f"cannot read the argument {flag!r}: expected --section.field value.")
        *sections, leaf = name.removeprefix("--").split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name}: {section} is a value, it has no fields.")
        place[leaf] = yaml.load(text, RecipeLoader)
    return build_recipe(values)


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested values under dotted names."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
