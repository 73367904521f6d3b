"""Requests at work. What computes them is chosen once, by the kind of the model:

    serving_batch.py     a looped model runs one loop of every request at a time (continuous depth batching)
    serving_threads.py   a frozen model keeps the state of its loop in its layers: every request is a thread, and one
                         computes at a time

After every loop a request ends whose client has gone, whose time is over, or whose server is shutting down.
"""

import asyncio
import contextlib
import copy
import logging
import secrets
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from jinja2 import TemplateError
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from modeling_looped import LoopedForCausalLM
from modeling_looped.cache_layers_looped import CACHE_NAME
from modeling_looped.depth_looped import generation_count

from .limits import Limits, option
from .serving_batch import Batch
from .serving_requests import Bounds, Refusal, check_generation_config, short
from .serving_threads import Threads

# Fields of a saved generation config that are dropped: a request says its length itself, and drafts change no text.
NOT_SERVED = ("max_length", "draft_loops", "num_assistant_tokens", "assistant_confidence_threshold")
CUT = "\N{REPLACEMENT CHARACTER}"  # the first bytes of a character decode to it

logger = logging.getLogger("uvicorn.error")


class Worker(Protocol):
    """What computes the requests of a model."""

    def start(self, job: "Job") -> None:
        """Begin to work at a job that has its plan; `job.end` is called when the work ends."""

    def room(self, num_tokens: int) -> int:
        """Tokens that the KV cache of a request of so many has room for."""


@dataclass(frozen=True)
class Plan:
    """The arguments of `generate` for a request, and how its reply ends.

    Args:
        input_ids: (1, T), the prompt.
        new_tokens: most tokens of the reply.
        depth: num_loops and halting, if the request names them.
        end_tokens: ids that end the reply.
        stops: strings that end the reply.
        cache_bytes: bytes of the KV cache when the reply is full.
    """

    input_ids: torch.Tensor
    new_tokens: int
    config: GenerationConfig
    depth: dict
    end_tokens: frozenset[int]
    stops: list[str]
    seed: int
    cache_bytes: int


class Job:
    """One request at work, and `events`, which go from the thread that computes to the event loop.

    An event is a piece of the text; the last event is None, or a Refusal.
    """

    def __init__(self, service: "Service", streams: bool):
        self.service, self.streams = service, streams
        self.deadline = time.monotonic() + service.limits.max_seconds
        self.events, self.event_loop = asyncio.Queue(), asyncio.get_running_loop()
        self.left = False  # whether the client has left
        self.started = False
        self.cache_bytes, self.loops, self.tokens, self.text, self.stopped = 0, 0, [], "", False

    def start(self, plan: Plan) -> None:
        """Begin the work. If this fails, `leave` releases the job."""
        self.plan = plan
        self.service.worker.start(self)
        self.started = True

    def leave(self) -> None:
        """Note that nobody waits for the answer any more; the answer may be there already."""
        self.left = True
        if not self.started:
            self.service.release(self)

    def tell(self, event: str | Refusal | None) -> None:
        """Send an event to the event loop, from the thread that computes."""
        self.event_loop.call_soon_threadsafe(self.events.put_nowait, event)

    def end(self, error: Exception | None = None) -> None:
        """Send the last event, from the thread that computes, and release the job. error: what ends it early."""
        if error is None:
            self.grow(final=True)
        self.event_loop.call_soon_threadsafe(self.service.release, self)
        if error is None or isinstance(error, Refusal):
            self.tell(error)
        elif isinstance(error, ValueError):  # the model refuses its arguments, before it computes
            self.tell(Refusal(str(error)))
        else:
            logger.error("a request failed", exc_info=error)
            self.tell(Refusal("the server failed at this request; its log says why.", status=500))

    def check(self) -> None:
        """Raise Refusal if the client has left, the time of the request is over, or the server is shutting down."""
        now, limits = time.monotonic(), self.service.limits
        if self.left:
            raise Refusal("the client has left.")
        if now > self.service.end:
            raise Refusal("the server is shutting down.", status=503)
        if now > self.deadline:
            raise Refusal(
                f"not finished after {limits.max_seconds} seconds, the server's limit ({option('max_seconds')}): ask "
                "for fewer tokens or loops, or when fewer others ask.",
                status=503,
            )

    def after_token(self, token: int) -> bool:
        """Add a token to the reply; whether a stop string ends it here."""
        self.tokens.append(token)
        if self.streams or self.plan.stops:
            self.grow()
        return self.stopped

    def grow(self, final: bool = False) -> None:
        """Bring `text` up to date: the reply so far, up to a stop string, without a beginning of a stop string.

        final: the reply is complete, so that such a beginning stays.
        """
        text = self.service.tokenizer.decode(self.tokens, skip_special_tokens=True)
        text = text if final else text.rstrip(CUT)
        found = [at for stop in self.plan.stops if (at := text.find(stop)) >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        elif not final:
            text = text[: len(text) - max((begun(text, stop) for stop in self.plan.stops), default=0)]
        if self.streams and len(text) > len(self.text):
            self.tell(text[len(self.text) :])
        self.text = text if final or len(text) > len(self.text) else self.text

    def finish_reason(self) -> str:
        """OpenAI's word for the end of the reply: "stop" or "length"."""
        ended = self.stopped or self.tokens[-1] in self.plan.end_tokens
        return "stop" if ended or len(self.tokens) < self.plan.new_tokens else "length"

    def usage(self) -> dict:
        """Token counts, and `loops`: how often the core, or the window of a frozen model, ran for prompt and reply."""
        prompt, reply = self.plan.input_ids.shape[1], len(self.tokens)
        counts = {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}
        return counts | {"loops": self.loops}


def begun(text: str, stop: str) -> int:
    """How many first characters of `stop`, fewer than all, `text` ends in."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Service:
    """A model, its tokenizer, the limits, and the jobs at work.

    Raises:
        ValueError: the saved generation config has a field that is not served, or exceeds the limits.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, limits: Limits):
        self.model, self.tokenizer, self.name, self.limits = model.eval(), tokenizer, name, limits
        self.jobs, self.freed = set(), asyncio.Event()
        self.end = float("inf")  # of the grace period
        self.created = int(time.time())
        looped = isinstance(model, LoopedForCausalLM)
        most = model.config.max_num_loops if looped else None
        self.bounds = Bounds(
            max_loops=limits.max_loops if most is None else min(most, limits.max_loops),
            max_new_tokens=limits.max_new_tokens,
            vocab_size=model.get_input_embeddings().num_embeddings,
            halts=looped,
            calibrated=model.generation_config.to_dict().get("calibrated_halting"),
        )
        self.positions = positions_of(model)
        self.depth_config = (model if looped else model.loop).config  # has the default loop count
        self.check_own_settings()
        self.nothing = {special: tokenizer("", add_special_tokens=special)["input_ids"] for special in (True, False)}
        self.one_loop, self.further_loop = self.measure_cache()
        try:
            self.worker: Worker = Batch(model, limits.max_rows) if looped else Threads(model)
        except ValueError as error:
            raise ValueError(f"{name} cannot be served as it is: {error}") from error

    def check_own_settings(self) -> None:
        """Drop NOT_SERVED from the saved generation config. Raises ValueError if a request might not say the rest."""
        saved = self.model.generation_config
        for name in NOT_SERVED:
            setattr(saved, name, None)
        said = {name: value for name, value in saved.to_diff_dict().items() if value is not None}
        said["num_loops"] = generation_count(self.depth_config, saved)
        try:
            check_generation_config("the model's generation config", said, self.bounds)
        except Refusal as error:
            raise ValueError(f"{self.name} cannot be served as it is: {error}") from error

    @torch.inference_mode()
    def measure_cache(self) -> tuple[int, int]:
        """KV bytes per token at one loop, and the KV bytes per token that each further loop adds."""

        def measured(num_loops: int) -> int:
            cache = DynamicCache(config=self.model.config)
            one_token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            self.model(one_token, use_cache=True, num_loops=num_loops, **{CACHE_NAME: cache})
            kept = [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
            return sum(layer.keys.nbytes + layer.values.nbytes for layer in kept)

        one = measured(1)
        return one, measured(2) - one if self.bounds.max_loops > 1 else 0

    # ---- the plan of a request

    def plan(self, fields: dict) -> Plan:
        """The plan for the checked fields of a request.

        Raises:
            Refusal: the prompt has no tokens, unknown words or too many tokens, or prompt and reply are too long for
                the model or the limits.
        """
        input_ids = self.encode(fields)
        given, own = fields.get("generation_config"), self.model.generation_config
        config = copy.deepcopy(own) if given is None else GenerationConfig(**given)
        heat, top_p = fields.get("temperature"), fields.get("top_p")
        if heat == 0:
            config.do_sample = False
        elif heat is not None or (top_p is not None and top_p < 1):
            # As in the OpenAI API, the draw is from all tokens, unless a generation config sets top_k.
            config.do_sample, config.top_k = True, (own.top_k or 0) if config.top_k is None else config.top_k
            config.temperature = config.temperature if heat is None else heat
        config.top_p = config.top_p if top_p is None else top_p
        config.max_new_tokens = new_tokens = self.reply_length(len(input_ids), fields)
        config.min_new_tokens = min(config.min_new_tokens or own.min_new_tokens or 0, new_tokens)
        ends = own.eos_token_id if config.eos_token_id is None else config.eos_token_id
        ends = frozenset(ends if isinstance(ends, list) else [ends])
        depth = {name: fields[name] for name in ("num_loops", "halting") if name in fields}
        loops = depth.get("num_loops") or generation_count(self.depth_config, config, own)
        cost = self.worker.room(len(input_ids) + new_tokens) * (self.one_loop + (loops - 1) * self.further_loop)
        if cost > self.limits.max_cache_bytes:
            raise Refusal(
                f"{len(input_ids)} + {new_tokens} tokens at {loops} loops need a KV cache of {cost:,} bytes, more "
                f"than {self.limits.max_cache_bytes:,}, the server's limit ({option('max_cache_bytes')})."
            )
        seed = fields.get("seed", secrets.randbits(63))
        rows = torch.tensor([input_ids], device=self.model.device)
        return Plan(rows, new_tokens, config, depth, ends, fields.get("stop", []), seed, cost)

    def reply_length(self, prompt_length: int, fields: dict) -> int:
        """The most new tokens: from the request, else from the model's generation config, else as many as there is
        room for. Raises Refusal if there is no room for those that the request asks for."""
        asked = fields.get("max_tokens", fields.get("max_completion_tokens"))
        if asked is None:
            asked = fields.get("generation_config", {}).get("max_new_tokens")
        room = self.limits.max_new_tokens
        if self.positions is not None:
            room = min(room, self.positions - prompt_length + 1)  # the last token is not read
        if asked is None:
            return min(self.model.generation_config.max_new_tokens or room, room)
        if asked > room:
            raise Refusal(
                f"a prompt of {prompt_length} tokens leaves room for {room} more in the {self.positions} positions "
                f"that the model has (max_position_embeddings), got max_tokens {asked}.",
                "max_tokens",
            )
        return asked

    def encode(self, fields: dict) -> list[int]:
        """The token ids of the prompt or the messages. Raises Refusal as `plan`."""
        name = "prompt" if "prompt" in fields else "messages"
        if isinstance(fields[name], str):
            ids = self.tokenize(fields[name], name, special=True)
        elif name == "messages":
            ids = self.tokenize(self.render(fields[name]), name, special=False)
        else:
            ids = fields[name]
        most, why = self.limits.max_prompt_tokens, f"the server's limit ({option('max_prompt_tokens')})"
        if self.positions is not None and self.positions < most:
            most, why = self.positions, "the positions that the model has (max_position_embeddings)"
        if len(ids) > most:
            raise Refusal(f"{name} has {len(ids)} tokens, more than {most}, {why}.", name)
        return ids

    def render(self, messages: list[dict]) -> str:
        """The messages as text, by the chat template of the tokenizer. Raises Refusal."""
        if self.tokenizer.chat_template is None:
            raise Refusal("this model's tokenizer has no chat template: send a prompt to /v1/completions.", "messages")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise Refusal(f"the chat template refuses these messages: {error}.", "messages") from error

    def tokenize(self, text: str, name: str, special: bool) -> list[int]:
        """The token ids of a text, with special tokens if `special`.

        Raises Refusal, with the field `name`, for unknown words and for a text without a token.
        """
        tokenizer, unknown = self.tokenizer, []
        try:
            coded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=tokenizer.is_fast)
        except Exception as error:  # `tokenizers` raises plain Exceptions
            words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
            unknown = [word for word in words if tokenizer.backend_tokenizer.token_to_id(word) is None]
            raise Refusal(f"{name} has unknown words {short.repr(unknown)} ({error}).", name) from error
        ids = coded["input_ids"]
        if tokenizer.unk_token_id in ids:
            spans = zip(ids, coded.get("offset_mapping", []), strict=False)
            unknown = [text[first:last] for token, (first, last) in spans if token == tokenizer.unk_token_id]
            raise Refusal(f"{name} has words that the tokenizer does not know: {short.repr(unknown)}.", name)
        if ids == self.nothing[special]:
            raise Refusal(f"{name} is empty: it has no token.", name)
        return ids

    # ---- the jobs at work

    def admit(self, streams: bool) -> "Job":
        """A new job. Raises Refusal if there are too many jobs, or the server is shutting down."""
        if self.end < float("inf"):
            raise Refusal("the server is shutting down.", status=503)
        if len(self.jobs) >= self.limits.max_requests:
            raise Refusal(
                f"{len(self.jobs)} requests are at work or waiting, the server's limit ({option('max_requests')}): "
                "ask again later.",
                status=503,
            )
        job = Job(self, streams)
        self.jobs.add(job)
        return job

    async def reserve(self, job: "Job", cache_bytes: int) -> None:
        """Wait until `cache_bytes` fit beside the caches of the jobs at work; a smaller job may go first."""
        while sum(each.cache_bytes for each in self.jobs) + cache_bytes > self.limits.max_cache_bytes:
            self.freed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(job.deadline, self.end) - time.monotonic()):
                    await self.freed.wait()
            job.check()
        job.cache_bytes = cache_bytes

    def release(self, job: "Job") -> None:
        """Forget a job that has ended, and its cache."""
        self.jobs.discard(job)
        self.freed.set()

    def close(self) -> None:
        """Admit no more requests, and end the requests at work after the grace period."""
        self.end = time.monotonic() + self.limits.grace_seconds
        self.freed.set()


def positions_of(model: PreTrainedModel) -> int | None:
    """The most tokens that a sequence may have; None if positions are not a table."""
    if isinstance(model, LoopedForCausalLM):
        return model.config.max_position_embeddings if model.config.position_embedding == "learned" else None
    # A frozen base model may be of any family; transformers itself looks for this field.
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
