"""Models of every kind that serving engines can run, for the tests of what engines ask for and of vLLM itself."""

SERVED = {
    "per_loop": {},
    "first": {"kv_sharing": "first"},
    "prelude and coda": {"num_prelude_layers": 1, "num_coda_layers": 2},
    "first, prelude and coda": {"kv_sharing": "first", "num_prelude_layers": 2, "num_coda_layers": 1},
    "injection": {"loop_connection": "inject_add", "num_prelude_layers": 1, "norm_between_loops": True},
    "streams": {"loop_connection": "hyper", "max_num_loops": 8, "hyper_gates": "shared", "num_coda_layers": 1},
    "layernorm and gelu": {"norm_type": "layernorm", "gated_mlp": False, "hidden_act": "gelu"},
    "sandwich": {"norm_placement": "sandwich", "qk_norm": True, "loop_embedding": "sinusoidal"},
    "no positions, exit gate": {"position_embedding": "none", "exit_gate": True},
    "learned positions": {"position_embedding": "learned", "attention_bias": True},
    "sliding window": {"sliding_window": 4, "num_prelude_layers": 1},
    "zero start": {"loop_connection": "inject_concat", "state_init": "zeros"},
    "norms of sums": {"norm_placement": "sandwich_sum", "norm_before_coda": True, "num_coda_layers": 1},
    "embeddings multiplied": {"embedding_multiplier": 4.0, "attention_bias": True},
}
GREEDY = {"do_sample": False, "eos_token_id": None}
