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

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm.auto import tqdm
from transformers import LogitsProcessorList

from data_builders import PackedMolecules
from data_builders.molecules import rdkit_chem
from looplab.runs.folder import Run, to_json_lines
from looplab.runs.models import count_parameters, load_run_model

from .chemnet import reference_statistics
from .data import MoleculeData
from .held_out import LOSS_MOLECULES, loss_of_molecules, run_molecules
from .masking import ValidPrefix
from .measures import measure
from .records import EVALUATION, MOLECULES
from .samples import cache_speed, forget_samples_of_another_model, sample_file
from .sizes import SAMPLINGS, Sizes

SAMPLES = 10_000  # at the model's own loops, of each setting
LOOP_SAMPLES = 2_000  # at most, at each other loop count


def default_loops(own: int) -> list[int]:
    """1 .. own loops and up to twice as many; of a model that runs its layers once, that."""
    return sorted({*range(1, own + 1), *(own * more // 4 for more in (5, 6, 8))}) if own > 1 else [1]


def evaluate_run(
    run: Run,
    loops: Sequence[int] | None = None,
    limit: int | None = None,
    masked: int | None = None,
    seed: int = 0,
    sizes: Sizes | None = None,
) -> Path:
    """Write RUN/samples/, RUN/molecules.jsonl and RUN/evaluation.json, see the module docstring; returns the second.

    Args:
        run: a finished one on molecules.
        loops: loop counts; `default_loops` unless given. The model's own are always among them.
        limit: samples at the model's own loops, of each setting; 10,000 unless given. Others have 2,000 at most.
        masked: also so many samples at the model's own loops with `masking.ValidPrefix`, a line with a setting of its
            own.
        sizes: how much is written at once, and how long.

    Raises:
        ValueError: the run has not finished, its molecules have changed, rdkit is missing, or the model cannot
            run so many loops.
    """
    rdkit_chem()
    sizes = sizes or Sizes()
    run.summary()  # says so if the training has not finished
    model, tokenizer = load_run_model(run, *(loops or ()))
    splits = run_molecules(run)
    own, count = model.config.num_loops, limit or SAMPLES
    counts = sorted({own, *(loops or default_loops(own))})
    work = [(sampling, own, count, None) for sampling in SAMPLINGS]
    work += [(SAMPLINGS[0], loop, min(count, LOOP_SAMPLES), None) for loop in counts if loop != own]
    if masked is not None:
        processor = LogitsProcessorList([ValidPrefix(tokenizer)])
        work.append((replace(SAMPLINGS[0], name=f"{SAMPLINGS[0].name}-masked"), own, masked, processor))
    written = forget_samples_of_another_model(run)
    test = PackedMolecules(splits["test"], tokenizer, MoleculeData.of(run).sequence_length)
    # The largest first: one that the model cannot run is refused before any work.
    losses = {loop: loss_of_molecules(model, test, loop, LOSS_MOLECULES) for loop in reversed(counts)}
    reference = reference_statistics(splits["test"], sizes.reference)
    rows = []
    with tqdm(total=sum(number for _, _, number, _ in work), desc="sampling", unit="molecule", mininterval=1) as bar:
        for sampling, loop, number, processor in work:
            path = written / f"{sampling.name}-loops{loop}.jsonl"
            samples = sample_file(path, model, tokenizer, number, sampling, loop, seed, bar, sizes, processor)
            # A Gaussian of 512 dimensions needs more molecules than there are at most other loop counts.
            measured = measure(samples, splits["train"], reference if loop == own else None)
            rows.append({"setting": sampling.name, "loops": loop, "loss": losses[loop]} | measured)
    facts = {
        "limit": limit,
        "num_loops": own,
        "parameters": count_parameters(model),
        "settings": [asdict(sampling) for sampling in SAMPLINGS],
        "max_tokens": sizes.max_tokens,
        "seed": seed,
        "speed": cache_speed(model, tokenizer, own, sizes.max_tokens),
    }
    return run.write({EVALUATION.name: json.dumps(facts, indent=1) + "\n", MOLECULES.name: to_json_lines(rows)})
