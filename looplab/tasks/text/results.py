"""Results of runs on text, from their files: perplexity of one run by loops, and a Markdown table of groups of seeds.

    perplexity    of the split test at the model's own loop count (text.jsonl, by `looped eval`)
    difference    loss of a run minus loss of the baseline's run with the same seeds, in nats per token, block by block

A group has its mean over seeds with [lowest, highest]. Intervals over seeds are Student's t (runs/intervals.py). The
bootstrap interval of a difference is over blocks: it covers the chance in the test text, not the chance in training.
"""

from collections.abc import Sequence
from statistics import fmean

from looplab.runs.folder import Run
from looplab.runs.seeds import by_seeds, groups_against, interval, span, to_markdown
from looplab.tasks.quantizing import quantized_cells

from .records import EVALUATION, PERPLEXITY

# Column of the table -> way of counting in `count_parameters`.
PARAMETERS = {
    "parameters": "all",
    "with one vocabulary matrix": "one_vocabulary",
    "without embeddings": "layers",
}


def loops_text(run: Run) -> str:
    """The perplexity of an evaluated run as text, with a line per loop count."""
    rows, (low, high) = run.read(PERPLEXITY), run.trained_loops()
    blocks, tokens = len(rows[0]["block_losses"]), rows[0]["tokens"]
    text = [
        f"Test split, {blocks} blocks, {tokens:,} tokens; [ ] marks trained loop counts.",
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
        ValueError: the run was evaluated at other loop counts only.
    """
    own = run.read(EVALUATION)["num_loops"]
    for row in run.read(PERPLEXITY):
        if row["loops"] == own:
            return row
    raise ValueError(
        f"{run}/text.jsonl has no line at the model's own {own} loops: run `looped eval {run}` with "
        f"{own} among --loops."
    )


def markdown_table(runs: Sequence[Run], against: str | None = None) -> str:
    """A Markdown table with a line per group of seeds.

    Args:
        against: name of the baseline, a group that the others are compared with seed by seed.

    Raises:
        ValueError: a run was not evaluated, quantization.json cannot be read, there is no group `against`, or paired
            runs were measured on different blocks.
    """
    groups = groups_against(runs, against)
    rows = []
    for name, members in groups.items():
        cells = (
            {"runs": name, "seeds": str(len(members))}
            | measured_cells(members)
            | quantized_cells(members, "perplexity", 1, 2)
        )
        if against is not None and name != against:
            cells |= difference_cells(groups[against], members, against)
        rows.append(cells)
    return to_markdown(rows)


def measured_cells(runs: Sequence[Run]) -> dict[str, str]:
    """The cells of a group with parameters, test perplexity and training."""
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


def paired_differences(base: Run, run: Run) -> list[float]:
    """Loss of each block minus the baseline's, in nats per token. Raises ValueError unless the blocks are the same."""
    rows = [own_row(base), own_row(run)]
    if rows[0]["text"] != rows[1]["text"]:
        raise ValueError(
            f"{base} and {run} were measured on different blocks, so they cannot be compared: they need "
            "the same text, tokenizer and sequence_length, and `looped eval` with the same --limit."
        )
    losses = (row["block_losses"] for row in rows)
    return [there - here for here, there in zip(*losses, strict=True)]


def difference_cells(base: Sequence[Run], runs: Sequence[Run], against: str) -> dict[str, str]:
    """The cells with the mean difference over the seeds that both groups have, and its intervals."""
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
    """Bootstrap interval over blocks of the mean difference over pairs; - if the pairs have different blocks.

    differences: per pair, the difference of each block. texts: digests of the blocks.
    """
    if len(texts) > 1:
        return "-"
    import numpy as np

    from looplab.runs.intervals import bootstrap_intervals

    [(low, high)] = bootstrap_intervals(np.mean(list(differences), axis=0)[None])
    return f"[{low:+.4f}, {high:+.4f}]"
