"""How `looped eval`, `table` and `plot` read a run: chosen once, by its task.

    reader            reads                measures                      tables and draws
    HopReader         khop, composition    accuracy over loops x hops    learnable depth, reach, heat maps
    TextReader        text                 test perplexity by loops      perplexity, differences, loss over tokens
    MoleculeReader    molecules            samples, validity by loops    validity and its kin, faults by loops

A reader imports what a command needs when it is called, so that tables stay quick.
"""

from collections.abc import Sequence

from looplab.runs.folder import Run
from looplab.tasks.hops.task import HopReader
from looplab.tasks.molecules.task import MoleculeReader
from looplab.tasks.text.task import TextReader

Reader = HopReader | TextReader | MoleculeReader
READERS: dict[str, Reader] = {
    "khop": HopReader(),
    "composition": HopReader(),
    "text": TextReader(),
    "molecules": MoleculeReader(),
}
TASKS = READERS


def reader_of(runs: Sequence[Run]) -> Reader:
    """The reader of all of `runs`.

    Raises:
        ValueError: they need different readers, or a recipe's task is unknown.
    """
    for run in runs:
        if run.task() not in READERS:
            raise ValueError(f"{run.folder}: there is no task {run.task()!r}; there are {', '.join(READERS)}.")
        if type(READERS[run.task()]) is not type(READERS[runs[0].task()]):
            raise ValueError(
                f"{runs[0].folder} is a run on {runs[0].task()} and {run.folder} on {run.task()}: read them apart."
            )
    return READERS[runs[0].task()]
