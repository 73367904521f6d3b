"""Laws of prefill chunks: a chunk is a call, whatever the padding, the depth of a row, the cache and the training."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, StaticCache

from toys import FP32, as_policy, count_layer_calls, make_config, make_ids, make_melt, make_model, open_gates, stepwise

every_attention = pytest.mark.parametrize("attn", ["eager", "sdpa"])
every_window = pytest.mark.parametrize("sliding_window", [None, 3])
rewriting = pytest.mark.parametrize("kv_sharing", ["last", "mean", "gated"])


def with_share(model, share: float):
    """Gates that let `share` of the latent through, whatever they see; 0 and 1 exactly."""
    for layer in model.model.core:
        for name, parameter in layer.kv_gate.named_parameters():
            torch.nn.init.constant_(parameter, {0.0: -200.0, 1.0: 200.0}[share] if name.endswith("bias") else 0.0)
    return model


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
SEQUENCES = [(0, 0, 4), (0, 4, 7), (0, 7, 9), (1, 0, 9)]  # row, begin, end


def gradients(model, ids, **kwargs):
    model.zero_grad()
    loss = model(ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
@rewriting
@every_attention
@pytest.mark.parametrize("num_loops", [1, 3, 5])
@pytest.mark.parametrize("chunk", [1, 3, 7, 9])
@every_window
def test_chunks_are_calls(kv_sharing, attn, num_loops, chunk, sliding_window):
    """With a cache or without, borders where prefill_chunk puts them: chunk 1 is decoding, one chunk is one call."""
    sizes = {"num_prelude_layers": 1, "num_coda_layers": 1, "sliding_window": sliding_window}
    whole = open_gates(make_model(attn=attn, kv_sharing=kv_sharing, **sizes))
    model = as_policy(whole, prefill_chunk=chunk)
    ids = make_ids()
    sizes = [min(chunk, 7 - start) for start in range(0, 7, chunk)]
    cache = DynamicCache(config=whole.config)
    expected = stepwise(whole, ids, sizes, cache, num_loops=num_loops)
    for cached in (False, True):
        outputs = model(ids, num_loops=num_loops, use_cache=cached)
        torch.testing.assert_close(outputs.logits, expected, **FP32)
        assert outputs.loops_used.tolist() == [[num_loops] * 7] * 3
        assert (outputs.past_key_values is not None) == cached
    following = make_ids(seed=4)[:, :2]
    torch.testing.assert_close(
        model(following[:, :1], past_key_values=outputs.past_key_values, num_loops=num_loops).logits,
        whole(following[:, :1], past_key_values=cache, num_loops=num_loops).logits,
        **FP32,
    )


@torch.no_grad()
@rewriting
def test_other_borders_are_another_model(kv_sharing):
    model = open_gates(make_model(kv_sharing=kv_sharing))
    logits = [as_policy(model, prefill_chunk=chunk)(make_ids()).logits for chunk in (1, 3, None)]
    assert (logits[0] - logits[1]).abs().max() > 0.05
    assert (logits[1] - logits[2]).abs().max() > 0.05


@rewriting
@pytest.mark.parametrize("chunk", [2, 5])
def test_no_token_sees_a_later_one(kv_sharing, chunk):
    model = open_gates(make_model(kv_sharing=kv_sharing, prefill_chunk=chunk))
    embeds = model.get_input_embeddings()(make_ids(1)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, 3].sum().backward()
    seen = embeds.grad[0].abs().sum(-1) > 0
    assert seen.tolist() == [True] * 4 + [False] * 3


@torch.no_grad()
@rewriting
@every_attention
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("chunk", [2, 3])
@every_window
def test_left_padding_does_not_move_the_borders(kv_sharing, attn, static, chunk, sliding_window):
    """Chunks counted over columns would cut a padded row at other tokens than the same row alone."""
    fields = {"kv_sharing": kv_sharing, "sliding_window": sliding_window, "num_prelude_layers": 1}
    model = open_gates(make_model(attn=attn, prefill_chunk=chunk, **fields))
    ids = make_ids()
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :3], mask[1, :3] = 0, 0
    padded[2, :2], mask[2, :2] = 0, 0
    logits = model(padded, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[1, 3:], model(ids[1:2, 3:]).logits[0], **FP32)
    torch.testing.assert_close(logits[2, 2:], model(ids[2:, 2:]).logits[0], **FP32)
    kwargs = {"max_new_tokens": 5, "do_sample": False} | ({"cache_implementation": "static"} if static else {})
    batch = model.generate(padded, attention_mask=mask, **kwargs)
    assert batch[0].equal(model.generate(ids[:1], **kwargs)[0])
    assert batch[1, 3:].equal(model.generate(ids[1:2, 3:], **kwargs)[0])
    assert batch[2, 2:].equal(model.generate(ids[2:, 2:], **kwargs)[0])


@torch.no_grad()
@rewriting
def test_beams_and_crops_work_on_a_cache_filled_in_chunks(kv_sharing):
    model = open_gates(make_model(kv_sharing=kv_sharing, prefill_chunk=1))
    ids = make_ids()
    kwargs = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert model.generate(ids, **kwargs).equal(model.generate(ids, use_cache=False, **kwargs))
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-3)
    continued = model(ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(continued, model(ids).logits[:, 4:], **FP32)


def test_a_prepared_mask_and_an_engine_are_refused():
    model = make_model(kv_sharing="last", prefill_chunk=3)
    with pytest.raises(ValueError, match="prefill_chunk=3 cuts this call"):
        model(make_ids(), attention_mask=torch.ones(3, 1, 7, 7, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="engine that packs requests"):
        model(make_ids(), block_table=torch.zeros(1))
    for kv_sharing in ("per_loop", "first", "natural"):
        with pytest.raises(StrictDataclassError, match="prefill_chunk=3 has no meaning"):
            make_config(kv_sharing=kv_sharing, prefill_chunk=3)
    with pytest.raises(StrictDataclassError, match="prefill_chunk must be an integer >= 1"):
        make_config(kv_sharing="last", prefill_chunk=0)


@torch.no_grad()
def test_decoding_in_a_static_cache_keeps_its_shapes():
    """A mask that grew with every token made a compiled decoding compile again for each; only a call that is cut needs
    the mask of real tokens."""
    model, ids = open_gates(make_model(kv_sharing="gated", prefill_chunk=3)), make_ids()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    shapes = []
    model.model.register_forward_pre_hook(
        lambda m, args, kw: shapes.append(kw["attention_mask"].shape), with_kwargs=True
    )
    kwargs = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    static = model.generate(ids, cache_implementation="static", **kwargs)
    assert shapes == [(3, 7)] + [(3, 1, 1, 11)] * 4
    assert static.equal(model.generate(ids, **kwargs))


@torch.no_grad()
@rewriting
@pytest.mark.parametrize("chunk", [1, 3, 8, 16])
def test_a_packed_sequence_is_what_it_is_alone(kv_sharing, chunk):
    """Within one chunk the causal mask keeps sequences apart; through the cache between chunks they saw each other."""
    model, ids = open_gates(make_model(kv_sharing=kv_sharing, prefill_chunk=chunk)), make_ids(2, 9)
    logits = model(ids, position_ids=PACKED, use_cache=False).logits
    for row, begin, end in SEQUENCES:
        alone = model(ids[row : row + 1, begin:end]).logits
        torch.testing.assert_close(logits[row : row + 1, begin:end], alone, **FP32)
    torch.testing.assert_close(model(ids, position_ids=PACKED[1:] + 2).logits, model(ids).logits, **FP32)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_packed_sequences_is_that_of_each_alone(checkpointing):
    model, ids = make_melt(exit_gate=True, prefill_chunk=3).train(), make_ids(2, 9)
    with torch.no_grad():
        model.model.exit_gate.weight.normal_()
    labels = ids.roll(-1, 1).where(PACKED.roll(-1, 1) != 0, -100)  # the last token of a sequence predicts nothing
    losses, kept = [], []
    for row, begin, end in SEQUENCES:
        losses.append(model(ids[row : row + 1, begin:end], labels=ids[row : row + 1, begin:end]).loss)
        kept.append(end - begin - 1)
    if checkpointing:
        model.activation_checkpointing_enable()
    loss = model(ids, position_ids=PACKED, shift_labels=labels, use_cache=False).loss
    torch.testing.assert_close(loss, (torch.stack(losses) * torch.tensor(kept)).sum() / sum(kept), **FP32)


@pytest.mark.parametrize("asked", [{"use_cache": True}, {"halting": "kl"}, {"num_loops": torch.tensor([2, 1])}])
def test_packed_sequences_are_refused_what_needs_rows(asked):
    model, ids = make_model(kv_sharing="last", prefill_chunk=3), make_ids(2, 9)
    with pytest.raises(ValueError, match="position_ids start anew within a row"):
        model(ids, position_ids=PACKED, **{"use_cache": False, **asked})


@torch.no_grad()
@rewriting
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("static", [False, True])
def test_a_row_of_its_own_depth_equals_that_row_alone(kv_sharing, chunk, static):
    """With one row per token nothing is missing when a token leaves early: what it leaves is a whole row."""
    model = open_gates(make_model(kv_sharing=kv_sharing, prefill_chunk=chunk))
    ids, depths = make_ids(), torch.tensor([2, 4, 1])

    def cache():
        return StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)

    together = cache()
    logits = stepwise(model, ids, (4, 1, 2), together, num_loops=depths)
    for row, depth in enumerate(depths.tolist()):
        alone = cache()
        expected = stepwise(model, ids[row : row + 1], (4, 1, 2), alone, num_loops=depth)
        torch.testing.assert_close(logits[row : row + 1], expected, **FP32)
        for kept, own in zip(together.layers, alone.layers, strict=True):
            torch.testing.assert_close(kept.keys[row : row + 1], own.keys, **FP32)
            torch.testing.assert_close(kept.values[row : row + 1], own.values, **FP32)


@torch.no_grad()
@rewriting
def test_rows_that_halt_by_a_rule_equal_rows_of_that_depth(kv_sharing):
    model = open_gates(make_model(kv_sharing=kv_sharing, prefill_chunk=3, num_loops=6))
    ids, rule = make_ids(6), {"rule": "latent", "threshold": 0.36}
    outputs = model(ids, halting=rule, logits_to_keep=1, use_cache=True)
    used = outputs.loops_used[:, -1]
    assert len(set(used.tolist())) > 1
    assert (outputs.loops_used[:, :6] == 6).all()  # chunks without a token to decide on run all loops
    for row, loops in enumerate(used.tolist()):
        cache = DynamicCache(config=model.config)
        model(ids[row : row + 1, :6], past_key_values=cache, num_loops=6)
        alone = model(ids[row : row + 1, 6:], past_key_values=cache, num_loops=loops)
        torch.testing.assert_close(outputs.logits[row : row + 1], alone.logits, **FP32)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 2, 3])
def test_a_padded_row_halts_in_a_batch_as_it_does_alone(chunk):
    """Its last token is in another chunk than the others' where borders are counted from the first real token."""
    model = open_gates(make_model(kv_sharing="gated", prefill_chunk=chunk, num_loops=6))
    ids, rule = make_ids(3, 8), {"rule": "latent", "threshold": 0.36}
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :2] = 0
    kwargs = {"halting": rule, "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    batch = model.generate(ids * mask, attention_mask=mask, **kwargs)
    for row, padding in enumerate([0, 3, 2]):
        alone = model.generate(ids[row : row + 1, padding:], **kwargs)
        assert batch.sequences[row, padding:].equal(alone.sequences[0])
        assert batch.loops_used[row].equal(alone.loops_used[0])


@torch.no_grad()
def test_rows_that_left_do_no_work_in_any_chunk():
    model = make_melt(prefill_chunk=4)
    calls = count_layer_calls(model)
    model(make_ids(), num_loops=torch.tensor([1, 3, 2]))
    assert [rows for _, rows in calls] == [3, 3, 2, 2, 1, 1] * 2


@rewriting
@pytest.mark.parametrize("chunk", [2, 3])
@every_window
def test_gradients_go_through_the_rows_of_earlier_chunks_unless_cut(kv_sharing, chunk, sliding_window):
    """Against a stepwise run whose cache is kept in the graph, and one whose cache is detached between calls."""
    fields = {"kv_sharing": kv_sharing, "sliding_window": sliding_window}
    model = open_gates(make_model(prefill_chunk=chunk, **fields)).train()
    whole = as_policy(model, prefill_chunk=None).train()
    ids = make_ids()
    sizes = [min(chunk, 7 - start) for start in range(0, 7, chunk)]
    for cut in (False, True):
        loss, got = gradients(model, ids, cut_chunks=cut)
        cache, logits, start = DynamicCache(config=whole.config), [], 0
        for size in sizes:
            logits.append(whole(ids[:, start : start + size], past_key_values=cache).logits)
            start += size
            for layer in cache.layers if cut else []:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        whole.zero_grad()
        expected = whole.loss_function(logits=torch.cat(logits, 1), labels=ids, vocab_size=50)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), **FP32)
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(got[name], parameter.grad, **FP32)


@rewriting
@pytest.mark.parametrize("exit_gate", [False, True])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@every_window
def test_recomputed_chunks_have_the_same_gradients(kv_sharing, exit_gate, cut, reentrant, sliding_window):
    """transformers takes the cache away from checkpointed layers, which would make every chunk forget the others."""
    fields = {"kv_sharing": kv_sharing, "exit_gate": exit_gate, "sliding_window": sliding_window}
    model = open_gates(make_model(prefill_chunk=3, **fields)).train()
    loss, expected = gradients(model, make_ids(), cut_chunks=cut)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    calls = count_layer_calls(model)
    again, got = gradients(model, make_ids(), cut_chunks=cut)
    assert len(calls) == 2 * 3 * 3 * 2  # forward and recomputation of 3 chunks of 3 loops of 2 layers
    torch.testing.assert_close(again, loss, **FP32)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, **FP32)
    assert all(layer.gradient_checkpointing for layer in model.model.core)


@pytest.mark.parametrize("chunk", [None, 3])
def test_the_first_loops_can_run_without_gradient_in_every_chunk(chunk):
    model = make_melt(prefill_chunk=chunk).train()
    loss, got = gradients(model, make_ids(), num_grad_loops=1)
    full, expected = gradients(model, make_ids())
    torch.testing.assert_close(loss, full, **FP32)
    assert set(got) == set(expected)
    assert not torch.allclose(got["model.core.0.mlp.up_proj.weight"], expected["model.core.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("depths", [3, torch.tensor([2, 3, 1])], ids=["one depth", "own depths"])
def test_the_expected_loss_reads_all_loops_of_all_chunks(padded, depths):
    """Against one call whose chunks are as long as it is."""
    model = make_melt(exit_gate=True, gates_open=False, prefill_chunk=3)
    with_share(model, 1.0)  # an open gate gives the same output at every chunk length
    with torch.no_grad():
        model.model.exit_gate.weight.normal_()
    whole = as_policy(model, prefill_chunk=None)
    whole.load_state_dict(model.state_dict())
    ids, mask = make_ids(), torch.ones(3, 7, dtype=torch.long)
    labels = ids.clone()
    if padded:
        mask[1, :3] = 0
        labels[1, :4] = -100  # a padding token, which predicts the fourth, reads anything
    losses = [m(ids, attention_mask=mask, labels=labels, num_loops=depths).loss for m in (model, whole)]
    torch.testing.assert_close(*losses, **FP32)


def test_labels_and_a_halting_rule_need_one_chunk():
    model = make_melt(exit_gate=True, prefill_chunk=3)
    with pytest.raises(ValueError, match="leave out the halting rule"):
        model(make_ids(), labels=make_ids(), halting="kl")


def test_a_generator_cannot_be_replayed():
    model = make_melt(state_init="normal", prefill_chunk=3).train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="leave generator out"):
        model(make_ids(), labels=make_ids(), generator=torch.Generator())
