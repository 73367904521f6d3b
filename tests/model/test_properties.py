"""Laws of every model: for a random configuration and a random call, the answer is right or the refusal is clear.

`make fuzz N=10000` tries more of them; what once failed is kept in `past_failures.jsonl` and tried again here.
"""

import json
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, note, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import strategies
from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedForSequenceClassification
from modeling_looped.connections_looped import CONNECTIONS
from strategies import TOKENS, VOCABULARY

PAST_FAILURES = Path(__file__).with_name("past_failures.jsonl")
REFUSALS = (ValueError, TypeError, StrictDataclassError)
# What rounding leaves after some loops of large weights, where a wrong row or slot moves logits by tenths. Models in
# float64 still compute gates of streams, noise and rotary angles in float32.
NEAR = {torch.float32: {"rtol": 2e-3, "atol": 2e-3}, torch.float64: {"rtol": 1e-5, "atol": 1e-5}}


class Refused(Exception):
    """The project refused a configuration or a call; the text is its message."""


def refusing(function, *args, **kwargs):
    """`function(*args, **kwargs)`; Refused where the project says no, and any other error as it is.

    An error that comes from the depths of torch or transformers is no refusal: it is a fault that was let through.
    """
    try:
        return function(*args, **kwargs)
    except REFUSALS as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not ("modeling_looped" in raised_in or "huggingface_hub" in raised_in or "modeling_rope" in raised_in):
            raise
        raise Refused(str(error)) from error


class Case:
    """A model in float64, as a random configuration has it, and a random call of it."""

    def __init__(self, fields: dict, call: dict):
        self.config = refusing(LoopedConfig, **strategies.SIZES | fields)
        self.call, self.attention = call, call["attention"]
        torch.manual_seed(call["seed"])
        self.model = LoopedForCausalLM._from_config(self.config, attn_implementation=self.attention).eval()
        # Not eager attention, whose softmax is in float32: the mask of float64 overflows there, as in every Llama.
        self.dtype = torch.float32 if self.attention == "eager" else torch.float64
        self.model.to(self.dtype)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "kv_gate" in name or "exit_gate" in name:  # fresh ones hardly let anything through
                    parameter.normal_(std=0.5)
        self.rows = len(call["padding"])
        self.ids = torch.randint(1, VOCABULARY, (self.rows, TOKENS))
        self.mask = torch.ones_like(self.ids)
        for row, padding in enumerate(call["padding"]):
            self.ids[row, :padding], self.mask[row, :padding] = 0, 0
        depth = call["num_loops"]
        self.num_loops = torch.tensor(depth) if isinstance(depth, list) else depth

    def depth_of(self, row: int) -> int | None:
        return int(self.num_loops[row]) if isinstance(self.num_loops, torch.Tensor) else self.num_loops

    def run(self, ids=None, mask=None, num_loops=None, **kwargs):
        ids = self.ids if ids is None else ids
        with torch.no_grad():
            return refusing(self.model, ids, attention_mask=mask, num_loops=num_loops, **{"use_cache": False} | kwargs)

    def cache(self):
        if self.call["cache"] == "static":
            return StaticCache(self.config, max_cache_len=TOKENS)
        return DynamicCache(config=self.config)


def same(first: torch.Tensor, second: torch.Tensor) -> None:
    assert second.isfinite().all()
    torch.testing.assert_close(first, second, **NEAR[second.dtype])


def cached_equals_uncached(case: Case) -> None:
    """However a call is cut, and padding aside; policies that rewrite need chunks that end where the cuts do."""
    chunk, pieces = case.config.prefill_chunk, case.call["pieces"]
    if case.config.kv_sharing in ("last", "mean", "gated"):
        if chunk is None or any(case.call["padding"]):  # tokens of one call see each other otherwise than later ones
            pieces = [TOKENS]
        elif any(sum(pieces[:i]) % chunk for i in range(len(pieces))):
            pieces = [min(chunk, TOKENS - start) for start in range(0, TOKENS, chunk)]
    whole = case.run(mask=case.mask, num_loops=case.num_loops).logits
    cache, start, parts = case.cache(), 0, []
    for size in pieces:
        end = start + size
        settings = {"past_key_values": cache, "use_cache": True}
        parts.append(case.run(case.ids[:, start:end], case.mask[:, :end], case.num_loops, **settings).logits)
        start = end
    real = case.mask.bool()
    same(torch.cat(parts, dim=1)[real], whole[real])
    assert int(cache.get_seq_length()) == TOKENS


def rows_equal_single_rows(case: Case) -> None:
    """Depth, halting and padding of a row are its own."""
    settings = {"halting": case.call.get("halting"), "logits_to_keep": case.call["keep"]}
    together = case.run(mask=case.mask, num_loops=case.num_loops, **settings)
    for row, padding in enumerate(case.call["padding"]):
        alone = case.run(case.ids[row : row + 1, padding:], num_loops=case.depth_of(row), **settings)
        same(together.logits[row, -alone.logits.shape[1] :], alone.logits[0])
        assert together.loops_used[row, padding:].equal(alone.loops_used[0])


def rows_of_a_cache_equal_single_rows(case: Case) -> None:
    """Also where the depth of a row changes between calls, so that a call reads slots that an earlier one left out."""
    depths = [case.num_loops, case.num_loops]
    if isinstance(case.num_loops, torch.Tensor):
        depths[1] = case.num_loops.flip(0)

    def of_row(depth, row):
        return int(depth[row]) if isinstance(depth, torch.Tensor) else depth

    def run(ids, mask, depths):
        cache, settings = case.cache(), {"halting": case.call.get("halting"), "logits_to_keep": case.call["keep"]}
        for start, end, depth in ((0, 4, depths[0]), (4, TOKENS, depths[1])):
            output = case.run(
                ids[:, start:end], mask[:, :end], depth, past_key_values=cache, use_cache=True, **settings
            )
        return output

    if case.config.kv_sharing in ("last", "mean", "gated") and any(case.call["padding"]):
        return  # tokens of a call that padding makes longer are cut elsewhere
    together = run(case.ids, case.mask, depths)
    for row in range(case.rows):
        alone = run(case.ids[row : row + 1], case.mask[row : row + 1], [of_row(depth, row) for depth in depths])
        same(together.logits[row], alone.logits[0])
        assert together.loops_used[row].equal(alone.loops_used[0])


def halting_is_a_depth(case: Case) -> None:
    """A row that halted is a row that was asked for as many loops."""
    halted = case.run(mask=case.mask, num_loops=case.num_loops, halting=case.call.get("halting"), logits_to_keep=1)
    most = case.num_loops if case.num_loops is not None else case.config.num_loops
    assert (halted.loops_used[:, -1] <= most).all()
    if case.config.prefill_chunk is not None:  # every chunk halts for itself
        return
    if CONNECTIONS[case.config.loop_connection].counts_loops:  # its steps are those of the budget
        return
    depths = halted.loops_used[:, -1].clone()
    same(halted.logits, case.run(mask=case.mask, num_loops=depths, logits_to_keep=1).logits)


def no_token_sees_a_later_one(case: Case) -> None:
    ids = case.ids.clone()
    before = case.run(ids, num_loops=case.num_loops).logits
    ids[:, 4] = (ids[:, 4] + 1) % VOCABULARY
    after = case.run(ids, num_loops=case.num_loops).logits
    same(after[:, :4], before[:, :4])


def a_reload_is_the_same_model(case: Case, folder: Path) -> None:
    before, weights = case.run(mask=case.mask, num_loops=case.num_loops).logits, case.model.state_dict()
    case.model.save_pretrained(folder)
    case.model = LoopedForCausalLM.from_pretrained(folder, attn_implementation=case.attention, dtype=case.dtype)
    assert all(weights[name].equal(weight) for name, weight in case.model.state_dict().items())
    # Loaded weights lie otherwise in memory, and matrix products round by that.
    after = case.run(mask=case.mask, num_loops=case.num_loops).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 if case.dtype == torch.float32 else 1e-12)
    assert LoopedConfig.from_pretrained(folder).to_diff_dict() == case.model.config.to_diff_dict()


def loops_are_a_stack(case: Case) -> None:
    """A plain loop without embeddings or norms of its own is a deeper model with the same weights again and again."""
    config, loops = case.config, case.depth_of(0) or case.config.num_loops
    own = config.loop_connection != "plain" or config.loop_embedding != "none" or config.state_init != "embeddings"
    if (
        own
        or config.norm_between_loops
        or config.kv_sharing in ("first", "natural", "gated")
        or config.prefill_chunk is not None
    ):
        return
    fields = case.config.to_dict() | {"num_core_layers": loops * config.num_core_layers, "num_loops": 1}
    for name in ("num_hidden_layers", "max_num_loops", "transformers_version", "architectures"):
        fields.pop(name, None)
    stack = (
        LoopedForCausalLM._from_config(LoopedConfig(**fields), attn_implementation=case.attention)
        .to(case.dtype)
        .eval()
    )
    weights = case.model.state_dict()
    for name in list(stack.state_dict()):
        section, _, rest = name.partition("model.core.")
        if rest and not section:
            index, _, tail = rest.partition(".")
            weights[name] = weights[f"model.core.{int(index) % config.num_core_layers}.{tail}"]
    stack.load_state_dict(weights)
    with torch.no_grad():
        deep = stack(case.ids, attention_mask=case.mask, use_cache=False).logits
    same(case.run(mask=case.mask, num_loops=loops).logits[case.mask.bool()], deep[case.mask.bool()])


def decoding_is_the_uncached_choice(case: Case) -> None:
    """Greedy tokens with any cache are those of whole forward passes, row by row, at depths and rules of their own."""
    settings = {"num_loops": case.num_loops, "halting": case.call.get("halting")}
    if case.config.kv_sharing not in ("per_loop", "first", "natural"):
        return
    static = {"cache_implementation": "static"} if case.call["cache"] == "static" else {}
    with torch.no_grad():
        tokens = refusing(
            case.model.generate,
            case.ids,
            attention_mask=case.mask,
            max_new_tokens=3,
            do_sample=False,
            **settings,
            **static,
        )
    if settings["halting"] is not None:  # later tokens see what earlier ones left in unrun slots
        settings["halting"], tokens = settings["halting"], tokens[:, : TOKENS + 1]
    mask = torch.cat([case.mask, torch.ones(case.rows, 3, dtype=torch.long)], dim=1)
    for length in range(TOKENS, tokens.shape[1]):
        logits = case.run(tokens[:, :length], mask[:, :length], logits_to_keep=1, **settings).logits[:, -1]
        chosen = logits.gather(1, tokens[:, length : length + 1]).squeeze(1)
        assert (logits.max(-1).values - chosen <= 1e-4).all()


def gradients_reach_what_is_asked_for(case: Case) -> None:
    """Checkpointed gradients are the plain ones, and one loop more or less of truncation is not the same."""
    labels = case.ids.masked_fill(case.mask == 0, -100)
    if isinstance(case.num_loops, torch.Tensor) or case.config.state_init.endswith("normal"):
        return

    def gradients(checkpointed: bool) -> dict:
        case.model.zero_grad()
        case.model.train()
        if checkpointed:
            case.model.activation_checkpointing_enable({"use_reentrant": False})
        refusing(
            case.model, case.ids, attention_mask=case.mask, labels=labels, num_loops=case.num_loops, use_cache=False
        ).loss.backward()
        if checkpointed:
            case.model.activation_checkpointing_disable()
        case.model.eval()
        return {name: p.grad.clone() for name, p in case.model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        same(gradient, again[name])


def truncation_changes_no_value(case: Case) -> None:
    """What is differentiated, and what of a cache has a gradient, is not seen in the answer."""
    if isinstance(case.num_loops, torch.Tensor):
        return
    whole = case.run(num_loops=case.num_loops).logits
    for cut in (False, True):
        settings = {"num_loops": case.num_loops, "num_grad_loops": 1 + case.call["seed"] % 3, "cut_chunks": cut}
        same(refusing(case.model, case.ids, use_cache=False, **settings).logits.detach(), whole)
        del settings["cut_chunks"]
        caches = DynamicCache(config=case.config), DynamicCache(config=case.config)
        size = case.call["pieces"][0] if len(case.call["pieces"]) > 1 else TOKENS - 1
        for cache in caches:
            with torch.set_grad_enabled(cut):
                case.model(case.ids[:, :size], past_key_values=cache, num_loops=case.num_loops)
        rest = case.run(case.ids[:, size:], num_loops=case.num_loops, past_key_values=caches[0], use_cache=True)
        trained = refusing(case.model, case.ids[:, size:], past_key_values=caches[1], use_cache=True, **settings)
        same(trained.logits.detach(), rest.logits)


LAWS = {
    law.__name__: law
    for law in (
        cached_equals_uncached,
        rows_equal_single_rows,
        rows_of_a_cache_equal_single_rows,
        halting_is_a_depth,
        no_token_sees_a_later_one,
        loops_are_a_stack,
        decoding_is_the_uncached_choice,
        gradients_reach_what_is_asked_for,
        truncation_changes_no_value,
    )
}


def check(law: str, fields: dict, call: dict) -> None:
    with clearly():
        LAWS[law](Case(fields, call))


@contextmanager
def clearly(*names: str):
    """Within the block the project may refuse, in a text that says what is wrong, and names one of `names`."""
    try:
        yield
    except Refused as refusal:
        message = str(refusal)
        if len(message) < 20 or "tensor(" in message or not any(name in message for name in names or [""]):
            pytest.fail(f"unclear: {message}")


@given(law=st.sampled_from(sorted(LAWS)), fields=strategies.configs(), call=strategies.calls())
def test_a_law_holds_or_the_call_is_refused(law, fields, call):
    note(json.dumps({"law": law, "fields": fields, "call": call}))  # a line for past_failures.jsonl, should it fail
    check(law, fields, call)


@pytest.mark.parametrize("case", [json.loads(line) for line in PAST_FAILURES.read_text("utf-8").splitlines()], ids=str)
def test_what_once_failed_holds(case):
    check(**case)


@pytest.mark.slow
@settings(max_examples=settings.default.max_examples // 5)  # it writes files
@given(fields=strategies.configs(), call=strategies.calls())
def test_a_reloaded_model_is_the_same(fields, call, tmp_path_factory):
    with clearly():
        a_reload_is_the_same_model(Case(fields, call), tmp_path_factory.mktemp("reload"))


@given(fields=strategies.configs(), name=st.sampled_from(sorted(LoopedConfig.__annotations__)), value=strategies.JUNK)
def test_a_junk_field_is_refused_by_name_or_runs(fields, name, value):
    fields = strategies.SIZES | fields
    with clearly():
        refusing(LoopedConfig, **fields)
        with clearly(name, "head_dim", "num_loops"):  # what follows from others
            config = refusing(LoopedConfig, **fields | {name: value})
            sizes = [config.hidden_size * config.intermediate_size * config.vocab_size, config.max_position_embeddings]
            sizes += [config.head_dim, config.num_streams or 1, config.kv_gate_rank or 1]
            if max(sizes) > 10**6 or config.num_loops > 50:  # it would run, in more memory than there is
                return
            torch.manual_seed(0)
            ids = torch.arange(5).unsqueeze(0) % config.vocab_size
            for model_class in (LoopedForCausalLM, LoopedForSequenceClassification):
                output = refusing(refusing(model_class, config).eval(), ids, use_cache=False)
                assert output.logits.isfinite().all()


ARGUMENTS = ("num_loops", "num_grad_loops", "halting", "logits_to_keep", "attention_mask", "draft_loops", "nun_loops")


@pytest.mark.slow
@given(fields=strategies.configs(), call=strategies.calls(), name=st.sampled_from(ARGUMENTS), value=strategies.JUNK)
def test_a_junk_argument_is_refused_or_ignored_by_none(fields, call, name, value):
    """None is no argument; whatever else does not fit is named, in `forward` and in `generate`."""
    with clearly():
        call_with_junk(Case(fields, call), name, value)


def call_with_junk(case: Case, name: str, value) -> None:
    if name == "num_loops" and type(value) is int and value > 50:
        return
    own = {"forward": ("nun_loops", *ARGUMENTS[:3]), "generate": ("num_loops", "halting", "draft_loops")}
    for method, names in own.items():
        if name not in names:
            continue
        settings = {} if method == "forward" else {"max_new_tokens": 2, "do_sample": False}
        with clearly(name, "loops"):
            refusing(case.model if method == "forward" else case.model.generate, case.ids, **settings, **{name: value})
