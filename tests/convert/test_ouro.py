"""A published Ouro checkpoint, converted, is the published forward pass, loop by loop, written out in plain torch."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from data_builders.tokenizers import hop_tokenizer
from looplab.cli import main
from looplab.convert.conversion import convert
from modeling_looped import LoopedForCausalLM
from modeling_looped.losses_looped import exit_distribution
from ouro_reference import exit_probabilities, ouro_loops, random_weights
from toys import FP32, count_layer_calls

# What the published config.json holds, at toy sizes and with right special ids.
PUBLISHED = {
    "architectures": ["OuroForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_ouro.OuroConfig",
        "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "early_exit_threshold": 1.0,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_types": ["full_attention"] * 3,
    "max_position_embeddings": 64,
    "max_window_layers": 3,
    "model_type": "ouro",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "total_ut_steps": 4,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 61,
}


def write_source(folder, weights=None, **fields) -> dict:
    """A tiny checkpoint in the published layout; returns its configuration."""
    folder.mkdir()
    config = {**PUBLISHED, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config) if weights is None else weights, folder / "model.safetensors")
    return config


def converted(tmp_path, **fields) -> LoopedForCausalLM:
    write_source(tmp_path / "source", **fields)
    return LoopedForCausalLM.from_pretrained(convert(tmp_path / "source", tmp_path / "looped").folder).eval()


def exact(tmp_path, **fields) -> tuple[LoopedForCausalLM, dict]:
    """The converted model and the published tensors, both in float64."""
    model = converted(tmp_path, **fields).double()
    return model, {name: tensor.double() for name, tensor in random_weights({**PUBLISHED, **fields}).items()}


def make_ids(rows: int = 3, tokens: int = 9) -> torch.Tensor:
    return torch.randint(3, 61, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 4, "rms_norm_eps": 1e-2, "rope_theta": 1e6}])
def test_logits_and_gates_of_every_loop_are_the_published_ones(tmp_path, fields):
    (model, weights), ids = exact(tmp_path, **fields), make_ids()
    config = {**PUBLISHED, **fields}
    for row in range(3):
        logits, gates = ouro_loops(weights, config, ids[row], num_loops=6)
        for loops in range(1, 7):
            state = model.model(ids[row : row + 1], num_loops=loops).last_hidden_state
            torch.testing.assert_close(model.lm_head(state)[0], logits[loops - 1], **FP32)
            torch.testing.assert_close(model.model.exit_logits(state)[0].sigmoid(), gates[loops - 1].float(), **FP32)


@torch.no_grad()
def test_left_padded_rows_are_the_published_ones(tmp_path):
    """The released file is wrong for every row but the longest, as its cache gives one query a mask of length 1."""
    (model, weights), ids = exact(tmp_path), make_ids()
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :2] = 0
    padded = ids * mask
    for loops in (1, 2, 4):
        batch = model.model(padded, attention_mask=mask, num_loops=loops).last_hidden_state
        cache = model(padded[:, :-2], attention_mask=mask[:, :-2], num_loops=loops).past_key_values
        for token in (-2, -1):
            seen = mask[:, : ids.shape[1] + token + 1]
            step = model(padded[:, [token]], attention_mask=seen, past_key_values=cache, num_loops=loops).logits[:, 0]
            torch.testing.assert_close(step, model.lm_head(batch)[:, token], **FP32)
        for row, first in enumerate((0, 4, 2)):
            logits, gates = ouro_loops(weights, PUBLISHED, ids[row, first:], loops)
            torch.testing.assert_close(model.lm_head(batch)[row, first:], logits[-1], **FP32)
            torch.testing.assert_close(
                model.model.exit_logits(batch)[row, first:].sigmoid(), gates[-1].float(), **FP32
            )


@torch.no_grad()
def test_the_exit_is_where_the_reference_says_and_saves_its_layers(tmp_path):
    (model, weights), ids, q = exact(tmp_path), make_ids(6, 5), 0.6
    calls, used = count_layer_calls(model), []
    for row in ids:
        logits, gates = ouro_loops(weights, PUBLISHED, row, 4)
        p = exit_probabilities(gates)
        loops = int((p.cumsum(0)[:, -1] < q).sum()) + 1
        calls.clear()
        output = model(row[None], halting={"rule": "q_exit", "q": q}, logits_to_keep=1)
        assert len(calls) == 3 * loops
        torch.testing.assert_close(output.logits[0, 0], logits[loops - 1, -1], **FP32)
        torch.testing.assert_close(exit_distribution(gates.logit().T).T, p.float(), **FP32)
        used.append(loops)
    assert len(set(used)) > 1


def test_the_configuration_is_ouros(tmp_path):
    config = converted(tmp_path, early_exit_threshold=0.7, early_exit_step=2).config
    assert (config.norm_placement, config.norm_between_loops, config.exit_gate) == ("sandwich", True, True)
    assert (config.num_prelude_layers, config.num_core_layers, config.num_coda_layers, config.num_loops) == (
        0,
        3,
        0,
        4,
    )
    assert config.tie_word_embeddings is False
    settings = LoopedForCausalLM.from_pretrained(tmp_path / "looped").generation_config
    assert settings.num_loops == 3  # step 2, counted from 0
    assert settings.halting == {"rule": "q_exit", "q": 0.7}


def test_a_threshold_of_one_asks_for_no_rule(tmp_path):
    assert "halting" not in converted(tmp_path).generation_config.to_dict()


def test_checkpoints_in_several_files_and_bf16_keep_their_bits(tmp_path):
    config, source = write_source(tmp_path / "source"), tmp_path / "source"
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(config).items()}
    (source / "model.safetensors").unlink()
    parts = {"model-1.safetensors": sorted(weights)[:10], "model-2.safetensors": sorted(weights)[10:]}
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, source / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = LoopedForCausalLM.from_pretrained(convert(source, tmp_path / "looped").folder)
    assert model.dtype == torch.bfloat16
    assert model.model.exit_gate.weight.equal(weights["model.early_exit_gate.weight"])
    assert model.model.core[2].mlp.up_proj.weight.equal(weights["model.layers.2.mlp.up_proj.weight"])


def test_three_equal_special_ids_are_corrected_in_model_and_tokenizer(tmp_path):
    """The shipped files say 0 for bos, eos and pad, with which generation never stops (trap 38)."""
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    wrong = tokenizer.convert_ids_to_tokens(0)
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = wrong
    source = tmp_path / "source"
    write_source(source, bos_token_id=0, eos_token_id=0, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    )
    model = LoopedForCausalLM.from_pretrained(convert(source, tmp_path / "looped").folder)
    for holder in (model.config, model.generation_config, AutoTokenizer.from_pretrained(tmp_path / "looped")):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 0)


def test_special_ids_other_than_the_tokenizers_are_refused(tmp_path):
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    write_source(tmp_path / "source", eos_token_id=5, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="eos_token_id is 5 in the converted configuration and 1 in the tokenizer"):
        convert(tmp_path / "source", tmp_path / "looped")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.early_exit_gate.bias"), r"does not have model\.exit_gate\.bias"),
        (lambda weights: weights.pop("model.layers.1.input_layernorm_2.weight"), r"core\.1\.input_layernorm_2"),
        (lambda weights: weights.update({"model.extra": torch.zeros(1)}), r"no place for model\.extra"),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(3)}), r"another shape are model\.core_norm"),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(32).half()}), "several dtypes"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    weights = random_weights(PUBLISHED)
    change(weights)
    write_source(tmp_path / "source", weights)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "looped")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_fields_that_cannot_be_exact_are_refused(tmp_path, fields):
    write_source(tmp_path / "source", **fields)
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=.*cannot be converted exactly"):
        convert(tmp_path / "source", tmp_path / "looped")


def test_the_command_converts_an_ouro(tmp_path, capsys):
    write_source(tmp_path / "source")
    target = tmp_path / "looped"
    assert main(["convert", str(tmp_path / "source"), str(target), "--loops", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{target}: of 3 layers 0 to 2 are the core, num_loops=2 by default",
        "its tensors are the source's, bit for bit",
    ]
    model = LoopedForCausalLM.from_pretrained(target)
    assert model.config.num_loops == model.generation_config.num_loops == 2
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "other"), "--core", "0", "1"]) == 2
    assert "has no core to choose" in capsys.readouterr().err
