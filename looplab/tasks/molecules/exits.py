"""`looped halting` on molecules: how many loops the tokens of a molecule need. Writes RUN/halting.jsonl.

A record names its halting setting by `rule`, thresholds and `num_loops` (`halting_settings.exit_settings`). The rule
`fixed` is a fixed loop count, which a rule must beat at as many loops. A record has one of three measures:

    exit      held-out molecules, teacher-forced from `<bos>` to `<eos>`, a record per setting and batch size, with the
              fields of `language.exits.exit_rows`. A complete molecule is dropped from the batch, so that no padding
              is run or counted
    kind      the same tokens, a record per rule and kind of the predicted token (`smiles.KINDS`): kind, tokens, and
              loss, full_loss, agreement and loops of these tokens. A rule has one threshold here: among those that
              cost at most 0.01 nats per token more than the best fixed loop count, the one with the fewest loops; if
              none does, the cheapest
    sample    molecules that `generate` writes with T 0.8 and top-k 40, a record per setting, all with the same random
              numbers:

    n                     number of molecules
    validity              {"share", "interval"} as in `measures.measure`
    fixed_validity        share at as many loops, on the straight lines between the fixed loop counts
    fcd, fcd_of_test      distance of the valid molecules, and of n test molecules, to 10,000 test molecules; it is
                          larger for fewer molecules, so compare equal n. None without fcd_torch
    loops, tokens         mean loops of the tokens up to `<eos>` and with it, and the number of these tokens
    timed                 for batches of 1 and of 100 molecules, in turn with all loops: batch;
                          molecules_per_second, full_molecules_per_second (with all loops), medians over the rounds;
                          ratio (ratio_min, ratio_max): seconds per step of `generate` with all loops over seconds with
                          the rule; a step does not depend on how long the molecules are;
                          layer_calls, row_calls: per step, as a share of those with all loops

In `generate` a complete molecule stays in the batch until all are complete, as in use.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import fmean, median

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders import PackedMolecules
from data_builders.molecules import rdkit_chem
from data_builders.packing import IGNORED
from data_builders.text_batches import spread_blocks
from looplab.instruments.halting_settings import HaltingSetting, exit_settings, saved_text, setting_of, threshold_text
from looplab.instruments.timing import counted_calls, interleaved, ratio_of, ratio_text
from looplab.runs.folder import Run, to_json_lines
from looplab.runs.models import load_run_model
from looplab.tasks.language.exits import between_counts, cheapest, decode, exit_rows, exits_text, quality_of

from .chemnet import Statistics, frechet_distance, reference_statistics, statistics_of
from .data import MoleculeData
from .held_out import run_molecules
from .measures import share
from .records import HALTING
from .results import percent
from .samples import batch_seed, samples_of, write_tokens
from .sizes import SAMPLINGS, Sizes
from .smiles import KINDS, canonical_or_none, token_kinds

SAMPLES = 1000  # samples of each setting
HELD_OUT = 200  # most molecules that are decoded
DRAWN = SAMPLINGS[0]


def molecule_rows(molecules: PackedMolecules, numbers: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The molecules `numbers` (N,), one per batch row: `input_ids` (N, T) from `<bos>`, `shift_labels` (N, T) to
    `<eos>`, then -100."""
    labels = [torch.from_numpy(molecules.tokens(number)).long() for number in numbers.tolist()]
    ids = [torch.cat([row.new_tensor([tokenizer.bos_token_id]), row[:-1]]) for row in labels]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "shift_labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def kind_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict,
    settings: Sequence[HaltingSetting],
    num_loops: int,
) -> list[dict]:
    """Records of measure kind, one per setting and kind that occurs. rows: as for `decode`, without a prompt."""
    kinds = torch.full(rows["shift_labels"].shape, -1)
    for row, labels in enumerate(rows["shift_labels"]):
        found = token_kinds(tokenizer.convert_ids_to_tokens(labels[labels != IGNORED][:-1]))
        kinds[row, : len(found)] = torch.tensor([KINDS.index(kind) for kind in found])
    full = decode(model, rows, 0, num_loops, None)
    results = []
    for setting in settings:
        halted = decode(model, rows, 0, setting.num_loops, setting.halting)
        for index in kinds[kinds >= 0].unique().tolist():
            quality = quality_of(halted, full, kinds == index)
            results.append({"measure": "kind", **setting.row(), "kind": KINDS[index], **quality})
    return results


def loops_of_tokens(output, eos: int) -> torch.Tensor:
    """Loops (tokens,) of all tokens in an output of `generate`, up to each `<eos>` and with it."""
    ends = output.sequences[:, 1:] == eos
    return output.loops_used[ends.int().cumsum(1) - ends.int() == 0].cpu()


def sample_row(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: HaltingSetting,
    number: int,
    reference: Statistics | None,
    sizes: Sizes,
) -> dict:
    """Sample `number` molecules: a record with n, validity, fcd, loops and tokens. Every setting has the same random
    numbers."""
    samples, loops = [], []
    for part, size in enumerate(torch.arange(number).split(sizes.batch)):
        output = write_tokens(
            model,
            tokenizer,
            len(size),
            DRAWN,
            setting.num_loops,
            batch_seed("exits", part),
            sizes.max_tokens,
            halting=setting.halting,
        )
        samples += samples_of(output.sequences, tokenizer)
        loops.append(loops_of_tokens(output, tokenizer.eos_token_id))
    canonical = [canonical_or_none(sample["smiles"]) if sample["finished"] else None for sample in samples]
    valid = [smiles for smiles in canonical if smiles is not None]
    loops = torch.cat(loops)
    return {
        "measure": "sample",
        **setting.row(),
        "n": len(samples),
        "validity": share(len(valid), len(samples)),
        "fcd": distance_to(reference, valid),
        "loops": float(loops.double().mean()),
        "tokens": len(loops),
    }


def sampled_text(row: dict) -> str:
    """The record of `sample_row` as a line of text."""
    found = f"{percent(row['validity'])} % of {row['n']:,} samples are valid, in {row['loops']:.2f} loops"
    return saved_text(row, found)


def distance_to(reference: Statistics | None, smiles: Sequence[str]) -> float | None:
    """The Frechet ChemNet distance of canonical SMILES; None without a reference, or for fewer than two SMILES."""
    if reference is None or len(smiles) < 2:
        return None
    return frechet_distance(*reference, *statistics_of(smiles))


@dataclass(frozen=True)
class Pace:
    """One batch: seconds per molecule and per step of `generate`; calls of core layers, and batch rows in them, per
    step."""

    seconds_per_molecule: float
    seconds_per_step: float
    calls: float
    row_calls: float


def pace(model, tokenizer, setting: HaltingSetting, batch: int, seed: int, max_tokens: int) -> Pace:
    """Time one batch of `batch` molecules."""
    with counted_calls(model) as calls:
        began = time.perf_counter()
        output = write_tokens(
            model,
            tokenizer,
            batch,
            DRAWN,
            setting.num_loops,
            batch_seed("pace", seed),
            max_tokens,
            halting=setting.halting,
        )
        seconds = time.perf_counter() - began
    steps = output.sequences.shape[1] - 1
    return Pace(seconds / batch, seconds / steps, len(calls) / steps, sum(calls) / steps)


def timed_row(
    model,
    tokenizer,
    setting: HaltingSetting,
    full: HaltingSetting,
    batch: int,
    rounds: int,
    max_tokens: int = Sizes.max_tokens,
) -> dict:
    """An item of `timed`, see the module docstring. Every round has other random numbers, the same for both sides."""
    seeds = count(), count()
    pairs = interleaved(
        lambda: pace(model, tokenizer, setting, batch, next(seeds[0]), max_tokens),
        lambda: pace(model, tokenizer, full, batch, next(seeds[1]), max_tokens),
        rounds,
        warmup=0,
        timed=lambda turn: turn(),
    )
    ours, theirs = zip(*pairs, strict=True)
    return {
        "batch": batch,
        "molecules_per_second": 1 / median(turn.seconds_per_molecule for turn in ours),
        "full_molecules_per_second": 1 / median(turn.seconds_per_molecule for turn in theirs),
        "layer_calls": fmean(turn.calls for turn in ours) / fmean(turn.calls for turn in theirs),
        "row_calls": fmean(turn.row_calls for turn in ours) / fmean(turn.row_calls for turn in theirs),
    } | ratio_of([(our.seconds_per_step, their.seconds_per_step) for our, their in pairs])


def fewer(settings: Sequence[HaltingSetting], number: int | None) -> list[HaltingSetting]:
    """The first `number` settings of each halting rule (None: all of them), and all fixed loop counts."""
    seen = Counter()
    kept = []
    for setting in settings:
        seen[setting.rule] += 1
        if setting.halting is None or number is None or seen[setting.rule] <= number:
            kept.append(setting)
    return kept


def halting_run(
    run: Run,
    num_loops: int | None = None,
    limit: int | None = None,
    rounds: int = 3,
    sizes: Sizes | None = None,
) -> Path:
    """Write RUN/halting.jsonl, see the module docstring.

    Args:
        run: a finished one on molecules.
        num_loops: the budget; the model's own loop count unless given.
        limit: samples of each setting, 1,000 unless given; also the number of held-out molecules, within 16 to 200.
        rounds: interleaved pairs.
        sizes: see `Sizes`.

    Raises:
        ValueError: the run has not finished, its molecules have changed, rdkit is missing, there is only one loop, or
            the split test is too small.
    """
    rdkit_chem()
    sizes = sizes or Sizes()
    run.summary()  # raises if the training has not finished
    model, tokenizer = load_run_model(run, num_loops)
    model.eval()
    num_loops = model.config.num_loops if num_loops is None else num_loops
    settings = fewer(exit_settings(model.config, num_loops, "sampled"), sizes.thresholds)
    splits = run_molecules(run)
    test = PackedMolecules(splits["test"], tokenizer, MoleculeData.of(run).sequence_length)
    number = SAMPLES if limit is None else limit
    most = max(sizes.decoded)
    numbers = spread_blocks(len(test), max(most, min(number, HELD_OUT)))
    if len(numbers) < most:
        raise ValueError(f"there are {len(numbers)} test molecules, and a batch takes {most}: use more data.")
    rows = {name: part.to(model.device) for name, part in molecule_rows(test, numbers, tokenizer).items()}
    exits = exit_rows(model, rows, 0, num_loops, settings, rounds, sizes.decoded)
    kinds = kind_rows(model, tokenizer, rows, [setting_of(row) for row in cheapest(exits)], num_loops)
    reference = reference_statistics(splits["test"], sizes.reference)
    full, samples = HaltingSetting(None, num_loops), []
    of_test = distance_to(reference, splits["test"].select(spread_blocks(len(test), number).tolist())["text"][:])
    for setting in tqdm([*settings, full], desc="sampling", unit="rule"):
        row = sample_row(model, tokenizer, setting, number, reference, sizes) | {"fcd_of_test": of_test}
        row["timed"] = [
            timed_row(model, tokenizer, setting, full, batch, rounds, sizes.max_tokens) for batch in sizes.timed
        ]
        samples.append(row)
    fixed = {row["num_loops"]: row["validity"]["share"] for row in samples if row["rule"] == "fixed"}
    for row in samples:
        row["fixed_validity"] = between_counts(fixed, row["loops"])
    return run.write({HALTING.name: to_json_lines([*exits, *kinds, *samples])})


def halting_text(rows: Sequence[dict]) -> str:
    """The records of halting.jsonl as three tables of text."""
    by_measure = {name: [row for row in rows if row["measure"] == name] for name in ("exit", "kind", "sample")}
    text = [exits_text(by_measure["exit"]), "", "Loops by what is predicted, and what the rule costs there (nats):"]
    kinds = by_measure["kind"]
    names = [kind for kind in KINDS if any(row["kind"] == kind for row in kinds)]
    text.append(f"{'rule':<12}{'threshold':>10}" + "".join(f"{name:>16}" for name in names))
    for rule in dict.fromkeys(row["rule"] for row in kinds):
        cells = {row["kind"]: row for row in kinds if row["rule"] == rule}
        first = next(iter(cells.values()))
        shown = (f"{cell['loops']:.2f} {cell['loss'] - cell['full_loss']:+.3f}" for cell in map(cells.get, names))
        text.append(f"{rule:<12}{threshold_text(first):>10}" + "".join(f"{cell:>16}" for cell in shown))
    samples = by_measure["sample"]
    of_test = samples[0]["fcd_of_test"]
    of_test = "not measured: it needs fcd_torch" if of_test is None else f"of as many test molecules {of_test:.2f}"
    text += [
        "",
        f"{samples[0]['n']:,} molecules of each setting; valid in % with Wilson's interval; fixed: fixed loop counts "
        f"at as many loops; FCD {of_test}",
        f"{'rule':<12}{'threshold':>10}{'loops':>7}{'valid':>19}{'fixed':>7}{'FCD':>7}"
        + "".join(f"   batch {cell['batch']}: calls, molecules/s, speed " for cell in samples[0]["timed"]),
    ]
    for row in samples:
        low, high = (100 * bound for bound in row["validity"]["interval"])
        valid = f"{100 * row['validity']['share']:.1f} [{low:.1f}, {high:.1f}]"
        fcd = "-" if row["fcd"] is None else f"{row['fcd']:.2f}"
        timed = "".join(
            f"{100 * cell['layer_calls']:>8.0f} %{cell['molecules_per_second']:>8.1f}   {ratio_text(cell):<19}"
            for cell in row["timed"]
        )
        text.append(
            f"{row['rule']:<12}{threshold_text(row):>10}{row['loops']:>7.2f}{valid:>19}"
            f"{100 * row['fixed_validity']:>7.1f}{fcd:>7}{timed}"
        )
    return "\n".join(text)
