"""Tokenizers: word-level for the hop tasks, with one token where the answer is read, and byte-level BPE for text."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

PAD, EOS, READOUT = "<pad>", "<eos>", "<ans>"


def hop_tokenizer(
    num_entities: int,
    num_relations: int,
    max_length: int | None = None,
    readout: Literal["token", "last"] = "token",
) -> PreTrainedTokenizerFast:
    """Tokenizer with ids 0 `<pad>`, 1 `<eos>`, 2 `<ans>`, then e0 .. and r0 ..; `AutoTokenizer` loads what it saves.

    `tokenizer("e12 r3 r0")` ends in the readout token `<ans>`: the model's prediction there is the answer. One readout
    token equals the paper's padding to 50 (no positions, pads masked as keys; Kohli et al. 2026, arXiv 2604.07822).
    With readout "last" nothing is appended, and the answer is the prediction at the last relation: the beginning of a
    chain is then the very computation that answers the shorter chain.
    Padding goes to the left. A word that is not in the vocabulary raises (it has no `<unk>` to hide behind).
    """
    if readout not in ("token", "last"):
        raise ValueError(f"readout must be token or last, got {readout!r}.")
    if num_entities < 1 or num_relations < 1:
        raise ValueError(f"num_entities and num_relations must be >= 1, got {num_entities} and {num_relations}.")
    words = [PAD, EOS, READOUT, *(f"e{i}" for i in range(num_entities)), *(f"r{i}" for i in range(num_relations))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if readout == "token":
        tokenizer.post_processor = TemplateProcessing(
            single=f"$A {READOUT}", special_tokens=[(READOUT, words.index(READOUT))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[READOUT],
        padding_side="left",
        model_max_length=max_length,
    )


def dataset_tokenizer(
    dataset: DatasetDict, max_length: int | None = None, readout: Literal["token", "last"] = "token"
) -> PreTrainedTokenizerFast:
    """The `hop_tokenizer` of a hop dataset: train holds every fact, hence every entity and every relation in use."""
    train = dataset["train"].with_format("arrow")[:]
    facts = train.filter(pc.equal(train["hops"], 1))
    words = {word for text in facts["text"].to_pylist() for word in text.split()} | set(facts["answer"].to_pylist())
    sizes = {kind: 1 + max(int(word[1:]) for word in words if word[0] == kind) for kind in "er"}
    return hop_tokenizer(sizes["e"], sizes["r"], max_length, readout)


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from `texts`: ids 0 `<pad>`, 1 `<eos>`, the 256 bytes, then merges; words as in GPT-2.

    Any text has tokens, and decodes to itself. Texts too short for so many merges give a smaller vocabulary.
    Deterministic. Raises ValueError for a vocab_size that has no room for the bytes.
    """
    special = [PAD, EOS]
    alphabet = ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise ValueError(f"vocab_size must be at least {len(special) + len(alphabet)}, got {vocab_size}.")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def dataset_byte_bpe(train: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """`train_byte_bpe` on the column text of a split from the `datasets` cache, kept beside its file."""
    folder = Path(train.cache_files[0]["filename"]).parent / f"byte_bpe-{vocab_size}"
    if not folder.exists():
        tokenizer = train_byte_bpe((row["text"] for row in train), vocab_size)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
