"""`looped lens` on molecules: what a model loses when the output of one attention head is replaced in one layer call.

    value   replaces the output of the head, before the output projection
    zero    zeros (SMolLM, arXiv 2605.06322), which the model has never seen there
    mean    the mean output over the tokens of validation molecules: it keeps the size, and says nothing of the token

A cell is (layer call, head, value). Each cell samples with the same random numbers as the intact model, and predicts
the tokens of the same test molecules. The predictions have no sampling noise, and so show more:

    loss        nats per token: over all tokens, `)` (which closes a branch), ring digits, and all others
    shares      of samples: validity, each of `faults`, and each of `exclusive` (smiles.py)

RUN/ablations.jsonl has a line per cell: section, loop, layer, head, value; loss {kind: {"nats", "change",
"interval"}}, validity, faults {label: ...} and exclusive {class: ...}, each {"share", "change", "interval"}. A change
is the difference from the intact model, with a 95 % interval of the paired difference: over molecules for nats,
Newcombe's for shares. A line also says what it was measured under (weights, num_loops, molecules, setting). Started
again, the command measures the missing cells only.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders.molecules import rdkit_chem
from looplab.instruments.recorder import LayerCall, edit_head, layer_calls, watching_heads
from looplab.runs.folder import Run, rows_on_file, to_json_lines
from looplab.runs.intervals import paired_interval
from looplab.runs.models import load_run_model, weights_digest

from .held_out import HeldOut, run_molecules
from .records import ABLATIONS
from .samples import write_molecules
from .sizes import SAMPLINGS, Sizes
from .smiles import EXCLUSIVE, LABELS, RING, canonical_or_none, exclusive_class, faults

VALUES = ("zero", "mean")
KINDS = ("all", "close", "ring", "other")


def mean_outputs(model: PreTrainedModel, molecules: HeldOut, num_loops: int) -> dict[LayerCall, torch.Tensor]:
    """Layer call -> mean output (H, d) of its attention heads over all tokens."""
    sums = {}
    with torch.inference_mode():
        for ids, labels in molecules.batches:
            real = (labels >= 0).to(model.device)

            def add(call: LayerCall, outputs: torch.Tensor, real: torch.Tensor = real) -> None:
                sums[call] = sums.get(call, 0) + outputs[real].sum(0)

            with watching_heads(model, add):
                model(ids.to(model.device), num_loops=num_loops, use_cache=False)
    return {call: total / len(molecules.labels) for call, total in sums.items()}


def token_kinds(tokenizer: PreTrainedTokenizerBase, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Kind, one of KINDS -> whether each of the labels (M,) is of that kind, (M,) bool."""
    tokens = tokenizer.convert_ids_to_tokens(labels.tolist())
    close = torch.tensor([token == ")" for token in tokens])
    ring = torch.tensor([RING.fullmatch(token) is not None for token in tokens])
    return {"all": torch.ones_like(close), "close": close, "ring": ring, "other": ~(close | ring)}


def labels_of(samples: Sequence[dict]) -> dict[str, dict[str, list[bool]]]:
    """ "validity", "faults" or "exclusive" -> label -> whether each sample has that label."""
    valid = [row["finished"] and canonical_or_none(row["smiles"]) is not None for row in samples]
    found = [faults(row["smiles"], row["finished"]) for row in samples]
    classes = [exclusive_class(row["smiles"]) for row in samples]
    return {
        "validity": {"validity": valid},
        "faults": {label: [label in own for own in found] for label in LABELS},
        "exclusive": {name: [name == own for own in classes] for name in EXCLUSIVE},
    }


def changed_share(before: Sequence[bool], after: Sequence[bool]) -> dict:
    """{"share": of `after`, "change": from `before`, "interval": Newcombe's, of the change}."""
    change = (sum(after) - sum(before)) / len(after)
    return {"share": sum(after) / len(after), "change": change, "interval": list(paired_interval(before, after))}


def ablation_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test: Sequence[str],
    validation: Sequence[str],
    num_loops: int,
    max_tokens: int,
    done: Sequence[dict] = (),
    keep: Callable[[list[dict]], object] = lambda rows: None,
) -> list[dict]:
    """The lines of ablations.jsonl, see the module docstring. There are as many samples as molecules in `test`.

    Args:
        test: SMILES whose tokens are predicted.
        validation: SMILES for the mean outputs.
        max_tokens: most tokens of a sample.
        done: lines that are there already.
        keep: is called with all lines so far after every cell.
    """
    molecules = HeldOut(tokenizer, test)
    means = mean_outputs(model, HeldOut(tokenizer, validation), num_loops)
    kinds = token_kinds(tokenizer, molecules.labels)

    def measure() -> tuple[torch.Tensor, dict]:
        samples = write_molecules(model, tokenizer, len(test), SAMPLINGS[0], num_loops, 0, max_tokens)
        return molecules.nats(model, num_loops), labels_of(samples)

    rows = list(done)
    known = {cell_of(row) for row in rows}
    cells = [
        (call, head, value)
        for value in VALUES
        for call in layer_calls(model.config, num_loops)
        for head in range(model.config.num_attention_heads)
        if (*call, head, value) not in known
    ]
    intact, labels = measure() if cells else (None, None)
    for call, head, value in tqdm(cells, desc="heads taken away", unit="cell"):
        mean = means[call][head]
        with edit_head(model, call, head, torch.zeros_like if value == "zero" else mean.expand_as):
            nats, found = measure()
        loss = {}
        for kind, chosen in kinds.items():
            change, interval = molecules.mean_of(nats - intact, chosen)
            loss[kind] = {"nats": molecules.mean_of(nats, chosen)[0], "change": change, "interval": interval}
        shares = {
            group: {label: changed_share(labels[group][label], after) for label, after in by_label.items()}
            for group, by_label in found.items()
        }
        shares["validity"] = shares["validity"]["validity"]
        rows.append({**call._asdict(), "head": head, "value": value, "loss": loss} | shares)
        keep(rows)
    return rows


def cell_of(row: dict) -> tuple:
    return row["section"], row["loop"], row["layer"], row["head"], row["value"]


def ablate_run(run: Run, num_loops: int | None, limit: int, sizes: Sizes) -> Path:
    """Write RUN/ablations.jsonl, for `limit` test molecules and samples, and print it; returns the path.

    Raises:
        ValueError: the run has not finished, its molecules have changed, or rdkit is missing.
    """
    rdkit_chem()
    model, tokenizer = load_run_model(run, num_loops)
    model.eval()
    splits = run_molecules(run)
    test, validation = (splits[name].select(range(min(limit, len(splits[name]))))["text"][:] for name in
                        ("test", "validation"))  # fmt: skip
    num_loops = num_loops or model.config.num_loops
    path = run.folder / ABLATIONS.name
    facts = {"weights": weights_digest(run), "num_loops": num_loops, "molecules": len(test)}
    facts |= {"setting": SAMPLINGS[0].name}

    def keep(rows: list[dict]) -> None:
        run.write({path.name: to_json_lines(row | facts for row in rows)})

    rows = ablation_rows(
        model, tokenizer, test, validation, num_loops, sizes.max_tokens, rows_on_file(path, facts), keep
    )
    print(ablations_text(rows))
    return path


# Tables and figures show these changes: title -> (the part of a line with change and interval, factor to the unit).
SHOWN = {
    "nats per token": lambda row: (row["loss"]["all"], 1),
    "nats per token that closes a branch": lambda row: (row["loss"]["close"], 1),
    "points of samples with brackets wrong": lambda row: (row["faults"]["brackets"], 100),
    "points of valid samples": lambda row: (row["validity"], 100),
}


def ablations_text(rows: Sequence[dict]) -> str:
    """Changes by layer call (down) and head (across), a table for each of SHOWN; * if the interval is without 0."""
    heads = sorted({row["head"] for row in rows})
    calls = list(dict.fromkeys(cell_of(row)[:3] for row in rows))
    by_cell = {cell_of(row): row for row in rows}
    text = []
    for title, shown in SHOWN.items():
        text.append(f"\nChange in {title}, with the output of one head replaced; * its 95 % interval is without 0.")
        replaced = "".join(f"{f'by {value}':<{13 * len(heads)}}" for value in VALUES)
        text.append(f"{'':<25}{replaced}".rstrip())
        text.append(
            f"{'section':<9}{'loop':>6}{'layer':>7}" + "".join(f"{f'head {head + 1}':>13}" for head in heads) * 2
        )
        for call in calls:
            section, loop, layer = call
            numbers = ""
            for value in VALUES:
                for head in heads:
                    change, scale = shown(by_cell[(*call, head, value)])
                    mark = "*" if change["interval"][0] > 0 or change["interval"][1] < 0 else " "
                    numbers += f"{scale * change['change']:+12.{1 if scale == 100 else 4}f}{mark}"
            text.append(f"{section:<9}{loop + 1:>6}{layer + 1:>7}{numbers}".rstrip())
    return "\n".join(text)
