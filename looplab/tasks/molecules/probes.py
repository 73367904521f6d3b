"""`looped lens` on molecules: how much of a molecule's grammar a linear probe reads from the state after each loop.

    target           counted at every token, `<bos>` included
    bracket_depth    open branches
    open_rings       open ring bonds

    control
    majority         always the commonest value
    shuffled         the probe, fitted on labels in random order: what chance and imbalance give
    embedding        the probe on the embedding of the token: what the last token gives away
    random_init      the probe on the same layer call of a model with random weights: what any network keeps

A high accuracy means little if a control has it, too: `over_controls` is the accuracy minus the best control. The
probes (instruments/linear_probe.py) read standardised states. They are fitted on 80 % of the molecules of the split
test and measured on the others (SMolLM, arXiv 2605.06322, which has no controls). RUN/probes.jsonl has a line per
loop, layer and target. Started again, the command fits the missing probes only.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplab.instruments.linear_probe import probe_accuracy, random_twin
from looplab.instruments.recorder import record
from looplab.runs.folder import Run, rows_on_file, to_json_lines
from looplab.runs.models import load_run_model, weights_digest

from .held_out import run_molecules
from .records import PROBES
from .smiles import RING

ROWS = 100  # molecules in a forward pass


def grammar(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """(open branches, open ring bonds) before the first token and after each token: T + 1 pairs."""
    depth, rings, seen = 0, set(), [(0, 0)]
    for token in tokens:
        depth += {"(": 1, ")": -1}.get(token, 0)
        if RING.fullmatch(token):
            rings ^= {int(token.strip("%()"))}
        seen.append((depth, len(rings)))
    return seen


def states_by_call(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], pad: int, num_loops: int
) -> dict[tuple[str, int, int], torch.Tensor]:
    """Layer call, or ("embedding", 0, 0) -> states (tokens of all rows, D).

    Padding is on the right, where no token attends to it.
    """
    parts = {}
    for start in range(0, len(rows), ROWS):
        chosen = rows[start : start + ROWS]
        longest = max(map(len, chosen))
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in chosen])
        real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in chosen]).bool()
        with torch.no_grad():
            found = {("embedding", 0, 0): model.get_input_embeddings()(ids.to(model.device))}
        found |= {tuple(call): state for call, state in record(model, ids, num_loops).states.items()}
        for call, state in found.items():
            parts.setdefault(call, []).append(state.float().cpu()[real])
    return {call: torch.cat(states) for call, states in parts.items()}


def probe_grammar(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    smiles: Sequence[str],
    num_loops: int,
    seed: int = 0,
    done: Sequence[dict] = (),
    keep: Callable[[list[dict]], object] = lambda rows: None,
) -> list[dict]:
    """The lines of probes.jsonl, see the module docstring.

    Args:
        done: lines that are there already.
        keep: is called with all lines so far after every probe.

    Raises:
        ValueError: there are fewer than ten molecules.
    """
    if len(smiles) < 10:
        raise ValueError(f"probes need at least ten molecules, got {len(smiles)}.")
    rows = [tokenizer(text)["input_ids"] for text in smiles]
    pairs = [grammar(tokenizer.convert_ids_to_tokens(row[1:])) for row in rows]
    owner = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    train = owner < int(0.8 * len(rows))
    labels = torch.tensor([pair for each in pairs for pair in each])  # (N, 2)
    shuffle = torch.randperm(int(train.sum()), generator=torch.Generator().manual_seed(seed))
    states = states_by_call(model, rows, tokenizer.pad_token_id, num_loops)
    twins = states_by_call(random_twin(model, seed), rows, tokenizer.pad_token_id, num_loops)

    def accuracy(values: torch.Tensor, target: torch.Tensor, shuffled: bool = False) -> tuple[float, float]:
        known = target[train][shuffle] if shuffled else target[train]
        return probe_accuracy(values[train], known, values[~train], target[~train])

    table = list(done)
    known = {(row["target"], row["section"], row["loop"], row["layer"]) for row in table}
    for index, name in enumerate(("bracket_depth", "open_rings")):
        target = labels[:, index]
        embedding, majority = accuracy(states["embedding", 0, 0], target)
        calls = [call for call in states if call[0] != "embedding" and (name, *call) not in known]
        for call in tqdm(calls, desc=f"probes, {name}", unit="probe"):
            section, loop, layer = call
            controls = {
                "majority": majority,
                "shuffled": accuracy(states[call], target, shuffled=True)[0],
                "embedding": embedding,
                "random_init": accuracy(twins[call], target)[0],
            }
            found = accuracy(states[call], target)[0]
            table.append(
                {"target": name, "section": section, "loop": loop, "layer": layer, "accuracy": found}
                | controls
                | {"over_controls": found - max(controls.values()), "n": int((~train).sum()), "molecules": len(rows)}
            )
            keep(table)
    return table


def probe_run(run: Run, num_loops: int | None, limit: int) -> Path:
    """Write RUN/probes.jsonl, for `limit` test molecules, and print it; returns the path.

    Raises:
        ValueError: the run has not finished, or its molecules have changed.
    """
    model, tokenizer = load_run_model(run, num_loops)
    test = run_molecules(run)["test"]
    smiles = test.select(range(min(limit, len(test))))["text"][:]
    num_loops = num_loops or model.config.num_loops
    path = run.folder / PROBES.name
    facts = {"weights": weights_digest(run), "num_loops": num_loops, "molecules": len(smiles)}

    def keep(rows: list[dict]) -> None:
        run.write({path.name: to_json_lines(row | facts for row in rows)})

    rows = probe_grammar(model, tokenizer, smiles, num_loops, done=rows_on_file(path, facts), keep=keep)
    print(probes_text(rows))
    return path


def probes_text(rows: Sequence[dict]) -> str:
    """The accuracies in % as a table of text, with a line per target, loop and layer."""
    columns = ("accuracy", "majority", "shuffled", "embedding", "random_init", "over_controls")
    text = [f"{'target':<15}{'loop':>5}{'layer':>6}" + "".join(f"{name:>15}" for name in columns)]
    for row in rows:
        numbers = "".join(f"{100 * row[name]:15.1f}" for name in columns)
        text.append(f"{row['target']:<15}{row['loop'] + 1:>5}{row['layer'] + 1:>6}{numbers}")
    return "\n".join(text)
