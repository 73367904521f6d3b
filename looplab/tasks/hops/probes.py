"""Linear probes: which entities of a chain's path can be decoded from each state, also if the head cannot read them.

    probe_path(model, train, test)      one multinomial logistic regression per (layer call, position, hop)

Two controls show what an accuracy is worth: always guessing the commonest entity of the probe's training chains, and
the same probe on the states of a model with random weights.
"""

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from looplab.instruments.linear_probe import probe_accuracy, random_twin
from looplab.instruments.recorder import LayerCall, layer_calls, record

from .lens import Chains


def unseen(train: Chains, test: Chains, hop: int) -> torch.Tensor:
    """Numbers of the training chains that share their first `hop` facts with no test chain.

    The entity after `hop` hops depends on these facts only. A probe fitted on chains that share them could name the
    entity by the words alone, even in a model with random weights.
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
    """Fit probes for every entity of the path on `train`, at every layer call, and test them on `test`.

    The entity after `hop` hops is probed from position `hop` on, where the words that determine it have been read.
    There is a record per layer call, position and hop: `accuracy`, and the controls `majority` and `random_init`, are
    shares of the test chains; `n` test chains, and `n_train` training chains, those of `unseen`.

    Raises:
        ValueError: the chains differ in their hop counts, or no training chain is left.
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
