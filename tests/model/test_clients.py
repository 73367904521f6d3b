"""Stock tools work on the model unmodified: Trainer, TRL, PEFT, pipeline, lm-evaluation-harness, torch.compile."""

import json

import lm_eval
import peft
import pytest
import torch
from datasets import Dataset
from lm_eval.tasks import TaskManager
from transformers import Trainer, TrainingArguments, pipeline, set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from data_builders.collator import LoopCollator, LoopCollatorCallback
from data_builders.depth import DepthSampler
from data_builders.tokenizers import hop_tokenizer, train_byte_bpe
from toys import FP32, make_ids, make_model


class Depths(Trainer):
    """Stock Trainer that writes down the depth of every step."""

    def compute_loss(self, model, inputs, **kwargs):
        self.depths.append(inputs["num_loops"])
        return super().compute_loss(model, inputs, **kwargs)


def make_trainer(folder, max_steps=8, **arguments):
    set_seed(0)
    model = make_model(pad_token_id=0).train()
    rows = [{"input_ids": row[:-1].tolist(), "shift_labels": row[-1:].tolist()} for row in make_ids(32, 6)]
    collator = LoopCollator(DepthSampler(kind="poisson", rate=3.0, minimum=1, maximum=6, seed=4))
    settings = TrainingArguments(
        str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        save_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=0,
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer = Depths(model, settings, train_dataset=rows, data_collator=collator)
    trainer.add_callback(LoopCollatorCallback(collator))
    trainer.depths = []
    return trainer


@pytest.mark.slow
def test_stock_trainer_samples_depths_and_resumes_them(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    assert len(set(whole.depths)) > 2
    resumed = make_trainer(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert resumed.depths == whole.depths[4:]
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, resumed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, **FP32)
    assert (tmp_path / "whole/checkpoint-8/modeling_looped.py").exists()


# PEFT 0.21 asks transformers for the old name of activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_is_shared_by_the_loops_and_merges_back(tmp_path):
    model, ids = make_model(), make_ids()
    base = model(ids, num_loops=5).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"], r=2)
    )
    assert adapted(ids, num_loops=5).logits.equal(base)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        adapted(input_ids=ids, labels=ids, num_loops=4, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = adapted(ids, num_loops=5).logits
    assert not torch.allclose(tuned, base, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    torch.testing.assert_close(reloaded(ids, num_loops=5).logits, tuned, **FP32)
    torch.testing.assert_close(reloaded.merge_and_unload()(ids, num_loops=5).logits, tuned, **FP32)
    assert adapted.generate(input_ids=ids, num_loops=2, max_new_tokens=2).shape == (3, 9)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_applied_in_every_loop():
    model, ids = make_model(num_prelude_layers=1), make_ids()
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    calls = {}
    for name, module in adapted.named_modules():
        if name.endswith("lora_A.default"):
            section = name.split(".self_attn")[0].split("model.")[-1]
            module.register_forward_hook(
                lambda *_, section=section: calls.update({section: calls.get(section, 0) + 1})
            )
    adapted(ids, num_loops=5)
    assert calls == {"prelude.0": 1, "core.0": 5, "core.1": 5}


# TRL 1.16 uses the old names of activation checkpointing.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("lora", [False, True])
def test_trl_fine_tunes_at_sampled_depths(tmp_path, lora):
    """The loss TRL computes is the model's own at the depth of each update, and completions alone are learnt."""
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4, readout="last")
    model = make_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=1)
    rows = [{"prompt": f"e{i} r{i % 4} r{(i + 1) % 4}", "completion": f" e{7 * i % 20}"} for i in range(16)]
    texts = [f"{row['prompt']}{row['completion']} <eos>" for row in rows]
    ids = tokenizer(texts, return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, :3] = -100
    collator = LoopCollator(
        DepthSampler(kind="uniform", minimum=1, maximum=6, seed=3),
        DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
    )
    depths = [collator.depth(update) for update in range(4)]
    assert len(set(depths)) > 1
    before = model(ids, labels=labels, num_loops=depths[0]).loss.item()
    seen = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["num_loops"]), with_kwargs=True)
    settings = SFTConfig(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=16,
        learning_rate=3e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_list(rows),
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[LoopCollatorCallback(collator)],
        peft_config=peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2) if lora else None,
    )
    trainer.train()
    assert seen == depths
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(before, abs=1e-4)
    after = trainer.model(input_ids=ids, labels=labels, num_loops=depths[0]).loss.item()
    assert after < before - 0.1


HOP_ROWS = [
    {"question": f"e{i} r{i % 4} r{(i + 1) % 4}", "choices": ["e1", "e5", "e9"], "gold": i % 3} for i in range(8)
]
HOP_TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}} <ans>",
    "target_delimiter": " ",
}
GENERATE = HOP_TASK | {
    "task": "hops",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"max_gen_toks": 1, "until": ["<eos>"], "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOOSE = HOP_TASK | {
    "task": "hops_choice",
    "output_type": "multiple_choice",
    "doc_to_target": "gold",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.slow
@pytest.mark.parametrize(("where", "generated_at", "scored_at"), [
    ("nowhere", 3, 3), ("model_args", 7, 7), ("gen_kwargs", 7, 3), ("generation_config", 7, 3),
])  # fmt: skip
def test_the_harness_passes_the_loop_count(tmp_path, where, generated_at, scored_at):
    """lm-evaluation-harness, `--model hf` with remote code: model_args set the loops of every request, gen_kwargs and
    a saved generation config those of generation only."""
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    model = make_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    if where == "generation_config":
        model.generation_config.num_loops = 7
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, HOP_ROWS)))
    for task in (GENERATE, CHOOSE):
        task = task | {"dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "cache")}}
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML
    arguments = f"pretrained={tmp_path / 'model'},trust_remote_code=True,device=cpu,add_bos_token=False"
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments + (",num_loops=7" if where == "model_args" else ""),
        gen_kwargs="num_loops=7" if where == "gen_kwargs" else None,
        tasks=["hops", "hops_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    questions = tokenizer([row["question"] for row in HOP_ROWS], return_tensors="pt")  # ends in <ans>, all of a length
    answers = model.generate(**questions, num_loops=generated_at, max_new_tokens=1, do_sample=False)[:, -1]
    responses = [sample["filtered_resps"][0].strip() for sample in results["samples"]["hops"]]
    assert responses == [tokenizer.decode(answer) for answer in answers]
    logprobs = model(**questions, num_loops=scored_at).logits[:, -1].log_softmax(-1)
    expected = logprobs[:, tokenizer.convert_tokens_to_ids(["e1", "e5", "e9"])]
    scored = [[logprob for logprob, _ in sample["filtered_resps"]] for sample in results["samples"]["hops_choice"]]
    torch.testing.assert_close(torch.tensor(scored), expected, **FP32)


def test_stop_strings_stop():
    """generate hands the tokenizer, which stop strings need and `transformers serve` always passes, on to the model:
    as an unknown keyword it was refused."""
    tokenizer = train_byte_bpe(["a loop reads the state and writes the state again"], 270)
    model = make_model(vocab_size=len(tokenizer))
    ids = tokenizer("the loop", return_tensors="pt").input_ids
    call = {"max_new_tokens": 12, "do_sample": False}
    whole = model.generate(ids, **call)[0, ids.shape[1] :]
    texts = [tokenizer.decode(token) for token in whole]
    # A string that first ends with a token in the middle; half a character would be no string.
    end = next(i for i in range(1, 11) if texts[i].isascii() and texts[i].isprintable() and texts[i] not in texts[:i])
    stopped = model.generate(ids, stop_strings=[texts[end]], tokenizer=tokenizer, **call)[0, ids.shape[1] :]
    assert stopped.equal(whole[: end + 1])


def test_text_generation_pipeline_takes_the_loop_count():
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    model = make_model(vocab_size=len(tokenizer))
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    for loops in (1, 6):
        (out,) = generator("e1 r2 r3", num_loops=loops, max_new_tokens=2, do_sample=False, return_full_text=False)
        ids = tokenizer("e1 r2 r3", return_tensors="pt").input_ids
        expected = model.generate(ids, num_loops=loops, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
        assert out["generated_text"].split() == tokenizer.decode(expected, skip_special_tokens=True).split()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside inductor
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # inside dynamo
def test_one_compiled_layer_serves_every_loop_count():
    """Compiling the whole forward compiles anew for every loop count, and after eight silently stops compiling."""
    model, ids = make_model().train(), make_ids()
    expected = {loops: model(ids, num_loops=loops, use_cache=False).logits for loops in (1, 2, 5, 9)}
    torch._dynamo.reset()
    for layer in model.model.core:
        layer.compile()
    model(ids, num_loops=2, use_cache=False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for loops, logits in expected.items():
            torch.testing.assert_close(model(ids, num_loops=loops, use_cache=False).logits, logits, **FP32)


def test_the_shipped_files_use_no_private_names_of_transformers():
    """Private framework functions moved under MoR between releases (trap 34). What generate offers as its own hooks is
    listed here, and used nowhere else."""
    import re
    from pathlib import Path

    import modeling_looped

    allowed = {
        "_attn_implementation", "_can_compile_fullgraph", "_can_record_outputs", "_compile_all_devices",
        "_from_config", "_from_model_config", "_fsdp_plan", "_init_weights", "_no_split_modules",
        "_prepare_generation_config", "_skip_keys_device_placement", "_supports_attention_backend",
        "_supports_flash_attn", "_supports_flex_attn", "_supports_sdpa", "_tied_weights_keys", "_tp_plan",
        "_update_model_kwargs_for_generation",
    }  # fmt: skip
    for path in Path(modeling_looped.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"from transformers[\w.]* import .*\b_\w", text), path.name
        own = set(re.findall(r"def (_\w+)", text))
        used = set(re.findall(r"(?:super\(\)|config|self|generation_config)\.(_[a-z]\w+)", text))
        assert used <= own | allowed, (path.name, used - own - allowed)
