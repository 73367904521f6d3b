"""`generate` of a looped model: its three more settings, and where transformers' decoding has to know of loops."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import (
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateOutput

from .cache_layers_looped import CACHE_NAME, is_empty
from .checks_looped import cuts_show, is_row_mask, no_engine, no_pattern
from .depth_batching_looped import DepthBatching, Request
from .depth_looped import asked_count, generation_count
from .growing_looped import GrowingCacheMixin
from .halting_looped import Rule, calibrated_rule, halting_rule
from .masks_looped import ANSWER, PATTERNS, PROMPT, mask_of_step
from .speculation_looped import (
    CALLS_ARE_PREPARED,
    NO_DRAFTS,
    NO_DRAFTS_THAT_HALT,
    calls_are_prepared,
    self_speculation,
)

LOOP_SETTINGS = ("num_loops", "halting")
OF_ROWS = ("attention_mask", "position_ids", "inputs_embeds", "num_loops")  # of a call, by batch row
ROWS_ALIKE = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria)  # look at a batch row as at any other
OF_GUIDANCE = (*LOOP_SETTINGS, "generator")  # of a call, also for the prompt that it is compared with
CALIBRATED = "calibrated_halting"  # the rule that `halting=True` stands for; alone it changes nothing
COMPILED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # the decoding methods that can be
GENERATION_SETTINGS = (*LOOP_SETTINGS, CALIBRATED, "draft_loops")  # of a generation config, beside transformers' own


@dataclass
class LoopedGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` plus the loops run.

    Args:
        loops_used (`torch.LongTensor` of shape `(batch_size, new_tokens)`): loops of the call that made each token.
    """

    loops_used: torch.Tensor | None = None


class LoopedGenerationMixin(GrowingCacheMixin, GenerationMixin):
    """`GenerationMixin` with `num_loops`, `halting` and `draft_loops`."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: PreTrainedModel | None = None,
        streamer: BaseStreamer | None = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        custom_generate: str | Callable | None = None,
        *,
        num_loops: int | torch.Tensor | None = None,
        halting: str | dict | Rule | Literal[True] | None = None,
        draft_loops: int | None = None,
        **kwargs,
    ) -> GenerateOutput | torch.LongTensor:
        """Write tokens after a prompt. `num_loops`, `halting` and `draft_loops` are also read from the generation
        config; everything else is that of `GenerationMixin.generate`.

        Args:
            inputs: (B, T) tokens of the prompt, padded on the left; or `input_ids=`, or `inputs_embeds=`.
            generation_config: settings that the call does not have itself; the model's by default.
            logits_processor: changes the scores, after the processors that the settings make.
            stopping_criteria: ends the text, beside those that the settings make.
            prefix_allowed_tokens_fn: which tokens may follow a prefix.
            synced_gpus: go on while another process does.
            assistant_model: another model, which drafts tokens.
            streamer: is given tokens as soon as they are certain.
            negative_prompt_ids, negative_prompt_attention_mask: (B, T), for `guidance_scale`.
            custom_generate: another decoding method.
            num_loops: loops per token, >= 1, or a (B,) LongTensor with one count per batch row.
            halting: rule by which a token stops looping earlier, see `forward`. True is the rule in
                `generation_config.calibrated_halting`, which `looped halting RUN --save` chooses for a model; it is
                used only where `halting=True` asks for it.
            draft_loops: so many loops draft tokens, and all loops verify them, for a batch of one text; 0 for no
                drafts. See `speculation_looped.py`. `num_assistant_tokens` and `assistant_confidence_threshold` say
                how far a draft goes, as in assisted decoding.
            **kwargs: settings of a generation config (`max_new_tokens`, `do_sample`, `temperature`, ...) and arguments
                of `forward` (`attention_mask`, `past_key_values`, `generator`, ...).

        Returns:
            (B, T + new tokens). With `return_dict_in_generate=True` an output of transformers. After sampling and
            greedy search it also has `loops_used`, a (B, new tokens) LongTensor, and with `draft_loops` the fields of
            `SpeculativeGenerateOutput`.

        Raises:
            ValueError: a setting has the wrong value, or two settings exclude each other; True as `halting` where no
                rule was calibrated.
        """
        if not self.model.pattern.takes_cache:
            raise ValueError(
                f"generate writes one token after the other, and attention_pattern={self.config.attention_pattern!r} "
                "lets every token see later ones: read the answers in place, from the logits of one call."
            )
        call = {
            "inputs": inputs,
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "streamer": streamer,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        asked = {"num_loops": num_loops, "halting": halting}
        settings = kwargs | {name: value for name, value in asked.items() if value is not None}
        if self.model.pattern.tells_prompts and settings.get("token_type_ids") is None:
            settings["token_type_ids"] = types_of_prompt(inputs, settings)
        speculation = self_speculation(self, draft_loops, call, settings)
        if speculation is not None:
            call["custom_generate"] = speculation
        return super().generate(**call, **settings)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """As in transformers. A `compile_config` asks for a static cache, without which no step is compiled, unless
        the call or its generation config names a cache."""
        given = [value for value in model_kwargs.values() if isinstance(value, Cache)]
        if generation_config.compile_config is not None and generation_mode in COMPILED and not given:
            generation_config.cache_implementation = generation_config.cache_implementation or "static"
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        """As in transformers, which compiles on accelerators; with a `compile_config` also on a CPU."""
        if generation_config.compile_config is not None:
            generation_config.compile_config._compile_all_devices = True
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **kwargs,
    ):
        """As in transformers. Batch rows with loop counts of their own are decoded in the order of the counts, the
        largest first, so that those that still loop are a view of the cache; the caller gets them in his order."""
        call = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            "synced_gpus": synced_gpus,
            "streamer": streamer,
        }
        order = None
        if streamer is None and not logits_processor and all(type(each) in ROWS_ALIKE for each in stopping_criteria):
            order = deepest_first(input_ids, generation_config, kwargs)
        if order is None:
            return with_loops_used(super()._sample, input_ids, **call, **kwargs)
        rows = len(input_ids)
        moved = {name: in_order(kwargs[name], order, rows) for name in OF_ROWS if name in kwargs}
        outputs = with_loops_used(super()._sample, input_ids[order], **call, **kwargs | moved)
        back = order.argsort()
        kwargs[CACHE_NAME].reorder_cache(back)
        if isinstance(outputs, torch.Tensor):
            return outputs[back]
        return type(outputs)(**{name: in_order(value, back, rows) for name, value in outputs.items()})

    def _assisted_decoding(self, *args, **kwargs):
        return with_loops_used(super()._assisted_decoding, *args, **kwargs)

    def _prepare_generation_config(self, generation_config, **kwargs):
        """Loop settings are model arguments: a generation config that knows them must not swallow the call's own.

        Raises:
            ValueError: the prompt is to be cut where cuts show (`kv_sharing`, a halting rule), or the halting rule is
                none.
        """
        asked = {name: kwargs.pop(name, None) for name in LOOP_SETTINGS}
        given = generation_config
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        cut = generation_config.prefill_chunk_size
        if cut is not None and self.model.sharing.rewrites and self.config.prefill_chunk != 1:
            raise ValueError(
                f"prefill_chunk_size={cut}: {cuts_show(self.config.kv_sharing)}. Leave it out; the model's own cuts "
                "are config.prefill_chunk, which bounds memory too."
            )
        if cut is not None and self.model.pattern.tells_prompts:
            raise ValueError(
                f"prefill_chunk_size={cut} cuts the prompt, whose tokens see each other where "
                "attention_pattern='prefix': leave it out."
            )
        if cut is not None and calls_are_prepared(self):
            raise ValueError(f"prefill_chunk_size={cut}: {CALLS_ARE_PREPARED}: leave it out.")
        stored = {
            "num_loops": generation_count(self.config, given, self.generation_config),
            "halting": generation_config.to_dict().get("halting"),
        }
        calibrated = generation_config.to_dict().get(CALIBRATED)
        for name, value in asked.items():
            value = stored[name] if value is None else value
            if value is not None:
                # Counts of batch rows steer the loop, which is on the host: every call would wait for them.
                model_kwargs[name] = value.cpu() if isinstance(value, torch.Tensor) else value
        halting = calibrated_rule(model_kwargs.pop("halting", None), calibrated)
        rule = halting_rule(halting)  # built once: raises before any work, not per token
        if rule is not None and cut is not None:
            raise ValueError(
                f"prefill_chunk_size={cut} cuts the prompt, and each piece would halt by a token of its own: leave it "
                "out, or halting (halting='fixed' for one of the generation config)."
            )
        if rule is not None:
            model_kwargs["halting"] = rule
        return generation_config, model_kwargs

    def _get_logits_processor(self, *args, logits_processor=None, model_kwargs=None, **kwargs):
        """As in transformers. What `guidance_scale` compares a prompt with runs the loops of the call as well."""
        processors = super()._get_logits_processor(
            *args, logits_processor=logits_processor, model_kwargs=model_kwargs, **kwargs
        )
        given = {name: value for name, value in (model_kwargs or {}).items() if name in OF_GUIDANCE}
        for each in processors:
            made_here = each not in (logits_processor or [])
            if made_here and isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                each.model = partial(self, logits_to_keep=1, **given)  # pyright: ignore[reportArgumentType]
        return processors

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, loops_of_calls=None, tokenizer=None, **kwargs
    ):
        # generate accepts inputs_embeds only if it finds them in this signature. It hands the tokenizer, which stop
        # strings need, and loops_of_calls on to this method; the model takes neither.
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        if self.model.is_cut(tokens.shape[1]) and not is_row_mask(inputs.get("attention_mask")):
            inputs["attention_mask"] = kwargs.get("attention_mask")  # chunks cannot be cut from a prepared mask
        return inputs

    def depth_batching(self, max_rows: int = 64) -> DepthBatching:
        """A scheduler of requests of different depth, see `depth_batching_looped.py`.

        Args:
            max_rows: most requests at work; the others wait. It bounds the memory.

        Raises:
            ValueError: max_rows is no int >= 1, or requests of this model cannot be run together.
        """
        return DepthBatching(self, max_rows)

    def generate_each(
        self, requests: Iterable[Mapping | Sequence[int] | torch.Tensor], *, max_rows: int = 64, **settings
    ) -> list[Request]:
        """Answer many prompts, each at its own depth and with its own settings, as `generate` answers it alone.

        Args:
            requests: the tokens of a prompt, (T,); or the arguments of `DepthBatching.add` as a dict, such as
                `{"input_ids": [5, 3, 8], "num_loops": 12, "max_new_tokens": 4, "eos_token_id": 7}`.
            max_rows: most requests at work; the others wait. It bounds the memory.
            **settings: of the requests that do not say otherwise.

        Returns:
            The requests, in the order given, with their `tokens`, `loops_used` and, where one failed, its `error`.

        Raises:
            ValueError: as `depth_batching` and `DepthBatching.add`, before any work.
        """
        batch = self.depth_batching(max_rows)
        asked: list[dict[str, Any]] = [
            dict(each) if isinstance(each, Mapping) else {"input_ids": each} for each in requests
        ]
        added = [batch.add(**settings | each) for each in asked]
        for _ in batch.stream():
            pass
        return added

    def init_continuous_batching(self, generation_config=None, *args, **kwargs):
        """As in transformers. Every request runs `config.num_loops` loops, since the paged cache is sized by them.

        Raises:
            ValueError: the generation config asks for another loop count, or for a halting rule; or the KV policy
                cannot be run by an engine (`kv_sharing`).
        """
        sharing = self.model.sharing
        if not sharing.takes_engines:
            raise ValueError(no_engine(self.config.kv_sharing, sharing.engine_trouble, "continuous batching"))
        num_loops = asked_count(generation_config, self.generation_config)
        settings = (self.generation_config if generation_config is None else generation_config).to_dict()
        halting = calibrated_rule(settings.get("halting"), settings.get(CALIBRATED))
        if self.model.pattern.looks_ahead:
            raise ValueError(no_pattern(self.config.attention_pattern, "continuous batching"))
        other = num_loops is not None and (isinstance(num_loops, torch.Tensor) or num_loops != self.config.num_loops)
        if other or halting_rule(halting) is not None:
            raise ValueError(
                f"continuous batching runs config.num_loops={self.config.num_loops} for every token, but the "
                f"generation config asks for num_loops={num_loops}, halting={halting!r}: load the model with "
                "from_pretrained(..., num_loops=...) and leave both out of the generation config."
            )
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _get_candidate_generator(self, generation_config, *args, model_kwargs, assistant_model=None, **kwargs):
        """Assisted decoding. Another draft model uses its own loop count. When this model drafts for itself by early
        exit, it runs fewer loops, even if the call asks for more.

        Raises:
            ValueError: drafts cannot be verified (`kv_sharing`, a halting rule), or a library prepares the calls of
                this model.
        """
        if self.model.sharing.rewrites:
            raise ValueError(
                f"kv_sharing={self.config.kv_sharing!r} cannot verify drafted tokens: several tokens in one call see "
                "each other at the current loop, so the output would not be that of plain decoding. Use 'per_loop' or "
                "'first'."
            )
        if self.model.pattern.tells_prompts:
            raise ValueError(f"drafts: {NO_DRAFTS}: decode without.")
        if calls_are_prepared(self):
            raise ValueError(f"drafts of {type(self).__name__}: {CALLS_ARE_PREPARED}: decode without.")
        if "halting" in model_kwargs:
            raise ValueError(f"drafts: {NO_DRAFTS_THAT_HALT} (halting='fixed' for one of the generation config).")
        if assistant_model is not None:
            own = (*LOOP_SETTINGS, "generator", "loops_of_calls")
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in own}
        candidates = super()._get_candidate_generator(
            generation_config, *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )
        if generation_config.assistant_early_exit is not None:
            candidates.assistant_kwargs["num_loops"] = self.config.loops_of(generation_config.assistant_early_exit)
        elif assistant_model is not None:
            for name in (*LOOP_SETTINGS, CALIBRATED):  # the draft model reads them in its own generation config
                vars(candidates.generation_config).pop(name, None)
        return candidates

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *, num_new_tokens=1, **kwargs):
        if "loops_of_calls" in model_kwargs:  # decoding loops of other libraries call this as well
            # Of a fixed count not the output is kept, which a compiled graph overwrites in its next call.
            loops = outputs.loops_used[:, -1:] if "halting" in model_kwargs else model_kwargs["num_loops"]
            # A call that verifies a draft makes several tokens, all with the same loop count.
            model_kwargs["loops_of_calls"].append((loops, num_new_tokens))
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, num_new_tokens=num_new_tokens, **kwargs
        )
        if model_kwargs.get("token_type_ids") is not None:  # transformers goes on with the type of the last token
            model_kwargs["token_type_ids"][:, -num_new_tokens:] = ANSWER
        return model_kwargs

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values, position_ids=None, token_type_ids=None, **kwargs
    ):
        """The mask of a call with a static cache, which `generate` makes itself."""
        mask = mask_of_step(config, inputs_embeds, attention_mask, past_key_values)
        if mask is not None:
            return mask
        pattern = PATTERNS[config.attention_pattern]
        return pattern.mask(config, inputs_embeds, attention_mask, past_key_values, position_ids, token_type_ids)


def types_of_prompt(inputs: torch.Tensor | None, settings: dict) -> torch.Tensor:
    """(B, T) `token_type_ids` of what `generate` is given: all of it is the prompt; one token where nothing is."""
    given = [inputs, settings.get("input_ids"), settings.get("inputs_embeds")]
    tokens = next((each for each in given if each is not None), None)
    if tokens is None:
        return torch.full((1, 1), PROMPT)
    return torch.full(tokens.shape[:2], PROMPT, device=tokens.device)


def deepest_first(input_ids: torch.Tensor, generation_config: GenerationConfig, kwargs: dict) -> torch.Tensor | None:
    """(B,), the order in which the loop counts of batch rows fall; None where it changes nothing or more than speed:
    draws differ in another order, and what is recorded of layer calls lists the rows that ran them."""
    num_loops, cache = kwargs.get("num_loops"), kwargs.get(CACHE_NAME)
    if not isinstance(num_loops, torch.Tensor) or kwargs.get("halting") is not None or generation_config.do_sample:
        return None
    others = any(isinstance(value, torch.Tensor) for name, value in kwargs.items() if name not in OF_ROWS)
    recorded = generation_config.output_hidden_states or generation_config.output_attentions
    if others or recorded or num_loops.shape != (len(input_ids),):
        return None
    if not isinstance(cache, DynamicCache) or not is_empty(cache):
        return None
    order = num_loops.argsort(descending=True, stable=True)
    return None if bool((order.diff() == 1).all()) else order


def in_order(value, order: torch.Tensor, rows: int):
    """Tensors with so many rows, also in a tuple, in the order (B,); anything else as it is."""
    if isinstance(value, tuple):
        return tuple(in_order(each, order, rows) for each in value)
    return value[order] if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows else value


def with_loops_used(decode: Callable, input_ids: torch.Tensor, *args, **kwargs):
    """The output of a decoding method of transformers, with the loops of its calls.

    The list `loops_of_calls` is added here, and only `_update_model_kwargs_for_generation` reads it: `generate` would
    refuse it as a keyword that the model, or the library that wraps it, does not have.
    """
    calls = []
    # A model that drafts for itself calls generate again: give the inner call its own list.
    outputs = decode(input_ids, *args, **kwargs | {"loops_of_calls": calls})
    if type(outputs) is not GenerateDecoderOnlyOutput:
        return outputs
    rows, length = outputs.sequences.shape
    counts = [(torch.as_tensor(loops, device=input_ids.device).reshape(-1, 1), tokens) for loops, tokens in calls]
    if any(len(loops) not in (1, rows) for loops, _ in counts):
        return outputs
    loops_used = torch.cat([loops.expand(rows, tokens) for loops, tokens in counts], dim=1)
    # A stop that is read one step late has run one call too many, whose token is dropped.
    return LoopedGenerateOutput(**outputs, loops_used=loops_used[:, : length - input_ids.shape[1]])
