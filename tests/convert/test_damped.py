"""A dense model converted with the damped start is its training-free blend at every loop count, and can be trained."""

import pytest
import torch
from dense_sources import FAMILIES, logits_of, make_batch, make_source
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from looplab.cli import main
from looplab.convert.conversion import convert, looped_name, to_looped
from modeling_looped import LoopedForCausalLM, looped
from toys import FP32, as_policy, stepwise

COUNTS = (1, 2, 3, 4, 8)
CORES = [(2, 3), (0, 5), (0, 0), (5, 5), (1, 4)]  # with and without prelude and coda
SOURCES = {name: (name, {}) for name in FAMILIES} | {"mistral-sliding": ("mistral", {"sliding_window": 3})}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def blend_of(source, core, num_loops, batch, **settings):
    with looped(source, core, num_loops, **settings):
        return logits_of(source, batch, use_cache=False)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("family", SOURCES)
def test_at_every_loop_count_it_is_the_training_free_blend(family, core):
    """Also where every loop has its own keys, which is the paper's prefill; at one loop it is the source."""
    name, fields = SOURCES[family]
    source, batch = make_source(name, **fields), make_batch()
    damped = to_looped(source, core, loop_connection="damped")
    policies = {"natural": damped, "iterated": as_policy(damped, kv_sharing="per_loop")}
    blends = {}
    for num_loops in COUNTS:
        for prefill, model in policies.items():
            blends[prefill, num_loops] = blend_of(source, core, num_loops, batch, prefill=prefill)
            actual = logits_of(model, batch, num_loops=num_loops, use_cache=False)
            torch.testing.assert_close(actual, blends[prefill, num_loops], **FP32)
    torch.testing.assert_close(blends["natural", 1], logits_of(source, batch), **FP32)
    one, two, eight = (blends["natural", num_loops] for num_loops in (1, 2, 8))
    assert min((one - two).abs().max(), (two - eight).abs().max()) > 1e-3  # or equality would prove nothing


@pytest.mark.parametrize(("beta", "horizon"), [(0.0, 1.0), (0.25, 1.5), (1.0, 1.0)])
def test_its_two_weights_are_the_blends_beta_and_horizon(beta, horizon):
    source, batch = make_source(), make_batch()
    damped = to_looped(source, (2, 3), loop_connection="damped")
    with torch.no_grad():
        damped.model.connection.steps.weights.copy_(torch.tensor([beta, horizon]))
    for num_loops in (2, 5):
        expected = blend_of(source, (2, 3), num_loops, batch, beta=beta, step=horizon / num_loops)
        torch.testing.assert_close(logits_of(damped, batch, num_loops=num_loops), expected, **FP32)


@torch.no_grad()
@pytest.mark.parametrize("num_loops", [2, 4])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_caches_of_every_kind_and_generate_go_the_same_way(attn, num_loops):
    """Cached equals uncached however the text is cut; a token leaves the source's entries, one for every layer."""
    source = make_source("qwen3")
    damped = to_looped(source, (2, 3), num_loops, "damped")
    damped.set_attn_implementation(attn)
    ids = make_batch()["input_ids"]
    whole = damped(ids, use_cache=False).logits
    for make_cache in (
        DynamicCache,
        lambda: DynamicCache(config=damped.config),
        lambda: StaticCache(damped.config, max_cache_len=16),
    ):
        for sizes in ((9,), (1,) * 9, (4, 1, 4)):
            cache = make_cache()
            torch.testing.assert_close(stepwise(damped, ids, sizes, cache), whole, **FP32)
    natural = source(ids, use_cache=True).past_key_values
    slots = [0, 1, 4, 5, 2, 3]  # the coda's come before the core's
    for layer in range(4):  # those above see what the loop has changed
        ours = cache.layers[slots.index(layer)].keys[:, :, :9]
        torch.testing.assert_close(ours, natural.layers[layer].keys, **FP32)
    batch = {name: make_batch()[name] for name in ("input_ids", "attention_mask")}
    written = damped.generate(**batch, **GREEDY)
    with looped(source, (2, 3), num_loops):
        assert written.equal(source.generate(**batch, **GREEDY))
    assert written.equal(damped.generate(**batch, **GREEDY, use_cache=False))
    assert written.equal(damped.generate(**batch, **GREEDY, cache_implementation="static", disable_compile=True))
    one = {name: value[:1] for name, value in batch.items()}
    assert damped.generate(**one, **GREEDY, draft_loops=1).equal(written[:1])


@torch.no_grad()
@pytest.mark.parametrize("kv_sharing", ["natural", "per_loop"])
def test_a_depth_of_its_own_and_a_halting_rule(kv_sharing):
    """A batch row takes the steps of its own count. What is read after k of K loops goes the rest of the way along the
    last slope: after the first loop, a halted row is the source."""
    source, batch = make_source(), make_batch()
    damped = as_policy(to_looped(source, (2, 3), 4, "damped"), kv_sharing=kv_sharing)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    mixed = damped(ids, attention_mask=mask, num_loops=torch.tensor([4, 1, 3]))
    for row, count in enumerate((4, 1, 3)):
        alone = damped(ids[row : row + 1], attention_mask=mask[row : row + 1], num_loops=count).logits
        torch.testing.assert_close(mixed.logits[row][mask[row].bool()], alone[0][mask[row].bool()], **FP32)

    states = []
    damped(ids, observe=lambda rows, state: states.append(state))
    inside = []
    with damped.model.core[0].register_forward_pre_hook(lambda module, args: inside.append(args[0])):
        damped(ids)
    natural = states[0]
    for loop in range(1, 4):
        slope = 4 * (inside[loop] - inside[loop - 1])  # the step before was a quarter of it
        end = inside[loop] + (4 - loop) / 4 * slope
        torch.testing.assert_close(states[loop - 1], 0.5 * natural + 0.5 * end, **FP32)
    halted = damped(ids, halting={"rule": "latent", "threshold": 1e9})  # after two loops, whatever they say
    assert halted.loops_used.unique().tolist() == [2]
    at_once = looped_source = source(ids).logits
    torch.testing.assert_close(damped(ids, num_loops=1).logits, looped_source, **FP32)
    assert not torch.allclose(halted.logits, at_once, atol=1e-3)


@pytest.mark.parametrize("kv_sharing", ["natural", "per_loop"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_when_layers_are_run_again(kv_sharing, reentrant):
    model = as_policy(to_looped(make_source(), (2, 3), 3, "damped"), kv_sharing=kv_sharing).train()
    ids = make_batch()["input_ids"]

    def gradients() -> dict:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5)
    assert (plain["model.connection.steps.weights"] != 0).all()  # both are learnt


@pytest.mark.parametrize(("kv_sharing", "prefill"), [("natural", "natural"), ("per_loop", "iterated")])
def test_gradients_are_those_of_the_training_free_blend(kv_sharing, prefill):
    """Of every weight, also through the keys that the first loop leaves to later ones."""
    source, ids = make_source(), make_batch()["input_ids"]
    damped = as_policy(to_looped(source, (2, 3), 3, "damped"), kv_sharing=kv_sharing)
    damped(ids, labels=ids, use_cache=False).loss.backward()
    with looped(source, (2, 3), 3, prefill=prefill):
        source(ids, labels=ids, use_cache=False).loss.backward()
    ours = {name: parameter.grad for name, parameter in damped.named_parameters()}
    for name, parameter in source.named_parameters():
        torch.testing.assert_close(ours[looped_name(name, (2, 3))], parameter.grad, rtol=1e-4, atol=1e-5)


def test_an_attention_without_such_masks_is_refused():
    model = to_looped(make_source(), (2, 3), 2, "damped")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="kv_sharing='natural' needs a mask over two sources of keys"):
        model(make_batch()["input_ids"])


@torch.no_grad()
def test_the_command_gives_the_damped_start_and_the_plain_one_by_a_flag(tmp_path, capsys):
    """Also to whoever loads the folder in another precision, or a plain folder as a damped one."""
    source, batch = make_source("mistral"), make_batch()
    source.save_pretrained(tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "damped", core=(2, 3), num_loops=3)
    assert done.blend[0] == 3
    assert done.blend[1].holds
    flags = ["--core", "2", "3", "--loops", "3", "--loop-connection", "plain"]
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "plain"), *flags]) == 0
    assert "blend" not in capsys.readouterr().out
    damped, plain = (LoopedForCausalLM.from_pretrained(tmp_path / name) for name in ("damped", "plain"))
    assert damped.config.num_loops == damped.generation_config.num_loops == 3
    torch.testing.assert_close(logits_of(damped, batch), blend_of(source, (2, 3), 3, batch), **FP32)
    assert plain.config.loop_connection == "plain"
    assert not torch.allclose(logits_of(plain, batch), logits_of(damped, batch), atol=1e-2)
    torch.testing.assert_close(logits_of(plain, batch, num_loops=1), logits_of(damped, batch, num_loops=1), **FP32)
    half = LoopedForCausalLM.from_pretrained(tmp_path / "damped", dtype=torch.bfloat16)
    blend = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    loops = {"num_loops": 1}, {"num_loops": 3}
    errors = [
        (logits_of(half, batch, **count) - blend_of(blend, (2, 3), count["num_loops"], batch)).abs().mean()
        for count in loops
    ]
    assert errors[1] <= 2 * errors[0] + 1e-3  # the steps add no error of their own


def test_a_loop_of_another_name_is_refused_before_any_work(tmp_path):
    make_source().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="loop_connection must be one of damped, plain, got 'hyper'"):
        convert(tmp_path / "source", tmp_path / "target", loop_connection="hyper")
    assert not (tmp_path / "target").exists()
