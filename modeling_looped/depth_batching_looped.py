"""Continuous depth batching: requests of different depth run together, and one that halts makes room at once.

    batch = model.depth_batching(max_rows=64)
    batch.add([5, 3, 8], num_loops=12, max_new_tokens=20)     # at any time, from any thread
    for request, token in batch.stream():                     # token is None when the reply has ended
        ...

What is scheduled is one loop of one request. A step runs one loop of every request that is at work, whichever loop
that is: a token that halts is read out, and in the next step the next token of the request enters at loop 0, or the
next request does. A batch of fixed rows would wait for the deepest of them (arXiv 2608.09444).

With `draft_loops` a request does not wait for its own token either: when a token has run so many loops, the head
guesses the next one, which enters at loop 0 while the token before it loops on. If the guess changes, what followed
from it begins anew: a wavefront of tokens (arXiv 2510.14961). A token always loops behind the one before it, so that
it reads the entries that it would read otherwise, and the reply is the same.

Every request computes what `generate` computes for it alone, to float rounding, since matrix products of another
number of rows may add in another order. Tokens that halt early leave in the cache what `cache_looped.py` says.

Legend: N cells (see `pages_looped.py`), T tokens of a request that loop now, b requests, D hidden size, V vocabulary.
"""

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from .calls_looped import Decision
from .checks_looped import check_loops
from .depth_looped import generation_count
from .halting_looped import RULES
from .pages_looped import SHORT, CellAttention, Pages, Pool, Reads, Sight, Span, fill, write
from .speculation_looped import CALLS_ARE_PREPARED, calls_are_prepared

MOST_PREPARED = 64  # settings that are kept
OnToken = Callable[[int], bool | None]

# Settings of a generation config that decode otherwise than token by token, or need more than a request has.
NOT_BATCHED = ("stop_strings", "max_time", "guidance_scale", "prefill_chunk_size", "compile_config")


@final
class Request:
    """A prompt with settings of its own, and its reply as far as it is written.

    Attributes:
        input_ids: the prompt.
        num_loops: loops per token, or with a halting rule the most of them.
        draft_loops: loops after which the next token enters on a guess; None for after all.
        tokens: the reply.
        loops_used: of every token of the reply, the loops of the call that made it.
        loops: all loops that were run for it, those of the prompt counted.
        ended: why the reply has ended: "stop" (an end token, or `on_token` said so), "length", "cancelled" or "error";
            None before.
        error: what went wrong in this request, or None.
    """

    def __init__(
        self,
        input_ids: list[int],
        num_loops: int,
        draft_loops: int | None,
        decision: Decision | None,
        choose: "Choice",
        leaving: deque,
    ):
        self.input_ids, self.choose = input_ids, choose
        self.num_loops, self.draft_loops, self.decision = num_loops, draft_loops, decision
        self.leaving = leaving
        self.tokens: list[int] = []
        self.loops_used: list[int] = []
        self.loops = 0
        self.ended: Literal["stop", "length", "cancelled", "error"] | None = None
        self.error: Exception | None = None

    def cancel(self) -> None:
        """End it before the next loop, from any thread."""
        self.leaving.append(self)


@final
@dataclass(frozen=True)
class Choice:
    """How the next token of a request is chosen, and when it is the last.

    Args:
        max_new_tokens: most tokens of the reply.
        end_tokens: ids that end it.
        processors: change the scores of a token.
        do_sample: draw it; otherwise it is the likeliest.
        generator: what to draw from; None for torch's own.
        on_token: is given every token as soon as it is chosen; True ends the reply.
    """

    max_new_tokens: int
    end_tokens: frozenset[int]
    processors: LogitsProcessorList
    do_sample: bool
    generator: torch.Generator | None
    on_token: OnToken | None

    @property
    def is_plain(self) -> bool:
        """Whether it is the likeliest token, whatever came before."""
        return not self.do_sample and not self.processors

    def token(self, text: list[int], logits: torch.Tensor) -> int:
        """The token after `text`, of its logits (1, V) in float32."""
        ids = torch.tensor([text], device=logits.device)
        scores = self.processors(ids, logits)  # pyright: ignore[reportArgumentType]
        if self.do_sample:
            return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
        return int(scores.argmax(-1))

    def ends(self, tokens: list[int]) -> Literal["stop", "length"] | None:
        """Whether and why a reply ends here. Raises what `on_token` raises."""
        stops = self.on_token is not None and bool(self.on_token(tokens[-1]))
        if stops or tokens[-1] in self.end_tokens:
            return "stop"
        return "length" if len(tokens) == self.max_new_tokens else None


@final
@dataclass(frozen=True)
class Prepared:
    """Settings as `generate` prepares them, before the length of the prompt is known.

    Args:
        told: what they were prepared from. It is kept, since an object in it, such as a rule, is known by its address.
        num_loops: of requests that do not say how many.
        no_max_length, no_min_length: nobody has said one.
        is_plain: no processor changes the scores, whatever the prompt.
    """

    told: tuple
    config: GenerationConfig
    num_loops: int
    decision: Decision | None
    no_max_length: bool
    no_min_length: bool
    is_plain: bool


@final
class Row:
    """A request at work: its tokens that loop now.

    Args:
        chunk: most tokens that loop together; None for any number.
        core, outer: its pages, of the core, and of prelude and coda.
    """

    def __init__(self, request: Request, chunk: int | None, core: Pages, outer: Pages):
        self.request, self.chunk, self.core, self.outer = request, chunk, core, outer
        self.waiting = request.input_ids  # tokens that have not looped yet
        self.memory: torch.Tensor | None = None  # of the halting rule
        self.start = self.length = self.loop = 0
        self.guess: int | None = None  # the token after these, as far as these have looped
        self.next: Row | None = None  # loops on that guess

    def begin(self) -> list[int]:
        """The tokens that loop next, after all that have."""
        self.start += self.length
        tokens = self.waiting[: self.chunk]
        self.waiting = self.waiting[len(tokens) :]
        self.length, self.loop, self.memory, self.guess, self.next = len(tokens), 0, None, None, None
        for pages in (self.core, self.outer):
            pages.make_room(self.start + self.length)
        return tokens

    @property
    def is_read(self) -> bool:
        """Whether a token follows those that loop now; then the halting rule reads the last of them."""
        return not self.waiting

    @property
    def decision(self) -> Decision | None:
        """The halting rule of these tokens."""
        return self.request.decision if self.is_read else None

    def followers(self) -> "set[Row]":
        """The rows that loop on its guess, and on theirs."""
        found, row = set(), self.next
        while row is not None:
            found.add(row)
            row = row.next
        return found

    def follower(self) -> "Row":
        """A row of the same request and pages, for the token that is guessed to come after these."""
        row = Row(self.request, self.chunk, self.core, self.outer)
        assert self.guess is not None
        row.waiting, row.start = [self.guess], self.start + self.length
        return row

    def release(self) -> None:
        """Give its pages back."""
        self.core.release()
        self.outer.release()


@final
@dataclass
class Cells:
    """Everything that belongs to the cells, in the order of their rows.

    Args:
        state: (N, 1, D) or (N, 1, streams, D).
        embeds: (N, 1, D), the output of the prelude.
        position_ids: (N, 1).
        angles: cosines and sines of the rotary angles, (N, 1, d) each; or None.
        num_loops: (N,), of their requests.
        carried: of each layer, what the KV policy carries from loop to loop, (N, ...); None before the first loop.
    """

    state: torch.Tensor
    embeds: torch.Tensor
    position_ids: torch.Tensor
    angles: tuple[torch.Tensor, torch.Tensor] | None
    num_loops: torch.Tensor
    carried: list[torch.Tensor | None]

    def join(self, later: "Cells") -> "Cells":
        """These and then those that have not looped yet."""
        angles = None
        if self.angles is not None and later.angles is not None:
            angles = torch.cat([self.angles[0], later.angles[0]]), torch.cat([self.angles[1], later.angles[1]])
        names = ("state", "embeds", "position_ids", "num_loops")
        both = {name: torch.cat([getattr(self, name), getattr(later, name)]) for name in names}
        return Cells(angles=angles, carried=self.carried, **both)

    def keep(self, cells: torch.Tensor) -> "Cells":
        """Some of them."""
        return Cells(
            self.state[cells],
            self.embeds[cells],
            self.position_ids[cells],
            None if self.angles is None else (self.angles[0][cells], self.angles[1][cells]),
            self.num_loops[cells],
            [None if values is None else values[cells] for values in self.carried],
        )


class CellKeys:
    """What a KV policy does with cells at different loops. This is `per_loop` and `last`.

    Attributes:
        own_apart: a token reads its own current entry, which no page holds.
        averages: a token leaves the mean of the entries of the loops that it ran.
    """

    own_apart = False
    averages = False

    def run_layer(self, layer, x, carried, old: int, loops: torch.Tensor, **kwargs):
        """(N, 1, D) -> (N, 1, D), and what the policy carries.

        Args:
            carried: of the first `old` cells; the others are in their first loop.
            loops: (N, 1, 1), the loops of the cells, counted from 0.
        """
        return layer(x, **kwargs), None


@final
class FirstCells(CellKeys):
    """Carries what the layer ran on in loop 0."""

    def run_layer(self, layer, x, carried, old, loops, **kwargs):
        carried = joined(carried, x, old)
        return layer(x, carried, **kwargs), carried


@final
class GatedCells(CellKeys):
    """Carries the latent. In loop 0 it is what the layer runs on, and a gate between equals changes nothing."""

    def run_layer(self, layer, x, carried, old, loops, **kwargs):
        latent = joined(carried, layer.input_layernorm(x), old)
        return layer(x, latent, loops, **kwargs)


@final
class MeanCells(CellKeys):
    """Carries the sum of the entries so far."""

    averages = True

    def run_layer(self, layer, x, carried, old, loops, *, attention, **kwargs):
        x = layer(x, attention=attention, **kwargs)
        entries = attention.entries
        return x, joined(None if carried is None else carried + entries[:old], entries, old)


@final
class NaturalCells(CellKeys):
    """Only loop 0 writes; the entry of the present loop is read from the layer itself."""

    own_apart = True

    def run_layer(self, layer, x, carried, old, loops, **kwargs):
        return layer(x, **kwargs)[0], None


CELL_KEYS: dict[str, type[CellKeys]] = {
    "per_loop": CellKeys,
    "last": CellKeys,
    "first": FirstCells,
    "gated": GatedCells,
    "mean": MeanCells,
    "natural": NaturalCells,
}


def joined(old_values: torch.Tensor | None, values: torch.Tensor, old: int) -> torch.Tensor:
    """What the first `old` cells carry, then the values (N, ...) of the others."""
    return values if old_values is None else torch.cat([old_values, values[old:]])


@final
class DepthBatching:
    """Requests of a model at work together, see the head of this file. One thread makes the steps.

    Args:
        model: a LoopedForCausalLM in evaluation mode.
        max_rows: most requests at work; the others wait. It bounds the memory.

    Raises:
        ValueError: the model cannot be run so.
    """

    def __init__(self, model, max_rows: int = 64):
        config = model.config
        if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
            raise ValueError(f"max_rows must be an int >= 1, got {max_rows!r}.")
        check_can_batch(model)
        self.model, self.max_rows = model, max_rows
        self.body: Any = model.model
        self.device = model.device  # a model looks at its parameters to say it
        self.keys = CELL_KEYS[config.kv_sharing]()
        self.page_per_loop = model.model.sharing.slot_per_loop
        self.writes_once = self.keys.own_apart
        body = self.body
        self.loops_differ = (
            config.loops_have_parameters or config.loop_embedding != "none" or body.connection.tells_loops
        )
        self.outer_layers = len(body.prelude) + len(body.coda)
        layers = len(body.core), self.outer_layers
        self.pools = [[Pool(count, capacity) for capacity in SHORT] for count in layers]
        self.decisions: dict[Any, Decision] = {}
        self.prepared: dict[str, Prepared] = {}
        self.queue: deque[Request] = deque()  # not at work yet
        self.leaving: deque[Request] = deque()  # cancelled since the last step
        self.ready: list[Row] = []  # whose next tokens enter at loop 0
        self.looping: list[Row] = []  # the deepest loop first
        self.cells: Cells | None = None  # of those that loop

    # ---- requests

    def add(
        self,
        input_ids: Sequence[int] | torch.Tensor,
        generation_config: GenerationConfig | None = None,
        *,
        num_loops: int | None = None,
        halting=None,
        draft_loops: int | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        generator: torch.Generator | None = None,
        on_token: OnToken | None = None,
        **settings,
    ) -> Request:
        """A new request, which waits for the next step with a free row. Settings are those of `generate`.

        Args:
            input_ids: (T,) or (1, T) tokens of the prompt, without padding.
            generation_config: settings that the call does not have itself; the model's by default.
            num_loops: loops per token, an int >= 1.
            halting: rule by which a token stops looping earlier; True is the calibrated one.
            draft_loops: after so many loops of a token the next one enters on a guess, which is taken back if it was
                wrong: the same reply in fewer steps. Steps of a few tokens cost little more than those of one where
                few requests are at work.
            logits_processor: changes the scores, as in `generate`.
            generator: what sampled tokens are drawn from: seeded, they are those that `generate` draws after
                `torch.manual_seed`.
            on_token: called with every token, in the thread that makes the steps; True ends the reply.
            **settings: settings of a generation config: `max_new_tokens`, `eos_token_id`, `do_sample`, ...

        Raises:
            ValueError: a setting has the wrong value, or none of these names; the prompt has no token or an unknown
                one, or prompt and reply have no room in a table of positions.
        """
        model, config = self.model, self.model.config
        ids = check_prompt(input_ids, config.vocab_size)
        prepared = self._prepare(generation_config, settings | {"halting": halting})
        num_loops = self._checked_loops(prepared.num_loops if num_loops is None else num_loops)
        settings = model._prepare_generated_length(
            generation_config=copy.copy(prepared.config),
            has_default_max_length=prepared.no_max_length,
            has_default_min_length=prepared.no_min_length,
            model_input_name="input_ids",
            input_ids_length=len(ids),
            inputs_tensor=None,
        )
        new_tokens = settings.max_length - len(ids)
        if new_tokens < 1:
            raise ValueError(f"max_length={settings.max_length} leaves no token after a prompt of {len(ids)}.")
        if config.position_embedding == "learned" and len(ids) + new_tokens - 1 > config.max_position_embeddings:
            raise ValueError(
                f"{len(ids)} + {new_tokens} tokens are beyond max_position_embeddings="
                f"{config.max_position_embeddings}, the size of the learned position table: ask for fewer."
            )
        processors = LogitsProcessorList(logits_processor or [])
        if not prepared.is_plain:
            processors = self._processors(settings, ids, processors)
        ends = settings._eos_token_tensor
        choice = Choice(
            max_new_tokens=new_tokens,
            end_tokens=frozenset([] if ends is None else ends.tolist()),
            processors=processors,
            do_sample=bool(settings.do_sample),
            generator=generator,
            on_token=on_token,
        )
        if draft_loops is not None:
            check_drafts(model, draft_loops, prepared.decision, choice)
        request = Request(ids, num_loops, draft_loops, prepared.decision, choice, self.leaving)
        self.queue.append(request)
        return request

    def _prepare(self, generation_config: GenerationConfig | None, asked: dict) -> "Prepared":
        """The settings of a request. `generate` copies four generation configs per call: that is a third of the time
        of a request with one new token, so that settings which were seen before are not prepared anew."""
        model, own = self.model, self.model.generation_config
        given = None if generation_config is None else dict(vars(generation_config))
        told = asked, given, dict(vars(own)), generation_count(model.config, generation_config, own)
        known = repr(told)
        prepared = self.prepared.get(known)  # asked once: another thread may clear them
        if prepared is None:
            if len(self.prepared) >= MOST_PREPARED:
                self.prepared.clear()
                self.decisions.clear()
            lengths = [own] if generation_config is None else [own, generation_config]
            absent = {
                name: asked.get(name) is None and all(getattr(each, name) is None for each in lengths)
                for name in ("max_length", "min_length")
            }
            settings, rest = model._prepare_generation_config(generation_config, **asked)
            num_loops, rule = rest.pop("num_loops"), rest.pop("halting", None)
            check_settings(settings, rest)
            model._prepare_special_tokens(settings, True, device=self.device, batch_size=1)
            self.prepared[known] = prepared = Prepared(
                told=told,
                config=settings,
                num_loops=num_loops,
                decision=None if rule is None else self._decision(rule),
                no_max_length=absent["max_length"],
                no_min_length=absent["min_length"],
                is_plain=not self._processors(settings, [0], LogitsProcessorList()),
            )
        return prepared

    def _checked_loops(self, num_loops) -> int:
        """The loop count of a request; ValueError for one that it cannot have."""
        num_loops = check_loops(num_loops, 1, self.model.config.max_num_loops)
        if isinstance(num_loops, torch.Tensor):
            raise ValueError(f"num_loops must be one int for a request, got a tensor {num_loops.tolist()}.")
        return num_loops

    def _processors(
        self, settings: GenerationConfig, ids: Sequence[int], given: LogitsProcessorList
    ) -> LogitsProcessorList:
        """What changes the scores of tokens after a prompt, with what the request brings."""
        prompt = torch.tensor([ids], device=self.device)
        return self.model._get_logits_processor(
            generation_config=settings,
            input_ids_seq_length=len(ids),
            encoder_input_ids=prompt,
            prefix_allowed_tokens_fn=None,
            logits_processor=given,
            device=self.device,
            model_kwargs={"attention_mask": torch.ones_like(prompt)},
        )

    def _decision(self, rule) -> Decision:
        """A rule and what it reads. Requests with equal rules share one, so that it looks at them together."""
        known = (type(rule), *sorted(vars(rule).items())) if type(rule) in RULES.values() else id(rule)
        new = Decision(rule, head=self.model.readout, gate=self.body.exit_readout, positions=1)
        return self.decisions.setdefault(known, new)  # in one go, since another thread may clear them

    @property
    def is_busy(self) -> bool:
        """Whether a request is at work or waits."""
        return bool(self.queue or self.ready or self.looping)

    def stream(self) -> Iterator[tuple[Request, int | None]]:
        """Make steps until no request is left, and yield what `step` returns."""
        while self.is_busy:
            yield from self.step()

    # ---- steps

    @torch.no_grad()
    def step(self) -> list[tuple[Request, int | None]]:
        """Run one loop of every request at work.

        Returns:
            The tokens that were chosen, with their requests; and with None the requests that have ended.

        Raises:
            Exception: the model failed. All requests at work end with this error, and those that wait go on waiting.
        """
        try:
            told = self._drop_cancelled()
            self._begin()
            if self.looping:
                self._run_loop()
                self._draft()
                told += self._read_out(self._halted())
            if not self.is_busy:
                for pool in itertools.chain(*self.pools):
                    pool.clear()
            return told
        except Exception as error:
            for row in (*self.looping, *self.ready):
                self._end(row, "error", error)
            self.looping, self.ready, self.cells = [], [], None
            raise

    def _drop_cancelled(self) -> list[tuple[Request, int | None]]:
        told: list[tuple[Request, int | None]] = []
        while self.leaving:
            request = self.leaving.popleft()
            if request.ended is not None:
                continue
            rows = {row for row in (*self.ready, *self.looping) if row.request is request}
            if rows:
                self._drop(rows)
                self._end(next(iter(rows)), "cancelled")
            else:
                self.queue.remove(request)
                request.ended = "cancelled"
            told.append((request, None))
        return told

    def _drop(self, rows: set[Row]) -> None:
        """Take rows out, whether they loop or are about to."""
        self.ready = [row for row in self.ready if row not in rows]
        self._leave({row for row in self.looping if row in rows})

    def _begin(self) -> None:
        """Let the next tokens of requests enter, and requests for which there is room."""
        rows, self.ready = self.ready, []
        at_work = len({row.request for row in (*rows, *self.looping)})
        while self.queue and at_work < self.max_rows:
            at_work += 1
            rows.append(self._row(self.queue.popleft()))
        if not rows:
            return
        device, body = self.device, self.body
        self.looping += rows  # before anything can fail, so that it ends them
        tokens = [row.begin() for row in rows]
        ids = torch.tensor([[token] for each in tokens for token in each], device=device)
        places = [[place] for row in rows for place in range(row.start, row.start + row.length)]
        position_ids = torch.tensor(places, device=device)
        embeds = body.embed(body.embed_tokens(ids), position_ids)
        angles = body.positions(embeds, position_ids)
        num_loops = torch.tensor([row.request.num_loops for row in rows for _ in range(row.length)], device=device)
        new = Cells(embeds, embeds, position_ids, angles, num_loops, [None] * len(body.core))
        embeds = new.embeds = self._run_outer(body.prelude, 0, embeds, new, rows)
        new.state = body.connection.open(body.start(embeds, position_ids, None, False), embeds)
        self.cells = new if self.cells is None else self.cells.join(new)

    def _row(self, request: Request) -> Row:
        core, outer = self.pools
        pages = request.num_loops if self.page_per_loop else 1
        chunk = self.model.config.prefill_chunk
        most = len(request.input_ids) + request.choose.max_new_tokens
        return Row(request, chunk, Pages(core, pages, most), Pages(outer, 1 if self.outer_layers else 0, most))

    def _run_outer(
        self, layers: Sequence[Any], first: int, x: torch.Tensor, cells: Cells, rows: Sequence[Row]
    ) -> torch.Tensor:
        """Prelude or coda, whose first layer is number `first` of both: (N, 1, D) -> (N, 1, D)."""
        if len(layers):
            sight = Sight(self.model.config.sliding_window, False, x.dtype)
            reads = Reads([Span(row.outer, 0, row.start, row.length) for row in rows], sight, x.device)
            for index, layer in enumerate(layers, first):
                attention = CellAttention(layer.self_attn.at(0), index, reads)
                x = layer(x, attention=attention, **self._shared(cells))
        return x

    def _shared(self, cells: Cells) -> dict:
        """What all layers are given."""
        return {
            "attention_mask": None,
            "position_embeddings": cells.angles,
            "position_ids": cells.position_ids,
            "past_key_values": None,
        }

    def _span(self, row: Row) -> Span:
        page = row.loop if self.page_per_loop else 0
        return Span(row.core, page, row.start, row.length, row.loop == 0 or not self.writes_once)

    def _run_loop(self) -> None:
        """One loop of all cells, each in a loop of its own."""
        cells, body, rows = self.cells, self.body, self.looping
        assert cells is not None
        state, embeds = cells.state, cells.embeds
        groups = self._groups()
        old = sum(row.length for row in rows if row.loop)
        loops = torch.tensor([row.loop for row in rows for _ in range(row.length)], device=state.device).view(-1, 1, 1)
        ats = [body.connection.at(cells.num_loops[which]) for _, which in groups]
        read = [at.read(state[s], embeds[s], loop) for at, (loop, s) in zip(ats, groups, strict=True)]
        x = together([part for part, _ in read])
        sight = Sight(self.model.config.sliding_window, self.keys.own_apart, x.dtype)
        reads = Reads([self._span(row) for row in rows], sight, x.device)
        shared = self._shared(cells)
        for index, layer in enumerate(body.core):
            attention = CellAttention(layer.self_attn.at(0), index, reads)
            x, cells.carried[index] = self.keys.run_layer(
                layer, x, cells.carried[index], old, loops, attention=attention, **shared
            )
        x = body.core_norm(x)
        cells.state = together(
            [
                at.write(state[s], carry, body.loop_embedding(x[s], loop), loop)
                for at, (_, carry), (loop, s) in zip(ats, read, groups, strict=True)
            ]
        )
        for row in rows:
            row.loop += 1
            row.request.loops += 1

    def _groups(self) -> list[tuple[int, slice]]:
        """The loops of the cells and which cells are at each; one group where no loop differs from another."""
        if not self.loops_differ:
            return [(0, slice(None))]
        groups, cell = [], 0
        for row in self.looping:
            if groups and groups[-1][0] == row.loop:
                groups[-1] = (row.loop, slice(groups[-1][1].start, cell + row.length))
            else:
                groups.append((row.loop, slice(cell, cell + row.length)))
            cell += row.length
        return groups

    def _draft(self) -> None:
        """Let the next token enter on a guess, where the one before it has looped often enough; others leave."""
        asked, cell = {}, -1
        for row in self.looping:
            cell += row.length
            often = row.request.draft_loops
            if often is not None and row.loop >= often and row.is_read and row.loop < row.request.num_loops:
                asked[row] = cell
        if not asked:
            return
        assert self.cells is not None
        state = self.body.connection.close(self.cells.state[list(asked.values())])  # (n, 1, D)
        guesses = self.model.readout(self.body.coda_norm(state))[:, 0].argmax(-1).tolist()
        for row, guess in zip(asked, guesses, strict=True):
            if row.guess == guess or row not in self.looping:  # it has just left itself
                continue
            self._drop(row.followers())
            row.guess, row.next, choose = guess, None, row.request.choose
            written = row.start + row.length + 1 - len(row.request.input_ids)  # tokens of the reply, with this one
            if written < choose.max_new_tokens and guess not in choose.end_tokens:
                row.next = row.follower()
                self.ready.append(row.next)

    def _halted(self) -> set[Row]:
        """The rows whose tokens have had their last loop."""
        assert self.cells is not None
        done = {row for row in self.looping if row.loop == row.request.num_loops}
        last, cell = {}, -1
        asking: dict[tuple[int, bool], list[Row]] = {}
        for row in self.looping:
            cell += row.length
            if row.decision is not None and row not in done:
                last[row] = cell
                asking.setdefault((id(row.decision), row.memory is None), []).append(row)
        for rows in asking.values():
            state = self.body.connection.close(self.cells.state[[last[row] for row in rows]])  # (b, 1, D)
            remembered = [row.memory for row in rows if row.memory is not None]  # of all of them or of none
            memory = torch.cat(remembered) if remembered else None
            assert rows[0].decision is not None
            memory, halts = rows[0].decision.step(memory, state)
            for row, each in zip(rows, [None] * len(rows) if memory is None else memory.split(1), strict=True):
                row.memory = each
            done |= {row for row, halted in zip(rows, halts[:, 0].tolist(), strict=True) if halted}
        return done

    def _read_out(self, done: set[Row]) -> list[tuple[Request, int | None]]:
        """Choose the next token of the rows whose tokens have halted; they leave the loop."""
        if not done:
            return []
        assert self.cells is not None
        rows = [row for row in self.looping if row in done]
        cells = self.cells.keep(self._numbers(done))
        hidden = self.body.coda_norm(self.body.connection.close(cells.state))  # (n, 1, D)
        hidden = self._run_outer(self.body.coda, len(self.body.prelude), hidden, cells, rows)
        self._leave(done)
        ends = torch.tensor([row.length for row in rows], device=hidden.device).cumsum(0) - 1
        read = [index for index, row in enumerate(rows) if row.is_read]
        told = []
        if read:
            logits = self.model.readout(hidden[ends[read]])[:, 0].float()  # (b, V)
            likeliest = logits.argmax(-1).tolist()
            for number, index in enumerate(read):
                told += self._choose(rows[index], logits[number : number + 1], likeliest[number])
        staying = [(row, last) for row, last in zip(rows, ends.tolist(), strict=True) if row.request.ended is None]
        self._close(staying, cells)
        for row in rows:
            going_on = row.request.ended is None
            if row.next is not None and going_on and row.waiting == [row.guess]:
                continue  # the next token loops already
            self._drop(row.followers())
            if going_on:
                self.ready.append(row)
        return told

    def _choose(self, row: Row, logits: torch.Tensor, likeliest: int) -> list[tuple[Request, int | None]]:
        """Add a token to the reply. logits: (1, V)."""
        request, choose = row.request, row.request.choose
        try:
            token = likeliest
            if not choose.is_plain:
                token = choose.token(request.input_ids + request.tokens, logits)
            request.tokens.append(token)
            request.loops_used.append(row.loop)
            ended = choose.ends(request.tokens)
        except Exception as error:  # of a processor or of `on_token`: the others go on
            self._end(row, "error", error)
            return [(request, None)]
        if ended is None:
            row.waiting = [token]
            return [(request, token)]
        self._end(row, ended)
        return [(request, token), (request, None)]

    def _close(self, rows: Sequence[tuple[Row, int]], cells: Cells) -> None:
        """Leave in the pages of rows that go on what the KV policy says.

        Args:
            rows: with the number of their last cell.
            cells: those that have halted.
        """
        if self.page_per_loop:
            early = [row for row, _ in rows if row.loop < row.request.num_loops]
            fill(Span(row.core, row.loop - 1, row.start, row.length) for row in early)
        elif self.keys.averages:
            for row, place in rows:
                own = slice(place + 1 - row.length, place + 1)
                for layer, sums in enumerate(cells.carried):
                    assert sums is not None
                    write([Span(row.core, 0, row.start, row.length)], layer, sums[own] / row.loop)

    def _numbers(self, rows: set[Row]) -> torch.Tensor:
        """(n,), the cells of some of the rows that loop."""
        numbers, cell = [], 0
        for row in self.looping:
            if row in rows:
                numbers += range(cell, cell + row.length)
            cell += row.length
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def _leave(self, rows: set[Row]) -> None:
        """Take some rows out of the loop."""
        stay = [row for row in self.looping if row not in rows]
        if not stay:
            self.cells = None
        elif rows:
            assert self.cells is not None
            self.cells = self.cells.keep(self._numbers(set(stay)))
        self.looping = stay

    def _end(self, row: Row, ended: Literal["stop", "length", "cancelled", "error"], error: Exception | None = None):
        row.request.ended, row.request.error = ended, error
        row.release()


def together(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts one after the other; one part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_can_batch(model) -> None:
    """ValueError where requests of this model cannot be run together."""
    config, troubles = model.config, []
    if config._attn_implementation not in ("eager", "sdpa"):
        troubles.append(
            f"attention {config._attn_implementation!r} does not take the mask of several requests: call "
            "model.set_attn_implementation('sdpa')"
        )
    if model.model.pattern.looks_ahead:
        troubles.append(
            f"attention_pattern={config.attention_pattern!r} looks ahead, and a request sees earlier tokens alone: "
            "use forward, or generate where attention_pattern='prefix'"
        )
    if model.training:
        troubles.append("a model that trains drops out at random: call model.eval()")
    if (config.rope_parameters or {}).get("rope_type") in ("dynamic", "longrope"):
        troubles.append("its rotary angles depend on the longest context of a batch: use generate")
    if calls_are_prepared(model):
        troubles.append(f"{CALLS_ARE_PREPARED}: use generate")
    if troubles:
        raise ValueError(f"continuous depth batching: {troubles[0]}.")


def check_drafts(model, draft_loops: int, decision: Decision | None, choice: Choice) -> None:
    """ValueError where tokens cannot enter on a guess, or would be others than without."""
    troubles = []
    if isinstance(draft_loops, bool) or not isinstance(draft_loops, int) or draft_loops < 1:
        troubles.append(f"it must be an int >= 1, or None for no drafts, got {draft_loops!r}")
    if model.model.sharing.rewrites:
        troubles.append(
            f"kv_sharing={model.config.kv_sharing!r} rewrites an entry in every loop, and a token would read others "
            "than without drafts: use 'per_loop', 'first' or 'natural'"
        )
    if model.config.num_coda_layers:
        troubles.append("a guess is read without the coda, which this model has")
    if decision is not None:
        troubles.append(
            "halting ends loops early, and a token has to loop behind the one before it: use one of the two"
        )
    if not choice.is_plain:
        troubles.append("guesses are the likeliest tokens: decode greedily, without processors")
    if troubles:
        raise ValueError(f"draft_loops={draft_loops!r}: {troubles[0]}.")


def check_prompt(input_ids: Sequence[int] | torch.Tensor, vocab_size: int) -> list[int]:
    """The tokens of a prompt; ValueError for anything else than one row of known ones."""
    ids = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
    if len(ids) == 1 and isinstance(ids[0], (list, tuple)):
        ids = list(ids[0])
    if not ids or any(isinstance(each, bool) or not isinstance(each, int) for each in ids):
        raise ValueError(f"input_ids must be the token ids of one prompt, at least one, got {input_ids!r}.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(
            f"input_ids must be in [0, {vocab_size - 1}] (vocab_size={vocab_size}), got values from {min(ids)} to "
            f"{max(ids)}: is this the tokenizer of another model?"
        )
    return ids


def check_settings(settings: GenerationConfig, rest: dict) -> None:
    """ValueError for what a request cannot have.

    Args:
        rest: keywords that are no settings.
    """
    if rest:
        raise ValueError(f"a request has no setting {min(rest)!r}: it takes those of a generation config.")
    mode = settings.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"continuous depth batching is greedy or samples, not {mode.value}: use generate.")
    if settings.num_return_sequences not in (None, 1):
        raise ValueError(f"num_return_sequences={settings.num_return_sequences}: add the request several times.")
    for name in NOT_BATCHED:
        value = getattr(settings, name)
        if value is not None and not (name == "guidance_scale" and value == 1):
            raise ValueError(f"{name}={value!r} is not for continuous depth batching: use generate, or on_token.")
