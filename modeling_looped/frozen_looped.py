"""Training-free looping of a frozen Hugging Face causal LM: a window of its layers is evaluated several times.

    with looped(model, window=(12, 15), num_loops=3):     # no weight changes; undone at the end
        model.generate(ids)
        model.generate(ids, num_loops=6)

Let g = L_b o ... o L_a be the layers of the window, x0 the state before it and y0 = g(x0) the natural output. Applying
g again and again leaves the states that the layers above were trained on. The loop refines the one unit step that g is
into K smaller ones, x <- x + s (g(x) - x) with s = 1/K, and returns beta y0 + (1 - beta) x_K (arXiv 2605.23872).

The natural pass is the model's own: it writes its usual entry to the KV cache, one per layer and token, whatever K is.
The K - 1 extra passes write nothing. With `prefill="natural"` an extra pass sees the natural keys of earlier tokens
and its own token's current one. That is what token-by-token decoding does, done for all tokens of a call at once, so
that a prompt in one call, in chunks, or without a cache gives the same logits. With `prefill="iterated"` the tokens of
one call see each other's current keys, as in the paper's prefill, and a prompt depends on how it was cut into calls.

Legend: B batch rows, T tokens of a call, S cached tokens and these T, D hidden size, N layers, K loops.
"""

import copy
import difflib
import inspect
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from huggingface_hub import CommitOperationAdd, create_commit, create_repo
from huggingface_hub.dataclasses import as_validated_field, strict
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.generation import GenerationMixin
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file, logging

from .depth_looped import SavedDepth, count_to_save, generation_count, mark_saved_settings
from .frozen_solvers_looped import METHODS
from .frozen_window_looped import Layer, Window, decoder_layers, default_window
from .growing_looped import GrowingCacheMixin, GrowingLayer

AUTO_MAP = {
    "AutoConfig": "frozen_looped.FrozenLoopedConfig",
    "AutoModelForCausalLM": "frozen_looped.FrozenLoopedForCausalLM",
}

logger = logging.get_logger(__name__)

BASE_FOLDER = "base_model"  # in a saved wrapper that has its base model inside

Method = Literal["blend", "euler", "naive", "midpoint", "heun", "rk4"]
Mode = Literal["block", "layer"]
Kept = Literal["first", "last"]
Prefill = Literal["natural", "iterated"]

LARGEST = 1000  # of beta and step: what is larger overflows float32 somewhere else


@as_validated_field
def at_least_one(value: int):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"must be an int >= 1, got {value!r}")


@strict
class FrozenLoopedConfig(SavedDepth, PreTrainedConfig):
    r"""
    How a frozen model is looped; saved, it names the base model.

    Args:
        base_model (`str`): Hub name or folder of the model that is looped.
        base_path (`str`, *optional*): where that folder is as seen from the folder of the saved wrapper, which comes
            first: both may be moved together, and a base model inside of the wrapper goes with it.
        base_revision (`str`, *optional*): its commit, so that a published wrapper goes on meaning the same model.
        window (`tuple[int, int]`, *optional*): first and last layer, both inclusive, counted from 0; `(a, a - 1)` is
            the empty window. By default `default_window` of the model's depth.
        num_loops (`int`): evaluations of the window where the call does not say, >= 1. One loop is the base model.
        method (`str`): `"blend"` (the paper's K-stage method), `"euler"` (the same with beta 0), `"naive"` (re-apply),
            `"midpoint"`, `"heun"`, `"rk4"` (num_loops substeps of 2, 2 and 4 evaluations).
        beta (`float`, *optional*): weight of the natural output in what leaves the window; 0.5 for `"blend"`, else 0.
            1 is the base model.
        step (`float`, *optional*): length of a substep; `1 / num_loops` by default, which ends where the natural pass
            does. `"naive"` has none.
        mode (`"block"` | `"layer"`, *optional*): loop the window as a whole or each of its layers by itself; by
            default `"layer"` for mixtures of experts, else `"block"`. Extra passes use the experts of the natural
            pass. The paper's form for them also rescales the state along the way, which its authors found to do
            nothing (+2.79 points with it, +2.81 without): it is left out.
        cache (`"first"` | `"last"`): which keys a looped token leaves in the KV cache: those of its natural pass, or
            those of one more pass over the state the loop ended in. `"last"` depends on how tokens are cut into calls.
        decode (`"full"` | `"prompt"` | `int`): loop on every token, on the prompt, or on the prompt and so many tokens
            after it.
        prefill (`"natural"` | `"iterated"`): which keys of the other tokens of a call an extra pass sees.

    Raises:
        ValueError: a field has the wrong type or range.
    """

    model_type = "frozen_looped"
    base_model: str = ""
    base_path: str | None = None
    base_revision: str | None = None
    window: list[int] | tuple[int, ...] | None = None
    num_loops: int = at_least_one(default=3)
    method: Method = "blend"
    beta: int | float | None = None
    step: int | float | None = None
    mode: Mode | None = None
    cache: Kept = "first"
    decode: int | str = "full"
    prefill: Prefill = "natural"

    def __post_init__(self, **kwargs):
        self.window = None if self.window is None else list(self.window)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    def validate_loop(self):
        """Ranges; run by `@strict` after construction and before saving."""
        if self.window is not None and (
            len(self.window) != 2 or self.window[0] < 0 or self.window[1] < self.window[0] - 1
        ):
            raise ValueError(
                f"window must be (first, last) with 0 <= first <= last + 1, both inclusive, got {tuple(self.window)}."
            )
        for name, value in (("beta", self.beta), ("step", self.step)):
            if value is not None and not abs(value) <= LARGEST:
                raise ValueError(f"{name} must be finite, and at most {LARGEST} in size, got {value}.")
        if self.step is not None and (self.step <= 0 or self.method == "naive"):
            raise ValueError(
                f"step must be > 0, and the naive method has none, got step={self.step} with method={self.method!r}."
            )
        first_n = isinstance(self.decode, int) and not isinstance(self.decode, bool) and self.decode >= 0
        if not first_n and self.decode not in ("full", "prompt"):
            raise ValueError(
                f"decode must be 'full', 'prompt' or a number of tokens >= 0 after the prompt, got {self.decode!r}."
            )

    @classmethod
    def settings(cls) -> list[str]:
        """Names of the fields that are this class's own."""
        return [name for name in cls.__annotations__ if name != "model_type"]

    @property
    def natural_weight(self) -> float:
        """beta, or the method's own."""
        return METHODS[self.method][1] if self.beta is None else self.beta

    @property
    def tokens_after_prompt(self) -> int | None:
        """Tokens after the prompt that loop; None: all."""
        return {"full": None, "prompt": 0}[self.decode] if isinstance(self.decode, str) else self.decode

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; a base_model among the keywords is another one than the path leads to."""
        if "base_model" in kwargs:
            config_dict = config_dict | {"base_path": kwargs.get("base_path")}
        return super().from_dict(config_dict, **kwargs)

    def check_base(self) -> None:
        """ValueError where the base model has no name under which it could be loaded."""
        if not self.base_model:
            raise ValueError(
                "base_model is empty: this model was not loaded by name, so a saved wrapper could not find its "
                "weights. Save it with save_base=True; or save the model itself first and load it from there; or "
                "detach() and save the whole model."
            )

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in transformers.

        Raises:
            ValueError: the base model has no name under which it could be loaded.
        """
        self.check_base()
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def base_of(self, wrapper: str | os.PathLike, subfolder: str = "", revision: str = "main") -> dict[str, str]:
        """Where the base model of a saved wrapper is: the name, revision and subfolder of its `from_pretrained`.

        Args:
            wrapper: folder or Hub name of the wrapper.
            subfolder, revision: of the wrapper.

        Raises:
            ValueError: it is a folder, and is not where it was.
        """
        here = Path(wrapper, subfolder)
        if self.base_path is not None and (here / self.base_path / CONFIG_NAME).is_file():
            return {"name": os.path.abspath(here / self.base_path)}
        if self.base_path == BASE_FOLDER and not Path(wrapper).is_dir():
            inside = f"{subfolder}/{BASE_FOLDER}".removeprefix("/")
            return {"name": str(wrapper), "subfolder": inside, "revision": revision}
        if self.base_path is not None and not Path(self.base_model).is_dir():
            raise ValueError(
                f"the base model of {wrapper} is neither {here / self.base_path} nor {self.base_model}: give its "
                "folder or Hub name as base_model, or move it back. save_pretrained(save_base=True) puts it inside."
            )
        return {"name": self.base_model, "revision": self.base_revision or "main"}


Model = TypeVar("Model", bound=PreTrainedModel)


class Loop(Generic[Model]):
    """A loop over a window of one model's layers. `with` attaches and detaches it; so do the methods.

    Args:
        model: the frozen model.
        config: how it is looped.

    Raises:
        ValueError: the model cannot be looped, or the window is not in it; nothing was changed.
    """

    def __init__(self, model: Model, config: FrozenLoopedConfig):
        layers = decoder_layers(model)
        first, last = config.window = list(config.window or default_window(len(layers)))
        if last >= len(layers):
            raise ValueError(f"window {(first, last)} ends beyond the last layer of the model, {len(layers) - 1}.")
        chosen = [Layer(layers[index], index, model) for index in range(first, last + 1)]
        if config.mode is None:
            config.mode = "layer" if any(layer.routers for layer in chosen) else "block"
        self.model, self.config, self.num_layers = model, config, len(layers)
        self.num_loops, self.num_looped_tokens = config.num_loops, None
        groups = [chosen] if config.mode == "block" else [[layer] for layer in chosen]
        self.windows = [Window(group, self) for group in groups if group]
        self.prompt_ends: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()
        self.handles: list = []
        self.turn = Turn()
        self.check_attention()

    def check_attention(self) -> None:
        """ValueError for an attention whose masks cannot say which keys an extra pass sees."""
        attention = self.model.config._attn_implementation
        if self.config.prefill == "natural" and attention not in ("eager", "sdpa"):
            raise ValueError(
                f"prefill='natural' needs a mask over two sources of keys, which attention {attention!r} does not "
                "take: call model.set_attn_implementation('sdpa'), or choose prefill='iterated'."
            )

    def attach(self) -> Model:
        """Loop the model from now on, in place; returns it.

        Raises:
            ValueError: it is looped already.
        """
        if isinstance(self.model, FrozenLooped):
            raise ValueError(f"this {type(self.model).__name__} is looped already: detach(model) first.")
        self.versions = weight_versions(self.model)
        self.handles = [handle for window in self.windows for handle in window.hook()]
        self.model.__class__ = frozen_looped_class(type(self.model))
        self.own_forward = vars(self.model).pop("forward", None)  # accelerate's, which would swallow num_loops
        self.model.loop = self  # pyright: ignore[reportArgumentType]
        return self.model

    def detach(self) -> Model:
        """The model as it was; returns it.

        Raises:
            ValueError: this loop is not attached.
        """
        if vars(self.model).get("loop") is not self:
            raise ValueError(f"this {type(self.model).__name__} is not looped by this loop.")
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.model.__class__ = type(self.model).base_class
        if self.own_forward is not None:
            self.model.forward = self.own_forward
        del self.model.loop
        return self.model

    def __enter__(self) -> Model:
        return self.attach()

    def __exit__(self, *error) -> None:
        self.detach()

    def during(self, num_loops: int | None, num_looped_tokens: int | None) -> "CallSettings":
        """The settings of one call of the model."""
        if num_looped_tokens is not None and (
            isinstance(num_looped_tokens, bool) or not isinstance(num_looped_tokens, int) or num_looped_tokens < 0
        ):
            raise ValueError(f"num_looped_tokens must be an int >= 0, got {num_looped_tokens!r}.")
        return CallSettings(self, check_loops(num_loops, self.config.num_loops), num_looped_tokens)

    def looped_tokens(self, layer: Layer, num_tokens: int) -> int:
        """How many of a call's first tokens are looped."""
        if layer.module.training and vars(layer.module).get("gradient_checkpointing"):
            raise ValueError("gradient checkpointing would run the loop's hooks twice: disable it on a looped model.")
        self.check_attention()
        after_prompt, cache, end = self.config.tokens_after_prompt, layer.natural.cache, self.num_looped_tokens
        if end is None and after_prompt is None:
            return num_tokens
        past = 0 if cache is None else int(cache.get_seq_length(layer.index))
        if end is None:
            if cache is None:
                return num_tokens  # all of it is prompt
            if num_tokens > 1 or past == 0:
                self.prompt_ends[cache] = past + num_tokens
            end = self.prompt_ends.get(cache, 0) + (after_prompt or 0)
        return min(max(end - past, 0), num_tokens)

    def check_rewritable(self, layer: Layer, cache: Cache | None) -> None:
        """ValueError for a cache whose entries cannot be overwritten, before anything is written to it."""
        if self.config.cache == "first" or cache is None or layer.index >= len(cache.layers):
            return
        kind = type(cache.layers[layer.index])
        if kind not in (DynamicLayer, GrowingLayer, StaticLayer):
            raise ValueError(
                f"cache='last' overwrites rows, which layer {layer.index}'s {kind.__name__} does not allow: use "
                "cache='first', or a DynamicCache or StaticCache without sliding windows or quantisation."
            )


class Turn:
    """A lock for the calls of one model, which a copy of the model does not share."""

    def __init__(self):
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict) -> "Turn":
        return Turn()


class CallSettings:
    """Within the block a loop has the settings of one call.

    Threads call one after the other: the settings, and what the hooks note of a call, lie in the loop and on layers,
    which all calls share.
    """

    def __init__(self, loop: Loop, num_loops: int, num_looped_tokens: int | None):
        self.loop, self.asked = loop, (num_loops, num_looped_tokens)
        # A lock cannot be traced.
        self.turn = nullcontext() if torch.compiler.is_compiling() else loop.turn.lock

    def __enter__(self) -> None:
        self.turn.__enter__()
        self.before = self.loop.num_loops, self.loop.num_looped_tokens
        self.loop.num_loops, self.loop.num_looped_tokens = self.asked

    def __exit__(self, *error) -> None:
        self.loop.num_loops, self.loop.num_looped_tokens = self.before
        self.turn.__exit__(*error)


def check_loops(num_loops: int | None, default: int) -> int:
    """An int >= 1."""
    if num_loops is None:
        return default
    if isinstance(num_loops, bool) or not isinstance(num_loops, int) or num_loops < 1:
        raise ValueError(f"num_loops must be an int >= 1, got {num_loops!r}: rows of a looped frozen model share it.")
    return num_loops


def looped(
    model: Model,
    window: tuple[int, int] | None = None,
    num_loops: int = 3,
    method: Method = "blend",
    beta: float | None = None,
    step: float | None = None,
    mode: Mode | None = None,
    cache: Kept = "first",
    decode: Literal["full", "prompt"] | int = "full",
    prefill: Prefill = "natural",
) -> Loop[Model]:
    """Loop a frozen model: `with looped(model): ...`, or `looped(model).attach()` and later `detach(model)`.

    The model's `forward` and `generate` then take `num_loops` (int, also a field of the generation config), and
    `forward` takes `num_looped_tokens`: so many first tokens of a batch row, padding included, loop. The other
    arguments are those of `FrozenLoopedConfig`.

    Raises:
        ValueError: a setting has the wrong type or range, or the model cannot be looped; the text says why.
    """
    settings = {
        "base_model": model.name_or_path if isinstance(model, PreTrainedModel) else "",
        "window": window,
        "num_loops": num_loops,
        "method": method,
        "beta": beta,
        "step": step,
        "mode": mode,
        "cache": cache,
        "decode": decode,
        "prefill": prefill,
    }
    try:
        config = FrozenLoopedConfig(**settings)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    return Loop(model, config)


def attach(
    model: Model,
    window: tuple[int, int] | None = None,
    num_loops: int = 3,
    method: Method = "blend",
    beta: float | None = None,
    step: float | None = None,
    mode: Mode | None = None,
    cache: Kept = "first",
    decode: Literal["full", "prompt"] | int = "full",
    prefill: Prefill = "natural",
) -> Model:
    """`looped(model, ...)`, attached; returns the model."""
    return looped(model, window, num_loops, method, beta, step, mode, cache, decode, prefill).attach()


def detach(model: Model) -> Model:
    """The model as it was before `attach`; returns it.

    Raises:
        ValueError: it is not looped.
    """
    if not isinstance(model, FrozenLooped):
        raise ValueError(f"this {type(model).__name__} is not looped.")
    return model.loop.detach()


class FrozenLooped(GrowingCacheMixin):
    """A base class in front of the class of a looped model: loop settings in `forward`, `generate` and saving."""

    base_class: type
    loop: Loop

    def forward(self, *args, num_loops: int | None = None, num_looped_tokens: int | None = None, **kwargs):
        """`forward` of the base model, looped.

        Args:
            num_loops: evaluations of the window, >= 1, for all rows; those of the loop by default.
            num_looped_tokens: so many first tokens of a row loop, padding included; by default what `decode` says.
        """
        for name in set(kwargs) - set(inspect.signature(type(self).forward).parameters):
            near = difflib.get_close_matches(name, ("num_loops", "num_looped_tokens"), n=1, cutoff=0.7)
            if near:
                raise TypeError(f"forward got an unexpected keyword argument {name!r}. Did you mean {near[0]!r}?")
        forward = self.loop.own_forward or partial(self.base_class.forward, self)
        with self.loop.during(num_loops, num_looped_tokens):
            return forward(*args, **kwargs)

    def generate(
        self, inputs=None, *args, num_loops: int | None = None, num_looped_tokens: int | None = None, **kwargs
    ):
        """`generate` of the base model, looped.

        Args:
            num_loops: evaluations of the window, >= 1, for all rows; also read from the generation config.
            num_looped_tokens: so many first tokens of a row loop, padding included; by default what `decode` says.
        """
        own = {"num_loops": num_loops, "num_looped_tokens": num_looped_tokens}
        kwargs |= {name: value for name, value in own.items() if value is not None}
        after_prompt = self.loop.config.tokens_after_prompt
        if after_prompt is not None and kwargs.get("num_looped_tokens") is None:
            given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), inputs)
            prompt = next((tensor for tensor in given if tensor is not None), None)
            kwargs["num_looped_tokens"] = (1 if prompt is None else prompt.shape[1]) + after_prompt
        return super().generate(inputs, *args, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs: dict, assistant_model=None, **kwargs):
        """Assisted decoding. The draft model uses its own loop count, if it has one.

        Raises:
            ValueError: `cache="last"`, see `refuse_cuts`.
        """
        self.refuse_cuts("drafts, which are verified several in a call")
        if assistant_model is not None:
            own = ("num_loops", "num_looped_tokens")
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in own}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _prepare_generation_config(self, generation_config, **kwargs):
        """num_loops is a model argument: a generation config that knows it must not swallow the call's own."""
        num_loops = kwargs.pop("num_loops", None)
        default = generation_count(self.loop.config, generation_config, self.generation_config)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if generation_config.prefill_chunk_size is not None:
            self.refuse_cuts(f"prefill_chunk_size={generation_config.prefill_chunk_size}")
        model_kwargs["num_loops"] = check_loops(num_loops, check_loops(default, self.loop.config.num_loops))
        return generation_config, model_kwargs

    def refuse_cuts(self, what: str) -> None:
        """ValueError where tokens depend on how they are cut into calls."""
        if self.loop.config.cache == "last":
            raise ValueError(
                f"cache='last' gives other tokens where a text is cut into other calls: leave out {what}, or use "
                "cache='first'."
            )

    def init_continuous_batching(self, *args, **kwargs):
        """ValueError: an engine's cache takes the entries of a call once, and a looped layer runs several times."""
        raise ValueError("continuous batching cannot run a looped frozen model: use generate, or detach(model) first.")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        base_model: str | None = None,
        base_revision: str | None = None,
        push_to_hub: bool = False,
        save_base: bool = False,
        **kwargs,
    ) -> None:
        """Save how the model is looped, which model it is, and its tokenizer; `AutoModelForCausalLM` loads it again.

        Args:
            base_model: Hub name or folder to load the weights from; where the model was loaded from by default.
            base_revision: its commit.
            push_to_hub: push all that is written, as `repo_id` among the keywords; by default the folder's name.
            save_base: put the base model with its weights into the wrapper, as BASE_FOLDER: then nothing else is
                needed to load it.
            **kwargs: `commit_message`, and what `create_repo` of huggingface_hub takes (token, private).

        Raises:
            ValueError: the base model has no name, or none that others know where it is pushed; it is no causal LM;
                or its weights were changed since the loop was attached.
        """
        if not self.can_generate():
            raise ValueError(
                f"a saved loop is loaded as a causal LM, which {type(self).__name__} is not: detach(model), save "
                "it, and loop it again where it is loaded."
            )
        if weight_versions(self) != self.loop.versions:
            raise ValueError(
                "the weights were changed since the loop was attached, and are not those that a wrapper names: "
                "detach(model), save the model, load it from there and loop it again."
            )
        settings = self.loop.config.to_dict()
        name = base_model or settings["base_model"] or (BASE_FOLDER if save_base else "")
        folder = Path(save_directory).absolute()
        settings |= {"base_model": name, "base_path": None, "base_revision": base_revision}
        if save_base:
            settings |= {"base_model": BASE_FOLDER, "base_path": BASE_FOLDER}
        elif name and Path(name).is_dir():
            if push_to_hub:
                raise ValueError(
                    f"base_model={name!r} is a folder of this machine, which the Hub does not have: name the base "
                    "model's repository as base_model, or put it into the wrapper with save_base=True."
                )
            local = Path(name).absolute()
            settings |= {"base_model": str(local), "base_path": os.path.relpath(local, folder)}
        config = FrozenLoopedConfig(**{name: settings[name] for name in FrozenLoopedConfig.settings()})
        config.architectures = [FrozenLoopedForCausalLM.__name__]
        config.check_base()  # before anything is written
        if push_to_hub:
            message, repo_id = kwargs.pop("commit_message", None), kwargs.pop("repo_id", folder.name)
            repo_id = create_repo(repo_id, exist_ok=True, **kwargs).repo_id
            folder.mkdir(parents=True, exist_ok=True)
            before = times_of(folder)
        # A fresh object: one derived from a model's configuration loses num_loops when it is loaded.
        fields = self.generation_config.to_diff_dict()
        count = count_to_save(self.loop.config, self.generation_config)
        if count is not None:
            fields["num_loops"] = count
        fields.pop("_from_model_config", None)
        GenerationConfig(**fields).save_pretrained(save_directory)
        if save_base:
            self.base_class.save_pretrained(self, folder / BASE_FOLDER)
        tokenizer = tokenizer_beside(self)  # pyright: ignore[reportArgumentType]
        if tokenizer is not None:
            tokenizer.save_pretrained(save_directory)
        config.save_pretrained(save_directory)
        if push_to_hub:  # the configuration alone would be pushed with what is written after it begins
            written = [path for path, time in sorted(times_of(folder).items()) if time != before.get(path)]
            create_commit(
                repo_id,
                [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in written],
                commit_message=message or f"Upload {type(self).__name__}",
                token=kwargs.get("token"),
            )


def times_of(folder: Path) -> dict[Path, int]:
    """When each file below a folder was written last, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def tokenizer_beside(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder or repository that a model was loaded from; None where there is none to be had."""
    if not model.name_or_path:
        return None
    commit = vars(model.config).get("_commit_hash")
    place = {} if commit is None else {"revision": commit}
    try:
        found = [
            cached_file(model.name_or_path, name, _raise_exceptions_for_missing_entries=False, **place)
            for name in TOKENIZER_FILES
        ]
        return AutoTokenizer.from_pretrained(model.name_or_path, **place) if any(found) else None
    except (OSError, ValueError) as error:  # no connection, or one that needs code of its own
        logger.warning(f"the tokenizer of {model.name_or_path} is not saved with the wrapper: {error}")
        return None


def weight_versions(model) -> list[int]:
    """One number per weight that grows when the weight is changed in place."""
    return [weight._version for weight in model.parameters() if not weight.is_inference()]


def frozen_looped_class(base: type) -> type:
    """`base` with `FrozenLooped` before it, under the same name: transformers looks classes up by name."""

    def forward(self, *args, **kwargs):
        attached = isinstance(self, FrozenLooped)  # what wraps this function, as accelerate does, outlives the loop
        return (FrozenLooped if attached else base).forward(self, *args, **kwargs)

    def generate(self, *args, **kwargs):
        return FrozenLooped.generate(self, *args, **kwargs)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    methods = {"forward": forward} | ({"generate": generate} if issubclass(base, GenerationMixin) else {})
    for name, method in methods.items():
        show(method, getattr(base, name), getattr(FrozenLooped, name))
    return type(base.__name__, (FrozenLooped, base), {**names, **methods, "base_class": base})


def show(method: Callable, of_base: Callable, of_loop: Callable) -> None:
    """Let `help`, and whoever reads signatures, see the arguments of the base model's method and of the loop's."""
    signature, own = inspect.signature(of_base), inspect.signature(of_loop).parameters
    *named, last = signature.parameters.values()
    swallow = [last] if last.kind is inspect.Parameter.VAR_KEYWORD else []
    named += [] if swallow else [last]
    added = [own[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in ("num_loops", "num_looped_tokens")]
    method.__signature__ = signature.replace(parameters=[*named, *added, *swallow])  # pyright: ignore
    method.__doc__ = of_loop.__doc__


class FrozenLoopedForCausalLM(PreTrainedModel, GenerationMixin):
    """The saved form of a looped frozen model: `from_pretrained` loads the base model it names and attaches the loop.

    What it returns is the base model's own class, looped.
    """

    config_class = FrozenLoopedConfig

    def __init__(self, config: FrozenLoopedConfig):
        raise TypeError("FrozenLoopedForCausalLM has no weights of its own: use from_pretrained, or looped(model).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args,
        config: FrozenLoopedConfig | None = None,
        num_loops: int | None = None,
        **kwargs,
    ):
        """Load the base model of a saved wrapper, and loop it.

        Args:
            pretrained_model_name_or_path: the wrapper's folder or Hub name; the base model is found from there, see
                `FrozenLoopedConfig.base_of`. base_model among the keywords names another place of it.
            config: its configuration, if loaded already; loop settings among the keywords go before it.
            num_loops: evaluations of the window where a call does not say; those saved by default.
            **kwargs: other fields of `FrozenLoopedConfig`, and those of the base model's `from_pretrained` (dtype,
                device_map, quantization_config, ...).

        Raises:
            OSError: there is no such folder or Hub name, or no such base model.
        """
        if num_loops is not None:
            kwargs["num_loops"] = num_loops
        own = {name: kwargs.pop(name) for name in ("revision", "subfolder") if name in kwargs}
        shared = {name: kwargs[name] for name in ("cache_dir", "token", "local_files_only") if name in kwargs}
        settings = {name: kwargs.pop(name) for name in FrozenLoopedConfig.settings() if name in kwargs}
        if config is not None:
            config = copy.deepcopy(config)  # the caller's stays as it is
            if "base_model" in settings:  # another one than the path leads to, as in `FrozenLoopedConfig.from_dict`
                settings.setdefault("base_path", None)
            for name, value in settings.items():
                setattr(config, name, value)
        else:
            config = FrozenLoopedConfig.from_pretrained(pretrained_model_name_or_path, **own, **shared, **settings)
        for name in ("_from_auto", "adapter_kwargs"):  # the wrapper's, not the base model's
            kwargs.pop(name, None)
        # Trust in the wrapper is none in the base model, which somebody else wrote; distrust is in both.
        if kwargs.get("trust_remote_code"):
            del kwargs["trust_remote_code"]
        if config._attn_implementation is not None:  # every configuration takes it out of the keywords
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        place = config.base_of(pretrained_model_name_or_path, **own)
        name = place.pop("name")
        # What a wrapper that is saved again names: it cannot name a folder in a repository of the Hub.
        config.base_model = "" if "subfolder" in place else name
        loaded = AutoModelForCausalLM.from_pretrained(name, *args, **place, **kwargs)
        model, *loading_info = loaded if isinstance(loaded, tuple) else (loaded,)
        if kwargs.get("generation_config") is None:
            try:
                saved = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **own, **shared)
            except OSError as error:
                if GENERATION_CONFIG_NAME not in str(error):
                    raise
            else:
                model.generation_config = saved
                mark_saved_settings(saved)
        Loop(model, config).attach()  # pyright: ignore[reportArgumentType]
        return (model, *loading_info) if loading_info else model


FrozenLoopedConfig.register_for_auto_class()

FrozenLoopedForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "FrozenLoopedConfig",
    "FrozenLoopedForCausalLM",
    "Loop",
    "attach",
    "default_window",
    "detach",
    "looped",
]
