"""The sections `data` and `curriculum` of a recipe on chains of hops."""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

from data_builders.fields import Number, number
from looplab.tasks.data import Curriculum, Data


@strict
@dataclass
class HopData(Data):
    """Chains of hops through a graph that the builder draws."""

    task: Literal["khop", "composition"] = "khop"  # chains of any length, or of two facts
    config: str = "cpu"  # preset of the builder
    weighting: Literal["rows", "uniform"] = "rows"  # draw hop counts in proportion to their rows, or all alike
    readout: Literal["token", "last"] = "token"  # where the answer is read: an appended token, or the last relation
    pad_to: int | None = number(at_least=1)  # pad rows to this many tokens and read at the end, as the paper does
    at_least_hops: bool = False  # raise the loop count of a batch to its hop count if it is smaller

    def preset(self) -> tuple[str, dict]:
        return self.config, {"seed": self.seed} | self.overrides


@strict
@dataclass
class HopCurriculum(Curriculum):
    """Stage k trains on 1 .. k hops together until k hops pass the held-out check. Both ends are the deepest hop count
    in the data unless given."""

    start_hops: int | None = number(at_least=1)  # hops of the first stage
    stop_hops: int | None = number(at_least=1)  # hops of the last stage
    threshold: Number = number(0.95, at_least=0, below=1)  # share of right answers above which a stage is passed
    min_steps: int = number(0, at_least=0)  # fewest updates of a stage
    after_last: Literal["stop", "continue"] = "continue"  # when stop_hops has passed and budget remains
    restart_optimizer: bool = False  # restart optimizer and warm-up at each stage, as the paper does

    def check(self) -> None:
        if self.start_hops is not None and self.stop_hops is not None and self.start_hops > self.stop_hops:
            raise ValueError(
                f"curriculum.start_hops {self.start_hops} must not be above curriculum.stop_hops {self.stop_hops}."
            )
