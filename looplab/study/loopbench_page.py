"""What the rows of a LoopBench say, drawn from the rows alone: its page NAME.md and its figure NAME.png.

Names and seeds are those of the file and, beyond it, of the rows. A row counts if it is of the recipe that its cell
has now, and so at the rate that is the best now.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from looplab.runs.recipes import TRAIN, read_recipe_file
from looplab.runs.seeds import span, to_markdown
from looplab.runs.writing import write_whole

from .cells import read_rows
from .loopbench_file import RIGHT, Bench, Pair, chosen_rates, pairs_of, reporting, tuning
from .page import verdict
from .study_file import Study, digests_of, matches

logger = logging.getLogger(__name__)

DEFAULT = "loopbench"  # of the command
COLUMNS = 3  # of panels in the figure


@dataclass(frozen=True)
class Results:
    """A bench and the rows that count.

    Args:
        found: all rows of the file.
    """

    bench: Bench
    found: Sequence[Mapping]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Of the names in the file and in the rows. A name that nobody knows any more is told, and left out."""
        pairs = []
        for task in self.names("tasks", "task"):
            for architecture in self.names("architectures", "architecture"):
                try:
                    pairs += pairs_of(self.bench, [task], [architecture])
                except ValueError as error:
                    logger.warning(f"{error} Its rows are left out.")
        return pairs

    def names(self, own: str, field: str) -> list:
        return list(dict.fromkeys([*vars(self.bench)[own], *(row[field] for row in self.found)]))

    @cached_property
    def seeds(self) -> list[int]:
        """That are reported."""
        return [seed for seed in self.names("seeds", "seed") if seed not in self.bench.tuned_on]

    @cached_property
    def rates(self) -> dict[str, str]:
        """Arm -> the rate that is taken."""
        return chosen_rates(self.bench, self.pairs, self.found)

    @cached_property
    def study(self) -> Study | None:
        """Every pair at its rate."""
        return reporting(self.bench, self.pairs, self.seeds, self.found)

    @cached_property
    def rows(self) -> list[Mapping]:
        """That are reported."""
        if self.study is None:
            return []
        digests = digests_of(self.study)
        return [row for row in self.found if row["recipe"] == digests.get(row["arm"])]

    @cached_property
    def tuning_rows(self) -> list[Mapping]:
        """That the rates are chosen by."""
        digests = digests_of(tuning(self.bench, self.pairs))
        return [row for row in self.found if row["recipe"] == digests.get(row["arm"])]

    def of(self, **where) -> list[Mapping]:
        """The reported rows with these values."""
        return [row for row in self.rows if matches(row, where)]

    @cached_property
    def tasks(self) -> list[str]:
        """That have rows."""
        return [task for task in self.names("tasks", "task") if self.of(task=task)]

    def architectures(self, task: str) -> list[str]:
        """That have rows of the task."""
        return [name for name in self.names("architectures", "architecture") if self.of(task=task, architecture=name)]


def results_of(name: str, bench: Bench, folder: Path) -> Results:
    """Of the rows in `folder`."""
    return Results(bench, read_rows(folder / f"{name}.jsonl"))


def summary_table(results: Results) -> str:
    """A line per architecture, a column per task: right answers over all grades."""
    lines = []
    for architecture in results.names("architectures", "architecture"):
        rows = {task: results.of(task=task, architecture=architecture) for task in results.tasks}
        if any(rows.values()):
            cells = {task: span((row[RIGHT] for row in mine), 1, 100) for task, mine in rows.items()}
            lines.append({"architecture": architecture} | cells)
    chances = {task: span((row["chance"] for row in results.of(task=task)), 1, 100) for task in results.tasks}
    return to_markdown([*lines, {"architecture": "the commonest answer"} | chances])


def task_table(results: Results, task: str) -> str:
    """A line per architecture, a column per measure."""
    lines = []
    for architecture in results.architectures(task):
        rows = results.of(task=task, architecture=architecture)
        cells = {"architecture": architecture, "seeds": str(len(rows)), "rate": results.rates[rows[0]["arm"]]}
        cells |= {f"{part} %": span((row[part] for row in rows), 1, 100) for part in ("trained", "beyond")}
        cells["learnable"] = span((row["learnable"] or 0 for row in rows), 1)
        for threshold in rows[0]["reach"]:
            cells[f"reach {threshold} %"] = span((row["reach"][threshold] or 0 for row in rows), 1)
        cells["loops"] = span((row["loops"] for row in rows), 1)
        for count in results.bench.measure.kept:
            cells[f"kept at {count:,}"] = span((row["kept"].get(str(count)) for row in rows), 2)
        halting = [row["halting"] for row in rows if row["halting"] is not None]
        loops = " / ".join(span((pair[i] for pair in halting), 1) for i in (0, 1))
        cells["halting / oracle"] = loops if halting else "-"
        cells["parameters"] = span(row["parameters"] for row in rows)
        cells["TFLOP"] = span((row["flops"] for row in rows), 2, 1e-12)
        cells["KV bytes"] = span(row["kv_bytes"] for row in rows)
        cells["seconds"] = span(row["seconds"] for row in rows)
        lines.append(cells)
    return to_markdown(lines)


LEGEND = """Measured at the loop count that is best on the validation rows (`loops`), on the test rows; mean [lowest,
highest] over seeds.

- trained, beyond: right answers in %, a mean over the grades that the training reached, which may differ between seeds
  where a task has a curriculum, and over the harder ones. Compare cells by the table above, which has all grades.
- learnable: the highest trained grade such that it and all easier ones have 95 % of the validation rows right; reach:
  the highest grade of all such that it and all easier ones have so many of the test rows right. 0 is none.
- kept at R: right answers of trained grades at R loops over those at `loops`; -: the architecture has no such loops.
- halting / oracle: mean loops of the best halting rule that loses at most a point in any solved grade, and those of an
  oracle that knows the grade; -: no grade is solved, no rule is good enough, or there is one loop.
- rate: of the learning rates, the best on the tuning seeds. TFLOP: matrix products of the whole training. KV bytes: of
  a token in the cache at the model's own loop count. seconds: by the clock, of the training, on a machine that may
  have had other work.
"""


def budget_of(bench: Bench) -> str:
    """A sentence about the recipe of all cells."""
    _, recipe = read_recipe_file(bench.recipe, TRAIN)
    model, depth = recipe.get("model", {}), recipe.get("depth", {})
    drawn = ", ".join(f"{name} {value}" for name, value in depth.items())
    updates, rows, width, layers = (
        recipe.get("max_steps"), recipe.get("batch_size"), model.get("hidden_size"), model.get("num_core_layers")
    )  # fmt: skip
    return (
        f"Every cell trains the recipe `{bench.recipe}`: {updates} updates of {rows} rows, unless the task says "
        f"otherwise; {width} wide, core layers {layers}; loops drawn anew for each update ({drawn}). An architecture "
        "changes these fields alone:"
    )


def architecture_table(results: Results) -> str:
    """A line per architecture: the fields of the recipe that it changes."""
    lines = {}
    for pair in results.pairs:
        changed = text_of(pair.choices[1].overrides)[1:-1]
        lines[pair.architecture] = {"architecture": pair.architecture, "changes": f"`{changed}`" if changed else "-"}
    return to_markdown(list(lines.values()))


def page_of(name: str, results: Results) -> str:
    """The text of NAME.md."""
    bench = results.bench
    done = {(row["task"], row["architecture"], row["seed"]) for row in results.rows}
    wanted = [(pair.task, pair.architecture, seed) for pair in results.pairs for seed in results.seeds]
    left = [cell for cell in wanted if cell not in done]
    command = " ".join(["looped loopbench", *([] if name == DEFAULT else [name])])
    commits = sorted({str(row["commit"])[:7] for row in results.rows})
    taken = Counter(results.rates.values())
    lines = [
        f"# LoopBench: {name}",
        "",
        bench.question,
        "",
        f"`{command}` trains what is missing, and draws this page from `{name}.jsonl`; `{command} --check` only looks "
        f"whether page and rows agree. {len(done)} of {len(wanted)} cells ran; seeds "
        f"{', '.join(map(str, results.seeds))}, learning rates chosen on {', '.join(map(str, bench.tuned_on))}"
        + (f"; commit {', '.join(commits)}." if commits else "."),
        "",
        budget_of(bench),
        "",
        architecture_table(results),
        "",
        "Learning rates: "
        + "; ".join(
            f"{rate} (`{text_of(fields)[1:-1]}`), taken {taken[rate]} times" for rate, fields in bench.rates.items()
        )
        + f"; {len(results.tuning_rows)} trainings.",
        "",
    ]
    if results.rows:
        lines += [
            "Right answers of the test rows in %, a mean over all grades, trained and beyond: mean [lowest, highest] "
            "over seeds.",
            "",
            summary_table(results),
            "",
            f"![Right answers by grade, a panel per task, a line per architecture]({name}.png)",
            "",
            *[f"- {verdict(results.study, asked, results.rows)}" for asked in results.study.success],
            "",
            "## Task by task",
            "",
            LEGEND,
        ]
    for task in results.tasks:
        choice = next(pair.choices[0] for pair in results.pairs if pair.task == task)
        said = [f"`data: {text_of(choice.data)}`"]
        said += [f"`{text_of(choice.overrides)[1:-1]}`"] if choice.overrides else []
        said += [f"without {', '.join(choice.without)}"] if choice.without else []
        lines += [f"### {task}", "", "; ".join(said), "", task_table(results, task), ""]
    if left:
        lines += [f"Not run: {'; '.join(left_of(results, left))}."]
    return "\n".join(lines).rstrip() + "\n"


def left_of(results: Results, left: Sequence[tuple]) -> list[str]:
    """The cells (task, architecture, seed) that are left, in words: a task by its name alone if none of it ran."""
    said = []
    for task in dict.fromkeys(task for task, _, _ in left):
        if task not in results.tasks:
            said.append(task)
            continue
        seeds: dict[str, list[int]] = {}
        for _, architecture, seed in (cell for cell in left if cell[0] == task):
            seeds.setdefault(architecture, []).append(seed)
        parts = [
            name if len(mine) == len(results.seeds) else f"{name} (seed {', '.join(map(str, mine))})"
            for name, mine in seeds.items()
        ]
        said.append(f"{task}: {', '.join(parts)}")
    return said


def text_of(value) -> str:
    """Nested plain values as YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {text_of(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def check_bench(name: str, bench: Bench, folder: Path) -> bool:
    """Whether the page says what the rows say."""
    page = folder / f"{name}.md"
    return page.is_file() and page.read_text(encoding="utf-8") == page_of(name, results_of(name, bench, folder))


def draw_bench(name: str, bench: Bench, folder: Path) -> list[Path]:
    """Write the page and the figure by the rows; returns their paths."""
    from looplab.instruments.drawing import save

    results = results_of(name, bench, folder)
    written = [write_whole(folder / f"{name}.md", page_of(name, results))]
    if results.rows:
        written.append(save(figure_of(results), folder / name))
    return written


def figure_of(results: Results):
    """A panel per task: right answers over grades, a line per architecture, with bars from the lowest to the highest
    seed; a dashed line where the training ended, and a dotted one for the commonest answer."""
    from statistics import fmean

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from looplab.instruments.drawing import PALETTE, draw_band, tidy

    wide = min(COLUMNS, len(results.tasks))
    tall = -(-len(results.tasks) // wide)
    figure = Figure(figsize=(max(6.0, 3.7 * wide), 3.1 * tall + 0.7), layout="constrained")
    panels = list(figure.subplots(tall, wide, squeeze=False).flat)
    order = results.names("architectures", "architecture")
    named = {}
    for axes, task in zip(panels, results.tasks, strict=False):
        for architecture in results.architectures(task):
            rows = results.of(task=task, architecture=architecture)
            grades = list(rows[0]["grades"])
            values = [[100 * row["grades"][grade] for row in rows if grade in row["grades"]] for grade in grades]
            points = [(fmean(each), min(each), max(each)) for each in values]
            index, places = order.index(architecture), [int(grade) for grade in grades]
            draw_band(axes, places, points, index, architecture, shaded=False)
            _, low, high = zip(*points, strict=True)
            axes.vlines(places, low, high, color=PALETTE[index % len(PALETTE)], linewidth=1.2, alpha=0.5)
        rows = results.of(task=task)
        axes.axhline(100 * fmean(row["chance"] for row in rows), color="0.5", linestyle=":", linewidth=0.9, zorder=0)
        trained = [row["hardest_trained"] for row in rows if row["hardest_trained"] is not None]
        if trained:
            axes.axvline(max(trained), color="0.6", linestyle="--", linewidth=0.8, zorder=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 103)
        axes.set_title(task, loc="left", fontsize=10)
        tidy(axes, "right answers (%)", "grade")
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    for axes in panels[len(results.tasks) :]:
        axes.set_axis_off()
    shown = [name for name in order if name in named]
    figure.legend([named[n] for n in shown], shown, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
