"""Laws of looping a window of a frozen model: the model itself, loop counts, experts and what is refused."""

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from families import EXPERT_FAMILIES, FAMILIES, make_frozen, make_tokens
from modeling_looped.cache_layers_looped import CACHE_NAME
from modeling_looped.frozen_looped import attach, default_window, detach, looped
from toys import make_model

# The toys are float64, so that equal sums are equal to 1e-9; eager attention, routers and rotary angles are computed
# in float32 by transformers itself, and so is generate's record of the logits.
F64 = {"rtol": 1e-9, "atol": 1e-9}


WINDOW = (2, 4)
ATTENTIONS = {family: ["sdpa", "eager"] for family in FAMILIES} | {"gemma2": ["eager"]}  # softcap: eager only
PAIRS = [(family, attn) for family, kinds in ATTENTIONS.items() for attn in kinds]


@torch.no_grad()
def logits_of(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def count_calls(model, layers):
    """A list that grows by the layer's index at every call."""
    calls = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, output, index=index: calls.append(index))
    return calls


@pytest.mark.parametrize(("family", "attn"), PAIRS)
def test_one_loop_or_beta_one_or_no_window_is_the_base_model_bit_for_bit(family, attn):
    model, ids = make_frozen(family, attn, torch.float32), make_tokens()
    base = logits_of(model, ids)
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    for mode in ("block", "layer"):
        for settings in ({"num_loops": 1}, {"num_loops": 4, "beta": 1}, {"window": (3, 2)}):
            with looped(model, **{"window": WINDOW, "mode": mode, **settings}):
                assert torch.equal(logits_of(model, ids), base), (mode, settings)
                assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens), (mode, settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_detaching_restores_the_model_even_after_an_error(family):
    model, ids = make_frozen(family, ATTENTIONS[family][0]), make_tokens()
    base, kind, attributes = logits_of(model, ids), type(model), set(vars(model))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with looped(model, WINDOW):
        assert not torch.allclose(logits_of(model, ids), base, atol=1e-3)
    with pytest.raises(ZeroDivisionError), looped(model, WINDOW):
        raise ZeroDivisionError
    assert torch.equal(logits_of(model, ids), base)
    assert type(model) is kind
    assert set(vars(model)) == attributes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert "num_loops" not in model.forward.__code__.co_varnames


@pytest.mark.parametrize("prefill", ["natural", "iterated"])
def test_a_window_of_one_layer_is_the_same_in_both_modes(prefill):
    model, ids = make_frozen("qwen3"), make_tokens()
    with looped(model, (3, 3), mode="block", prefill=prefill):
        block = logits_of(model, ids)
    with looped(model, (3, 3), mode="layer", prefill=prefill):
        assert torch.equal(logits_of(model, ids), block)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["block", "layer"])
def test_recorded_states_and_attentions_are_one_per_layer(family, mode):
    """transformers records them by hooks on the layers, which the extra passes call as well: without care a loop left
    12 attentions in the output of 6 layers, half of them over two sources of keys."""
    model, ids = make_frozen(family, "eager"), make_tokens()
    kinds = {"output_hidden_states": True, "output_attentions": True}
    kinds |= {"output_router_logits": True} if family in ("qwen3_moe", "mixtral") else {}
    with torch.no_grad():
        base = model(ids, **kinds)
        with looped(model, WINDOW, 3, mode=mode):
            ours = model(ids, **kinds)
    for kind in kinds:
        name = kind.removeprefix("output_")
        assert [each.shape for each in ours[name]] == [each.shape for each in base[name]]
    for below in range(WINDOW[0] + 1):
        assert torch.equal(ours.hidden_states[below], base.hidden_states[below])
    assert not torch.allclose(ours.hidden_states[WINDOW[1] + 1], base.hidden_states[WINDOW[1] + 1], atol=1e-3)


def test_the_recorded_state_above_the_window_is_what_left_the_loop():
    model, ids = make_frozen("llama"), make_tokens()
    with torch.no_grad(), looped(model, WINDOW, 3):
        ours = model(ids, output_hidden_states=True)
        state = ours.hidden_states[WINDOW[1] + 1]
        rope = model.model.rotary_emb(state, torch.arange(9)[None])
        top = model.model.layers[5](state, position_embeddings=rope, attention_mask=None)
        torch.testing.assert_close(model.lm_head(model.model.norm(top)), ours.logits, **F64)


def test_the_loop_count_is_an_argument_of_generate_and_of_its_configuration():
    model, ids = make_frozen("qwen2"), make_tokens()
    call = {"max_new_tokens": 4, "do_sample": False}

    def tokens(num_loops):
        with looped(model, WINDOW, num_loops, "naive"):
            return model.generate(ids, **call)

    of = {k: tokens(k) for k in (1, 2, 5)}
    assert not torch.equal(of[1], of[2])
    assert not torch.equal(of[2], of[5])
    with looped(model, WINDOW, 2, "naive"):
        assert torch.equal(model.generate(ids, **call), of[2])
        assert torch.equal(model.generate(ids, num_loops=5, **call), of[5])
        config = GenerationConfig(num_loops=5, **call)
        assert torch.equal(model.generate(ids, generation_config=config), of[5])
        assert torch.equal(model.generate(ids, generation_config=config, num_loops=1), of[1])
        assert torch.equal(model.generate(ids, **call), of[2]), "one call's count must not stay"


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", torch.tensor([1, 2])])
def test_a_loop_count_that_is_none_raises_before_any_work(value):
    model, ids = make_frozen("llama"), make_tokens()
    with looped(model, WINDOW):
        calls = count_calls(model, model.model.layers)
        with pytest.raises(ValueError, match="num_loops must be an int >= 1"):
            model(ids, num_loops=value)
        with pytest.raises(ValueError, match="num_loops must be an int >= 1"):
            model.generate(ids, num_loops=value)
        if not isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match="num_loops must be an int >= 1"):  # 0 was taken for the default
                model.generate(ids, generation_config=GenerationConfig(num_loops=value))
        assert not calls


def test_a_misspelt_loop_argument_raises():
    """Llama's forward would swallow it (trap 6)."""
    model, ids = make_frozen("llama"), make_tokens()
    with looped(model, WINDOW):
        with pytest.raises(TypeError, match="Did you mean 'num_loops'"):
            model(ids, num_loop=2)
        with pytest.raises(ValueError, match="num_loop"):
            model.generate(ids, num_loop=2)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize("mode", [None, "block"])
def test_extra_passes_use_the_experts_of_the_natural_pass(family, mode):
    """Without it a quarter of the tokens change experts after one pass."""
    model, ids = make_frozen(family), make_tokens()
    layer = model.model.layers[3]
    router = next(m for m in layer.modules() if type(m).__name__.endswith("Router"))
    free, used = [], []
    router.register_forward_hook(lambda module, args, output: free.append(output), prepend=True)
    with looped(model, WINDOW, 4, method="naive", mode=mode):
        assert model.loop.config.mode == (mode or "layer")
        router.register_forward_hook(lambda module, args, output: used.append(output))
        logits_of(model, ids)
    assert len(used) == 4
    for logits, weights, experts in used:
        assert torch.equal(logits, used[0][0])
        assert torch.equal(weights, used[0][1])
        assert torch.equal(experts, used[0][2])


def test_dense_models_loop_as_a_block():
    model = make_frozen("llama")
    assert looped(model, WINDOW).config.mode == "block"


@pytest.mark.parametrize(
    ("num_layers", "window"), [(28, (12, 15)), (36, (16, 19)), (30, (13, 16)), (6, (1, 4)), (2, (0, 1)), (1, (0, 0))]
)
def test_the_default_window_follows_the_depth_rule(num_layers, window):
    assert default_window(num_layers) == window


def test_the_default_window_is_the_models():
    assert looped(make_frozen("llama")).config.window == [1, 4]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"window": (2, 6)}, "ends beyond the last layer"),
        ({"window": (4, 2)}, "window must be"),
        ({"window": (-1, 2)}, "window must be"),
        ({"window": (1, 2, 3)}, "window must be"),
        ({"num_loops": 0}, "num_loops"),
        ({"method": "newton"}, "method"),
        ({"mode": "stack"}, "mode"),
        ({"cache": "mean"}, "cache"),
        ({"decode": "never"}, "decode must be"),
        ({"decode": -1}, "decode must be"),
        ({"prefill": "both"}, "prefill"),
        ({"beta": float("nan")}, "beta must be finite"),
        ({"step": 0.0}, "step must be > 0"),
        ({"step": 0.5, "method": "naive"}, "naive method has none"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(settings, match):
    model = make_frozen("llama")
    with pytest.raises(ValueError, match=match):
        looped(model, **settings)


def test_a_model_that_cannot_be_looped_is_told_why():
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2}
    mamba = MambaForCausalLM(MambaConfig(**sizes, state_size=4))
    bloom = BloomForCausalLM(BloomConfig(**{**sizes, "n_layer": 2}, n_head=2))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))
    refusals = [
        (mamba, "recurrent or convolution state"),
        (bloom, "ALiBi"),
        (t5, "encoder-decoder"),
        (make_model(), "a loop of their own"),
        (torch.nn.Linear(2, 2), "PreTrainedModel"),
    ]
    for model, match in refusals:
        with pytest.raises(ValueError, match=match):
            looped(model, (0, 1))


def test_attention_with_a_causal_mask_of_its_own_is_refused():
    """GPT-Neo cuts its mask out of a square by the number of keys: over two sources a token saw later ones, and the
    logits of a prompt were not those of its tokens."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 32}
    model = GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]]))
    with pytest.raises(ValueError, match="a causal mask of its own"):
        looped(model, (0, 1))


def test_other_memories_and_biases_are_refused_when_the_loop_is_made():
    """Jamba's Mamba layers take the KV cache by the same name, and MPT's ALiBi is called otherwise than Bloom's: both
    were only found out in the first call."""
    jamba = JambaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"layer 0 .*a convolution over tokens.* recurrent or convolution state"):
        looped(JambaForCausalLM(jamba), (0, 1))
    assert looped(JambaForCausalLM(jamba), (1, 1)).windows
    mpt = MptForCausalLM(MptConfig(vocab_size=20, d_model=16, n_heads=2, n_layers=2, max_seq_len=32))
    with pytest.raises(ValueError, match="ALiBi"):
        looped(mpt, (0, 1))


def test_experts_whose_choice_cannot_be_kept_are_refused():
    """Remote code routes by classes of its own name over a plain list: it looped as a dense block, routed freely."""
    model = make_frozen("llama")
    model.model.layers[3].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    with pytest.raises(ValueError, match=r"no module named \*Router"):
        looped(model, WINDOW)


def test_natural_prefill_needs_attention_with_masks():
    model = make_frozen("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="set_attn_implementation"):
        looped(model, WINDOW)


def test_gradient_checkpointing_is_refused():
    model = make_frozen("llama").train()
    model.activation_checkpointing_enable()
    with looped(model, WINDOW), pytest.raises(ValueError, match="gradient checkpointing"):
        model(make_tokens())


def test_cache_last_refuses_rows_it_cannot_overwrite():
    model = make_frozen("mistral")
    cache = DynamicCache(config=model.config)
    with looped(model, WINDOW, cache="last"), pytest.raises(ValueError, match="cache='last' overwrites rows"):
        model(make_tokens(), **{CACHE_NAME: cache})


def test_attaching_twice_and_detaching_twice_raise():
    model = make_frozen("llama")
    attach(model, WINDOW)
    with pytest.raises(ValueError, match="looped already"):
        attach(model, WINDOW)
    detach(model)
    with pytest.raises(ValueError, match="is not looped"):
        detach(model)


def test_a_loop_detaches_only_itself():
    """A loop that was never attached took the class from a model that another one loops, and left its hooks behind: a
    model that says it is not looped and is."""
    model, ids = make_frozen("llama"), make_tokens()
    base, stranger = logits_of(model, ids), looped(model, (1, 2))
    with looped(model, WINDOW):
        with pytest.raises(ValueError, match="not looped by this loop"):
            stranger.detach()
        with pytest.raises(ValueError, match="looped already"):
            stranger.attach()
        assert torch.equal(logits_of(model, ids, num_loops=1), base)
    with stranger, pytest.raises(ValueError, match="looped already"):
        stranger.attach()
    assert torch.equal(logits_of(model, ids), base)


def test_a_model_whose_weights_are_offloaded_hears_its_loop_count():
    """accelerate puts a forward of its own on the object, before the class's: the base model's behind it swallowed
    num_loops, and generate refused it."""
    model, ids = make_frozen("llama"), make_tokens()
    base = logits_of(model, ids)
    with looped(model, WINDOW, 5, "naive"):
        five = logits_of(model, ids)
    cpu_offload(model, execution_device="cpu")
    with looped(model, WINDOW, 3, "naive"):
        torch.testing.assert_close(logits_of(model, ids, num_loops=1), base, **F64)
        torch.testing.assert_close(logits_of(model, ids, num_loops=5), five, **F64)
        model.generate(ids, num_loops=2, max_new_tokens=2, do_sample=False)
    assert "forward" in vars(model)
    torch.testing.assert_close(logits_of(model, ids), base, **F64)


def test_what_wrapped_a_looped_forward_outlives_the_loop():
    """accelerate's prepare keeps the forward that it found, and the model without the loop has no `loop` to ask."""
    model, ids = make_frozen("llama", dtype=torch.float32), make_tokens()
    attach(model, WINDOW, 3, "naive")
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert not torch.equal(logits_of(prepared, ids), logits_of(prepared, ids, num_loops=1))
    one = logits_of(prepared, ids, num_loops=1)
    assert torch.equal(logits_of(detach(prepared), ids), one)
