"""Files with measurements on hops."""

from looplab.runs.folder import NUMBER, SHARE, RecordFile
from looplab.tasks.base import DYNAMICS, MEMORY
from looplab.tasks.quantizing import QUANTIZATION

EVALUATION = RecordFile("evaluation.json", "eval", {"chance": SHARE})
GRID = RecordFile(
    "grid.jsonl",
    "eval",
    {"loops": int, "hops": int, "split_kind": str, "accuracy": SHARE, "n": int, "trained": bool},
)
LOOPS = RecordFile(
    "loops.jsonl",
    "eval",
    {
        "split": str, "split_kind": str, "hops": int, "loops": int, "accuracy": SHARE, "margin": NUMBER,
        "first_correct": SHARE, "n": int,
    },
)  # fmt: skip
HALTING = RecordFile("halting.jsonl", "halting", {"measure": str, "rule": str})
LENS = RecordFile("lens.jsonl", "lens", of_snapshots=True)
STAGES = RecordFile("lens_stages.jsonl", "lens")

RECORDS = (EVALUATION, GRID, LOOPS, HALTING, MEMORY, LENS, STAGES, DYNAMICS, QUANTIZATION)
