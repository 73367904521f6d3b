"""Questions as tokens, for the task `sequence`: what a model reads of a row, and what it is to say.

    after       reads   p p p a a      a model writes the answer after the prompt, and the end-of-text token ends it
                labels  - - a a $
    in_place    reads   p p p          it says the answer at the prompt's own tokens, all at once
                labels  a a a

p is a token of the prompt, a one of the answer, $ the end-of-text token; `-` is no label, or the next token where all
tokens are learnt. A prompt of a chat is what the tokenizer's chat template makes of the messages before the answer.
Legend: N rows, T tokens of one row, M tokens of all rows.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from .chats import Template
from .packing import IGNORED
from .text_batches import LostCharacters, TokenStream, backend_parts

FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "first": Value("int32")})


class Reader(ABC):
    """Rows of a split as tokens.

    Args:
        tokenizer: encodes a prompt as it will be asked, with a token that ends it where it has one.

    Raises:
        ValueError: the tokenizer lacks what the reader needs.
    """

    name: str

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def parts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """(tokens of the prompt, tokens of the answer) of every row, before anything is put after the answer.

        Raises ValueError for a part that the tokenizer has no token for.
        """
        asked = self.tokenizer(list(prompts), split_special_tokens=True, verbose=False)["input_ids"]
        said = self.tokenizer(list(answers), split_special_tokens=True, add_special_tokens=False, verbose=False)
        return list(zip(asked, said["input_ids"], strict=True))

    def question(self, prompt: str) -> list[int]:
        """The tokens of a prompt as it is asked."""
        return self.tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]

    def answer(self, tokens: list[int]) -> str:
        """The text of tokens that a model wrote."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def said(self, prompt: str) -> str:
        """A prompt as people read it."""
        return prompt

    @abstractmethod
    def lay(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int], int]:
        """(tokens that are read, labels, where the answer's labels begin); raises ValueError for what does not fit."""


class AfterPrompt(Reader):
    """The answer comes after the prompt."""

    name = "after"

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, which ends an answer: set one and save it again.")

    def lay(self, prompt, answer):
        whole = [*prompt, *answer, self.tokenizer.eos_token_id]
        return whole[:-1], whole[1:], len(prompt) - 1


def messages_in(prompt: str) -> list[dict] | None:
    """The messages that a prompt is as JSON; None if it is no list of messages."""
    try:
        found = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    right = isinstance(found, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in found
    )
    return found if right else None


class ChatPrompt(AfterPrompt):
    """The answer comes after what the chat template makes of messages; a prompt that is none becomes the user's."""

    name = "chat"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: bool):
        super().__init__(tokenizer)
        self.template, self.messages = Template(tokenizer), messages

    def parts(self, prompts, answers):
        return [self.part(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def asked(self, prompt: str) -> list[dict]:
        """The messages before the answer; a prompt that is no list of messages is a user's."""
        return (messages_in(prompt) if self.messages else None) or [{"role": "user", "content": prompt}]

    def question(self, prompt):
        text = self.template.write(self.asked(prompt), add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def answer(self, tokens):
        return super().answer(tokens).strip()

    def said(self, prompt):
        return " / ".join(f"{message['role']}: {message['content']}" for message in self.asked(prompt))

    def part(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        messages, tokenizer = self.asked(prompt), self.tokenizer
        try:
            asked = self.template.write(messages, add_generation_prompt=True)
            whole = self.template.write([*messages, {"role": "assistant", "content": answer}])
        except Exception as error:  # jinja's, of many kinds; a template raises what it likes
            raise ValueError(f"the chat template refuses it ({error})") from error
        if not whole.startswith(asked):
            raise ValueError("the chat template writes the prompt differently where an answer follows")
        said, ends = whole[len(asked) :], tokenizer.eos_token
        said = said[: said.rindex(ends)] if ends in said else said
        call = {"add_special_tokens": False, "verbose": False}
        return tokenizer(asked, **call)["input_ids"], tokenizer(said, **call)["input_ids"]


class InPlace(Reader):
    """The answer stands at the prompt's own tokens."""

    name = "in_place"

    def lay(self, prompt, answer):
        if len(prompt) != len(answer):
            raise ValueError(
                f"an answer in place has as many tokens as its prompt, and these are {len(answer)} and {len(prompt)}"
            )
        return prompt, answer, 0


def reader_of(tokenizer: PreTrainedTokenizerBase, answers: str = "after", chat: str | None = None) -> Reader:
    """The reader of rows whose answers stand `after` the prompt or `in_place`.

    chat: "messages" if prompts are messages, "prompts" if the chat template writes plain prompts; None: no template.
    """
    if chat is not None:
        return ChatPrompt(tokenizer, chat == "messages")
    return {"after": AfterPrompt, "in_place": InPlace}[answers](tokenizer)


@dataclass(frozen=True)
class EncodedRows:
    """The rows of a split as tokens, mapped into memory.

    Args:
        inputs, labels: streams (M,) with the tokens that are read, and those that come next.
        firsts: (N,), where in each row the labels of the answer begin.
        grades: (N,).
        kinds: N names.
        in_place: answers stand at the tokens of their prompts.
    """

    inputs: TokenStream
    labels: TokenStream
    firsts: np.ndarray
    grades: np.ndarray
    kinds: list[str]
    in_place: bool = False

    def __len__(self) -> int:
        return len(self.firsts)

    @property
    def lengths(self) -> np.ndarray:
        """(N,), tokens that each row reads."""
        return np.diff(self.inputs.starts)

    def row(self, number: int, learn_all: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, labels) (T,) of a row; IGNORED stands before the answer, unless all tokens are learnt."""
        span = self.inputs.starts[number : number + 2]
        labels = self.labels.between(*span).astype(np.int64)
        if not learn_all:
            labels[: self.firsts[number]] = IGNORED
        return self.inputs.between(*span).astype(np.int64), labels

    def types(self, number: int) -> np.ndarray:
        """`token_type_ids` (T,) of a row: 0 for a token of the prompt, 1 for one of the answer."""
        return (np.arange(self.lengths[number]) > self.firsts[number]).astype(np.int64)

    def num_labels(self, learn_all: bool = False) -> np.ndarray:
        """(N,), labels of each row."""
        return self.lengths if learn_all else self.lengths - self.firsts

    def stacked(self, numbers: Sequence[int], learn_all: bool = False) -> dict[str, torch.Tensor]:
        """Rows of one length as {"input_ids", "shift_labels"}, (b, T) long each."""
        inputs, labels = zip(*(self.row(number, learn_all) for number in numbers), strict=True)
        return {"input_ids": torch.from_numpy(np.stack(inputs)), "shift_labels": torch.from_numpy(np.stack(labels))}

    def by_length(self, numbers: Sequence[int], tokens: int) -> list[list[int]]:
        """The rows `numbers` in batches of one length, of about so many tokens each."""
        groups: dict[int, list[int]] = {}
        lengths = self.lengths
        for number in numbers:
            groups.setdefault(int(lengths[number]), []).append(int(number))
        batches = []
        for length, members in sorted(groups.items()):
            size = max(1, tokens // length)
            batches += [members[start : start + size] for start in range(0, len(members), size)]
        return batches


def encode_questions(
    split: Dataset, reader: Reader, longest: int | None = None, limit: str = "longest"
) -> EncodedRows:
    """The rows of a split as tokens; they are written once into the `datasets` cache.

    split: rows with the columns of `sequences.FEATURES`. longest: most tokens that a row may read, which the
    field `limit` says.

    Raises ValueError, with file and line, for a part that the tokenizer has no token for, a prompt or an answer
    without tokens, an answer with a token in it that ends answers or is left out of them, and a row that is too long.
    """
    tokenizer = reader.tokenizer
    stop = tokenizer.eos_token if isinstance(reader, AfterPrompt) else None
    # A template writes special tokens of its own around what is said.
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    unsaid = {} if reader.name == "chat" else special

    lost_of, unknown = LostCharacters(tokenizer), tokenizer.unk_token_id

    def encode(batch: dict) -> dict:
        lost = lost_of(set().union(*batch["prompt"], *batch["answer"]))
        try:
            parts = reader.parts(batch["prompt"], batch["answer"])
        except Exception as error:  # `tokenizers` raises plain Exceptions
            for i, row in enumerate(zip(batch["prompt"], batch["answer"], strict=True)):
                with blamed(split, batch, i):
                    check_known(tokenizer, row)
                    reader.parts(*([part] for part in row))
            raise error
        found = []
        for i, (prompt, answer) in enumerate(parts):
            with blamed(split, batch, i):
                said = batch["answer"][i]
                if stop is not None and (stop in said or tokenizer.eos_token_id in answer):
                    raise ValueError(f"the answer {shown(said)} has the token {stop!r} in it, which ends answers")
                for name, tokens in (("prompt", prompt), ("answer", answer)):
                    if dropped := lost & set(batch[name][i]):
                        raise ValueError(f"the tokenizer has no token for {min(dropped)!r} in {shown(batch[name][i])}")
                    if not tokens:
                        raise ValueError(f"the {name} {shown(batch[name][i])} has no tokens")
                if unknown is not None and unknown in answer:
                    raise ValueError(f"the tokenizer has no token for a part of the answer {shown(said)}")
                if taken := [unsaid[token] for token in answer if token in unsaid]:
                    raise ValueError(
                        f"the answer {shown(said)} has the token {taken[0]!r} in it, which is left out of what is said"
                    )
                ids, labels, first = reader.lay(prompt, answer)
                if longest is not None and len(ids) > longest:
                    raise ValueError(
                        f"prompt and answer have {len(prompt)} and {len(answer)} tokens, and a row may read {longest} "
                        f"({limit})"
                    )
                found.append((ids, labels, first))
        return dict(zip(FEATURES, map(list, zip(*found, strict=True)), strict=True))

    made_of = (
        split._fingerprint, backend_parts(tokenizer), tokenizer.chat_template if reader.name == "chat" else None,
        tokenizer.eos_token, reader.name, longest, "questions 1",
    )  # fmt: skip
    encoded = split.map(
        encode,
        batched=True,
        batch_size=1_000,
        remove_columns=split.column_names,
        features=FEATURES,
        new_fingerprint=Hasher.hash(made_of),
        desc="Tokenize",
    )
    table = encoded.with_format("arrow")[:]
    return EncodedRows(
        TokenStream.of_column(table["input_ids"]),
        TokenStream.of_column(table["labels"]),
        table["first"].to_numpy(),
        np.array(split["grade"][:], dtype=np.int64),
        list(split["kind"][:]),
        reader.name == "in_place",
    )


@contextmanager
def blamed(split: Dataset, batch: dict, i: int) -> Iterator[None]:
    """Within the block, a ValueError gets the place of row `i` of a batch, and the remedy."""
    try:
        yield
    except ValueError as error:
        place = f"split {split.split}, prompt {shown(batch['prompt'][i])}"
        if "source" in batch:
            place = f"{batch['source'][i]}, line {batch['line'][i]}"
        raise ValueError(f"{place}: {error}: correct the row, or take it out.") from error


def check_known(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Raise ValueError for a word that a tokenizer without an unknown token lacks."""
    cut, vocabulary = tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.get_vocab()
    for text in texts:
        for word, _ in cut.pre_tokenize_str(text) if cut else ():
            if word not in vocabulary:
                raise ValueError(
                    f"the tokenizer has no token for {word!r} in {shown(text)}, since no row of the split train has it"
                )


def shown(text: str) -> str:
    said = repr(text)
    return said if len(said) <= 60 else f"{said[:60]} ..."
