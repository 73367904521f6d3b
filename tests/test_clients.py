"""Stock tools work on the model unmodified: Trainer, PEFT, pipeline, torch.compile per layer."""

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline, set_seed

from data_builders.batching import DepthSampler, LoopCollator, LoopCollatorCallback
from data_builders.tokenizers import hop_tokenizer
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
        "_attn_implementation", "_can_compile_fullgraph", "_can_record_outputs", "_from_config", "_from_model_config",
        "_fsdp_plan", "_init_weights", "_no_split_modules", "_prepare_generation_config",
        "_skip_keys_device_placement", "_supports_attention_backend", "_supports_flash_attn", "_supports_flex_attn",
        "_supports_sdpa", "_tied_weights_keys", "_tp_plan", "_update_model_kwargs_for_generation",
    }  # fmt: skip
    for path in Path(modeling_looped.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"from transformers[\w.]* import .*\b_\w", text), path.name
        own = set(re.findall(r"def (_\w+)", text))
        used = set(re.findall(r"(?:super\(\)|config|self|generation_config)\.(_[a-z]\w+)", text))
        assert used <= own | allowed, (path.name, used - own - allowed)
