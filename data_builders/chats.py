"""Conversations for language modelling: a row is a list of messages, which the tokenizer's chat template writes out.

    file          .jsonl or .jsonl.gz; a line: {"messages": [{"role": "user", "content": "Hi"}, ...]}
    conversation  what the template makes of a row, as tokens, and which of these an assistant wrote
    block         of T tokens, cut from the conversations one after the other; labels are what assistants wrote

Which tokens an assistant wrote is read off a template that marks them by {% generation %}. Otherwise it follows from
what the template makes of the messages before: the assistant's tokens begin where a prompt for them ends, and end with
the end of the turn. A template that writes an earlier message differently once there is a later one does not allow
that: it is refused.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from .files import read_json, read_text
from .packing import IGNORED
from .text_batches import TextBlocks, TokenStream, backend_parts

SUFFIXES = (".jsonl", ".jsonl.gz")
ROLES = ("system", "developer", "user", "assistant", "tool")
UNSAID = "the chat template does not say which tokens an assistant wrote"


def read_chats(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, conversation) of every line that is not blank, see `conversation`.

    Raises ValueError, with file and line, as `read_text` and `conversation`, and for a line that is no JSON object
    with `messages`.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        row = read_json(line, place)
        if not isinstance(row, dict) or "messages" not in row:
            raise ValueError(f'{place}: no object with "messages": write {{"messages": [...]}}, or take the line out.')
        yield number, conversation(row["messages"], place)


def conversation(messages: object, place: str) -> str:
    """Messages as JSON, the same for equal ones. place: where they are, for the message of an error.

    Raises ValueError for what is no list of messages, each with a role of ROLES and a text as content; and for a
    conversation without a message of an assistant.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"{place}: {what}: correct the row, or take it out.")

    if not isinstance(messages, list) or not messages:
        raise refuse(f"messages must be a list of messages, got {shown(messages)}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise refuse(f"message {number} must have a role and a content, got {shown(message)}")
        if message.get("role") not in ROLES:
            raise refuse(f"message {number} must have a role of {', '.join(ROLES)}, got {shown(message.get('role'))}")
        if not isinstance(message.get("content"), str):
            raise refuse(f"message {number} must have a text as content, got {shown(message.get('content'))}")
    if not any(message["role"] == "assistant" for message in messages):
        raise refuse("no message is of an assistant, so there is nothing to learn")
    # A data set gives every message the fields that one of them has.
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    return json.dumps(messages, ensure_ascii=False, sort_keys=True)


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


class Template:
    """The chat template of a tokenizer: conversations as tokens, and which of these an assistant wrote.

    Raises ValueError for a tokenizer without a template, or without a Rust backend, which says where a token stands.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, which conversations need: name a tokenizer with one in init_from "
                "or data.tokenizer, or write the conversations out as text."
            )
        if not tokenizer.is_fast:
            raise ValueError("conversations need a tokenizer of the library tokenizers: save it as tokenizer.json.")
        self.tokenizer, self.text = tokenizer, tokenizer.get_chat_template()
        self.marks = re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None

    def encode(self, messages: list[dict], assistant_only: bool) -> tuple[list[int], list[bool]]:
        """Tokens, and which are labels: what assistants wrote, or all of them.

        Raises ValueError if the template refuses the messages, or does not say what assistants wrote.
        """
        try:
            if not assistant_only:
                ids = self.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
                return ids, [True] * len(ids)
            if self.marks:
                found = self.tokenizer.apply_chat_template(
                    messages, return_dict=True, return_assistant_tokens_mask=True
                )
                return found["input_ids"], [bool(each) for each in found["assistant_masks"]]
            return self.derived(messages)
        except ValueError:
            raise
        except Exception as error:  # jinja's, of many kinds; a template raises what it likes
            raise ValueError(f"the chat template refuses it ({error})") from error

    def derived(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """As `encode`, from what the template makes of the first messages alone."""
        whole, spans = self.write(messages), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise ValueError(f"{UNSAID}: it has no {{% generation %}}, and message 1 has no prompt before it")
            prompt = self.write(messages[:number], add_generation_prompt=True)
            turn = self.write(messages[: number + 1])
            if not whole.startswith(turn) or not turn.startswith(prompt):
                raise ValueError(
                    f"{UNSAID}: it has no {{% generation %}}, and writes message {number + 1} differently where "
                    "others follow"
                )
            said, ends = turn[len(prompt) :], self.tokenizer.eos_token
            if ends and ends in said:  # what the template writes after the end of the turn is not the assistant's
                said = said[: said.rindex(ends) + len(ends)]
            spans.append((len(prompt), len(prompt) + len(said)))
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        labels = []
        for first, last in encoded["offset_mapping"]:
            shares = [(start, stop) for start, stop in spans if first < stop and last > start]
            if any(first < start or last > stop for start, stop in shares):
                raise ValueError(
                    f"{UNSAID}: it has no {{% generation %}}, and the token {whole[first:last]!r} is the assistant's "
                    "in part"
                )
            labels.append(bool(shares))
        return encoded["input_ids"], labels

    def write(self, messages: list[dict], **settings) -> str:
        """What the template makes of messages."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def encode_chats(split: Dataset, tokenizer: PreTrainedTokenizerBase, assistant_only: bool) -> Dataset:
    """The conversations of a split as columns input_ids (int32) and labelled (bool), see `Template.encode`.

    They are written once into the `datasets` cache. Raises ValueError as `Template`, with source and line of the row.
    """
    template = Template(tokenizer)

    def encode(batch: dict) -> dict:
        found = []
        for i, text in enumerate(batch["text"]):
            try:
                found.append(template.encode(json.loads(text), assistant_only))
            except ValueError as error:
                place = f"{batch['source'][i]}, line {batch['line'][i]}"
                remedy = "correct the row, take it out, or take a tokenizer with another template"
                also = ", or learn all tokens (assistant_only_loss: false)" if assistant_only else ""
                raise ValueError(f"{place}: {error}: {remedy}{also}.") from error
        return dict(zip(("input_ids", "labelled"), map(list, zip(*found, strict=True)), strict=True))

    features = Features({"input_ids": List(Value("int32")), "labelled": List(Value("bool"))})
    if not len(split):
        return Dataset.from_dict({"input_ids": [], "labelled": []}, features=features)
    made_of = (
        split._fingerprint,
        backend_parts(tokenizer),
        template.text,
        tokenizer.eos_token,
        assistant_only,
        "chats 1",
    )
    return split.map(
        encode,
        batched=True,
        batch_size=100,
        remove_columns=split.column_names,
        features=features,
        new_fingerprint=Hasher.hash(made_of),
        desc="Tokenize",
    )


class ChatBlocks(TextBlocks):
    """Blocks of conversations, as `TextBlocks` are of documents; a token that is no label has -100 in `shift_labels`.

    A block without labels is left out. split: rows with the columns text, source and line, see `Text`.

    Raises ValueError as `encode_chats`, and for a split without a block that has a label.
    """

    def __init__(
        self, split: Dataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int, assistant_only: bool = True
    ):
        self.assistant_only = assistant_only
        super().__init__(split, tokenizer, sequence_length)

    def read(self, split: Dataset, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
        table = encode_chats(split, tokenizer, self.assistant_only).with_format("arrow")[:]
        stream = TokenStream.of_column(table["input_ids"])
        flat = [pc.cast(chunk.flatten(), "uint8").to_numpy() for chunk in table["labelled"].chunks]
        self.labelled = np.concatenate([*flat, np.zeros(0, dtype=np.uint8)]).astype(bool)
        blocks = max(0, len(stream) - 1) // self.sequence_length
        predicted = self.labelled[1 : 1 + blocks * self.sequence_length].reshape(blocks, self.sequence_length)
        self.counts = predicted.sum(1)  # labels of every block
        self.kept = torch.from_numpy(np.flatnonzero(self.counts))
        if len(stream) and blocks and not len(self.kept):
            raise ValueError(f"the split {split.split} has no block with a token that an assistant wrote: add rows.")
        return stream

    def __len__(self) -> int:
        return len(self.kept)

    def rows(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `TextBlocks.rows`, with -100 for what is no label."""
        rows, length = self.all_rows(numbers), self.sequence_length
        marks = [self.labelled[at + 1 : at + length + 1] for at in (self.kept[numbers] * length).tolist()]
        labels = rows["shift_labels"].masked_fill(~torch.from_numpy(np.stack(marks)), IGNORED)
        return rows | {"shift_labels": labels}

    def places(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.kept[numbers]

    def num_labels(self, numbers: torch.Tensor) -> int:
        return int(self.counts[self.kept[numbers]].sum())
