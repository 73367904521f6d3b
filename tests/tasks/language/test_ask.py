"""`looped ask` on text and molecules: what is written, how sure the model was, and how it is laid out."""

import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_builders.tokenizers import train_byte_bpe
from looplab.cli import main
from looplab.runs.folder import open_run
from looplab.runs.models import load_run_model
from looplab.tasks.language.ask import SURE, Written, pieces_of, side_by_side
from modeling_looped import looped
from toy_runs import failure

QUESTION = {"text": "reads the", "molecules": "CC"}


def asked(capfd, *line) -> str:
    capfd.readouterr()
    assert main(["ask", *map(str, line)]) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("task", QUESTION)
def test_the_columns_are_what_the_model_writes(toy_runs, capfd, task):
    """A twin without a cache, a token at a time."""
    said = asked(capfd, toy_runs / task, QUESTION[task], "--loops", "1", "3", "--new-tokens", "6")
    model, tokenizer = load_run_model(open_run(toy_runs / task))
    columns = [line for line in said.splitlines() if line][2:]
    second = columns[0].index("3 loops")
    for num_loops, where in ((1, slice(0, second)), (3, slice(second, None))):
        ids, sure = tokenizer(QUESTION[task], return_tensors="pt")["input_ids"], []
        length = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                p = model(ids, num_loops=num_loops, use_cache=False).logits[0, -1].softmax(-1)
            sure.append(p.max().log())
            ids = torch.cat([ids, p.argmax()[None, None]], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
        shown = "".join(line[where] for line in columns[1:] if not set(line) <= set(" .^"))
        assert "".join(text.split()) in "".join(shown.split())
        if text:
            assert f"{100 * torch.stack(sure).mean().exp():.0f} % sure" in shown


def test_what_is_said_is_the_same_every_time_and_follows_the_seed(toy_runs, capfd):
    line = [toy_runs / "text", "a", "--temperature", "2", "--seed"]
    first, again, other = (asked(capfd, *line, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert "\033" not in first


@pytest.mark.parametrize("task", QUESTION)
def test_loop_counts_are_those_that_the_model_may_run(toy_runs, capfd, task):
    heads = re.findall(r"(\d+) loops?\b", asked(capfd, toy_runs / task, QUESTION[task], "--new-tokens", "1"))
    assert heads == (["1", "2", "4"] if task == "text" else ["1", "2", "4", "8"])  # the toy text has max_num_loops=4


def test_any_looped_model_with_a_tokenizer_is_asked(toy_runs, tmp_path, capfd):
    shutil.copytree(toy_runs / "text" / "model", tmp_path / "saved")
    assert "2 loops" in asked(capfd, tmp_path / "saved", "a")
    with looped(AutoModelForCausalLM.from_pretrained(toy_runs / "llama"), window=(1, 2)) as model:
        model.save_pretrained(tmp_path / "frozen")
    AutoTokenizer.from_pretrained(toy_runs / "llama", trust_remote_code=False).save_pretrained(tmp_path / "frozen")
    assert "8 loops" in asked(capfd, tmp_path / "frozen", "e1 r1", "--new-tokens", "2")
    assert "give a text to go on from" in failure(capfd, "ask", tmp_path / "saved")
    assert "no text to go on from" in failure(capfd, "ask", tmp_path / "saved", "")
    assert "positions" in failure(capfd, "ask", tmp_path / "saved", "reads " * 5000)


def test_a_character_of_several_tokens_is_one_piece():
    tokenizer = train_byte_bpe(["ab"], 258)
    tokens = tokenizer("aé€b")["input_ids"]
    assert len(tokens) == 7
    pieces = pieces_of(tokenizer, tokens, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert pieces == (["a", "é", "€", "b"], [0.9, 0.7, 0.4, 0.3])


TEXTS = (
    "word " * 20,
    "wordwithoutanyspaceinitatallwhichislong" * 3,
    "two\nlines\n\n",
    "日本語のテキスト" * 5,
    "e\u0301" * 30,
    "",
    "\x1b[31m\a",
)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("colour", [False, True])
def test_columns_fit_the_terminal_and_hold_all_of_the_text(width, count, colour):
    written = [
        Written(number + 1, list(TEXTS[number]), [((7 * i) % 11) / 10 for i in range(len(TEXTS[number]))])
        for number in range(count)
    ]
    lines = side_by_side("prompt", written, width, colour)
    plain = [re.sub(r"\033\[\d+m", "", line) for line in lines]
    assert all("\x1b" not in line and "\a" not in line for line in plain)
    for line in plain[3:]:
        taken = sum(2 if "\u3000" <= c <= "\u9fff" or "\uff00" <= c <= "\uffef" else c != "\u0301" for c in line)
        assert taken <= width
    for each in written:
        assert sum(f"{each.num_loops} loop" in line for line in plain) == 1
        for character in set(each.text) - set(" \n\x1b\a"):
            assert any(character in line for line in plain)


def test_marks_and_colours_say_the_same():
    written = [Written(1, ["sure", " half", " not"], [0.95, 0.6, 0.1])]
    assert side_by_side("p", written, 80, False)[3:6] == ["1 loop", "sure half not", "    .....^^^^"]
    line = side_by_side("p", written, 80, True)[4]
    (_, _, half), (_, _, least) = SURE[1:]
    assert (line.count(half), line.count(least)) == (len(" half"), len(" not"))
