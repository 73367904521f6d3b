"""`looped phi`: what a loop is worth in layers of its own, from the losses of many small runs.

    L = E + A (N_once + r^phi N_rec)^-alpha + B D^-beta

    r        loops
    N_rec    parameters of the core, which run r times
    N_once   parameters of prelude, coda, connection and norms; token embeddings and head are in neither
    D        tokens of the training
    phi      the recurrence-equivalence exponent: 1 if r loops of a core are worth r cores, 0 if they are worth one

The law is that of arXiv 2604.21106; that embeddings count nowhere is ours. Six numbers are fitted to the logarithm of
the loss, by the Huber loss from several starts (as Chinchilla was, Hoffmann et al. 2022, appendix D.3). The interval
of phi is a bootstrap over runs: in each resample, as many runs of each loop count are drawn with replacement.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import least_squares

from looplab.runs.folder import Run
from looplab.runs.seeds import to_markdown
from looplab.runs.sources import opened_runs
from looplab.tasks.registry import task_for
from looplab.training.recipe import read_recipe
from modeling_looped import LoopedConfig, LoopedModel
from modeling_looped.connections_looped import CONNECTIONS

from .cells import cells_of, read_rows
from .page import known
from .study_file import Study, flags_of, read_study

NUMBERS = 6  # that are fitted: logarithms of E, A and B, alpha, beta, phi
# Where they are sought, in the order of `log_losses`, with N and D in units of their geometric means.
LOW = np.array([-3.0, -6.0, 0.01, -6.0, 0.01, -1.0])
HIGH = np.array([3.0, 3.0, 2.0, 3.0, 2.0, 3.0])
STARTS = [
    np.array([e, 0.0, alpha, 0.0, alpha, phi])
    for e, alpha, phi in itertools.product((0.0, 1.0), (0.3, 0.8), (0.2, 0.8))
]
HUBER = 1e-3  # of the logarithm of the loss: from here on a residual counts linearly, as in Chinchilla
RESAMPLES = 200
UNIT = 1.0  # 0 is no gain of a loop, 1 the gain of layers of their own: a wider interval says nothing


@dataclass(frozen=True)
class Point:
    """One run; parameters and tokens are counted as the module says.

    Args:
        kind: how its loops are connected, such as "hyper, static".
        loss: of the test text, in nats per token.
    """

    kind: str
    loops: int
    once: int
    looped: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Fit:
    """What the runs of a kind say.

    Args:
        interval: of phi, 95 %.
        floor: E, in nats per token.
        error: root of the mean square of the residuals, as a share of the loss.
    """

    kind: str
    runs: int
    loops: tuple[int, ...]
    phi: float
    interval: tuple[float, float]
    floor: float
    alpha: float
    beta: float
    error: float

    @property
    def identified(self) -> bool:
        """Whether the runs tell phi: the interval is narrower than the unit range, and ends where it was not cut."""
        low, high = self.interval
        return high - low <= UNIT and LOW[-1] < low and high < HIGH[-1]

    def cells(self) -> dict[str, str]:
        """Column -> cell of the table."""
        low, high = self.interval
        return {
            "loop": self.kind,
            "runs": str(self.runs),
            "loop counts": ", ".join(map(str, self.loops)),
            "phi": f"{self.phi:.2f}" if self.identified else "not known",
            "95 % over runs": f"[{low:.2f}, {high:.2f}]",
            "E": f"{self.floor:.2f}",
            "alpha": f"{self.alpha:.2f}",
            "beta": f"{self.beta:.2f}",
            "error": f"{100 * self.error:.2f} %",
        }


def log_losses(numbers: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logarithm of the law (N,), and its derivative by each number (N, 6).

    Args:
        numbers: logarithms of E and A, alpha, logarithm of B, beta, phi.
        table: (5, N) loops, parameters once, parameters looped, tokens, losses.
    """
    log_e, log_a, alpha, log_b, beta, phi = numbers
    loops, once, looped, tokens, _ = table
    worth = loops**phi * looped
    size = once + worth
    terms = np.stack([np.full_like(size, log_e), log_a - alpha * np.log(size), log_b - beta * np.log(tokens)])
    law = np.logaddexp.reduce(terms)
    floor, of_size, of_tokens = np.exp(terms - law)  # shares of the loss
    slopes = [
        floor, of_size, -of_size * np.log(size), of_tokens, -of_tokens * np.log(tokens),
        -of_size * alpha * worth / size * np.log(loops),
    ]  # fmt: skip
    return law, np.stack(slopes, axis=1)


def solve(table: np.ndarray, starts: Iterable[np.ndarray]) -> np.ndarray:
    """The numbers (6,) of the best fit to (5, N), see `log_losses`, over all starts."""
    target = np.log(table[-1])
    found = [
        least_squares(
            lambda numbers: log_losses(numbers, table)[0] - target,
            each,
            jac=lambda numbers: log_losses(numbers, table)[1],
            bounds=(LOW, HIGH),
            method="dogbox",
            loss="huber",
            f_scale=HUBER,
        )
        for each in starts
    ]
    return min(found, key=lambda each: each.cost).x


def fit(points: Sequence[Point], resamples: int = RESAMPLES) -> Fit:
    """The law fitted to runs of one kind.

    Raises:
        ValueError: they are too few, or do not differ in loops, size and tokens.
    """
    kind = points[0].kind
    differ = [len({getattr(point, name) for point in points}) for name in ("loops", "once", "tokens")]
    if len(points) <= NUMBERS or min(differ) < 2:
        raise ValueError(
            f"the loop {kind} has {len(points)} runs, and of different loops {differ[0]}, sizes {differ[1]}, tokens "
            f"{differ[2]}: phi takes {NUMBERS + 1} runs, and two of each. Train more."
        )
    table = np.array([[p.loops, p.once, p.looped, p.tokens, p.loss] for p in points], dtype=float).T
    table[1:3] /= np.exp(np.log(table[1] + table[2]).mean())
    table[3] /= np.exp(np.log(table[3]).mean())
    best = solve(table, STARTS)

    draw = np.random.default_rng(0)
    of_loops = [np.flatnonzero(table[0] == loops) for loops in np.unique(table[0])]
    starts = [best, np.append(best[:-1], 1 - best[-1].clip(0, 1))]
    drawn = []
    for _ in range(resamples):
        rows = np.concatenate([draw.choice(members, len(members)) for members in of_loops])
        drawn.append(solve(table[:, rows], starts)[-1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    error = np.sqrt(np.mean((log_losses(best, table)[0] - np.log(table[-1])) ** 2))
    return Fit(
        kind=kind,
        runs=len(points),
        loops=tuple(sorted({point.loops for point in points})),
        phi=float(best[-1]),
        interval=(float(low), float(high)),
        floor=float(np.exp(best[0])),
        alpha=float(best[2]),
        beta=float(best[4]),
        error=float(error),
    )


def phi_text(points: Sequence[Point], resamples: int = RESAMPLES) -> str:
    """A Markdown table with a line per kind of loop, and what it cannot say.

    Raises:
        ValueError: no kind has enough runs.
    """
    kinds: dict[str, list[Point]] = {}
    for point in points:
        kinds.setdefault(point.kind, []).append(point)
    found, short = [], []
    for members in kinds.values():
        try:
            found.append(fit(members, resamples))
        except ValueError as error:
            short.append(str(error))
    if not found:
        raise ValueError(short[0] if short else "there are no runs: train the study first.")
    wide = [
        f"The loop {each.kind}: the interval of phi is wider than {UNIT:g} or open, so these runs do not say what a "
        "loop is worth. More runs, or a wider range of sizes, would."
        for each in found
        if not each.identified
    ]
    return "\n\n".join([to_markdown([each.cells() for each in found]), *wide, *short])


def point_of(config: LoopedConfig, tokens: int, loss: float) -> Point:
    """The point of a run of a model with this configuration."""
    with torch.device("meta"):
        model = LoopedModel(config)
    looped = sum(each.numel() for each in model.core.parameters())
    connection = CONNECTIONS[config.loop_connection]
    several = connection.of(config) is not connection  # the mixing chooses
    return Point(
        kind=f"{config.loop_connection}, {config.hyper_mixing}" if several else config.loop_connection,
        loops=config.num_loops,
        once=model.num_parameters(exclude_embeddings=True) - looped,
        looped=looped,
        tokens=tokens,
        loss=loss,
    )


def points_of_runs(runs: Sequence[Run]) -> list[Point]:
    """A point per run on text, at its own loop count.

    Raises:
        ValueError: a run has not finished, or was not evaluated.
    """
    return [
        point_of(
            LoopedConfig.from_pretrained(run.model_folder()),
            run.summary()["tokens"],
            task_for("eval", [run]).own_loss(run),
        )
        for run in runs
    ]


def points_of_study(name: str, study: Study, folder: Path) -> list[Point]:
    """A point per cell that has rows in FOLDER/NAME.jsonl.

    Raises:
        ValueError: the study is not on text, or an arm says nothing of its tokens.
    """
    points = []
    for row in known(cells_of(name, study, Path()), read_rows(folder / f"{name}.jsonl")):
        if "loss" not in row:
            raise ValueError(f"phi needs losses of text, and the rows of the study {name}, {study.record}, have none.")
        what = study.arms[row["arm"]]
        recipe = read_recipe(what.recipe, flags_of(study, what, row["seed"], Path()))
        if recipe.max_steps is None:
            raise ValueError(f"arms.{row['arm']}: phi needs the tokens of a training, so set max_steps.")
        config = LoopedConfig(**recipe.model)
        if row["loops"] == config.num_loops:
            tokens = recipe.max_steps * recipe.batch_size * recipe.data.sequence_length
            points.append(point_of(config, tokens, row["loss"]))
    return points


def phi_of(sources: Sequence[str], folder: Path) -> str:
    """`phi_text` of run folders, or of one study.

    Args:
        sources: run folders, or the file or name of a study.
        folder: of the rows of a study.
    """
    if len(sources) == 1 and not Path(sources[0]).is_dir():
        return phi_text(points_of_study(*read_study(sources[0]), folder))
    with opened_runs(sources) as opened:
        return phi_text(points_of_runs(opened))
