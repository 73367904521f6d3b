"""Write saved models with what they compute here, and check them under another version of transformers.

    python tests/saved_folders.py write FOLDER     with this package
    python tests/saved_folders.py check FOLDER     with torch and transformers alone: the code comes with the weights

`make test-oldest` does so with the versions that serving engines pin, and with the oldest that this package admits;
`make test-newest` with the newest.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_core_layers": 2, "num_loops": 3, "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip
MODELS = {
    "plain": {},
    "first": {"kv_sharing": "first", "num_prelude_layers": 1},
    "last": {"kv_sharing": "last", "num_coda_layers": 1},
    "mean": {"kv_sharing": "mean"},
    "gated": {"kv_sharing": "gated", "prefill_chunk": 2},
    "prelude_and_coda": {"num_prelude_layers": 1, "num_coda_layers": 2, "tie_word_embeddings": False},
    "inject": {"loop_connection": "inject_concat", "norm_between_loops": True, "num_prelude_layers": 1},
    "disco": {"loop_connection": "disco", "num_prelude_layers": 1},
    "hyper": {"loop_connection": "hyper", "hyper_gates": "shared", "loop_embedding": "sinusoidal"},
    "ouro": {"norm_placement": "sandwich", "norm_between_loops": True, "exit_gate": True, "qk_norm": True},
    "gelu": {"norm_type": "layernorm", "gated_mlp": False, "hidden_act": "gelu", "position_embedding": "learned"},
    "no_positions": {"position_embedding": "none", "attention_bias": True, "mlp_bias": True},
}
# The rows that a prompt is padded to: five, eight and three tokens.
PADDED = [[0, 0, 0, 7, 3, 9, 21, 4], [5, 6, 7, 8, 9, 10, 11, 12], [0, 0, 0, 0, 0, 31, 2, 17]]
GREEDY = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}


def answers(model) -> dict:
    """Tokens and numbers that show every way in which a model of these classes is called."""
    ids = torch.tensor(PADDED)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    found = {}

    def tokens(name, **settings):
        found[name] = model.generate(**batch, **GREEDY, **settings).tolist()

    tokens("generate")
    tokens("deeper", num_loops=5)
    tokens("beams", num_beams=3)
    rewrites = model.config.kv_sharing in ("last", "mean", "gated")
    if model.config.prefill_chunk is None:
        tokens("static cache", cache_implementation="static")
    tokens("rows", num_loops=torch.tensor([1, 4, 2]))
    tokens("halting", num_loops=6, halting={"rule": "kl", "kl_threshold": 0.05})
    if not rewrites:
        tokens("cut prompt", prefill_chunk_size=3)
        one = {"input_ids": ids[1:2], "attention_mask": batch["attention_mask"][1:2]}
        found["drafts"] = model.generate(**one, **GREEDY, draft_loops=1).tolist()
    with torch.no_grad():
        output = model(**batch, num_loops=2, output_hidden_states=True, logits_to_keep=2)
        found["logits"] = output.logits.flatten().tolist()
        found["hidden states"] = [state[1].sum().item() for state in output.hidden_states]
    model.train()
    if model.supports_gradient_checkpointing and model.config.prefill_chunk is None:
        model.gradient_checkpointing_enable()
    model(**batch, labels=ids.masked_fill(ids == 0, -100), use_cache=False).loss.backward()
    found["gradients"] = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def write(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedForSequenceClassification

    for name, fields in MODELS.items():
        torch.manual_seed(0)
        model = LoopedForCausalLM(LoopedConfig(**SIZES, **fields)).eval()
        model.save_pretrained(folder / name)
        (folder / name / "answers.json").write_text(json.dumps(answers(model)))
    torch.manual_seed(0)
    classifier = LoopedForSequenceClassification(LoopedConfig(**SIZES, num_labels=3)).eval()
    classifier.save_pretrained(folder / "classifier")
    (folder / "classifier" / "answers.json").write_text(json.dumps(classes(classifier)))


def classes(model) -> dict:
    with torch.no_grad():
        return {"logits": model(torch.tensor(PADDED)).logits.flatten().tolist()}


def compare(name: str, found: dict, expected: dict) -> None:
    for what, value in expected.items():
        if what in ("logits", "hidden states", "gradients"):
            here, there = torch.tensor(found[what]), torch.tensor(value)
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5, msg=lambda m, w=what: f"{name}, {w}: {m}")
        else:
            assert found[what] == value, f"{name}, {what}: {found[what]} where {value} is expected"


def check(folder: Path) -> int:
    """Compare every model of `folder` with its answers; the number of answers. AssertionError where one differs."""
    checks = 0
    for path in sorted(folder.iterdir()):
        auto = AutoModelForSequenceClassification if path.name == "classifier" else AutoModelForCausalLM
        model = auto.from_pretrained(path, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules.")  # not the package's
        expected = json.loads((path / "answers.json").read_text())
        compare(path.name, classes(model) if path.name == "classifier" else answers(model), expected)
        model.save_pretrained(path / "again")
        assert {file.name for file in path.glob("*.py")} <= {file.name for file in (path / "again").iterdir()}
        checks += len(expected)
    return checks


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    verb, place = sys.argv[1], Path(sys.argv[2])
    if verb == "write":
        write(place)
        print(f"written by transformers {transformers.__version__}")
    else:
        print(f"transformers {transformers.__version__}: {check(place)} answers of {len(MODELS) + 1} models are equal")
