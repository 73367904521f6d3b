"""The tokenizers of the tasks.

hops        a token per word, and a readout token at the end, where the answer is read
text        byte-level BPE
molecules   a token per atom, bond, branch or ring bond of a SMILES
sequence    a token per character, per word, or per digit and word; or byte-level BPE
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from datasets.fingerprint import Hasher
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from .hop_rows import hop_table

PAD, EOS, READOUT = "<pad>", "<eos>", "<ans>"
BOS = "<bos>"

# How a question is cut into tokens: every cut, joined again, is the question.
CUTS = {"characters": r"[\s\S]", "digits": r"\d|[^\W\d]+|[\s\S]"}

# The grammar of opensmiles.org, and the arrows of dative bonds that rdkit writes. Tokens of several characters: atoms
# in brackets, elements of two letters, ring bonds of two digits or more, arrows.
LONG_SMILES_TOKEN = r"\[[^\[\]\s]+\]|Br|Cl|%[0-9]{2}|%\([0-9]+\)|->|<-"
# And tokens of one character: atoms without brackets, bonds, branches, the dot between molecules, ring bonds.
SMILES_TOKEN = LONG_SMILES_TOKEN + r"|[BCNOPSFIbcnops*]|[-=#$:/\\]|[().]|[0-9]"
# The pre-tokenizer of `smiles_tokenizer`, as tokenizer.json has it.
SMILES_SPLIT = {"type": "Split", "pattern": {"Regex": SMILES_TOKEN}, "behavior": "Isolated", "invert": False}


HOP_SPECIALS = (PAD, EOS, READOUT)


def hop_tokenizer(
    num_entities: int,
    num_relations: int,
    max_length: int | None = None,
    readout: Literal["token", "last"] = "token",
) -> PreTrainedTokenizerFast:
    """Tokenizer with ids 0 `<pad>`, 1 `<eos>`, 2 `<ans>`, then e0 .. and r0 ..; `AutoTokenizer` loads it once saved.

    `tokenizer("e12 r3 r0")` ends in the readout token `<ans>`: the model's prediction there is the answer. One readout
    token gives what the paper's padding to 50 gives, since that model has no positions and masks pads as keys (Kohli
    et al. 2026, arXiv 2604.07822). With readout "last" nothing is appended, and the answer is the prediction at the
    last relation, so that a long chain begins with the computation of the shorter one.

    Padding goes to the left. Raises ValueError for arguments out of range; the tokenizer raises for an unknown word,
    since there is no `<unk>`.
    """
    if readout not in ("token", "last"):
        raise ValueError(f"readout must be token or last, got {readout!r}.")
    if num_entities < 1 or num_relations < 1:
        raise ValueError(f"num_entities and num_relations must be >= 1, got {num_entities} and {num_relations}.")
    words = [*HOP_SPECIALS, *(f"e{i}" for i in range(num_entities)), *(f"r{i}" for i in range(num_relations))]
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
    """The `hop_tokenizer` of a hop dataset, from the facts in train, which have every entity and every relation.

    Raises ValueError for words other than e0, e1 .. and r0, r1 .., for a train without facts, and as `hop_table`.
    """
    train = hop_table(dataset["train"])
    facts = train.filter(pc.equal(train["hops"], 1))
    words = {word for text in facts["text"].to_pylist() for word in text.split()} | set(facts["answer"].to_pylist())
    odd = sorted(word for word in words if not re.fullmatch("[er](0|[1-9][0-9]{0,6})", word))
    if odd or not words:
        found = f"{odd[0]!r} is no word of a fact" if odd else "the split train has no facts, rows of 1 hop"
        raise ValueError(f"{found}: entities are e0, e1 .., relations r0, r1 .., below 10,000,000.")
    sizes = {kind: 1 + max(int(word[1:]) for word in words if word[0] == kind) for kind in "er"}
    return hop_tokenizer(sizes["e"], sizes["r"], max_length, readout)


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from `texts`: ids 0 `<pad>`, 1 `<eos>`, the 256 bytes, then merges; words as in GPT-2.

    Every text has tokens and decodes to itself. Short texts give a smaller vocabulary than `vocab_size`. The same
    texts give the same tokenizer. Raises ValueError for a vocab_size that has no room for the bytes.
    """
    special = [PAD, EOS]
    check_room(vocab_size, special)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def check_room(vocab_size: int, special: Sequence[str]) -> None:
    """Raise ValueError for a vocab_size that has no room for the bytes and the special tokens."""
    least = len(special) + len(ByteLevel.alphabet())
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least}, got {vocab_size}.")


def dataset_byte_bpe(train: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """`train_byte_bpe` on the column text of a split from the `datasets` cache; the tokenizer is kept beside its file.

    Several processes may build it at once, see `kept_beside`.
    """
    return kept_beside(
        train, f"byte_bpe-{vocab_size}", lambda: train_byte_bpe((row["text"] for row in train), vocab_size)
    )


def kept_beside(split: Dataset, name: str, make: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tokenizer that `make` makes of a split, from the folder `name` beside the file of the split.

    Several processes may build it at once: each has a folder of its own, and the first to finish renames its folder. A
    split that lies in memory keeps none.
    """
    if not split.cache_files:
        return make()
    folder = Path(split.cache_files[0]["filename"]).parent / name
    if not folder.exists():
        tokenizer = make()
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            made = Path(temporary, folder.name)
            tokenizer.save_pretrained(made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was first, with the same tokenizer
                    raise
    return PreTrainedTokenizerFast.from_pretrained(folder)


def sequence_tokenizer(
    texts: Iterable[str], cut: Literal["characters", "words", "digits"], readout: bool = True
) -> PreTrainedTokenizerFast:
    """Tokenizer of questions: ids 0 `<pad>`, 1 `<eos>`, 2 `<ans>`, then the tokens of `texts` in alphabetical order.

    cut         tokens of "add 17, 5"
    characters  a d d _ 1 7 , _ 5        every character
    words       add 17, 5                what stands between white space, which is written as one space
    digits      add _ 1 7 , _ 5          every digit, every other word, every other character

    With `readout`, `tokenizer("17+5")` ends in `<ans>`, after which the answer is written. Padding goes to the left.
    The tokenizer raises for what `texts` do not have, since there is no `<unk>`.
    """
    special = [PAD, EOS, READOUT]
    pre_tokenizer = WhitespaceSplit() if cut == "words" else Split(Regex(CUTS[cut]), "isolated")
    words = {word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text)}
    vocabulary = [*special, *sorted(words - set(special))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizer
    if cut != "words":
        tokenizer.decoder = decoders.Fuse()
    return ended(tokenizer, readout)


def sequence_bpe(texts: Iterable[str], vocab_size: int, readout: bool = True) -> PreTrainedTokenizerFast:
    """`train_byte_bpe` for questions, whose prompts end in `<ans>`: it is the last token of the vocabulary.

    Raises ValueError for a vocab_size that has no room for the bytes and the three special tokens.
    """
    check_room(vocab_size, [PAD, EOS, READOUT])
    tokenizer = train_byte_bpe(texts, vocab_size - 1).backend_tokenizer
    tokenizer.add_special_tokens([READOUT])
    return ended(tokenizer, readout)


def ended(tokenizer: Tokenizer, readout: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with `<pad>`, `<eos>` and `<ans>`, which with `readout` ends a prompt."""
    if readout:
        number = tokenizer.token_to_id(READOUT)
        tokenizer.post_processor = TemplateProcessing(single=f"$A {READOUT}", special_tokens=[(READOUT, number)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[READOUT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def smiles_tokenizer(smiles: Iterable[str], max_length: int | None = None) -> PreTrainedTokenizerFast:
    """One token per atom, bond, branch or ring bond: ids 0 `<pad>`, 1 `<bos>`, 2 `<eos>`, then the tokens of `smiles`
    in alphabetical order. `AutoTokenizer` loads it once saved.

    `tokenizer("C[nH]Cl")` is `<bos> C [nH] Cl`, ready for `generate`; decoded without special tokens it is the same
    SMILES. Padding goes to the left. The tokenizer raises for an atom or a character that `smiles` does not have,
    since there is no `<unk>`.

    Raises ValueError for a character of `smiles` that is in no token of the language.
    """
    special = [PAD, BOS, EOS]
    words = [*special, *sorted(smiles_tokens(smiles))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    # Characters between two tokens become a word of their own, which the vocabulary does not have.
    tokenizer.pre_tokenizer = Split(Regex(SMILES_TOKEN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, words.index(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def dataset_smiles_tokenizer(dataset: DatasetDict, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """The `smiles_tokenizer` of the training molecules; it raises for a token that only held-out molecules have.

    It is kept beside the file of the split train.
    """

    def make() -> PreTrainedTokenizerFast:
        batches = dataset["train"].select_columns("text").iter(batch_size=10_000)
        return smiles_tokenizer((text for batch in batches for text in batch["text"]), max_length)

    return kept_beside(
        dataset["train"], f"smiles-{Hasher.hash((SMILES_TOKEN, max_length, dataset['train']._fingerprint))}", make
    )


def smiles_tokens(smiles: Iterable[str]) -> set[str]:
    """The distinct tokens of SMILES. Raises ValueError for a character that is in no token."""
    long, tokens = re.compile(LONG_SMILES_TOKEN), set()
    for text in smiles:
        tokens.update(long.findall(text))
        rest = set(long.sub("", text))
        unknown = sorted(character for character in rest - tokens if not re.fullmatch(SMILES_TOKEN, character))
        if unknown:
            raise ValueError(f"{unknown[0]!r} in {text!r} is no token of SMILES: take the row out, or correct it.")
        tokens |= rest
    return tokens
