"""Word-level tokenizers of the hop tasks: one token per entity and relation, one where the answer is read."""

from typing import Literal

import pyarrow.compute as pc
from datasets import DatasetDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
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
