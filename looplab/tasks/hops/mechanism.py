"""`looped lens` on hops: measures lens, patching, bridge swap and probes of a run, and draws them.

lens.jsonl           every measurement of RUN/model                    figures/lens.png, patch.png, swap.png, probe.png
lens_step-N.jsonl    the same for RUN/snapshots/step-N                 figures/lens_step-N.png, ...
lens_stages.jsonl    measurements that tell stages of training apart   figures/stages.png

Every record has its `measure` (accuracy, lens, patch, swap, probe), the snapshot and its step, `hops`, `split_kind`,
and `at`, the words of its positions. lens.py and probes.py explain the other fields.
"""

from pathlib import Path

import datasets
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplab.instruments.drawing import save
from looplab.runs.digests import weights_of
from looplab.runs.folder import Run, to_json_lines
from looplab.runs.models import check_loops, load_model
from looplab.runs.writing import below

from .lens import Chains, accuracy, chains_of, corrupt, facts_of, logit_lens, patch, swap_bridge
from .lens_figures import lens_figures, stages_figure
from .probes import probe_path
from .records import STAGES
from .rows import load_run_task

LIMIT = 300  # chains per split kind
PROBE_ROWS = 3000  # training chains of a probe
DEEPEST = 4  # most hops unless asked for more, since the work grows with their square
DAMAGED = "delete the folder."  # the remedy for a snapshot that cannot be read
STAGE_KINDS = ("train", "id", "ood")  # split kinds that tell stages of training apart


def lens_run(
    run: Run,
    *,
    snapshot: str | None = None,
    hops: int | None = None,
    num_loops: int | None = None,
    limit: int | None = None,
    probes: bool = True,
    format: str = "png",
) -> list[Path]:
    """Measure RUN/model, one snapshot or all snapshots; write the numbers and draw them.

    Args:
        snapshot: a folder of RUN/snapshots ("step-000001000"), "all", or None for RUN/model.
        hops: hop count of the chains; the largest in training, but at most `DEEPEST`, unless given.
        num_loops: loop count; the model's own unless given.
        limit: most chains per split kind, `LIMIT` unless given.
        probes: also fit the probes, which take most of the time; "all" never fits them.
        format: of the figures, see `drawing.save`.

    Returns:
        The paths written, numbers first.

    Raises:
        ValueError: there is no such snapshot or hop count.
    """
    limit = LIMIT if limit is None else limit
    if snapshot == "all":
        folders = snapshots_of(run)
    else:
        path = run.model_folder() if snapshot is None else named_snapshot(run, snapshot)
    task = load_run_task(run)
    hops = min(max(task["train"]["hops"][:]), DEEPEST) if hops is None else hops
    figures = below(run.folder, "figures")
    if snapshot == "all":
        rows = []
        weights = {}
        for step, path in tqdm(folders.items(), desc="snapshots", unit="snapshot"):
            weights[f"snapshots/{path.name}"] = weights_of(path)
            model, tokenizer = load_checked(path, num_loops)
            facts = {"run": run.name, "snapshot": path.name, "step": step}
            measured = stage_rows(model, tokenizer, task, hops, num_loops, limit)
            rows += [facts | row for row in measured]
        written = run.write({STAGES.name: to_json_lines(rows)}, weights)
        return [written, *run.drew([save(stages_figure(rows), figures / "stages.png", format)], weights)]

    weights = {path.relative_to(run.folder).as_posix(): weights_of(path)}
    model, tokenizer = load_checked(path, num_loops)
    facts = {"run": run.name, "snapshot": path.name, "step": step_of(path) if snapshot else None}
    rows = [facts | row for row in all_rows(model, tokenizer, task, hops, num_loops, limit, probes)]
    suffix = f"_{snapshot}" if snapshot else ""
    written = run.write({f"lens{suffix}.jsonl": to_json_lines(rows)}, weights)
    drawn = [save(figure, figures / f"{name}{suffix}.png", format) for name, figure in lens_figures(rows).items()]
    return [written, *run.drew(drawn, weights)]


def load_checked(path: Path, num_loops: int | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_model(path, DAMAGED)
    check_loops(model, path, num_loops)
    return model, tokenizer


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def snapshots_of(run: Run) -> dict[int, Path]:
    """Step -> folder of the snapshot, in order. Raises ValueError if there are none."""
    found = {step_of(path): path for path in run.folder.glob("snapshots/step-*") if (path / "config.json").is_file()}
    if not found:
        raise ValueError(
            f"{run} has no snapshots/step-*: name the steps to keep in the recipe's `snapshots` and train."
        )
    return dict(sorted(found.items()))


def named_snapshot(run: Run, name: str) -> Path:
    names = {path.name: path for path in snapshots_of(run).values()}
    if name not in names:
        raise ValueError(f"{run} has no snapshot {name!r}; there are {', '.join(names)}, and 'all'.")
    return names[name]


def chains_by_kind(task: datasets.DatasetDict, tokenizer, hops: int, limit: int) -> list[Chains]:
    """At most `limit` chains of every split kind, training first.

    Raises:
        ValueError: there are no chains of `hops` hops.
    """
    known = sorted({count for split in ("train", "test") for count in task[split].unique("hops")})
    if hops not in known:
        raise ValueError(f"there are no chains of hops={hops} in the task; there are {known}.")
    return [
        chains
        for split in ("train", "test")
        if hops in task[split].unique("hops")
        for chains in chains_of(task[split], tokenizer, hops, limit)
    ]


def labelled(
    measure: str, chains: Chains, tokenizer: PreTrainedTokenizerBase, rows: list[dict], **facts
) -> list[dict]:
    """The records with their measure, hop count and split kind, `facts`, and the words of their positions."""
    labels = chains.labels(tokenizer)

    def words(row: dict) -> dict:
        positions = row["positions"] if "positions" in row else [row["position"]]
        joint = "+" if len(positions) == 2 else ".."
        return {"at": joint.join(labels[position] for position in dict.fromkeys((positions[0], positions[-1])))}

    kind = {"measure": measure, "hops": chains.hops, "split_kind": chains.split_kind, **facts}
    return [kind | words(row) | row for row in rows]


def accuracy_row(model: PreTrainedModel, chains: Chains, num_loops: int | None) -> dict:
    kind = {"measure": "accuracy", "hops": chains.hops, "split_kind": chains.split_kind}
    return kind | {"accuracy": accuracy(model, chains, num_loops), "n": len(chains.path)}


def all_rows(model, tokenizer, task, hops: int, num_loops: int | None, limit: int, probes: bool) -> list[dict]:
    """Every measurement of one model, for every split kind with chains of `hops` hops."""
    facts = facts_of(task["train"], tokenizer)
    rows = []
    for chains in chains_by_kind(task, tokenizer, hops, limit):
        rows.append(accuracy_row(model, chains, num_loops))
        rows += labelled("lens", chains, tokenizer, logit_lens(model, chains, num_loops))
        for changed, word in enumerate(chains.labels(tokenizer)[: hops + 1]):
            pair = corrupt(chains, facts, changed)
            rows += labelled("patch", chains, tokenizer, patch(model, *pair, num_loops), changed=word)
        for hop in range(1, hops):
            swapped = swap_bridge(model, chains, facts, hop=hop, num_loops=num_loops)
            rows += labelled("swap", chains, tokenizer, swapped)
        if probes and chains.split_kind not in ("atomic", "train"):
            (train,) = chains_of(task["train"], tokenizer, hops, PROBE_ROWS)
            rows += labelled("probe", chains, tokenizer, probe_path(model, train, chains, num_loops))
    return rows


def stage_rows(model, tokenizer, task, hops: int, num_loops: int | None, limit: int) -> list[dict]:
    """The measurements that tell stages of training apart: accuracy, lens, patching after the start entity
    changed, swap of the first bridge."""
    facts = facts_of(task["train"], tokenizer)
    rows = []
    for chains in chains_by_kind(task, tokenizer, hops, limit):
        if chains.split_kind in STAGE_KINDS:
            rows.append(accuracy_row(model, chains, num_loops))
            rows += labelled("lens", chains, tokenizer, logit_lens(model, chains, num_loops))
            pair = corrupt(chains, facts, position=0)
            rows += labelled("patch", chains, tokenizer, patch(model, *pair, num_loops), changed="h")
            rows += labelled("swap", chains, tokenizer, swap_bridge(model, chains, facts, num_loops=num_loops))
    return rows
