"""Files with measurements on molecules."""

from looplab.runs.folder import NUMBER, RecordFile
from looplab.tasks.base import DYNAMICS
from looplab.tasks.quantizing import QUANTIZATION

EVALUATION = RecordFile(
    "evaluation.json", "eval", {"num_loops": int, "parameters": {"all": int}, "settings": [{}], "speed": {}}
)
MOLECULES = RecordFile("molecules.jsonl", "eval", {"setting": str, "loops": int, "loss": NUMBER, "n": int})
HALTING = RecordFile("halting.jsonl", "halting", {"measure": str, "rule": str})
PROBES = RecordFile("probes.jsonl", "lens")
ABLATIONS = RecordFile("ablations.jsonl", "lens")
READOUTS = RecordFile("readouts.jsonl", "lens")

RECORDS = (EVALUATION, MOLECULES, HALTING, PROBES, ABLATIONS, READOUTS, DYNAMICS, QUANTIZATION)
