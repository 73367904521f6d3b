"""A pretrained model converted is the same model at one loop, exactly; what cannot be exact is refused."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from dense_sources import FAMILIES, SIZES, logits_of, make_batch, make_source
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
)

from data_builders.tokenizers import hop_tokenizer
from looplab.cli import main
from looplab.convert import conversion
from looplab.convert.conversion import check_core, compare, convert, looped_config, to_looped
from modeling_looped import LoopedForCausalLM
from modeling_looped.frozen_looped import default_window
from toys import FP32

HALF = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * HALF,
        "long_factor": [1.0 + 0.5 * i for i in range(HALF)],
    },
}
CASES = {
    **{f"{family}-tied": (family, {"tie_word_embeddings": True}) for family in FAMILIES},
    **{f"{family}-untied": (family, {"tie_word_embeddings": False}) for family in FAMILIES},
    **{
        f"llama-{kind}": ("llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **rope}})
        for kind, rope in ROPES.items()
    },
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head_dim": ("llama", {"head_dim": 12, "num_key_value_heads": 4}),
    "llama-one-key": ("llama", {"num_key_value_heads": 1, "hidden_act": "gelu", "rms_norm_eps": 1e-2}),
    "mistral-head_dim": ("mistral", {"head_dim": 12}),
    "qwen2-theta": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
}


def in_float64(model):
    """The model in float64 throughout: the norms of these architectures compute in float32 whatever the dtype."""
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm)
    return model


@pytest.mark.parametrize("case", CASES)
def test_one_loop_is_the_source(case):
    """Logits equal to 1e-9 in float64, and the same model's in float32 to rounding, for every mapped field."""
    family, fields = CASES[case]
    source, batch = make_source(family, **fields), make_batch()
    exact = in_float64(source)
    looped = to_looped(exact, core=(2, 3))
    torch.testing.assert_close(logits_of(looped, batch), logits_of(exact, batch), rtol=0, atol=1e-9)
    torch.testing.assert_close(logits_of(to_looped(source, core=(2, 3)), batch), logits_of(source, batch), **FP32)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_loops_are_the_source_with_its_core_written_twice(family):
    exact, batch = in_float64(make_source(family)), make_batch()
    looped = to_looped(exact, core=(1, 3))
    twice = copy.deepcopy(exact)
    layers = list(twice.model.layers)
    twice.model.layers = nn.ModuleList(layers[:4] + layers[1:4] + layers[4:])
    if family.startswith("qwen"):
        twice.config.layer_types = 9 * exact.config.layer_types[:1]
    twice.config.num_hidden_layers = 9
    two = logits_of(looped, batch, num_loops=2)
    torch.testing.assert_close(two, logits_of(twice, batch, use_cache=False), rtol=0, atol=1e-9)
    assert (two - logits_of(looped, batch, num_loops=1)).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("core", [(0, 5), (0, 0), (5, 5)])
def test_any_core_gives_the_same_model_at_one_loop(family, core):
    exact, batch = in_float64(make_source(family)), make_batch()
    torch.testing.assert_close(logits_of(to_looped(exact, core), batch), logits_of(exact, batch), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_sources(family):
    """With a cache and a left-padded row; and the default loop count is the one asked for."""
    exact = in_float64(make_source(family, eos_token_id=None))
    batch = {name: make_batch()[name] for name in ("input_ids", "attention_mask")}
    looped = to_looped(exact, core=(2, 3), num_loops=2)
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = exact.generate(**batch, **settings)
    assert looped.generate(**batch, **settings, num_loops=1).equal(expected)
    two = looped.generate(**batch, **settings, num_loops=2)
    assert looped.generate(**batch, **settings).equal(two)
    assert not two.equal(expected)


def test_configuration_fields_that_logits_do_not_show():
    config = make_source(eos_token_id=[2, 5], attention_dropout=0.25, initializer_range=0.125, use_cache=False).config
    looped = looped_config(config, core=(1, 3), num_loops=4)
    for name in (
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "attention_dropout",
        "initializer_range",
        "use_cache",
    ):
        assert getattr(looped, name) == getattr(config, name), name
    assert looped.max_position_embeddings == 64
    assert (looped.num_prelude_layers, looped.num_core_layers, looped.num_coda_layers) == (1, 3, 2)
    assert looped.num_loops == 4
    assert looped_config(LlamaConfig(**SIZES, attention_dropout=None)).attention_dropout == 0.0


def test_default_core_is_the_depth_rule():
    assert check_core(None, 30) == default_window(30) == (13, 16)
    assert check_core(None, 1) == (0, 0)
    looped = to_looped(make_source())
    first, last = default_window(6)
    assert (looped.config.num_prelude_layers, looped.config.num_coda_layers) == (first, 5 - last)


def test_the_source_is_left_alone_and_shares_nothing():
    source = make_source("qwen3")
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    looped = to_looped(source.train())
    assert looped.training
    assert "num_loops" not in source.generation_config.to_dict()
    with torch.no_grad():
        for parameter in looped.parameters():
            parameter.zero_()
    assert all(tensor.equal(before[name]) for name, tensor in source.state_dict().items())


def test_a_tied_head_stays_tied_in_memory():
    for tie in (True, False):
        looped = to_looped(make_source(tie_word_embeddings=tie))
        assert (looped.lm_head.weight is looped.model.embed_tokens.weight) == tie


def test_a_head_that_differs_from_tied_embeddings_is_kept():
    """transformers does not tie two matrices that differ, whatever the configuration says."""
    source, batch = make_source(tie_word_embeddings=True), make_batch()
    source.lm_head.weight = nn.Parameter(torch.randn_like(source.lm_head.weight))
    looped = to_looped(source)
    assert looped.config.tie_word_embeddings is False
    torch.testing.assert_close(logits_of(looped, batch), logits_of(source, batch), **FP32)


REFUSED_CONFIGS = {
    "gpt2": (GPT2Config(), r"model_type='gpt2' cannot .* one transposed matrix; take a model of llama, mistral"),
    "gemma2": (Gemma2Config(), r"model_type='gemma2' cannot .* 1 \+ weight"),
    "mixtral": (MixtralConfig(), "model_type='mixtral' cannot .* mixtures of experts"),
    "qwen2_moe": (Qwen2MoeConfig(), "model_type='qwen2_moe' cannot .* mixtures of experts"),
    "layer_types": (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=4),
        r"layer_types=\['full_attention'.*'sliding_attention'\] cannot .* all layers have the same sliding window",
    ),
    "partial": (LlamaConfig(**SIZES, partial_rotary_factor=0.5), r"partial_rotary_factor=0.5 cannot .* whole heads"),
    "rope_type": (
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}),
        "rope_parameters={.*'proportional'.*} cannot .* take a model with one of default, linear",
    ),
    "quantised": (
        LlamaConfig(**SIZES, quantization_config={"quant_method": "fp8"}),
        "quantization_config=.*fp8.* cannot .* packed; take the checkpoint that was not quantised",
    ),
    "per_layer": (
        LlamaConfig(**SIZES, per_layer_config={1: {"intermediate_size": 16}}),
        "per_layer_config=.*16.* cannot .* differ in size",
    ),
}


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_what_cannot_be_exact_is_refused_by_name_and_value(name):
    config, message = REFUSED_CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        looped_config(config)


@pytest.mark.parametrize("core", [(3, 2), (-1, 2), (2, 6)])
def test_a_core_outside_the_layers_is_refused(core):
    with pytest.raises(ValueError, match=r"must be two layers A <= B of 0 \.\. 5, both inclusive"):
        to_looped(make_source(), core=core)


def test_tensors_that_do_not_fit_are_named():
    extra = make_source()
    extra.model.layers[3].self_attn.gate = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"no place for model\.core\.\d\.self_attn\.gate\.weight \(1 in all\)"):
        to_looped(extra)
    wrong = make_source()
    wrong.model.norm = nn.RMSNorm(5)
    with pytest.raises(ValueError, match=r"of another shape are model\.norm\.weight \(5,\) for \(32,\)"):
        to_looped(wrong)
    classifier = LlamaForSequenceClassification(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=r"no place for score\.weight .*does not have lm_head\.weight"):
        to_looped(classifier)
    mixed = make_source()
    mixed.model.norm.half()
    with pytest.raises(ValueError, match=r"several dtypes, \['torch.float16', 'torch.float32'\]"):
        to_looped(mixed)


# Folders.


@pytest.fixture
def source(tmp_path):
    """A saved Qwen2 in bfloat16, with a tokenizer and generation settings of its own."""
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    model = make_source("qwen2", vocab_size=len(tokenizer), tie_word_embeddings=True).bfloat16()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, eos_token_id=[2, 5])
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def left_behind(source) -> set:
    return {path.name for path in source.parent.iterdir()} - {"source"}


def test_the_folder_holds_the_model_its_tokenizer_and_its_generation_settings(source):
    done = convert(source, source.parent / "looped", core=(1, 3), num_loops=2)
    assert done.core == (1, 3)
    assert done.num_layers == 6
    assert done.identity.holds
    assert left_behind(source) == {"looped"}
    looped = LoopedForCausalLM.from_pretrained(done.folder)
    assert looped.dtype == torch.bfloat16
    assert looped.config.num_loops == looped.generation_config.num_loops == 2
    assert looped.generation_config.temperature == 0.7
    assert looped.generation_config.top_p == 0.8
    assert looped.generation_config.eos_token_id == [2, 5]
    weights = Qwen2ForCausalLM.from_pretrained(source).state_dict()
    for name, tensor in looped.state_dict().items():
        if name.endswith("o_proj.bias"):
            assert not tensor.any()
    assert looped.model.core[1].mlp.up_proj.weight.equal(weights["model.layers.2.mlp.up_proj.weight"])
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    assert tokenizer("e1 r2 r0") == AutoTokenizer.from_pretrained(source)("e1 r2 r0")


def test_settings_that_contradict_each_other_leave_the_ids(source):
    """Published files say a temperature with greedy search: transformers loads them and refuses to write them."""
    settings = {"do_sample": False, "temperature": 0.9, "eos_token_id": 7, "pad_token_id": 0}
    (source / "generation_config.json").write_text(json.dumps(settings))
    convert(source, source.parent / "looped", num_loops=3)
    kept = GenerationConfig.from_pretrained(source.parent / "looped")
    assert (kept.num_loops, kept.eos_token_id, kept.pad_token_id) == (3, 7, 0)
    assert kept.temperature != 0.9


def test_a_source_of_weights_and_config_alone_is_enough(source):
    """No tokenizer, then none in the folder; no generation settings, then the ids of the configuration."""
    for file in [*source.glob("tokenizer*"), source / "generation_config.json"]:
        file.unlink()
    assert convert(source, source.parent / "looped", num_loops=3).core == default_window(6)
    assert not list((source.parent / "looped").glob("tokenizer*"))
    settings = LoopedForCausalLM.from_pretrained(source.parent / "looped").generation_config
    assert (settings.num_loops, settings.eos_token_id, settings.pad_token_id) == (3, 2, 0)


def test_a_target_that_exists_is_refused(source):
    (source.parent / "looped").mkdir()
    (source.parent / "looped" / "mine").touch()
    with pytest.raises(ValueError, match="looped exists"):
        convert(source, source.parent / "looped")
    assert [path.name for path in (source.parent / "looped").iterdir()] == ["mine"]
    assert {path.name for path in source.parent.iterdir()} == {source.name, "looped"}


def test_another_architecture_is_refused_before_its_weights_are_read(tmp_path):
    GPT2Config().save_pretrained(tmp_path / "source")  # no weights beside it
    with pytest.raises(ValueError, match="model_type='gpt2' cannot"):
        convert(tmp_path / "source", tmp_path / "looped")
    (tmp_path / "source" / "config.json").write_text('{"model_type": "looop"}')  # unknown to transformers as well
    with pytest.raises(ValueError, match="model_type='looop' cannot"):
        convert(tmp_path / "source", tmp_path / "looped")
    Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=4).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"layer_types=.* cannot .* make all 'full_attention'"):
        convert(tmp_path / "source", tmp_path / "looped")
    Qwen2Config(**SIZES).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="two layers A <= B"):
        convert(tmp_path / "source", tmp_path / "looped", core=(4, 6))
    assert left_behind(tmp_path / "source") == set()


def test_a_loaded_model_of_another_architecture_is_refused():
    with pytest.raises(ValueError, match="model_type='gpt2' cannot"):
        to_looped(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model.layers.2.self_attn.q_proj.bias": None}, "1 missing keys .*layers.2.self_attn.q_proj.bias"),
        ({"score.weight": torch.ones(2, 32)}, r"1 unexpected keys \(score.weight\)"),
    ],
)
def test_a_checkpoint_that_its_configuration_does_not_describe_is_refused(source, changed, message):
    """transformers fills what is missing with random numbers, and only warns."""
    path = source / "model.safetensors"
    weights = {**load_file(path), **changed}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"not a whole Qwen2ForCausalLM: {message}"):
        convert(source, source.parent / "looped")
    assert left_behind(source) == set()


@pytest.mark.parametrize(
    "wrong", [{"norm_eps": 1e-3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 9990}}]
)
def test_a_wrong_mapping_leaves_nothing(source, monkeypatch, wrong):
    """The check sees an epsilon and a rotary base that are slightly off."""

    def mistaken(*args):
        config = looped_config(*args)
        for name, value in wrong.items():
            setattr(config, name, value)
        return config

    monkeypatch.setattr(conversion, "looped_config", mistaken)
    with pytest.raises(ValueError, match=r"does not equal .* at 1 loop: the largest logit difference is"):
        convert(source, source.parent / "looped")
    assert left_behind(source) == set()


def test_a_source_of_nan_is_refused(source):
    path = source / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match="largest logit difference is nan"):
        convert(source, source.parent / "looped")
    assert left_behind(source) == set()


@pytest.mark.parametrize("case", ["llama-biases", "qwen3-untied"])
def test_the_check_sees_every_tensor(case):
    """A tenth off half of the numbers of any tensor (off all, a norm behind it could undo it)."""
    family, fields = CASES[case]
    source = make_source(family, **fields)
    looped = to_looped(source)
    assert compare(source, looped).holds
    for name, tensor in looped.state_dict().items():
        before = tensor.clone()
        tensor.view(-1)[::2] *= 0.9
        assert not compare(source, looped).holds, name
        tensor.copy_(before)


def test_the_check_sees_a_rotary_embedding_that_is_wrong_at_far_positions_only():
    rope = {"rope_type": "default", "rope_theta": 1e9}
    source = make_source(rope_parameters=rope, max_position_embeddings=2**17)
    looped = to_looped(source)
    config = copy.deepcopy(looped.config)
    config.rope_parameters = {**rope, "rope_type": "linear", "factor": 1.05}
    wrong = LoopedForCausalLM(config).eval()
    wrong.load_state_dict(looped.state_dict())
    for angles in (source.model.rotary_emb.inv_freq, wrong.model.positions.inv_freq):
        angles[:2] = 0.0  # the fast ones show any mistake at once
    assert not compare(source, wrong).holds


def test_gguf_without_its_package_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"gguf_file='a\.gguf' needs the gguf package"):
        convert(tmp_path, tmp_path / "looped", gguf_file="a.gguf")


# The command.


def test_the_command_converts_and_says_what_it_measured(source, capsys):
    target = source.parent / "deep" / "looped"
    assert main(["convert", str(source), str(target), "--core", "1", "2", "--loops", "3"]) == 0
    what, measured = capsys.readouterr().out.splitlines()
    assert what == f"{target}: of 6 layers 1 to 2 are the core, num_loops=3 by default"
    assert measured.startswith("at 1 loop it is the source: the largest logit difference is ")
    assert LoopedForCausalLM.from_pretrained(target).config.num_loops == 3


def test_the_commands_mistakes_are_one_sentence(source, capsys):
    assert main(["convert", str(source.parent / "nowhere"), str(source.parent / "looped")]) == 2
    assert f"looped convert: there is no folder {source.parent / 'nowhere'}" in capsys.readouterr().err
    assert main(["convert", str(source), str(source.parent / "looped"), "--core", "4", "9"]) == 2
    assert "looped convert: core=(4, 9) must be two layers" in capsys.readouterr().err


STRANGER = """
import sys, warnings
warnings.simplefilter("error")
sys.path = [p for p in sys.path if "site-packages" in p or "lib/python" in p]  # no working folder, no checkout
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]  # nor an editable install
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import modeling_looped
    raise SystemExit("the repository is importable: the test shows nothing")
except ModuleNotFoundError:
    pass
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
batch = tokenizer(["e1 r2 r0", "e3 r1"], return_tensors="pt", padding=True)
settings = {"max_new_tokens": 4, "do_sample": False}
print([model.generate(**batch, **settings, num_loops=loops).tolist() for loops in (1, 2)])
"""


@pytest.mark.slow
def test_a_stranger_loads_the_folder_and_generates(source, tmp_path):
    convert(source, tmp_path / "looped")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "looped")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = json.loads(run.stdout.strip().splitlines()[-1])
    batch = AutoTokenizer.from_pretrained(source)(["e1 r2 r0", "e3 r1"], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 4, "do_sample": False}
    before = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32)
    after = LoopedForCausalLM.from_pretrained(tmp_path / "looped", dtype=torch.float32)
    assert one == before.generate(**batch, **settings).tolist()
    assert two == after.generate(**batch, **settings, num_loops=2).tolist()
    assert two != one
