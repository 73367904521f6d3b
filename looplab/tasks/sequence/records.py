"""Files with measurements on questions."""

from looplab.runs.folder import NUMBER, SHARE, RecordFile

EVALUATION = RecordFile("evaluation.json", "eval", {"chance": SHARE, "by": str, "num_loops": int})
GRADES = RecordFile(
    "grades.jsonl",
    "eval",
    {
        "split": str, "loops": int, "grade": int, "kind": str, "exact": SHARE, "exact_interval": [NUMBER],
        "tokens": SHARE, "tokens_interval": [NUMBER], "loss": NUMBER, "n": int, "trained": bool,
    },
)  # fmt: skip

RECORDS = (EVALUATION, GRADES)
