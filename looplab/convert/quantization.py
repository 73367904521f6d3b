"""`looped quantize RUN`: weights of few bits for a looped model, calibrated over all of its loops.

    for layer in prelude, core, coda:                      in order; earlier layers are quantised already
        X = inputs of its linears on calibration text      a core linear runs num_loops times per token: X has them all
        H = 2 X^T X                                        (I, I)
        for group of columns of W (O, I):
            scale, zero = grid of the group's weights      asymmetric min-max, for each output
            for column in group:
                q       = round to the grid
                W later -= (w - q) / U_cc U_c,later        U^T U = (H + damping)^-1: later columns repair the error

Sources: GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1); Hyperloop (arXiv 2604.21254), which sums H of a shared
layer over all loops. As in GPTQ the layers follow each other, so that a layer is calibrated on the inputs that it will
get. For core layers this is not exact: from the second loop on, the inputs also come through core layers that are not
quantised yet. `nearest` is the naive twin, with the same groups and without repair.

Only the nn.Linear inside the layers are quantised; embeddings, head, norms, biases and the loop connection are not.
Weights are stored dequantised, so that the folder loads as any other. The bytes that are reported are those of packed
weights. Legend: b batch rows, T tokens, I inputs and O outputs of a linear.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from looplab.runs.digests import weights_of
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model, loops_to_try
from looplab.runs.records import owned, replaced_folder
from looplab.runs.writing import below
from looplab.tasks.quantizing import QUANTIZATION, Quantizing
from looplab.tasks.registry import task_for

DAMPING = 0.01  # this share of the mean diagonal of H is added to the diagonal (GPTQ, section 3.3, step 3)
CALIBRATION_ROWS = 128
Method = Literal["gptq", "nearest"]


@dataclass(frozen=True)
class Grid:
    """Values that the weights of one group may take, for each output: scale * (code - zero), code in 0 .. 2^bits - 1.

    `scale` (O, 1) is a float16 number and `zero` (O, 1) a code, as in a packed file; both are held in float32.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    largest_code: int

    @classmethod
    def of(cls, weight: torch.Tensor, bits: int) -> "Grid":
        """The smallest grid over the weights (O, group) and 0. Its scale is rounded up to float16, so that no weight
        is clipped."""
        low = weight.amin(1, keepdim=True).clamp_max(0)
        high = weight.amax(1, keepdim=True).clamp_min(0)
        largest_code = 2**bits - 1
        scale = (high - low) / largest_code
        # Adding half a unit in the last place, of a normal or a subnormal number, turns rounding to nearest into up.
        scale = (scale * (1 + 2**-11) + 2**-25).half().float().clamp_min(2**-24)
        return cls(scale, (-low / scale).round().clamp(0, largest_code), largest_code)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest values of the grid, (O, n), for weights (O, n)."""
        code = ((weight / self.scale).round() + self.zero).clamp(0, self.largest_code)
        return self.scale * (code - self.zero)


@torch.no_grad()
def nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Every weight rounded to its group's grid: (O, I) -> (O, I) float32. The last group may be smaller."""
    parts = weight.float().split(group, dim=1)
    return torch.cat([Grid.of(part, bits).round(part) for part in parts], dim=1)


@torch.no_grad()
def gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """As `nearest`, except that later columns make up for the rounding of earlier columns, and that a group gets its
    grid when it is reached (GPTQ, arXiv 2210.17323, algorithm 1, with a group as its block).

    Args:
        weight: (O, I).
        hessian: (I, I), any multiple of X^T X; if it is diagonal, the result equals `nearest`.

    Returns:
        (O, I) float32.
    """
    weight, quantized = weight.float().clone(), torch.empty_like(weight, dtype=torch.float32)
    factor = inverse_factor(hessian)
    columns = weight.shape[1]
    for start in range(0, columns, group):
        stop = min(start + group, columns)
        grid = Grid.of(weight[:, start:stop], bits)
        errors = weight.new_empty(len(weight), stop - start)
        for column in range(start, stop):
            rounded = grid.round(weight[:, column, None])  # (O, 1)
            error = (weight[:, column, None] - rounded) / factor[column, column]
            weight[:, column + 1 : stop] -= error * factor[column, column + 1 : stop]
            quantized[:, column], errors[:, column - start] = rounded[:, 0], error[:, 0]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return quantized


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper triangular U (I, I) with U^T U = (H + damping)^-1, in float32, from H (I, I).

    For an input that was always 0, H gets a 1 on the diagonal, so that its weights are rounded to nearest. (The
    published code sets them to 0, but such an input may be other than 0 later.)
    """
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    damping, dead = DAMPING * diagonal.mean(), diagonal == 0
    diagonal += damping
    diagonal[dead] = 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


@torch.no_grad()
def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """|X (W - Q)^T| / |X W^T| in Frobenius norms, over the X that made `hessian`; 0 if W equals Q."""

    def square(matrix: torch.Tensor) -> float:
        return float(((matrix @ hessian) * matrix).sum().clamp_min(0))

    error = square(weight.float() - quantized.float())
    return (error / square(weight.float())) ** 0.5 if error else 0.0


@dataclass
class Inputs:
    """The inputs X (samples, I) of a linear, summed up as `hessian` = 2 X^T X (I, I) in float32."""

    hessian: torch.Tensor
    samples: int = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs (..., I)."""
        samples = inputs.flatten(0, -2).float()
        self.hessian += 2 * samples.T @ samples
        self.samples += len(samples)


def quantized_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name, such as core.0 -> layer, in the order of the forward pass."""
    inner = model.model
    sections = {"prelude": inner.prelude, "core": inner.core, "coda": inner.coda}
    return {f"{name}.{index}": layer for name, layers in sections.items() for index, layer in enumerate(layers)}


def linears_of(name: str, layer: nn.Module) -> dict[str, nn.Linear]:
    """Name, such as core.0.mlp.up_proj -> linear, for the linears inside a layer."""
    return {f"{name}.{inner}": module for inner, module in layer.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def collect_inputs(
    model: PreTrainedModel, linears: dict[str, nn.Linear], batches: Sequence[torch.Tensor], num_loops: int
) -> dict[str, Inputs]:
    """The inputs that `linears` get while the model runs once over the calibration text.

    Args:
        linears: by names that begin with their section.
        batches: ids (b, T) each, without padding.

    Raises:
        ValueError: a linear did not get every token once per loop (once outside the core), or got inf or NaN.
    """
    inputs, hooks = {}, []
    try:
        for name, linear in linears.items():
            size = linear.in_features
            inputs[name] = Inputs(torch.zeros(size, size, device=linear.weight.device))
            # A core linear gets the same tokens again in each loop, and each call counts: H sums over the loops.
            hooks.append(linear.register_forward_pre_hook(lambda _, given, seen=inputs[name]: seen.add(given[0])))
        for ids in batches:
            model.model(input_ids=ids.to(model.device), num_loops=num_loops, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    check_inputs(inputs, sum(ids.numel() for ids in batches), num_loops)
    return inputs


def check_inputs(inputs: dict[str, Inputs], num_tokens: int, num_loops: int) -> None:
    """Raise ValueError, as `collect_inputs` says, for a Hessian that lacks a loop or is not finite."""
    for name, seen in inputs.items():
        expected = num_tokens * num_loops if name.startswith("core.") else num_tokens
        if seen.samples != expected:
            raise ValueError(
                f"{name} has {seen.samples} calibration samples and must have {expected} ({num_tokens} tokens, "
                f"{num_loops} loops of the core): a linear that does not run exactly once per layer call cannot be "
                "calibrated; take it out of the layer."
            )
        if not seen.hessian.isfinite().all():
            raise ValueError(
                f"the inputs of {name} at loops={num_loops} are not finite or too large: calibrate at fewer loops."
            )


def check_settings(bits: int, group: int, method: str) -> None:
    """Raise ValueError for bits, group or method out of range."""
    if type(bits) is not int or not 2 <= bits <= 16:
        raise ValueError(f"bits must be an integer from 2 to 16, got {bits!r}: 4 is usual.")
    if type(group) is not int or group < 1:
        raise ValueError(f"group must be an integer >= 1, got {group!r}: 128 weights to a scale is usual.")
    if method not in ("gptq", "nearest"):
        raise ValueError(f"method must be gptq or nearest, got {method!r}: gptq is the better one.")


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    num_loops: int,
    *,
    bits: int = 4,
    group: int = 128,
    method: Method = "gptq",
) -> dict[str, dict]:
    """Quantise the linears of prelude, core and coda in place, layer by layer; the weights keep their dtype.

    Args:
        model: a looped causal LM in evaluation mode.
        batches: calibration ids, (b, T) each, without padding.
        num_loops: loop count of the calibration.
        group: number of neighbouring inputs that share a scale; the last group is smaller if it does not divide.

    Returns:
        Name of each linear -> samples, relative_error (its `output_error` when it was quantised) and
        nearest_relative_error (the same for `nearest`).

    Raises:
        ValueError: bits, group or method are out of range, or as `collect_inputs`; earlier layers stay quantised.
    """
    check_settings(bits, group, method)
    rows = {}
    for layer_name, layer in tqdm(quantized_layers(model).items(), desc="quantizing", unit="layer"):
        linears = linears_of(layer_name, layer)
        for name, inputs in collect_inputs(model, linears, batches, num_loops).items():
            weight, hessian = linears[name].weight, inputs.hessian
            rounded = nearest(weight, bits, group).to(weight.dtype)
            chosen = gptq(weight, hessian, bits, group).to(weight.dtype) if method == "gptq" else rounded
            rows[name] = {
                "samples": inputs.samples,
                "relative_error": output_error(weight, chosen, hessian),
                "nearest_relative_error": output_error(weight, rounded, hessian),
            }
            weight.copy_(chosen)
    return rows


def packed_bytes(linear: nn.Linear, bits: int, group: int) -> int:
    """Bytes of a packed linear: `bits` per weight, and per group a float16 scale and a zero point of `bits`."""
    groups = linear.out_features * -(-linear.in_features // group)
    return -(-(linear.weight.numel() * bits + groups * (16 + bits)) // 8)


def count_bytes(model: PreTrainedModel, bits: int, group: int) -> dict[str, int]:
    """Bytes of the quantised linears, and of the whole model, before packing and after."""
    linears = [
        linear for name, layer in quantized_layers(model).items() for linear in linears_of(name, layer).values()
    ]
    before = sum(linear.weight.nbytes for linear in linears)
    after = sum(packed_bytes(linear, bits, group) for linear in linears)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "linears_before": before,
        "linears_after": after,
        "model_before": whole,
        "model_after": whole - before + after,
    }


def calibration_rows_of(data: Quantizing, count: int, seed: int) -> torch.Tensor:
    """`count` different row numbers (count,), drawn by `seed`.

    Raises:
        ValueError: there are fewer rows.
    """
    if not 1 <= count <= len(data):
        raise ValueError(
            f"calibration_rows must be from 1 to {len(data)}, {data.rows}, got {count}: give fewer, or more data."
        )
    return torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]


def counts_around(model: PreTrainedModel, num_loops: int) -> list[int]:
    """Loop counts to measure at: 1, 2, 4 .. up to twice `num_loops`, and itself, as far as the model may run them."""
    doubled = [2**power for power in range((2 * num_loops).bit_length()) if 2**power <= 2 * num_loops]
    return loops_to_try(model, sorted({*doubled, num_loops}))


def quantize_run(
    run: Run,
    *,
    bits: int = 4,
    group: int = 128,
    method: Method = "gptq",
    calibration_rows: int | None = None,
    num_loops: int | None = None,
    seed: int = 0,
) -> Path:
    """Quantise the model of a run: write RUN/model_int<bits>/ and RUN/quantization.json, and return the latter.

    Losses are measured on the run's test split, at several loop counts; calibration rows come from its training split.
    After several quantisations, quantization.json describes the last and names its folder.

    Args:
        run: a finished one, of a task with `quantizing`.
        bits, group, method: see `quantize_model`.
        calibration_rows: number of calibration rows: blocks of text, questions or molecules; 128 unless given, or all.
        num_loops: loop count of calibration and of the main measure; the model's own unless given.
        seed: of the choice of calibration rows.

    Raises:
        ValueError: the run has not finished, its task has no `quantizing`, or a setting is out of range.
    """
    check_settings(bits, group, method)
    task = task_for("quantize", [run])
    target = below(run.folder, f"model_int{bits}")
    model, tokenizer = load_run_model(run, num_loops)
    num_loops = model.config.num_loops if num_loops is None else num_loops
    data = task.quantizing(run, tokenizer)
    calibration_rows = min(CALIBRATION_ROWS, len(data)) if calibration_rows is None else calibration_rows
    batches = data.calibration(calibration_rows_of(data, calibration_rows, seed))

    def measured() -> tuple[dict, dict]:
        losses = data.losses(model, counts)
        return data.measure(model, num_loops, losses[num_loops]), losses

    counts = counts_around(model, num_loops)
    found = {"before": measured()}
    settings = {"bits": bits, "group": group, "method": method}
    linears = quantize_model(model, batches, num_loops, **settings)
    found["after"] = measured()
    with replaced_folder(target, lambda path: owned(f"{target.name}/{path.name}")) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    report = {
        "model": target.name,
        **settings,
        "damping": DAMPING,
        "loops": num_loops,
        "seed": seed,
        "calibration_rows": calibration_rows,
        "calibration_tokens": sum(ids.numel() for ids in batches),
        "test_tokens": data.test_tokens,
        "unit": data.unit,
        "losses": [
            {"loops": count} | {when: losses[count].mean().item() for when, (_, losses) in found.items()}
            for count in counts
        ],
        "bytes": count_bytes(model, bits, group),
        "linears": linears,
        **{name: {when: measures[name] for when, (measures, _) in found.items()} for name in found["before"][0]},
    }
    weights = {"model": run.weights, target.name: weights_of(target)}
    return run.write({QUANTIZATION.name: json.dumps(report, indent=1) + "\n"}, weights)


MEASURES = {"perplexity": (1, 3, ""), "accuracy": (100, 1, " %"), "loss": (1, 4, " nats")}  # times, digits, unit


def quantization_text(report: dict) -> str:
    """RUN/quantization.json as text, with a line per loop count."""
    size, linears = report["bytes"], report["linears"]
    worst = max(linears, key=lambda name: linears[name]["relative_error"])
    name, (times, digits, unit) = next((name, shown) for name, shown in MEASURES.items() if name in report)
    before, after = (f"{times * report[name][when]:.{digits}f}{unit}" for when in ("before", "after"))
    lines = [
        f"{report['method']}, {report['bits']} bits, groups of {report['group']}, over {report['loops']} loops and "
        f"{report['calibration_tokens']:,} training tokens",
        f"{name} {before} -> {after} on {report['test_tokens']:,} test tokens",
    ]
    if "losses" in report:  # reports of older versions have none
        lines.append(f"{'loops':>7}{'nats per ' + report['unit']:>18}{'quantized':>12}")
        lines += [f"{row['loops']:>7}{row['before']:>18.4f}{row['after']:>12.4f}" for row in report["losses"]]
    lines += [
        f"weights of the layers {size['linears_before']:,} -> {size['linears_after']:,} bytes, packed",
        f"largest relative error of an output: {linears[worst]['relative_error']:.3f}, {worst}",
    ]
    return "\n".join(lines)
