"""`generate` of a looped model: its three more settings, and where transformers' decoding has to know of loops."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.generation import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .checks_looped import cuts_show, is_row_mask
from .depth_looped import asked_count, generation_count
from .halting_looped import calibrated_rule, halting_rule
from .speculation_looped import CALLS_ARE_PREPARED, calls_are_prepared, self_speculation

LOOP_SETTINGS = ("num_loops", "halting")
CALIBRATED = "calibrated_halting"  # the rule that `halting=True` stands for; alone it changes nothing
GENERATION_SETTINGS = (*LOOP_SETTINGS, CALIBRATED, "draft_loops")  # of a generation config, beside transformers' own


@dataclass
class LoopedGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` plus the loops run.

    Args:
        loops_used (`torch.LongTensor` of shape `(batch_size, new_tokens)`): loops of the call that made each token.
    """

    loops_used: torch.Tensor | None = None


class LoopedGenerationMixin(GenerationMixin):
    """`GenerationMixin` with `num_loops`, `halting` and `draft_loops`."""

    def generate(self, *args, **kwargs):
        r"""`GenerationMixin.generate`, with three more settings, also read from `generation_config`:

            num_loops (`int` or `torch.LongTensor` of shape `(batch_size,)`): loops per token.
            halting (`str`, `dict` or `True`): rule by which a token stops looping earlier, see `forward`. True is the
                rule in `generation_config.calibrated_halting`, which `looped halting RUN --save` chooses for a model;
                a ValueError says so where there is none. Without `halting` that rule is not used.
            draft_loops (`int`): so many loops draft tokens, and all loops verify them, for a batch of one text; 0 for
                no drafts. See `speculation_looped.py`. `num_assistant_tokens` and `assistant_confidence_threshold` say
                how far a draft goes, as in assisted decoding.

        With `return_dict_in_generate=True` the output of sampling and greedy search also has `loops_used`, a
        (B, new tokens) LongTensor, and with `draft_loops` the fields of `SpeculativeGenerateOutput`.
        """
        call = inspect.signature(super().generate).bind(*args, **kwargs).arguments
        settings = call.pop("kwargs", {})
        speculation = self_speculation(self, call, settings)
        if speculation is not None:
            return super().generate(**{**call, "custom_generate": speculation}, **settings)
        return super().generate(**call, **settings)

    def _sample(self, *args, **kwargs):
        return with_loops_used(super()._sample, *args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        return with_loops_used(super()._assisted_decoding, *args, **kwargs)

    def _prepare_generation_config(self, generation_config, **kwargs):
        """Loop settings are model arguments: a generation config that knows them must not swallow the call's own.

        Raises:
            ValueError: the prompt is to be cut where cuts show (`kv_sharing`), or the halting rule is none.
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
                model_kwargs[name] = value
        halting = calibrated_rule(model_kwargs.pop("halting", None), calibrated)
        rule = halting_rule(halting)  # built once: raises before any work, not per token
        if rule is not None:
            model_kwargs["halting"] = rule
        return generation_config, model_kwargs

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

    def init_continuous_batching(self, generation_config=None, *args, **kwargs):
        """As in transformers. Every request runs `config.num_loops` loops, since the paged cache is sized by them.

        Raises:
            ValueError: the generation config asks for another loop count, or for a halting rule; or tokens depend on
                where prompts are cut (`kv_sharing`).
        """
        if self.model.sharing.rewrites:
            raise ValueError(
                f"{cuts_show(self.config.kv_sharing)}, and continuous batching cuts prompts as its load has it: use "
                "generate, or kv_sharing='per_loop' or 'first'."
            )
        num_loops = asked_count(generation_config, self.generation_config)
        settings = (self.generation_config if generation_config is None else generation_config).to_dict()
        halting = calibrated_rule(settings.get("halting"), settings.get(CALIBRATED))
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
            ValueError: drafts cannot be verified (`kv_sharing`), or a library prepares the calls of this model.
        """
        if self.model.sharing.rewrites:
            raise ValueError(
                f"kv_sharing={self.config.kv_sharing!r} cannot verify drafted tokens: several tokens in one call see "
                "each other at the current loop, so the output would not be that of plain decoding. Use 'per_loop' or "
                "'first'."
            )
        if calls_are_prepared(self):
            raise ValueError(f"drafts of {type(self).__name__}: {CALLS_ARE_PREPARED}: decode without.")
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
            # A call that verifies a draft makes several tokens, all with the same loop count.
            model_kwargs["loops_of_calls"].append(outputs.loops_used[:, -1:].expand(-1, num_new_tokens))
        return super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, num_new_tokens=num_new_tokens, **kwargs
        )


def with_loops_used(decode: Callable, *args, **kwargs):
    """The output of a decoding method of transformers, with the loops of its calls.

    The list `loops_of_calls` is added here, and only `_update_model_kwargs_for_generation` reads it: `generate` would
    refuse it as a keyword that the model, or the library that wraps it, does not have.
    """
    calls = []
    # A model that drafts for itself calls generate again: give the inner call its own list.
    outputs = decode(*args, **kwargs | {"loops_of_calls": calls})
    if type(outputs) is not GenerateDecoderOnlyOutput or any(len(call) != len(outputs.sequences) for call in calls):
        return outputs
    return LoopedGenerateOutput(**outputs, loops_used=torch.cat(calls, dim=1))
