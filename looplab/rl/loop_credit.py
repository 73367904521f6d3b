"""GRPO that gives credit to every loop, not to the last one alone.

    log pi(y) = sum_t w_t log p_t(y),   sum_t w_t = 1

p_t is what the model says of the token y after loop t of R: coda, norm and head on the state of that loop. Stock GRPO
has w_R = 1. An answer that was worth more than others of its group then becomes likelier after every loop with weight.

Source: RLTT (arXiv 2602.10520), equation 6, with its weights: uniform, progressive, by the exit gate. TRL takes the
ratio of the new to the old pi, whose gradient where answers are new is that of the paper. With `beta` above 0 TRL's
divergence is of the weighted log pi, too; that of the paper is of the last loop. Legend: B batch rows, b of them that
still loop, T tokens, K of them answers, R loops, D hidden size, V words.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from trl import GRPOTrainer

from data_builders import Verifier
from modeling_looped import LoopedForCausalLM
from modeling_looped.calls_looped import LoopStates
from modeling_looped.depth_looped import generation_count
from modeling_looped.losses_looped import exit_distribution


class LoopWeights(ABC):
    """How much of the credit every loop gets.

    Attributes:
        reads_exit_gate: the weights are made of the exit gate's logits.
    """

    reads_exit_gate: bool = False

    @abstractmethod
    def __call__(self, loops: torch.Tensor, loops_run: torch.Tensor, gate_logits: torch.Tensor | None) -> torch.Tensor:
        """Weights that sum to 1 over the loops of a batch row, and are 0 for loops that it did not run.

        Args:
            loops: (R,), 1 to R.
            loops_run: (B, 1, 1) loops of each batch row.
            gate_logits: (B, K, R) of the exit gate, without a gradient; None unless `reads_exit_gate`.

        Returns:
            (B, 1, R) or (B, K, R) float32.
        """


@final
class LastLoop(LoopWeights):
    """All of it for the last loop: stock GRPO."""

    def __call__(self, loops, loops_run, gate_logits):
        return (loops == loops_run).float()


@final
class Uniform(LoopWeights):
    """w_t = 1 / R."""

    def __call__(self, loops, loops_run, gate_logits):
        return (loops <= loops_run) / loops_run.float()


@final
class Progressive(LoopWeights):
    """w_t = t^power / sum_s s^power: more for later loops.

    Args:
        power: 0 is `Uniform`.
    """

    def __init__(self, power: float = 1.0):
        self.power = power

    def __call__(self, loops, loops_run, gate_logits):
        share = (loops <= loops_run) * loops.float() ** self.power
        return share / share.sum(-1, keepdim=True)


@final
class ExitDistribution(LoopWeights):
    """w_t is the chance that the exit gate halts the token after loop t (Ouro, arXiv 2510.25741). The gate itself is
    not trained: its weights are constants of the loss."""

    reads_exit_gate = True

    def __call__(self, loops, loops_run, gate_logits):
        assert gate_logits is not None
        return exit_distribution(gate_logits, loops_run.squeeze(-1))


class LoopCreditTrainer(GRPOTrainer):
    """The GRPOTrainer of TRL with log-probabilities that are a weighted sum over loops.

    Answers are sampled and scored at one loop count: `generation_kwargs={"num_loops": R}` of the GRPOConfig, or what
    the model's `generate` does without an argument. It runs in one process or with DDP.

    >>> LoopCreditTrainer(model, verified(SameAnswer()), GRPOConfig("runs/credit"), rows, loop_weights=Progressive())

    Args:
        args, kwargs: of the GRPOTrainer.
        loop_weights: credit of the loops, `Uniform()` unless given.

    Raises:
        ValueError: the model is not a `LoopedForCausalLM`, lacks the exit gate that the weights are made of, has
            prompts that see themselves, or scores answers otherwise than it writes them; or vLLM or a halting rule
            would write them.
    """

    def __init__(self, *args, loop_weights: LoopWeights | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.loop_weights = Uniform() if loop_weights is None else loop_weights
        model = looped_model(self.model)
        if self.loop_weights.reads_exit_gate and not model.config.exit_gate:
            raise ValueError("ExitDistribution weights are made of an exit gate, which this model lacks: use others.")
        if model.config.attention_pattern == "prefix":
            raise ValueError(
                "GRPO scores prompt and answer as one text, whose prompt must not see itself: causal models."
            )
        if model.model.sharing.rewrites and model.config.prefill_chunk != 1:
            raise ValueError(
                f"kv_sharing={model.config.kv_sharing!r} writes an answer token by token otherwise than it scores the "
                "whole: set prefill_chunk=1."
            )
        if self.use_vllm:
            raise ValueError("use_vllm=True samples by the last loop alone, and corrects for it: set use_vllm=False.")
        settings = (self.generation_config, model.generation_config)
        if any(each.to_dict().get("halting") is not None for each in settings):
            raise ValueError("a halting rule in the generation config ends answers' loops early: leave halting out.")
        self.num_loops = generation_count(model.config, *settings)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        """As in TRL, whose answer is of the last loop: the observer keeps what the other loops need."""
        parts = []
        for ids, mask in zip(
            *(each.split(batch_size or len(input_ids)) for each in (input_ids, attention_mask)), strict=True
        ):
            states = LoopStates()
            observed = partial(model, num_loops=self.num_loops, observe=states)
            last, entropies, aux = super()._get_per_token_logps_and_entropies(
                observed, ids, mask, logits_to_keep, **kwargs
            )
            with self.accelerator.autocast():
                credited = credit(looped_model(model), states, ids, mask, last, self.loop_weights, self.temperature)
            parts.append((credited, entropies, aux))
        logps, entropies, auxes = zip(*parts, strict=True)
        return torch.cat(logps), None if entropies[0] is None else torch.cat(entropies), auxes[0]


def credit(
    model: LoopedForCausalLM,
    states: LoopStates,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    last: torch.Tensor,
    weights: LoopWeights,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The weighted sum over loops of the log-probabilities of the last K tokens, (B, K) float32; 0 for padding.

    Logits of a loop are made anew in the backward pass, so that those of one loop alone are in memory.

    Args:
        model: what was called.
        states: the states of that call, of all its tokens.
        input_ids, attention_mask: (B, T) of that call.
        last: (B, K), the log-probabilities after the last loop of each batch row.
        temperature: logits are divided by it.
    """
    count, hidden_states = last.shape[1], []
    labels = input_ids.masked_fill(attention_mask == 0, -100)[:, -count:]
    for rows, state in states.visits:
        hidden_states.append(model.model.stopped(state, attention_mask=attention_mask[rows])[:, -count - 1 : -1])

    def read(hidden: torch.Tensor, said: torch.Tensor) -> torch.Tensor:  # (b, K, D), (b, K) -> (b, K)
        logits = model.lm_head(hidden).float() / temperature
        return -F.cross_entropy(logits.transpose(1, 2), said, ignore_index=-100, reduction="none")

    each = states.spread(
        [
            checkpoint(read, hidden, labels[rows], use_reentrant=False)
            for hidden, (rows, _) in zip(hidden_states, states.visits, strict=True)
        ]
    )  # (B, K, R)
    loops = torch.arange(1, each.shape[-1] + 1, device=each.device)
    loops_run = states.loops_run()[:, None, None]
    gate_logits = None
    if weights.reads_exit_gate:
        with torch.no_grad():
            gate_logits = states.spread([model.model.exit_logits(hidden) for hidden in hidden_states])
    # What TRL says of the last loop stands in for our own of it: nothing else is in the sum of `LastLoop`.
    each = torch.where(loops == loops_run, last.unsqueeze(-1), each)
    return (weights(loops, loops_run, gate_logits) * each).sum(-1)


def looped_model(model: torch.nn.Module) -> LoopedForCausalLM:
    """The looped model within the wrappers of PEFT and DDP. Raises ValueError if there is none."""
    found = next((module for module in model.modules() if isinstance(module, LoopedForCausalLM)), None)
    if found is None:
        raise ValueError(
            f"loops get credit in a LoopedForCausalLM, and this is a {type(model).__name__}: load it with "
            "modeling_looped imported, and without trust_remote_code."
        )
    return found


def verified(verifier: Verifier) -> Callable[..., list[float]]:
    """A reward function of TRL: what a verifier of questions says of every answer, in [0, 1].

    The data set that is trained on has the columns of `data_builders.sequences.FEATURES`, and those that a generator
    adds for its verifier.
    """

    def reward(prompts: Sequence, completions: Sequence, **columns) -> list[float]:
        names = [name for name, values in columns.items() if isinstance(values, list)]
        rows = [{"prompt": prompt} | {name: columns[name][i] for name in names} for i, prompt in enumerate(prompts)]
        texts = [said if isinstance(said, str) else said[0]["content"] for said in completions]
        return [verifier.score(row, text.strip()) for row, text in zip(rows, texts, strict=True)]

    return reward
