"""`looped lens` on molecules: every loop is read by the model's own head, and by a head fitted for that loop.

The model's own head, which is also its embedding, was trained after the last loop only: if it reads little of an
earlier state, the head may be the reason, not the state. So for each loop count a new linear head without bias is
fitted on the input of the head (SMolLM, arXiv 2605.06322); nothing else of the model changes.

    fit       cross-entropy on 300,000 tokens of training molecules, by L-BFGS from zero on whitened features. The fit
              is convex; the paper's way (AdamW 1e-3, 5 epochs) stops far from the minimum here.
    loss      nats per token of test molecules
    samples   by `generate` with that head and that loop count, with the same seeds for both heads

RUN/readouts.jsonl has a line per loop count and head (own | fresh): loops, head, loss, loss_interval (over molecules),
and the fields of `measures.measure`; also fit_loss and fit_tokens, None for the own head. A line also says what it was
measured under (weights, molecules, setting). Started again, the command measures the missing loop counts only.
"""

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders import PackedMolecules
from data_builders.molecules import rdkit_chem
from looplab.instruments.at_loops import hidden_at_loops
from looplab.runs.folder import Run, rows_on_file, to_json_lines
from looplab.runs.models import load_run_model, weights_digest

from .data import MoleculeData
from .held_out import HeldOut, run_molecules
from .measures import measure
from .records import READOUTS
from .results import percent
from .samples import write_molecules
from .sizes import SAMPLINGS, Sizes

ITERATIONS = 60


@torch.no_grad()
def features_of(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], loops: Collection[int]
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """(loop count -> input of the head (M, D) at every token, next tokens (M,)), on the CPU, from one pass to the
    largest count.

    Args:
        batches: inputs of a call each, with `shift_labels`.
    """
    found, labels = [], []
    for batch in batches:
        rows = {name: value.to(model.device) for name, value in batch.items()}
        following = rows.pop("shift_labels")
        real = following >= 0

        def read(hidden_states: torch.Tensor, real: torch.Tensor = real) -> torch.Tensor:
            return hidden_states[real].float().cpu()

        found.append(hidden_at_loops(model, loops, read, **rows))
        labels.append(following[real].cpu())
    # The parts are let go count by count, so that all of it is in memory once.
    return {count: torch.cat([part.pop(count) for part in found]) for count in sorted(set(loops))}, torch.cat(labels)


@torch.inference_mode()
def nats_of(head: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (M,) of a head on its inputs (M, D), in nats."""
    parts = []
    for read, following in zip(features.split(10_000), labels.split(10_000), strict=True):
        logits = head(read.to(head.weight.device, head.weight.dtype))
        parts.append(F.cross_entropy(logits.float().cpu(), following, reduction="none"))
    return torch.cat(parts)


def fit_head(features: torch.Tensor, labels: torch.Tensor, size: int) -> tuple[torch.Tensor, float]:
    """(linear head (size, D) without bias, fitted to predict `labels` (M,) from `features` (M, D), its loss in nats).

    Directions in which features hardly vary would take thousands of iterations, so each direction is first scaled to
    mean square 1. Directions a million times weaker than the strongest are scaled less.
    """
    squares, directions = torch.linalg.eigh((features.T @ features / len(features)).double())
    whiten = (directions * squares.clamp_min(1e-6 * squares.max()).rsqrt()).float()
    whitened = features @ whiten
    weight = torch.zeros(size, features.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weight], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        value = F.cross_entropy(F.linear(whitened, weight), labels)
        value.backward()
        return value

    search.step(loss)
    return weight.detach() @ whiten.T, loss().item()


def with_head(model: PreTrainedModel, weight: torch.Tensor) -> PreTrainedModel:
    """A copy of the model with the head `weight` (V, D), which is no longer tied to the embedding."""
    twin = copy.deepcopy(model)
    twin.config.tie_word_embeddings = False
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight.clone())
    twin.lm_head = head.to(model.device, model.dtype)
    return twin.eval()


@dataclass(frozen=True)
class Readings:
    """Inputs of the head (M, D) after each loop count, and the next tokens (M,), see `features_of`.

    Args:
        fit: of training molecules, for the fit.
        test: of test molecules, for the loss.
    """

    fit: tuple[dict[int, torch.Tensor], torch.Tensor]
    test: tuple[dict[int, torch.Tensor], torch.Tensor]


def readout_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    molecules: HeldOut,
    readings: Readings,
    train,
    num_loops: int,
    samples: int,
    max_tokens: int,
) -> list[dict]:
    """The two lines of one loop count: own head, fresh head.

    Args:
        molecules: test molecules, for the interval of the loss.
        train: the training split, for novelty.
        samples: number of samples.
        max_tokens: most tokens of a sample.
    """
    everything = torch.ones_like(molecules.labels, dtype=torch.bool)
    features, labels = readings.fit
    weight, fit_loss = fit_head(features[num_loops], labels, model.config.vocab_size)
    read, following = readings.test
    rows = []
    for head, one in (("own", model), ("fresh", with_head(model, weight))):
        loss, interval = molecules.mean_of(nats_of(one.lm_head, read[num_loops], following), everything)
        written = write_molecules(one, tokenizer, samples, SAMPLINGS[0], num_loops, 0, max_tokens)
        row = {"loops": num_loops, "head": head, "loss": loss, "loss_interval": interval} | measure(written, train)
        fitted = head == "fresh"
        rows.append(row | {"fit_loss": fit_loss if fitted else None, "fit_tokens": len(labels) if fitted else None})
    return rows


def read_run(run: Run, num_loops: int | None, limit: int, sizes: Sizes) -> Path:
    """Write RUN/readouts.jsonl, for `limit` test molecules and twice as many samples, and print it; returns the path.

    Raises:
        ValueError: the run has not finished, its molecules have changed, or rdkit is missing.
    """
    rdkit_chem()
    model, tokenizer = load_run_model(run, num_loops)
    model.eval()
    splits = run_molecules(run)
    test = splits["test"].select(range(min(limit, len(splits["test"]))))["text"][:]
    path = run.folder / READOUTS.name
    facts = {"weights": weights_digest(run), "molecules": len(test), "setting": SAMPLINGS[0].name, "limit": limit}
    rows = rows_on_file(path, facts)
    done = {row["loops"] for row in rows}
    missing = [count for count in range(1, (num_loops or model.config.num_loops) + 1) if count not in done]
    if missing:
        molecules, fit = HeldOut(tokenizer, test), fit_molecules(run, splits["train"], tokenizer, sizes.fit_tokens)
        readings = Readings(
            features_of(model, map(fit.rows, torch.arange(len(fit)).split(256)), missing),
            features_of(model, molecules.inputs(), missing),
        )
    for count in tqdm(missing, desc="a head for each loop", unit="loop"):
        rows += readout_rows(
            model, tokenizer, molecules, readings, splits["train"], count, 2 * limit, sizes.max_tokens
        )
        run.write({path.name: to_json_lines(row | facts for row in rows)})
    print(readouts_text(rows))
    return path


def fit_molecules(run: Run, train, tokenizer: PreTrainedTokenizerBase, fit_tokens: int) -> PackedMolecules:
    """Training molecules with about `fit_tokens` tokens together, drawn by a fixed seed; all if there are fewer."""
    numbers = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    length = MoleculeData.of(run).sequence_length
    mean = PackedMolecules(train.select(numbers[:1000]), tokenizer, length).mean_length
    return PackedMolecules(train.select(numbers[: int(fit_tokens / mean)]), tokenizer, length)


def readouts_text(rows: Sequence[dict]) -> str:
    """Loss and validity with the own head and with the fresh head as text, with a line per loop count."""
    by_head = {(row["loops"], row["head"]): row for row in rows}
    counts = sorted({row["loops"] for row in rows})
    n = rows[0]["n"]
    text = [
        f"\nEach loop read by the model's own head and by a head fitted for it; {n} samples, 95 % intervals.",
        f"{'loops':>6}{'own loss':>12}{'fresh':>9}{'own valid %':>22}{'fresh':>22}",
    ]
    for count in counts:
        own, fresh = by_head[count, "own"], by_head[count, "fresh"]
        text.append(
            f"{count:>6}{own['loss']:12.4f}{fresh['loss']:9.4f}"
            f"{percent(own['validity']):>22}{percent(fresh['validity']):>22}"
        )
    return "\n".join(text)
