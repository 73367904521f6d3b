"""Fields of a recipe on chains of hops: which chains, and in which stages they come."""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

from data_builders.fields import Number, number
from looplab.tasks.data import Curriculum, Data


@strict
@dataclass
class HopData(Data):
    task: Literal["khop", "composition"] = "khop"
    config: str = "cpu"  # preset of the builder
    weighting: Literal["rows", "uniform"] = "rows"  # hop count of a step: by the rows each has, or all alike
    readout: Literal["token", "last"] = "token"  # where the answer is read: an appended token, or the last relation
    pad_to: int | None = number(at_least=1)  # pad every row to so many tokens and read at its end, as the paper does
    at_least_hops: bool = False  # raise a batch's loops to its hop count where fewer were drawn

    def load(self):
        from data_builders import load_task

        return load_task(self.task, self.config, **({"seed": self.seed} | self.overrides))


@strict
@dataclass
class HopCurriculum(Curriculum):
    """Stage k trains on 1..k hops jointly until k passes the held-out check. Ends default to the deepest hop in the
    data."""

    start_hops: int | None = number(at_least=1)
    stop_hops: int | None = number(at_least=1)
    threshold: Number = number(0.95, at_least=0, below=1)  # share of right answers above which a stage is passed
    min_steps: int = number(0, at_least=0)  # of a stage
    after_last: Literal["stop", "continue"] = "continue"  # when stop_hops passed and budget remains
    restart_optimizer: bool = False  # the paper starts optimizer and warm-up afresh at each stage

    def check(self) -> None:
        if self.start_hops is not None and self.stop_hops is not None and self.start_hops > self.stop_hops:
            raise ValueError(
                f"curriculum.start_hops {self.start_hops} must not be above curriculum.stop_hops {self.stop_hops}."
            )
