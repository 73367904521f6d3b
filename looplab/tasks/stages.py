"""Training in stages: harder rows are added when easier ones are learnt.

    stage k   trains on all rows up to difficulty k, until the rows of difficulty k pass the held-out check

A difficulty is a number of hops, or a grade.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

from data_builders.fields import Number, number

from .data import Curriculum


@strict
@dataclass
class StagedCurriculum(Curriculum):
    """When a stage is passed, and what follows."""

    threshold: Number = number(0.95, at_least=0, below=1)  # share of right answers above which a stage is passed
    min_steps: int = number(0, at_least=0)  # fewest updates of a stage
    after_last: Literal["stop", "continue"] = "continue"  # when the last stage has passed and budget remains
    restart_optimizer: bool = False  # restart optimizer and warm-up at each stage, as arXiv 2604.07822 does


class Stages:
    """The stages of a run.

    Args:
        curriculum: of the recipe.
        trained, held_out: difficulties that the splits train and validation have, in ascending order.
        start, stop: of the first and the last stage; None for both: one stage with all rows.
        names: of the two fields of the recipe, and of the difficulties, for messages.

    Raises:
        ValueError: both ends must be in order, and there must be rows to train and to check each on.

    Attributes:
        known: the difficulties that can be a stage.
    """

    def __init__(
        self,
        curriculum: StagedCurriculum,
        trained: Sequence[int],
        held_out: Sequence[int],
        start: int | None,
        stop: int | None,
        names: tuple[str, str, str],
    ):
        self.curriculum, self.trained = curriculum, list(trained)
        self.known = [each for each in self.trained if each in held_out]
        self.start = self.trained[-1] if start is None else start
        self.stop = self.trained[-1] if stop is None else stop
        staged = start is not None or stop is not None
        if staged and (self.start > self.stop or not {self.start, self.stop} <= set(self.known)):
            first, last, what = names
            raise ValueError(
                f"curriculum.{first} {self.start} and {last} {self.stop} must be in order and have both training rows "
                f"({what} {self.trained}) and held-out rows ({what} {list(held_out)})."
            )

    def is_through(self, state) -> bool:
        """Whether the last stage has passed and the recipe stops there."""
        return self.curriculum.after_last == "stop" and state.stage == self.stop and self.is_passed(state)

    def is_passed(self, state) -> bool:
        """Whether the last check passes the stage."""
        rested = state.step - state.stage_start >= self.curriculum.min_steps
        return rested and state.gate.get(str(state.stage), 0.0) > self.curriculum.threshold

    def schedule_step(self, state) -> int:
        return state.step - state.stage_start if self.curriculum.restart_optimizer else state.step

    def advance(self, state) -> bool:
        """Note in `state` whether its stage is passed by the last check, and begin the next one; whether one began.
        After the last one, the run may end."""
        if not self.is_passed(state):
            return False
        state.learnable_depth = state.stage
        if state.stage == self.stop:
            state.finished |= self.curriculum.after_last == "stop"
        elif not state.finished:
            state.stage, state.stage_start = next(k for k in self.known if k > state.stage), state.step
            return True
        return False
