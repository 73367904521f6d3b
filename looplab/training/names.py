"""Names of a recipe's fields that people know from elsewhere: transformers' TrainingArguments, the example scripts of
transformers, accelerate and TRL, and older versions of all of them.

    ALIASES    the name means exactly one field of a recipe: it may stand in its place, in a file and as a flag
    ANSWERS    it does not: how to say the same here, or why there is nothing to say

    learning_rate: 3e-4              optim: {lr: 3e-4}
    --bf16                           --precision=bf16
    --num_train_epochs 3             refused: "num_train_epochs is not a recipe field: set max_steps, ..."

An answer never names a field that deletes. Names that a recipe has itself, such as `seed`, are in neither table.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass


def same(value):
    return value


def choice(values: Mapping) -> Callable:
    """Their value -> ours; ValueError for one that ours do not have."""

    def chosen(value):
        if isinstance(value, (list, dict)) or value not in values:
            raise ValueError(f"must be one of {', '.join(str(known).lower() for known in values)}, got {value!r}")
        return values[value]

    return chosen


def clipped(value):
    """`max_grad_norm`, where 0 means that nothing is clipped."""
    return None if value == 0 and value is not False else value


def several(value):
    """A name, or a list of them."""
    return value if isinstance(value, list) else [value]


def listed(value):
    """`report_to`: a name, or a list of them; none is no tracker."""
    names = several(value)
    if "all" in names:
        raise ValueError("must name the trackers one by one, such as [tensorboard, wandb], got all")
    return [name for name in names if name not in ("none", None)]


@dataclass(frozen=True)
class Alias:
    """A name that means exactly one field of a recipe.

    Args:
        field: dotted name.
        convert: their value -> ours; raises ValueError for one that ours cannot be.
        only: a field and the value that it must have, for the name to mean just this one.
        switch: as a flag it may stand without a value, for true.
    """

    field: str
    convert: Callable = same
    only: tuple[str, str] | None = None
    switch: bool = False


# A rate of AdamW alone is not the rate of a run in which Muon trains the matrices.
ADAMW = ("optim.kind", "adamw")
SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
ALIASES: dict[str, Alias] = {
    "learning_rate": Alias("optim.lr", only=ADAMW),
    "optim": Alias("optim.kind", choice({"adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw"})),
    "weight_decay": Alias("optim.weight_decay"),
    "warmup_steps": Alias("optim.warmup_steps"),
    "num_warmup_steps": Alias("optim.warmup_steps"),
    "lr_scheduler_type": Alias("optim.schedule", choice(SCHEDULES)),
    "label_smoothing_factor": Alias("optim.label_smoothing"),
    "max_grad_norm": Alias("optim.clip", clipped),
    "max_train_steps": Alias("max_steps"),
    "logging_steps": Alias("log_every"),
    "eval_steps": Alias("check_every"),
    "save_steps": Alias("checkpoint_every"),
    "checkpointing_steps": Alias("checkpoint_every"),
    "save_total_limit": Alias("keep_checkpoints"),
    "bf16": Alias("precision", choice({True: "bf16", False: "fp32"}), switch=True),
    "mixed_precision": Alias("precision", choice({"no": "fp32", "bf16": "bf16"})),
    "activation_checkpointing": Alias("gradient_checkpointing", switch=True),
    "torch_compile": Alias("compile", switch=True),
    "report_to": Alias("trackers", listed),
    "block_size": Alias("data.sequence_length"),
    "assistant_only_loss": Alias("data.assistant_only_loss", switch=True),
    "use_peft": Alias("train.what", choice({True: "lora", False: "full"}), switch=True),
    "lora_r": Alias("train.r"),
    "lora_alpha": Alias("train.lora_alpha"),
    "lora_dropout": Alias("train.lora_dropout"),
    "lora_target_modules": Alias("train.target_modules", several),
}

HUB = "train first, then publish the run by `looped publish RUN --repo-id USER/NAME`"
RESUMES = "the same command again resumes a run from its last checkpoint, batch by batch as if it had not stopped"
RUNS = "a run that was begun goes on, and a run of another recipe is kept: give this one a `name` of its own"
LAUNCHER = "`accelerate launch` decides about processes and their devices, see docs/guides/several_gpus.md"
BATCH = (
    "write `batch_size`, the rows of one update over all processes and micro-batches: rows per device x processes x "
    "accumulation steps"
)
EPOCHS = "set `max_steps`, in updates of `batch_size` rows, or `max_seconds`: a budget is not counted in epochs"
EVERY = "set `log_every`, `check_every` or `checkpoint_every`, in updates: nothing happens once an epoch"
CHECK = "none is like it; the held-out check is made every `check_every` updates, with batches of its own size"
MADE = "none is like it; batches are made as they are needed, from `seed`, each of one length and one loop count"
BUILDER = "none is like it; the builder of `data.task` decides about columns, see docs/guides/train_your_own_data.md"
MEASURED = "none is like it; the last update's model is saved, and `snapshots` keeps others by their step"
FINAL = "none is like it; the schedules of `optim.schedule` have `optim.final_share` alone"
KEPT = "none is like it; `checkpoint_every` says how often the whole state is saved, and old ones go by themselves"
ADAM = "none is like it; AdamW and Muon have `optim.lr`, `optim.muon_lr`, `optim.betas` and `optim.weight_decay`"
TRACKED = "none is like it; `trackers` names the trackers, and metrics.jsonl in the run has every number in any case"
SCREEN = "none is like it; `log_every` sets the pace of metrics.jsonl, and TQDM_DISABLE=1 hides the progress bar"
SOURCE = (
    "a dataset of texts is `data.dataset`: {path: NAME, split: train}, with `data.task`: text; streaming: true is "
    "among its arguments"
)
READERS = "`data.workers` and `data.prefetch` are of a stream of text; other batches are made as they are needed"
FILES = "write `data.files`, a list of files and globs; the splits are dealt from them by `data.overrides`"
SPLITS = "`data.overrides` of a text has validation_files, validation_split and validation_share, and the same of test"
ROWS = "none is like it; a budget is `max_steps`, and `data.validation_tokens` bounds what is measured"
LENGTH = "write `data.sequence_length`, the tokens of a sequence that texts are packed into; nothing is cut off"
MODEL = "name a looped model's folder in `init_from`, which `looped convert SOURCE TARGET` makes of a dense model"
TOKENIZER = "name a folder in `data.tokenizer`, or set `data.vocab_size` to learn one from the text"
PRECISION = "none is like it; `precision` is fp32 or bf16; fp16 needs a scaled loss, which is not built in"
KERNELS = "none is like it; the layers run as torch and `compile` have them"
FAULTS = "none is like it; a loss that is not finite ends the run before its update is made"
DEVICE = "start it by `accelerate launch --cpu -m looplab.train RECIPE`, which decides about the device"
VERBS = "`looped train` trains and checks; `looped eval RUN` measures the run afterwards"
FORWARD = "none is like it; a training call keeps no cache"

# Answer -> the names that get it.
ANSWERED: dict[str, tuple[str, ...]] = {
    BATCH: ("per_device_train_batch_size", "per_gpu_train_batch_size", "train_batch_size", "auto_find_batch_size"),
    "write `accumulation_steps`, the micro-batches that the `batch_size` rows of an update are split into": (
        "gradient_accumulation_steps",
    ),
    EPOCHS: ("num_train_epochs", "num_epochs", "epochs"),
    "write `optim.warmup_steps`, in updates: the share x `max_steps`": ("warmup_ratio",),
    FINAL: ("lr_scheduler_kwargs",),
    "write `optim.betas`, both numbers in one list": ("adam_beta1", "adam_beta2"),
    ADAM: ("adam_epsilon", "optim_args", "optim_target_modules", "adafactor"),
    PRECISION: ("fp16", "fp16_full_eval", "fp16_opt_level", "fp16_backend", "half_precision_backend"),
    "none is like it; everything runs in `precision`": ("bf16_full_eval",),
    "none is like it; matrix products are as torch has them, and `precision` is fp32 or bf16": ("tf32",),
    "none is like it; `gradient_checkpointing` has no settings": (
        "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "activation_offloading",
    ),
    "none is like it; `compile` compiles layer by layer, so that the number of loops may vary": (
        "torch_compile_backend", "torch_compile_mode", "torchdynamo",
    ),
    KERNELS: ("use_liger_kernel", "liger_kernel_config", "attn_implementation", "jit_mode_eval", "use_ipex"),
    FORWARD: ("use_cache", "past_index"),
    "none is like it; noise in the embeddings is not built in": ("neftune_noise_alpha",),
    "none is like it; lower `batch_size`, or split it by `accumulation_steps`": ("torch_empty_cache_steps",),
    "it is always so: the loss is a mean over the labels of all processes": ("average_tokens_across_devices",),
    EVERY: ("logging_strategy", "eval_strategy", "evaluation_strategy", "save_strategy"),
    "set `log_every` to 1 to have the first step": ("logging_first_step",),
    SCREEN: ("log_level", "log_level_replica", "disable_tqdm"),
    FAULTS: ("logging_nan_inf_filter", "debug"),
    TRACKED: (
        "with_tracking", "project", "project_dir", "logging_dir", "trackio_space_id", "trackio_bucket_id",
        "trackio_static_space_id", "log_on_each_node", "include_num_input_tokens_seen", "include_tokens_per_second",
    ),
    "write `name`, the folder of the run below `output_dir`": ("run_name",),
    CHECK: (
        "eval_delay", "eval_on_start", "per_device_eval_batch_size", "per_gpu_eval_batch_size", "eval_batch_size",
        "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
        "include_for_metrics", "include_inputs_for_metrics", "batch_eval_metrics", "eval_packing",
        "predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config",
    ),
    KEPT: ("save_only_model", "save_on_each_node", "save_safetensors", "enable_jit_checkpoint"),
    HUB: (
        "push_to_hub", "hub_token", "token", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
        "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token",
    ),
    f"{HUB} --private": ("hub_private_repo",),
    MEASURED: ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    RESUMES: ("resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
    RUNS: ("overwrite_output_dir",),
    "none is like it; `seed` draws weights and batches, and torch decides about its kernels": ("full_determinism",),
    "`seed` draws the batches as well; `data.seed` makes the data of hops, and deals others to splits": ("data_seed",),
    DEVICE: ("use_cpu", "no_cuda", "use_mps_device"),
    LAUNCHER: (
        "accelerator_config", "parallelism_config", "local_rank", "fsdp", "fsdp_config", "fsdp_min_num_params",
        "fsdp_transformer_layer_cls_to_wrap", "deepspeed", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers", "ignore_bias_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout",
        "num_processes", "tpu_num_cores",
        "tpu_metrics_debug", "sharded_ddp", "xpu_backend", "mp_parameters", "ray_scope", "dispatch_batches",
        "split_batches",
    ),
    MADE: (
        "dataloader_drop_last", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_multiprocessing_context", "dataloader_in_order",
        "train_sampling_strategy", "group_by_length", "length_column_name", "sortish_sampler", "shuffle_dataset",
        "padding_free", "pad_to_multiple_of", "pad_to_max_length", "packing", "packing_strategy",
    ),
    READERS: ("dataloader_num_workers", "dataloader_prefetch_factor"),
    BUILDER: (
        "remove_unused_columns", "label_names", "dataset_text_field", "text_column", "text_column_name",
        "summary_column", "dataset_kwargs", "preprocessing_num_workers", "dataset_num_proc", "overwrite_cache",
        "keep_linebreaks", "completion_only_loss",
    ),
    "none is like it; `looped bench` measures memory and speed": ("skip_memory_metrics",),
    VERBS: ("do_train", "do_eval", "do_predict"),
    MODEL: (
        "model_name_or_path", "model_name", "model_id", "config_name", "config_overrides", "model_type",
        "model_revision", "model_init_kwargs", "trust_remote_code", "use_auth_token", "low_cpu_mem_usage",
    ),
    "write `precision`, fp32 or bf16; weights are float32 in any case": ("torch_dtype", "dtype"),
    TOKENIZER: (
        "tokenizer_name", "tokenizer_name_or_path", "use_fast_tokenizer", "use_slow_tokenizer", "chat_template_path",
        "eos_token", "pad_token",
    ),
    SOURCE: (
        "dataset_name", "dataset", "dataset_config_name", "dataset_config", "dataset_train_split", "streaming",
        "dataset_streaming", "dataset_dir", "train_split",
    ),
    SPLITS: (
        "validation_split_percentage", "validation_file", "test_file", "dataset_test_split", "validation_split",
        "train_val_split",
    ),
    FILES: ("train_file", "train_data_file", "train_dir"),
    ROWS: ("max_train_samples", "max_eval_samples", "max_predict_samples"),
    LENGTH: ("max_seq_length", "max_length", "truncation_mode"),
    "none is like it; LoRA has `train.r`, `train.lora_alpha`, `train.lora_dropout` and `train.target_modules`": (
        "lora_target_parameters", "lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora",
    ),
    "none is like it; `looped quantize RUN` quantizes a run after its training": (
        "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant",
    ),
    "none is like it; the loss is the cross-entropy of the labels, see `distill` for another": (
        "loss_type", "router_aux_loss_coef",
    ),
    "set HF_HOME, the folder of all caches of Hugging Face": ("cache_dir",),
    "write `depth`, how the loops of a training batch are drawn, and `model`: {num_loops: N} for afterwards": (
        "num_loops", "loops",
    ),
}  # fmt: skip
ANSWERS: dict[str, str] = {name: answer for answer, names in ANSWERED.items() for name in names}


def plain(name: str) -> str:
    """The name of a field as a recipe spells it: `learning-rate` is `learning_rate`."""
    return name.replace("-", "_")


def answer(name: str) -> str | None:
    """What to write in place of a name that is no field where it stands; None for an unknown name.

    name: without its section. The parser of transformers has `--no_NAME` as well, for what is true by default.
    """
    name = plain(name)
    if name in ALIASES:
        return f"write `{ALIASES[name].field}`"
    return ANSWERS.get(name, ANSWERS.get(name.removeprefix("no_")))


def meaning(name: str, value, spelt: str) -> tuple[str, object]:
    """(dotted field, its value) that a name at the top of a recipe, and its value, mean; both as they are for a name
    that is no alias.

    Raises:
        ValueError: no value of the field means the same. spelt: the name and its place, for the message.
    """
    alias = ALIASES.get(plain(name))
    if alias is None or isinstance(value, dict):  # `optim` is a section, too
        return name, value
    try:
        return alias.field, alias.convert(value)
    except ValueError as error:
        raise ValueError(f"{spelt}, which is {alias.field} here, {error}.") from error


def as_written(message: str, written: Mapping[str, str]) -> str:
    """A message about fields, with the aliases that were written for them. written: as in `check_meaning`."""
    for field, name in written.items():
        if plain(name) in ALIASES and plain(name) != field:
            said = rf"(?<![\w.]){re.escape(field)}(?![\w.])"
            message = re.sub(said, f"{name}, which is {field} here,", message, count=1)
    return message


def find(values: Mapping, name: str):
    """The value at a dotted name of nested values; None if it is not given."""
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def is_switch(name: str) -> bool:
    """Whether a flag may stand without a value: as a switch of theirs, or because it is refused in any case."""
    return ALIASES[name].switch if name in ALIASES else answer(name) is not None


def check_meaning(written: Mapping[str, str], values: Mapping) -> None:
    """Raise ValueError for an alias that does not mean one field alone in this recipe, see `Alias.only`.

    Args:
        written: dotted field -> the name that was written for it.
        values: dotted field -> value, of the recipe.
    """
    for field, name in written.items():
        alias = ALIASES.get(plain(name))
        if alias is not None and alias.only is not None and values[alias.only[0]] != alias.only[1]:
            raise ValueError(
                f"{name} is not one field here, since {alias.only[0]} is {values[alias.only[0]]}: write {field} for "
                "what AdamW trains, and optim.muon_lr for the matrices of the layers."
            )
