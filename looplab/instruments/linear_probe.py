"""Linear probes: how well a linear map predicts labels from states."""

import copy

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


def fit_probe(features: torch.Tensor, labels: torch.Tensor, num_classes: int, penalty: float = 1e-3) -> torch.Tensor:
    """Weights (D + 1, num_classes) of a multinomial logistic regression; the last row is the bias.

    L-BFGS, from zero, minimises the mean cross-entropy in nats plus penalty / 2 times the sum of the squared weights
    without the bias.

    Args:
        features: (N, D), best standardised.
        labels: (N,) class numbers.
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
    """(N, D) -> (N, D + 1), the last column 1."""
    return torch.cat([features, torch.ones(len(features), 1)], dim=1)


def probe_accuracy(features, labels, test_features, test_labels, penalty: float = 1e-3) -> tuple[float, float]:
    """(accuracy of a probe, accuracy of always guessing the commonest label), both fitted on the training rows.

    Args:
        features, test_features: (N, D) and (M, D), standardised here by mean and deviation of the training rows.
        labels, test_labels: (N,) and (M,) token ids.
    """
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    classes, labels = labels.unique(return_inverse=True)
    weights = fit_probe((features - mean) / spread, labels, len(classes), penalty)
    predicted = classes[(with_bias((test_features - mean) / spread) @ weights).argmax(-1)]
    majority = classes[labels.bincount().argmax()]
    return (predicted == test_labels).float().mean().item(), (majority == test_labels).float().mean().item()


def random_twin(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A model of the same configuration with random weights, to compare a probe of the trained one with.

    Its layers are drawn from N(0, initializer_range^2), even if those of the trained model started as the identity:
    under identity layers a state would hold nothing but its own token.
    """
    config = copy.deepcopy(model.config)
    config.residual_init = "normal"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(model)(config).to(model.device).eval()
