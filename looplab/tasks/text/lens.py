"""`looped lens` on text: what a model would say if it stopped after each loop (logit lens; nostalgebraist 2020).

    p_t        the model's probabilities of the next token after t of R loops, through coda, norm and head
    top        the likeliest token of p_t, and its probability
    rank       of the likeliest token of p_R among the tokens of p_t; 1 is the first
    entropy    of p_t, in nats
    kl         KL(p_R || p_t), in nats: how far the loop is from the last one
    next       nats of the token that really comes next, -log p_t(next)

    lens.jsonl   "token": a line per loop and token of the first text
                 "block": means over a block of the test text, a line per loop and block

Blocks are written as they are measured, and a lens that was interrupted goes on.

A number at t loops is that of a call with t loops. Legend: B batch rows, T tokens, V vocabulary.
"""

from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders.text_batches import spread_blocks
from looplab.instruments.at_loops import at_loops
from looplab.instruments.drawing import save
from looplab.runs.folder import Run, rows_on_file, to_json_lines
from looplab.runs.models import load_run_model
from looplab.runs.writing import below

from .lens_figures import MEASURES, lens_figure, lens_text
from .perplexity import run_blocks, text_digest
from .records import LENS

LIMIT = 32  # blocks of test text
TOKENS = 64  # of the first text that have lines of their own


@torch.inference_mode()
def read_loops(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, num_loops: int
) -> dict[int, dict[str, torch.Tensor]]:
    """Loop count 1 .. R -> the measures of every token, (B, T) each, see the module docstring.

    Besides: `top` (ids), `sure` (the probability of top), and `agrees`, whether top is that of the last loop.

    Args:
        input_ids, labels: (B, T); -100 where no next token is known, which makes `next` nan.
    """
    call = {"num_loops": num_loops, "use_cache": False}
    last = model(input_ids, **call).logits.float().log_softmax(-1)  # (B, T, V)
    final, known = last.argmax(-1, keepdim=True), labels >= 0

    def read(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        log_p = logits.float().log_softmax(-1)
        of_final = log_p.gather(-1, final)
        top = log_p.argmax(-1)
        nats = -log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        found = {
            "top": top,
            "sure": log_p.amax(-1).exp(),
            "rank": 1 + (log_p > of_final).sum(-1),
            "entropy": -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1),
            "kl": (last.exp() * (last - log_p)).nan_to_num(0.0).sum(-1).clamp_min(0),
            "next": nats.masked_fill(~known, torch.nan),
            "agrees": top == final[..., 0],
        }
        return {name: value.cpu() for name, value in found.items()}

    return at_loops(model, range(1, num_loops + 1), read, input_ids=input_ids)


def token_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    num_loops: int,
) -> list[dict]:
    """A record per loop and token of one text, ids and labels (1, T)."""
    readings = read_loops(model, input_ids, labels, num_loops)
    rows = []
    for position, token in enumerate(input_ids[0].tolist()):
        follows = int(labels[0, position])
        facts = {"measure": "token", "position": position, "token": tokenizer.decode([token])}
        facts["follows"] = tokenizer.decode([follows]) if follows >= 0 else None
        for loops, reading in readings.items():
            here = {name: values[0, position].item() for name, values in reading.items()}
            here["top"] = tokenizer.decode([here["top"]])
            here["next"] = here["next"] if follows >= 0 else None
            rows.append(facts | {"loops": loops} | here)
    return rows


def block_rows(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, number: int, num_loops: int
) -> list[dict]:
    """A record per loop of block `number`, ids and labels (1, T): means over its tokens."""
    return [
        {"measure": "block", "block": number, "loops": loops, "n": labels.numel()}
        | {name: reading[name].double().mean().item() for name in MEASURES}
        for loops, reading in read_loops(model, input_ids, labels, num_loops).items()
    ]


def lens_run(
    run: Run, text: str | None = None, num_loops: int | None = None, limit: int | None = None, format: str = "png"
) -> list[Path]:
    """Write RUN/lens.jsonl and RUN/figures/lens.png; returns their paths.

    Args:
        text: looked at instead of the run's test text.
        num_loops: the last loop; the model's own count unless given.
        limit: most blocks of test text, `LIMIT` unless given, the same ones every time.

    Raises:
        ValueError: the run has not finished, its text has changed, the model may not run so many loops, or there is no
            text: a model without a recipe has none of its own.
    """
    if text is None and run.bare:
        raise ValueError(f"{run} does not say which text it was trained on: name a text to look at by --text.")
    model, tokenizer = load_run_model(run, num_loops)
    num_loops = model.config.num_loops if num_loops is None else num_loops
    model.eval()
    if text is None:
        blocks = run_blocks(run, tokenizer)["test"]
        numbers = spread_blocks(len(blocks), LIMIT if limit is None else limit)
        load, digest = blocks.all_rows, text_digest(blocks, numbers)
    else:
        load, numbers, digest = partial(rows_of_text, tokenizer, text), torch.arange(1), text
    facts = {"weights": run.weights, "last": num_loops, "text": digest}
    path = run.folder / LENS.name
    rows = rows_on_file(path, facts)
    done = {row["block"] for row in rows if row["measure"] == "block"}
    todo = [number for number in numbers.tolist() if number not in done]
    for index, number in enumerate(tqdm(todo, desc="lens", unit="block")):
        found = {name: value.to(model.device) for name, value in load(torch.tensor([number])).items()}
        ids, labels = found["input_ids"], found["shift_labels"]
        if not any(row["measure"] == "token" for row in rows):
            first = ids[:, :TOKENS], labels[:, :TOKENS]
            rows += [facts | row for row in token_rows(model, tokenizer, *first, num_loops)]
        if text is None:
            rows += [facts | row for row in block_rows(model, ids, labels, number, num_loops)]
        if index % 8 == 7 or number == todo[-1]:
            run.write({LENS.name: to_json_lines(rows)})
    print(lens_text(rows))
    figure = below(run.folder, "figures") / "lens.png"
    return [path, *run.drew([save(lens_figure(rows), figure, format)])]


def rows_of_text(tokenizer: PreTrainedTokenizerBase, text: str, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    """The one row of a text, in the form of `TextBlocks.rows`. Raises ValueError if it has no tokens."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        raise ValueError("the text has no tokens: give some, in quotes.")
    return {"input_ids": ids, "shift_labels": torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)}
