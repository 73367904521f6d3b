"""What `looped quantize` takes from a task, and what a table says of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from looplab.runs.folder import NUMBER, RecordFile, Run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

QUANTIZATION = RecordFile(
    "quantization.json",
    "quantize",
    {
        **{name: {"before": NUMBER, "after": NUMBER} for name in ("perplexity", "accuracy", "loss")},
        "bytes": {},
        "linears": {},
        "losses": [{"loops": int, "before": NUMBER, "after": NUMBER}],
    },
)


class Quantizing(ABC):
    """Rows of training data to calibrate on, and rows of test data to measure on.

    Attributes:
        rows: what a row of training data is, for messages.
        unit: what a loss is of: "token" or "answer".
        test_tokens: how many of these are measured.
    """

    rows: str
    unit: str
    test_tokens: int

    @abstractmethod
    def __len__(self) -> int:
        """How many rows there are to calibrate on."""

    @abstractmethod
    def calibration(self, numbers: "torch.Tensor") -> "list[torch.Tensor]":
        """The rows `numbers` (N,) as batches of ids (b, T), without padding."""

    @abstractmethod
    def losses(self, model: "PreTrainedModel", loops: Sequence[int]) -> "dict[int, torch.Tensor]":
        """Loop count -> mean loss (N,) of each test row, in nats."""

    @abstractmethod
    def measure(self, model: "PreTrainedModel", num_loops: int, losses: "torch.Tensor") -> dict:
        """What the report says of the model by name; the first is the main number. losses: (N,) at `num_loops`."""


def quantized_cells(runs: Sequence[Run], name: str, times: float, digits: int) -> dict[str, str]:
    """The cells of a table with the measure `name` before and after quantization, if all runs of the group were
    quantized.

    Args:
        times: the measure is shown times this.
        digits: after the point.

    Raises:
        ValueError: they were quantized in different ways.
    """
    from looplab.runs.seeds import span

    if not all(run.has(QUANTIZATION) for run in runs):
        return {}
    found = [run.read(QUANTIZATION) for run in runs]
    ways = sorted({f"{facts['method']} INT{facts['bits']}" for facts in found})
    if len(ways) > 1:
        raise ValueError(f"the runs of {runs[0]}'s group were quantized as {' and '.join(ways)}: choose one.")
    shown = f"{name} " if name != "perplexity" else ""
    return {
        f"{ways[0]}: {shown}{when}": span((facts[name][when] for facts in found), digits, times)
        for when in ("before", "after")
    }
