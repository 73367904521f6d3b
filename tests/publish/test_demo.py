"""The page with the loop slider: what it is made of, what it computes, and what a visitor sees of it."""

import ast
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import SpaceCard
from playwright.sync_api import Page, expect, sync_playwright

from data_builders import dataset_tokenizer, load_task
from data_builders.tokenizers import smiles_tokenizer, train_byte_bpe
from looplab.cli import main
from looplab.publish import demo
from looplab.runs.folder import open_run
from looplab.tasks.hops.rows import load_run_task
from toy_runs import written_run
from toys import FP32, ROOT, make_model

CHROMIUM = shutil.which("chromium")
KHOP = {"num_entities": 6, "num_relations": 3, "train_hops": 3, "max_hops": 5}
KHOP |= {"train_per_hop": 20, "gate_per_hop": 5, "test_per_hop": 5}
COMPOSITION = {"num_entities": 12, "num_relations": 4, "out_degree": 3, "ood_share": 0.3, "phi": 1.0}
COMPOSITION |= {"id_holdout": 0.2, "pair_holdout": 0.0}
SUMMARY = {"parameters": 51264, "trained_hops": [1, 2, 3], "trained_loops": {"minimum": 1, "maximum": 4, "mean": 2}}
SMILES = ["CCO", "c1ccccc1", "CC(=O)N"]

app = demo.load_app(demo.TEMPLATES)


def write_run(folder, data, tokenizer, **sizes):
    sizes = {"num_core_layers": 1, "residual_init": "normal", "vocab_size": len(tokenizer), **sizes}
    for saved in (make_model(**sizes), tokenizer):
        saved.save_pretrained(folder / "model")
    written_run(folder, {"name": folder.name, "data": data}, summary=SUMMARY)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of models with random weights: khop, composition, molecules, text."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config, overrides, readout in (
        ("khop", "quickstart", KHOP, "last"),
        ("composition", "cpu", COMPOSITION, "token"),
    ):
        data = {"task": name, "config": config, "seed": 0, "overrides": overrides}
        task = load_task(name, config, seed=0, **overrides)
        write_run(folder / name, data, dataset_tokenizer(task, readout=readout))
    for name in ("molecules", "text"):
        write_run(folder / name, {"task": name}, smiles_tokenizer(SMILES))
    return folder


def settings_of(runs, *names):
    return demo.demo_parts([open_run(runs / name) for name in names], [f"user/{name}" for name in names])


# ---- the files


@pytest.mark.parametrize(("name", "overrides"), [("khop", KHOP), ("composition", COMPOSITION)])
def test_every_chain_of_the_data_follows_from_the_published_facts(runs, name, overrides):
    hops = settings_of(runs, name)["hops"]
    assert len(hops["facts"]) == overrides["num_entities"]
    task = load_run_task(open_run(runs / name))
    for split in task:
        for row in task[split]:
            path = app.follow(hops["facts"], row["text"].split())
            assert path == [f"e{entity}" for entity in row["path"]]
            assert path[-1] == row["answer"]
    assert hops["max_hops"] == max(task["test"]["hops"])
    assert hops["chance"] == 1 / len(set(task["train"]["answer"]))


def test_sliders_go_beyond_the_training_as_far_as_the_model_can(runs, tmp_path):
    hops = settings_of(runs, "khop")["hops"]
    assert (hops["trained_loops"], hops["max_loops"], hops["trained_hops"]) == ([1, 4], 8, [1, 3])
    run = Path(shutil.copytree(runs / "khop", tmp_path / "khop"))
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps(config | {"max_num_loops": 5}))
    assert settings_of(tmp_path, "khop")["hops"]["max_loops"] == 5


def test_halting_is_as_chosen_on_validation_rows_or_fits_the_vocabulary(runs, tmp_path):
    """The paper's bound of 3 nats halted the quickstart model at its second loop: of 27 words, none is less sure."""
    halting = settings_of(runs, "khop")["hops"]["halting"]
    assert halting["rule"] == "kl_entropy"
    assert halting["max_entropy"] == pytest.approx(
        3.0 * torch.log(torch.tensor(3 + 6 + 3)) / torch.log(torch.tensor(217))
    )
    run = Path(shutil.copytree(runs / "khop", tmp_path / "khop"))
    rows = [
        {"measure": "chosen", "rule": rule, "kl_threshold": 0.1, "max_entropy": 0.5} for rule in ("kl", "kl_entropy")
    ]
    (run / "halting.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen = {"rule": "kl_entropy", "kl_threshold": 0.1, "max_entropy": 0.5}
    assert settings_of(tmp_path, "khop")["hops"]["halting"] == chosen


def test_the_space_is_four_files_without_a_gap(runs):
    files = demo.space_files(
        [open_run(runs / name) for name in ("khop", "molecules")], ["user/hops", "user/molecules"]
    )
    assert set(files) == {"app.py", "requirements.txt", "README.md", "demo.json"}
    assert "{{" not in files["README.md"]
    card = SpaceCard(files["README.md"]).data.to_dict()
    assert card["models"] == ["user/hops", "user/molecules"]
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py")
    assert "51,264 parameters" in files["README.md"]
    assert files == demo.space_files(
        [open_run(runs / name) for name in ("khop", "molecules")], ["user/hops", "user/molecules"]
    )


def test_the_space_names_the_gradio_that_is_tested():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["gradio"] == demo.GRADIO


def test_the_app_needs_no_more_than_its_requirements(runs):
    """A Space has its own files and pip packages, nothing of this project."""
    files = demo.space_files([open_run(runs / "molecules")], ["user/molecules"])
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in ast.walk(ast.parse(files["app.py"]))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    required = set(re.findall(r"^[a-z]+", files["requirements.txt"], flags=re.M))
    assert imported - set(sys.stdlib_module_names) == required


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["text", "text"], "is a second run on text"),
        (["khop", "composition"], "is a second run on hops"),
        (["none"], "there is no run folder"),
    ],
)
def test_a_run_that_cannot_be_shown_is_refused(runs, capfd, monkeypatch, names, problem):
    monkeypatch.delattr(demo, "load_app")  # or a page that should not be there would be served for ever
    assert main(["demo", *(str(runs / name) for name in names)]) == 2
    assert problem in capfd.readouterr().err


def test_the_command_serves_the_page_it_wrote(runs, tmp_path, monkeypatch, capfd):
    """With a page of three lines in place of the real one, which `served` runs as the Hub does."""
    templates = Path(shutil.copytree(demo.TEMPLATES, tmp_path / "space"))
    toy = "CSS, THEME = 'css', 'theme'\nclass make_page:\n"
    toy += "    def __init__(self, folder): self.names = sorted(path.name for path in folder.iterdir())\n"
    toy += "    def launch(self, **options): print(self.names, options)\n"
    (templates / "app.py").write_text(toy)
    monkeypatch.setattr(demo, "TEMPLATES", templates)
    assert main(["demo", str(runs / "khop"), "--port", "8000"]) == 0
    said = capfd.readouterr().out
    assert "['README.md', 'app.py', 'demo.json', 'requirements.txt']" in said
    assert "{'server_port': 8000, 'css': 'css', 'theme': 'theme'}" in said
    (templates / "app.py").write_text("import gradio_that_is_not_there")
    assert main(["demo", str(runs / "khop")]) == 2
    assert "a package is missing (No module named 'gradio_that_is_not_there')" in capfd.readouterr().err


# ---- what it computes

KINDS = {
    "plain": {},
    "prelude_and_coda": {"num_prelude_layers": 1, "num_coda_layers": 1},
    "streams": {"loop_connection": "hyper", "num_streams": 2, "max_num_loops": 8},
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make_model(vocab_size=3 + 6 + 3, residual_init="normal", **KINDS[request.param])


def test_a_row_is_the_model_run_so_many_loops(model):
    ids = torch.tensor([[3, 10, 9, 11]])
    said = app.probabilities(model, ids, 5)
    for loops in range(1, 6):
        with torch.no_grad():
            alone = model(ids, num_loops=loops).logits[0].softmax(-1)
        torch.testing.assert_close(said[loops - 1], alone, **FP32)


@pytest.mark.parametrize("name", ["khop", "composition"])
def test_an_answer_is_read_at_the_last_word_and_the_lens_at_every_one(runs, name):
    """Loop by loop, word by word, against a forward for each."""
    hops = settings_of(runs, name)["hops"]
    model, tokenizer = app.load(str(runs / name / "model"))
    words = app.random_question(hops["facts"], 2, random.Random(0))
    result = app.answer(model, tokenizer, hops["facts"], words, 4)
    ids = tokenizer(" ".join(words), return_tensors="pt")["input_ids"]
    path = app.follow(hops["facts"], words)
    assert result.path == path
    assert result.columns == path[1:] + path[-1:] * (name == "composition")  # there <ans> is a word of its own
    assert result.used == 4
    for loop in range(4):
        with torch.no_grad():
            said = model(ids, num_loops=loop + 1).logits[0].softmax(-1)
        assert result.says[loop] == tokenizer.decode(said[-1].argmax())
        assert result.sure[loop] == pytest.approx(float(said[-1].max()), abs=1e-5)
        wanted = [
            float(said[i, tokenizer.convert_tokens_to_ids(entity)]) for i, entity in enumerate(result.columns, start=1)
        ]
        assert result.lens[loop] == pytest.approx(wanted, abs=1e-5)


def test_halting_is_that_of_generate(runs):
    facts = settings_of(runs, "khop")["hops"]["facts"]
    model, tokenizer = app.load(str(runs / "khop" / "model"))
    words = app.random_question(facts, 3, random.Random(1))
    used = set()
    for kl in (0.0, 1e-3, 1e-2, 1e-1, 10.0):
        halting = {"rule": "kl_entropy", "kl_threshold": kl, "max_entropy": 3.0}
        result = app.answer(model, tokenizer, facts, words, 6, halting)
        inputs = tokenizer(" ".join(words), return_tensors="pt")
        output = model.generate(**inputs, num_loops=6, halting=halting, max_new_tokens=1, return_dict_in_generate=True)
        assert result.used == output.loops_used.item()
        assert result.says[result.used - 1] == tokenizer.decode(output.sequences[0, -1])
        used.add(result.used)
    assert {2, 6} <= used


# ---- questions


@pytest.mark.parametrize("name", ["khop", "composition"])
def test_a_random_question_is_a_chain_of_the_graph_and_keeps_its_beginning(runs, name):
    facts = settings_of(runs, name)["hops"]["facts"]
    for seed in range(20):
        draw = random.Random(seed)
        words = app.random_question(facts, 4, draw)
        assert len(app.follow(facts, words)) == 5
        longer = app.random_question(facts, 6, draw, words)
        assert longer[:5] == words
        assert len(app.follow(facts, longer)) == 7
        assert app.random_question(facts, 2, draw, words) == words[:3]
        assert app.random_question(facts, 2, draw, [words[0], "r77"])[0] == words[0]


def test_a_question_that_leads_nowhere_says_where_it_could(runs):
    facts = {"e0": {"r0": "e1", "r2": "e0"}, "e1": {"r0": "e0"}}
    with pytest.raises(ValueError, match=r"From e1 there is no relation r2; there are r0\."):
        app.follow(facts, ["e0", "r0", "r2"])
    with pytest.raises(ValueError, match="at least one relation to follow, such as r0"):
        app.follow(facts, ["e0"])
    assert app.random_question({"e0": {"r0": "e1"}}, 5, random.Random(0)) == ["e0", "r0"]  # a dead end


HOPS = app.Hops("m", "", {"e0": {"r0": "e0"}}, (1, 3), (1, 4), 5, 8, 0.25, {"rule": "kl_entropy"})


@pytest.mark.parametrize(
    ("start", "relations", "sentence"),
    [
        ("e0", "r0 " * 6, "Follow at most 5 relations, got 6."),
        ("e0", "r0 " * 10**6, "Write at most 1000 characters, got 3000000."),
        ("e0", "r" * 1001, "Write at most 1000 characters, got 1001."),
        ("e9", "r0", "There is no entity e9 to start at."),
        (None, "r0", "There is no entity None to start at."),
        (["e0"], "r0", "There is no entity ['e0'] to start at."),
    ],
)
def test_a_question_longer_than_the_page_offers_is_refused(start, relations, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        app.read_question(HOPS, start, relations)
    assert app.read_question(HOPS, "e0", " r0 " * 5) == ["e0"] + ["r0"] * 5
    assert app.read_question(HOPS, "e0", None) == ["e0"]  # which `follow` refuses


@pytest.mark.parametrize("number", [0, -1, 9, 10**9, float("nan"), float("inf"), None, "3", "x" * 1000, [3], 0.5])
def test_a_number_beyond_its_slider_is_refused(number):
    with pytest.raises(ValueError, match="Loops go from 1 to 8, got ") as error:
        app.whole("Loops", number, 8)
    assert len(str(error.value)) < 60
    assert [app.whole("Loops", each, 8) for each in (1, 3.0, 8)] == [1, 3, 8]


# ---- what is shown


def make_answer(used: int = 2) -> object:
    return app.Answer(
        ["e0", "e1", "e<2>"], ["e0", "e1", "e<2>"], [0.2, 0.5, 1.0], ["e1", "e<2>"], [[0.0, 1.0]] * 3, used
    )


@pytest.mark.parametrize(("trained", "lines"), [(1, 1), (2, 1), (3, 0), (9, 0)])
@pytest.mark.parametrize("table", ["answers_html", "lens_html"])
def test_a_table_has_a_row_per_loop_and_a_line_where_training_ended(table, trained, lines):
    page = getattr(app, table)(make_answer(), trained)
    assert re.findall(r'scope="row">(\d+)', page) == ["1", "2", "3"]
    assert page.count('class="ended"') == lines
    assert page.count('class="unused"') == 1
    assert "e<2>" not in page
    if lines:
        assert page.index(f'scope="row">{trained}<') < page.index('class="ended"') < page.index(f'">{trained + 1}<')


def test_the_verdict_is_of_the_loop_where_it_stopped():
    hops = app.Hops("m", "", {}, (1, 3), (1, 4), 5, 8, 0.25, {"rule": "kl_entropy"})
    stopped = app.verdict_html(make_answer(2), True, hops)
    assert "<b>e1</b> (50 %): but it is e&lt;2&gt;" in stopped
    assert "2 of 3 loops used" in stopped
    ended = app.verdict_html(make_answer(3), True, hops)
    assert "did not settle: all 3 loops used" in ended
    assert '(100 %): <span class="right">right' in ended
    assert "3 loops used. Guessing is right in 25 %" in app.verdict_html(make_answer(3), False, hops)


def test_notes_say_how_far_a_wrong_answer_is():
    assert "hop 1 of 2" in app.note(["e0", "e1", "e2"], "e1")
    assert "right" in app.note(["e0", "e1", "e2"], "e2")
    assert app.note(["e0", "e1", "e2"], "e5") == ""
    assert "right" in app.note(["e0", "e1", "e0"], "e0")  # a path may come by its answer earlier


# ---- molecules


def test_molecules_are_written_at_any_loop_count(runs):
    model, tokenizer = app.load(str(runs / "molecules" / "model"))
    torch.manual_seed(0)
    one = app.write_molecules(model, tokenizer, 1, number=3)
    torch.manual_seed(0)
    assert app.write_molecules(model, tokenizer, 1, number=3) == one
    torch.manual_seed(0)
    assert app.write_molecules(model, tokenizer, 6, number=3) != one
    assert len(one) == 3
    assert not any("<" in smiles for smiles in one)


@pytest.fixture(scope="module")
def writer():
    """A model of text that is sure of nothing, and its tokenizer."""
    tokenizer = train_byte_bpe(["the cat and the dog, the cat"] * 3, 270)
    sizes = {"num_core_layers": 1, "residual_init": "normal", "initializer_range": 0.4, "max_num_loops": 8}
    return make_model(**sizes, loop_connection="hyper", num_streams=2, vocab_size=len(tokenizer)).eval(), tokenizer


@pytest.mark.parametrize("loops", [1, 4, 8])
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.5, "seed": 3}, {"halting": {"rule": "kl", "kl_threshold": 0.1}}]
)
def test_a_text_is_what_generate_writes(writer, loops, how):
    model, tokenizer = writer
    written = app.write_text(model, tokenizer, "the cat", loops, 12, **how)
    start = tokenizer("the cat", return_tensors="pt")
    extra = {"do_sample": True, "temperature": 1.5, "top_k": 0} if "seed" in how else {"do_sample": False}
    extra |= {"halting": how["halting"]} if "halting" in how else {}
    torch.manual_seed(how.get("seed", 0))
    tokens = {"max_new_tokens": 12, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    output = model.generate(**start, num_loops=loops, **tokens, return_dict_in_generate=True, **extra)
    text = tokenizer.decode(output.sequences[0, start["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(written.pieces) == text
    assert written.used == output.loops_used[0].tolist()
    assert all(0 < share <= 1 for share in written.sure)
    page = app.text_html("the <cat>", written)
    assert "the &lt;cat&gt;" in page
    assert page.count('class="token"') == sum(bool(piece) for piece in written.pieces)


@pytest.mark.parametrize("loops", [2, 4, 8])
def test_drafts_write_the_same_text_with_the_same_probabilities(writer, loops):
    model, tokenizer = writer
    plain, drafted = (app.write_text(model, tokenizer, "the", loops, 20, drafts=drafts) for drafts in (False, True))
    assert plain.pieces == drafted.pieces
    assert plain.sure == pytest.approx(drafted.sure, abs=1e-4)
    assert "drafted tokens were right" in drafted.drafts


def test_what_cannot_be_written_is_said(writer):
    model, tokenizer = writer
    for problem, arguments in (
        ("Write a beginning of 1 to", ("", 4, 5)),
        ("Write a beginning of 1 to", ("the " * 240, 4, 5)),
        ("at most 1000 characters", ("t" * 1001, 4, 5)),
        ("choose one of the two", ("the", 4, 5, 0.0, 0, {"rule": "kl", "kl_threshold": 0.1}, True)),
        ("two loops or more", ("the", 1, 5, 0.0, 0, None, True)),
    ):
        with pytest.raises(ValueError, match=problem):
            app.write_text(model, tokenizer, *arguments)


def test_the_page_has_a_tab_for_text_and_names_the_project(runs, tmp_path):
    files = demo.space_files([open_run(runs / name) for name in ("khop", "text")], ["user/hops", "user/text"])
    settings = json.loads(files["demo.json"])
    assert "looped-transformers" in settings["project"]
    assert "{" not in settings["project"]
    text = app.Text(**settings["text"])
    assert (text.max_loops, tuple(text.trained_loops)) == (8, (1, 4))
    assert "not calibrated" in text.halting_info
    run = Path(shutil.copytree(runs / "text", tmp_path / "text"))
    open_run(run).save_generation_settings(calibrated_halting={"rule": "kl", "kl_threshold": 0.25})
    part = demo.demo_parts([open_run(run)], ["user/text"])["text"]
    assert part["halting"] == {"rule": "kl", "kl_threshold": 0.25}
    assert "looped halting --save" in part["halting_info"]


@pytest.mark.parametrize("hops", [3, 12, 24, 60])
def test_no_head_of_many_hops_is_wider_than_its_column(hops):
    """Above 24 columns, every tenth has a number; every cell still tells its entity."""
    names = [f"e{number}" for number in range(hops)]
    result = app.Answer(["e0", *names], ["e0"] * 3, [0.5] * 3, names, [[0.5] * hops] * 3, 3)
    page = app.lens_html(result, 3)
    heads = re.findall(r'<th scope="col" title="e\d+">(.*?)</th>', page)
    assert heads == (names if hops <= 24 else ["" if hop % 10 else str(hop) for hop in range(1, hops + 1)])
    assert page.count("<td style=") == 3 * hops
    assert page.count('title="e59: 50 %"') == (3 if hops == 60 else 0)


def test_a_molecule_is_drawn_and_another_text_is_not():
    page = app.molecules_html(["CCO", "C(", "", "c1ccccc1"])
    assert "2 of 4 are valid molecules" in page
    assert page.count("<svg") == 2
    assert page.count("not a molecule") == 2


def test_without_rdkit_molecules_are_text(monkeypatch):
    monkeypatch.setattr(app, "Chem", None)
    page = app.molecules_html(["CCO", "C("])
    assert "rdkit is not installed" in page
    assert "<svg" not in page


# ---- the page, served


@pytest.fixture(scope="module")
def served(runs, tmp_path_factory):
    """The address of the page, run as the Hub runs it: `python app.py` in a folder of four files."""
    folder = tmp_path_factory.mktemp("space")
    demo.write_space([open_run(runs / name) for name in ("khop", "molecules", "text")], folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while "Running on local URL" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "the page did not come up"
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def call(address: str, name: str, *arguments) -> list:
    """What an event handler of the page returns, over HTTP as a browser asks."""
    url = f"{address}/gradio_api/call/{name}"
    request = urllib.request.Request(
        url, json.dumps({"data": arguments}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{url}/{event}", timeout=60) as response:
        event, data = response.read().decode().strip().splitlines()[-2:]
    assert event == "event: complete", data
    return json.loads(data.removeprefix("data: "))


@pytest.mark.slow
def test_a_space_answers(served, runs):
    words = app.random_question(settings_of(runs, "khop")["hops"]["facts"], 4, random.Random(0))
    path, verdict, answers, lens = call(served, "ask", words[0], " ".join(words[1:]), 6, True)
    assert "The true path, 4 hops" in path
    assert "It says" in verdict
    assert answers.count('scope="row"') == lens.count('scope="row"') == 6
    assert "beyond the 4 loops of the training" in answers
    problem, *rest = call(served, "ask", words[0], "r0 r9", 6, True)
    assert "there is no relation r9" in problem
    assert rest == ["", "", ""]
    problem, *rest = call(served, "ask", words[0], "r0 " * 300, 6, True)
    assert "Follow at most 5 relations, got 300." in problem
    assert rest == ["", "", ""]


@pytest.fixture
def browser():
    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, who runs CI.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def set_number(page: Page, label: str, value: int) -> None:
    number = page.get_by_label(f"number input for {label}")
    number.fill(str(value))
    number.press("Enter")


def fits(page: Page) -> bool:
    """Whether nothing has to be scrolled sideways, neither the page nor anything of ours in it."""
    return page.evaluate(
        "() => [document.documentElement, ...document.querySelectorAll('.looped, .looped table, .looped .cards')]"
        ".every(element => element.scrollWidth <= Math.min(element.clientWidth, innerWidth))"
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [375, 1280], ids=["phone", "desktop"])
def test_a_visitor_moves_the_sliders(served, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    problems = []
    page.on("pageerror", lambda problem: problems.append(problem))
    page.goto(served)
    rows = page.locator(".answers tbody th")
    expect(rows).to_have_count(4)  # the loops of the training
    expect(page.locator(".answers .ended")).to_have_count(0)
    set_number(page, "Loops", 8)
    expect(rows).to_have_count(8)
    expect(page.locator(".lens tbody th")).to_have_count(8)
    expect(page.locator(".answers .ended")).to_be_visible()
    page.get_by_label("Halting").check()
    expect(page.get_by_text(re.compile("It halted|did not settle"))).to_be_visible()
    set_number(page, "Hops", 5)
    expect(page.get_by_text("The true path, 5 hops")).to_be_visible()
    expect(page.locator(".path .node")).to_have_count(6)
    assert fits(page)
    question = page.get_by_label("and follow these relations")
    before = question.input_value()
    while question.input_value() == before:  # a random question may come twice
        page.get_by_role("button", name="Random question").click()
        page.wait_for_timeout(200)
    question.fill("r0 r0")
    question.press("Enter")
    expect(page.get_by_text("The true path, 2 hops")).to_be_visible()
    expect(page.get_by_label("number input for Hops")).to_have_value("2")
    question.fill("r0 <b>")
    question.press("Enter")
    expect(page.get_by_text("there is no relation <b>")).to_be_visible()
    page.get_by_role("tab", name="Molecules").click()
    page.get_by_role("button", name="Write 12 molecules").click()
    expect(page.locator(".cards .card")).to_have_count(12)
    assert fits(page)
    assert problems == []
