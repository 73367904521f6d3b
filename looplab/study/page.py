"""What the rows of a study say, drawn from the rows alone: its page NAME.md, its figure NAME.png, and the same table
between two marks on other pages:

    <!-- study NAME -->
    (the table; whatever stands here is replaced)
    <!-- end of study -->
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from looplab.runs.intervals import t_interval
from looplab.runs.seeds import span, to_markdown
from looplab.runs.writing import write_whole

from .cells import Cell, cells_of, missing, read_rows
from .study_file import Study, Success, matches

logger = logging.getLogger(__name__)

WIDE = 100  # times its smallest column: an axis is logarithmic from here on

BLOCK = "<!-- study {name} -->\n{text}\n<!-- end of study -->"


def known(cells: Sequence[Cell], rows: Sequence[Mapping]) -> list[Mapping]:
    """Rows of the cells. Rows of other arms and seeds, or of an older recipe, are passed over."""
    keys = {(cell.arm, cell.seed, cell.recipe) for cell in cells}
    return [row for row in rows if (row["arm"], row["seed"], row["recipe"]) in keys]


def by_seed(
    study: Study, rows: Sequence[Mapping], arm: str, where: Mapping, value: str | None = None
) -> dict[int, float]:
    """Seed -> mean of `value`, the table's unless given, over the rows of the arm.

    Raises ValueError for a field of `where` that none of the rows has, and as `value_of`.
    """
    found, where = {}, where | study.arms[arm].where
    place = "table.value" if value is None else "success: value"
    mine = [row for row in rows if row["arm"] == arm]
    fields = dict.fromkeys(name for row in mine for name in row)
    for name in where if mine else ():
        if name not in fields:
            raise ValueError(f"`where` has the field {name!r}, and the rows of {arm} have {', '.join(fields)}.")
    for row in mine:
        if matches(row, where):
            found.setdefault(row["seed"], []).append(value_of(row, value or study.table.value, place))
    return {seed: fmean(values) for seed, values in sorted(found.items())}


def value_of(row: Mapping, name: str, part: str):
    """A value of a row, whose field is named in the study's `part`. Raises ValueError if the row has no such field."""
    if name not in row:
        raise ValueError(
            f"{part} is {name!r}, and a row of {row['arm']} has {', '.join(row)}: name one of these, or leave "
            "such rows out by `keep`."
        )
    return row[name]


def table_of(study: Study, rows: Sequence[Mapping]) -> str:
    """A line per arm: mean [lowest, highest] over its seeds."""
    table = study.table
    columns = table.shown or columns_of(study, rows)
    lines = []
    for arm in study.arms:
        cells = {"arm": arm, "seeds": str(len(by_seed(study, rows, arm, table.where)))}
        for column in columns:
            found = by_seed(study, rows, arm, {**table.where, table.columns: column})
            cells[f"{column}"] = span(found.values(), table.digits, table.scale)
        lines.append(cells)
    return to_markdown(lines)


def columns_of(study: Study, rows: Sequence[Mapping]) -> list:
    """The values of the field `table.columns` in the rows, in order."""
    shown = [row for row in rows if matches(row, study.table.where)]
    return sorted({value_of(row, study.table.columns, "table.columns") for row in shown})


def verdict(study: Study, asked: Success, rows: Sequence[Mapping]) -> str:
    """A sentence: what was asked for, whether it is met, and what was measured."""
    value = asked.value or study.table.value
    found = by_seed(study, rows, asked.arm, asked.where, asked.value)
    if asked.over is not None:
        over_where = asked.where if asked.over_where is None else asked.over_where
        other = by_seed(study, rows, asked.over, over_where, asked.value)
        found = {seed: found[seed] - other[seed] for seed in found if seed in other}
    sign, bound = ("at least", asked.at_least) if asked.at_most is None else ("at most", asked.at_most)
    where = ", ".join(f"{name} {number}" for name, number in asked.where.items())
    over = "" if asked.over is None else f" less {value} of {asked.over}"
    if asked.over_where is not None:
        over += " at " + ", ".join(f"{name} {number}" for name, number in asked.over_where.items()) + ","
    said = f"{asked.arm}, {value}{over}{f' at {where}' if where else ''}: {sign} {bound:g}, {asked.of}."
    if not found:
        return f"{said} **Not run.**"
    mean, low, high = t_interval(list(found.values()))
    up = asked.at_most is None
    worst = (min if up else max)(found.values())
    judged = {"every seed": worst, "mean": mean, "interval": low if up else high}[asked.of]
    met = judged >= bound if up else judged <= bound
    done = len(found) == len(study.seeds)
    # What is judged by every seed may fail before all have run.
    word = "Met" if met else "Not met"
    if not done and (met or asked.of != "every seed"):
        word = f"Open, {len(found)} of {len(study.seeds)} seeds ran"
    seeds = ", ".join(f"{seed}: {number:.4g}" for seed, number in found.items())
    interval = ""
    if len(found) > 1 and (asked.over is not None or asked.of != "every seed"):
        interval = f"; mean {mean:.4g}, 95 % [{low:.4g}, {high:.4g}]"
    unseen = ""
    if asked.over is not None and low < high and low <= 0 <= high:
        unseen = f" A difference below {(high - low) / 2:.2g} could not be seen."
    return f"{said} **{word}**: seeds {seeds}{interval}.{unseen}"


def page_of(name: str, study: Study, cells: Sequence[Cell], rows: Sequence[Mapping]) -> str:
    """The text of NAME.md."""
    left = missing(cells, rows)
    table = study.table
    rows = known(cells, rows)
    commits = sorted({str(row["commit"])[:7] for row in rows})
    ran = f"{len(cells) - len(left)} of {len(cells)} cells ran"
    lines = [
        f"# Study: {name}",
        "",
        study.question,
        "",
        f"`looped study {name}` trains what is missing, and draws this page from `{name}.jsonl`; `looped study {name} "
        f"--check` only looks whether page and rows agree. {ran}; seeds {', '.join(map(str, study.seeds))}"
        + (f", tuned on {', '.join(map(str, study.tuned_on))}" if study.tuned_on else "")
        + (f"; commit {', '.join(commits)}." if commits else "."),
        "",
        f"{table.value} by {table.columns}: mean [lowest, highest] over seeds"
        + (f", times {table.scale:g}" if table.scale != 1 else "")
        + "".join(f"; {field} {value}" for field, value in table.where.items())
        + ".",
        "",
        table_of(study, rows),
        "",
        f"![{table.value} by {table.columns}, a line per arm]({name}.png)" if rows else "",
        "",
        *[f"- {verdict(study, asked, rows)}" for asked in study.success],
    ]
    if left:
        lines += ["", "Not run: " + ", ".join(f"{cell.arm} seed {cell.seed}" for cell in left) + "."]
    return "\n".join(lines).rstrip() + "\n"


def block_of(study: Study, rows: Sequence[Mapping]) -> str:
    """What stands between the marks on other pages."""
    return "\n\n".join([table_of(study, rows), *(verdict(study, asked, rows) for asked in study.success)])


def replaced(page: str, name: str, text: str) -> str:
    """The text of a page with a new block. Raises ValueError if the page has no marks for the study."""
    marks = re.compile(rf"^<!-- study {re.escape(name)} -->\n.*?^<!-- end of study -->", re.DOTALL | re.MULTILINE)
    if not marks.search(page):
        raise ValueError(f"it has no line <!-- study {name} --> and <!-- end of study --> after it: write them there.")
    return marks.sub(lambda _: BLOCK.format(name=name, text=text), page)


def texts(name: str, study: Study, folder: Path, runs: Path) -> dict[Path, str]:
    """File -> the text that it has to have by the rows in `folder`."""
    cells, rows = cells_of(name, study, runs), read_rows(folder / f"{name}.jsonl")
    files = {folder / f"{name}.md": page_of(name, study, cells, rows)}
    for page in map(Path, study.pages):
        if not page.is_file():
            logger.warning(f"{page} is not here: the table is not written to it.")
            continue
        try:
            files[page] = replaced(page.read_text(encoding="utf-8"), name, block_of(study, known(cells, rows)))
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from error
    return files


def check_study(name: str, study: Study, folder: Path, runs: Path) -> list[Path]:
    """Pages that do not say what the rows say."""
    files = texts(name, study, folder, runs)
    return [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def draw_study(name: str, study: Study, folder: Path, runs: Path) -> list[Path]:
    """Write the pages and the figure by the rows; returns their paths."""
    from looplab.instruments.drawing import save

    written = [write_whole(path, text) for path, text in texts(name, study, folder, runs).items()]
    rows = known(cells_of(name, study, runs), read_rows(folder / f"{name}.jsonl"))
    if rows:
        written.append(save(figure_of(study, rows), folder / name))
    return written


def figure_of(study: Study, rows: Sequence[Mapping]):
    """A line per arm over the columns, with a band from the lowest to the highest seed; names stand apart, as points
    side by side."""
    from matplotlib.figure import Figure

    from looplab.instruments.drawing import draw_band, draw_bars, tidy

    table = study.table
    columns = columns_of(study, rows)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    numeric = all(isinstance(column, (int, float)) for column in columns)
    for index, arm in enumerate(study.arms):
        aside = 0.6 * ((index + 0.5) / len(study.arms) - 0.5)
        points, places = [], []
        for place, column in enumerate(columns):
            found = by_seed(study, rows, arm, {**table.where, table.columns: column}).values()
            if found:
                places.append(column if numeric else place + aside)
                points.append(tuple(table.scale * each for each in (fmean(found), min(found), max(found))))
        if points:
            if numeric:
                draw_band(axes, places, points, index, arm, shaded=True)
            else:
                draw_bars(axes, places, points, index, arm)
    if numeric and min(columns) > 0 and max(columns) >= WIDE * min(columns):
        axes.set_xscale("log")
        axes.set_xticks(columns, [f"{column:g}" for column in columns], minor=False)
        axes.minorticks_off()
    if not numeric:
        axes.set_xticks(range(len(columns)), [str(column) for column in columns], parse_math=False)
    if 0 <= axes.dataLim.y0 < axes.dataLim.y1 / 2:  # losses that differ by a tenth would all look the same
        axes.set_ylim(bottom=0)
    scale = "" if table.scale == 1 else " (%)" if table.scale == 100 else f" x {table.scale:g}"
    tidy(axes, f"{table.value}{scale}", table.columns)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    axes.set_title(
        f"mean of the seeds; {'band' if numeric else 'bar'}: from the lowest to the highest",
        fontsize=9,
        color="0.3",
        loc="left",
    )
    return figure
