"""Laws of GRPO with credit for every loop: what the loops say, what stock GRPO is a case of, and what learns."""

import peft
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from data_builders import SameAnswer, hop_tokenizer
from looplab.rl.loop_credit import (
    ExitDistribution,
    LastLoop,
    LoopCreditTrainer,
    Progressive,
    Uniform,
    credit,
    verified,
)
from modeling_looped.calls_looped import LoopStates
from modeling_looped.losses_looped import exit_distribution
from toys import FP32, make_ids, make_model

# TRL 1.16 uses the old names of activation checkpointing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LOOPS, ANSWER, TEMPERATURE = 4, 3, 0.7
OURO = {"norm_placement": "sandwich", "norm_between_loops": True, "exit_gate": True}
SHAPES = {
    "plain": {},
    "prelude and coda": {"num_prelude_layers": 1, "num_coda_layers": 1, "loop_connection": "inject_add"},
    "streams": {"loop_connection": "hyper"},
    "exit gate": OURO,
}
WEIGHTS = {"last": LastLoop(), "uniform": Uniform(), "progressive": Progressive(2.0)}
TOKENIZER = hop_tokenizer(num_entities=20, num_relations=4, readout="last")


def make_tuned(**fields):
    """A toy whose vocabulary is the tokenizer's, and whose exit gate, if it has one, tells tokens apart."""
    ends = {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    model = make_model(**{"vocab_size": len(TOKENIZER), "num_loops": LOOPS, **ends, **fields})
    if model.config.exit_gate:
        with torch.no_grad():
            model.model.exit_gate.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    return model


def make_batch():
    """ids and mask (3, 7): the prompts are padded on the left, the answers on the right."""
    ids = make_ids() % 20 + 4
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, 6:] = 0
    return ids.masked_fill(mask == 0, TOKENIZER.pad_token_id), mask


def make_trainer(folder, kind, model, rows=8, **settings):
    arguments = settings.pop("arguments", {})
    config = GRPOConfig(
        str(folder),
        **{
            "max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": ANSWER,
            "temperature": TEMPERATURE, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True,
            "bf16": False, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, **arguments,
        },
    )  # fmt: skip
    questions = Dataset.from_list([{"prompt": f"e{i} r{i % 4}", "answer": f"e{7 * i % 20}"} for i in range(rows)])
    return kind(model, many_even_words, config, questions, processing_class=TOKENIZER, **settings)


def many_even_words(completions, **_) -> list[float]:
    return [float(sum(word[-1] in "02468" for word in said.split())) for said in completions]


def by_hand(model, ids, mask, num_loops: int = LOOPS) -> torch.Tensor:
    """(B, K, R) log-probabilities of the answers, each loop's from a call of its own."""
    said = []
    for loops in range(1, num_loops + 1):
        logits = model(ids, attention_mask=mask, num_loops=loops).logits[:, -ANSWER - 1 : -1] / TEMPERATURE
        said.append(logits.log_softmax(-1).gather(2, ids[:, -ANSWER:, None])[..., 0])
    return torch.stack(said, dim=-1) * mask[:, -ANSWER:, None]


def weights_by_hand(name: str, loops: int) -> torch.Tensor:
    return {
        "last": torch.tensor([0.0] * (loops - 1) + [1.0]),
        "uniform": torch.full((loops,), 1 / loops),
        "progressive": torch.tensor([t**2 for t in range(1, loops + 1)]) / sum(t**2 for t in range(1, loops + 1)),
    }[name]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_probabilities_and_gradients_are_those_of_calls_with_fewer_loops(tmp_path, shape, weights):
    model, (ids, mask) = make_tuned(**SHAPES[shape]), make_batch()
    trainer = make_trainer(tmp_path, LoopCreditTrainer, model, loop_weights=WEIGHTS[weights])
    expected = (by_hand(model, ids, mask) * weights_by_hand(weights, LOOPS)).sum(-1)
    found, entropies, _ = trainer._get_per_token_logps_and_entropies(
        model, ids, mask, ANSWER, batch_size=2, compute_entropy=True
    )
    torch.testing.assert_close(found, expected, **FP32)
    assert entropies.shape == found.shape
    slopes = []
    for said in (expected, found):
        model.zero_grad()
        said.mean().backward()
        slopes.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, **FP32)


def test_the_exit_gate_says_the_weights_and_does_not_learn(tmp_path):
    model, (ids, mask) = make_tuned(**OURO), make_batch()
    trainer = make_trainer(tmp_path, LoopCreditTrainer, model, loop_weights=ExitDistribution())
    gates, _ = model.exits(ids, ids, attention_mask=mask)
    weights = exit_distribution(gates)[:, -ANSWER - 1 : -1]
    assert weights.std(dim=(0, 1)).min() > 1e-3  # they differ by token
    found, *_ = trainer._get_per_token_logps_and_entropies(model, ids, mask, ANSWER)
    torch.testing.assert_close(found, (by_hand(model, ids, mask) * weights).sum(-1), **FP32)
    found.sum().backward()
    assert model.model.exit_gate.weight.grad is None


@pytest.mark.parametrize("weights", [*WEIGHTS.values(), ExitDistribution()], ids=[*WEIGHTS, "exit"])
def test_a_row_gets_the_credit_that_it_gets_alone(weights):
    """Batch rows of 2, 4 and 1 loops."""
    model, (ids, mask), counts = make_tuned(**OURO), make_batch(), torch.tensor([2, 4, 1])

    def credited(rows: slice) -> torch.Tensor:
        states = LoopStates()
        output = model(ids[rows], attention_mask=mask[rows], num_loops=counts[rows], observe=states)
        logps = (output.logits[:, -ANSWER - 1 : -1] / TEMPERATURE).log_softmax(-1)
        last = logps.gather(2, ids[rows, -ANSWER:, None])[..., 0] * mask[rows, -ANSWER:]
        return credit(model, states, ids[rows], mask[rows], last, weights, TEMPERATURE)

    alone = torch.cat([credited(slice(row, row + 1)) for row in range(3)])
    torch.testing.assert_close(credited(slice(None)), alone, **FP32)


@pytest.mark.parametrize("loops_run", [[1, 1], [4, 4], [2, 4]])
@pytest.mark.parametrize("weights", [*WEIGHTS.values(), ExitDistribution()], ids=[*WEIGHTS, "exit"])
def test_weights_sum_to_one_over_the_loops_that_ran(weights, loops_run):
    loops, run = torch.arange(1, LOOPS + 1), torch.tensor(loops_run)[:, None, None]
    gates = torch.randn(2, ANSWER, LOOPS, generator=torch.Generator().manual_seed(1))
    found = weights(loops, run, gates).expand(2, ANSWER, LOOPS)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, ANSWER), **FP32)
    assert not found[(loops > run).expand_as(found)].any()


def test_all_credit_for_the_last_loop_is_stock_grpo_bit_for_bit(tmp_path):
    """Two generations, two updates on each, and a divergence from the model before."""
    ends = []
    settings = {"max_steps": 4, "num_iterations": 2, "beta": 0.1}
    for kind, weights in ((GRPOTrainer, {}), (LoopCreditTrainer, {"loop_weights": LastLoop()})):
        model = make_tuned()
        model.save_pretrained(tmp_path / "start")
        model = type(model).from_pretrained(tmp_path / "start")  # TRL loads the model before from where this one was
        trainer = make_trainer(tmp_path / "out", kind, model, arguments=settings, **weights)
        trainer.train()
        ends.append((trainer.state.log_history, dict(trainer.model.named_parameters())))
    (stock, before), (ours, after) = ends
    assert [row["loss"] for row in stock[:-1]] == [row["loss"] for row in ours[:-1]]
    assert any(row["kl"] > 0 for row in ours[:-1])
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("lora", [False, True])
def test_answers_are_scored_at_the_loops_that_wrote_them(tmp_path, lora):
    model = make_tuned()
    trainer = make_trainer(
        tmp_path, LoopCreditTrainer, model, arguments={"generation_kwargs": {"num_loops": 2}},
        peft_config=peft.LoraConfig(target_modules=["q_proj"], r=2) if lora else None,
    )  # fmt: skip
    trained = {name: each for name, each in trainer.model.named_parameters() if each.requires_grad}
    before = {name: each.clone() for name, each in trained.items()}
    seen = set()
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.add((kwargs["num_loops"], kwargs.get("observe") is not None)), with_kwargs=True
    )
    trainer.train()
    assert seen == {(2, False), (2, True)}
    assert all(("lora_" in name) is lora for name in trained)
    assert any(not torch.equal(before[name], each) for name, each in trained.items())


@pytest.mark.parametrize(("fields", "weights", "arguments", "refused"), [
    ({}, ExitDistribution(), {}, "exit gate, which this model lacks"),
    ({"attention_pattern": "prefix"}, Uniform(), {}, "must not see itself"),
    ({"kv_sharing": "last"}, Uniform(), {}, "set prefill_chunk=1"),
    ({}, Uniform(), {"generation_kwargs": {"halting": "kl"}}, "leave halting out"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(tmp_path, fields, weights, arguments, refused):
    with pytest.raises(ValueError, match=refused):
        make_trainer(tmp_path, LoopCreditTrainer, make_tuned(**fields), loop_weights=weights, arguments=arguments)


def test_another_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **sizes))
    with pytest.raises(ValueError, match="this is a LlamaForCausalLM"):
        make_trainer(tmp_path, LoopCreditTrainer, model)


def test_a_verifier_is_a_reward():
    reward = verified(SameAnswer())
    columns = {"answer": ["9 7", "5", "1"], "grade": [2, 1, 1], "trainer_state": object()}
    chat = [{"role": "assistant", "content": "5"}]
    assert reward(prompts=["a", "b", "c"], completions=[" 9 7", chat, "2"], **columns) == [1.0, 1.0, 0.0]
