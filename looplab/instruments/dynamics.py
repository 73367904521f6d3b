"""`looped dynamics`: how the state moves from loop to loop.

    h_r      the state after loop r of R, as the loop connection keeps it
    norm     |h_r|, of a token's state
    step     |h_r - h_{r-1}| / |h_r|: 0 where the loop has come to rest
    angle    between the steps h_r - h_{r-1} and h_{r+1} - h_r, in degrees: 180 where the state jumps back and forth
    radius   spectral radius of the Jacobian of loop r + 1 at h_r, of all tokens of a row: below 1 a small disturbance
             dies out, above 1 it grows
    margin   logit of the likeliest token over the next one, at the last position, if the model stopped after loop r

Each is a mean over tokens and rows, `radius` and `margin` over rows. The radius is that of a map from state to state:
a KV policy that reads what other loops left has none, and it is null. Legend: B batch rows, T tokens, D hidden
size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from looplab.runs.folder import RecordFile, Run, to_json_lines
from looplab.runs.models import check_loops, load_run_model
from looplab.runs.writing import below
from modeling_looped.cache_looped import OWN_KEYS
from modeling_looped.calls_looped import Call, make_position_ids

from .drawing import MARKS, PALETTE, save, spread, tidy

MEASURES = {
    "step": "length of a step over\nlength of the state",
    "angle": "angle between two\nsteps (degrees)",
    "radius": "spectral radius\nof a loop",
    "margin": "margin of the\nlikeliest token (logits)",
}
ITERATIONS = 24  # products with the Jacobian
RADII = 12  # loops, spread over all, whose radius is computed: it takes most of the time
LIMIT = 16  # rows of each sort


class LoopMap:
    """The loop of a call with `num_loops` loops on `input_ids` (B, T), as a map from state to state."""

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor, num_loops: int):
        self.base = base = model.model
        embeds = base.embed_tokens(input_ids)
        position_ids = make_position_ids(embeds, None, None)
        call = Call(embeds, None, position_ids, past_key_values=None, num_loops=num_loops)
        context, self.embeds, self.state = base.begin(call)
        self.context = context.with_keys(base.sharing.key_source())

    def __call__(self, state: torch.Tensor, loop: int) -> torch.Tensor:
        """The state after `loop`, counted from 0: (B, T, D), or (B, T, S, D) with S streams, as the `state` before."""
        return self.base.run_loop(state, self.embeds, self.context, loop)

    def radius(self, state: torch.Tensor, loop: int) -> torch.Tensor:
        """(B,) spectral radius of the Jacobian of `loop` at `state`: the largest Ritz value of a Krylov space (Arnoldi
        1951), which takes the same products as power iteration and needs fewer of them."""
        shape = state.shape
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(state).flatten(1)
        basis = [start / start.norm(dim=1, keepdim=True)]  # orthonormal, (B, N) each
        projected = torch.zeros(len(state), ITERATIONS + 1, ITERATIONS, dtype=state.dtype, device=state.device)
        for column in range(ITERATIONS):
            # The kernels of attention have no forward derivative; the mathematical form has.
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                after = self(forward_ad.make_dual(state, basis[column].view(shape)), loop)
                image = forward_ad.unpack_dual(after).tangent.flatten(1)
            for row, vector in enumerate(basis):
                along = (image * vector).sum(1)
                projected[:, row, column] += along
                image = image - along[:, None] * vector
            length = image.norm(dim=1)
            projected[:, column + 1, column] = length
            basis.append(image / length.clamp_min(torch.finfo(image.dtype).tiny)[:, None])
        return torch.linalg.eigvals(projected[:, :ITERATIONS].cpu()).abs().amax(1)


@torch.no_grad()
def dynamics(model: PreTrainedModel, input_ids: torch.Tensor, num_loops: int) -> list[dict[str, torch.Tensor]]:
    """The measures of loop 1 .. R, one dict per loop: norm, step, angle (B, T); radius, margin (B,).

    What is not known is nan: the angle of the last loop, the radius of loops that are not among the RADII or that no
    loop follows, and of a KV policy that reads other loops.

    Args:
        input_ids: (B, T), without padding.
    """
    model.eval()
    loop_map = LoopMap(model, input_ids.to(model.device), num_loops)
    states = [loop_map.state]
    for loop in range(num_loops):
        states.append(loop_map(states[-1], loop))
    flat = [state.float().flatten(2) for state in states]  # (B, T, D) each; streams side by side
    steps = [after - before for before, after in pairwise(flat)]
    found = []
    alone = loop_map.context.key_source is OWN_KEYS
    radii = set(spread(range(1, num_loops), RADII)) if alone else set()
    unknown = torch.full((len(input_ids),), math.nan)
    for done in range(1, num_loops + 1):
        follows = done < num_loops
        angle = torch.full(input_ids.shape, math.nan)
        if follows:
            cosine = cosine_similarity(steps[done - 1], steps[done], dim=-1).clamp(-1, 1)
            angle = torch.rad2deg(torch.acos(cosine))
        closed = model.model.connection.close(states[done])
        best = model.lm_head(model.model.stopped(closed)[:, -1:]).float().topk(2, -1).values[:, 0]  # (B, 2)
        found.append(
            {
                "norm": flat[done].norm(dim=-1),
                "step": steps[done - 1].norm(dim=-1) / flat[done].norm(dim=-1),
                "angle": angle,
                "radius": loop_map.radius(states[done], done) if done in radii else unknown,
                "margin": best[:, 0] - best[:, 1],
            }
        )
    return found


def dynamics_rows(model: PreTrainedModel, sorts: Mapping[str, Sequence[torch.Tensor]], num_loops: int) -> list[dict]:
    """A record per sort and loop, see the module docstring. sorts: name -> batches of ids (b, T)."""
    rows = []
    for sort, batches in tqdm(sorts.items(), desc="dynamics", unit="sort"):
        found = [dynamics(model, ids, num_loops) for ids in batches]
        for loop in range(num_loops):
            facts = {"sort": sort, "loops": loop + 1, "n": sum(len(ids) for ids in batches)}
            for name in ("norm", *MEASURES):
                mean = torch.cat([each[loop][name].flatten() for each in found]).double().mean().item()
                facts[name] = None if math.isnan(mean) else mean
            rows.append(facts)
    return rows


def dynamics_run(
    run: Run,
    record: RecordFile,
    sorts_of: Callable[[Run, object, int], Mapping[str, Sequence[torch.Tensor]]],
    num_loops: int | None = None,
    limit: int | None = None,
    format: str = "png",
) -> list[Path]:
    """Write the `record` and RUN/figures/dynamics.png; returns their paths.

    Args:
        sorts_of: (run, tokenizer, limit) -> test rows by sort, see `Task.sorts`.
        num_loops: the last loop; twice the model's own count unless given.
        limit: most rows of each sort, `LIMIT` unless given.
    """
    model, tokenizer = load_run_model(run)
    num_loops = 2 * model.config.num_loops if num_loops is None else num_loops
    check_loops(model, run.model_folder(), num_loops)
    rows = dynamics_rows(model, sorts_of(run, tokenizer, limit or LIMIT), num_loops)
    path = run.write({record.name: to_json_lines(rows)})
    figure = below(run.folder, "figures") / "dynamics.png"
    return [path, *run.drew([save(dynamics_figure(rows, model.config.num_loops), figure, format)])]


def dynamics_figure(rows: Sequence[Mapping], own_loops: int):
    """A panel per measure, a line per sort. own_loops: the model's own count, a dashed line."""
    from matplotlib.figure import Figure

    sorts = spread(list(dict.fromkeys(row["sort"] for row in rows)), len(PALETTE))
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, MEASURES.items(), strict=True):
        for index, sort in enumerate(sorts):
            points = [(row["loops"], row[name]) for row in rows if row["sort"] == sort and row[name] is not None]
            if points:
                every = max(1, len(points) // 8)
                marks = {"marker": MARKS[index], "markersize": 4, "markevery": (index * every // len(sorts), every)}
                axes.plot(*zip(*points, strict=True), color=PALETTE[index], linewidth=1.5, label=sort, **marks)
        if not axes.lines:
            axes.text(0.5, 0.5, "not of this KV policy", ha="center", color="0.4", transform=axes.transAxes)
        if own_loops < rows[-1]["loops"]:
            axes.axvline(own_loops, color="0.7", linestyle="--", linewidth=0.8, zorder=0)
        if name == "radius":
            axes.axhline(1, color="0.7", linewidth=0.8, zorder=0)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_ylim(bottom=0)
        tidy(axes, "", "loops")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure
