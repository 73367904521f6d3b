"""Rows of `looped bench`: a model that drafts for itself."""

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
CONFIDENCES = (0.4, 0.8)  # that of transformers, and one under which drafts are surer, and shorter


@torch.inference_mode()
def speculation_row(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, rounds: int, ends: bool = False, **settings
) -> dict:
    """Speculative over plain decoding of exactly `new_tokens` after each of `prompts` (N, T), one by one.

    assistant_confidence_threshold, draft_loops, num_loops: of the speculative side
    acceptance     share of the drafted tokens that were accepted
    per_call       tokens per verification
    layer_calls    of speculation, as a share of those of plain decoding of as many tokens
    tokens         written per prompt, mean

    Args:
        ends: a text may also end before, by its `eos_token_id`; the ratio is of tokens per second either way.
        settings: of the speculative side; those but `draft_loops` are also the plain side's.
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
    """Drafted tokens, accepted ones and verifications of a generate output."""
    return int(output.drafted.sum()), int(output.accepted.sum()), len(output.drafted)


def accepted_row(width: int, work: Workload, rounds: int) -> dict:
    """One draft loop of twice `work.loops` in a fresh model, whose layers are the identity: all drafts are right."""
    config = LoopedConfig(
        **model_sizes(width, work), num_core_layers=work.layers, num_loops=2 * work.loops, residual_init="zero"
    )
    prompts = torch.randint(1, work.vocab, (1, work.prompt), generator=torch.Generator().manual_seed(0))
    settings = {"draft_loops": 1, "num_loops": 2 * work.loops, "num_assistant_tokens": 8, CONFIDENCE: 0.0}
    row = speculation_row(LoopedForCausalLM(config), prompts, work.new_tokens, rounds, **settings)
    return {"mode": "all accepted", "width": width} | row


def speculation_rows(run: Run, work: Workload, rounds: int) -> list[dict]:
    """Greedy and sampled texts of a run at its largest trained loop count, after prompts of its test split; how they
    are sampled, and whether they end, its task's `drafting` says."""
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
