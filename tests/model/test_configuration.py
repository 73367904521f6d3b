"""Laws of LoopedConfig: typed, strict, and lossless on disk."""

import math
import re
from typing import get_args

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_looped import LoopedConfig, LoopedForCausalLM
from toys import KV_SHARINGS, make_config, make_ids, make_model

CONFIG_ERRORS = (ValueError, StrictDataclassError)


@pytest.mark.parametrize("layers", [(0, 2, 0), (1, 1, 2), (2, 3, 1)])
@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
def test_slots_are_distinct_and_more_loops_only_append(layers, kv_sharing):
    prelude, core, coda = layers
    config = make_config(
        num_prelude_layers=prelude, num_core_layers=core, num_coda_layers=coda, num_loops=4, kv_sharing=kv_sharing
    )
    slots = config.kv_slots()

    def calls(num_loops):
        outside = [slots.slot("prelude", i) for i in range(prelude)] + [slots.slot("coda", i) for i in range(coda)]
        return outside + [slots.slot("core", i, loop) for loop in range(num_loops) for i in range(core)]

    if kv_sharing == "per_loop":
        assert calls(4) == list(range(prelude + coda + 4 * core)) == list(range(config.num_hidden_layers))
        assert calls(6)[: len(calls(4))] == calls(4)
    else:
        assert sorted(set(calls(4))) == list(range(prelude + coda + core)) == list(range(config.num_hidden_layers))


def test_num_hidden_layers_sets_the_loop_count():
    """Early-exit drafting and layer-shrinking tools assign num_hidden_layers; it is derived here, so it is loops."""
    config = make_config(num_prelude_layers=1, num_core_layers=2, num_loops=3)
    config.num_hidden_layers = 1 + 2 * 5
    assert config.num_loops == 5
    with pytest.raises(ValueError, match="whole number of loops"):
        config.num_hidden_layers = 4


def test_save_load_save_is_the_same_config(tmp_path):
    """Huginn's config passes one key twice on reload (peer trap 18)."""
    config = make_config(norm_placement="sandwich", rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    config.save_pretrained(tmp_path / "a")
    LoopedConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_slot_count_follows_an_edited_loop_count():
    """HRM-Text keeps its old slot count after a config edit, and generate then runs off the cache (peer trap 7)."""
    model = make_model(num_loops=2)
    model.config.num_loops = 5
    assert model.config.num_hidden_layers == 10
    assert model.generate(make_ids(1, 4), max_new_tokens=2).shape == (1, 6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_loops": 0}, "num_loops"),
        ({"num_loops": -1}, "num_loops"),
        ({"num_loops": 2.0}, "num_loops"),
        ({"num_loops": True}, "num_loops"),
        ({"num_core_layers": 0}, "num_core_layers"),
        ({"num_attention_heads": 5}, "does not divide hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"kv_sharing": "middle"}, "kv_sharing"),
        ({"loop_connection": "hyperr"}, "loop_connection"),
        ({"hidden_act": "sillu"}, "hidden_act"),
        ({"attention_dropout": 1.5}, "attention_dropout"),
        ({"exit_entropy_weight": -0.1}, "exit_entropy_weight"),
        ({"exit_loss": "mixed"}, "exit_loss"),
        ({"exit_gate": True, "num_coda_layers": 1}, "num_coda_layers=0"),
        ({"numloops": 3}, "did you mean 'num_loops'"),
        ({"temperature": 0.3}, "generation_config"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(CONFIG_ERRORS, match=message):
        make_config(**fields)


NUMBERS = [
    name for name, hint in LoopedConfig.__annotations__.items()
    if {int, float} & set(get_args(hint) or [hint]) and not name.endswith("_token_id")
]  # fmt: skip
# Under which every field is used.
USING = {
    "loop_connection": "hyper", "state_init": "normal", "exit_gate": True, "kv_sharing": "gated",
    "kv_gate": "low_rank", "loop_embedding": "learned", "norm_placement": "sandwich",
}  # fmt: skip


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NUMBERS),
    value=st.one_of(
        st.sampled_from(
            [-1, 0, -2.5, 0.5, 1, 7, 1e308, -1e308, math.nan, math.inf, -math.inf, True, "3", None, [1], {}]
        ),
        st.integers(-5, 70),
        st.floats(-2, 2),
    ),
    fields=st.sampled_from([{}, USING]),
)
def test_a_number_is_refused_by_name_or_gives_numbers(name, value, fields):
    """Nothing looked at epsilons and deviations: -1 and nan gave logits that are none."""
    config, refusal = made(**fields, **{name: value})
    if config is None:
        assert name in refusal or "head_dim" in refusal  # which follows from others
        return
    torch.manual_seed(0)
    model, ids = LoopedForCausalLM(config).eval(), make_ids(2, 5) % config.vocab_size
    output = model(ids, labels=ids)
    assert output.logits.isfinite().all()
    assert output.loss.isfinite()


def made(**fields) -> tuple[LoopedConfig | None, str]:
    """The configuration, or why there is none."""
    try:
        return make_config(**fields), ""
    except CONFIG_ERRORS as error:
        return None, str(error)


@pytest.mark.parametrize("rope", [
    {"rope_theta": -1.0}, {"rope_theta": math.nan}, {"rope_theta": 0}, {"rope_theta": math.inf},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": math.nan, "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0, math.inf, 1.0, 1.0],
     "long_factor": [1.0] * 4, "original_max_position_embeddings": 16},
])  # fmt: skip
def test_rotary_numbers_are_positive(rope):
    with pytest.raises(CONFIG_ERRORS, match=r"rope_parameters: .* must be a positive number"):
        make_config(rope_parameters={"rope_type": "default", **rope})


@pytest.mark.parametrize("token", [-1, 50, 10**9])
def test_a_padding_token_is_a_token(token):
    with pytest.raises(CONFIG_ERRORS, match=rf"pad_token_id \({token}\) must be None or a token"):
        make_config(pad_token_id=token)


def test_what_a_tool_hangs_on_a_config_is_not_saved(tmp_path):
    """It would be refused on loading, and the saved model with it."""
    model = make_model()
    model.config.foo_eps = 1.0
    model.save_pretrained(tmp_path)
    assert not hasattr(LoopedConfig.from_pretrained(tmp_path), "foo_eps")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_prelude_layers": 1, "gated_mlp": False},
        {"norm_between_loops": True},
        {"norm_between_loops": True, "num_coda_layers": 1},
    ],
)
def test_the_parallel_plans_name_modules_that_exist(fields):
    """The sharding plan named a final norm that the norm between loops had replaced, and not that one."""
    model = make_model(**fields)
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in model.model.named_modules()}
    assert set(model.config.base_model_tp_plan) <= names
    assert set(model.config.base_model_fsdp_plan) <= names
    assert {"norm", "core_norm"} & names == {"norm", "core_norm"} & set(model.config.base_model_fsdp_plan)


def test_an_assignment_is_checked_too():
    config = make_config()
    with pytest.raises(CONFIG_ERRORS, match="num_loops"):
        config.num_loops = 0


def assert_other_model(fields, changed):
    """A field that changes neither parameters nor logits would be a dead option."""

    def fingerprint(fields):
        model = make_model(**fields)
        sizes = sum(parameter.numel() for parameter in model.parameters())
        return sizes, model(make_ids()).logits.abs().sum()

    before, after = fingerprint(fields), fingerprint({**fields, **changed})
    assert before[0] != after[0] or not torch.isclose(before[1], after[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 60),
        ("hidden_size", 64),
        ("intermediate_size", 64),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 16),
        ("num_prelude_layers", 1),
        ("num_core_layers", 3),
        ("num_coda_layers", 1),
        ("num_loops", 4),
        ("norm_type", "layernorm"),
        ("norm_eps", 0.1),
        ("norm_placement", "sandwich"),
        ("norm_placement", "sandwich_sum"),
        ("embedding_multiplier", 3.0),
        ("norm_between_loops", True),
        ("hidden_act", "gelu"),
        ("gated_mlp", False),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("qk_norm", True),
        ("tie_word_embeddings", False),
        ("position_embedding", "learned"),
        ("position_embedding", "none"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10.0}),
        ("residual_init", "zero"),
        ("initializer_range", 0.1),
        ("embedding_init_std", 1.0),
        ("loop_connection", "inject_add"),
        ("loop_connection", "inject_concat"),
        ("loop_connection", "hyper"),
        ("loop_connection", "damped"),
        ("loop_connection", "disco"),
        ("kv_sharing", "natural"),
        ("loop_embedding", "learned"),
        ("loop_embedding", "sinusoidal"),
        ("state_init", "zeros"),
        ("state_init", "normal"),
        ("state_init", "truncated_normal"),
        ("exit_gate", True),
    ],
)
def test_every_field_changes_the_model(field, value):
    assert_other_model({}, {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_streams", 2),
        ("hyper_mixing", "identity"),
        ("hyper_mixing", "sinkhorn"),
        ("hyper_mixing", "static"),
        ("hyper_gates", "shared"),
        ("hyper_init", "euler"),
        ("hyper_init", "plain"),
        ("hyper_init", "zero"),
        ("max_num_loops", 5),
    ],
)
def test_every_field_of_hyper_connections_changes_the_model(field, value):
    assert_other_model({"loop_connection": "hyper"}, {field: value})


def test_a_norm_before_the_coda_changes_the_model():
    assert_other_model({"num_coda_layers": 1}, {"norm_before_coda": True})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_before_coda": True}, "norm_before_coda=True needs a coda"),
        ({"norm_placement": "sandwich_sum", "residual_init": "zero"}, "residual_init='zero' starts layers as"),
    ],
)
def test_norms_that_do_nothing_or_undo_another_field_are_refused(fields, message):
    with pytest.raises(CONFIG_ERRORS, match=message):
        make_config(**fields)


@pytest.mark.parametrize(("field", "value"), [("damped_beta", 0.2), ("damped_horizon", 1.5), ("num_loops", 5)])
def test_every_field_of_the_damped_loop_changes_the_model(field, value):
    assert_other_model({"loop_connection": "damped"}, {field: value})


@pytest.mark.parametrize(("field", "value"), [("disco_channel", "likeliest"), ("disco_weight", 0.2)])
def test_every_field_of_the_discrete_channel_changes_the_model(field, value):
    assert_other_model({"loop_connection": "disco"}, {field: value})


@pytest.mark.parametrize(("field", "value"), [("exit_loss", "gate"), ("exit_entropy_weight", 0.5)])
def test_every_field_of_the_exit_gate_changes_the_loss_only(field, value):
    before, after = (
        make_model(exit_gate=True, **fields)(make_ids(), labels=make_ids()) for fields in ({}, {field: value})
    )
    assert before.logits.equal(after.logits)
    assert (before.loss - after.loss).abs() > 0.01


@pytest.mark.parametrize("field", ["attention_dropout", "residual_dropout", "embedding_dropout"])
def test_dropouts_act_in_training_only(field):
    model = make_model(**{field: 0.5})
    plain = make_model()
    assert model(make_ids()).logits.equal(plain(make_ids()).logits)
    assert not model.train()(make_ids()).logits.equal(plain.train()(make_ids()).logits)
