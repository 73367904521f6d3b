"""The figure of `looped lens` on tokens: the likeliest token after every loop, and means over loops."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from looplab.instruments.drawing import PALETTE, tidy

MEASURES = ("rank", "entropy", "kl", "next", "agrees")
SHOWN = 16  # tokens of the text in the figure
LONGEST = 9  # characters of a token in a cell


def lens_figure(rows: Sequence[dict], blocks: str = "blocks of test text") -> Figure:
    """Above, a column per token of the first text and a line per loop: the likeliest next token, the darker the surer
    it is. Below, means over the blocks, or over the text if there are none. rows: records of lens.jsonl. blocks: what
    these are."""
    tokens = [row for row in rows if row["measure"] == "token" and row["position"] < SHOWN]
    loops = sorted({row["loops"] for row in tokens})
    columns = 1 + max(row["position"] for row in tokens)
    height = max(0.34 * len(loops), 1.0)
    figure = Figure(figsize=(max(0.72 * columns, 8.4), 1.5 + height + 2.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(height + 1.3, 2.6))
    draw_tokens(above, tokens, loops, columns)
    draw_means(below, rows, blocks)
    return figure


def draw_tokens(figure, tokens: Sequence[dict], loops: Sequence[int], columns: int) -> None:
    axes = figure.subplots()
    sure = [[0.0] * columns for _ in loops]
    for row in tokens:
        sure[loops.index(row["loops"])][row["position"]] = 100 * row["sure"]
    image = axes.imshow(sure, cmap="Blues", vmin=0, vmax=100, origin="lower", aspect="auto")
    final = {row["position"]: row["top"] for row in tokens if row["loops"] == loops[-1]}
    for row in tokens:
        axes.text(
            row["position"], loops.index(row["loops"]), shown(row["top"]), ha="center", va="center", fontsize=7,
            color="white" if row["sure"] > 0.5 else "black", parse_math=False,
            fontweight="bold" if row["top"] == final[row["position"]] else "normal",
        )  # fmt: skip
    first = {row["position"]: row["token"] for row in tokens}
    words = [shown(first[position]) for position in range(columns)]
    axes.set_xticks(range(columns), words, fontsize=7.5, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(loops)), loops)
    axes.tick_params(length=0)
    axes.set_xlabel("the text, token by token; above a token, what the model would say next")
    axes.set_ylabel("loops")
    axes.set_title("Likeliest next token after every loop; bold: that of the last loop", loc="left", fontsize=10)
    figure.colorbar(image, ax=axes, label="its probability, %", pad=0.01, aspect=12)


def draw_means(figure, rows: Sequence[dict], what: str) -> None:
    found = means(rows)
    loops = list(found)
    blocks = len({row["block"] for row in rows if row["measure"] == "block"})
    over = f"mean over {blocks} {what}" if blocks else "mean over the text"
    panels = (
        ("agrees", 100, "%", "says what the\nlast loop says"),
        ("kl", 1, "nats", "distance from the\nlast loop (KL)"),
        ("entropy", 1, "nats", "entropy of\nwhat it says"),
        ("next", 1, "nats", "loss of the\nnext token"),
    )
    panels = [panel for panel in panels if panel[0] in found[loops[0]]]  # the last token has no next one
    for axes, (name, times, unit, title), colour in zip(
        figure.subplots(1, len(panels)), panels, PALETTE, strict=False
    ):
        points = [(count, times * found[count][name]) for count in loops]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.6, color=colour)
        axes.set_title(title, loc="left", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 1.08 * max(value for _, value in points) or 1)
        tidy(axes, unit, "loops")
    figure.suptitle(over, fontsize=9, color="0.3", x=0.01, ha="left")


def shown(token: str) -> str:
    """A token as a cell shows it: its space as a dot, without characters that the font may lack."""
    known = (c if "!" <= c < "\u0590" and c.isprintable() else "?" for c in token.replace(" ", "\N{MIDDLE DOT}"))
    text = "".join(known)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def means(rows: Sequence[dict]) -> dict[int, dict[str, float]]:
    """Loop count -> mean of each measure: over the blocks, or over the tokens of a text that was given."""
    of_blocks = [row for row in rows if row["measure"] == "block"]
    chosen, found = of_blocks or rows, {}
    for loops in sorted({row["loops"] for row in chosen}):
        same = [row for row in chosen if row["loops"] == loops]
        values = {name: [float(row[name]) for row in same if row[name] is not None] for name in MEASURES}
        found[loops] = {name: sum(each) / len(each) for name, each in values.items() if each}
    return found


def lens_text(rows: Sequence[dict]) -> str:
    """The means as text, with a line per loop."""
    lines = [f"{'loops':>6}{'agrees with the last':>22}{'its rank':>10}{'KL':>9}{'entropy':>9}{'next, nats':>12}"]
    for loops, mean in means(rows).items():
        nats = f"{mean['next']:12.3f}" if "next" in mean else f"{'-':>12}"
        agrees = f"{100 * mean['agrees']:.0f} %"
        lines.append(f"{loops:>6}{agrees:>22}{mean['rank']:10.1f}{mean['kl']:9.3f}{mean['entropy']:9.3f}{nats}")
    return "\n".join(lines)
