"""Files with measurements on text."""

from looplab.runs.folder import NUMBER, RecordFile
from looplab.tasks.base import DYNAMICS, MEMORY
from looplab.tasks.quantizing import QUANTIZATION

EVALUATION = RecordFile("evaluation.json", "eval", {"num_loops": int, "parameters": {"all": int}})
PERPLEXITY = RecordFile(
    "text.jsonl",
    "eval",
    {
        "loops": int, "loss": NUMBER, "perplexity": NUMBER, "interval": [NUMBER], "tokens": int, "text": str,
        "block_losses": [NUMBER],
    },
)  # fmt: skip
HALTING = RecordFile("halting.jsonl", "halting", {"measure": str, "rule": str})

LENS = RecordFile("lens.jsonl", "lens", {"measure": str, "loops": int})

RECORDS = (EVALUATION, PERPLEXITY, HALTING, MEMORY, LENS, DYNAMICS, QUANTIZATION)
