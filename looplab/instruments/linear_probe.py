"""Linear probes: what a linear map can read out of states."""

import copy

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


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
