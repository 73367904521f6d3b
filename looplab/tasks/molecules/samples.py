"""Sample molecules from a model, and keep them in RUN/samples/."""

import hashlib
import json
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from looplab.runs.folder import Run, rows_so_far, to_json_lines
from looplab.runs.models import weights_digest
from looplab.runs.writing import below, write_whole

from .sizes import SAMPLINGS, Sampling, Sizes


def write_molecules(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    sampling: Sampling,
    num_loops: int,
    seed: int,
    max_tokens: int = Sizes.max_tokens,
    use_cache: bool = True,
    logits_processor: LogitsProcessorList | None = None,
) -> list[dict]:
    """`count` samples {"smiles", "finished"} of at most `max_tokens` tokens, as a function of `seed`. Torch's random
    state is the same afterwards."""
    output = write_tokens(model, tokenizer, count, sampling, num_loops, seed, max_tokens, use_cache, logits_processor)
    return samples_of(output.sequences, tokenizer)


@torch.inference_mode()
def write_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    sampling: Sampling,
    num_loops: int,
    seed: int,
    max_tokens: int = Sizes.max_tokens,
    use_cache: bool = True,
    logits_processor: LogitsProcessorList | None = None,
    halting: dict | None = None,
):
    """The output of `generate` for `count` samples: sequences (count, 1 + T) with `<bos>`, loops_used (count, T)."""
    start = torch.full((count, 1), tokenizer.bos_token_id, device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, **sampling.arguments(),
            top_p=1.0, max_new_tokens=max_tokens, num_loops=num_loops, use_cache=use_cache,
            logits_processor=logits_processor, halting=halting, return_dict_in_generate=True,
        )  # fmt: skip


def samples_of(sequences: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """{"smiles", "finished": it has `<eos>`} for each of the sequences (N, 1 + T), which begin with `<bos>`."""
    rows = sequences[:, 1:]
    finished = (rows == tokenizer.eos_token_id).any(1).tolist()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [{"smiles": text, "finished": ended} for text, ended in zip(texts, finished, strict=True)]


def batch_seed(*parts) -> int:
    """A seed in 32 bits from the hash of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def sample_file(
    path: Path,
    model,
    tokenizer,
    count: int,
    sampling: Sampling,
    num_loops: int,
    seed: int,
    bar: tqdm,
    sizes: Sizes,
    logits_processor: LogitsProcessorList | None = None,
) -> list[dict]:
    """The first `count` samples in the file `path`; missing samples are written first, batch by batch."""
    rows = rows_so_far(path)
    rows = rows[: len(rows) // sizes.batch * sizes.batch]
    bar.update(min(count, len(rows)))
    while len(rows) < count:
        part_seed = batch_seed(seed, sampling.name, num_loops, len(rows) // sizes.batch)
        rows += write_molecules(
            model,
            tokenizer,
            sizes.batch,
            sampling,
            num_loops,
            part_seed,
            sizes.max_tokens,
            logits_processor=logits_processor,
        )
        write_whole(path, to_json_lines(rows))
        bar.update(min(sizes.batch, count - (len(rows) - sizes.batch)))
    return rows[:count]


def cache_speed(model, tokenizer, num_loops: int, max_tokens: int, count: int = 100) -> dict:
    """Molecules per second with and without the KV cache, and their ratio, for the same batch of `count` molecules."""
    seconds = {}
    for use_cache in (True, False):
        began = time.perf_counter()
        write_molecules(model, tokenizer, count, SAMPLINGS[0], num_loops, 0, max_tokens, use_cache)
        seconds[use_cache] = time.perf_counter() - began
    return {
        "molecules_per_second": count / seconds[True],
        "without_cache": count / seconds[False],
        "ratio": seconds[False] / seconds[True],
        "batch": count,
    }


def forget_samples_of_another_model(run: Run) -> Path:
    """Delete samples if other weights than RUN/model wrote them; returns the folder of samples."""
    weights = weights_digest(run)
    folder = below(run.folder, "samples")
    written = rows_so_far(folder / "model.json")
    if not (written and written[0].get("sha256") == weights):
        for path in folder.glob("*-loops*.jsonl"):
            path.unlink()
        write_whole(folder / "model.json", json.dumps({"sha256": weights}) + "\n")
    return folder
