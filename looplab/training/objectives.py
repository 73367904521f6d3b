"""What is minimised: the loss of one micro-batch.

    objective          of
    LabelLoss          the labels
    ExitLoss           the labels, as every loop sees them: the model has an exit gate
    DistillationLoss   a teacher's distributions, where the recipe names a teacher

Legend: b batch rows, T tokens and K labels of each, V ids.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from looplab.tasks.training import TaskTraining
from modeling_looped import LoopedConfig, LoopedForCausalLM

from .distillation import Distillation, interpolated
from .model import load_trained
from .recipe import Recipe


class Objective(ABC):
    """A loss of one micro-batch."""

    @abstractmethod
    def __call__(self, model, rows: dict, labels: torch.Tensor, num_loops: int, progress: float) -> torch.Tensor:
        """Scalar, the loss in nats, summed over the labels.

        Args:
            model: the model as accelerate wraps it.
            rows: tensors of a batch, (b, T) each.
            labels: (b, K); -100 counts for nothing.
            num_loops: loops of every batch row.
            progress: share of the run that is done, 0 .. 1.
        """


def make_objective(
    recipe: Recipe, model: LoopedForCausalLM, task: TaskTraining, accelerator: Accelerator
) -> Objective:
    """The objective of a recipe.

    Raises:
        ValueError: fields of the recipe ask for two objectives.
    """
    if recipe.distill.teacher is not None and not model.config.exit_gate:
        return DistillationLoss(recipe, model, task.padding, accelerator)
    return label_objective(recipe, model.config, task.logits_to_keep)


def label_objective(recipe: Recipe, config: LoopedConfig, logits_to_keep: int) -> "ExitLoss | LabelLoss":
    """The objective of a recipe without a teacher, of labels at the last `logits_to_keep` positions, or at all (0).

    Raises:
        ValueError: fields of the recipe ask for two objectives.
    """
    return (ExitLoss if config.exit_gate else LabelLoss)(recipe, logits_to_keep)


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Of logits (b, K, V) and labels (b, K), in float32."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=label_smoothing, reduction="sum"
    )


class LabelLoss(Objective):
    """Cross-entropy of the labels. Compiled, it takes no float32 copy of logits in bfloat16."""

    def __init__(self, recipe: Recipe, logits_to_keep: int):
        self.cross_entropy = torch.compile(summed_cross_entropy) if recipe.compile else summed_cross_entropy
        self.logits_to_keep, self.label_smoothing = logits_to_keep, recipe.optim.label_smoothing
        self.settings = {"num_grad_loops": recipe.num_grad_loops, "cut_chunks": recipe.cut_chunks}

    def __call__(self, model, rows: dict, labels: torch.Tensor, num_loops: int, progress: float) -> torch.Tensor:
        logits = model(
            **rows, logits_to_keep=self.logits_to_keep, num_loops=num_loops, use_cache=False, **self.settings
        ).logits  # (b, K, V)
        return self.cross_entropy(logits, labels, self.label_smoothing)


class ExitLoss(Objective):
    """The model's own loss: expected under its exit gate, or the gate's alone (Ouro), see `losses_looped.py`."""

    def __init__(self, recipe: Recipe, logits_to_keep: int):
        self.logits_to_keep = logits_to_keep
        self.settings = {"num_grad_loops": recipe.num_grad_loops, "cut_chunks": recipe.cut_chunks}
        if recipe.optim.label_smoothing or recipe.distill.teacher is not None:
            raise ValueError(
                "a model with an exit_gate learns from what every loop says of the labels: leave "
                "optim.label_smoothing and distill out."
            )

    def __call__(self, model, rows: dict, labels: torch.Tensor, num_loops: int, progress: float) -> torch.Tensor:
        return model(
            **rows, shift_labels=labels, logits_to_keep=self.logits_to_keep, num_loops=num_loops, use_cache=False,
            num_items_in_batch=1, **self.settings,
        ).loss  # fmt: skip


class DistillationLoss(Objective):
    """A teacher's distribution over every next token. Labels are counted, and not used."""

    def __init__(self, recipe: Recipe, student: LoopedForCausalLM, padding: str | None, accelerator: Accelerator):
        distill = recipe.distill
        if padding is not None:
            raise ValueError(f"distill is for rows without padding, and {padding} pads them: leave distill out.")
        if recipe.num_grad_loops is not None or recipe.optim.label_smoothing:
            raise ValueError("distill takes neither num_grad_loops nor optim.label_smoothing: leave them out.")
        self.interpolates = distill.phase == "interpolation"
        if self.interpolates and (recipe.gradient_checkpointing or recipe.cut_chunks):
            raise ValueError(
                "distill.phase 'interpolation' keeps the entries of both memories, which gradient_checkpointing and "
                "cut_chunks would lose: leave both out."
            )
        teacher = load_trained("distill.teacher", distill.teacher).to(accelerator.device)
        alignment = 0.0 if self.interpolates else distill.alignment
        self.distillation = Distillation(student, teacher, alignment, distill.all_loops)
        self.student, self.accelerator = student, accelerator
        self.settings = {"cut_chunks": recipe.cut_chunks, "use_cache": self.interpolates}

    def __call__(self, model, rows: dict, labels: torch.Tensor, num_loops: int, progress: float) -> torch.Tensor:
        """The mean over tokens, times the number of labels."""
        # The share of the gated memory rises from 0 to 1 over the run.
        memory = interpolated(self.student, progress) if self.interpolates else nullcontext()
        # Head and teacher run outside of the model's forward: in the same precision.
        with memory, self.accelerator.autocast():
            loss = self.distillation(model, rows, num_loops, **self.settings)
        return loss * (labels != -100).sum()
