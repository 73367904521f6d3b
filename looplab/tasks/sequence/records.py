"""Files with measurements on questions."""

from looplab.runs.folder import NUMBER, SHARE, RecordFile
from looplab.tasks.base import DYNAMICS, MEMORY
from looplab.tasks.quantizing import QUANTIZATION

EVALUATION = RecordFile("evaluation.json", "eval", {"chance": SHARE, "by": str, "num_loops": int})
GRADES = RecordFile(
    "grades.jsonl",
    "eval",
    {
        "split": str, "loops": int, "grade": int, "kind": str, "exact": SHARE, "exact_interval": [NUMBER],
        "tokens": SHARE, "tokens_interval": [NUMBER], "loss": NUMBER, "n": int, "trained": bool,
    },
)  # fmt: skip
HALTING = RecordFile("halting.jsonl", "halting", {"measure": str, "rule": str})
LENS = RecordFile("lens.jsonl", "lens", {"measure": str, "loops": int})

RECORDS = (EVALUATION, GRADES, HALTING, MEMORY, LENS, DYNAMICS, QUANTIZATION)
