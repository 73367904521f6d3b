"""`looped eval` on molecules: sample molecules from a trained run, and measure them.

    sampling       in batches with the KV cache, from `<bos>`, at most 120 tokens; every batch has its own seed
    settings       T 0.8 with top-k 40 (SMolLM, arXiv 2605.06322) and T 1.0 without top-k, both at the model's own loop
                   count; the first setting also at other loop counts
    loss           nats per token of test molecules, at every loop count

    samples/SETTING-loopsR.jsonl  a line per sample: smiles, finished (it wrote `<eos>`); resumed batch by batch
    molecules.jsonl               a line per setting and loop count, see `measure`
    evaluation.json               samples, num_loops (the model's own), parameters, and what the KV cache saves; for a
                                  halting rule that is saved with the model `halting`, see `exits.sample_row`

valid        finished, and rdkit reads it as at least one atom
uniqueness   distinct canonical SMILES over valid samples
novelty      distinct canonical SMILES that no training row has, over all distinct ones. In MOSES 2 of 10,000 rows are
             not canonical, and as many may wrongly be called new; build other data with `canonical: true`
diversity    1 - mean Tanimoto similarity of pairs of distinct molecules (Morgan, radius 2, 1,024 bits)
fcd          Frechet ChemNet distance to 10,000 test molecules (Preuer et al. 2018, arXiv 1803.09518), with the network
             of the package fcd_torch; None if it is not installed

Shares, and uniqueness, have Wilson's interval; diversity has the interval of a U-statistic. The model is the published
one, RUN/model.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm.auto import tqdm
from transformers import LogitsProcessorList

from data_builders import PackedMolecules
from data_builders.molecules import rdkit_chem
from looplab.instruments.halting_settings import saved_setting
from looplab.runs.folder import Run, to_json_lines
from looplab.runs.models import count_parameters, load_run_model

from .chemnet import reference_statistics
from .data import MoleculeData
from .exits import sample_row
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
        limit: samples of each setting at the model's own loop count, 10,000 unless given; at most 2,000 at others.
        masked: number of samples at the model's own loop count with `masking.ValidPrefix`, as a setting of its own;
            none unless given.
        sizes: see `Sizes`.

    Raises:
        ValueError: the run has not finished, its molecules have changed, rdkit is missing, or the model may not run so
            many loops.
    """
    rdkit_chem()
    sizes = sizes or Sizes()
    run.summary()  # raises if the training has not finished
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
    losses = loss_of_molecules(model, test, counts, LOSS_MOLECULES)
    reference = reference_statistics(splits["test"], sizes.reference)
    rows = []
    with tqdm(total=sum(number for _, _, number, _ in work), desc="sampling", unit="molecule", mininterval=1) as bar:
        for sampling, loop, number, processor in work:
            path = written / f"{sampling.name}-loops{loop}.jsonl"
            samples = sample_file(path, model, tokenizer, number, sampling, loop, seed, bar, sizes, processor)
            # The distance needs more molecules than other loop counts have, since its Gaussian has 512 dimensions.
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
    if setting := saved_setting(model, counts[-1]):
        facts["halting"] = sample_row(model, tokenizer, setting, min(count, LOOP_SAMPLES), None, sizes)
    return run.write({EVALUATION.name: json.dumps(facts, indent=1) + "\n", MOLECULES.name: to_json_lines(rows)})
