"""Training objectives: the loss of the last loop, or of every loop weighted by the chance that it is the last.

    lam_t = sigmoid(exit_gate(norm(state_t)))                       # (B, K)  chance to halt after loop t
    p_t   = lam_t prod_{s<t} (1 - lam_s);   p_R = prod_{s<R} (1 - lam_s)
    loss  = mean over tokens of  sum_t p_t CE_t - beta H(p)          exit_loss="expected": model and gate
    loss  = mean over tokens and t >= 2 of -[w log(1 - lam_t) + (1 - w) log lam_t]                    "gate": gate only
            w = sigmoid(50 (max(0, CE_{t-1} - CE_t) - 0.005))        chance to go on that the loop was worth

Source: Ouro (arXiv 2510.25741), stages 1 and 2; a weight beta on the entropy is, up to a constant, one on KL(p ||
uniform). All of it is computed in float32. Legend: B rows, K positions, D hidden size, V vocabulary, R loops.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch
from torch import nn

from .calls_looped import LoopStates, Observer


def log_exit_distribution(gate_logits: torch.Tensor, loops_run: torch.Tensor | None = None) -> torch.Tensor:
    """log p_t, the log of the chance to halt after loop t: (..., R) float32. The last loop that ran takes the rest.

    Args:
        gate_logits: (..., R), the exit gate's after every loop; that of the last loop is not used.
        loops_run: loops that ran, of shape (...), where they differ; p_t is 0 (its log -inf) beyond.
    """
    num_loops = gate_logits.shape[-1]
    loops = torch.arange(1, num_loops + 1, device=gate_logits.device)
    last = torch.as_tensor(num_loops if loops_run is None else loops_run, device=loops.device).unsqueeze(-1)
    gate_logits = gate_logits.float()
    stays = nn.functional.logsigmoid(-gate_logits).cumsum(-1)  # log prod_{s<=t} (1 - lam_s)
    reached = nn.functional.pad(stays[..., :-1], (1, 0))
    log_p = reached + torch.where(loops == last, 0.0, nn.functional.logsigmoid(gate_logits))
    return log_p.masked_fill(loops > last, float("-inf"))


def exit_distribution(gate_logits: torch.Tensor, loops_run: torch.Tensor | None = None) -> torch.Tensor:
    """p_t, the chance to halt after loop t: (..., R) logits of the exit gate -> (..., R) float32 that sums to 1."""
    return log_exit_distribution(gate_logits, loops_run).exp()


def expected_loss(
    gate_logits: torch.Tensor,
    losses: torch.Tensor,
    entropy_weight: float,
    loops_run: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_t p_t CE_t - entropy_weight H(p) of each token: (...,) float32 in nats (Ouro, stage 1).

    Args:
        gate_logits, losses: (..., R) per loop; losses in nats.
        entropy_weight: beta, >= 0.
        loops_run: as in `log_exit_distribution`.
    """
    log_p = log_exit_distribution(gate_logits, loops_run)
    p = log_p.exp()
    # A loop that did not run has p = 0 and log p = -inf, whose product and its gradient are not numbers.
    return (p * (losses.float() + entropy_weight * log_p.masked_fill(log_p.isneginf(), 0.0))).sum(-1)


def gate_loss(
    gate_logits: torch.Tensor,
    losses: torch.Tensor,
    loops_run: torch.Tensor | None = None,
    steepness: float = 50.0,
    least_gain: float = 0.005,
) -> torch.Tensor:
    """The exit gate's cross-entropy against what each loop gained, (...,) float32 in nats (Ouro, stage 2).

    It is the mean over loops t >= 2. With one loop there is nothing to decide, and it is 0. Losses are detached.

    Args:
        gate_logits, losses: (..., R) per loop; losses in nats.
        loops_run: as in `log_exit_distribution`.
        steepness: k, per nat.
        least_gain: gamma, the gain in nats at which going on and halting are worth the same.
    """
    losses, later = losses.float().detach(), gate_logits[..., 1:].float()
    gain = (losses[..., :-1] - losses[..., 1:]).clamp_min(0)  # (..., R - 1)
    goes_on = torch.sigmoid(steepness * (gain - least_gain))
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(later, 1 - goes_on, reduction="none")
    loops = torch.arange(2, losses.shape[-1] + 1, device=losses.device)
    last = torch.as_tensor(losses.shape[-1] if loops_run is None else loops_run, device=loops.device).unsqueeze(-1)
    return (cross_entropy * (loops <= last)).sum(-1) / (last.squeeze(-1) - 1).clamp_min(1)


def shift(labels: torch.Tensor) -> torch.Tensor:
    """(B, T) labels -> (B, T) the next token's, -100 at the end."""
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


class Objective(ABC):
    """What `labels` train: a loss of a `LoopedForCausalLM`."""

    @abstractmethod
    def states(self, logits_to_keep: int | torch.Tensor, also: Observer | None) -> LoopStates | None:
        """What observes the forward pass for this objective, see `LoopStates`; None where the logits are enough."""

    @abstractmethod
    def __call__(
        self,
        model,
        logits: torch.Tensor,
        states: LoopStates | None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            model: the LoopedForCausalLM.
            logits: (B, K, V) of the last loop.
            states: what `states` made, after the forward pass.
            labels: (B, K), of the same positions, to be shifted by one; -100 has no loss.
            shift_labels: (B, K), the next token's; in the place of `labels`.
            kwargs: `num_items_in_batch`, by which a sum over labels is divided instead of their mean being taken.
        """


@final
class LastLoopLoss(Objective):
    """Cross-entropy of the logits that are returned."""

    def states(self, logits_to_keep, also):
        return None

    def __call__(self, model, logits, states, labels=None, shift_labels=None, **kwargs):
        return model.loss_function(
            logits=logits, labels=labels, vocab_size=model.config.vocab_size, shift_labels=shift_labels, **kwargs
        )


class ExitObjective(Objective):
    """A loss of what the exit gate and the head say after every loop.

    trains_all: all weights get a gradient, not those of the exit gate alone.
    """

    trains_all: ClassVar[bool] = True

    def __init__(self, config):
        self.entropy_weight = config.exit_entropy_weight

    def states(self, logits_to_keep, also):
        return LoopStates(logits_to_keep, also)

    def __call__(self, model, logits, states, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if shift_labels is None:
            assert labels is not None
            shift_labels = shift(labels)
        labels = shift_labels.to(logits.device)  # (B, K)
        gate_logits, losses = (states.spread(values) for values in self.read(model, states, labels))  # (B, K, R)
        kept = labels != -100
        per_token = self.per_token(gate_logits, losses, states.loops_run().unsqueeze(-1))
        total = per_token.masked_fill(~kept, 0.0).sum()
        return total / (kept.sum() if num_items_in_batch is None else num_items_in_batch)

    def read(self, model, states: LoopStates, labels: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Gate logits and cross-entropies (nats) of every loop, (b, K) each, with the next tokens' labels (B, K)."""
        hidden_states, losses = self.read_head(model, states, labels)
        return [model.model.exit_logits(hidden) for hidden in hidden_states], losses

    def read_head(self, model, states, labels) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The normalised states (b, K, D) and the cross-entropies (b, K) of every loop."""
        hidden_states = [model.model.readout_norm(state) for _, state in states.visits]
        losses = [
            nn.functional.cross_entropy(
                model.lm_head(hidden).float().transpose(1, 2), labels[rows], ignore_index=-100, reduction="none"
            )
            for hidden, (rows, _) in zip(hidden_states, states.visits, strict=True)
        ]
        return hidden_states, losses

    @abstractmethod
    def per_token(self, gate_logits: torch.Tensor, losses: torch.Tensor, loops_run: torch.Tensor) -> torch.Tensor:
        """Gate logits and cross-entropies (B, K, R), and the loops run, (B, 1) -> the loss of each token, (B, K)."""


@final
class ExpectedLoss(ExitObjective):
    """Ouro's stage 1 objective; not the loss of mixed logits, which the released file computes."""

    def per_token(self, gate_logits, losses, loops_run):
        return expected_loss(gate_logits, losses, self.entropy_weight, loops_run)


@final
class GateLoss(ExitObjective):
    """Ouro's stage 2 objective: the exit gate learns which loops were worth it; the rest gets no gradient."""

    trains_all = False

    def read_head(self, model, states, labels):
        with torch.no_grad():
            hidden_states, losses = super().read_head(model, states, labels)
        return [hidden.detach() for hidden in hidden_states], losses  # with no norm to apply they are the states

    def per_token(self, gate_logits, losses, loops_run):
        return gate_loss(gate_logits, losses, loops_run)


EXIT_LOSSES: dict[str, type[ExitObjective]] = {"expected": ExpectedLoss, "gate": GateLoss}


def make_objective(config) -> Objective:
    """The objective of `labels` that a configuration asks for."""
    return EXIT_LOSSES[config.exit_loss](config) if config.exit_gate else LastLoopLoss()
