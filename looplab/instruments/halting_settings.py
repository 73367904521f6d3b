"""Halting settings: a halting rule, its thresholds and a budget of loops, as a line of halting.jsonl names them."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from looplab.runs.folder import Run
from modeling_looped import LoopedConfig
from modeling_looped.generation_looped import CALIBRATED
from modeling_looped.halting_looped import RULES, Effort

SETTING_FIELDS = ("num_loops", *dict.fromkeys(name for rule in RULES.values() for name in rule.thresholds()))


@dataclass(frozen=True)
class HaltingSetting:
    """A halting setting.

    halting: the rule and its thresholds, as `forward` takes them; None runs all loops.
    num_loops: the budget, the largest loop count that a batch row may reach.
    """

    halting: dict | None
    num_loops: int

    @property
    def rule(self) -> str:
        """Name of the halting rule."""
        return self.halting["rule"] if self.halting else "fixed"

    def row(self) -> dict:
        """The setting as fields of a measurement's row."""
        return {"num_loops": self.num_loops, **(self.halting or {"rule": "fixed"})}


def rules_to_try(config: LoopedConfig, effort: Effort) -> list[dict]:
    """Every rule that a model of this configuration may use, at the thresholds of the rule's `grid` for `effort`."""
    return [
        {"rule": name, **thresholds}
        for name, rule in RULES.items()
        if config.exit_gate or not rule.reads_exit_gate
        for thresholds in rule.grid(effort, config.vocab_size)
    ]


def exit_settings(config: LoopedConfig, num_loops: int, effort: Effort) -> list[HaltingSetting]:
    """All settings of `rules_to_try` with the budget `num_loops`, then the fixed loop counts below it.

    Raises:
        ValueError: there is only one loop.
    """
    if num_loops < 2:
        raise ValueError(f"num_loops={num_loops} leaves no loop out: halting is measured with 2 loops or more.")
    rules = [HaltingSetting(rule, num_loops) for rule in rules_to_try(config, effort)]
    return rules + [HaltingSetting(None, fixed) for fixed in range(1, num_loops)]


def threshold_text(row: dict) -> str:
    """The first threshold of a record's rule; for the rule `fixed`, the loop count."""
    first = [*RULES[row["rule"]].thresholds(), "num_loops"][0]
    return f"{row[first]:g}"


def setting_of(row: dict) -> HaltingSetting:
    """The setting of a record of halting.jsonl."""
    if row["rule"] == "fixed":
        return HaltingSetting(None, row["num_loops"])
    thresholds = {name: row[name] for name in RULES[row["rule"]].thresholds()}
    return HaltingSetting({"rule": row["rule"], **thresholds}, row["num_loops"])


def saved_setting(model: PreTrainedModel, num_loops: int) -> HaltingSetting | None:
    """The setting that `generate(num_loops=num_loops, halting=True)` runs; None if no rule is saved with the model."""
    rule = model.generation_config.to_dict().get(CALIBRATED)
    return None if rule is None else HaltingSetting(rule, num_loops)


def saved_text(row: Mapping, found: str) -> str:
    """A setting in a line of text. row: as from `HaltingSetting.row`. found: what was measured."""
    return f"saved rule {setting_of(row).halting}, at most {row['num_loops']} loops: {found}"


def save_rule(run: Run, best: Mapping | None, criterion: str) -> str:
    """Write a rule as `calibrated_halting` of the run's generation config, where `halting=True` finds it.

    Args:
        best: the record of halting.jsonl whose rule is written; None if no rule meets the criterion.
        criterion: what a rule has to do to be saved: the end of a sentence about it.

    Returns:
        What was written, as text.

    Raises:
        ValueError: no rule meets the criterion, or the generation config cannot be written.
    """
    if best is None:
        raise ValueError(
            f"no halting rule is saved for {run}: none {criterion}. See its halting.jsonl for those measured."
        )
    setting = setting_of(best)
    path = run.save_generation_settings(**{CALIBRATED: setting.halting})
    return (
        f"saved in {path}: {setting.halting}\n"
        f"It is the rule with the fewest loops that {criterion}; it was measured as "
        f"generate(..., num_loops={setting.num_loops}, halting=True) runs it."
    )
