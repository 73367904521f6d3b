"""What is minimised: the loss of one micro-batch."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from modeling_looped import LoopedForCausalLM

from .distillation import Distillation, interpolated
from .model import load_trained
from .recipe import Recipe


class LabelLoss:
    """Cross-entropy of the tokens asked for."""

    def __init__(self, recipe: Recipe, logits_to_keep: int):
        self.logits_to_keep, self.label_smoothing = logits_to_keep, recipe.optim.label_smoothing
        self.settings = {"num_grad_loops": recipe.num_grad_loops, "cut_chunks": recipe.cut_chunks}

    def begin(self, progress: float):
        """Called before an update with the share of the run that is done."""

    def __call__(self, model, rows: dict, labels: torch.Tensor, num_loops: int) -> torch.Tensor:
        """The loss of (b, T) rows with (b, K) labels, summed over the labels."""
        logits = model(
            **rows, logits_to_keep=self.logits_to_keep, num_loops=num_loops, use_cache=False, **self.settings
        ).logits  # (b, K, V)
        logits, labels = logits.flatten(0, 1).float(), labels.flatten()
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")


class ExitLoss(LabelLoss):
    """The model's own loss: expected under its exit gate, or the gate's alone (Ouro), see `losses_looped.py`."""

    def __init__(self, recipe: Recipe, logits_to_keep: int):
        super().__init__(recipe, logits_to_keep)
        if recipe.optim.label_smoothing or recipe.distill.teacher is not None:
            raise ValueError(
                "a model with an exit_gate learns from what every loop says of the labels: leave "
                "optim.label_smoothing and distill out."
            )

    def __call__(self, model, rows: dict, labels: torch.Tensor, num_loops: int) -> torch.Tensor:
        return model(
            **rows, shift_labels=labels, logits_to_keep=self.logits_to_keep, num_loops=num_loops, use_cache=False,
            num_items_in_batch=1, **self.settings,
        ).loss  # fmt: skip


class DistillationLoss:
    """What a teacher says of every token; labels are not used."""

    def __init__(self, recipe: Recipe, student: LoopedForCausalLM, accelerator: Accelerator):
        distill = recipe.distill
        if recipe.data.task == "molecules":
            raise ValueError("distill is for rows without padding, which packed molecules have: leave it out.")
        if recipe.num_grad_loops is not None or recipe.optim.label_smoothing:
            raise ValueError("distill takes neither num_grad_loops nor optim.label_smoothing: leave them out.")
        self.interpolates = distill.phase == "interpolation"
        if self.interpolates and (recipe.gradient_checkpointing or recipe.cut_chunks):
            raise ValueError(
                "distill.phase 'interpolation' keeps the rows of both memories, which gradient_checkpointing and "
                "cut_chunks would lose: leave them out."
            )
        teacher = load_trained("distill.teacher", distill.teacher).to(accelerator.device)
        alignment = 0.0 if self.interpolates else distill.alignment
        self.distillation = Distillation(student, teacher, alignment, distill.all_loops)
        self.student, self.alpha, self.accelerator = student, 0.0, accelerator
        self.settings = {"cut_chunks": recipe.cut_chunks, "use_cache": self.interpolates}

    def begin(self, progress: float):
        """The gated memory's share rises from 0 to 1 over the run."""
        self.alpha = progress

    def __call__(self, model, rows: dict, labels: torch.Tensor, num_loops: int) -> torch.Tensor:
        """The mean loss of (b, T) rows, times their (b, K) labels."""
        # Head and teacher are run outside of the model's forward, in the same precision.
        with (
            interpolated(self.student) if self.interpolates else nullcontext() as sharing,
            self.accelerator.autocast(),
        ):
            if sharing is not None:
                sharing.alpha = self.alpha
            loss = self.distillation(model, rows, num_loops, **self.settings)
        return loss * labels.numel()
