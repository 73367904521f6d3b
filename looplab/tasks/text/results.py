"""What the files of runs on text say: perplexity of one run by loops, and a Markdown table of groups of seeds.

    perplexity    of the test split at the model's own loop count (RUN/text.jsonl, of `looped eval`)
    difference    loss of a run less that of the baseline's run with the same seeds on the same blocks, nats per token

A group's number is its mean over seeds with [lowest, highest]. Intervals are Student's t over seeds
(runs/intervals.py). A difference also has the bootstrap over blocks, which knows the chance of the test text and not
the chance of training.
"""

from collections.abc import Sequence
from statistics import fmean

from looplab.runs.folder import Run
from looplab.runs.seeds import by_seeds, groups_against, interval, span, to_markdown
from looplab.tasks.base import QUANTIZATION

from .records import EVALUATION, PERPLEXITY

# Column -> the accounting of `count_parameters`.
PARAMETERS = {
    "parameters": "all",
    "with one vocabulary matrix": "one_vocabulary",
    "without embeddings": "layers",
}


def loops_text(run: Run) -> str:
    """The perplexity of an evaluated run as text, a line per loop count."""
    rows, (low, high) = run.read(PERPLEXITY), run.trained_loops()
    blocks, tokens = len(rows[0]["block_losses"]), rows[0]["tokens"]
    text = [
        f"Test split, {blocks} blocks, {tokens:,} tokens; [ ] marks loop counts of the training.",
        f"{'loops':>6}{'nats per token':>16}{'perplexity':>12}   95 % interval over blocks",
    ]
    for row in rows:
        loops = f"[{row['loops']}]" if low <= row["loops"] <= high else f"{row['loops']} "
        interval = " - ".join(f"{bound:.2f}" for bound in row["interval"])
        text.append(f"{loops:>6}{row['loss']:16.4f}{row['perplexity']:12.2f}   {interval}")
    return "\n".join(text)


def own_row(run: Run) -> dict:
    """The line of text.jsonl at the model's own loop count.

    Raises:
        ValueError: it was evaluated at other loop counts only.
    """
    own = run.read(EVALUATION)["num_loops"]
    for row in run.read(PERPLEXITY):
        if row["loops"] == own:
            return row
    raise ValueError(
        f"{run.folder}/text.jsonl has no line at the model's own {own} loops: run `looped eval {run.folder}` with "
        f"{own} among --loops."
    )


def markdown_table(runs: Sequence[Run], against: str | None = None) -> str:
    """A line per group of runs on text; `against` names the group to which the others are compared seed by seed.

    Raises:
        ValueError: a run was not evaluated, quantization.json cannot be read, there is no group `against`, or paired
            runs were measured on different blocks.
    """
    groups = groups_against(runs, against)
    rows = []
    for name, members in groups.items():
        cells = {"runs": name, "seeds": str(len(members))} | measured_cells(members) | quantized_cells(members)
        if against is not None and name != against:
            cells |= difference_cells(groups[against], members, against)
        rows.append(cells)
    return to_markdown(rows)


def measured_cells(runs: Sequence[Run]) -> dict[str, str]:
    """Size, test perplexity and training of a group."""
    rows = [own_row(run) for run in runs]
    parameters = [run.read(EVALUATION)["parameters"] for run in runs]
    summaries = [run.summary() for run in runs]
    perplexities = [row["perplexity"] for row in rows]
    cells = {column: span(counts[key] for counts in parameters) for column, key in PARAMETERS.items()}
    return cells | {
        "loops": span(row["loops"] for row in rows),
        "test perplexity": span(perplexities, 2),
        "95 % t-interval": interval(perplexities, ",.2f"),
        "training tokens": span(summary["tokens"] for summary in summaries),
        "tokens/s": span(summary["tokens"] / summary["seconds"] for summary in summaries),
    }


def quantized_cells(runs: Sequence[Run]) -> dict[str, str]:
    """Perplexity before and after quantization, where all runs of the group have it, in the same way."""
    if not all(run.has(QUANTIZATION) for run in runs):
        return {}
    found = [run.read(QUANTIZATION) for run in runs]
    ways = sorted({f"{facts['method']} INT{facts['bits']}" for facts in found})
    if len(ways) > 1:
        raise ValueError(f"the runs of {runs[0].folder}'s group were quantized as {' and '.join(ways)}: choose one.")
    return {
        f"{ways[0]}: {when}": span((facts["perplexity"][when] for facts in found), 2) for when in ("before", "after")
    }


def paired_differences(base: Run, run: Run) -> list[float]:
    """Loss of each block less the baseline's, nats per token; ValueError unless the blocks are the same."""
    rows = [own_row(base), own_row(run)]
    if rows[0]["text"] != rows[1]["text"]:
        raise ValueError(
            f"{base.folder} and {run.folder} were measured on different blocks, so they cannot be compared: they need "
            "the same text, tokenizer and sequence_length, and `looped eval` with the same --limit."
        )
    losses = (row["block_losses"] for row in rows)
    return [there - here for here, there in zip(*losses, strict=True)]


def difference_cells(base: Sequence[Run], runs: Sequence[Run], against: str) -> dict[str, str]:
    """Mean difference over the seeds that both groups have, its t-interval over seeds, and over blocks."""
    baseline, others = by_seeds(base), by_seeds(runs)
    blocks = {seeds: paired_differences(baseline[seeds], run) for seeds, run in others.items() if seeds in baseline}
    if not blocks:
        return {}
    means = [fmean(each) for each in blocks.values()]
    return {
        f"nats per token against {against}": f"{fmean(means):+.4f}",
        "pairs": str(len(means)),
        "95 % over seeds": interval(means, "+.4f"),
        "95 % over blocks": over_blocks(blocks.values(), {own_row(others[seeds])["text"] for seeds in blocks}),
    }


def over_blocks(differences, texts: set[str]) -> str:
    """Bootstrap interval of the mean over blocks of the mean over pairs; - where the pairs have different blocks."""
    if len(texts) > 1:
        return "-"
    import numpy as np

    from looplab.runs.intervals import bootstrap_intervals

    [(low, high)] = bootstrap_intervals(np.mean(list(differences), axis=0)[None])
    return f"[{low:+.4f}, {high:+.4f}]"
