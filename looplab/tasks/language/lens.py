"""`looped lens` on tokens: what a model would say if it stopped after each loop (logit lens; nostalgebraist 2020).

    p_t        the model's probabilities of the next token after t of R loops, through coda, norm and head
    top        the likeliest token of p_t, and its probability
    rank       of the likeliest token of p_R among the tokens of p_t; 1 is the first
    entropy    of p_t, in nats
    kl         KL(p_R || p_t), in nats: how far the loop is from the last one
    next       nats of the token that really comes next, -log p_t(next)

    lens.jsonl   "token": a line per loop and token of the first text
                 "block": means over a block of test text, or over an answer, a line per loop and block

Blocks are written as they are measured, and a lens that was interrupted goes on.

A number at t loops is that of a call with t loops. Legend: B batch rows, T tokens, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplab.instruments.at_loops import at_loops
from looplab.instruments.drawing import save
from looplab.runs.folder import RecordFile, Run, rows_on_file, to_json_lines
from looplab.runs.writing import below

from .lens_figures import MEASURES, lens_figure, lens_text

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
    """A record per loop of block `number`, ids and labels (1, T): means over its tokens that have a label."""
    known = (labels >= 0).cpu()
    return [
        {"measure": "block", "block": number, "loops": loops, "n": int(known.sum())}
        | {name: reading[name][known].double().mean().item() for name in MEASURES}
        for loops, reading in read_loops(model, input_ids, labels, num_loops).items()
    ]


Load = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def measure_lens(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    load: Load,
    numbers: torch.Tensor,
    facts: dict,
    record: RecordFile,
    *,
    blocks: str | None = "blocks of test text",
    format: str = "png",
) -> list[Path]:
    """Write the record and RUN/figures/lens.png; returns their paths.

    Args:
        load: gives a block, `input_ids` and `shift_labels` (1, T) each, by its number (1,).
        numbers: of the blocks; the tokens of the first have lines of their own.
        facts: fields of every line; `last` is the last loop. Lines on file that have them are not measured again.
        blocks: what blocks are, over which means are measured, too; None: they are not.
    """
    path, num_loops = run.folder / record.name, facts["last"]
    rows = rows_on_file(path, facts)
    done = {row["block"] for row in rows if row["measure"] == "block"}
    todo = [number for number in numbers.tolist() if number not in done]
    for index, number in enumerate(tqdm(todo, desc="lens", unit="block")):
        found = {name: value.to(model.device) for name, value in load(torch.tensor([number])).items()}
        ids, labels = found["input_ids"], found["shift_labels"]
        if not any(row["measure"] == "token" for row in rows):
            first = ids[:, :TOKENS], labels[:, :TOKENS]
            rows += [facts | row for row in token_rows(model, tokenizer, *first, num_loops)]
        if blocks is not None:
            rows += [facts | row for row in block_rows(model, ids, labels, number, num_loops)]
        if index % 8 == 7 or number == todo[-1]:
            run.write({record.name: to_json_lines(rows)})
    print(lens_text(rows))
    figure = below(run.folder, "figures") / "lens.png"
    return [path, *run.drew([save(lens_figure(rows, blocks or ""), figure, format)])]
