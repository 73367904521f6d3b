"""A tokenizer of transformers as the metadata of a GGUF file: llama.cpp then splits text as the tokenizer does.

Two kinds can be said:

    byte-level BPE     with one of the patterns that llama.cpp knows
    whole words        a token per word, or per piece of a SMILES: user-defined tokens, of which llama.cpp finds the
                       longest in a text first

llama.cpp has no error for a text with a word that it does not know: it leaves the word out, or a part of it.
"""

import json
from dataclasses import dataclass

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from data_builders.tokenizers import SMILES_TOKEN

REMEDY = "export to mlx, which uses the tokenizer itself"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
# How a text is cut before the merges, and whether a cut that is a token is taken whole -> llama.cpp's name. It has
# GPT-2's pattern under several names; under "gpt-2" it takes spaces before full stops out of decoded text.
PATTERNS = {
    (("bytes", True), False): "trillion",
    (("digits", True), ("bytes", True), False): "smollm",
    (("split", LLAMA3), ("bytes", False), True): "llama-bpe",
    (("split", QWEN2), ("bytes", False), False): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Args:
        tokens, kinds: text and type of every id, as many as the model has embeddings.
        merges: of BPE; none for whole words.
        pattern: llama.cpp's name of how a text is cut.
        before, after: ids that the tokenizer puts before and after a text, if any.
        end: ids that end a generation, at least one.
        pad: id of padding, if there is one.
        chat_template: in Jinja, if there is one.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pattern: str
    before: int | None
    after: int | None
    end: list[int]
    pad: int | None
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Every key is written: llama.cpp takes an id of GPT-2 for a token that is not said, and adds it to texts."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pattern)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_array("tokenizer.ggml.merges", self.merges or [""])  # the key must be there, with an entry
        # What llama.cpp puts after a text is its "end of text". A token that asks for the answer is never generated,
        # so that no generation ends on it.
        eos, *others = [*([] if self.after is None else [self.after]), *[i for i in self.end if i != self.after]]
        writer.add_bos_token_id(eos if self.before is None else self.before)
        writer.add_eos_token_id(eos)
        for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
            add(token)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        writer.add_add_bos_token(self.before is not None)
        writer.add_add_eos_token(self.after is not None)
        writer.add_add_space_prefix(False)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def refuse(what: str) -> ValueError:
    return ValueError(f"the tokenizer cannot be written to GGUF: {what}; {REMEDY}.")


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, end: list[int]) -> Vocabulary:
    """What a GGUF file says of a tokenizer.

    Args:
        vocab_size: of the model.
        end: ids that end a generation of the model.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    if not tokenizer.is_fast:
        raise refuse("it has no tokenizer.json")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in parts["added_tokens"]}
    words = parts["model"].get("type") == "WordLevel"
    pattern = pattern_of_words(parts) if words else pattern_of(parts)
    plain = TokenType.USER_DEFINED if words else TokenType.NORMAL
    tokens, kinds = [], []
    texts = {i: text for text, i in tokenizer.get_vocab().items()}
    if texts and max(texts) >= vocab_size:
        raise refuse(f"it has tokens up to {max(texts)}, and the model has vocab_size={vocab_size}")
    for i in range(vocab_size):
        tokens.append(texts.get(i, f"[PAD{i}]"))
        if i not in texts:
            kinds.append(TokenType.UNUSED)
        elif i in added:
            kinds.append(TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED)
        else:
            kinds.append(plain)
    if len(set(tokens)) < len(tokens) or "" in tokens:
        raise refuse("a token has no text, or two have the same")
    if words and any(any(space in text for space in " \t\n") for text in texts.values()):
        raise refuse("a word of it has a space")
    before, after = template_of(tokenizer)
    eos = [tokenizer.eos_token_id] if not end and tokenizer.eos_token_id is not None else end
    if not eos:
        raise refuse("neither it nor the model has an eos_token_id, and llama.cpp would end a text on token 11")
    if len([*eos, *([] if after is None else [after])]) > 3:
        raise refuse(f"the model ends a text on any of {eos}, and llama.cpp on three tokens at most")
    merges = [] if words else [" ".join(merge) for merge in parts["model"]["merges"]]
    return Vocabulary(
        tokens, [int(kind) for kind in kinds], merges, pattern, before, after, eos, tokenizer.pad_token_id,
        tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )  # fmt: skip


def pattern_of_words(parts: dict) -> str:
    """A name of llama.cpp's, where the longest word first is what the tokenizer finds in a text of known words.

    It is, where words are cut at spaces, since no word within another is longer than it; and in SMILES.
    """
    step = parts["pre_tokenizer"] or {"type": "none"}
    if step["type"] != "WhitespaceSplit" and kind_of(step) != ("split", SMILES_TOKEN):
        raise refuse("its words are cut neither at spaces nor as SMILES")
    return "trillion"


def pattern_of(parts: dict) -> str:
    """llama.cpp's name of how a byte-level BPE cuts a text."""
    model, normalizer = parts["model"], parts["normalizer"]
    known = {"dropout": None, "unk_token": None, "byte_fallback": False}
    if model.get("type") != "BPE" or any(model.get(name, value) not in (value, None) for name, value in known.items()):
        raise refuse(f"it is neither byte-level BPE nor a list of words ({model.get('type')})")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise refuse("its tokens carry marks of where a word begins or ends")
    step = parts["pre_tokenizer"] or {"type": "none"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    key = (*map(kind_of, steps), bool(model.get("ignore_merges")))
    if normalizer is not None and (normalizer["type"] != "NFC" or PATTERNS.get(key) != "qwen2"):
        raise refuse(f"it changes the text first ({normalizer['type']})")
    if key not in PATTERNS:
        raise refuse("llama.cpp does not know how it cuts a text into words")
    return PATTERNS[key]


def kind_of(step: dict) -> tuple:
    """A step of cutting a text, as PATTERNS has it."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(regex)}:
            return "bytes", regex
        case {"type": "Digits", "individual_digits": True}:
            return "digits", True
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return "split", regex
    return step["type"], None


def template_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The ids that the tokenizer puts before and after a text, None where it puts none."""
    ids = tokenizer.encode("")
    word = next(text for text, i in tokenizer.get_vocab().items() if i not in tokenizer.all_special_ids)
    bare = tokenizer.encode(word, add_special_tokens=False)
    whole = tokenizer.encode(word)
    for start in range(len(whole) - len(bare) + 1):
        before, after = whole[:start], whole[start + len(bare) :]
        if whole[start : start + len(bare)] == bare and [*before, *after] == ids and max(len(before), len(after)) < 2:
            return (before or [None])[0], (after or [None])[0]
    raise refuse("it puts more than a token before or after a text")
