"""Halting rules: when a batch row stops looping.

    memory = None
    after every loop:
        memory, done = rule.step(memory, state, readout)     # (b, K, ...), (b, K) bool
        a batch row halts when it is done at all of its positions

The positions are those whose logits were asked for (`logits_to_keep`; padding excluded), so generation decides on the
token being produced. A rule that compares a loop with the one before cannot halt before the second loop; a batch row
that never satisfies its rule runs `num_loops` loops. What `readout` gives is the rule's choice: the head's logits, or
with `reads_exit_gate` those of the exit gate.

Legend: b batch rows that still loop, K positions, D hidden size, V vocabulary, R loops, N texts of a trace.
"""

import difflib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol, final

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

Readout = Callable[[torch.Tensor], torch.Tensor]
Effort = Literal["traced", "decoded", "sampled"]


class Signals(Protocol):
    """What was recorded of N texts in every loop, without halting: (R, N) each, in float32.

    Attributes:
        kl: KL(p_t || p_{t-1}) in nats; infinite in the first loop.
        entropy: H(p_t) in nats.
        change: ||s_t - s_{t-1}|| / ||s_t||; infinite in the first loop.
        exit_chance: sum_{s<=t} p_s of the exit distribution; 0 in a model without an exit gate.
    """

    kl: torch.Tensor
    entropy: torch.Tensor
    change: torch.Tensor
    exit_chance: torch.Tensor


class Rule(ABC):
    """A halting rule. The parameters of `__init__` are its thresholds.

    Attributes:
        reads_exit_gate: `readout` gives the exit gate's logits (b, K) of a state instead of the head's (b, K, V).
    """

    reads_exit_gate: ClassVar[bool] = False

    @abstractmethod
    def step(self, memory: Any, state: torch.Tensor, readout: Readout | None) -> tuple[Any, torch.Tensor]:
        """Look at the states (b, K, D) after a loop.

        Args:
            memory: what the loop before returned, of the same batch rows; None after the first loop.
            state: what coda and readout see, (b, K, D).
            readout: a state (b, K, D) -> logits; None in a model without a head.

        Returns:
            What the next loop gets as `memory`, a tensor whose first dimension is b, or None; and who is done, (b, K)
            bool.
        """

    def stops(self, trace: Signals) -> torch.Tensor:
        """What `step` would have said in every loop of a recorded trace: (R, N) bool.

        Asked only of rules that have a `grid` for traces.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it stops on a trace.")

    @classmethod
    def thresholds(cls) -> list[str]:
        """Names of its thresholds; the first is the one that tables show."""
        return list(inspect.signature(cls).parameters)

    @classmethod
    def grid(cls, effort: Effort, vocab_size: int) -> list[dict[str, float]]:
        """Thresholds worth trying, from the fewest loops to the most; none where the rule is not worth it.

        Args:
            effort: what one trial costs: `"traced"`, next to nothing, since it is simulated from one trace;
                `"decoded"`, texts are decoded with it; `"sampled"`, texts are sampled with it.
            vocab_size: bounds of entropies are shares of its logarithm.
        """
        return []


def entropy_bound(vocab_size: int) -> float:
    """The bound of arXiv 2604.07822, 3.00 nats of ln 217, scaled to another vocabulary."""
    return 3.0 / math.log(217) * math.log(vocab_size)


@final
class FixedRule(Rule):
    """Every batch row runs all its loops."""

    def step(self, memory, state, readout):
        return None, torch.zeros(state.shape[:2], dtype=torch.bool, device=state.device)

    def stops(self, trace):
        return torch.zeros_like(trace.kl, dtype=torch.bool)


def compare_distributions(
    memory: torch.Tensor | None, state: torch.Tensor, readout: Readout | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p_t (b, K, V), which is the next loop's `memory`, and KL(p_t || p_{t-1}) and H(p_t), (b, K) each in nats.

    Raises:
        ValueError: the model has no head.
    """
    if readout is None:
        raise ValueError(
            "the halting rules 'kl' and 'kl_entropy' compare output distributions, which LoopedModel does not have: "
            "call it through LoopedForCausalLM, or use halting='latent'."
        )
    log_p = nn.functional.log_softmax(readout(state).float(), dim=-1)
    if memory is None:
        nothing = torch.full(log_p.shape[:2], torch.inf, device=log_p.device)
        return log_p, nothing, nothing
    p = log_p.exp()
    # Rounding can make the sum slightly negative, which a threshold of 0 would take for convergence.
    kl = (p * (log_p - memory)).sum(-1).clamp_min(0)
    return log_p, kl, -(p * log_p).sum(-1)


@final
class KLRule(Rule):
    """Halt at the first loop t >= 2 with KL(p_t || p_{t-1}) < kl_threshold (nats).

    Source: the halting ablation of arXiv 2604.07822, without the entropy condition; it stops too early on long
    chains.
    """

    def __init__(self, kl_threshold: float = 0.01):
        self.kl_threshold = non_negative("kl_threshold", kl_threshold)

    def step(self, memory, state, readout):
        log_p, kl, _ = compare_distributions(memory, state, readout)
        # An infinite threshold does not halt in the first loop either, where there is nothing to compare.
        return log_p, kl < self.kl_threshold

    def stops(self, trace):
        return trace.kl < self.kl_threshold

    @classmethod
    def grid(cls, effort, vocab_size):
        return [{"kl_threshold": 10 ** (-k / 2)} for k in range(13)] if effort == "traced" else []


@final
class KLEntropyRule(Rule):
    """Halt at the first loop t >= 2 with KL(p_t || p_{t-1}) < kl_threshold and H(p_t) < max_entropy (both in nats).

    Source: the halting rule of arXiv 2604.07822; thresholds 0.01 and 3.00.
    """

    def __init__(self, kl_threshold: float = 0.01, max_entropy: float = 3.0):
        self.kl_threshold = non_negative("kl_threshold", kl_threshold)
        self.max_entropy = non_negative("max_entropy", max_entropy)

    def step(self, memory, state, readout):
        log_p, kl, entropy = compare_distributions(memory, state, readout)
        return log_p, (kl < self.kl_threshold) & (entropy < self.max_entropy)

    def stops(self, trace):
        return (trace.kl < self.kl_threshold) & (trace.entropy < self.max_entropy)

    @classmethod
    def grid(cls, effort, vocab_size):
        bounds = [entropy_bound(vocab_size)]
        if effort == "traced":
            bounds = [share * math.log(vocab_size) for share in (0.02, 0.05, 0.1, 0.2, 0.35)] + bounds
        divergences = {
            "traced": [10 ** (-k / 2) for k in range(13)],
            "decoded": [1.0, 0.3, 0.1, 0.03, 0.01, 0.003],
            "sampled": [1.0, 0.1, 0.01],
        }[effort]
        return [{"kl_threshold": kl, "max_entropy": bound} for kl in divergences for bound in bounds]


@final
class LatentRule(Rule):
    """Halt at the first loop t >= 2 with ||s_t - s_{t-1}|| / ||s_t|| < threshold (Huginn, arXiv 2502.05171)."""

    def __init__(self, threshold: float = 0.03):
        self.threshold = non_negative("threshold", threshold)

    def step(self, memory, state, readout):
        state = state.float()  # (b, K, D)
        if memory is None:
            return state, torch.zeros(state.shape[:2], dtype=torch.bool, device=state.device)
        change = (state - memory).norm(dim=-1) / state.norm(dim=-1).clamp_min(1e-12)
        return state, change < self.threshold

    def stops(self, trace):
        return trace.change < self.threshold

    @classmethod
    def grid(cls, effort, vocab_size):
        changes = {
            "traced": [10 ** (-k / 4) for k in range(13)],
            "decoded": [0.5, 0.3, 0.2, 0.1, 0.05, 0.02],
            "sampled": [0.5, 0.3, 0.2, 0.1],
        }[effort]
        return [{"threshold": change} for change in changes]


@final
class QExitRule(Rule):
    """Halt at the first loop t with sum_{s<=t} p_s >= q, p being the exit distribution of `losses_looped.py`.

    The sum is 1 - prod_{s<=t} (1 - lam_s), in float32 from the logits: in bfloat16 it rounds to 1 too early. With
    q >= 1 no batch row halts, rounding or not; with q = 0 every batch row halts at once.

    Source: Ouro (arXiv 2510.25741), whose released code runs all loops and only picks which one it reads.
    """

    reads_exit_gate = True

    def __init__(self, q: float = 0.9):
        self.q = non_negative("q", q)

    def step(self, memory, state, readout):
        assert readout is not None  # checked by Decision
        stays = nn.functional.logsigmoid(-readout(state).float())  # (b, K): log (1 - lam_t)
        stays = stays if memory is None else memory + stays
        return stays, (-torch.expm1(stays) >= self.q) & (self.q < 1)

    def stops(self, trace):
        return (trace.exit_chance >= self.q) & (self.q < 1)

    @classmethod
    def grid(cls, effort, vocab_size):
        shares = (0.1, 0.3, 0.5, 0.7, 0.9) if effort == "sampled" else (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
        return [{"q": q} for q in shares]


RULES: dict[str, type[Rule]] = {
    "fixed": FixedRule,
    "kl": KLRule,
    "kl_entropy": KLEntropyRule,
    "latent": LatentRule,
    "q_exit": QExitRule,
}


def non_negative(name: str, value: float) -> float:
    """The threshold, a number >= 0; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"halting threshold {name} must be a number >= 0, got {value!r}.")
    return value


def halting_rule(halting: str | dict | Rule | None) -> Rule | None:
    """The rule a call or a generation config names: `"kl"`, or with thresholds `{"rule": "kl", "kl_threshold": 0.1}`.

    Returns None where no batch row can halt early, which spares the bookkeeping. A threshold that is left out has a
    default, which may halt before the answer is right: that is a warning, once per rule in the life of the process.

    Raises:
        ValueError: not one of these, unknown rule or threshold (with the nearest name), or a threshold out of range.
    """
    if halting is None or isinstance(halting, Rule):
        return halting
    if not isinstance(halting, (str, dict)):
        raise ValueError(
            f"halting must be the name of a rule, a dict of a rule and its thresholds, a rule object or None (in "
            f"generate also True, the calibrated rule), got {halting!r}: the rules are {sorted(RULES)}."
        )
    settings = {"rule": halting} if isinstance(halting, str) else dict(halting)
    name = settings.pop("rule", None)
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"halting has no rule {name!r}{nearest(name, RULES)} The rules are {sorted(RULES)}.")
    allowed = RULES[name].thresholds()
    for setting in settings:
        if setting not in allowed:
            raise ValueError(
                f"halting rule {name!r} has no threshold {setting!r}{nearest(setting, allowed)} It takes {allowed}."
            )
    rule = None if name == "fixed" else RULES[name](**settings)
    left_out = [threshold for threshold in allowed if threshold not in settings]
    if left_out and not torch.compiler.is_compiling():
        logger.warning_once(
            f"halting rule {name!r} runs with the default of {', '.join(left_out)}, which is not calibrated for this "
            f"model: it may halt before the answer is right. Let `looped halting RUN --save` choose a rule, which "
            f"generate(..., halting=True) uses, or give {thresholds_wanted(name)}."
        )
    return rule


def thresholds_wanted(name: str) -> str:
    """`halting` with all thresholds of a rule, for a message."""
    return "halting={" + f'"rule": "{name}", ' + ", ".join(f'"{each}": ...' for each in RULES[name].thresholds()) + "}"


def calibrated_rule(halting: Any, calibrated: Any) -> Any:
    """`halting` of a generation; where it is True, the rule that was calibrated for the model.

    Args:
        calibrated: `calibrated_halting` of the generation config, or None.

    Raises:
        ValueError: halting is True and no rule was calibrated.
    """
    if halting is not True:
        return halting
    if calibrated is None:
        raise ValueError(
            "halting=True runs the rule that was calibrated for the model, and the generation config has none "
            f"(calibrated_halting): calibrate one by `looped halting RUN --save`, which measures rules on held-out "
            "rows. Without it halting must be the name of a rule, or a dict such as "
            f"{thresholds_wanted('kl_entropy')}."
        )
    return calibrated


def nearest(name, names) -> str:
    """How a sentence on an unknown name ends: with the nearest of the known names, if one is near."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
