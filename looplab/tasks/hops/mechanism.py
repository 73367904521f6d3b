"""`looped lens` on hops: measures lens, patching, bridge swap, realignment and probes of a run, and draws them.

lens.jsonl           every measurement of RUN/model                    figures/lens.png, patch.png, swap.png,
                                                                       realign.png, probe.png
lens_step-N.jsonl    the same for RUN/snapshots/step-N                 figures/lens_step-N.png, ...
lens_stages.jsonl    measurements that tell stages of training apart   figures/stages.png

Every record has its `measure` (accuracy, lens, patch, swap, realign, probe), the snapshot and its step, `hops`,
`split_kind`, and `at`, the words of its positions. lens.py and probes.py explain the other fields. `weights`, `loops`
and `limit` say what was looked at: records are written as they are measured, and a lens that was interrupted goes on
from them.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplab.instruments.drawing import save
from looplab.runs.digests import weights_of
from looplab.runs.folder import Run, rows_so_far, to_json_lines
from looplab.runs.models import check_loops, load_model
from looplab.runs.writing import below

from .lens import Chains, accuracy, chains_of, corrupt, facts_of, logit_lens, patch, realign, swap_bridge
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
        weights = {f"snapshots/{path.name}": weights_of(path) for path in folders.values()}
        kept = Kept(run, STAGES.name, weights)
        for step, path in tqdm(folders.items(), desc="snapshots", unit="snapshot"):
            model, tokenizer = load_checked(path, num_loops)
            facts = facts_about(run, path, step, weights, model, num_loops, limit)
            kept.measure(facts, stage_parts(model, tokenizer, task, hops, num_loops, limit))
        drawn = [save(stages_figure(kept.rows), figures / "stages.png", format)]
        return [kept.finish(), *run.drew(drawn, weights)]

    weights = {path.relative_to(run.folder).as_posix(): weights_of(path)}
    model, tokenizer = load_checked(path, num_loops)
    suffix = f"_{snapshot}" if snapshot else ""
    kept = Kept(run, f"lens{suffix}.jsonl", weights)
    facts = facts_about(run, path, step_of(path) if snapshot else None, weights, model, num_loops, limit)
    kept.measure(facts, all_parts(model, tokenizer, task, hops, num_loops, limit, probes))
    written = kept.finish()
    drawn = [save(figure, figures / f"{name}{suffix}.png", format) for name, figure in lens_figures(kept.rows).items()]
    return [written, *run.drew(drawn, weights)]


# The fields that all records of a part have, and what measures the part.
Part = tuple[dict, Callable[[], list[dict]]]


class Kept:
    """A file of records that is written part by part, and goes on from the parts that a killed command left.

    Args:
        name: of the file in the run.
        weights: folder in the run -> digest of its weights, of all that are measured.

    Attributes:
        rows: the records so far, in the order in which they were asked for.
    """

    def __init__(self, run: Run, name: str, weights: dict[str, str]):
        self.run, self.name, self.weights = run, name, weights
        known = set(weights.values())
        self.left = [row for row in rows_so_far(run.folder / name) if row.get("weights") in known]
        self.rows = []

    def measure(self, facts: dict, parts: Iterable[Part]) -> None:
        """Add the records of the parts, each with `facts`; those that are on file with the same facts are kept."""
        for fields, measured in parts:
            wanted = facts | fields
            found = [row for row in self.left if wanted.items() <= row.items()]
            if not found:
                self.rows += [facts | row for row in measured()]
                # What is on file of parts that are not reached yet stays: this command may be killed, too.
                reached = set(map(id, self.rows))
                self.write([*self.rows, *(row for row in self.left if id(row) not in reached)])
            else:
                self.rows += found

    def finish(self) -> Path:
        """Write the records that were asked for, and no others; returns the path."""
        return self.write(self.rows)

    def write(self, rows: list[dict]) -> Path:
        return self.run.write({self.name: to_json_lines(rows)}, self.weights)


def facts_about(
    run: Run, path: Path, step: int | None, weights: dict[str, str], model, num_loops: int | None, limit: int
) -> dict:
    """What the records of one model have in common: which weights, and how they were looked at."""
    digest = weights[path.relative_to(run.folder).as_posix()]
    loops = model.config.num_loops if num_loops is None else num_loops
    facts = {"run": run.name, "snapshot": path.name, "step": step}
    return facts | {"weights": digest, "loops": loops, "limit": limit}


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


def parts_of(
    model,
    tokenizer,
    chains: Chains,
    facts: torch.Tensor,
    num_loops: int | None,
    changed: Iterable[int],
    swapped: Iterable[int],
) -> Iterator[Part]:
    """Accuracy, lens, patching after each word of `changed`; swap and realignment of each bridge of `swapped`."""
    kind = {"hops": chains.hops, "split_kind": chains.split_kind}
    reached = {"measure": "accuracy"} | kind
    yield reached, lambda: [reached | {"accuracy": accuracy(model, chains, num_loops), "n": len(chains.path)}]

    def part(measure: str, rows: Callable[[], list[dict]], **fields) -> Part:
        found = {"measure": measure} | kind | fields
        known = {name: value for name, value in fields.items() if name != "hop"}
        return found, lambda: labelled(measure, chains, tokenizer, rows(), **known)

    yield part("lens", lambda: logit_lens(model, chains, num_loops))
    for position in changed:
        word = chains.labels(tokenizer)[position]
        yield part("patch", lambda p=position: patch(model, *corrupt(chains, facts, p), num_loops), changed=word)
    for hop in swapped:
        yield part("swap", lambda h=hop: swap_bridge(model, chains, facts, hop=h, num_loops=num_loops), hop=hop)
        yield part("realign", lambda h=hop: realign(model, chains, hop=h, num_loops=num_loops), hop=hop)


def all_parts(model, tokenizer, task, hops: int, num_loops: int | None, limit: int, probes: bool) -> Iterator[Part]:
    """Every measurement of one model, for every split kind with chains of `hops` hops."""
    facts = facts_of(task["train"], tokenizer)
    for chains in chains_by_kind(task, tokenizer, hops, limit):
        yield from parts_of(model, tokenizer, chains, facts, num_loops, range(hops + 1), range(1, hops))
        if probes and chains.split_kind not in ("atomic", "train"):
            fields = {"measure": "probe", "hops": hops, "split_kind": chains.split_kind}

            def probe(chains: Chains = chains) -> list[dict]:
                (train,) = chains_of(task["train"], tokenizer, hops, PROBE_ROWS)
                return labelled("probe", chains, tokenizer, probe_path(model, train, chains, num_loops))

            yield fields, probe


def stage_parts(model, tokenizer, task, hops: int, num_loops: int | None, limit: int) -> Iterator[Part]:
    """The measurements that tell stages of training apart: accuracy, lens, patching after the start entity
    changed, swap and realignment of the first bridge."""
    facts = facts_of(task["train"], tokenizer)
    for chains in chains_by_kind(task, tokenizer, hops, limit):
        if chains.split_kind in STAGE_KINDS:
            yield from parts_of(model, tokenizer, chains, facts, num_loops, [0], [1])
