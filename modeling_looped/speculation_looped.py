"""Lossless self-speculation: the first loops draft some tokens, one call of the others verifies all of them.

    until the text ends, with t the newest token:                 # it is in the text, and not yet in the cache
        state_0  = loops 0 .. d-1 of t                            # prelude first; their cached entries stay
        for i = 0, 1, ... while the draft is sure:
            x_i       ~ q_i = processors(head(norm(coda(close(state_i)))))
            state_i+1 = loops 0 .. d-1 of x_i
        p_0 p_1 ... = loops d .. R-1, coda and head of all states in one call
        x_i is kept while rand() < p_i(x_i) / q_i(x_i), or, greedily, while it is argmax p_i
        then one token from (p - q)+ where the draft erred, else from the last p     # argmax p, greedily
        the entries of tokens that were not kept are cropped

Draft and verification are the two halves of one forward pass: nothing of a drafted token is computed twice but the
coda, whose entries the verification writes anew. A round that drafts k tokens runs their first loops one by one and
the other loops once. Plain decoding would run all loops k + 1 times.

Sources: self-speculation that reuses the draft's entries and states, LayerSkip (arXiv 2404.16710); sampling that
leaves the distribution as it is, Leviathan et al. (2211.17192), algorithm 1. Legend: T tokens of the one text, S
tokens of the text so far, D hidden size, V vocabulary, R loops, d of them the draft's.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache_layers_looped import CACHE_NAME, CACHE_NAMES, RewritingLayer, one_cache
from .cache_looped import OWN_KEYS, KeySource
from .calls_looped import CallContext
from .depth_looped import check_loops_of_rows
from .masks_looped import PATTERNS


@dataclass
class SpeculativeGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` plus what speculation did.

    Args:
        loops_used (`torch.LongTensor` of shape `(1, new_tokens)`): loops of each token, `num_loops` for all of them.
        drafted (`torch.LongTensor` of shape `(verifications,)`): tokens that each verification got to see.
        accepted (`torch.LongTensor` of shape `(verifications,)`): how many of them are in the output.
        layer_calls (`int`): layers run after the prompt, each on one or more tokens.
    """

    loops_used: torch.Tensor | None = None
    drafted: torch.Tensor | None = None
    accepted: torch.Tensor | None = None
    layer_calls: int | None = None


@final
@dataclass
class Halfway:
    """T tokens after the loops of the draft.

    Args:
        embeds: (1, T, D), the output of the prelude.
        state: (1, T, D) or (1, T, S, D), after the loops of the draft.
        context: what the layers of the draft were run with.
    """

    embeds: torch.Tensor
    state: torch.Tensor
    context: CallContext


@final
class Halves:
    """The forward pass of a `LoopedForCausalLM` on one text, in two halves that meet after `draft_loops` loops.

    Args:
        model: a LoopedForCausalLM.
        cache: a DynamicCache, equally long in all slots; the first half leaves the slots of the second behind.
        draft_loops: loops of the first half.
        num_loops: loops of both halves.
        attention_mask: (1, S) of the tokens in the cache, or None where none is padding.
        position_ids: (1, S), or its end, of the same.
        generator: seed of the initial state, or None.
    """

    def __init__(self, model, cache, draft_loops, num_loops, attention_mask, position_ids, generator):
        self.model, self.body, self.cache = model, model.model, cache
        self.draft_loops, self.num_loops, self.generator = draft_loops, num_loops, generator
        self.attention_mask, self.position = attention_mask, position_ids[:, -1:]
        self.slots = self.body.sharing.slots
        self.length = int(cache.get_seq_length())  # tokens that both halves have seen, and that are to stay
        self.layer_calls = 0
        cache.activate_past_recording()  # sliding layers keep what a cropped draft had pushed out

    def first(self, token: torch.Tensor, ahead: int) -> Halfway:
        """Run the prelude and the first `draft_loops` loops on one token (1, 1).

        `ahead` counts the drafted tokens before it that are not verified yet.
        """
        body, position_ids = self.body, self.position + 1 + ahead
        body.sharing.open(self.cache, self.num_loops)
        embeds = body.embed(body.embed_tokens(token), position_ids)
        whole = self.context(embeds, position_ids, self.length + ahead + 1, OWN_KEYS, loop=0)
        embeds = self.run(body.prelude, embeds, whole)
        start = body.start(embeds, position_ids, self.generator, body.training)
        context = whole.with_keys(body.sharing.key_source())
        state = self.loop(body.connection.open(start, embeds), embeds, context, range(self.draft_loops))
        return Halfway(embeds, state, context)

    def draft(self, part: Halfway) -> torch.Tensor:
        """(1, 1, V) logits of a token that has seen the first half alone."""
        return self.readout(part.state, part.context)

    def second(self, parts: Sequence[Halfway]) -> torch.Tensor:
        """Run the other loops on T successive tokens: (1, T, V) logits. All slots are equally long afterwards."""
        self.rewind()
        embeds = torch.cat([part.embeds for part in parts], dim=1)
        state = torch.cat([part.state for part in parts], dim=1)
        position_ids = torch.cat([part.context.position_ids for part in parts], dim=1)
        first, *later = (part.context.key_source for part in parts)
        length = self.length + len(parts)
        context = self.context(embeds, position_ids, length, first.join(later), loop=self.draft_loops)
        state = self.loop(state, embeds, context, range(self.draft_loops, self.num_loops))
        logits = self.readout(state, context)
        self.body.sharing.close(self.cache, self.num_loops, len(parts))
        return logits

    def rewind(self) -> None:
        """Crop the slots that the second half writes to the tokens that it has seen.

        The slots of the coda hold entries of the draft.
        """
        coda = [self.slots.slot("coda", layer) for layer in range(self.slots.num_coda_layers)]
        core = range(self.slots.slot("core", 0, self.draft_loops), self.slots.count(self.num_loops))
        for slot in (*coda, *core):
            layer = self.cache.layers[slot]
            layer.crop(self.length - int(layer.get_seq_length()))
            if isinstance(layer, RewritingLayer):
                layer.open_step()

    def keep(self, num_kept: int, num_tokens: int) -> None:
        """Of the `num_tokens` tokens that the second half saw last, the first `num_kept` stay."""
        for layer in self.cache.layers:
            layer.crop(num_kept - num_tokens)
        self.length += num_kept
        self.position = self.position + num_kept

    def context(self, embeds, position_ids, length: int, key_source: KeySource, loop: int) -> CallContext:
        """The context of the last tokens of the first `length`, for slots as long as those of core loop `loop`."""
        mask = self.attention_mask
        if mask is not None:
            mask = F.pad(mask, (0, length - mask.shape[1]), value=1)
        slot = self.slots.slot("core", 0, loop)
        causal_mask = self.model.model.pattern.mask(
            self.model.config, embeds, mask, self.cache, position_ids, slot=slot
        )
        angles = self.body.positions(embeds, position_ids)
        return CallContext(causal_mask, angles, position_ids, self.cache, key_source, self.num_loops)

    def loop(self, state, embeds, context: CallContext, loops: range) -> torch.Tensor:
        """The state (1, T, ...) after these loops."""
        for loop in loops:
            self.layer_calls += len(self.body.core)
            state = self.body.run_loop(state, embeds, context, loop)
        return state

    def run(self, layers, hidden_states: torch.Tensor, context: CallContext) -> torch.Tensor:
        """Prelude or coda: (1, T, D) -> (1, T, D)."""
        self.layer_calls += len(layers)
        return self.body.run_section(layers, hidden_states, context)

    def readout(self, state: torch.Tensor, context: CallContext) -> torch.Tensor:
        """The state (1, T, ...) after the last loop that runs -> logits (1, T, V) in float32."""
        hidden_states = self.body.coda_norm(self.body.connection.close(state))
        hidden_states = self.run(self.body.coda, hidden_states, context.with_keys(OWN_KEYS))
        return self.model.readout(hidden_states).float()


class Text:
    """The text being generated, and what generate() gave us to process each new token.

    Args:
        ids: (1, S) prompt.
        choice: how tokens are chosen.
        logits_processor, stopping_criteria, streamer: those of generate().
        keeps_scores, keeps_logits: whether to record the processed scores and the logits, (1, V) per new token.
    """

    def __init__(self, ids, choice, logits_processor, stopping_criteria, streamer, keeps_scores, keeps_logits):
        self.ids, self.choice = ids, choice
        self.logits_processor, self.stopping_criteria, self.streamer = logits_processor, stopping_criteria, streamer
        self.scores = () if keeps_scores else None
        self.logits = () if keeps_logits else None
        self.stopped = False

    @property
    def length(self) -> int:
        """Tokens of the text so far, the prompt included."""
        return self.ids.shape[1]

    def recorded(self) -> dict:
        """The fields of a generate output that hold the text."""
        return {"sequences": self.ids, "scores": self.scores, "logits": self.logits}

    def process(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What the choice is made from after `ids` (1, S): (1, V) -> (1, V) in float32."""
        return self.logits_processor(ids, logits.to(copy=True, dtype=torch.float32, device=ids.device))

    def add(self, logits: torch.Tensor, draft: "Draft | None" = None) -> bool:
        """Choose and add one token from the (1, V) logits of the whole model; whether it is the drafted one."""
        scores = self.process(self.ids, logits)
        token, accepted = self.choice.settle(scores, draft)
        self.ids = torch.cat([self.ids, token], dim=1)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits.float(),)
        if self.streamer is not None:
            self.streamer.put(token[0].cpu())
        self.stopped = bool(self.stopping_criteria(self.ids, self.scores).all())
        return accepted


@dataclass
class Draft:
    """A drafted token (1, 1), and the (1, V) probabilities that the draft gave to all tokens."""

    token: torch.Tensor
    probabilities: torch.Tensor

    @property
    def confidence(self) -> float:
        """The probability that the draft gave to the token."""
        return float(self.probabilities[0, self.token[0, 0]])


class Choice(ABC):
    """How a token is chosen from scores."""

    @abstractmethod
    def draft(self, scores: torch.Tensor) -> Draft:
        """(1, V) processed scores of the draft -> the token it proposes."""

    @abstractmethod
    def settle(self, scores: torch.Tensor, draft: Draft | None) -> tuple[torch.Tensor, bool]:
        """(1, V) processed scores of the whole model -> the token (1, 1), and whether it is the drafted one."""


@final
class Greedy(Choice):
    """The likeliest token."""

    def draft(self, scores):
        return Draft(scores.argmax(dim=-1, keepdim=True), scores.softmax(dim=-1))

    def settle(self, scores, draft):
        token = scores.argmax(dim=-1, keepdim=True)
        return token, draft is not None and bool(token == draft.token)


@final
class Sampling(Choice):
    """A token of the whole model's distribution p, whatever the draft's q (arXiv 2211.17192, algorithm 1)."""

    def draft(self, scores):
        q = scores.softmax(dim=-1)
        return Draft(torch.multinomial(q, num_samples=1), q)

    def settle(self, scores, draft):
        p = scores.softmax(dim=-1)
        if draft is None:
            return torch.multinomial(p, num_samples=1), False
        q, place = draft.probabilities, (0, draft.token[0, 0])
        if torch.bernoulli((p[place] / q[place]).clamp_max(1)):
            return draft.token, True
        rest = (p - q).clamp_min(0)
        # Where rounding left nothing p and q are the same.
        return torch.multinomial(rest if rest.any() else p, num_samples=1), False


class SelfSpeculation:
    """A decoding method for `generate(custom_generate=...)`; `LoopedForCausalLM.generate(draft_loops=...)` makes it.

    Args:
        draft_loops: loops of the draft, d.
        streamer: as in `generate`.
    """

    def __init__(self, draft_loops: int, streamer=None):
        self.draft_loops, self.streamer = draft_loops, streamer

    def __call__(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    ) -> SpeculativeGenerateOutput | torch.Tensor:
        """(1, S) ids and what else a decoding method gets of `generate` -> what `generate` returns.

        Raises:
            ValueError: a setting that speculation cannot honour, before anything is run.
        """
        num_loops = self.check(model, input_ids, generation_config, model_kwargs)
        cache, attention_mask = model_kwargs[CACHE_NAME], model_kwargs.get("attention_mask")
        text = Text(
            input_ids,
            Sampling() if generation_config.do_sample else Greedy(),
            logits_processor,
            stopping_criteria,
            self.streamer,
            keeps_scores=generation_config.return_dict_in_generate and generation_config.output_scores,
            keeps_logits=generation_config.return_dict_in_generate and generation_config.output_logits,
        )
        text.add(prefill(model, input_ids, num_loops, generation_config.prefill_chunk_size, model_kwargs))
        halves = Halves(
            model,
            cache,
            self.draft_loops,
            num_loops,
            attention_mask,
            model_kwargs["position_ids"],
            model_kwargs.get("generator"),
        )
        drafted, accepted = [], []
        while not text.stopped:
            parts, drafts = self.propose(halves, text, generation_config)
            logits, before, kept = halves.second(parts), text.length, 0
            while not text.stopped and text.add(logits[:, kept], drafts[kept] if kept < len(drafts) else None):
                kept += 1
            halves.keep(text.length - before, len(parts))  # the newest token is never in the cache
            drafted.append(len(drafts))
            accepted.append(kept)
        if self.streamer is not None:
            self.streamer.end()
        if not generation_config.return_dict_in_generate:
            return text.ids
        new_tokens = text.length - input_ids.shape[1]
        return SpeculativeGenerateOutput(
            **text.recorded(),
            **{CACHE_NAME: cache},
            loops_used=torch.full((1, new_tokens), num_loops, device=text.ids.device),
            drafted=torch.tensor(drafted),
            accepted=torch.tensor(accepted),
            layer_calls=halves.layer_calls,
        )

    def propose(self, halves: Halves, text: Text, generation_config) -> tuple[list[Halfway], list[Draft]]:
        """Draft k tokens after the newest one.

        There are at most `num_assistant_tokens` of them. A draft ends with the first token of which it is less sure
        than `assistant_confidence_threshold`, or which ends the text.

        Returns:
            The newest token and the k drafted ones halfway, k + 1 in all; and the k drafts.
        """
        ids, drafts, parts = text.ids, [], [halves.first(text.ids[:, -1:], ahead=0)]
        ends = generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        most = min(generation_config.num_assistant_tokens, generation_config.max_length - text.length - 1)
        while len(drafts) < most:
            draft = text.choice.draft(text.process(ids, halves.draft(parts[-1])[:, -1]))
            ids = torch.cat([ids, draft.token], dim=1)
            drafts.append(draft)
            parts.append(halves.first(draft.token, ahead=len(drafts)))
            # After the token is drawn: one that is drafted only if it is likely would not be a draw from q.
            if draft.confidence < generation_config.assistant_confidence_threshold or int(draft.token) in ends:
                break
        return parts, drafts

    def check(self, model, input_ids, settings, model_kwargs) -> int:
        """The loops of a verification.

        Raises:
            ValueError: speculation cannot do what was asked for.
        """
        config, sharing = model.config, model.config.kv_sharing
        num_loops = model_kwargs.get("num_loops")
        num_loops = check_loops_of_rows(config.num_loops if num_loops is None else num_loops, input_ids.shape[0])
        cache = model_kwargs.get(CACHE_NAME)
        refusals = [
            (settings.num_beams != 1, f"num_beams={settings.num_beams} follows several texts: use num_beams=1"),
            (
                model.model.sharing.rewrites,
                f"kv_sharing={sharing!r} cannot verify drafted tokens: in one call they see other entries than "
                "in successive calls, so the output would not be that of plain decoding. Use 'per_loop' or "
                "'first'",
            ),
            (
                sharing == "natural" and config.sliding_window is not None,
                f"kv_sharing='natural' reads the entries of all drafted tokens from the newest, which sliding_window="
                f"{config.sliding_window} does not show it: use prompt_lookup_num_tokens",
            ),
            (
                input_ids.shape[0] != 1,
                f"it decodes one row, got {input_ids.shape[0]} (num_return_sequences counts): rows accept different "
                "numbers of tokens. Call generate row by row",
            ),
            (PATTERNS[config.attention_pattern].tells_prompts, NO_DRAFTS),
            (calls_are_prepared(model), CALLS_ARE_PREPARED),
            ("halting" in model_kwargs, NO_DRAFTS_THAT_HALT),
            (
                bool(settings.prompt_lookup_num_tokens or settings.assistant_early_exit),
                "prompt_lookup_num_tokens and assistant_early_exit draft as well: use one of them",
            ),
            (settings.guidance_scale not in (None, 1), "guidance_scale runs the model twice per token: leave it out"),
            (
                settings.num_assistant_tokens_schedule != "constant",
                f"num_assistant_tokens_schedule={settings.num_assistant_tokens_schedule!r} is not known here: use "
                "'constant', and assistant_confidence_threshold, which ends a draft that is unsure",
            ),
            (
                bool(settings.output_hidden_states or settings.output_attentions),
                "a token passes the layers in two halves, which are not recorded: leave output_hidden_states and "
                "output_attentions out",
            ),
            (
                not isinstance(cache, DynamicCache) or cache.offloading,
                f"it crops what was not accepted, from a DynamicCache that is not offloaded, got "
                f"{type(cache).__name__}: use that",
            ),
        ]
        for holds, reason in refusals:
            if holds:
                raise ValueError(f"draft_loops={self.draft_loops}: {reason}, or leave draft_loops out.")
        num_loops = int(num_loops)  # of the one text
        if not 1 <= self.draft_loops < num_loops:
            raise ValueError(
                f"draft_loops={self.draft_loops} must be in 1 .. num_loops - 1 = {num_loops - 1}: the draft is made "
                "by fewer loops than the text. Ask for fewer, or for 0 to decode without a draft."
            )
        return num_loops


NO_DRAFTS = (
    "attention_pattern='prefix' tells the prompt from what follows it, and drafted tokens come into one call with it"
)
NO_DRAFTS_THAT_HALT = "halting ends loops early, and verification needs all: use one of the two"
CALLS_ARE_PREPARED = (
    "a library prepares each call of this model, as PEFT does for its prompt methods, and what it adds would be missed"
)


def calls_are_prepared(model) -> bool:
    """Whether a library has put a method of its own on the model, which adds to what each call of it is given."""
    return "prepare_inputs_for_generation" in vars(model)


def prefill(model, input_ids, num_loops, chunk_size, model_kwargs) -> torch.Tensor:
    """(1, V) logits after the prompt, all loops; of a prompt that is partly in the cache, the rest is run."""
    cache, mask = model_kwargs[CACHE_NAME], model_kwargs.get("attention_mask")
    positions, embeds = model_kwargs["position_ids"], model_kwargs.get("inputs_embeds")
    name, prompt = ("input_ids", input_ids) if embeds is None else ("inputs_embeds", embeds)
    past = int(cache.get_seq_length())
    # Either all tokens are given or only the new ones; positions are those of all tokens.
    if embeds is not None or positions.shape[1] == prompt.shape[1]:
        prompt = prompt[:, past:]
    if prompt.shape[1] == 0:
        raise ValueError(
            f"nothing is left of the prompt, whose {positions.shape[1]} tokens are not more than the {past} in the "
            "cache: give the whole text, or the new tokens with an attention_mask of all of them."
        )
    outputs = None
    for piece in prompt.split(chunk_size or prompt.shape[1], dim=1):
        end = int(cache.get_seq_length()) + piece.shape[1]
        outputs = model(
            **{name: piece},
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=positions[:, end - piece.shape[1] : end],
            past_key_values=cache,
            use_cache=True,
            num_loops=num_loops,
            logits_to_keep=1,
            generator=model_kwargs.get("generator"),
        )
    return outputs.logits[:, -1]


def self_speculation(model, draft_loops: int | None, call: dict, settings: dict) -> SelfSpeculation | None:
    """The decoding method that a call of `generate` asks for, or None.

    Args:
        draft_loops: of the call; where it is None, the generation config of the call decides, then that of the model.
        call: the other arguments of `generate` that are named as in transformers.
        settings: what else it was called with.

    Raises:
        ValueError: it asks for another way of decoding as well.
    """
    configs = [call.get("generation_config"), model.generation_config]
    stored = [config.to_dict().get("draft_loops") for config in configs if config is not None]
    draft_loops = next((value for value in (draft_loops, *stored) if value is not None), None)
    if draft_loops is None:
        return None
    if isinstance(draft_loops, bool) or not isinstance(draft_loops, int):
        raise ValueError(f"draft_loops must be an int: loops of the draft, or 0 for none, got {draft_loops!r}.")
    if draft_loops == 0:
        return None
    for other in ("custom_generate", "assistant_model", "synced_gpus"):
        if call.get(other):
            raise ValueError(f"draft_loops={draft_loops} is a decoding method of its own: leave {other} out.")
    cache = one_cache(*(settings.get(name) for name in CACHE_NAMES))
    if settings.get("position_ids") is not None and cache is not None and cache.get_seq_length():
        raise ValueError(
            f"draft_loops={draft_loops} counts positions itself after tokens of a cache: leave position_ids out."
        )
    return SelfSpeculation(draft_loops, call.get("streamer"))
