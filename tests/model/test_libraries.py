"""What libraries around transformers do to a model, over all kinds of configurations: they replace its linears, take
its weights away between calls, recompute its layers, wait for its gradients and decide by its names."""

import copy
import json
import math
import re
import subprocess
import sys
from itertools import product

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import GenerationConfig, Trainer, TrainingArguments, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

from data_builders.collator import LoopCollator, LoopCollatorCallback
from data_builders.depth import DepthSampler
from data_builders.tokenizers import hop_tokenizer
from families import make_frozen
from modeling_looped import LoopedForCausalLM, LoopedForSequenceClassification, attach, looped
from modeling_looped.cache_looped import SHARINGS
from toys import FP32, make_config, make_ids, make_model, open_gates

pytestmark = pytest.mark.slow

OURO = {"norm_placement": "sandwich", "norm_between_loops": True}
VARIANTS = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True, "qk_norm": True, "residual_init": "zero"},
    "gpt2": {"norm_type": "layernorm", "gated_mlp": False, "position_embedding": "learned", "hidden_act": "gelu"},
    "ouro": {**OURO, "exit_gate": True, "tie_word_embeddings": False, "residual_init": "zero"},
    "ouro_gate": {**OURO, "exit_gate": True, "exit_loss": "gate"},
    "exits": {"exit_gate": True},
    "exits_gated": {"exit_gate": True, "kv_sharing": "gated"},
    "sections": {"num_prelude_layers": 1, "num_coda_layers": 1, "loop_connection": "inject_concat"},
    "huginn": {"num_prelude_layers": 1, "loop_connection": "inject_add", "state_init": "normal"},
    "hyper": {"loop_connection": "hyper", "loop_embedding": "learned", "num_prelude_layers": 1},
    "sinkhorn": {"loop_connection": "hyper", "hyper_mixing": "sinkhorn", "hyper_gates": "shared"},
    "static": {"loop_connection": "hyper", "hyper_mixing": "static", "loop_embedding": "learned"},
    "disco": {"loop_connection": "disco", "tie_word_embeddings": False, "num_prelude_layers": 1},
    "vectors": {"loop_embedding": "learned"},
    "waves": {"loop_embedding": "sinusoidal", "position_embedding": "none"},
    "first": {"kv_sharing": "first"},
    "last_chunks": {"kv_sharing": "last", "prefill_chunk": 3},
    "mean": {"kv_sharing": "mean"},
    "elementwise": {"kv_sharing": "gated", "prefill_chunk": 3},
    "low_rank": {"kv_sharing": "gated", "kv_gate": "low_rank", "kv_gate_rank": 4},
    "scalar": {"kv_sharing": "gated", "kv_gate": "scalar"},
}
peft_asks_for_the_old_name = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
over_variants = pytest.mark.parametrize("name", VARIANTS)


def make_variant(name: str):
    """A toy of that configuration, none of whose weights is at the value that it starts with. They are smaller than
    those of other toys: a product in another precision is to move the logits by less than the tolerance."""
    model = open_gates(make_model(**VARIANTS[name], initializer_range=0.1))
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.any() or "exit_gate" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model


def make_classifier(name: str):
    torch.manual_seed(0)
    return LoopedForSequenceClassification(make_config(**VARIANTS[name]))


def answers(model) -> dict[str, torch.Tensor]:
    """What a user reads of a causal model: logits, loss, new tokens, and loops until it halts."""
    ids = make_ids()
    found = {"logits": model(ids, use_cache=False).logits, "loss": model(ids, labels=ids, num_loops=2).loss}
    halting = {"rule": "q_exit", "q": 0.6} if model.config.exit_gate else {"rule": "latent", "threshold": 0.4}
    output = model.generate(
        ids, max_new_tokens=3, do_sample=False, halting=halting, return_dict_in_generate=True, output_logits=True
    )
    return found | {"new logits": torch.stack(output.logits), "loops": output.loops_used.float()}


def assert_same_answers(got: dict, expected: dict) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}", **FP32)


class Wrapper(nn.Module):
    """What a library puts in the place of a linear: it promises what nn.Linear does, (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.calls = linear, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.around(x)

    def around(self, x: torch.Tensor) -> torch.Tensor:
        output = self.linear(x)
        assert output.shape == (*x.shape[:-1], self.linear.out_features)
        return output


class Adapter(Wrapper):
    """LoRA with a fresh adapter: zero times something is added, in the shape that nn.Linear would have."""

    def around(self, x):
        return self.linear(x) + torch.zeros(*x.shape[:-1], self.linear.out_features)


class Recast(Wrapper):
    """A linear whose product is made in another precision."""

    def around(self, x):
        bias = None if self.linear.bias is None else self.linear.bias.double()
        return nn.functional.linear(x.double(), self.linear.weight.double(), bias).to(x.dtype)


def replace_linears(model, wrapper: type) -> list[nn.Module]:
    """Each module of which a library would ask `type(module) is nn.Linear`, replaced."""
    replaced = []
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            replaced.append(wrapper(module))
            model.set_submodule(path, replaced[-1])
    return replaced


# Linears and norms


@over_variants
@pytest.mark.parametrize("head", ["causal", "classifier"])
def test_what_is_a_linear_or_a_norm_is_exactly_that(name, head):
    """Quantisers ask for the type: subclasses stayed in full precision, without a word."""
    model = make_model(**VARIANTS[name]) if head == "causal" else make_classifier(name)
    for path, module in model.named_modules():
        for kind in (nn.Linear, nn.RMSNorm, nn.LayerNorm, nn.Embedding):
            assert type(module) is kind or not isinstance(module, kind), path


@torch.no_grad()
@over_variants
@pytest.mark.parametrize("wrapper", [Wrapper, Adapter, Recast])
def test_wrapped_linears_give_the_same_answers(name, wrapper):
    """An exit gate without its last axis was broadcast by whatever wraps a linear: a loss of 5.6 became 56."""
    model = make_variant(name)
    expected = answers(model)
    matrices = [key for key, p in model.named_parameters() if p.ndim == 2 and key.endswith("_proj.weight")]
    replaced = replace_linears(model, wrapper)
    assert len(replaced) >= len(matrices) + 1  # and the head
    assert_same_answers(answers(model), expected)
    assert all(wrapped.calls for wrapped in replaced)


@peft_asks_for_the_old_name
@over_variants
def test_a_fresh_adapter_on_all_linears_changes_nothing(name):
    model, ids = make_variant(name), make_ids()
    expected = answers(copy.deepcopy(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    assert_same_answers(answers(adapted.base_model.model.eval()), {k: v.detach() for k, v in expected.items()})
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if p.requires_grad) or "gate" in name


def first_value(key: str, fields: dict) -> float | None:
    """What a fresh weight is filled with, where that is one number and not transformers' own."""
    gate = {"elementwise": r"kv_gate\.of_\w+\.", "low_rank": r"kv_gate\.of_\w+\.1\.", "scalar": r"kv_gate\.of_\w+\."}
    end = r"_layernorm_2\." if fields.get("norm_placement") == "sandwich" else r"(o_proj|down_proj)\."
    values = {
        r"exit_gate\.weight": 0.0,
        r"exit_gate\.bias": -math.log(2),  # 1 / 3 after sigmoid, of three loops
        gate[fields.get("kv_gate", "elementwise")] + "weight": 0.0,
        gate[fields.get("kv_gate", "elementwise")] + "bias": -3.0,
        r"loop_embedding\.": 0.0,
        end: 0.0 if fields.get("residual_init") == "zero" else None,
    }
    return next((value for pattern, value in values.items() if re.search(pattern, key)), None)


@over_variants
def test_what_a_folder_lacks_starts_as_in_a_fresh_model(name, tmp_path):
    """The owner of a linear gives it its first values, also where the rest is loaded; what is loaded stays."""
    fresh, kept = make_model(**VARIANTS[name]).state_dict(), make_variant(name).state_dict()
    starts = {key: value for key in kept if (value := first_value(key, VARIANTS[name])) is not None}
    make_variant(name).save_pretrained(tmp_path, state_dict={key: kept[key] for key in kept if key not in starts})
    loaded = LoopedForCausalLM.from_pretrained(tmp_path).state_dict()
    for key, value in loaded.items():
        expected = torch.full_like(value, starts[key]) if key in starts else kept[key]
        assert value.equal(expected), key
        assert key not in starts or fresh[key].equal(expected), key
    if VARIANTS[name].keys() & {"exit_gate", "kv_gate", "residual_init", "loop_embedding"}:
        assert starts


# Offloading


@torch.no_grad()
@over_variants
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_gives_the_same_answers(name, where, tmp_path):
    """accelerate brings weights to their device around the forward of the module that holds them: a list of vectors
    has none, and its vectors stayed on the meta device."""
    model = make_variant(name)
    expected = answers(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert_same_answers(answers(model), expected)


TWO = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
torch.distributed.init_process_group("gloo")
answers = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, tp_plan="auto")
    shares = [p.to_local().numel() / p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    ids = torch.arange(1, 22).view(3, 7)
    with torch.no_grad():
        logits = model(ids, num_loops=5).logits
    tokens = model.generate(ids, num_loops=5, max_new_tokens=3, do_sample=False)
    answers[folder] = {"shares": shares, "logits": logits.tolist(), "tokens": tokens.tolist()}
if torch.distributed.get_rank() == 0:
    print("ANSWERS" + json.dumps(answers))
torch.distributed.destroy_process_group()
"""


@torch.no_grad()
def test_two_processes_share_the_weights(tmp_path):
    """Tensor parallelism over gloo: half of each projection in each process, and the answers of one."""
    (tmp_path / "two.py").write_text(TWO)
    models = {}
    for name in ("plain", "ouro", "waves", "first", "mean", "scalar", "sinkhorn"):
        models[str(tmp_path / name)] = model = make_variant(name)
        model.save_pretrained(tmp_path / name)
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(tmp_path / "two.py")]
    done = subprocess.run([sys.executable, *command, *models], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.partition("ANSWERS")[2])
    ids = torch.arange(1, 22).view(3, 7)
    for folder, model in models.items():
        assert set(answers[folder]["shares"]) == {0.5}
        torch.testing.assert_close(torch.tensor(answers[folder]["logits"]), model(ids, num_loops=5).logits, **FP32)
        assert (
            answers[folder]["tokens"] == model.generate(ids, num_loops=5, max_new_tokens=3, do_sample=False).tolist()
        )


# Gradients

# What no label teaches, see docs/guides/clients.md: DDP needs find_unused_parameters for these.
UNTAUGHT = {"ouro_gate": lambda name: "exit_gate" not in name}
# The discrete channel reads the head of a language model.
TRAINED = [
    (name, head) for head in ("causal", "classifier") for name in VARIANTS if (name, head) != ("disco", "classifier")
]


@pytest.mark.parametrize(("name", "head"), TRAINED)
def test_every_trained_parameter_gets_a_gradient(name, head):
    """DDP waits for all of them: the second step of a classifier with an exit gate raised."""
    model, ids = make_model(**VARIANTS[name]), make_ids()
    labels = ids
    if head == "classifier":
        model, labels = make_classifier(name), torch.tensor([0, 1, 0])
    untaught = UNTAUGHT.get(name, lambda name: False) if head == "causal" else lambda name: False
    model.train()(ids, labels=labels).loss.backward()
    without = {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {key for key, p in model.named_parameters() if p.requires_grad and untaught(key)}


def test_a_classifier_reads_a_folder_with_an_exit_gate_and_asks_it_when_to_halt(tmp_path):
    model, ids = make_variant("ouro"), make_ids()
    model.save_pretrained(tmp_path)
    classifier = LoopedForSequenceClassification.from_pretrained(tmp_path).eval()
    assert classifier.model.exit_gate.weight.equal(model.model.exit_gate.weight)
    halting = {"rule": "q_exit", "q": 0.6}
    want = model.model(ids, halting=halting).loops_used
    assert classifier.model(ids, halting=halting).loops_used.equal(want)
    classifier.save_pretrained(tmp_path / "again")
    again = LoopedForSequenceClassification.from_pretrained(tmp_path / "again")
    assert again.model.exit_gate.weight.equal(model.model.exit_gate.weight)


# Said of the loops that are to have none.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@over_variants
@pytest.mark.parametrize("num_grad_loops", [None, 1, 2])
def test_reentrant_checkpoints_have_the_same_gradients(name, num_grad_loops):
    """A checkpoint with `use_reentrant=True` has no gradient where none of its inputs has one, and the state that
    comes out of loops without gradient has none."""
    model, ids, gradients = make_variant(name).train(), make_ids(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": True})
        model.zero_grad()
        generator = torch.Generator().manual_seed(0) if not VARIANTS[name].get("prefill_chunk") else None
        model(ids, labels=ids, num_grad_loops=num_grad_loops, use_cache=False, generator=generator).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=lambda text, key=key: f"{key}: {text}", **FP32)


# Names


def make_trainer(folder, model, smoothing: float, **arguments) -> Trainer:
    settings = TrainingArguments(
        str(folder), label_smoothing_factor=smoothing, use_cpu=True, report_to=[], disable_tqdm=True, **arguments
    )
    return Trainer(model, settings)


def remote_model(tmp_path, monkeypatch):
    """Loaded as remote code into a process that knows no looped model."""
    make_model().save_pretrained(tmp_path / "smoothed_remotely")
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ):
        for key in [key for key, value in names.items() if "Looped" in str(value)]:
            monkeypatch.delitem(names, key)
    remote = get_class_from_dynamic_module("modeling_looped.LoopedForCausalLM", tmp_path / "smoothed_remotely")
    assert remote is not LoopedForCausalLM
    return remote.from_pretrained(tmp_path / "smoothed_remotely")


def adapted_model(config):
    return lambda *_: peft.get_peft_model(make_model(), config)


SMOOTHED = {
    "causal": lambda *_: make_model(),
    "remote": remote_model,
    "subclass": lambda *_: type("OwnModel", (LoopedForCausalLM,), {})(make_config()),
    "lora": adapted_model(peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)),
    "prefix": adapted_model(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
    "frozen": lambda *_: attach(make_frozen("llama", dtype=torch.float32), window=(2, 3), num_loops=3),
    "classifier": lambda *_: make_classifier("plain"),
}


@torch.no_grad()
@peft_asks_for_the_old_name
@pytest.mark.parametrize("kind", SMOOTHED)
def test_next_to_no_label_smoothing_is_none(kind, tmp_path, monkeypatch):
    """Trainer shifts the labels only for class names that it knows: the model learnt to copy its input."""
    model = SMOOTHED[kind](tmp_path, monkeypatch).eval()
    ids = make_ids()
    labels = torch.tensor([0, 1, 0]) if kind == "classifier" else ids
    losses = [
        make_trainer(tmp_path, model, smoothing).compute_loss(model, {"input_ids": ids, "labels": labels}).item()
        for smoothing in (0.0, 1e-6)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("exit_loss", ["expected", "gate"])
def test_label_smoothing_of_an_exit_gate_is_refused(exit_loss, tmp_path):
    """Trainer would compute the loss of the last loop alone, and of all weights."""
    model, ids = make_model(exit_gate=True, exit_loss=exit_loss), make_ids()
    trainer = make_trainer(tmp_path, model, 0.1, max_steps=1, save_strategy="no")
    trainer.train_dataset = [{"input_ids": row, "labels": row} for row in ids]
    with pytest.raises(ValueError, match=r"exit_gate=True nothing: leave out label_smoothing_factor"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_label_smoothing_of_shifted_labels_is_refused(tmp_path):
    """Trainer smooths `labels` alone: rows with `shift_labels` were trained without smoothing, without a word."""
    collator = LoopCollator(DepthSampler(kind="fixed", mean=2))
    rows = [{"input_ids": row[:-1].tolist(), "shift_labels": row[-1:].tolist()} for row in make_ids(8, 6)]
    trainer = make_trainer(tmp_path, make_model(), 0.1, max_steps=1, remove_unused_columns=False)
    trainer.train_dataset, trainer.data_collator = rows, collator
    trainer.add_callback(LoopCollatorCallback(collator))
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 smooths `labels`"):
        trainer.train()


def test_pipelines_know_the_models(caplog, capfd):
    """They print that a class they do not find is not supported."""
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    model = make_model(vocab_size=len(tokenizer))
    torch.manual_seed(0)
    classifier = LoopedForSequenceClassification(make_config(vocab_size=len(tokenizer)))
    for task, known in (("text-generation", model), ("text-classification", classifier)):
        pipeline(task, model=known, tokenizer=tokenizer, device="cpu")
    assert "not supported" not in capfd.readouterr().err + caplog.text


# Prompts that the host cuts

REWRITING = [name for name, sharing in SHARINGS.items() if sharing.rewrites]


@pytest.mark.parametrize(
    ("kv_sharing", "chunk"),
    [("per_loop", None), ("first", None), *product(REWRITING, [None, 1, 3])],
)
@pytest.mark.parametrize("where", ["call", "generation_config"])
def test_a_prompt_that_is_cut_gives_the_same_tokens_or_is_refused(kv_sharing, chunk, where):
    """`last`, `mean` and `gated` gave other tokens in silence; decoding token by token has no cuts of its own."""
    model, ids = open_gates(make_model(kv_sharing=kv_sharing, prefill_chunk=chunk)), make_ids()
    call = {"max_new_tokens": 4, "do_sample": False}
    whole = model.generate(ids, **call)
    if where == "call":
        call["prefill_chunk_size"] = 4
    else:
        model.generation_config.prefill_chunk_size = 4
    if kv_sharing not in REWRITING or chunk == 1:
        assert model.generate(ids, **call).equal(whole)
    else:
        with pytest.raises(ValueError, match=f"prefill_chunk_size=4: kv_sharing='{kv_sharing}' gives other tokens"):
            model.generate(ids, **call)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["first", "last"])
@pytest.mark.parametrize("decode", ["full", "prompt", 2])
@pytest.mark.parametrize(
    "cut", [{"prefill_chunk_size": 4}, {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 2}]
)
def test_a_frozen_model_gives_the_same_tokens_in_other_calls_or_refuses_them(cache, decode, cut):
    """What `cache="last"` keeps of a token was computed with the tokens of its call."""
    model, ids = make_frozen("llama"), torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4, 5]])
    call = {"max_new_tokens": 5, "do_sample": False}
    with looped(model, (2, 3), 3, cache=cache, decode=decode):
        if cache == "first":
            assert model.generate(ids, **cut, **call).equal(model.generate(ids, **call))
        else:
            with pytest.raises(ValueError, match="cache='last' gives other tokens where a text is cut"):
                model.generate(ids, **cut, **call)


def test_a_looped_frozen_model_is_not_batched_continuously():
    """Requests came back empty, with an error in the log."""
    model = make_frozen("llama")
    with looped(model, (2, 3), 3), pytest.raises(ValueError, match="cannot run a looped frozen model: use generate"):
        model.generate_batch(inputs=[[3, 4]], generation_config=GenerationConfig(max_new_tokens=1))


@peft_asks_for_the_old_name
@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig, peft.PrefixTuningConfig])
@pytest.mark.parametrize("settings", [
    {"draft_loops": 1}, {"assistant_early_exit": 4}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 2},
    {"assistant_model": make_model()},
], ids=lambda settings: next(iter(settings)))  # fmt: skip
def test_virtual_tokens_are_not_missed(config, settings):
    """Drafts and chunks call the model otherwise: virtual tokens were left out, and the text was another."""
    model = peft.get_peft_model(make_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    with pytest.raises(ValueError, match=r"a library prepares each call of this model, as PEFT"):
        model.generate(input_ids=make_ids(1, 5), max_new_tokens=4, **settings)


@peft_asks_for_the_old_name
def test_adapters_of_weights_draft_as_they_decode():
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config).eval()
    for num_loops in (3, 5):
        settings = {"input_ids": make_ids(1, 5), "num_loops": num_loops, "max_new_tokens": 8}
        assert model.generate(**settings, draft_loops=2).equal(model.generate(**settings))
