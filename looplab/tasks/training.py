"""What a task remembers while it trains, and what it may read of a recipe."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from looplab.runs.models import blaming


def load_tokenizer(field_name: str, folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; ValueError, naming the recipe's field, if there is none."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise ValueError(f"{field_name}: there is no tokenizer in the folder {folder!r}.")
    with blaming(folder, f"name another folder in {field_name}."):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@dataclass
class State:
    """What a run knows beside weights, optimizers and random states."""

    stage: int = 0  # deepest hop count in training; text has none
    stage_start: int = 0  # step at which the stage began
    step: int = 0  # updates made
    tokens: int = 0  # input tokens of all ranks, without padding between molecules
    seconds: float = 0.0
    learnable_depth: int = 0  # deepest hop count that passed the gate
    gate: dict[str, float] = field(default_factory=dict)  # last check: hops -> accuracy, or loops -> nats per token
    finished: bool = False
