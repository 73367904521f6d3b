"""Laws of self-speculation: the text is that of plain decoding, and the draft's work is not done twice."""

import itertools
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from modeling_looped.cache_layers_looped import CACHE_NAME
from modeling_looped.halting_looped import Rule
from toys import FP32, count_layer_calls, make_ids, make_model

# All drafts are of three tokens, however unsure.
FORCED = {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.0}
CONNECTIONS = ["plain", "inject_add", "inject_concat", "hyper", "damped", "disco"]


def both(model, ids, draft_loops, **settings):
    """What plain decoding and speculation generate, with their scores and caches."""
    settings = {"max_new_tokens": 11, "return_dict_in_generate": True, "output_scores": True, **settings}
    plain = model.generate(ids, **settings)
    return plain, model.generate(ids, draft_loops=draft_loops, **{**FORCED, **settings})


def assert_same(plain, speculative):
    torch.testing.assert_close(speculative.sequences, plain.sequences, rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(speculative.scores), torch.stack(plain.scores), **FP32)
    lengths = [[int(layer.get_seq_length()) for layer in o.past_key_values.layers] for o in (plain, speculative)]
    assert lengths[1] == lengths[0]
    torch.testing.assert_close(speculative.loops_used, plain.loops_used)


def naive(model, ids, draft_loops, num_loops, new_tokens, num_drafted):
    """The twin: whole calls without a cache, few loops to draft and all of them to verify."""
    start, counts = ids.shape[1], []
    ids = torch.cat([ids, model(ids, num_loops=num_loops).logits[:, -1:].argmax(-1)], dim=1)
    while (length := ids.shape[1]) < start + new_tokens:
        drafted = ids
        for _ in range(min(num_drafted, start + new_tokens - length - 1)):
            logits = naive_draft(model, drafted, draft_loops, num_loops, verified=length - 1)
            drafted = torch.cat([drafted, logits[:, -1:].argmax(-1)], dim=1)
        said = model(drafted, num_loops=num_loops).logits[:, length - 1 :].argmax(-1)
        right = int((drafted[:, length:] == said[:, :-1]).cumprod(1).sum())
        counts.append((drafted.shape[1] - length, right))
        ids = torch.cat([ids, said[:, : right + 1]], dim=1)
    return ids, counts


def naive_draft(model, ids, draft_loops, num_loops, verified):
    """Logits after `draft_loops` loops, where the coda sees the first `verified` tokens after all loops."""
    few = {"num_loops": draft_loops}
    if model.model.connection.counts_loops:  # the draft is the first loops of so many, which is more than a depth
        few = {"num_loops": num_loops, "halting": After(draft_loops)}
    if not len(model.model.coda):
        return model(ids, **few).logits
    seen = []
    layer = model.model.coda[0]
    with layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        model(ids, num_loops=num_loops)

    def replace(module, args):
        return torch.cat([seen[0][:, :verified], args[0][:, verified:]], dim=1), *args[1:]

    with layer.register_forward_pre_hook(replace):
        return model(ids, **few).logits


class After(Rule):
    """Halt after so many loops."""

    def __init__(self, loops: int):
        self.loops = loops

    def step(self, memory, state, readout):
        count = torch.ones(len(state), 1) if memory is None else memory + 1  # (b, 1) loops so far
        return count, (count >= self.loops).expand(state.shape[:2])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kv_sharing", ["per_loop", "first", "natural"])
@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("sections", [(0, 0), (1, 0), (0, 1), (2, 1)])
def test_greedy_text_is_that_of_plain_decoding_and_of_the_naive_twin(kv_sharing, connection, sections):
    prelude, coda = sections
    model = make_model(
        kv_sharing=kv_sharing,
        loop_connection=connection,
        loop_embedding="sinusoidal",
        max_num_loops=5,
        num_prelude_layers=prelude,
        num_coda_layers=coda,
    )
    with torch.no_grad():
        model.model.loop_embedding.height.fill_(0.2)  # it starts at zero
    for draft_loops in (1, 3):
        plain, speculative = both(model, make_ids(1, 5), draft_loops, num_loops=4)
        assert_same(plain, speculative)
        ids, counts = naive(model, make_ids(1, 5), draft_loops, 4, 11, 3)
        assert torch.equal(speculative.sequences, ids)
        assert list(zip(speculative.drafted.tolist(), speculative.accepted.tolist(), strict=True)) == counts


def test_the_laws_saw_drafts_that_were_accepted_and_drafts_that_were_not():
    """A toy whose drafts are always or never right would prove nothing."""
    shares = []
    for connection in CONNECTIONS:
        _, speculative = both(make_model(loop_connection=connection, num_coda_layers=1), make_ids(1, 5), 1)
        shares.append(float(speculative.accepted.sum() / speculative.drafted.sum()))
    assert min(shares) < 0.5 < max(shares)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "fields",
    [
        {"position_embedding": "learned"},
        {"position_embedding": "none", "state_init": "normal", "loop_connection": "inject_add"},
        {"norm_placement": "sandwich", "norm_between_loops": True, "exit_gate": True},
        {"norm_type": "layernorm", "gated_mlp": False, "qk_norm": True, "num_coda_layers": 2},
        {"kv_sharing": "first", "num_prelude_layers": 1},
        {
            "norm_placement": "sandwich_sum",
            "norm_before_coda": True,
            "num_coda_layers": 1,
            "embedding_multiplier": 4.0,
        },
        {"kv_sharing": "natural", "loop_connection": "damped", "num_prelude_layers": 1, "num_coda_layers": 1},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_a_padded_prompt_and_every_kind_of_layer(attn, fields):
    model = make_model(attn=attn, **fields)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), make_ids(1, 5)], dim=1)
    mask = (padded != 0).long()
    plain, speculative = both(model, padded, 1, attention_mask=mask)
    assert_same(plain, speculative)
    bare = model.generate(padded[:, 3:], max_new_tokens=11, draft_loops=2, **FORCED)
    assert torch.equal(bare, plain.sequences[:, 3:])


@pytest.mark.parametrize("kv_sharing", ["per_loop", "first", "natural"])
def test_a_cache_goes_on_with_the_whole_text_or_with_new_tokens(kv_sharing):
    model, ids = make_model(kv_sharing=kv_sharing, num_coda_layers=1), make_ids(1, 4)
    more = make_ids(1, 3, seed=5)

    def turns(first, then, **given):
        cache = DynamicCache()
        text = model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=6, **first)
        text = torch.cat([text, more], dim=1)
        new = text[:, cache.get_seq_length() :] if given else text
        given = {"attention_mask": torch.ones_like(text)} if given else {}
        answer = model.generate(new, **{CACHE_NAME: cache}, max_new_tokens=6, **given, **then)
        return answer[:, -6:]

    draft = {"draft_loops": 1, **FORCED}
    for given in ({}, {"only_new": True}):
        want = turns({}, {}, **given)
        assert torch.equal(turns(draft, draft, **given), want)
        assert torch.equal(turns({}, draft, **given), want)


def test_slots_of_loops_that_are_not_asked_for_stay_level():
    """They are read again when a later call asks for as many loops as the first."""
    model, ids = make_model(), make_ids(1, 4)

    def turns(**draft):
        cache, text = DynamicCache(), ids
        for settings in ({"num_loops": 5}, draft, {"num_loops": 5}):
            text = model.generate(text, **{CACHE_NAME: cache}, max_new_tokens=5, **settings)
        assert len({int(layer.get_seq_length()) for layer in cache.layers}) == 1
        return text

    assert torch.equal(turns(draft_loops=1, **FORCED), turns())


def test_chunks_and_embeddings_of_the_prompt():
    model, ids = make_model(num_prelude_layers=1), make_ids(1, 7)
    want = model.generate(ids, max_new_tokens=8)
    assert torch.equal(model.generate(ids, max_new_tokens=8, draft_loops=1, prefill_chunk_size=3, **FORCED), want)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=8, draft_loops=1, **FORCED), want[:, 7:])


class Counting(LogitsProcessor):
    """Leaves one token: the length of the text."""

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([input_ids.shape[1]]), 0.0)


class Recorder(BaseStreamer):
    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.values.append("end")


class AfterToken(StoppingCriteria):
    """Stops at a token, and notes the lengths it was asked about."""

    def __init__(self, token):
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("place", range(8))
def test_it_stops_where_plain_decoding_stops(place):
    """At a token anywhere in a verified block: by eos, by a criterion and by length; streamer and cache agree.

    All drafts are accepted, so that nothing but the end ends a block.
    """
    model, ids, token = make_model(), make_ids(1, 5), 5 + place
    given = {"logits_processor": LogitsProcessorList([Counting()])}
    for settings in ({"eos_token_id": token}, {"max_new_tokens": place + 1}, {"eos_token_id": [token, 49]}):
        streams = [Recorder(), Recorder()]
        plain = both(model, ids, 1, **given, **settings, streamer=streams[0])[0]
        speculative = both(model, ids, 1, **given, **settings, streamer=streams[1])[1]
        assert_same(plain, speculative)
        assert len(plain.scores) == place + 1
        assert torch.equal(speculative.accepted, speculative.drafted)  # nothing is drafted after the end
        assert streams[1].values[-len(plain.scores) - 2 :] == streams[0].values[: len(plain.scores) + 2]
    criterion = AfterToken(token)
    assert_same(*both(model, ids, 1, **given, stopping_criteria=StoppingCriteriaList([criterion]), max_new_tokens=12))
    assert criterion.lengths == 2 * [6 + count for count in range(place + 1)]


def test_processors_see_the_text_that_plain_decoding_shows_them():
    model, ids = make_model(loop_connection="hyper"), make_ids(1, 5)
    assert_same(*both(model, ids, 1, repetition_penalty=1.7, no_repeat_ngram_size=2, min_new_tokens=9, eos_token_id=7))


def test_the_draft_is_processed_as_the_text_is():
    output = make_model().generate(
        make_ids(1, 5),
        max_new_tokens=12,
        draft_loops=1,
        logits_processor=LogitsProcessorList([Counting()]),
        return_dict_in_generate=True,
    )
    assert output.sequences[0, 5:].tolist() == list(range(5, 17))
    assert output.accepted.tolist() == output.drafted.tolist() == [10]


class Enumerated:
    """Stands in for the dice of `torch`: replays a path of outcomes, then takes the first possible one, and notes the
    probability of every outcome it passed."""

    def __init__(self, path):
        self.path, self.passed = list(path), []

    def draw(self, probabilities):
        outcome = self.path[len(self.passed)] if len(self.passed) < len(self.path) else 0
        while probabilities[outcome] == 0:
            outcome += 1
        self.passed.append((outcome, probabilities))
        return outcome

    def multinomial(self, probabilities, num_samples):
        weights = probabilities[0].double()
        return torch.tensor([[self.draw((weights / weights.sum()).tolist())]])

    def bernoulli(self, probability):
        return torch.tensor(bool(self.draw([1 - float(probability), float(probability)])))

    def next_path(self):
        """The next path of the tree, depth first, or None."""
        path = [outcome for outcome, _ in self.passed]
        while path:
            probabilities = self.passed[len(path) - 1][1]
            later = [outcome for outcome in range(path[-1] + 1, len(probabilities)) if probabilities[outcome] > 0]
            if later:
                return [*path[:-1], later[0]]
            path.pop()
        return None


@pytest.mark.parametrize("threshold", [0.0, 0.45], ids=["forced", "while sure"])
def test_sampled_text_has_the_distribution_of_plain_sampling(threshold, monkeypatch):
    """Exactly: every outcome of every die is followed, and the probabilities of the texts are summed."""
    model = make_model(vocab_size=4, num_core_layers=1, num_coda_layers=1, num_loops=2, loop_connection="inject_add")
    ids, settings = make_ids(1, 5) % 3 + 1, {"temperature": 1.3, "top_k": 3, "do_sample": True, "max_new_tokens": 3}

    def distribution(**draft):
        total, path = Counter(), []
        while path is not None:
            dice = Enumerated(path)
            monkeypatch.setattr(torch, "multinomial", dice.multinomial)
            monkeypatch.setattr(torch, "bernoulli", dice.bernoulli)
            text = model.generate(ids, **settings, **draft)
            chance = torch.tensor([probabilities[outcome] for outcome, probabilities in dice.passed]).prod()
            total[tuple(text[0, 5:].tolist())] += float(chance)
            path = dice.next_path()
        return total

    want = distribution()
    got = distribution(draft_loops=1, num_assistant_tokens=2, assistant_confidence_threshold=threshold)
    assert len(want) == 27  # three tokens out of four, three times
    assert got.keys() == want.keys()
    for text in want:
        assert got[text] == pytest.approx(want[text], abs=1e-5)


@pytest.mark.parametrize("sections", [(0, 0), (1, 1)])
def test_layer_calls_are_those_reported_and_a_half_is_never_run_twice(sections):
    prelude, coda = sections
    model, ids = make_model(num_prelude_layers=prelude, num_coda_layers=coda, num_loops=4), make_ids(1, 5)
    calls = count_layer_calls(model)
    output = model.generate(ids, max_new_tokens=12, draft_loops=1, return_dict_in_generate=True, **FORCED)
    prompt = prelude + 2 * 4 + coda
    assert output.layer_calls == len(calls) - prompt
    drafted, verified = int(output.drafted.sum()), len(output.drafted)
    # Each verified token passes the prelude and the first loop once; the coda runs once per draft and verification.
    assert output.layer_calls == (drafted + verified) * (prelude + 2) + verified * 2 * 3 + (drafted + verified) * coda
    assert int(output.accepted.sum()) + verified + 1 == 12
    assert bool((output.accepted <= output.drafted).all())


def test_a_draft_ends_where_it_is_unsure():
    model, ids = make_model(), make_ids(1, 5)
    settings = {"max_new_tokens": 12, "draft_loops": 1, "num_assistant_tokens": 5, "return_dict_in_generate": True}
    sure = model.generate(ids, **settings, assistant_confidence_threshold=0.0)
    unsure = model.generate(ids, **settings, assistant_confidence_threshold=1.0)
    assert torch.equal(sure.sequences, unsure.sequences)
    assert int(sure.drafted.max()) == 5
    assert int(unsure.drafted.max()) == 1


def test_the_setting_is_saved_and_can_be_overruled(tmp_path):
    model, ids = make_model(), make_ids(1, 5)
    model.generation_config.draft_loops = 2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True}

    def drafts(**given):
        return "drafted" in loaded.generate(ids, **settings, **given)

    assert drafts()
    assert not drafts(draft_loops=0)
    assert not drafts(generation_config=GenerationConfig(draft_loops=0, **settings))
    assert drafts(generation_config=GenerationConfig(**settings), draft_loops=1)
    with pytest.raises(ValueError, match="got 3 \\(num_return"):
        loaded.generate(make_ids(3, 5), **settings)
    assert loaded.generate(make_ids(3, 5), draft_loops=0, max_new_tokens=2).shape == (3, 7)


REFUSED = {
    "last": (r"draft_loops=1: kv_sharing='last'", {}, {"kv_sharing": "last"}),
    "rows": (r"one row, got 2", {"num_return_sequences": 2, "do_sample": True}, {}),
    "loops": (r"draft_loops=3 must be in 1 \.\. num_loops - 1 = 2", {"draft_loops": 3}, {}),
    "negative": (r"draft_loops=-1 must be in 1", {"draft_loops": -1}, {}),
    "kind": (r"must be an int.* got 1\.5", {"draft_loops": 1.5}, {}),
    "kind of several": (r"draft_loops must be an int.* got tensor", {"draft_loops": torch.tensor([1, 0])}, {}),
    "kind of zero": (r"draft_loops must be an int.* got False", {"draft_loops": False}, {}),
    "a part of a loop": (r"num_loops must be an int.* got 2\.9", {"num_loops": 2.9}, {}),
    "a count as text": (r"num_loops must be an int.* got '3'", {"num_loops": "3"}, {}),
    "a count of another kind": (r"num_loops as a tensor must be a LongTensor", {"num_loops": torch.tensor([2.9])}, {}),
    "halting": (r"halting ends loops early", {"halting": "kl"}, {}),
    "beams": (r"num_beams=2", {"num_beams": 2}, {}),
    "lookup": (r"prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 2}, {}),
    "early exit": (r"assistant_early_exit", {"assistant_early_exit": 2}, {}),
    "guidance": (r"guidance_scale", {"guidance_scale": 2.0}, {}),
    "schedule": (r"schedule='heuristic'", {"num_assistant_tokens_schedule": "heuristic"}, {}),
    "states": (r"output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}, {}),
    "static": (r"DynamicCache .*got StaticCache", {"cache_implementation": "static"}, {}),
    "no cache": (r"got NoneType", {"use_cache": False}, {}),
    "method": (r"leave custom_generate out", {"custom_generate": lambda *args, **kwargs: None}, {}),
    "synced": (r"leave synced_gpus out", {"synced_gpus": True}, {}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_honoured_is_refused_before_any_work(kind):
    message, settings, fields = REFUSED[kind]
    model = make_model(**fields)
    calls = count_layer_calls(model)
    with pytest.raises(ValueError, match=message):
        model.generate(make_ids(1, 5), **{"max_new_tokens": 4, "draft_loops": 1, **settings})
    assert calls == []


def test_other_drafters_and_caches_are_refused():
    model, ids = make_model(), make_ids(1, 5)
    with pytest.raises(ValueError, match="leave assistant_model out"):
        model.generate(ids, draft_loops=1, max_new_tokens=4, assistant_model=make_model())
    with pytest.raises(ValueError, match="StaticCache"):
        model.generate(
            ids, draft_loops=1, max_new_tokens=4, **{CACHE_NAME: StaticCache(config=model.config, max_cache_len=16)}
        )
    cache = DynamicCache()
    model.generate(ids, max_new_tokens=4, **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="nothing is left of the prompt"):
        model.generate(ids, draft_loops=1, max_new_tokens=4, **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="leave position_ids out"):
        model.generate(ids, draft_loops=1, max_new_tokens=4, **{CACHE_NAME: cache}, position_ids=torch.arange(5)[None])


def test_loops_of_the_one_row_may_be_a_tensor():
    model, ids = make_model(), make_ids(1, 5)
    want = model.generate(ids, num_loops=5, max_new_tokens=6)
    assert torch.equal(model.generate(ids, num_loops=torch.tensor([5]), draft_loops=4, max_new_tokens=6), want)
    for combination in itertools.product((1, 2), (1, 7)):
        draft_loops, tokens = combination
        settings = {"draft_loops": draft_loops, "num_assistant_tokens": tokens, "max_new_tokens": 6}
        assert torch.equal(model.generate(ids, num_loops=5, **settings), want)
