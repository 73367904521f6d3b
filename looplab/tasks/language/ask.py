"""`looped ask` on text and molecules: what a model writes at several loop counts, side by side.

    1 loop            2 loops           4 loops
    of the same day   of the morning,   of the morning,
    ^  ^                 .

Every token has the probability that the model gave it. On a terminal the tokens that it was unsure of are coloured;
anywhere else a line below marks them, so that the text of a pipe is the same every time.
"""

import math
import shutil
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplab.runs.models import loops_to_try

LOOPS, NEW_TOKENS = (1, 2, 4, 8), 48
WIDTH, NARROWEST, GAP = 80, 16, 2  # characters: of a pipe, of a column, between columns
# (smallest probability, mark below the token, colour on a terminal), from sure to unsure
SURE = ((0.9, " ", ""), (0.5, ".", "\033[33m"), (0.0, "^", "\033[31m"))
BOLD, PLAIN = "\033[1m", "\033[0m"


@dataclass(frozen=True)
class Written:
    """What a model wrote with one loop count: `pieces` of text, and the probability of each."""

    num_loops: int
    pieces: Sequence[str]
    sure: Sequence[float]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], sure: Sequence[float]) -> tuple[list, list]:
    """(pieces of text, probability of each). Tokens that are one character together are one piece."""
    pieces, kept, shown, least = [], [], "", 1.0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        least = min(least, sure[end - 1])
        if text.endswith("\ufffd") and end < len(tokens):  # a part of a character, which the next token ends
            continue
        if len(text) > len(shown):
            pieces.append(text[len(shown) :])
            kept.append(least)
        shown, least = text, 1.0
    return pieces, kept


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, torch.Tensor],
    num_loops: int,
    new_tokens: int,
    temperature: float,
    seed: int,
) -> Written:
    """What the model writes after `inputs` of one row; temperature 0 takes the likeliest token each time."""
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            **inputs,
            num_loops=num_loops,
            max_new_tokens=new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
            **drawn,
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    logits = torch.stack(output.logits)[:, 0].float()  # (T, V)
    sure = logits.softmax(-1).gather(1, tokens[:, None])[:, 0]
    return Written(num_loops, *pieces_of(tokenizer, tokens.tolist(), sure.tolist()))


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, torch.Tensor]:
    """Tokens to go on from; those of a question in a chat if the tokenizer has a template.

    Raises:
        ValueError: there are none.
    """
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": text}]
        given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        given = tokenizer(text, return_tensors="pt")
    if given["input_ids"].numel() == 0:
        raise ValueError("there is no text to go on from: give some, in quotes.")
    # Without the token types that some tokenizers add, which the models do not take.
    return {name: given[name] for name in ("input_ids", "attention_mask") if name in given}


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    loops: Sequence[int] | None = None,
    new_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    verdict: Callable[[str], str] | None = None,
) -> None:
    """Print what the model writes after `text` at several loop counts.

    Args:
        loops: `LOOPS` as far as the model may run them, unless given.
        new_tokens: most tokens; `NEW_TOKENS` unless given, and never more than the model has positions for.
        temperature: 0 unless given.
        seed: of the draws, 0 unless given.
        verdict: of what was written, for the last line of a column.

    Raises:
        ValueError: the text has no tokens, or fills all positions that the model has.
    """
    inputs = {name: value.to(model.device) for name, value in encoded(tokenizer, text).items()}
    length, positions = inputs["input_ids"].shape[1], model.config.get_text_config().max_position_embeddings
    if length >= positions:
        raise ValueError(f"the text has {length} tokens, and the model has {positions} positions: give a shorter one.")
    new_tokens = min(NEW_TOKENS if new_tokens is None else new_tokens, positions - length)
    written = [
        write(model, tokenizer, inputs, count, new_tokens, temperature or 0.0, seed or 0)
        for count in (loops_to_try(model, LOOPS) if loops is None else loops)
    ]
    colour = sys.stdout.isatty()
    print("\n".join(side_by_side(text, written, shutil.get_terminal_size((WIDTH, 24)).columns, colour, verdict)))


def side_by_side(
    prompt: str,
    written: Sequence[Written],
    width: int,
    colour: bool,
    verdict: Callable[[str], str] | None = None,
) -> list[str]:
    """The lines that `ask` prints: columns, in as many bands as `width` characters ask for."""
    lines = [f"prompt  {printable(prompt)!r}", legend(colour), ""]
    at_once = max(1, min(len(written), (width + GAP) // (NARROWEST + GAP)))
    across = (width + GAP) // at_once - GAP
    for start in range(0, len(written), at_once):
        columns = [column(each, across, colour, verdict) for each in written[start : start + at_once]]
        height = max(map(len, columns))
        for row in range(height):
            cells = [cells[row] if row < len(cells) else ("", 0) for cells in columns]
            lines.append((" " * GAP).join(text + " " * (across - size) for text, size in cells).rstrip())
        lines.append("")
    return lines[:-1]


def legend(colour: bool) -> str:
    if colour:
        (_, _, unsure), (_, _, least) = SURE[1:]
        return f"colour  {unsure}less than 90 % sure{PLAIN}, {least}less than 50 %{PLAIN}"
    return "below   . less than 90 % sure, ^ less than 50 %"


def column(written: Written, width: int, colour: bool, verdict: Callable[[str], str] | None) -> list[tuple[str, int]]:
    """Lines of a column and their widths in characters."""
    head = f"{written.num_loops} loop{'' if written.num_loops == 1 else 's'}"
    lines = [(f"{BOLD}{head}{PLAIN}" if colour else head, len(head))]
    for line in wrapped(written, width):
        size = sum(cells(character) for character, _ in line)
        lines.append(("".join(painted(line) if colour else (character for character, _ in line)), size))
        marks = "".join(mark_of(sure) * cells(character) for character, sure in line)
        if not colour and marks.strip():
            lines.append((marks, size))
    mean = math.exp(sum(math.log(max(sure, 1e-9)) for sure in written.sure) / max(len(written.sure), 1))
    ends = [f"{100 * mean:.0f} % sure"] if written.sure else ["writes nothing"]
    ends += [verdict(written.text)] if verdict else []
    return lines + [(end[:width], len(end[:width])) for end in ends]


def wrapped(written: Written, width: int) -> list[list[tuple[str, float]]]:
    """Lines of (character, probability of its token) that fit into `width`, broken at spaces where there are any."""
    lines, line = [], []
    for piece, sure in zip(written.pieces, written.sure, strict=True):
        for character in printable(piece):
            if character == "\n":
                lines.append(line)
                line = []
                continue
            line.append((character, sure))
            if sum(cells(each) for each, _ in line) > width:
                space = next((i for i in range(len(line) - 1, 0, -1) if line[i][0] == " "), len(line) - 1)
                lines.append(line[:space])
                line = line[space:] if line[space][0] != " " else line[space + 1 :]
    return [each for each in [*lines, line] if each] or [[]]


def printable(text: str) -> str:
    """Without characters that would steer the terminal."""
    return "".join(c if c == "\n" or c == " " or c.isprintable() else "\ufffd" for c in text.expandtabs(4))


def cells(character: str) -> int:
    """Columns of a terminal that a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def mark_of(sure: float) -> str:
    return next(mark for least, mark, _ in SURE if sure >= least)


def painted(line: Sequence[tuple[str, float]]):
    for character, sure in line:
        paint = next(paint for least, _, paint in SURE if sure >= least)
        yield f"{paint}{character}{PLAIN}" if paint else character
