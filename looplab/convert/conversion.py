"""`looped convert SOURCE TARGET`: make a looped model of a pretrained dense transformer, or of a looped one.

The layers before the core become the prelude, the layers after it the coda, and no weight changes, so that at one loop
the looped model equals its source. At more loops it is the training-free blend of the source (`frozen_looped.py`),
which loses nothing before training; or, where asked for, the plain loop. Both are measured on the written files before
they get their name. The models of LAYOUTS are looped already: tensors get other names, and where they are fused other
shapes (`ouro.py`, `nanbeige.py`, `huginn.py`). They are compared instead.
"""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import CONFIG_NAME, cached_file, logging

from looplab.runs.models import blaming, quietly
from looplab.runs.writing import whole_folder
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped import looped as training_free
from modeling_looped.frozen_looped import default_window
from modeling_looped.initial_looped import SetsInitialValues

from .huginn import HUGINN
from .nanbeige import NANBEIGE
from .ouro import OURO
from .published import Layout, read_tensors

logger = logging.get_logger(__name__)

# Fields that LoopedConfig and the configurations of the sources have with the same name and meaning.
SAME_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# How a converted model loops -> fields of LoopedConfig. A token of the blend leaves the entries of the source behind.
STARTS: dict[str, dict[str, str]] = {
    "damped": {"loop_connection": "damped", "kv_sharing": "natural"},
    "plain": {"loop_connection": "plain"},
}
REMEDY = "take a checkpoint that transformers loads."
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Family:
    """How an architecture maps to LoopedConfig.

    Args:
        layer: from the configuration of the source to the fields attention_bias, mlp_bias and qk_norm that are True.
        zeros: endings of tensor names: the looped model has these tensors, the source does not, and they are zero.
    """

    layer: Callable[[PreTrainedConfig], dict]
    zeros: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family(lambda config: {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}),
    "mistral": Family(lambda config: {}),
    "qwen2": Family(lambda config: {"attention_bias": True}, zeros=("self_attn.o_proj.bias",)),
    "qwen3": Family(lambda config: {"attention_bias": config.attention_bias, "qk_norm": True}),
}
# Architectures that are looped already.
LAYOUTS: dict[str, Layout] = {"ouro": OURO, "nanbeige": NANBEIGE, "huginn_raven": HUGINN}
# Why an architecture cannot be converted, for those that users ask for most.
MIXTURE = "its MLPs are mixtures of experts, and a looped layer has one MLP"
GEMMA = "its norms multiply by 1 + weight and its embeddings by sqrt(hidden_size), which a looped model does not"
REASONS = {
    "gpt2": "its query, key and value projections are one transposed matrix",
    "gemma": GEMMA, "gemma2": GEMMA, "gemma3": GEMMA, "gemma3_text": GEMMA,
    "mixtral": MIXTURE, "qwen2_moe": MIXTURE, "qwen3_moe": MIXTURE, "deepseek_v3": MIXTURE, "gpt_oss": MIXTURE,
    "phi3": "its projections are fused",
    "gpt_neox": "it rotates a part of each head, and its attention and MLP run side by side",
    "looped": "it is a looped model already",
}  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """How much the logits of a looped model differ from those of its source, at one loop or blended.

    Args:
        difference: the largest absolute difference over all tokens compared.
        tolerance: the largest difference that rounding explains, see `compare`.
    """

    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance  # False for a NaN


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote.

    Args:
        folder: holds the looped model.
        core: first and last layer of the core, both inclusive, counted in the source.
        num_layers: layers of the source.
        num_loops: default loop count.
        identity: the check at one loop; None for a model of LAYOUTS, whose tensors are compared since its code does
            not run.
        blend: (loops, the check against the training-free blend of so many); None for a plain loop.
    """

    folder: Path
    core: tuple[int, int]
    num_layers: int
    num_loops: int
    identity: Identity | None
    blend: tuple[int, Identity] | None = None


def refuse(field: str, value, reason: str, remedy: str) -> ValueError:
    """The error for a field of the source that cannot be converted."""
    return ValueError(f"{field}={value!r} cannot be converted exactly: {reason}; {remedy}.")


def check_core(core: Sequence[int] | None, num_layers: int) -> tuple[int, int]:
    """First and last layer of the core, both inclusive; those of `default_window` if `core` is None.

    Raises:
        ValueError: `core` is not two layers of the source in order.
    """
    first, last = default_window(num_layers) if core is None else core
    if not 0 <= first <= last < num_layers:
        raise ValueError(
            f"core={(first, last)} must be two layers A <= B of 0 .. {num_layers - 1}, both inclusive "
            f"(the source has {num_layers} layers; default {default_window(num_layers)})."
        )
    return first, last


def check_architecture(model_type: str | None) -> None:
    """Raise ValueError, with the reason, for an architecture that is not in FAMILIES."""
    if model_type not in FAMILIES:
        reason = REASONS.get(str(model_type), "its layers are not known to be those of a looped model")
        known = ", ".join([*FAMILIES, *LAYOUTS])
        remedy = f"take a model of {known}, or loop it unconverted with modeling_looped/frozen_looped.py"
        raise refuse("model_type", model_type, reason, remedy)


def check_fields(config: PreTrainedConfig) -> None:
    """Raise ValueError for a field of a known family that no looped model can express."""
    values = vars(config)
    quantization = values.get("quantization_config")
    if quantization is not None and not isinstance(quantization, GgufConfig):  # load_source unpacks gguf tensors
        remedy = "take the checkpoint that was not quantised, or a gguf file"
        raise refuse("quantization_config", quantization, "its tensors are packed", remedy)
    if config.is_heterogeneous:
        reason, remedy = "its layers differ in size", "take a model whose layers are alike"
        raise refuse("per_layer_config", config.to_dict()["per_layer_config"], reason, remedy)
    layer_types = values.get("layer_types") or []
    if len(set(layer_types)) > 1 or set(layer_types) - {"full_attention", "sliding_attention"}:
        reason = "in a looped model all layers have the same sliding window, or none"
        remedy = "if no sequence is longer than the window, make all 'full_attention' in the source's config.json"
        raise refuse("layer_types", layer_types, reason, remedy)
    rope = config.rope_parameters
    if rope.get("rope_type") not in ROPE_TYPES:
        remedy = f"take a model with one of {', '.join(ROPE_TYPES)}"
        raise refuse("rope_parameters", rope, "a looped model does not have these rotary embeddings", remedy)
    if rope.get("partial_rotary_factor", 1) != 1:
        reason, remedy = "a looped model rotates whole heads", "take a model that does so"
        raise refuse("rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], reason, remedy)


def window_of(config: PreTrainedConfig) -> int | None:
    """The sliding window of all layers of a source that `check_fields` has passed, or None."""
    values = vars(config)
    slides = "full_attention" not in (values.get("layer_types") or [])
    return values.get("sliding_window") if slides else None


def looped_config(
    config: PreTrainedConfig, core: Sequence[int] | None = None, num_loops: int = 1, loop_connection: str = "plain"
) -> LoopedConfig:
    """The configuration of the looped model that equals the source at one loop.

    Args:
        config: the source's, a dense Llama, Mistral, Qwen2 or Qwen3.
        core: first and last layer of the core, both inclusive; `default_window` unless given.
        num_loops: default loop count, >= 1.
        loop_connection: one of STARTS.

    Raises:
        ValueError: a field cannot be mapped exactly, or the core lies outside the source's layers.
    """
    check_architecture(config.model_type)
    check_fields(config)
    first, last = check_core(core, config.num_hidden_layers)
    rope = {name: value for name, value in config.rope_parameters.items() if name != "partial_rotary_factor"}
    return LoopedConfig(
        **{name: getattr(config, name) for name in SAME_FIELDS},
        **FAMILIES[config.model_type].layer(config),
        head_dim=vars(config).get("head_dim"),  # Qwen2 declares none
        norm_eps=config.rms_norm_eps,
        attention_dropout=config.attention_dropout or 0.0,  # Llama's may be None
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=rope,
        sliding_window=window_of(config),
        num_prelude_layers=first,
        num_core_layers=last - first + 1,
        num_coda_layers=config.num_hidden_layers - 1 - last,
        num_loops=num_loops,
        **STARTS[loop_connection],
    )


def looped_name(name: str, core: tuple[int, int]) -> str:
    """The name in the looped model of the source's tensor `name`: layer 14 is `core.1` if the core is (13, 16)."""
    if not name.startswith("model.layers."):
        return name
    _, _, layer, *rest = name.split(".")
    first, last = core
    index = int(layer)
    if index < first:
        section = "prelude"
    elif index <= last:
        section, index = "core", index - first
    else:
        section, index = "coda", index - last - 1
    return ".".join(["model", section, str(index), *rest])


def to_looped(
    model: PreTrainedModel, core: Sequence[int] | None = None, num_loops: int = 1, loop_connection: str = "plain"
) -> LoopedForCausalLM:
    """A looped copy of a loaded causal LM, equal to it at one loop; `model` does not change.

    Args:
        model: a dense Llama, Mistral, Qwen2 or Qwen3 causal LM.
        core: first and last layer of the core, both inclusive; `default_window` unless given.
        num_loops: default loop count, >= 1, in the configuration and the generation configuration.
        loop_connection: `"plain"`, the loop that papers train; or `"damped"`, the start of `convert`: at every loop
            count the training-free blend `looped(model, core)`. Here the plain one is the default, since `"damped"`
            also chooses a KV policy, which who builds a model in Python is to name.

    Raises:
        ValueError: a field or tensor cannot be mapped exactly, or the core lies outside the model's layers.
    """
    config = looped_config(model.config, core, num_loops, loop_connection)
    core = check_core(core, model.config.num_hidden_layers)
    state = model.state_dict()
    weights = {looped_name(name, core): tensor for name, tensor in state.items()}
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) > 1:
        raise ValueError(f"the tensors have several dtypes, {sorted(map(str, dtypes))}: convert them to one first.")
    # The weights decide, not config.json: embeddings are tied only if the two matrices are one.
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    config.tie_word_embeddings = head is not None and head.weight is embeddings.weight

    with no_init_weights():  # every tensor is about to be filled
        looped = LoopedForCausalLM._from_config(config, dtype=dtypes.pop())
    looped.tie_weights()
    expected = looped.state_dict()
    zeros = FAMILIES[model.config.model_type].zeros
    weights |= {name: torch.zeros_like(tensor) for name, tensor in expected.items() if name.endswith(zeros)}
    for module in looped.model.connection.modules():
        if isinstance(module, SetsInitialValues):
            module.initialize()
    weights |= {name: tensor for name, tensor in expected.items() if name.startswith("model.connection.")}
    check_tensors(weights, expected)
    looped.load_state_dict(weights)
    looped.generation_config = generation_settings(model, num_loops)
    return looped.to(model.device).train(model.training)


def check_tensors(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Check that the tensors `weights` of the source are exactly those that the looped model needs.

    Raises:
        ValueError: with the names, in the looped model, of tensors that are left over, missing, or of another shape.
    """
    shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems = {
        "the looped model has no place for": sorted(weights.keys() - expected.keys()),
        "the source does not have": sorted(expected.keys() - weights.keys()),
        "of another shape are": shapes,
    }
    found = [f"{what} {', '.join(names[:4])} ({len(names)} in all)" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"the tensors of the source do not fill a looped model: {'; '.join(found)}.")


def generation_settings(model: PreTrainedModel, num_loops: int) -> GenerationConfig:
    """The source's generation settings with the loop count; if they contradict each other, only the special ids."""
    settings = copy.deepcopy(model.generation_config)
    settings.num_loops = num_loops
    try:
        settings.validate(strict=True)
    except ValueError as error:  # transformers loads such a file and refuses to write it
        logger.warning(f"only the special ids are kept from the source's generation settings: {error}")
        ids = {name: getattr(settings, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return GenerationConfig(num_loops=num_loops, **ids)
    return settings


@torch.no_grad()
def compare(model: PreTrainedModel, looped: LoopedForCausalLM, num_loops: int = 1, seed: int = 0) -> Identity:
    """Compare the logits of the source and of the looped model, at one loop unless the source is looped as well. Both
    are in float32 on the same device.

    There are three batch rows of seeded random tokens: plain, with positions spread over all that the model allows
    (which shows a wrong rotary embedding), and left-padded. The tolerance is 1e-4 of the largest |logit|. On
    SmolLM2-135M, rounding alone (another attention kernel, or float64) moved the logits by 3e-6 to 2e-5 of the
    largest; one norm weight wrong by 0.1 % moved them by 6e-4, a norm epsilon 10 times too small by 2e-2, and a
    slightly wrong rotary base by 1. The looped norms are torch's RMSNorm, which may round otherwise than the source's.
    """
    longest = model.config.max_position_embeddings
    tokens = min(32, longest)
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(model.config.vocab_size, (3, tokens), generator=generator).to(model.device)
    mask = torch.ones_like(input_ids)
    mask[2, : tokens // 3] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    position_ids[1] *= longest // tokens
    batch = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    expected = model(**batch, use_cache=False).logits[mask.bool()]  # (real tokens, V)
    actual = looped(**batch, use_cache=False, num_loops=num_loops).logits[mask.bool()]
    return Identity(float((actual - expected).abs().max()), 1e-4 * float(expected.abs().max()))


def load_tokenizer(source: str, gguf_file: str | None = None, **arguments) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer, or None if it has none. Raises ValueError if its files are damaged."""
    if gguf_file is None and not any(
        cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in TOKENIZER_FILES
    ):
        return None
    with blaming(source, REMEDY):
        return AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, trust_remote_code=False, **arguments)


def read_fields(source: str, gguf_file: str | None) -> dict:
    """The fields of the source's config.json. Raises ValueError if there is no such source, or no fields in it."""
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ValueError(f"gguf_file={gguf_file!r} needs the gguf package: pip install gguf.")
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not Path(source).is_dir():
        raise ValueError(f"there is no folder {source}: name a folder of a saved model, or a model of the Hub.")
    if gguf_file is None and Path(source).is_dir() and not (Path(source) / CONFIG_NAME).is_file():
        raise ValueError(f"{source} has no {CONFIG_NAME}: name a folder of a saved model.")
    fields = PreTrainedConfig.get_config_dict(source, gguf_file=gguf_file)[0]
    if not isinstance(fields, dict):
        raise ValueError(f"the config.json of {source} holds no fields, but {fields!r}: take a whole checkpoint.")
    return fields


def read_config(fields: dict) -> PreTrainedConfig:
    """The source's configuration. Raises ValueError as `check_architecture`."""
    check_architecture(fields.get("model_type"))
    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)


def load_source(source: str, config: PreTrainedConfig, gguf_file: str | None) -> PreTrainedModel:
    """The source model in its own dtype.

    Raises:
        ValueError: the weights do not fit the configuration, which transformers only warns about.
    """
    gguf = {} if gguf_file is None else {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    with quietly(), blaming(source, REMEDY):
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype="auto",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with names
            **gguf,
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            names = ", ".join(sorted(map(str, report[what]))[:4])
            raise ValueError(
                f"{source} is not a whole {type(model).__name__}: {len(report[what])} {what.replace('_', ' ')} "
                f"({names}); was it saved by another class than a causal LM?"
            )
    return model


def convert_published(source: str, target: Path, fields: dict, layout: Layout, num_loops: int | None) -> Conversion:
    """`convert` for a checkpoint in one of LAYOUTS: its tensors are written bit for bit."""
    config = layout.config(fields)
    if num_loops is not None:
        config.num_loops = num_loops
    tokenizer = load_tokenizer(source, config=config)
    if tokenizer is not None:
        layout.check_tokenizer(tokenizer, fields)
    with whole_folder(target) as partial:
        weights = layout.tensors(read_tensors(source), fields)
        dtypes = {tensor.dtype for tensor in weights.values()}
        if len(dtypes) > 1:
            raise ValueError(
                f"the tensors have several dtypes, {sorted(map(str, dtypes))}: convert them to one first."
            )
        with no_init_weights():
            looped = LoopedForCausalLM._from_config(config, dtype=dtypes.pop())
        looped.tie_weights()
        check_tensors(weights, looped.state_dict())
        looped.load_state_dict(weights)
        looped.generation_config = layout.settings(source, fields, num_loops)
        looped.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        written = LoopedForCausalLM.from_pretrained(partial, dtype="auto").state_dict()
        changed = [name for name, tensor in weights.items() if not tensor.equal(written[name])]
        if changed:
            raise ValueError(
                f"{len(changed)} tensors differ from the source's after writing: {', '.join(changed[:4])}."
            )
    first = config.num_prelude_layers
    outside = first + config.num_coda_layers
    core = (first, first + config.num_core_layers - 1)
    return Conversion(target, core, outside + config.num_core_layers, config.num_loops, None)


def convert(
    source: str | Path,
    target: str | Path,
    core: Sequence[int] | None = None,
    num_loops: int | None = None,
    gguf_file: str | None = None,
    loop_connection: str | None = None,
) -> Conversion:
    """Make a looped model from a pretrained dense causal LM, or of a looped one that others published, and write it to
    a folder with its tokenizer; transformers loads it with `trust_remote_code=True`.

    Args:
        source: folder or Hub name of a causal LM in FAMILIES or LAYOUTS.
        target: a folder that does not exist; it appears when everything is written and checked.
        core: first and last layer of the core, both inclusive; `default_window` unless given. A published looped model
            has its own, and so with the other arguments, but for `num_loops`.
        num_loops: default loop count, >= 1; unless given it is 1, and the source's own if that is looped.
        gguf_file: name of a gguf file in `source`; its tensors are dequantised.
        loop_connection: how it loops, one of STARTS; `"damped"` unless given.

    Raises:
        ValueError: the target exists, a field or tensor cannot be mapped exactly, or the logits differ.
        OSError: there is no such source.
    """
    source, target = str(source), Path(target)
    with blaming(source, REMEDY, leave=(ValueError, OSError)):
        return convert_checked(source, target, core, num_loops, gguf_file, loop_connection)


def convert_checked(
    source: str,
    target: Path,
    core: Sequence[int] | None,
    num_loops: int | None,
    gguf_file: str | None,
    loop_connection: str | None,
) -> Conversion:
    """`convert`, without the blame of unexpected errors on the source's files."""
    fields = read_fields(source, gguf_file)
    layout = LAYOUTS.get(str(fields.get("model_type")))
    if layout is not None:
        if (core, gguf_file, loop_connection) != (None, None, None):
            raise ValueError(
                f"a {layout.name} has no core to choose, a loop of its own, and is read from safetensors: leave out "
                "core, gguf_file and loop_connection."
            )
        return convert_published(source, target, fields, layout, num_loops)
    loop_connection = "damped" if loop_connection is None else loop_connection
    if loop_connection not in STARTS:
        raise ValueError(f"loop_connection must be one of {', '.join(STARTS)}, got {loop_connection!r}.")
    config = read_config(fields)
    core = check_core(core, config.num_hidden_layers)
    num_loops = 1 if num_loops is None else num_loops
    looped_config(config, core, num_loops, loop_connection)  # raises before gigabytes are read

    tokenizer = load_tokenizer(source, gguf_file=gguf_file)

    with whole_folder(target) as partial:
        model = load_source(source, config, gguf_file)
        to_looped(model, core, num_loops, loop_connection).save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        written = LoopedForCausalLM.from_pretrained(partial, dtype=torch.float32)
        identity, blend = compare(model.float(), written), None
        must_hold(identity, source, "at 1 loop")
        if loop_connection == "damped":
            loops = max(2, num_loops)
            with training_free(model, core, loops):
                blend = loops, compare(model, written, loops)
            must_hold(blend[1], f"the blend of {source}", f"at {loops} loops")
    return Conversion(target, core, config.num_hidden_layers, num_loops, identity, blend)


def must_hold(identity: Identity, source: str, where: str) -> None:
    """ValueError unless the written model equals its source."""
    if not identity.holds:
        raise ValueError(
            f"the looped model does not equal {source} {where}: the largest logit difference is "
            f"{identity.difference:.2e}, and rounding explains {identity.tolerance:.2e}. Nothing was written. If "
            "these are numbers, the conversion is wrong for this model: please report it. If they are nan, the "
            "source itself gives nan."
        )
