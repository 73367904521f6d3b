"""Rows of `looped bench`: decoding by a model that drafts for itself with few loops, against plain decoding."""

from itertools import product

import torch
from transformers import PreTrainedModel

from looplab.instruments.timing import compared, interleaved, seconds_per_unit
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model
from looplab.tasks.registry import task_for
from modeling_looped import LoopedConfig, LoopedForCausalLM

from .pair import Workload, model_sizes

CONFIDENCE = "assistant_confidence_threshold"
CONFIDENCES = (0.4, 0.8)  # transformers' own value, and a higher one, under which drafts are shorter and surer


@torch.inference_mode()
def speculation_row(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, rounds: int, ends: bool = False, **settings
) -> dict:
    """New tokens per second of speculative and of plain decoding, and their ratio, at batch 1. The row also has

    draft_loops, num_loops, assistant_confidence_threshold    of the speculative side
    acceptance     share of the drafted tokens that were accepted
    per_call       tokens per verification
    layer_calls    layer calls of speculative decoding, as a share of those that plain decoding of as many tokens takes
    tokens         new tokens per prompt, mean

    Args:
        prompts: (N, T), continued one by one.
        new_tokens: tokens after each prompt.
        ends: a text may end earlier, with its `eos_token_id`.
        settings: arguments of the speculative `generate`; the plain one gets all but `draft_loops`.
    """
    model.eval()
    length = {"max_new_tokens": new_tokens, "return_dict_in_generate": True}
    settings |= length if ends else length | {"min_new_tokens": new_tokens}
    plain = {name: value for name, value in settings.items() if name != "draft_loops"}

    def decode(settings: dict) -> list:
        return [model.generate(ids, attention_mask=torch.ones_like(ids), **settings) for ids in prompts.split(1)]

    def written(outputs: list) -> int:
        return sum(output.sequences.shape[1] - prompts.shape[1] for output in outputs)

    outputs = decode(settings)
    drafted, accepted, verified = (sum(counts) for counts in zip(*map(tallies, outputs), strict=True))
    config, loops = model.config, settings["num_loops"]
    calls = config.num_prelude_layers + config.num_coda_layers + config.num_core_layers * loops
    pairs = interleaved(
        lambda: written(decode(settings)), lambda: written(decode(plain)), rounds, warmup=1, timed=seconds_per_unit
    )
    return {
        "measure": "speculation",
        "unit": "tokens/s",
        **{name: settings[name] for name in ("draft_loops", "num_loops", CONFIDENCE)},
        "acceptance": accepted / drafted,
        "per_call": (accepted + verified) / verified,
        "layer_calls": sum(o.layer_calls for o in outputs) / (calls * (written(outputs) - len(outputs))),
        **compared(pairs, 1, ("speculative", "plain")),
        "batch": 1,
        "tokens": written(outputs) / len(outputs),
    }


def tallies(output) -> tuple[int, int, int]:
    """(drafted tokens, accepted tokens, verifications) of an output of `generate`."""
    return int(output.drafted.sum()), int(output.accepted.sum()), len(output.drafted)


def accepted_row(width: int, work: Workload, rounds: int) -> dict:
    """`speculation_row` with 1 draft loop of 2 `work.loops` loops, in a new model.

    Its layers are the identity, so that all drafts are accepted.
    """
    config = LoopedConfig(
        **model_sizes(width, work), num_core_layers=work.layers, num_loops=2 * work.loops, residual_init="zero"
    )
    prompts = torch.randint(1, work.vocab, (1, work.prompt), generator=torch.Generator().manual_seed(0))
    settings = {"draft_loops": 1, "num_loops": 2 * work.loops, "num_assistant_tokens": 8, CONFIDENCE: 0.0}
    row = speculation_row(LoopedForCausalLM(config), prompts, work.new_tokens, rounds, **settings)
    return {"mode": "all accepted", "width": width} | row


def speculation_rows(run: Run, work: Workload, rounds: int) -> list[dict]:
    """Rows of a run, greedy and sampled, at its largest trained loop count, on test prompts.

    The `drafting` of its task says how texts are sampled, and whether they may end early.
    """
    task = task_for("bench", [run])
    model, tokenizer = load_run_model(run)
    loops, drafting = run.trained_loops()[1], task.drafting
    sizes = min(drafting.texts, work.texts), min(drafting.prompt, work.prompt)
    prompts = task.prompts(run, tokenizer, *sizes).to(model.device)
    results = []
    for do_sample, draft_loops, sure in product((False, True), (1, 2, 4), CONFIDENCES):
        if draft_loops >= loops:
            continue
        settings = {"draft_loops": draft_loops, "num_loops": loops, CONFIDENCE: sure}
        settings |= {"do_sample": True, **drafting.drawn} if do_sample else {"do_sample": False}
        row = speculation_row(model, prompts, work.new_tokens, rounds, ends=drafting.ends, **settings)
        mode = "sampled" if do_sample else "greedy"
        results.append({"mode": mode, "run": run.name, "width": model.config.hidden_size} | row)
    return results
