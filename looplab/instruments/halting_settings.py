"""A halting rule with its threshold and a budget of loops, as one row of `halting.jsonl` names it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

SETTING_FIELDS = ("kl_threshold", "max_entropy", "threshold", "num_loops")


@dataclass(frozen=True)
class HaltingSetting:
    """A halting rule with its thresholds, as `forward` takes it, and the budget; rule None runs all loops."""

    halting: dict | None
    num_loops: int

    @property
    def rule(self) -> str:
        return self.halting["rule"] if self.halting else "fixed"

    def row(self) -> dict:
        return {"num_loops": self.num_loops, **(self.halting or {"rule": "fixed"})}


def exit_settings(
    model: PreTrainedModel, num_loops: int, thresholds: dict[str, Sequence[float]]
) -> list[HaltingSetting]:
    """Every rule of `thresholds` that the model has, with at most `num_loops` loops, then the fixed counts below.

    Raises:
        ValueError: there is only one loop.
    """
    if num_loops < 2:
        raise ValueError(f"num_loops={num_loops} leaves no loop out: exits are measured with 2 or more.")
    bound = entropy_bound(model.config.vocab_size)
    rules = [{"rule": "kl_entropy", "kl_threshold": kl, "max_entropy": bound} for kl in thresholds["kl_entropy"]]
    rules += [{"rule": "latent", "threshold": change} for change in thresholds["latent"]]
    rules += [{"rule": "q_exit", "q": q} for q in thresholds["q_exit"] if model.config.exit_gate]
    return [HaltingSetting(rule, num_loops) for rule in rules] + [
        HaltingSetting(None, fixed) for fixed in range(1, num_loops)
    ]


def threshold_text(row: dict) -> str:
    """The threshold of a row's rule; of a fixed count, that."""
    return f"{row.get('kl_threshold', row.get('threshold', row.get('q', row['num_loops']))):g}"


def setting_of(row: dict) -> HaltingSetting:
    """The setting of a row of halting.jsonl."""
    thresholds = {key: row[key] for key in ("rule", "kl_threshold", "max_entropy", "threshold", "q") if key in row}
    return HaltingSetting(None if row["rule"] == "fixed" else thresholds, row["num_loops"])


def entropy_bound(vocab_size: int) -> float:
    """The bound of arXiv 2604.07822, 3.00 nats of ln 217, scaled to another vocabulary."""
    return 3.0 / math.log(217) * math.log(vocab_size)
