"""The sections `data` and `curriculum` of a recipe on chains of hops."""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

from data_builders.fields import number
from looplab.tasks.data import Data, RowShape
from looplab.tasks.stages import StagedCurriculum


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

    def shape(self) -> RowShape:
        """Of all hop counts in the data, also those that a curriculum may never reach."""
        from data_builders import task_builder
        from data_builders.tokenizers import HOP_SPECIALS

        preset, fields = self.preset()
        config = task_builder(self.builder, preset, **fields).config
        rows = config.train_rows() if self.weighting == "rows" else dict.fromkeys(config.train_rows(), 1)
        fixed = 1 + (self.readout == "token")  # the entity, and where the answer is read
        tokens = {self.pad_to: 1.0} if self.pad_to else {k + fixed: n / sum(rows.values()) for k, n in rows.items()}
        return RowShape(len(HOP_SPECIALS) + config.num_entities + config.num_relations, tokens, logits=1)


@strict
@dataclass
class HopCurriculum(StagedCurriculum):
    """Stage k trains on 1 .. k hops together until k hops pass the held-out check. Both ends are the deepest hop count
    in the data unless given."""

    start_hops: int | None = number(at_least=1)  # hops of the first stage
    stop_hops: int | None = number(at_least=1)  # hops of the last stage

    def check(self) -> None:
        if self.start_hops is not None and self.stop_hops is not None and self.start_hops > self.stop_hops:
            raise ValueError(
                f"curriculum.start_hops {self.start_hops} must not be above curriculum.stop_hops {self.stop_hops}."
            )
