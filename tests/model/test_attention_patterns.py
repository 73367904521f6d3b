"""Laws of the attention patterns: which tokens a token sees, in every attention, and that a cache changes nothing."""

import json
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, StaticCache

from looplab.export.stock import NEEDED
from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedForSequenceClassification
from modeling_looped.checks_looped import SERVING_ENGINES
from modeling_looped.masks_looped import PATTERNS
from toys import FP32, KV_SHARINGS, SIZES, make_config, make_ids, make_model

every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
looking_ahead = pytest.mark.parametrize("pattern", ["prefix", "bidirectional"])
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}

# Two rows of eight tokens: 0 prompt, 1 answer; and texts packed into a row.
TYPES = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]])
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]])  # row 1: its prompt is padding
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
PACKED_TYPES = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 1]])


def seen(pattern, types, mask=None, positions=None):
    """(B, T, T) bool, token by token: whether i sees j."""
    batch, length = types.shape
    text = torch.zeros_like(types) if positions is None else (positions == 0).cumsum(-1).expand_as(types)
    table = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        for i in range(length):
            for j in range(length):
                both_prompt = types[b, i] == 0 and types[b, j] == 0
                sees = {"causal": j <= i, "prefix": j <= i or both_prompt, "bidirectional": True}[pattern]
                table[b, i, j] = bool(sees and text[b, i] == text[b, j] and (mask is None or mask[b, j]))
    return table


def call(pattern, types=TYPES, mask=None, positions=None):
    """What a call is given beside its tokens."""
    return {
        "token_type_ids": types if pattern == "prefix" else None,
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": False,
    }


CALLS = {
    "whole": {"types": TYPES},
    "padded": {"types": TYPES, "mask": PADDED},
    "packed": {"types": PACKED_TYPES, "positions": PACKED},
}


@every_pattern
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CALLS)
def test_a_token_sees_what_its_pattern_says_and_no_more(pattern, attn, kind):
    """By gradient, for each pair of tokens; patterns are transitive, so that loops and layers change nothing."""
    model = make_model(attn=attn, attention_pattern=pattern, num_loops=2, num_prelude_layers=1)
    of_call = CALLS[kind]
    table, ids = seen(pattern, **of_call), make_ids(len(of_call["types"]), 8)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **call(pattern, **of_call)).logits
    real = torch.ones_like(ids) if of_call.get("mask") is None else of_call["mask"]
    for i in range(8):
        [grad] = torch.autograd.grad(logits[:, i].sum(), embeds, retain_graph=True)
        for b in range(len(ids)):
            if real[b, i]:
                assert ((grad[b].abs().sum(-1) > 0) == table[b, i]).all(), (b, i)


def check_against_the_table(pattern, kind, attn):
    """The twin is a causal model that is given the table of who sees whom."""
    of_call, fields = CALLS[kind], {"hidden_size": 64}  # flex asks for heads of 16
    ids = make_ids(len(of_call["types"]), 8)
    real = of_call.get("mask", torch.ones_like(ids))
    positions = of_call.get("positions", (real.cumsum(-1) - 1).clamp_min(0))
    table = seen(pattern, **of_call)[:, None] | torch.eye(8, dtype=torch.bool)
    twin = make_model(attn="sdpa", **fields)
    expected = twin(ids, attention_mask=table, position_ids=positions, use_cache=False).logits
    logits = make_model(attn=attn, attention_pattern=pattern, **fields)(ids, **call(pattern, **of_call)).logits
    torch.testing.assert_close(logits[real.bool()], expected[real.bool()], **FP32)


@torch.no_grad()
@every_pattern
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CALLS)
def test_every_attention_sees_the_same(pattern, kind, attn):
    check_against_the_table(pattern, kind, attn)


@torch.no_grad()
@looking_ahead
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside inductor
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # inside transformers
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside functorch
def test_flex_attention_sees_the_same(pattern):
    check_against_the_table(pattern, "padded", "flex_attention")


def prompts():
    """Three rows of six tokens, the second padded on the left."""
    ids, mask = make_ids(3, 6), torch.ones(3, 6, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kv_sharing", ["per_loop", "first", "natural"])
@pytest.mark.parametrize("num_loops", [1, 4, torch.tensor([1, 4, 2])], ids=["1", "4", "rows"])
def test_a_prompt_in_the_cache_is_the_prompt_of_a_whole_call(attn, static, kv_sharing, num_loops):
    connection = {"loop_connection": "damped"} if kv_sharing == "natural" else {}
    model = make_model(attn=attn, attention_pattern="prefix", kv_sharing=kv_sharing, **connection)
    ids, mask = prompts()
    answers = make_ids(3, 5, seed=2)
    whole, real = torch.cat([ids, answers], dim=1), torch.cat([mask, torch.ones_like(answers)], dim=1)
    types = torch.cat([torch.zeros_like(ids), torch.ones_like(answers)], dim=1)
    expected = model(whole, attention_mask=real, token_type_ids=types, num_loops=num_loops, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=11) if static else DynamicCache(config=model.config)
    found, seen_tokens = [], 0
    for size in (6, 1, 3, 1):  # the prompt, then pieces of the answer, of which the model is told nothing
        piece = slice(seen_tokens, seen_tokens + size)
        seen_tokens += size
        of_piece = {"attention_mask": real[:, :seen_tokens], "past_key_values": cache, "num_loops": num_loops}
        found.append(model(whole[:, piece], **of_piece).logits)
    found = torch.cat(found, dim=1)
    torch.testing.assert_close(found[real.bool()], expected[real.bool()], **FP32)


@torch.no_grad()
@pytest.mark.parametrize("kv_sharing", ["per_loop", "first"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"halting": "kl_entropy", "num_loops": 5}], ids=str)
def test_generate_takes_its_prompt_for_the_prefix(kv_sharing, settings):
    """With every cache, and without one; a row alone is what it is beside others."""
    model = make_model(attention_pattern="prefix", kv_sharing=kv_sharing)
    ids, mask = prompts()
    settings = GREEDY | settings
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert model.generate(ids, attention_mask=mask, **settings).equal(plain)
    assert model.generate(ids, attention_mask=mask, cache_implementation="static", **settings).equal(plain)
    assert model.generate(ids[1:2, 3:], **settings).equal(plain[1:2, 3:])
    types = torch.cat([torch.zeros_like(ids), torch.ones(3, 5, dtype=torch.long)], dim=1)
    if settings == GREEDY:
        real = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], dim=1)
        logits = model(plain, attention_mask=real, token_type_ids=types).logits
        assert logits[:, 5:-1].argmax(-1).equal(plain[:, 6:])
        causal = make_model(kv_sharing=kv_sharing)
        assert not torch.allclose(model(ids[:1]).logits, causal(ids[:1]).logits, atol=1e-3)


@torch.no_grad()
def test_a_second_prompt_sees_itself_whole_and_the_text_before():
    model, ids = make_model(attention_pattern="prefix"), make_ids(2, 9)
    cache = DynamicCache(config=model.config)
    types = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 1]]).expand(2, -1)
    logits = [
        model(ids[:, a:b], past_key_values=cache, token_type_ids=types[:, a:b]).logits
        for a, b in ((0, 3), (3, 5), (5, 9))
    ]
    # One prompt of a whole call would see the next: a twin is given the table.
    turn = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
    table = (turn[:, None] > turn) | torch.ones(9, 9).tril().bool() | ((turn[:, None] == turn) & (types[0] == 0))
    expected = make_model()(ids, attention_mask=table[None, None].expand(2, -1, -1, -1), use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **FP32)


@torch.no_grad()
@looking_ahead
@pytest.mark.parametrize("coda", [0, 1])
def test_a_row_of_its_own_depth_equals_that_row_alone(pattern, coda):
    model, (ids, mask) = make_model(attention_pattern=pattern, num_coda_layers=coda), prompts()
    depths = torch.tensor([3, 1, 5])
    together = model(ids, attention_mask=mask, num_loops=depths).logits
    for row in range(3):
        real = mask[row].bool()
        alone = model(ids[row : row + 1, real], num_loops=int(depths[row])).logits
        torch.testing.assert_close(together[row, real], alone[0], **FP32)


@looking_ahead
@pytest.mark.parametrize("fields", [{}, {"exit_gate": True}], ids=["plain", "exit_gate"])
def test_training_learns_answers_that_a_causal_model_cannot(pattern, fields):
    """The answer to a prompt's first token is its last one: in place, only who looks ahead knows it."""
    torch.manual_seed(0)
    model = make_model(attention_pattern=pattern, residual_init="normal", **fields).train()
    ids = torch.randint(1, 9, (64, 6))
    targets = ids[:, -1:].repeat(1, 6)
    types = {"token_type_ids": torch.zeros_like(ids)} if pattern == "prefix" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for _ in range(60):
        loss = model(ids, shift_labels=targets, **types).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert (model(ids, **types).logits[:, 0].argmax(-1) == targets[:, 0]).float().mean() > 0.9


@torch.no_grad()
def test_a_classifier_reads_a_text_that_sees_itself_and_keeps_no_cache():
    model = LoopedForSequenceClassification(make_config(attention_pattern="bidirectional", num_labels=3)).eval()
    scores = model(make_ids(2, 6))
    assert scores.logits.shape == (2, 3)
    assert scores.past_key_values is None


@torch.no_grad()
def test_the_state_that_observe_shows_is_read_with_the_types_of_its_call():
    model, states = make_model(attention_pattern="prefix", num_coda_layers=1), []
    ids = make_ids(2, 8)
    model(ids, token_type_ids=TYPES, use_cache=False, observe=lambda rows, state: states.append(state))
    stopped = model.lm_head(model.model.stopped(states[0], token_type_ids=TYPES))
    expected = model(ids, token_type_ids=TYPES, use_cache=False, num_loops=1).logits
    torch.testing.assert_close(stopped, expected, **FP32)


@torch.no_grad()
@looking_ahead
def test_a_saved_model_looks_ahead_again(pattern, tmp_path):
    model = make_model(attention_pattern=pattern)
    model.save_pretrained(tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path)
    assert loaded(make_ids()).logits.equal(model(make_ids()).logits)


@torch.no_grad()
def test_a_folder_saved_before_there_were_patterns_is_causal(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("attention_pattern") == "causal"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert LoopedForCausalLM.from_pretrained(tmp_path)(make_ids()).logits.equal(model(make_ids()).logits)
    assert LoopedConfig(**SIZES).attention_pattern == "causal"


@every_pattern
@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
def test_a_kv_policy_is_right_or_refused(pattern, kv_sharing):
    allowed = PATTERNS[pattern].sharings
    fields = {"kv_sharing": kv_sharing, "attention_pattern": pattern}
    if kv_sharing == "natural":
        fields["loop_connection"] = "damped"
    if allowed is None or kv_sharing in allowed:
        assert make_config(**fields).kv_sharing == kv_sharing
    else:
        with pytest.raises(
            (ValueError, StrictDataclassError), match=f"attention_pattern='{pattern}' needs kv_sharing"
        ):
            make_config(**fields)


@looking_ahead
@pytest.mark.parametrize("engine", sorted(SERVING_ENGINES))
def test_engines_are_refused(pattern, engine):
    model = make_model(attention_pattern=pattern)
    model.config._attn_implementation = engine
    with pytest.raises(ValueError, match=f"attention_pattern='{pattern}' looks ahead, and {engine}"):
        model(make_ids())
    with pytest.raises(ValueError, match=f"attention_pattern='{pattern}' looks ahead, and an engine that packs"):
        make_model(attention_pattern=pattern)(make_ids(), block_table=torch.zeros(1))
    with pytest.raises(ValueError, match=f"attention_pattern='{pattern}' looks ahead, and continuous batching"):
        make_model(attention_pattern=pattern).init_continuous_batching()
    with pytest.raises(ValueError, match=f"attention_pattern='{pattern}' looks ahead, and a request sees earlier"):
        make_model(attention_pattern=pattern).depth_batching()
    assert NEEDED["attention_pattern"][0] == "causal"


def refused(message):
    return pytest.raises((ValueError, StrictDataclassError), match=re.escape(message))


def test_what_a_pattern_cannot_do_is_refused_by_name():
    ids = make_ids(1, 6)
    whole, prefix, causal = (make_model(attention_pattern=name) for name in ("bidirectional", "prefix", "causal"))
    with refused("generate writes one token after the other, and attention_pattern='bidirectional'"):
        whole.generate(ids, max_new_tokens=2)
    with refused("attention_pattern='bidirectional' has no cache"):
        whole(ids, past_key_values=DynamicCache(config=whole.config))
    with refused("labels of attention_pattern='prefix' need token_type_ids"):
        prefix(ids, labels=ids)
    with refused("in the shape (1, 6), got (1, 5)"):
        prefix(ids, token_type_ids=torch.zeros(1, 5, dtype=torch.long))
    for model in (whole, causal):
        with refused("token_type_ids tell a prompt from its answer"):
            model(ids, token_type_ids=torch.zeros_like(ids))
    for drafts in ({"draft_loops": 1, "num_loops": 3}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": causal}):
        with refused("attention_pattern='prefix' tells the prompt from what follows it"):
            prefix.generate(ids, max_new_tokens=4, **drafts)
    with refused("prefill_chunk_size=2 cuts the prompt"):
        prefix.generate(ids, max_new_tokens=2, prefill_chunk_size=2)
    prefix.config._attn_implementation = "flash_attention_2"
    with refused("attention_pattern='prefix' needs a mask that the attention 'flash_attention_2' does not take"):
        prefix(ids)
    for fields, message in (
        ({"attention_pattern": "prefixed"}, "did you mean 'prefix'"),
        ({"attention_pattern": "prefix", "sliding_window": 4}, "leave sliding_window out"),
        ({"attention_pattern": "bidirectional", "sliding_window": 4}, "leave sliding_window out"),
    ):
        with refused(message):
            make_config(**fields)
