"""The hop tokenizers: one word one token, the readout token last, and nothing vanishes silently."""

import pytest
from transformers import AutoTokenizer

from data_builders import dataset_tokenizer, hop_tokenizer, load_task


def test_ids_are_specials_then_entities_then_relations():
    tokenizer = hop_tokenizer(20, 4)
    words = ["<pad>", "<eos>", "<ans>", *(f"e{i}" for i in range(20)), *(f"r{i}" for i in range(4))]
    assert tokenizer.convert_ids_to_tokens(list(range(27))) == words
    assert len(tokenizer) == 27
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_a_question_ends_in_the_readout_token():
    tokenizer = hop_tokenizer(20, 4)
    assert tokenizer("e12 r3 r0")["input_ids"] == [3 + 12, 23 + 3, 23 + 0, 2]
    assert tokenizer.decode([15, 26, 23, 2]) == "e12 r3 r0 <ans>"
    assert tokenizer.decode([15, 26, 23, 2], skip_special_tokens=True) == "e12 r3 r0"


def test_padding_goes_to_the_left():
    """So that the readout token is the last of every row."""
    batch = hop_tokenizer(20, 4)(["e1 r0", "e1 r0 r1 r2"], padding=True)
    assert batch["input_ids"] == [[0, 0, 4, 23, 2], [4, 23, 24, 25, 2]]
    assert batch["attention_mask"] == [[0, 0, 1, 1, 1], [1] * 5]


def test_auto_tokenizer_loads_what_is_saved(tmp_path):
    """Two files, no class of ours, hence no remote code."""
    tokenizer = hop_tokenizer(50, 6, max_length=42)
    tokenizer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("e49 r5 r0")["input_ids"] == tokenizer("e49 r5 r0")["input_ids"]
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 42)
    assert (loaded.pad_token, loaded.eos_token) == ("<pad>", "<eos>")
    with pytest.raises(Exception, match="Missing"):
        loaded("e50 r5")


@pytest.mark.parametrize("text", ["e20 r0", "e1 r4", "e1r0", "e1 R0", "e1 r0.", "e01 r0"])
def test_an_unknown_word_raises(text):
    """A peer's tokenizer dropped what it did not know, and answered another question."""
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        hop_tokenizer(20, 4)(text)


def test_dataset_tokenizer_has_a_token_for_every_word(tmp_path):
    khop = load_task("khop", "quickstart", cache_dir=tmp_path)
    assert dataset_tokenizer(khop).get_vocab() == hop_tokenizer(20, 4).get_vocab()
    composition = load_task("composition", "cpu", cache_dir=tmp_path)
    assert dataset_tokenizer(composition).get_vocab() == hop_tokenizer(50, 20).get_vocab()


@pytest.mark.parametrize("sizes", [(0, 4), (20, 0), (-1, 4)])
def test_an_empty_graph_raises(sizes):
    with pytest.raises(ValueError, match="must be >= 1"):
        hop_tokenizer(*sizes)
