"""Random configurations, calls and junk for `test_properties.py`, as plain values that print and can be kept."""

from hypothesis import strategies as st

TOKENS, VOCABULARY = 7, 23

# Every choice of a field; what does not go together is refused, which is a law too.
CHOICES = {
    "num_prelude_layers": [0, 0, 1, 2],
    "num_core_layers": [1, 2],
    "num_coda_layers": [0, 0, 1],
    "num_loops": [1, 2, 3, 4],
    "num_key_value_heads": [None, 1, 2],
    "head_dim": [None, 6],
    "norm_type": ["rmsnorm", "layernorm"],
    "norm_placement": ["pre", "sandwich", "sandwich_sum"],
    "norm_between_loops": [False, True],
    "norm_before_coda": [False, True],
    "embedding_multiplier": [1.0, 3.0],
    "hidden_act": ["silu", "gelu", "relu"],
    "gated_mlp": [True, False],
    "attention_bias": [False, True],
    "mlp_bias": [False, True],
    "qk_norm": [False, True],
    "tie_word_embeddings": [True, False],
    "position_embedding": ["rope", "learned", "none"],
    "residual_init": ["normal", "zero"],
    "loop_connection": ["plain", "plain", "inject_add", "inject_concat", "hyper", "damped", "disco"],
    "loop_embedding": ["none", "none", "learned", "sinusoidal"],
    "max_num_loops": [None, 4, 6],
    "num_streams": [1, 2, 3],
    "hyper_mixing": ["diagonal", "identity", "sinkhorn", "static"],
    "hyper_gates": ["per_loop", "shared"],
    "hyper_init": ["norm_preserving", "norm_preserving", "euler", "plain", "zero"],
    "disco_channel": ["expected", "likeliest"],
    "state_init": ["embeddings", "embeddings", "zeros", "normal", "truncated_normal"],
    "kv_sharing": ["per_loop", "first", "natural", "last", "mean", "gated"],
    "kv_gate": ["elementwise", "low_rank", "scalar", "mean", "ema", "last"],
    "kv_gate_rank": [2],
    "prefill_chunk": [None, None, 1, 2, 3],
    "sliding_window": [None, None, 2, 3, 5],
    "exit_gate": [False, False, True],
    "exit_loss": ["expected", "gate"],
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
JUNK = st.one_of(
    st.sampled_from(
        [None, True, False, -1, 0, 10**9, 2.5, float("nan"), float("inf"), "", "x", "3", [], [1], {}, {"a": 1}]
    ),
    st.integers(-3, 40),
    st.text(max_size=4),
)


@st.composite
def configs(draw) -> dict:
    """Fields of a configuration. What most changes how a call runs is always drawn, and a few others."""
    names = {"num_loops", "kv_sharing", *draw(st.sets(st.sampled_from(sorted(CHOICES)), max_size=6))}
    fields = {name: draw(st.sampled_from(CHOICES[name])) for name in sorted(names)}
    if fields["kv_sharing"] in ("last", "mean", "gated") and draw(st.booleans()):
        fields["prefill_chunk"] = draw(st.sampled_from([1, 2, 3]))
    if fields.get("state_init", "embeddings") != "embeddings" and fields.get("loop_connection") in (
        None,
        "plain",
        "hyper",
        "damped",
        "disco",
    ):
        fields["loop_connection"] = "inject_add"  # the others would never read the input, as a warning says
    return fields


@st.composite
def calls(draw) -> dict:
    """A call: seeds, rows with padding on their left, a depth, a halting rule, and how a cached run is cut."""
    rows = draw(st.sampled_from([3, 3, 2, 1]))
    depths = st.lists(st.integers(1, 6), min_size=rows, max_size=rows)
    call = {
        "seed": draw(st.integers(0, 9)),
        "attention": draw(st.sampled_from(["eager", "sdpa"])),
        "padding": draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)),
        "pieces": draw(st.sampled_from([[7], [4, 1, 2], [1] * 7, [2, 3, 2], [6, 1], [3, 3, 1]])),
        "cache": draw(st.sampled_from(["dynamic", "static"])),
        "keep": draw(st.sampled_from([0, 1])),
        "num_loops": draw(st.one_of(depths, depths, st.integers(1, 6), st.none())),
    }
    if draw(st.booleans()):
        rule = draw(st.sampled_from(["kl", "kl_entropy", "latent", "q_exit", "fixed"]))
        threshold = draw(st.sampled_from([0.0, 0.03, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 5.0]))
        names = {"kl": "kl_threshold", "kl_entropy": "kl_threshold", "latent": "threshold", "q_exit": "q"}
        call["halting"] = {"rule": rule} | ({names[rule]: threshold} if rule in names else {})
    return call
