"""Traces: what a model would answer after loop 1, 2 .. R, and what the halting rules look at, from one forward pass.

    for loop in range(R):
        state  = the state after the loop
        logits = readout(state)                (N, V) at the last position
        trace  = argmax, margin of the gold token, KL to the loop before, entropy, change of the state

The answers are those of `at_loops`, so that a coda is part of them. The signals are what the halting rules see, which
look at states before the coda; where `at_loops` makes a forward pass per loop count, they are those of the call with R
loops. Legend: R loops, N batch rows, T tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .at_loops import at_loops, takes_calls


@dataclass(frozen=True)
class Trace:
    """Answers and signals of N batch rows after each of R loops; every tensor is (R, N).

    Args:
        prediction: id of the token with the largest logit.
        margin: logit of the gold token minus the largest other logit.
        kl: KL(p_t || p_{t-1}) in nats, infinite at the first loop.
        entropy: H(p_t) in nats.
        change: ||s_t - s_{t-1}|| / ||s_t||, infinite at the first loop.
        exit_chance: probability that the exit gate halts by loop t; 0 in a model without an exit gate.
    """

    prediction: torch.Tensor
    margin: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    change: torch.Tensor
    exit_chance: torch.Tensor


def trace(
    model: PreTrainedModel, input_ids: torch.Tensor, answers: torch.Tensor, num_loops: int, batch_size: int = 1024
) -> Trace:
    """The trace, on the CPU, of the batch rows `input_ids` (N, T), read at the last position.

    The halting rules of `halting_looped.py` compare its signals with their thresholds.

    Args:
        answers: (N,) gold tokens.
        batch_size: batch rows of a forward pass.
    """
    model.eval()
    batches = zip(input_ids.split(batch_size), answers.split(batch_size), strict=True)
    traces = [trace_batch(model, ids.to(model.device), gold.to(model.device), num_loops) for ids, gold in batches]
    return joined(traces)


def joined(traces: list[Trace]) -> Trace:
    """Traces of several batches as one."""
    return Trace(*(torch.cat([getattr(part, field.name) for part in traces], dim=1) for field in fields(Trace)))


@torch.inference_mode()
def trace_batch(model: PreTrainedModel, input_ids: torch.Tensor, answers: torch.Tensor, num_loops: int) -> Trace:
    """The trace of one batch, on the CPU; arguments as of `trace`, on the model's device."""
    signals, said = [], []

    def observe(rows: torch.Tensor, state: torch.Tensor) -> None:
        state = state[:, -1:]
        logits, exit_gate = model.readout(state)[:, -1].float(), model.model.exit_readout
        stays = torch.zeros(len(state), device=state.device)
        if exit_gate is not None:
            stays = F.logsigmoid(-exit_gate(state)[:, -1])
        before = signals[-1] if signals else None
        signals.append(signals_of(state[:, -1].float(), logits.log_softmax(-1), stays, before))
        said.append(answer_of(logits, answers))
        if before is not None:
            del before["state"], before["log_p"], before["stays"]  # only the next loop needs them

    def read(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return answer_of(logits[:, -1].float(), answers)

    # Otherwise the logits that the rules see are those of the answers.
    apart = model.config.num_coda_layers > 0 or takes_calls(model, input_ids.shape[1])
    loops = range(1, num_loops + 1) if apart else [num_loops]
    found = at_loops(model, loops, read, logits_to_keep=1, observe=observe, input_ids=input_ids)
    said = found.values() if apart else said
    prediction, margin = (torch.stack(part).cpu() for part in zip(*said, strict=True))
    names = [field.name for field in fields(Trace) if field.name not in ("prediction", "margin")]
    stacked = {name: torch.stack([signal[name] for signal in signals]).cpu() for name in names}
    return Trace(prediction, margin, **stacked)


def signals_of(state: torch.Tensor, log_p: torch.Tensor, stays: torch.Tensor, before: dict | None) -> dict:
    """The signals of one loop that halting rules look at, (N,) each; and `state`, `log_p` and `stays` for the next.

    Args:
        state: (N, D), after the loop.
        log_p: (N, V), log-probabilities of the head, in nats.
        stays: (N,), log of the probability that the exit gate goes on after this loop; 0 without an exit gate.
        before: the result for the loop before; None at the first loop.
    """
    p = log_p.exp()
    kl = change = torch.full(log_p.shape[:1], torch.inf, device=log_p.device)
    if before is not None:
        kl = (p * (log_p - before["log_p"])).sum(-1).clamp_min(0)
        change = (state - before["state"]).norm(dim=-1) / state.norm(dim=-1).clamp_min(1e-12)
        stays = before["stays"] + stays
    return {
        "state": state,
        "log_p": log_p,
        "stays": stays,
        "kl": kl,
        "entropy": -(p * log_p).sum(-1),
        "change": change,
        "exit_chance": -torch.expm1(stays),
    }


def answer_of(logits: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted token and margin of the gold token, (N,) each, from logits (N, V)."""
    gold = logits.gather(1, answers[:, None])
    others = logits.scatter(1, answers[:, None], -torch.inf).amax(1)
    return logits.argmax(-1), gold[:, 0] - others
