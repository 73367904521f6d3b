"""Solvers of dx/dt = g(x) - x, by which a window of a frozen model is looped (arXiv 2605.23872).

    g      the layers of the window, one after the other: (B, T, D) -> (B, T, D)
    x0     the state before the window;  y0 = g(x0), the model's own output, which is given
    step   length of a substep, 1 / num_loops unless asked otherwise

Each takes (g, x0, y0, num_loops, step) and returns the endpoint, (B, T, D).
"""

from collections.abc import Callable

import torch


def euler(g: Callable, x0: torch.Tensor, y0: torch.Tensor, num_loops: int, step: float) -> torch.Tensor:
    """num_loops evaluations, y0 included."""
    x = torch.lerp(x0, y0, step)
    for _ in range(num_loops - 1):
        x = torch.lerp(x, g(x), step)
    return x


def naive(g: Callable, x0: torch.Tensor, y0: torch.Tensor, num_loops: int, step: float) -> torch.Tensor:
    """g applied num_loops times; num_loops evaluations."""
    x = y0
    for _ in range(num_loops - 1):
        x = g(x)
    return x


def midpoint(g: Callable, x0: torch.Tensor, y0: torch.Tensor, num_loops: int, step: float) -> torch.Tensor:
    """Explicit midpoint rule; 2 num_loops evaluations."""
    x = x0
    for loop in range(num_loops):
        middle = torch.lerp(x, g(x) if loop else y0, step / 2)
        x = x + step * (g(middle) - middle)
    return x


def heun(g: Callable, x0: torch.Tensor, y0: torch.Tensor, num_loops: int, step: float) -> torch.Tensor:
    """Explicit trapezoidal rule; 2 num_loops evaluations."""
    x = x0
    for loop in range(num_loops):
        slope = (g(x) if loop else y0) - x
        ahead = x + step * slope
        x = x + step / 2 * (slope + g(ahead) - ahead)
    return x


def rk4(g: Callable, x0: torch.Tensor, y0: torch.Tensor, num_loops: int, step: float) -> torch.Tensor:
    """Classical Runge-Kutta; 4 num_loops evaluations."""
    x = x0
    for loop in range(num_loops):
        first = (g(x) if loop else y0) - x
        ahead = x + step / 2 * first
        second = g(ahead) - ahead
        ahead = x + step / 2 * second
        third = g(ahead) - ahead
        ahead = x + step * third
        fourth = g(ahead) - ahead
        x = x + step / 6 * (first + 2 * second + 2 * third + fourth)
    return x


# method -> (solver, beta where the caller gives none)
METHODS = {
    "blend": (euler, 0.5),
    "euler": (euler, 0.0),
    "naive": (naive, 0.0),
    "midpoint": (midpoint, 0.0),
    "heun": (heun, 0.0),
    "rk4": (rk4, 0.0),
}
