"""Training on a stream of text: what a checkpoint keeps of it, and mistakes that all processes are told of."""

from collections.abc import Mapping, Sequence

from accelerate.utils import gather_object

from data_builders import StreamBatches
from looplab.tasks.training import Part, State

from .training import TextTraining


class StreamTraining(TextTraining):
    """Plain text that is read on the way. What a checkpoint keeps of a process says where its parts are."""

    batches: StreamBatches

    def __init__(self, *args):
        super().__init__(*args)
        self._states: Sequence[dict] = ()  # of the checkpoint that was loaded

    def parts(self) -> Mapping[str, Part]:
        return {"stream": self}

    def state_dict(self) -> dict:
        return self.batches.state_dict()

    def load_state_dicts(self, states: Sequence[dict]) -> None:
        self._states = states

    def begin(self, state: State) -> None:
        """Go on where the checkpoint was written, and read until the first batch can be drawn.

        Raises:
            ValueError: on every process, what is wrong for one of them.
        """
        wrong = None
        try:
            self.batches.begin(self._states)
        except ValueError as error:
            wrong = str(error)
        found = [each for each in gather_object([wrong]) if each is not None]
        if found:
            raise ValueError(found[0])
        self._states = ()

    def rows_of(self, step: int) -> list[int]:
        """[]: the rows of a stream have no numbers."""
        return []

    def trained_on(self) -> dict:
        """How often the first part of the main process was read to its end."""
        return {"stream_epochs": self.batches.lanes[0].reader.epoch}
