"""Linear probes: what of a chain's path can be decoded from each state, readable by the model's own head or not.

    probe_path(model, train, test)      one multinomial logistic regression per (layer call, position, hop)

Two controls tell what a high accuracy means: always guessing the commonest entity of the probe's training chains, and
the same probe on the states of a model with random weights.
"""

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from looplab.instruments.linear_probe import probe_accuracy, random_twin
from looplab.instruments.recorder import LayerCall, layer_calls, record

from .lens import Chains


def unseen(train: Chains, test: Chains, hop: int) -> torch.Tensor:
    """The training chains (indices) whose first `hop` facts, as asked, are those of no test chain.

    The entity after `hop` hops depends on nothing else. A probe fitted on chains that share them could name it by the
    words alone, as that of a model with random weights then does.
    """
    known = {tuple(words) for words in test.input_ids[:, : hop + 1].tolist()}
    fresh = [tuple(words) not in known for words in train.input_ids[:, : hop + 1].tolist()]
    return torch.tensor(fresh).nonzero().squeeze(1)


def states_of(model: PreTrainedModel, chains: Chains, num_loops: int | None) -> dict[LayerCall, torch.Tensor]:
    """The states (N, T, D) of all chains after every layer call, on the CPU in fp32."""
    parts = [record(model, batch.input_ids, num_loops).states for batch in chains.split()]
    return {call: torch.cat([part[call].float().cpu() for part in parts]) for call in parts[0]}


def probe_path(
    model: PreTrainedModel,
    train: Chains,
    test: Chains,
    num_loops: int | None = None,
    *,
    penalty: float = 1e-3,
    seed: int = 0,
) -> list[dict]:
    """Probes for every entity of the path, fitted on `train` and tested on `test`, at every layer call.

    The entity after `hop` hops is probed from position `hop` on, where the words that determine it have been read. A
    row per layer call, position and hop: `accuracy`, `majority` and `random_init` are shares of the test chains; `n`
    and `n_train` count the chains, `n_train` without those that `unseen` leaves out.

    Raises:
        ValueError: the chains differ in their hops, or no training chain is left.
    """
    if train.hops != test.hops:
        raise ValueError(
            f"the probe's chains must have one hop count, got {train.hops} to train and {test.hops} to test."
        )
    twin = random_twin(model, seed)
    states = [states_of(who, chains, num_loops) for who in (model, twin) for chains in (train, test)]
    sites = [
        (call, position, hop)
        for call in layer_calls(model.config, num_loops)
        for hop in range(1, train.hops + 1)
        for position in range(hop, train.input_ids.shape[1])
    ]
    fresh = {hop: unseen(train, test, hop) for hop in range(1, train.hops + 1)}
    for hop, rows in fresh.items():
        if len(rows) == 0:
            raise ValueError(
                f"every training chain begins with the {hop} facts of a test chain: give fewer test chains or more "
                "training chains."
            )
    table = []
    for call, position, hop in tqdm(sites, desc=f"probes, {test.split_kind}", unit="probe"):
        rows = fresh[hop]
        labels, test_labels = train.path[rows, hop], test.path[:, hop]
        scores = [
            probe_accuracy(seen[call][rows, position], labels, held_out[call][:, position], test_labels, penalty)
            for seen, held_out in (states[:2], states[2:])
        ]
        (accuracy, majority), (random_init, _) = scores
        row = {"accuracy": accuracy, "majority": majority, "random_init": random_init}
        table.append(
            {**call._asdict(), "position": position, "hop": hop} | row | {"n": len(test_labels), "n_train": len(rows)}
        )
    return table
