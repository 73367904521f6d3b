"""Figures of `looped lens` on hops: heat maps of words x layer calls, in %, with a column per split kind.

    lens.png     share of chains in which a state reads out the bridge, and the answer
    patch.png    share of corrupted runs that give the clean answer after one clean state was put in
    swap.png     share of runs that follow the other bridge after its direction was exchanged
    realign.png  share of runs that are right with a token's embedding in the place of one state
    probe.png    accuracy of a linear probe for the bridge, and for the answer
    stages.png   lens, patch and swap over training, at the positions where the two-hop mechanism would be

Figures count loops and layers from 1, records count from 0. Later layer calls are higher up.
"""

import re
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from looplab.instruments.drawing import (
    NAN,
    call_labels,
    call_of,
    name_lines,
    ordered,
    panel_grid,
    points,
    shade,
    share,
)

from .rows import KIND_WORDS


def words_of(at: str) -> str:
    """How figures name the words of a position, since relations of the graph are called r0, r1, .. as well.

    h -> start, r2 -> relation 2, r1+r2 -> relations 1+2, r1..r4 -> relations 1..4; a readout token keeps its name.
    """
    found = re.fullmatch(r"r(\d+)(?:(\+|\.\.)r(\d+))?", at)
    if found is None:
        return "start" if at == "h" else at
    first, joint, last = found.groups()
    return f"relation {first}" if joint is None else f"relations {first}{joint}{last}"


def kind_title(row: dict) -> str:
    return KIND_WORDS.get(row["split_kind"], row["split_kind"].replace("_", " "))


def entity_word(row: dict) -> str:
    """The name of the entity that a record is about: answer, bridge, or bridge N."""
    if row["hop"] == row["hops"]:
        return "answer"
    return "bridge" if row["hops"] == 2 else f"bridge {row['hop']}"


def lens_figures(rows: Sequence[dict]) -> dict[str, Figure]:
    """Name -> figure, for each measure among the records of one model."""
    by_measure = {
        name: [row for row in rows if row["measure"] == name] for name in ("lens", "patch", "swap", "realign", "probe")
    }
    reached = {row["split_kind"]: row["accuracy"] for row in rows if row["measure"] == "accuracy"}
    lens = [row for row in by_measure["lens"] if row["hop"] > 0]
    who = f"{rows[0]['run']}, {rows[0]['snapshot']}"

    def answers(panel: Sequence[dict]) -> str:
        return f"answers {share(reached[panel[0]['split_kind']])}"

    def to_recover(panel: Sequence[dict]) -> str:
        return f"clean run {share(panel[0]['source'])}"

    def token(row: dict) -> str:
        what = {"said": "the token it says", "bridge": entity_word(row)}[row["of"]]
        return f"{what},\n{share(row['weight'])} of the state"

    def unchanged(panel: Sequence[dict]) -> str:
        return f"without {share(panel[0]['unchanged'])}"

    def random_step(panel: Sequence[dict]) -> str:
        return f"random step at most {share(max(row['random_swapped'] for row in panel))}"

    def controls(panel: Sequence[dict]) -> str:
        random_init = max(row["random_init"] for row in panel)
        return f"random weights at most {share(random_init)}\nmajority {share(panel[0]['majority'])}"

    plan = {
        "lens": (lens, "top1", entity_word, answers, "states that read out the entity (%)"),
        "patch": (by_measure["patch"], "recovered", lambda row: f"{words_of(row['changed'])} changed", to_recover,
                  "clean answer restored (%)"),
        "swap": (by_measure["swap"], "swapped", lambda row: f"{entity_word(row)} exchanged", random_step,
                 "answer follows the other bridge (%)"),
        "realign": (by_measure["realign"], "realigned", token, unchanged, "right answers (%)"),
        "probe": (by_measure["probe"], "accuracy", entity_word, controls, "probe accuracy (%)"),
    }  # fmt: skip
    return {
        name: heat_maps(chosen, value, line, note, scale, title=who)
        for name, (chosen, value, line, note, scale) in plan.items()
        if chosen
    }


def heat_maps(
    rows: Sequence[dict],
    value: str,
    line: Callable[[dict], str],
    note: Callable[[Sequence[dict]], str],
    scale: str,
    title: str,
) -> Figure:
    """Heat maps of the field `value` over words (`at`) x layer calls, a column per split kind.

    Args:
        line: from a record to the name of the line of panels that it belongs to.
        note: from the records of a panel to the text above it: its control, or the most that can be reached.
        scale: label of the colour bar.
    """
    lines, kinds = ordered(map(line, rows)), ordered(row["split_kind"] for row in rows)
    calls, words = ordered(map(call_of, rows)), ordered(row["at"] for row in rows)
    figure, panels = panel_grid(lines, kinds, 0.75 + 0.43 * len(words), 0.85 + 0.22 * len(calls))
    for name, across in zip(lines, panels, strict=True):
        for kind, axes in zip(kinds, across, strict=True):
            own = [row for row in rows if line(row) == name and row["split_kind"] == kind]
            cells = {(call_of(row), row["at"]): row[value] for row in own}
            image = shade(axes, [[cells.get((call, word), NAN) for word in words] for call in calls])
            axes.set_xticks(range(len(words)), map(words_of, words), fontsize=points(figure, 8), rotation=90)
            axes.set_title(f"{kind_title(own[0])}\n{note(own)}", fontsize=points(figure, 8))
        name_lines(across, name, call_labels(calls))
    figure.colorbar(image, ax=list(panels.flat), aspect=30).set_label(scale, fontsize=points(figure, 9))
    figure.suptitle(f"{title}: states by position and layer call", fontsize=points(figure, 10))
    return figure


def stages_figure(rows: Sequence[dict]) -> Figure:
    """Accuracy, and below it snapshots x layer calls: where bridge and answer can be read out and cause the answer.

    The first two lines are the top-1 rates of the lens, for the bridge at its relation and for the answer at the
    readout. The other two change the states of all relations at once: clean states restore the answer after the start
    entity was changed, and the answer follows an exchanged bridge.
    """
    kinds, steps = ordered(row["split_kind"] for row in rows), ordered(row["step"] for row in rows)
    measured = [row for row in rows if row["measure"] != "accuracy"]
    calls, hops = ordered(map(call_of, measured)), measured[0]["hops"]
    readout = [row for row in measured if row["measure"] == "lens"][-1]["at"]
    relations = [row for row in measured if row["measure"] == "swap"][-1]["at"]
    lines = {
        "bridge read out\nat relation 1": ("lens", "r1", {"hop": 1}, "top1"),
        f"answer read out\nat {words_of(readout)}": ("lens", readout, {"hop": hops}, "top1"),
        f"clean {words_of(relations)}\nput back": ("patch", relations, {}, "recovered"),
        f"bridge swapped at\n{words_of(relations)}": ("swap", relations, {}, "swapped"),
    }
    figure, panels = panel_grid(["accuracy", *lines], kinds, 0.9 + 0.3 * max(len(steps), 5), 0.6 + 0.2 * len(calls))
    for column, kind in enumerate(kinds):
        own = [row for row in rows if row["split_kind"] == kind]
        reached = {row["step"]: 100 * row["accuracy"] for row in own if row["measure"] == "accuracy"}
        axes = panels[0, column]
        axes.plot(range(len(steps)), [reached[step] for step in steps], "o-", color="black", markersize=3)
        axes.set(ylim=(-5, 105), xlim=(-0.5, len(steps) - 0.5), xticks=[])
        axes.set_title(kind_title(own[0]), fontsize=points(figure, 9))
        for (measure, word, where, value), across in zip(lines.values(), panels[1:], strict=True):
            cells = {
                (call_of(row), row["step"]): row[value]
                for row in own
                if row["measure"] == measure and row["at"] == word and where.items() <= row.items()
            }
            table = [[cells[call, step] for step in steps] for call in calls]
            image = shade(across[column], table, numbers=len(steps) <= 15)
            across[column].set_xticks([])
        panels[-1, column].set_xticks(range(len(steps)), [f"{step:,}" for step in steps], rotation=90)
        panels[-1, column].tick_params(axis="x", labelsize=points(figure, 8))
        panels[-1, column].set_xlabel("updates of the training", fontsize=points(figure, 9))
    panels[0, 0].set_ylabel("accuracy (%)", fontsize=points(figure, 9))
    for axes in panels[0, 1:]:
        axes.set_yticks([])
    for name, across in zip(lines, panels[1:], strict=True):
        name_lines(across, name, call_labels(calls))
    figure.colorbar(image, ax=list(panels[1:].flat), aspect=30).set_label(
        "share of chains (%)", fontsize=points(figure, 9)
    )
    figure.suptitle(f"{rows[0]['run']}: what states say and cause, over training", fontsize=points(figure, 10))
    return figure
