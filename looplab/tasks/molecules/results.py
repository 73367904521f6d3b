"""Results of runs on molecules, from their files: one run by setting and loops, and a Markdown table of groups of
seeds.

A group has its mean over seeds with [lowest, highest]; shares are in %. 95 % t-intervals are over seeds
(runs/intervals.py). `--against` compares validity seed by seed. Wilson's intervals of a single run cover the chance in
its samples, not the chance in its training.
"""

from collections.abc import Sequence

from looplab.runs.folder import Run
from looplab.runs.seeds import by_seeds, groups_against, interval, span, to_markdown
from looplab.tasks.quantizing import quantized_cells

from .records import EVALUATION, MOLECULES
from .smiles import EXCLUSIVE, LABELS

SHARES = ("validity", "uniqueness", "novelty", "diversity")


def own_row(run: Run, setting: str) -> dict:
    """The line of molecules.jsonl of a setting at the model's own loop count."""
    own = run.read(EVALUATION)["num_loops"]
    for row in run.read(MOLECULES):
        if (row["setting"], row["loops"]) == (setting, own):
            return row
    raise ValueError(f"{run}/molecules.jsonl has no line of {setting} at {own} loops: run `looped eval` again.")


def settings_of(run: Run) -> list[str]:
    """Names of the sampling settings of an evaluated run."""
    return [setting["name"] for setting in run.read(EVALUATION)["settings"]]


def percent(measured: dict) -> str:
    """A share and its interval in % as text; - if it is None."""
    if measured["share"] is None:
        return "-"
    low, high = (100 * bound for bound in measured["interval"])
    return f"{100 * measured['share']:.1f} [{low:.1f}, {high:.1f}]"


def samples_text(run: Run) -> str:
    """The measures of an evaluated run as text, with a line per setting and loop count, then the faults."""
    rows, (low, high) = run.read(MOLECULES), run.trained_loops()
    columns = f"{'valid':>19}{'unique':>19}{'new':>19}{'diversity':>19}{'FCD':>7}"
    text = [
        "Shares in % with their 95 % interval; [ ] marks trained loop counts; loss in nats per test token.",
        f"{'setting':<12}{'loops':>6}{'samples':>9}{'loss':>8}{columns}",
    ]
    for row in rows:
        loops = f"[{row['loops']}]" if low <= row["loops"] <= high else f"{row['loops']} "
        shares = "".join(f"{percent(row[name]):>19}" for name in SHARES)
        fcd = "-" if row["fcd"] is None else f"{row['fcd']:.2f}"
        text.append(f"{row['setting']:<12}{loops:>6}{row['n']:>9,}{row['loss']:8.4f}{shares}{fcd:>7}")
    text += [
        "",
        "Faults in % of the samples; a sample may have several. After | the one class that SMolLM would give it.",
    ]
    classes = [name for name in EXCLUSIVE if name != "valid"]
    names = "".join(f"{name:>12}" for name in LABELS) + " |" + "".join(f"{name:>9}" for name in classes)
    text.append(f"{'setting':<12}{'loops':>6}{names}")
    for row in rows:
        found = "".join(f"{100 * row['faults'][label]['share']:12.2f}" for label in LABELS)
        exclusive = "".join(f"{100 * row['exclusive'][name]['share']:9.2f}" for name in classes)
        text.append(f"{row['setting']:<12}{row['loops']:>6}{found} |{exclusive}")
    speed = run.read(EVALUATION)["speed"]
    text.append(
        f"\n{speed['molecules_per_second']:.0f} molecules per second in batches of {speed['batch']}, "
        f"{speed['ratio']:.1f} times as many as without the KV cache."
    )
    return "\n".join(text)


def markdown_table(runs: Sequence[Run], against: str | None = None) -> str:
    """A Markdown table with a line per group of seeds.

    Args:
        against: name of the baseline, a group that the validity of the others is compared with seed by seed.

    Raises:
        ValueError: a run was not evaluated, or there is no group `against`.
    """
    groups = groups_against(runs, against)
    rows = []
    for name, members in groups.items():
        cells = (
            {"runs": name, "seeds": str(len(members))}
            | measured_cells(members)
            | quantized_cells(members, "loss", 1, 4)
        )
        if against is not None and name != against:
            cells |= difference_cells(groups[against], members, against)
        rows.append(cells)
    return to_markdown(rows)


def measured_cells(runs: Sequence[Run]) -> dict[str, str]:
    """The cells of a group with parameters, loss, the measures of each setting, and training."""
    parameters = [run.read(EVALUATION)["parameters"]["all"] for run in runs]
    summaries = [run.summary() for run in runs]
    first = settings_of(runs[0])[0]
    cells = {
        "parameters": span(parameters),
        "loops": span(run.read(EVALUATION)["num_loops"] for run in runs),
        "test nats per token": span((own_row(run, first)["loss"] for run in runs), 4),
    }
    for setting in settings_of(runs[0]):
        found = [own_row(run, setting) for run in runs]
        for measure in SHARES:
            values = [row[measure]["share"] for row in found]
            cells[f"{setting}: {measure} %"] = span(values, 1, 100)
            if measure == "validity":
                cells[f"{setting}: 95 % t-interval"] = interval([100 * value for value in values], ".1f")
        cells[f"{setting}: FCD"] = span((row["fcd"] for row in found), 2)
    return cells | {
        "training tokens": span(summary["tokens"] for summary in summaries),
        "tokens/s": span(summary["tokens"] / summary["seconds"] for summary in summaries),
    }


def difference_cells(base: Sequence[Run], runs: Sequence[Run], against: str) -> dict[str, str]:
    """The cells with validity minus the validity of the baseline's run with the same seeds, in percentage points, for
    each setting; - if there are no common seeds."""
    one, two = by_seeds(base), by_seeds(runs)
    shared = [seeds for seeds in two if seeds in one]
    cells = {}
    for setting in settings_of(runs[0]):
        points = [
            100
            * (own_row(two[seeds], setting)["validity"]["share"] - own_row(one[seeds], setting)["validity"]["share"])
            for seeds in shared
        ]
        cells[f"{setting}: points of validity over {against}"] = span(points, 1)
        cells[f"{setting}: their 95 % t-interval"] = interval(points, "+.1f") if points else "-"
    return cells
