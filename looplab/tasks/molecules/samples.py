"""Molecules that a model writes, kept in `samples/`."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from looplab.runs.folder import Run, rows_so_far, to_json_lines
from looplab.runs.models import weights_digest
from looplab.runs.writing import below, write_whole

BATCH = 500  # samples that are written at once, and seeded alike
MAX_TOKENS = 120


@dataclass(frozen=True)
class Setting:
    """How the next token is drawn; `top_k` 0 is no limit."""

    name: str
    temperature: float
    top_k: int


SETTINGS = (Setting("T0.8-top40", 0.8, 40), Setting("T1.0", 1.0, 0))


def write_molecules(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    setting: Setting,
    num_loops: int,
    seed: int,
    use_cache: bool = True,
    logits_processor: LogitsProcessorList | None = None,
) -> list[dict]:
    """`count` samples {"smiles", "finished"}, a function of the seed; the random state outside is as it was."""
    output = write_tokens(model, tokenizer, count, setting, num_loops, seed, use_cache, logits_processor)
    return samples_of(output.sequences, tokenizer)


@torch.inference_mode()
def write_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    setting: Setting,
    num_loops: int,
    seed: int,
    use_cache: bool = True,
    logits_processor: LogitsProcessorList | None = None,
    halting: dict | None = None,
):
    """What `generate` returns for `count` samples: sequences (count, 1 + T) from `<bos>`, loops_used (count, T)."""
    start = torch.full((count, 1), tokenizer.bos_token_id, device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, temperature=setting.temperature,
            top_k=setting.top_k, top_p=1.0, max_new_tokens=MAX_TOKENS, num_loops=num_loops, use_cache=use_cache,
            logits_processor=logits_processor, halting=halting, return_dict_in_generate=True,
        )  # fmt: skip


def samples_of(sequences: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """{"smiles", "finished"} of each of the sequences (N, 1 + T), which begin with `<bos>`."""
    rows = sequences[:, 1:]
    finished = (rows == tokenizer.eos_token_id).any(1).tolist()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [{"smiles": text, "finished": ended} for text, ended in zip(texts, finished, strict=True)]


def batch_seed(*parts) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def sample_file(
    path: Path,
    model,
    tokenizer,
    count: int,
    setting: Setting,
    num_loops: int,
    seed: int,
    bar: tqdm,
    logits_processor: LogitsProcessorList | None = None,
) -> list[dict]:
    """The first `count` samples of the file, which is written as far as it is short of them, batch by batch."""
    rows = rows_so_far(path)
    rows = rows[: len(rows) // BATCH * BATCH]
    bar.update(min(count, len(rows)))
    while len(rows) < count:
        part_seed = batch_seed(seed, setting.name, num_loops, len(rows) // BATCH)
        rows += write_molecules(
            model, tokenizer, BATCH, setting, num_loops, part_seed, logits_processor=logits_processor
        )
        write_whole(path, to_json_lines(rows))
        bar.update(min(BATCH, count - (len(rows) - BATCH)))
    return rows[:count]


def cache_speed(model, tokenizer, num_loops: int, count: int = 100) -> dict:
    """Molecules per second with and without the KV cache: the same `count` molecules, in one batch."""
    seconds = {}
    for use_cache in (True, False):
        began = time.perf_counter()
        write_molecules(model, tokenizer, count, SETTINGS[0], num_loops, 0, use_cache)
        seconds[use_cache] = time.perf_counter() - began
    return {
        "molecules_per_second": count / seconds[True],
        "without_cache": count / seconds[False],
        "ratio": seconds[False] / seconds[True],
        "batch": count,
    }


def forget_samples_of_another_model(run: Run) -> Path:
    """Delete samples that the weights in RUN/model did not write; returns the folder of samples."""
    weights = weights_digest(run)
    folder = below(run.folder, "samples")
    written = rows_so_far(folder / "model.json")
    if not (written and written[0].get("sha256") == weights):
        for path in folder.glob("*-loops*.jsonl"):
            path.unlink()
        write_whole(folder / "model.json", json.dumps({"sha256": weights}) + "\n")
    return folder
