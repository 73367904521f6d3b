"""Multiple-choice benchmarks in the files that are published, of words that a toy tokenizer knows."""

import gzip
import json

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from data_builders import MultipleChoice
from toys import SIZES

WORDS = ["<pad>", "<eos>", "Question:", "Answer:", *(f"w{i}" for i in range(SIZES["vocab_size"] - 4))]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def words(rng, number: int) -> str:
    return " ".join(f"w{i}" for i in rng.integers(len(WORDS) - 4, size=number))


def write_requests(path, documents):
    """Lines as in the published files: one per choice, then the same without the question."""
    path.parent.mkdir(parents=True)
    lines = []
    for offset in (0, 1_000_000):
        for i, document in enumerate(documents):
            for idx, choice in enumerate(document["choices"]):
                text = document["query"] if offset == 0 else "Answer:"
                line = {"doc": {**document, "query": text}, "request": {"context": text, "continuation": f" {choice}"}}
                lines.append(json.dumps({**line, "idx": idx, "doc_id": i + offset}))
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def write_benchmarks(folder) -> None:
    """12 validation and 9 test questions of every benchmark; question 0 of test is question 3 of validation."""
    for config in MultipleChoice.builder_configs.values():
        rng = np.random.default_rng(7)
        for split, rows in (("validation", 12), ("test", 9)):
            documents = [
                {
                    "query": config.prefix + words(rng, 4) + config.suffix,
                    "choices": [words(rng, length) for length in rng.permutation([1, 2, 3, 5])],
                    "gold": int(rng.integers(4)),
                }
                for _ in range(rows)
            ]
            if split == "validation":
                shared = documents[3]
            else:
                documents[0] = shared
            write_requests(folder / config.file(split), documents)
