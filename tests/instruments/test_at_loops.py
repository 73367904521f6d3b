"""One forward pass to the largest loop count reads every loop: bit for bit what a call per loop count says, of any
model, and no layer call more, in every place that measures several loop counts."""

from collections import defaultdict

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import strategies
from data_builders import PackedMolecules, TextBlocks
from looplab.cli import main
from looplab.instruments.at_loops import at_loops
from looplab.instruments.traces import trace
from looplab.tasks.molecules.held_out import loss_of_molecules
from looplab.tasks.registry import TASKS
from looplab.tasks.text.perplexity import block_losses
from looplab.training.model import build_model
from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedModel
from strategies import TOKENS, VOCABULARY
from toy_runs import RECIPES
from toys import count_layer_calls, make_ids, make_model, open_gates

ROWS = 3


@st.composite
def cases(draw) -> tuple[LoopedForCausalLM, dict, list[int], int]:
    """A model, the inputs of a call (with padding, packed sequences, or neither), loop counts, positions to keep."""

    coda = {"num_coda_layers": draw(st.sampled_from([0, 1, 2]))}

    def accepted(fields: dict) -> bool:
        try:
            LoopedConfig(**strategies.SIZES | fields | coda)
        except (ValueError, StrictDataclassError):
            return False
        return True

    fields = draw(strategies.configs().filter(accepted)) | coda
    most = fields.get("max_num_loops") or 6
    torch.manual_seed(draw(st.integers(0, 9)))
    model = open_gates(LoopedForCausalLM(LoopedConfig(**strategies.SIZES | fields))).eval()
    inputs = {"input_ids": torch.randint(1, VOCABULARY, (ROWS, TOKENS))}
    kind = draw(st.sampled_from(["plain", "padded", "packed"]))
    if kind == "padded":
        padding = draw(st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS))
        inputs["attention_mask"] = (torch.arange(TOKENS) >= torch.tensor(padding)[:, None]).long()
    if kind == "packed":
        cuts = draw(st.lists(st.integers(1, TOKENS - 1), min_size=ROWS, max_size=ROWS))
        tokens, cuts = torch.arange(TOKENS), torch.tensor(cuts)[:, None]
        inputs["position_ids"] = torch.where(tokens < cuts, tokens, tokens - cuts)
    loops = draw(st.lists(st.integers(1, min(most, model.config.max_num_loops or 6)), min_size=1, max_size=4))
    return model, inputs, loops, draw(st.sampled_from([0, 1]))


@settings(max_examples=60)
@given(cases())
@torch.inference_mode()
def test_every_count_says_bit_for_bit_what_its_own_call_says(case):
    model, inputs, loops, kept = case
    said = at_loops(model, loops, torch.clone, logits_to_keep=kept, **inputs)
    assert list(said) == sorted(set(loops))
    for count, logits in said.items():
        alone = model(**inputs, num_loops=count, logits_to_keep=kept, use_cache=False).logits
        assert torch.equal(logits, alone)


@pytest.mark.parametrize("coda", [0, 2])
@pytest.mark.parametrize("loops", [[4], [1, 4], [3, 1, 2, 4, 3]], ids=str)
def test_layers_run_as_often_as_in_the_call_with_most_loops_and_the_coda_once_per_count(coda, loops):
    model = make_model(num_prelude_layers=1, num_coda_layers=coda)
    calls = count_layer_calls(model)
    at_loops(model, loops, torch.clone, input_ids=make_ids())
    assert [section for section, _ in calls].count("prelude") == 1
    assert [section for section, _ in calls].count("core") == 2 * 4
    assert [section for section, _ in calls].count("coda") == coda * len(set(loops))


FLAGS = ["--model.num_coda_layers=1", "--max_steps=2", "--check_every=2", "--checkpoint_every=2"]


def core_calls(model, measure) -> int:
    calls = count_layer_calls(model)
    measure()
    return sum(section == "core" for section, _ in calls)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["hops", "text", "molecules"])
def test_a_held_out_check_runs_the_core_for_its_largest_count_alone(trained, task):
    """As often with eval_loops up to it as without any."""
    counts = []
    for eval_loops in ("[1, 2, 5]", "[]"):
        recipe = trained.recipe(task, *FLAGS, f"--eval_loops={eval_loops}")
        splits, depth = recipe.data.load(), recipe.depth.sampler(0)
        training = TASKS[recipe.data.task].training(recipe, splits, depth, Accelerator(), None)
        model, state = build_model(recipe, training.tokenizer, training.generation), training.first_state()
        training.begin(state)
        counts.append(core_calls(model, lambda t=training, m=model, s=state: t.check(m, s, 5)))
    assert counts[0] == counts[1] > 0


def loaded(folder):
    return LoopedForCausalLM.from_pretrained(folder / "model").eval(), AutoTokenizer.from_pretrained(folder / "model")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["hops", "text", "molecules"])
def test_an_evaluation_runs_the_core_for_its_largest_count_alone(trained, task):
    folder = trained(task, *FLAGS)
    recipe = trained.recipe(task, *FLAGS)
    (model, tokenizer), test = loaded(folder), recipe.data.load()["test"]
    if task == "hops":
        ids = make_ids(rows=4, tokens=5) % len(tokenizer)

        def measure(loops):
            trace(model, ids, ids[:, 0], max(loops))
    elif task == "text":
        blocks = TextBlocks(test, tokenizer, 32)

        def measure(loops):
            block_losses(model, blocks, torch.arange(len(blocks)), loops)
    else:
        packed = PackedMolecules(test, tokenizer, 76)

        def measure(loops):
            loss_of_molecules(model, packed, loops, len(packed))

    alone = core_calls(model, lambda: measure([1]))
    assert core_calls(model, lambda: measure([1, 2, 3, 5])) == 5 * alone


VERBS = {
    "eval": {"hops": ["--max-loops=3"]},
    "lens": {"hops": ["--no-probes"], "molecules": ["--no-probes"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("task", RECIPES)
def test_no_verb_reads_the_same_tokens_anew_for_another_loop_count(trained, task, verb, tmp_path, monkeypatch):
    """Reads: what is written at several loop counts, or timed, takes as many calls."""
    counts, run_call = defaultdict(set), LoopedModel.run_call

    def counted(self, call, **kwargs):
        if call.past_key_values is None and call.halting is None:
            counts[call.embeds.numpy().tobytes()].add(call.num_loops)
        return run_call(self, call, **kwargs)

    run = trained.copy(tmp_path, task, *FLAGS)
    monkeypatch.setattr(LoopedModel, "run_call", counted)
    assert main([verb, str(run), "--limit=4", *VERBS[verb].get(task, [])]) == 0
    assert len(counts) > 0
    assert [each for each in counts.values() if len(each) > 1] == []
