"""Halting rules: when a row of the batch stops looping.

    memory = None
    after every loop:
        memory, done = rule.step(memory, state, readout)     # (B, K, ...), (B, K) bool
        a row leaves the batch when all of its positions are done

The positions are those whose logits were asked for (`logits_to_keep`; padding excluded), so generation decides on the
token being produced. A rule that compares a loop with the one before cannot halt before the second loop; a row that
never satisfies its rule runs `num_loops` loops. What `readout` gives is the rule's choice: the head's logits, or with
`reads_exit_gate` those of the exit gate. Legend: B rows, K positions, D hidden size, V vocabulary.
"""

import difflib
import inspect
from collections.abc import Callable

import torch
from torch import nn

Readout = Callable[[torch.Tensor], torch.Tensor]


class FixedRule:
    """Every row runs all its loops; the base of the other rules."""

    reads_exit_gate = False  # of a state: the exit gate's logits (B, K) instead of the head's (B, K, V)

    def step(self, memory, state: torch.Tensor, readout: Readout | None) -> tuple[torch.Tensor, torch.Tensor]:
        return state, torch.zeros(state.shape[:2], dtype=torch.bool, device=state.device)


class KLRule(FixedRule):
    """Halt at the first loop t >= 2 with KL(p_t || p_{t-1}) < kl_threshold (nats).

    Source: the halting ablation of arXiv 2604.07822, without the entropy condition; it stops too early on long
    chains.
    """

    max_entropy = float("inf")

    def __init__(self, kl_threshold: float = 0.01):
        self.kl_threshold = non_negative("kl_threshold", kl_threshold)

    def step(self, memory, state, readout):
        if readout is None:
            raise ValueError(
                f"the halting rule {type(self).__name__} compares output distributions, which LoopedModel does not "
                "have: call it through LoopedForCausalLM, or use halting='latent'."
            )
        log_p = nn.functional.log_softmax(readout(state).float(), dim=-1)  # (B, K, V)
        if memory is None:
            return log_p, torch.zeros(log_p.shape[:2], dtype=torch.bool, device=log_p.device)
        p = log_p.exp()
        # Rounding can make the sum slightly negative, which a threshold of 0 would take for convergence.
        kl = (p * (log_p - memory)).sum(-1).clamp_min(0)
        entropy = -(p * log_p).sum(-1)
        return log_p, (kl < self.kl_threshold) & (entropy < self.max_entropy)


class KLEntropyRule(KLRule):
    """Halt at the first loop t >= 2 with KL(p_t || p_{t-1}) < kl_threshold and H(p_t) < max_entropy (both in nats).

    Source: the halting rule of arXiv 2604.07822; thresholds 0.01 and 3.00.
    """

    def __init__(self, kl_threshold: float = 0.01, max_entropy: float = 3.0):
        super().__init__(kl_threshold)
        self.max_entropy = non_negative("max_entropy", max_entropy)


class LatentRule(FixedRule):
    """Halt at the first loop t >= 2 with ||s_t - s_{t-1}|| / ||s_t|| < threshold (Huginn, arXiv 2502.05171)."""

    def __init__(self, threshold: float = 0.03):
        self.threshold = non_negative("threshold", threshold)

    def step(self, memory, state, readout):
        state = state.float()  # (B, K, D)
        if memory is None:
            return state, torch.zeros(state.shape[:2], dtype=torch.bool, device=state.device)
        change = (state - memory).norm(dim=-1) / state.norm(dim=-1).clamp_min(1e-12)
        return state, change < self.threshold


class QExitRule(FixedRule):
    """Halt at the first loop t with sum_{s<=t} p_s >= q, p being the exit distribution of `losses_looped.py`.

    The sum is 1 - prod_{s<=t} (1 - lam_s), in float32 from the logits: in bfloat16 it rounds to 1 too early. With
    q >= 1 no row halts, rounding or not; with q = 0 every row halts at once.

    Source: Ouro (arXiv 2510.25741), whose released code runs all loops and only picks which one it reads.
    """

    reads_exit_gate = True

    def __init__(self, q: float = 0.9):
        self.q = non_negative("q", q)

    def step(self, memory, state, readout):
        assert readout is not None  # checked by Decision
        stays = nn.functional.logsigmoid(-readout(state).float())  # (B, K)
        stays = stays if memory is None else memory + stays
        return stays, (-torch.expm1(stays) >= self.q) & (self.q < 1)


RULES = {"fixed": FixedRule, "kl_entropy": KLEntropyRule, "kl": KLRule, "latent": LatentRule, "q_exit": QExitRule}


def non_negative(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"halting threshold {name} must be a number >= 0, got {value!r}.")
    return value


def halting_rule(halting: str | dict | FixedRule | None) -> FixedRule | None:
    """The rule a call or a generation config names: `"kl"`, or with thresholds `{"rule": "kl", "kl_threshold": 0.1}`.

    Returns None where no row can halt early, which spares the bookkeeping.

    Raises:
        ValueError: not one of these, unknown rule or threshold (with the nearest name), or a threshold out of range.
    """
    if halting is None or isinstance(halting, FixedRule):
        return halting
    if not isinstance(halting, (str, dict)):
        raise ValueError(
            f"halting must be the name of a rule, a dict of a rule and its thresholds, a rule object or None, got "
            f"{halting!r}: the rules are {sorted(RULES)}."
        )
    settings = {"rule": halting} if isinstance(halting, str) else dict(halting)
    name = settings.pop("rule", None)
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"halting has no rule {name!r}{nearest(name, RULES)} The rules are {sorted(RULES)}.")
    allowed = list(inspect.signature(RULES[name]).parameters)
    for setting in settings:
        if setting not in allowed:
            raise ValueError(
                f"halting rule {name!r} has no threshold {setting!r}{nearest(setting, allowed)} It takes {allowed}."
            )
    return None if name == "fixed" else RULES[name](**settings)


def nearest(name, names) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
