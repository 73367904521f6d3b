"""Linear probes: what of a chain's path can be decoded from each state, readable by the model's own head or not.

    probe_path(model, train, test)      one multinomial logistic regression per (layer call, position, hop)

Two controls tell what a high accuracy means: always guessing the commonest entity of the probe's training chains, and
the same probe on the states of a model with random weights.
"""

import copy

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .lens import Chains
from .recorder import LayerCall, layer_calls, record


def fit_probe(features: torch.Tensor, labels: torch.Tensor, num_classes: int, penalty: float = 1e-3) -> torch.Tensor:
    """Multinomial logistic regression of `labels` (N,) on `features` (N, D), by L-BFGS from zero; W (D + 1, classes).

    Minimises mean cross-entropy + penalty / 2 x the squares of all weights but the last row, the bias. Features are
    best standardised.
    """
    weights = torch.zeros(features.shape[1] + 1, num_classes, requires_grad=True)
    inputs = with_bias(features)
    search = torch.optim.LBFGS([weights], max_iter=100, tolerance_grad=1e-4, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        value = cross_entropy(inputs @ weights, labels) + penalty / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    search.step(loss)
    return weights.detach()


def with_bias(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features, torch.ones(len(features), 1)], dim=1)


def probe_accuracy(features, labels, test_features, test_labels, penalty: float = 1e-3) -> tuple[float, float]:
    """Accuracy on the test rows of a probe, and of guessing the commonest label, both fitted on the other rows.

    Features are standardised by the mean and spread of the training rows. Labels (N,) are any token ids.
    """
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    classes, labels = labels.unique(return_inverse=True)
    weights = fit_probe((features - mean) / spread, labels, len(classes), penalty)
    predicted = classes[(with_bias((test_features - mean) / spread) @ weights).argmax(-1)]
    majority = classes[labels.bincount().argmax()]
    return (predicted == test_labels).float().mean().item(), (majority == test_labels).float().mean().item()


def unseen(train: Chains, test: Chains, hop: int) -> torch.Tensor:
    """The training chains (indices) whose first `hop` facts, as asked, are those of no test chain.

    The entity after `hop` hops depends on nothing else. A probe fitted on chains that share them could name it by the
    words alone, as that of a model with random weights then does.
    """
    known = {tuple(words) for words in test.input_ids[:, : hop + 1].tolist()}
    fresh = [tuple(words) not in known for words in train.input_ids[:, : hop + 1].tolist()]
    return torch.tensor(fresh).nonzero().squeeze(1)


def random_twin(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A model of the same configuration with random weights.

    Its layers start with N(0, initializer_range^2) projections also where the trained model's started as the identity,
    since no state would otherwise know any word but its own.
    """
    config = copy.deepcopy(model.config)
    config.residual_init = "normal"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(model)(config).to(model.device).eval()


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
