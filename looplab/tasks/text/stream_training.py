"""Training on a stream of text: what a checkpoint keeps of it, and mistakes that all processes are told of.

checkpoints/step-N/stream_RANK.pt    where process RANK stands in its part, see `data_builders.streams`
"""

from pathlib import Path

import torch
from accelerate.utils import gather_object

from data_builders import StreamBatches
from looplab.tasks.training import State

from .training import TextTraining


class StreamTraining(TextTraining):
    """Plain text that is read on the way. Checkpoints of the accelerator hold the state of the stream."""

    batches: StreamBatches

    def __init__(self, *args):
        super().__init__(*args)
        self._checkpoint: Path | None = None  # that was loaded
        self.accelerator.register_save_state_pre_hook(self._save)
        self.accelerator.register_load_state_pre_hook(self._load)

    def _save(self, models: list, weights: list, folder: str) -> None:
        torch.save(self.batches.state_dict(), Path(folder) / f"stream_{self.accelerator.process_index}.pt")

    def _load(self, models: list, folder: str) -> None:
        self._checkpoint = Path(folder)

    def begin(self, state: State) -> None:
        """Go on where the checkpoint was written, and read until the first batch can be drawn.

        Raises:
            ValueError: on every process, what is wrong for one of them.
        """
        wrong = None
        try:
            if state.step:
                self._go_on()
            self.batches.fill()
        except ValueError as error:
            wrong = str(error)
        found = [each for each in gather_object([wrong]) if each is not None]
        if found:
            raise ValueError(found[0])

    def _go_on(self) -> None:
        names = sorted(() if self._checkpoint is None else self._checkpoint.glob("stream_*.pt"))
        if not names:
            raise ValueError(
                f"{self._checkpoint} does not say where the stream was: delete it, and the run begins before it."
            )
        own = self._checkpoint / f"stream_{self.accelerator.process_index}.pt"
        # Without a file of its own there were fewer processes, which any of the files says.
        self.batches.load_state_dict(torch.load(own if own in names else names[0], weights_only=True))

    def trained_on(self) -> dict:
        """How often the part of the main process was read to its end."""
        return {"stream_epochs": self.batches.reader.epoch}
