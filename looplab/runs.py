"""A run folder, read: `runs/<name>/`, the place where training and evaluation meet.

recipe.yaml     the resolved recipe                      written before the first step
metrics.jsonl   training rows and gate rows              while training
model/          weights, config, tokenizer, model code   at the end
summary.json    what was reached                         at the end
grid.jsonl      accuracy over loops x hops               `looped eval`
loops.jsonl     held-out accuracy and margin, every loop `looped eval`
text.jsonl      test perplexity by loops (task text)     `looped eval`
molecules.jsonl validity and more by loops (molecules)   `looped eval`
samples/        the molecules that were written          `looped eval`
halting.jsonl   quality against loops, time saved        `looped halting`
evaluation.json limit; chance level, or size of a model  `looped eval`
snapshots/      the model at steps the recipe names      while training
lens*.jsonl     what states say and cause                `looped lens`
memory.jsonl    value and bytes of each KV memory        `looped memory`
probes.jsonl    what states say of a molecule's grammar  `looped lens`
ablations.jsonl what a molecule loses with each head     `looped lens`
readouts.jsonl  each pass read by a head of its own      `looped lens`
quantization.json  perplexity with weights of few bits   `looped quantize`
model_int4/     that model, weights dequantised          `looped quantize`
figures/        PNG                                      `looped plot`, `looped lens`
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

AGAIN = "run train.py again: it resumes from the last checkpoint."
UNFINISHED = f"the training has not finished; {AGAIN}"


@dataclass(frozen=True)
class Run:
    """The files of one run; every reader raises ValueError that says what to do when its file is missing or broken."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def recipe(self) -> dict:
        return self._parse("recipe.yaml", yaml.safe_load, "was it written by train.py?")

    def task(self) -> str:
        """Name of the task in the recipe."""
        try:
            return self.recipe()["data"]["task"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.folder}/recipe.yaml has no data.task: was it written by train.py?") from error

    def summary(self) -> dict:
        return self._parse("summary.json", json.loads, UNFINISHED)

    def metrics(self) -> list[dict]:
        return self._parse("metrics.jsonl", json_lines, "nothing was trained here; run train.py.")

    def grid(self) -> list[dict]:
        return self._parse("grid.jsonl", json_lines, f"run `looped eval {self.folder}` first.")

    def loops(self) -> list[dict]:
        return self._parse("loops.jsonl", json_lines, f"run `looped eval {self.folder}` first.")

    def text(self) -> list[dict]:
        return self._parse("text.jsonl", json_lines, f"run `looped eval {self.folder}` first.")

    def memory(self) -> list[dict]:
        return self._parse("memory.jsonl", json_lines, f"run `looped memory {self.folder}` first.")

    def molecules(self) -> list[dict]:
        return self._parse("molecules.jsonl", json_lines, f"run `looped eval {self.folder}` first.")

    def ablations(self) -> list[dict]:
        return self._parse("ablations.jsonl", json_lines, f"run `looped lens {self.folder}` first.")

    def readouts(self) -> list[dict]:
        return self._parse("readouts.jsonl", json_lines, f"run `looped lens {self.folder}` first.")

    def halting(self) -> list[dict]:
        return self._parse("halting.jsonl", json_lines, f"run `looped halting {self.folder}` first.")

    def evaluation(self) -> dict:
        return self._parse("evaluation.json", json.loads, f"run `looped eval {self.folder}` first.")

    def quantization(self) -> dict:
        return self._parse("quantization.json", json.loads, f"run `looped quantize {self.folder}` first.")

    def model_folder(self) -> Path:
        if not (self.folder / "model" / "config.json").is_file():
            raise ValueError(f"{self.folder} has no model/config.json: {UNFINISHED}")
        return self.folder / "model"

    def trained_loops(self) -> tuple[int, int]:
        """Smallest and largest loop count of the training batches."""
        loops = self.summary()["trained_loops"]
        return loops["minimum"], loops["maximum"]

    def _parse(self, file: str, parse, remedy: str):
        path = self.folder / file
        if not path.is_file():
            raise ValueError(f"{self.folder} has no {file}: {remedy}")
        try:
            return parse(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read ({error}): {remedy}") from error


def open_run(folder: str | Path) -> Run:
    """The run at `folder`.

    Raises:
        ValueError: there is no such folder (with the nearest name), or it is not a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        siblings = [str(path) for path in folder.parent.glob("*/")] if folder.parent.is_dir() else []
        nearest = difflib.get_close_matches(str(folder), siblings, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "train one with `accelerate launch train.py RECIPE`."
        raise ValueError(f"there is no run folder {folder}; {hint}")
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder: it has no recipe.yaml, which train.py writes first.")
    return Run(folder)


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def to_json_lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
