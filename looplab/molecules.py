"""Molecules that a trained run writes: what `looped eval` does for the task molecules.

    sampling       batches with the KV cache, from `<bos>`, at most 120 tokens; every batch has a seed of its own
    settings       T 0.8 with top-k 40 (SMolLM, arXiv 2605.06322) and T 1.0 without, both at the model's own loops;
                   the first one at other loop counts as well: one model read after each pass
    loss           nats per token of the test split's molecules, at every loop count

    samples/SETTING-loopsR.jsonl  a line per sample: smiles, finished (it wrote `<eos>`); resumed batch by batch
    molecules.jsonl               a line per setting and loop count, see `measure`
    evaluation.json               samples, num_loops (the model's own), parameters, and what the KV cache saves

valid        finished, and rdkit reads it as at least one atom
uniqueness   distinct canonical SMILES over valid samples
novelty      of the distinct ones, those that are no training SMILES as it is written. Of MOSES 2 in 10,000 are not
             canonical, so that as many may wrongly be called new; other data may be built with `canonical: true`
diversity    1 - mean Tanimoto similarity of pairs of distinct molecules (Morgan, radius 2, 1,024 bits)
fcd          Frechet ChemNet distance to 10,000 molecules of the test split (Preuer et al. 2018, arXiv 1803.09518), the
             network from the package fcd_torch; None where that is not installed

Shares have Wilson's interval, taking uniqueness as a share too; diversity that of a U-statistic. What is evaluated is
what ships: the weights in `RUN/model`, loaded by `runs/models.py`.
"""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from data_builders import PackedMolecules, load_molecules
from data_builders.molecule_batches import IGNORED
from data_builders.molecules import rdkit_chem
from looplab.runs.folder import Run, open_run, rows_so_far, to_json_lines
from looplab.runs.intervals import wilson_interval
from looplab.runs.models import count_parameters, load_run_model, weights_digest
from looplab.runs.writing import below, write_whole

from .chemnet import frechet_distance, reference_statistics, statistics_of
from .masking import ValidPrefix
from .smiles import EXCLUSIVE, LABELS, canonical_or_none, exclusive_class, faults

SAMPLES = 10_000  # at the model's own loops, of each setting
LOOP_SAMPLES = 2_000  # at most, at each other loop count
BATCH = 500  # samples that are written at once, and seeded alike
MAX_TOKENS = 120
LOSS_MOLECULES = 2_000
BITS = 1024


@dataclass(frozen=True)
class Setting:
    """How the next token is drawn; `top_k` 0 is no limit."""

    name: str
    temperature: float
    top_k: int


SETTINGS = (Setting("T0.8-top40", 0.8, 40), Setting("T1.0", 1.0, 0))


def default_loops(own: int) -> list[int]:
    """1 .. own loops and up to twice as many; of a model that runs its layers once, that."""
    return sorted({*range(1, own + 1), *(own * more // 4 for more in (5, 6, 8))}) if own > 1 else [1]


def write_molecules(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    setting: Setting,
    num_loops: int,
    seed: int,
    use_cache: bool = True,
    logits_processor: LogitsProcessorList | None = None,
) -> list[dict]:
    """`count` samples {"smiles", "finished"}, a function of the seed; the random state outside is as it was."""
    output = write_tokens(model, tokenizer, count, setting, num_loops, seed, use_cache, logits_processor)
    return samples_of(output.sequences, tokenizer)


@torch.inference_mode()
def write_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    setting: Setting,
    num_loops: int,
    seed: int,
    use_cache: bool = True,
    logits_processor: LogitsProcessorList | None = None,
    halting: dict | None = None,
):
    """What `generate` returns for `count` samples: sequences (count, 1 + T) from `<bos>`, loops_used (count, T)."""
    start = torch.full((count, 1), tokenizer.bos_token_id, device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, temperature=setting.temperature,
            top_k=setting.top_k, top_p=1.0, max_new_tokens=MAX_TOKENS, num_loops=num_loops, use_cache=use_cache,
            logits_processor=logits_processor, halting=halting, return_dict_in_generate=True,
        )  # fmt: skip


def samples_of(sequences: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """{"smiles", "finished"} of each of the sequences (N, 1 + T), which begin with `<bos>`."""
    rows = sequences[:, 1:]
    finished = (rows == tokenizer.eos_token_id).any(1).tolist()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [{"smiles": text, "finished": ended} for text, ended in zip(texts, finished, strict=True)]


def batch_seed(*parts) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def sample_file(
    path: Path,
    model,
    tokenizer,
    count: int,
    setting: Setting,
    num_loops: int,
    seed: int,
    bar: tqdm,
    logits_processor: LogitsProcessorList | None = None,
) -> list[dict]:
    """The first `count` samples of the file, which is written as far as it is short of them, batch by batch."""
    rows = rows_so_far(path)
    rows = rows[: len(rows) // BATCH * BATCH]
    bar.update(min(count, len(rows)))
    while len(rows) < count:
        part_seed = batch_seed(seed, setting.name, num_loops, len(rows) // BATCH)
        rows += write_molecules(
            model, tokenizer, BATCH, setting, num_loops, part_seed, logits_processor=logits_processor
        )
        write_whole(path, to_json_lines(rows))
        bar.update(min(BATCH, count - (len(rows) - BATCH)))
    return rows[:count]


def known_among(smiles: Sequence[str], train: datasets.Dataset) -> int:
    """How many of the distinct `smiles` are rows of the training split."""
    column = train.with_format("arrow")[:]["text"]
    return pc.sum(pc.is_in(pa.array(smiles, pa.string()), value_set=column.combine_chunks())).as_py() or 0


def fingerprints(smiles: Sequence[str]) -> np.ndarray:
    """Morgan fingerprints (N, 1024), radius 2, as zeros and ones."""
    chem = rdkit_chem()
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=BITS)
    return np.stack([generator.GetFingerprintAsNumPy(chem.MolFromSmiles(text)) for text in smiles]).astype(np.float32)


def internal_diversity(bits: np.ndarray) -> tuple[float, list[float]]:
    """1 - mean Tanimoto similarity over the pairs of rows (N, bits), N >= 2, and its 95 % interval.

    The mean of pairs is a U-statistic: its variance is 4 / N times that of the rows' own means (Hoeffding 1948).
    """
    count, sizes = len(bits), bits.sum(1)
    means = np.empty(count)
    for start in range(0, count, 1000):
        shared = bits[start : start + 1000] @ bits.T
        union = sizes[start : start + 1000, None] + sizes - shared
        similarity = np.where(union > 0, shared / np.maximum(union, 1), 1.0)
        means[start : start + 1000] = (similarity.sum(1) - 1) / (count - 1)  # without itself
    diversity = 1 - means.mean()
    half = 1.96 * 2 * means.std() / count**0.5
    return float(diversity), [float(diversity - half), float(diversity + half)]


def share(count: int, total: int) -> dict:
    """A share and its interval; None of nothing."""
    if not total:
        return {"share": None, "interval": None}
    return {"share": count / total, "interval": list(wilson_interval(count / total, total))}


def measure(rows: Sequence[dict], train: datasets.Dataset, reference=None) -> dict:
    """What samples are worth.

    n; validity, uniqueness, novelty and each of `faults` and `exclusive` (of all samples): {"share", "interval"};
    diversity: the same; fcd; mean_length: characters of a valid SMILES.

    reference: `statistics_of` held-out molecules; without it there is no fcd.
    """
    canonical = [canonical_or_none(row["smiles"]) if row["finished"] else None for row in rows]
    valid = [smiles for smiles in canonical if smiles is not None]
    unique = sorted(set(valid))
    labels = Counter(label for row in rows for label in faults(row["smiles"], row["finished"]))
    classes = Counter(exclusive_class(row["smiles"]) for row in rows)
    measured = {
        "n": len(rows),
        "validity": share(len(valid), len(rows)),
        "uniqueness": share(len(unique), len(valid)),
        "novelty": share(len(unique) - (known_among(unique, train) if unique else 0), len(unique)),
        "diversity": {"share": None, "interval": None},
        "fcd": None,
        "mean_length": fmean(map(len, valid)) if valid else None,
        "faults": {label: share(labels[label], len(rows)) for label in LABELS},
        "exclusive": {name: share(classes[name], len(rows)) for name in EXCLUSIVE},
    }
    if len(unique) > 1:
        diversity, interval = internal_diversity(fingerprints(unique))
        measured["diversity"] = {"share": diversity, "interval": interval}
    if reference is not None and len(valid) > 1:
        measured["fcd"] = frechet_distance(*reference, *statistics_of(valid))
    return measured


@torch.inference_mode()
def loss_of_molecules(model: PreTrainedModel, molecules: PackedMolecules, num_loops: int, limit: int) -> float:
    """Nats per token of the first `limit` molecules."""
    total = count = 0
    for numbers in torch.arange(min(limit, len(molecules))).split(64):
        rows = {name: value.to(model.device) for name, value in molecules.rows(numbers).items()}
        labels = rows.pop("shift_labels").flatten()
        logits = model(**rows, num_loops=num_loops, use_cache=False).logits.flatten(0, 1).float()
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels >= 0).sum())
    return total / count


class HeldOut:
    """Molecules whose every token a model predicts, one to a row: `nats` of each, in the order of the molecules.

    labels (M,): the tokens, `<eos>` included. owner (M,): the molecule that each belongs to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, smiles: Sequence[str], rows: int = 100):
        texts = [torch.tensor(tokenizer(text)["input_ids"]) for text in smiles]  # they begin with <bos>
        labels = [F.pad(text[1:], (0, 1), value=tokenizer.eos_token_id) for text in texts]
        self.labels = torch.cat(labels)
        self.owner = torch.repeat_interleave(torch.tensor([len(text) for text in texts]))
        self.batches = [
            # No token looks at what is filled up on the right.
            (
                pad_sequence(texts[start : start + rows], True, tokenizer.pad_token_id),
                pad_sequence(labels[start : start + rows], True, IGNORED),
            )
            for start in range(0, len(texts), rows)
        ]

    @torch.inference_mode()
    def nats(self, model: PreTrainedModel, num_loops: int) -> torch.Tensor:
        """(M,) cross-entropy of each token."""
        parts = []
        for ids, labels in self.batches:
            logits = model(ids.to(model.device), num_loops=num_loops, use_cache=False).logits
            real = labels >= 0
            parts.append(F.cross_entropy(logits[real.to(model.device)].float().cpu(), labels[real], reduction="none"))
        return torch.cat(parts)

    def mean_of(self, values: torch.Tensor, chosen: torch.Tensor) -> tuple[float, list[float]]:
        """Mean of the `chosen` (M,) of the values (M,), and its 95 % interval over molecules; of none, nan."""
        if not chosen.any():
            return math.nan, [math.nan] * 2
        molecules = int(self.owner.max()) + 1
        mean = values[chosen].mean()
        # How far each molecule pulls the ratio of sums, to first order.
        pulls = torch.zeros(molecules).index_add(0, self.owner[chosen], values[chosen] - mean)
        half = 1.96 * float(pulls.std()) * molecules**0.5 / int(chosen.sum())
        return float(mean), [float(mean) - half, float(mean) + half]


def cache_speed(model, tokenizer, num_loops: int, count: int = 100) -> dict:
    """Molecules per second with and without the KV cache: the same `count` molecules, in one batch."""
    seconds = {}
    for use_cache in (True, False):
        began = time.perf_counter()
        write_molecules(model, tokenizer, count, SETTINGS[0], num_loops, 0, use_cache)
        seconds[use_cache] = time.perf_counter() - began
    return {
        "molecules_per_second": count / seconds[True],
        "without_cache": count / seconds[False],
        "ratio": seconds[False] / seconds[True],
        "batch": count,
    }


def run_molecules(run: Run) -> datasets.DatasetDict:
    """The splits of a run's molecules, as its recipe names them.

    Raises:
        ValueError: they are not those it was trained on (files changed, or another working folder).
    """
    data = run.recipe()["data"]
    splits = load_molecules(data["config"], data["files"], **({"seed": data["seed"]} | data["overrides"]))
    trained_on = run.summary()["train_molecules"]
    if len(splits["train"]) != trained_on:
        raise ValueError(
            f"{run.folder} was trained on {trained_on} molecules and its recipe now gives {len(splits['train'])}, so "
            "that what is new cannot be told: restore the files its recipe names, or train again."
        )
    run.check_data(splits)
    return splits


def evaluate_molecules(
    folder: str | Path,
    loops: Sequence[int] | None = None,
    limit: int | None = None,
    masked: int | None = None,
    seed: int = 0,
) -> Path:
    """Write RUN/samples/, RUN/molecules.jsonl and RUN/evaluation.json, see the module docstring; returns the second.

    Args:
        folder: a finished run on molecules.
        loops: loop counts; `default_loops` unless given. The model's own are always among them.
        limit: samples at the model's own loops, of each setting; 10,000 unless given. Others have 2,000 at most.
        masked: also so many samples at the model's own loops with `masking.ValidPrefix`, a line with a setting of its
            own.

    Raises:
        ValueError: no such run, it has not finished, its molecules have changed, rdkit is missing, or the model cannot
            run so many loops.
    """
    rdkit_chem()
    run = open_run(folder)
    run.summary()  # says so if the training has not finished
    model, tokenizer = load_run_model(run, *(loops or ()))
    splits = run_molecules(run)
    own, count = model.config.num_loops, limit or SAMPLES
    counts = sorted({own, *(loops or default_loops(own))})
    work = [(setting, own, count, None) for setting in SETTINGS]
    work += [(SETTINGS[0], loop, min(count, LOOP_SAMPLES), None) for loop in counts if loop != own]
    if masked is not None:
        processor = LogitsProcessorList([ValidPrefix(tokenizer)])
        work.append((replace(SETTINGS[0], name=f"{SETTINGS[0].name}-masked"), own, masked, processor))
    written = forget_samples_of_another_model(run)
    test = PackedMolecules(splits["test"], tokenizer, run.recipe()["data"]["sequence_length"])
    # The largest first: one that the model cannot run is refused before any work.
    losses = {loop: loss_of_molecules(model, test, loop, LOSS_MOLECULES) for loop in reversed(counts)}
    reference = reference_statistics(splits["test"])
    rows = []
    with tqdm(total=sum(number for _, _, number, _ in work), desc="sampling", unit="molecule", mininterval=1) as bar:
        for setting, loop, number, processor in work:
            path = written / f"{setting.name}-loops{loop}.jsonl"
            samples = sample_file(path, model, tokenizer, number, setting, loop, seed, bar, processor)
            # A Gaussian of 512 dimensions needs more molecules than there are at most other loop counts.
            measured = measure(samples, splits["train"], reference if loop == own else None)
            rows.append({"setting": setting.name, "loops": loop, "loss": losses[loop]} | measured)
    facts = {
        "limit": limit,
        "num_loops": own,
        "parameters": count_parameters(model),
        "settings": [asdict(setting) for setting in SETTINGS],
        "max_tokens": MAX_TOKENS,
        "seed": seed,
        "speed": cache_speed(model, tokenizer, own),
    }
    return run.write({"evaluation.json": json.dumps(facts, indent=1) + "\n", "molecules.jsonl": to_json_lines(rows)})


def forget_samples_of_another_model(run: Run) -> Path:
    """Delete samples that the weights in RUN/model did not write; returns the folder of samples."""
    weights = weights_digest(run)
    folder = below(run.folder, "samples")
    written = rows_so_far(folder / "model.json")
    if not (written and written[0].get("sha256") == weights):
        for path in folder.glob("*-loops*.jsonl"):
            path.unlink()
        write_whole(folder / "model.json", json.dumps({"sha256": weights}) + "\n")
    return folder
