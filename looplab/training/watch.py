"""What a run tells about its own work in every row of metrics.jsonl, and when it stops by itself.

    tokens_per_second    input tokens of all ranks, since the row before; checks and checkpoints are included
    updates_per_second   the same of updates
    data_seconds         that the main process waited for its batches, since the row before
    memory_bytes         of the main process: the most that it had on its accelerator; on a CPU what it has now
    of_peak              share of the accelerators' peak in the recipe's precision (`training_flops` of the updates
                         since the row before), where the peak is known

A run stops at a loss that is not finite, and at a spike: a loss `recipe.spike` nats above the mean of the losses
before it, at most `WINDOW` of them, and no less than twice that mean: where embeddings of variance 1 are the head,
too, a training begins at hundreds of nats. A run that goes on has the losses that metrics.jsonl holds.
"""

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from looplab.instruments.devices import peak_of
from looplab.instruments.flops import training_flops
from looplab.runs.folder import rows_so_far
from looplab.tasks.training import State, TaskTraining
from modeling_looped import LoopedConfig

from .recipe import Recipe
from .run_folder import RunFolder

# What differs between two runs of the same numbers: it is of the machine and of the hour.
OF_THE_HOUR = (
    "seconds", "tokens_per_second", "updates_per_second", "data_seconds", "memory_bytes", "of_peak",
)  # fmt: skip
WINDOW = 100  # losses that a spike is compared with the mean of
FEWEST = 10  # losses that say what is usual
NAMED = 8  # row numbers that a sentence has room for


class Watch:
    """Watches a run that begins or goes on.

    Args:
        config: of the model in training.
        state: before the next update.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: LoopedConfig,
        task: TaskTraining,
        accelerator: Accelerator,
        run: RunFolder,
        state: State,
    ):
        self.recipe, self.config, self.task, self.accelerator, self.run = recipe, config, task, accelerator, run
        self.before = state.step, state.tokens, state.seconds
        self.waited, self.flops, self.peak = 0.0, 0, peak_of(accelerator.device, recipe.precision)
        # The same on every rank, so that all stop at one update.
        rows = rows_so_far(run.metrics) if accelerator.is_main_process else []
        known = [row["loss"] for row in rows if "loss" in row]
        self.losses = deque(broadcast_object_list([known])[0], maxlen=WINDOW)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def count(self, batch: dict) -> None:
        """Count the work of an update on this rank's batch."""
        if self.peak is not None:
            sizes = *batch["input_ids"].shape, batch["num_loops"]
            kept, grad_loops = self.task.logits_to_keep or None, self.recipe.num_grad_loops
            self.flops += training_flops(self.config, *sizes, logits_kept=kept, num_grad_loops=grad_loops)

    def row(self, state: State) -> dict:
        """The fields above, of the updates since the call before."""
        step, tokens, seconds = self.before
        self.before = state.step, state.tokens, state.seconds
        elapsed = max(state.seconds - seconds, 1e-9)
        row = {
            "tokens_per_second": (state.tokens - tokens) / elapsed,
            "updates_per_second": (state.step - step) / elapsed,
            "data_seconds": self.waited,
            "memory_bytes": memory_of(self.accelerator.device),
        }
        if self.peak is not None:
            row["of_peak"] = self.flops / elapsed / self.peak
        self.waited, self.flops = 0.0, 0
        return row

    def check(self, step: int, loss: float) -> None:
        """Look at the loss of an update. The row of a loss that stops the run is the last one of metrics.jsonl.

        Raises:
            FloatingPointError: it is not finite, or a spike; the sentence names update, rows of data and checkpoint.
        """
        usual = fmean(self.losses) if len(self.losses) >= FEWEST else math.inf
        if math.isfinite(loss) and not spikes(loss, usual, self.recipe.spike):
            self.losses.append(loss)
            return
        self.run.end_checkpoint()  # that is being written
        rows = self.task.rows_of(step - 1)
        said = f"loss is {loss:.4g} at step {step}"
        remedy = "lower the learning rate or set optim.clip under another --name"
        if math.isfinite(loss):
            said += f", {loss - usual:.1f} nats above the mean of the {len(self.losses)} before"
            remedy += ", or go on with a larger spike"
        if self.accelerator.is_main_process:
            with self.run.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "stopped": said, "rows": rows}) + "\n")
        saved = sorted(path.parent for path in self.run.checkpoints.glob("step-*/state.json"))
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise FloatingPointError(f"{said}{told(rows)}; {kept}: {remedy}.")


def spikes(loss: float, usual: float, spike: float | None) -> bool:
    """Whether a loss is a spike over the usual one, see above. spike: in nats, None where no loss is one."""
    return spike is not None and loss - usual >= max(spike, usual)


def told(rows: list[int]) -> str:
    """Row numbers as a part of a sentence, which has room for a few."""
    some = ", ".join(map(str, rows[:NAMED]))
    more = f" and {len(rows) - NAMED} more, which metrics.jsonl names" if len(rows) > NAMED else ""
    return f", on the rows {some} of the split train{more}" if rows else ""


def memory_of(device: torch.device) -> int:
    """Bytes: the most that this process had on an accelerator, or on a CPU what it has now. Waits for no device."""
    if device.type == "cpu":
        return psutil.Process().memory_info().rss
    return torch.accelerator.max_memory_allocated(device)
