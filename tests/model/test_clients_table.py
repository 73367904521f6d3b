"""docs/guides/clients.md, executed: a row works, here or in the test it names, or is refused in the words quoted."""

import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from datasets import Dataset
from optimum.quanto import freeze, qint8, quantize
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    QuantoConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

from data_builders.collator import LoopCollator, LoopCollatorCallback
from data_builders.depth import DepthSampler
from data_builders.tokenizers import hop_tokenizer
from families import make_frozen
from modeling_looped import LoopedForSequenceClassification, looped
from toys import FP32, KV_SHARINGS, ROOT, make_config, make_ids, make_model, open_gates

pytestmark = [
    # PEFT 0.21 asks transformers for the old name of activation checkpointing.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@dataclass(frozen=True)
class Row:
    """A row of the guide's tables: what it says of a client, and of what else."""

    client: str
    verdict: str
    notes: str

    @property
    def words(self) -> str | None:
        """What the client is refused with; None where it works."""
        if self.verdict == "works":
            return None
        quoted = re.fullmatch("refused: `(.+)`", self.verdict)
        assert quoted, f"{self.client}: {self.verdict!r} is neither `works` nor `refused: ` and words in backticks"
        return quoted[1]

    @property
    def tests(self) -> list[tuple[str, str]]:
        """(file, function) of the tests that it names."""
        return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", self.notes)


def read_rows() -> list[Row]:
    rows = []
    for table in re.findall(
        r"^\| client \|.*\n\|---.*\n((?:\|.*\n)+)", (ROOT / "docs/guides/clients.md").read_text(), re.MULTILINE
    ):
        for line in table.splitlines():
            client, verdict, notes = (cell.strip() for cell in line.strip("|").split(" | ", 2))
            rows.append(Row(client.replace("`", ""), verdict, notes.strip("| ")))
    return rows


ROWS = read_rows()
CHECKS: dict[str, Callable[[Path], None]] = {}


def client(name: str, *arguments):
    """Registers what tries a client, with arguments before the folder that it may write into."""

    def register(check):
        CHECKS[name] = partial(check, *arguments)
        return check

    return register


def of_each_sharing(name: str):
    def register(check):
        for kv_sharing in KV_SHARINGS:
            CHECKS[f'{name}, kv_sharing="{kv_sharing}"'] = partial(check, kv_sharing)
        return check

    return register


GREEDY = {"max_new_tokens": 4, "do_sample": False}
REPEATS = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]])


# Decoding


@client("another model drafts")
def draft_by_another(folder):
    model, ids = make_model(vocab_size=60), make_ids(1)
    got = model.generate(ids, num_loops=5, assistant_model=make_frozen("llama", dtype=torch.float32), **GREEDY)
    assert got.equal(model.generate(ids, num_loops=5, **GREEDY))


@client("a looped model drafts for another")
def draft_for_another(folder):
    model, ids = make_frozen("llama", dtype=torch.float32), make_ids(1)
    # transformers makes the draft's settings from those of the call.
    got = model.generate(ids, assistant_model=make_model(vocab_size=60, kv_sharing="last"), **GREEDY)
    assert got.equal(model.generate(ids, **GREEDY))


@of_each_sharing("drafts")
def draft_by_lookup(kv_sharing, folder):
    model = make_model(kv_sharing=kv_sharing)
    assert model.generate(REPEATS, prompt_lookup_num_tokens=2, **GREEDY).equal(model.generate(REPEATS, **GREEDY))


@of_each_sharing("prefill_chunk_size")
def cut_prompts(kv_sharing, folder):
    model, ids = open_gates(make_model(kv_sharing=kv_sharing)), make_ids()
    assert model.generate(ids, prefill_chunk_size=4, **GREEDY).equal(model.generate(ids, **GREEDY))


@client("drafts, a halting rule", {"prompt_lookup_num_tokens": 2})
@client("prefill_chunk_size, a halting rule", {"prefill_chunk_size": 4})
def halt_among_several_tokens(how, folder):
    """The rule that halts nothing is the text; another one would give other tokens."""
    model, threshold = make_model(), {"rule": "latent", "threshold": 0.3}
    model.generation_config.halting = threshold
    plain = model.generate(REPEATS, halting="fixed", **GREEDY)
    assert model.generate(REPEATS, halting="fixed", **how, **GREEDY).equal(plain)
    model.generate(REPEATS, **how, **GREEDY)


@of_each_sharing("continuous batching")
def batch_continuously(kv_sharing, folder):
    """At a load that cuts no prompt, and at one that does."""
    model, ids = make_model(num_loops=3, eos_token_id=49, kv_sharing=kv_sharing), make_ids(2, 20)
    expected = model.generate(ids, **GREEDY)[:, 20:].tolist()
    for most in (64, 16):
        outputs = model.generate_batch(
            inputs=ids.tolist(),
            generation_config=GenerationConfig(**GREEDY, eos_token_id=49),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=most),
        )
        assert sorted(output.generated_tokens for output in outputs.values()) == sorted(expected)


@client("continuous batching, loops or a halting rule of the generation config")
def batch_continuously_at_another_depth(folder):
    make_model().generate_batch(inputs=[[3, 4]], generation_config=GenerationConfig(max_new_tokens=1, num_loops=5))


@client('a looped frozen model with cache="last", prefill_chunk_size or drafts')
def cut_prompts_of_a_frozen_model(folder):
    with looped(make_frozen("llama"), (2, 3), 3, cache="last") as model:
        model.generate(make_ids(), prefill_chunk_size=4, **GREEDY)


@client("a looped frozen model, continuous batching")
def batch_a_frozen_model_continuously(folder):
    with looped(make_frozen("llama"), (2, 3), 3) as model:
        model.generate_batch(inputs=[[3, 4]], generation_config=GenerationConfig(max_new_tokens=1))


@client("depth per row or halting in a quantized cache")
def leave_a_quantized_cache(folder):
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    make_model().generate(make_ids(), num_loops=torch.tensor([1, 2, 3]), **settings, **GREEDY)


@client('pipeline("text-classification")')
def classify(folder):
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    torch.manual_seed(0)
    model = LoopedForSequenceClassification(make_config(vocab_size=len(tokenizer))).eval()
    (got,) = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")("e1 r2 r3")
    logits = model(tokenizer("e1 r2 r3", return_tensors="pt").input_ids).logits
    assert got["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)


# Training


def make_trainer(folder, model, collator=None, **settings) -> Trainer:
    arguments = TrainingArguments(
        folder, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, save_strategy="no",
        remove_unused_columns=False, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in make_ids(8)]
    callbacks = [] if collator is None else [LoopCollatorCallback(collator)]
    return Trainer(
        model, arguments, train_dataset=rows, callbacks=callbacks, data_collator=collator or default_data_collator
    )


def make_collator(collate=default_data_collator) -> LoopCollator:
    return LoopCollator(DepthSampler(kind="fixed", mean=2), collate)


@client("Trainer, persistent workers")
def train_with_persistent_workers(folder):
    make_trainer(
        folder, make_model(), make_collator(), dataloader_num_workers=1, dataloader_persistent_workers=True
    ).train()


@client("Trainer, a stream that one process reads for others")
def train_on_a_dispatched_stream(folder):
    """What the second of two processes would see, in one."""
    trainer = make_trainer(folder, make_model(), make_collator())
    trainer.train_dataset = Dataset.from_list([{"input_ids": [3, 4], "labels": [3, 4]}] * 8).to_iterable_dataset()
    with mock.patch.object(TrainingArguments, "world_size", 2):
        trainer.train()


@client("Trainer, label smoothing of an exit gate")
def smooth_exits(folder):
    make_trainer(folder, make_model(exit_gate=True), label_smoothing_factor=0.1).train()


@client("Trainer, label smoothing of shift_labels")
def smooth_shifted_labels(folder):
    def shifted(rows):
        batch = default_data_collator(rows)
        return {"input_ids": batch["input_ids"], "shift_labels": batch["labels"]}

    make_trainer(folder, make_model(), make_collator(shifted), label_smoothing_factor=0.1).train()


@client("Trainer, label smoothing of prompt tuning")
def smooth_prompt_tuning(folder):
    make_trainer(folder, adapt("PROMPT_TUNING", folder), label_smoothing_factor=0.1).train()


# Adapters

TARGETS = ["q_proj", "v_proj", "down_proj"]
SETTINGS = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 16},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "OFT": {"r": 0, "oft_block_size": 4},
    "POLY": {"n_tasks": 2, "n_skills": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "ROAD": {"group_size": 16},
    "SHADOW": {"target_modules": r".*core\.\d+$", "shadow_num_hidden_layers": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 4]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 50},
    "XLORA": {"hidden_size": 32},
}
TASKS = {"task_ids": torch.tensor([0, 1, 0])}
# Prompts of several tasks and adapters of several tasks are told apart by an argument of the call.
CALLS = {"MULTITASK_PROMPT_TUNING": TASKS, "POLY": TASKS, "XLORA": {"use_cache": False}}


def adapt(method: str, folder: Path, kv_sharing: str = "per_loop", **settings):
    """A toy with a fresh adapter of that method."""
    make_config_of = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[method]]
    known, usual = inspect.signature(make_config_of).parameters, {"target_modules": TARGETS, "r": 4}
    settings = {"task_type": "CAUSAL_LM"} | {name: usual[name] for name in usual if name in known} | settings
    model = make_model(kv_sharing=kv_sharing)
    if method == "XLORA":  # mixes adapters that it reads
        model.config.use_cache = False
        settings["adapters"] = {name: str(folder / name) for name in "01"}
        for name, path in settings["adapters"].items():
            adapt("LORA", folder, init_lora_weights=False, r=2 + int(name)).save_pretrained(path)
    return peft.get_peft_model(model, make_config_of(**settings | SETTINGS.get(method, {}))).eval()


def try_method(method: str, folder: Path, kv_sharing: str = "per_loop") -> None:
    """It runs at fewer and more loops than the configuration, learns, decodes as it computes, and reloads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's to its users
        use_method(method, folder, kv_sharing)


def use_method(method: str, folder: Path, kv_sharing: str) -> None:
    model, ids, call = adapt(method, folder, kv_sharing), make_ids(), CALLS.get(method, {})
    for num_loops in (1, 3, 5):
        assert model(input_ids=ids, num_loops=num_loops, **call).logits.isfinite().all()
    if method != "SHADOW":  # of whose last layer some weights are not used
        learns(model, ids, call)
    if method == "LILY":
        return  # mixes what its router makes of all tokens of the batch
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, num_loops=5, return_dict_in_generate=True, output_logits=True, **GREEDY | call
        )
        if method != "XLORA":
            assert output.loops_used.equal(torch.full((3, 4), 5))
        for step, logits in enumerate(output.logits):
            seen = output.sequences[:, : 7 + step]
            whole = model(input_ids=seen, attention_mask=torch.ones_like(seen), num_loops=5, **call | NO_CACHE)
            torch.testing.assert_close(logits, whole.logits[:, -1], **FP32)
        if method not in ("XLORA", "SHADOW"):
            model.save_pretrained(folder / "saved")
            again = peft.PeftModel.from_pretrained(make_model(kv_sharing=kv_sharing), folder / "saved").eval()
            expected = model(input_ids=ids, num_loops=5, **call).logits
            torch.testing.assert_close(again(input_ids=ids, num_loops=5, **call).logits, expected, **FP32)


NO_CACHE = {"use_cache": False}


def learns(model, ids: torch.Tensor, call: dict) -> None:
    call = {"input_ids": ids, "labels": ids, "num_loops": 4, **call | NO_CACHE}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=3e-3), []
    for _ in range(4):
        loss = model(**call).loss
        loss.backward()
        assert not [name for name, p in trained.items() if p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


for method in peft.PeftType:
    CHECKS[method.name] = partial(try_method, method.name)
for kv_sharing in KV_SHARINGS[1:]:
    CHECKS[f'PREFIX_TUNING, kv_sharing="{kv_sharing}"'] = partial(try_method, "PREFIX_TUNING", kv_sharing=kv_sharing)


def mix_adapters(**call) -> None:
    """Rows with another adapter each, and one without, are those rows alone."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=2, init_lora_weights=False)
    torch.manual_seed(1)
    model, ids, names = peft.get_peft_model(make_model(), config, "one"), make_ids(), ["one", "other", "__base__"]
    model.add_adapter("other", config)
    mixed = model.eval()(input_ids=ids, adapter_names=names, **call).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(input_ids=ids[row : row + 1], **call).logits
        else:
            model.set_adapter(name)
            alone = model(input_ids=ids[row : row + 1], **call).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, **FP32)
    assert not torch.allclose(mixed, make_model()(ids, **call).logits, atol=1e-2)


@client("several adapters in a batch (adapter_names)")
def mix_adapters_at_one_depth(folder):
    mix_adapters(num_loops=5)


@client("several adapters in a batch, a depth per row")
def mix_adapters_and_depths(folder):
    mix_adapters(num_loops=torch.tensor([2, 5, 3]))


@client("activated LoRA (alora_invocation_tokens)")
def activate_an_adapter(folder):
    """It acts from its tokens on, wherever they stand in a row."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=TARGETS, r=2, init_lora_weights=False, alora_invocation_tokens=[3, 4]
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(make_model(), config).eval()
    ids = torch.tensor([[5, 6, 3, 4, 7, 8], [9, 3, 4, 5, 6, 7]])
    moved = (model(input_ids=ids, num_loops=5).logits - make_model()(ids, num_loops=5).logits).abs().amax(-1)
    assert (moved > 1e-3).equal(torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]).bool())


# Quantisers


def load_quantized(folder: Path, config):
    make_quantizable().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def make_quantizable():
    """Trained, so to speak: what a fresh model zeroes is not zero."""
    model = open_gates(
        make_model(hidden_size=64, intermediate_size=128, exit_gate=True, residual_init="zero", kv_sharing="gated")
    )
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def assert_quantized(model, is_quantized: Callable[[nn.Module], bool]) -> None:
    """All seven linears of each layer and those of the gates are quantised, and the model is nearly what it was."""
    exact, ids = make_quantizable(), make_ids()
    linears = [path for path, module in exact.model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 2 * (7 + 2) + 1
    assert all(is_quantized(model.model.get_submodule(path)) for path in linears)
    for num_loops in (1, 5):
        want, got = (m(ids, labels=ids, num_loops=num_loops) for m in (exact, model))
        assert got.loss.item() == pytest.approx(want.loss.item(), rel=0.05)
        assert nn.functional.cosine_similarity(got.logits, want.logits, dim=-1).min() > 0.9
    assert model.generate(ids, num_loops=5, halting={"rule": "q_exit", "q": 0.5}, **GREEDY).shape == (3, 11)


def is_torchao(module) -> bool:
    return type(module.weight).__module__.startswith("torchao.")


@client("torchao")
def quantize_by_torchao(folder):
    assert_quantized(load_quantized(folder, TorchAoConfig(Int8WeightOnlyConfig())), is_torchao)


@client("quanto")
def quantize_by_quanto(folder):
    assert_quantized(load_quantized(folder, QuantoConfig(weights="int8")), lambda m: type(m).__name__ == "QLinear")
    model = make_quantizable()
    quantize(model, weights=qint8)
    freeze(model)
    assert_quantized(model, lambda m: type(m).__name__ == "QLinear")


@client("dynamic int8 of torch")
def quantize_dynamically(folder):
    model = torch.ao.quantization.quantize_dynamic(make_quantizable(), {nn.Linear})
    assert_quantized(model, lambda m: type(m) is not nn.Linear)


# Graphs

DATA_DEPENDENT = {
    "prefill_chunk on a longer call": ({"kv_sharing": "last", "prefill_chunk": 3}, {}),
    'state_init="normal"': ({"state_init": "normal", "loop_connection": "inject_add"}, {}),
    "a depth per row": ({}, {"num_loops": torch.tensor([2, 1, 2])}),
    "a halting rule": ({}, {"halting": "latent"}),
}


@torch.no_grad()
def compile_whole(fields: dict, call: dict, folder: Path, fullgraph: bool = True) -> None:
    model, ids = make_model(**fields, num_core_layers=1, num_loops=2), make_ids()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    got = compiled(ids, use_cache=False, **call).logits
    torch.testing.assert_close(got, model(ids, use_cache=False, **call).logits, **FP32)


@client("torch.compile of the whole, fullgraph=True too")
def compile_at_a_count(folder):
    compile_whole({}, {"num_loops": 4}, folder)


@client("torch.compile of the whole, what depends on data")
def compile_in_parts(folder):
    compile_whole(*DATA_DEPENDENT["a depth per row"], folder, fullgraph=False)


class Logits(nn.Module):
    def __init__(self, model, call: dict):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False, **self.call).logits


def export(fields: dict, call: dict, folder: Path) -> None:
    torch.export.export(Logits(make_model(**fields), call).eval(), (make_ids(),))


for name, (fields, call) in DATA_DEPENDENT.items():
    CHECKS[f"fullgraph=True, {name}"] = partial(compile_whole, fields, call)
    CHECKS[f"torch.export, {name}"] = partial(export, fields, call)


@client("flex attention, a depth per row or halting")
@torch.no_grad()
def leave_flex_attention(folder):
    make_model(attn="flex_attention")(make_ids(), num_loops=torch.tensor([1, 2, 3]))


# The table


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # inside transformers
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside torch
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
@pytest.mark.parametrize("row", [row for row in ROWS if row.client in CHECKS], ids=lambda row: row.client)
def test_a_row_does_what_it_says(row, tmp_path):
    if row.words is None:
        CHECKS[row.client](tmp_path)
        return
    with pytest.raises(Exception, match=re.escape(row.words)):
        CHECKS[row.client](tmp_path)


def test_every_row_is_executed_here_or_names_the_test_that_does():
    assert len({row.client for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.client in CHECKS or (row.words is None and row.tests), row.client
        for file, function in row.tests:
            assert f"def {function}(" in (ROOT / file).read_text(), (row.client, file, function)


def test_every_method_of_peft_has_a_row():
    assert {method.name for method in peft.PeftType} <= {row.client for row in ROWS}


def test_every_policy_has_a_row_where_it_matters():
    for name in ("prefill_chunk_size", "continuous batching"):
        assert {f'{name}, kv_sharing="{kv_sharing}"' for kv_sharing in KV_SHARINGS} <= {row.client for row in ROWS}
