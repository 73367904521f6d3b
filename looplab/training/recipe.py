"""The recipe of a run: every number of it, read from a YAML file and from flags put over it.

torch is imported when a recipe is made, not with this module: tables of results read no recipe.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from data_builders.fields import MOST_LOOPS, check_fields, number, numbers, path
from data_builders.files import expand_home
from looplab.mistakes import sentence
from looplab.runs.sections import build_recipe, check_name, expand_paths, refuse_fields
from looplab.runs.yaml_text import parse_yaml, read_yaml

Number = int | float


@strict
@dataclass
class Data:
    task: Literal["khop", "composition", "text", "molecules"] = "khop"
    seed: int = number(0, at_least=0)
    overrides: dict = field(default_factory=dict)  # fields of the builder's config
    # Hops, and molecules where no files are named:
    config: str = "cpu"  # preset of the builder
    # Hops:
    weighting: Literal["rows", "uniform"] = "rows"  # hop count of a step: by the rows each has, or all alike
    readout: Literal["token", "last"] = "token"  # where the answer is read: an appended token, or the last relation
    pad_to: int | None = number(at_least=1)  # pad every row to so many tokens and read at its end, as the paper does
    at_least_hops: bool = False  # raise a batch's loops to its hop count where fewer were drawn
    # Text, whose tokenizer comes from `init_from`, `tokenizer` or `vocab_size`:
    files: list[str] | None = path()  # .txt or .md files and globs; without them what `looped fetch corpus` made
    sequence_length: int | None = number(at_least=1)  # tokens of a row
    tokenizer: str | None = path()  # a folder with a tokenizer in it
    vocab_size: int | None = number(at_least=1)  # of a byte-level BPE that is learnt from the training text
    validation_tokens: int | None = number(at_least=1)  # measure on so many held-out tokens, not on all
    # Molecules take `sequence_length`, the tokens of a packed row, `files` (.csv, .smi), `validation_tokens`, and:
    spellings: int | None = number(at_least=1)  # random SMILES of each molecule, another one in every epoch


@strict
@dataclass
class Depth:
    """Loops per training batch, see `data_builders.DepthSampler`."""

    kind: Literal["fixed", "uniform", "poisson", "lognormal_poisson"] = "poisson"
    rate: Number | None = number(above=0, at_most=MOST_LOOPS)
    mean: Number | None = number(at_least=1, at_most=MOST_LOOPS)
    minimum: int | None = number(at_least=1, at_most=MOST_LOOPS)
    maximum: int | None = number(at_least=1, at_most=MOST_LOOPS)
    sigma: Number | None = number(above=0)

    def sampler(self, seed: int):
        """The `DepthSampler`; ValueError for fields that do not go together."""
        from data_builders import DepthSampler

        return DepthSampler(seed=seed, **{name: value for name, value in vars(self).items() if value is not None})


@strict
@dataclass
class Optim:
    kind: Literal["adamw", "muon"] = "adamw"
    lr: Number = number(1e-3, at_least=0)  # of AdamW
    muon_lr: Number = number(0.02, at_least=0)
    kv_gate_lr: Number | None = number(at_least=0)  # AdamW's, of the gates of kv_sharing="gated"; None: as any matrix
    betas: list[Number] = numbers([0.9, 0.999], at_least=0, below=1)
    weight_decay: Number = number(0.0, at_least=0)  # of matrices and embeddings; norms and biases have none
    warmup_steps: int = number(0, at_least=0)  # may be more than the run has
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    final_share: Number = number(0.0, at_least=0, below=1)  # of the learning rate, where a schedule that falls ends
    label_smoothing: Number = number(0.0, at_least=0, below=1)  # of the cross-entropy, over the vocabulary
    clip: Number | None = number(above=0)  # largest norm of the gradient


@strict
@dataclass
class Distill:
    """Learn from a model with a KV entry per loop to do with one entry per token (MELT), see `distillation.py`."""

    teacher: str | None = path()  # a saved model's folder; None: learn from the labels
    phase: Literal["interpolation", "alignment"] = "alignment"
    alignment: Number = number(0.1, at_least=0)  # weight of the attention outputs' distance, in the phase of that name
    all_loops: bool = True  # compare what every loop would say; otherwise the last loop


@strict
@dataclass
class Curriculum:
    """Stage k trains on 1..k hops jointly until k passes the gate. Ends default to the deepest hop in the data.

    Text and molecules have no stages: of these fields they take `check_every` only.
    """

    start_hops: int | None = number(at_least=1)
    stop_hops: int | None = number(at_least=1)
    threshold: Number = number(0.95, at_least=0, below=1)  # share of right answers above which a stage is passed
    check_every: int = number(200, at_least=1)  # steps
    min_steps: int = number(0, at_least=0)  # of a stage
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
    init_from: str | None = path()  # a saved model's folder: its weights, config and tokenizer; see KEEPS_WEIGHTS
    output_dir: str = path("runs")
    overwrite: bool = False  # delete an existing run of this name
    seed: int = number(0, at_least=0, below=2**32)
    data: Data = field(default_factory=Data)
    depth: Depth = field(default_factory=Depth)
    optim: Optim = field(default_factory=Optim)
    curriculum: Curriculum = field(default_factory=Curriculum)
    distill: Distill = field(default_factory=Distill)
    batch_size: int = number(256, at_least=1)  # rows, or molecules, of one update, over all ranks and micro-batches
    accumulation_steps: int = number(1, at_least=1)  # micro-batches an update is split into
    max_steps: int | None = number(at_least=1)
    max_seconds: Number | None = number(above=0)  # of the training loop, counted across resumes
    num_grad_loops: int | None = number(at_least=1)  # back-propagate through the last loops only
    cut_chunks: bool = False  # with model.prefill_chunk: no gradient through the KV rows of earlier chunks
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False  # layer by layer, so that the number of loops may vary
    gate_loops: int | None = number(at_least=1)  # loops of the gate's measurement; the model's num_loops by default
    eval_loops: list[int] = numbers(at_least=1, distinct=True)  # more loop counts to measure beside the gate
    log_every: int = number(10, at_least=1)
    checkpoint_every: int = number(500, at_least=1)
    snapshots: list[int] = numbers(at_least=1, distinct=True)  # steps at which to keep the model, for `looped lens`
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
        start, stop = self.curriculum.start_hops, self.curriculum.stop_hops
        if start is not None and stop is not None and start > stop:
            raise ValueError(f"curriculum.start_hops {start} must not be above curriculum.stop_hops {stop}.")
        for name in {"seed", "files"} & set(self.data.overrides):
            if vars(self.data)[name]:
                raise ValueError(f"data.{name} and data.overrides.{name} name the same thing: leave one of them out.")
        CHECKS[self.data.task](self)
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


# Of the data section.
HOP_FIELDS = ("weighting", "readout", "pad_to", "at_least_hops")


def check_unstaged(recipe: Recipe):
    """ValueError for fields of stages in a task without any, and for rows without a length."""
    data = recipe.data
    stages = [item.name for item in fields(Curriculum) if item.name != "check_every"]
    refuse_fields("curriculum", recipe.curriculum, stages, data.task)
    if data.sequence_length is None:
        raise ValueError(f"data.sequence_length must be set for the task {data.task}: the tokens of a row.")


def check_hops(recipe: Recipe):
    """ValueError for fields that only text and molecules have."""
    text_only = ("files", "sequence_length", "tokenizer", "vocab_size", "validation_tokens", "spellings")
    refuse_fields("data", recipe.data, text_only, recipe.data.task)


def check_text(recipe: Recipe):
    """ValueError for fields that only other tasks have, and for rows without a length or a tokenizer."""
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
    """ValueError for fields that only other tasks have, and for rows without a length."""
    refuse_fields("data", recipe.data, (*HOP_FIELDS, "tokenizer", "vocab_size"), "molecules")
    check_unstaged(recipe)


CHECKS = {"khop": check_hops, "composition": check_hops, "text": check_text, "molecules": check_molecules}


def read_recipe(path: str | Path, flags: list[str] = ()) -> Recipe:
    """Recipe in the YAML file `path`, with `--section.field value` or `--section.field=value` flags put over it.

    Raises ValueError, with what is wrong and where, for a file or a flag that cannot be read and a recipe that cannot
    be run.
    """
    values = read_yaml(expand_home("the recipe", str(path)))
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
        place[leaf] = parse_yaml(text, f"the argument {name}")
    return build_recipe(values, Recipe)
