"""Laws of the depth sampler: the distribution asked for is the one drawn, as a pure function of seed and step."""

import math
from collections import Counter

import numpy as np
import pytest

from data_builders import DepthSampler

PAPER_DEPTH = {"kind": "poisson", "rate": 4, "minimum": 2, "maximum": 8}


def test_the_paper_sampler_has_the_paper_mean_and_tails():
    """(4; 2, 8): mean 4.08, P(2) = 24 %, P(8) = 5 %. A peer's sampler had mean + 1."""
    sampler = DepthSampler(**PAPER_DEPTH)
    assert sampler.expected == pytest.approx(4.0763, abs=1e-4)
    poisson = [math.exp(-4) * 4**count / math.factorial(count) for count in range(8)]
    assert sampler.probabilities == pytest.approx([sum(poisson[:3]), *poisson[3:8], 1 - sum(poisson[:8])])
    drawn = Counter(sampler(step) for step in range(20_000))
    assert sum(depth * count for depth, count in drawn.items()) / 20_000 == pytest.approx(4.0763, abs=0.05)
    assert drawn[2] / 20_000 == pytest.approx(0.238, abs=0.012)
    assert drawn[8] / 20_000 == pytest.approx(0.051, abs=0.006)
    assert set(drawn) == set(range(2, 9))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "poisson", "mean": 4, "minimum": 2, "maximum": 8},
        {"kind": "poisson", "mean": 2.2, "minimum": 2, "maximum": 8},
        {"kind": "poisson", "mean": 7.9, "minimum": 1, "maximum": 8},
        {"kind": "lognormal_poisson", "mean": 8, "sigma": 0.5, "minimum": 1, "maximum": 32},
        {"kind": "lognormal_poisson", "mean": 3, "sigma": 1.0, "minimum": 1, "maximum": 16},
        {"kind": "uniform", "minimum": 2, "maximum": 5},
        {"kind": "fixed", "mean": 6},
    ],
)
def test_the_mean_asked_for_is_the_mean_drawn(fields):
    sampler = DepthSampler(**fields, seed=3)
    mean = fields.get("mean", 3.5)
    assert sampler.expected == pytest.approx(mean, abs=1e-9)
    assert sampler.probabilities.sum() == pytest.approx(1)
    drawn = np.array([sampler(step) for step in range(20_000)])
    sd = np.sqrt(sampler.probabilities @ (sampler.depths - mean) ** 2)
    assert abs(drawn.mean() - mean) <= 5 * sd / 20_000**0.5


def test_lognormal_poisson_is_the_two_step_draw():
    """The quadrature against its slow twin: draw the rate, then the count, then clip."""
    rng = np.random.default_rng(0)
    rates = 8 * np.exp(0.5 * rng.standard_normal(400_000) - 0.125)
    drawn = rng.poisson(rates).clip(2, 20)
    sampler = DepthSampler("lognormal_poisson", rate=8, sigma=0.5, minimum=2, maximum=20)
    share = np.bincount(drawn, minlength=21)[2:] / len(drawn)
    assert np.abs(share - sampler.probabilities).max() < 0.004
    assert sampler.expected == pytest.approx(drawn.mean(), abs=0.05)


def test_depth_is_a_pure_function_of_seed_and_step():
    """Asked in any order, by any process: the same. Ranks therefore agree, and resuming replays."""
    forward, backward = DepthSampler(**PAPER_DEPTH, seed=5), DepthSampler(**PAPER_DEPTH, seed=5)
    steps = [0, 1, 4095, 4096, 10_000, 3]
    assert [forward(step) for step in steps] == [backward(step) for step in reversed(steps)][::-1]
    assert [forward(step) for step in range(4_096)] != [forward(step) for step in range(4_096, 8_192)]
    other = DepthSampler(**PAPER_DEPTH, seed=6)
    assert [forward(step) for step in range(50)] != [other(step) for step in range(50)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "gauss"}, "kind must be one of fixed, uniform"),
        ({"kind": "fixed", "mean": 4, "maximum": 8}, "depth fixed takes mean; maximum is 8"),
        ({"kind": "fixed", "mean": 2.5}, "whole numbers"),
        ({"kind": "fixed", "mean": 0}, "1 <= minimum"),
        ({"kind": "uniform", "minimum": 2}, "maximum is None"),
        ({"kind": "poisson", "rate": 4, "mean": 4, "minimum": 2, "maximum": 8}, "rate is 4"),
        ({"kind": "poisson", "rate": -1, "minimum": 2, "maximum": 8}, "rate must be > 0"),
        ({"kind": "poisson", "mean": 2, "minimum": 2, "maximum": 8}, "mean 2 must lie between"),
        ({"kind": "poisson", "rate": 4, "minimum": 8, "maximum": 2}, "minimum <= maximum"),
        ({"kind": "lognormal_poisson", "rate": 4, "minimum": 2, "maximum": 8}, "sigma is None"),
        ({"kind": "lognormal_poisson", "rate": 4, "sigma": 0, "minimum": 2, "maximum": 8}, "sigma must be > 0"),
    ],
)
def test_a_bad_depth_raises(fields, message):
    with pytest.raises(ValueError, match=message):
        DepthSampler(**fields)
