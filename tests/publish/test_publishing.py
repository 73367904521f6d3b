"""Publishing, against a Hub of our own that speaks the protocol (hub_server.py): what is sent, and what others get.

The run is twenty steps of the smoke recipe. Fresh processes use the public settings of huggingface_hub: HF_ENDPOINT,
HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_HUB_DISABLE_XET.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import jinja2
import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from card_rules import card_problems
from data_builders.builders import BUILDERS
from hub_server import READ_TOKEN, TOKEN, USER, LocalHub
from looplab.cli import main
from looplab.publish import cards, publishing
from looplab.publish.cards import model_card, render
from looplab.publish.publishing import publish
from looplab.runs.folder import open_run
from looplab.runs.models import load_run_model
from looplab.tasks.card import Names
from looplab.tasks.hops import records as hop_records
from looplab.tasks.hops.results import depth_facts
from looplab.tasks.hops.rows import load_run_task
from looplab.tasks.molecules.evaluation import evaluate_run
from looplab.tasks.molecules.records import MOLECULES
from looplab.tasks.molecules.sizes import Sizes
from looplab.tasks.registry import TASKS
from looplab.tasks.text.records import PERPLEXITY
from modeling_looped import LoopedConfig
from toys import ROOT, SIZES, shipped_with

# huggingface_hub 2.4 sends large files in a way that its httpx2 no longer likes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
    pytest.mark.slow,
]

GUIDE = (ROOT / "docs" / "guides" / "publish.md").read_text()
REPO = f"{USER}/tiny-khop"
SHIPPED = shipped_with("configuration_looped", "modeling_looped") | {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("publishing")


@pytest.fixture(scope="module")
def hops(trained, home):
    """A run on chains with everything that belongs to it, and some that does not."""
    run = trained.copy(home, "hops")
    assert main(["eval", str(run), "--loops", "1", "2", "5", "--max-loops", "6"]) == 0
    assert main(["plot", str(run)]) == 0
    for stray in ("notes.txt", "model/.env", "model/secret.py", "figures/me.png", "run.log"):
        (run / stray).write_text("nobody's business")
    return run


@pytest.fixture(scope="module")
def text(trained, home):
    """A run on text files."""
    run = trained.copy(home, "text")
    assert main(["eval", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def smiles(trained, home):
    """A run on molecules, each of 20 samples at 1 and 3 loops."""
    run = trained.copy(home, "molecules", "--optim.lr=1e-2", "--max_steps=60", "--check_every=1000")
    evaluate_run(open_run(run), limit=20, loops=[1, 3], sizes=Sizes(batch=20, max_tokens=40, reference=0))
    return run


@pytest.fixture
def run(hops, tmp_path):
    """A copy of the run on chains, to change."""
    return Path(shutil.copytree(hops, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))


@pytest.fixture
def hub(tmp_path):
    hub = LocalHub(tmp_path / "hub")
    yield hub
    hub.close()


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=TOKEN)


def writes(hub: LocalHub) -> list[str]:
    return [line for line in hub.requests if re.match("PUT|POST .*/(commit|create|collections)", line)]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, flags=re.S)


# ---- cards


@pytest.mark.parametrize("which", ["hops", "text", "smiles"])
def test_a_card_says_what_the_files_of_the_run_say(which, request):
    run = open_run(request.getfixturevalue(which))
    card = str(model_card(run, Names(REPO, "mit", dataset_id=REPO, data_licence="mit")))
    assert card_problems(card, "model") == []
    results = ModelCard(card).data.eval_results
    summary, recipe = run.summary(), run.recipe()
    facts = [f"{summary['parameters']:,}", summary["commit"], summary["hardware"]["cpu"], f"`{run.task()}`"]
    facts += [f"{summary['steps']:,} of {recipe['batch_size']} rows", f"{summary['tokens']:,} tokens"]
    low, high = run.trained_loops()
    facts.append(f"Loops in training: {low} to {high}, {summary['trained_loops']['mean']:.1f} on average")
    assert [fact for fact in facts if fact not in card] == []
    if which == "hops":
        assert f"Hops in training: 1 to {max(summary['trained_hops'])}." in card
        assert card.count(f"{100 * run.read(hop_records.EVALUATION)['chance']:.1f} %") == 2
        for row in run.read(hop_records.GRID):
            assert re.search(rf"\| {row['split_kind']} \| {row['hops']}\*? \|.* {100 * row['accuracy']:.1f} \|", card)
    elif which == "smiles":
        found = {result.metric_type: result for result in results}
        shown = found["validity"].metric_args["num_loops"]
        for row in run.read(MOLECULES):
            if (row["setting"], row["loops"]) == ("T0.8-top40", shown):
                assert found["validity"].metric_value == pytest.approx(row["validity"]["share"], abs=1e-4)
            assert re.search(rf"`{row['setting']}` \|.* {100 * row['validity']['share']:.1f} \[", card)
        assert "Measured on at most 20 samples" in card
    else:
        for row in run.read(PERPLEXITY):
            assert f"| {row['perplexity']:.2f} | " in card
        [result] = results
        [own] = [row for row in run.read(PERPLEXITY) if row["loops"] == result.metric_args["num_loops"]]
        assert result.metric_value == pytest.approx(own["perplexity"], abs=1e-3)


@pytest.mark.parametrize("which", ["hops", "text", "smiles"])
def test_the_example_of_a_card_runs(which, request, capsys):
    folder = request.getfixturevalue(which)
    card = str(model_card(open_run(folder), Names(REPO, "mit")))
    [block] = python_blocks(card)
    capsys.readouterr()  # what a training printed, if this test is the first to need the run
    exec(compile(block.replace(REPO, str(folder / "model")), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) >= 2
    if which == "hops":
        assert f"It prints\n\n```text\n{printed}```" in card


@pytest.mark.parametrize("said", ["a", "```", "1 ```py\nx\n```\n````", "``", ""])
def test_what_a_card_prints_is_one_block(said):
    lines = cards.fenced(f"1 a\n{said}", "text").split("\n")
    fence = lines[-1]
    assert set(fence) == {"`"}
    assert lines[0] == f"{fence}text"
    assert "\n".join(lines[1:-1]) == f"1 a\n{said}"
    assert not any(fence in line for line in lines[1:-1])


PLACEHOLDERS = r"\[More|TODO|COMMIT|\bNone\b|\bnan\b|\{\{|<your|unknown"


def check_order(card: str) -> None:
    """Picture, three numbers and lines of code lead; tables are folded; nothing is left to fill in."""
    metadata, text = card.split("\n---\n", 1)
    assert len(metadata.splitlines()) <= 60
    lead, _ = text.split("<details>", 1)
    picture, numbers, words, code = (
        lead.index(mark) for mark in ("![", "| :---: | :---: | :---: |", ".\n", "```python")
    )
    assert picture < numbers < words < code
    assert len(python_blocks(lead)[0].splitlines()) <= 13
    assert "| --- |" not in re.sub(r"<details>.*?</details>", "", text, flags=re.S)
    assert card.count("<details>") == card.count("</details>") == card.count("</summary>\n\n")
    assert not re.search(PLACEHOLDERS, text)
    assert "```bibtex\n@article{" in text


@pytest.mark.parametrize("which", ["hops", "text", "smiles"])
def test_a_card_leads_with_what_a_reader_looks_for(which, request):
    folder = request.getfixturevalue(which)
    assert main(["plot", str(folder)]) == 0
    check_order(str(model_card(open_run(folder), Names(REPO, "mit", space_id=REPO))))


def test_a_card_links_to_what_there_is(hops, monkeypatch):
    addresses = {"Repository": "https://example.org/code", "Documentation": "https://example.org/docs"}
    monkeypatch.setattr(cards, "project_links", addresses.copy)
    card = str(model_card(open_run(hops), Names(REPO, "mit", dataset_id=REPO, data_licence="mit", space_id=REPO)))
    for address in (*addresses.values(), f"https://huggingface.co/spaces/{REPO}"):
        assert f"]({address})" in card
    assert "huggingface.co" not in str(model_card(open_run(hops), Names(REPO, "mit")))


@pytest.mark.parametrize(
    ("config", "papers"),
    [
        ({}, {"2604.07822"}),
        ({"loop_connection": "inject_add"}, {"2604.07822"}),
        ({"kv_sharing": "gated"}, {"2605.07721"}),
        ({"kv_sharing": "mean"}, {"2604.07822"}),
        ({"loop_connection": "hyper", "kv_sharing": "gated"}, {"2604.21254", "2605.07721"}),
        ({"exit_gate": True}, {"2510.25741"}),
        ({"loop_connection": "disco"}, {"2607.00341"}),
    ],
)
def test_a_card_cites_the_papers_of_its_system(config, papers):
    """By the fields of a real config.json, as CITATION.cff has them."""
    fields = LoopedConfig(**SIZES | config).to_dict()
    entries = cards.bibtex(cards.systems_of(fields))
    assert {re.search(r"eprint = \{(.*)\}", entry)[1] for entry in entries} == papers


def test_the_papers_are_those_of_the_citation_file():
    """Title, authors and number, each way."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    numbers = {paper["url"].rpartition("/")[2]: paper for paper in cited}
    entries = (cards.TEMPLATES / "papers.bib").read_text().strip().split("\n\n")
    assert len(entries) == len(numbers)
    for number, paper in numbers.items():
        [entry] = cards.bibtex([number])
        field = dict(re.findall(r'(\w+) = [{"](.*)[}"],?$', entry, flags=re.M))
        assert (field["title"].replace("\\", ""), field["url"], field["year"][2:]) == (
            paper["title"], paper["url"], number[:2],
        )  # fmt: skip
        names = [author.get("family-names") or author["name"] for author in paper["authors"]]
        assert re.sub("[{}]", "", field["author"]).split(" and ") == names


def test_results_are_means_of_the_grid(hops):
    run = open_run(hops)
    results = model_card(run, Names(REPO, "mit")).data.eval_results
    assert {(r.dataset_type, r.dataset_config, r.dataset_split) for r in results} == {("khop", "quickstart", "test")}
    assert {result.metric_args["num_loops"] for result in results} == {depth_facts(run)["loops"]}
    found = {result.metric_args["split_kind"]: result for result in results}
    assert set(found) == {"id", "ood"}
    loops = [row for row in run.read(hop_records.LOOPS) if row["split"] == "test" and row["split_kind"] == "ood"]
    rows = [row["accuracy"] for row in loops if row["loops"] == depth_facts(run)["loops"]]
    assert found["ood"].metric_value == pytest.approx(sum(rows) / len(rows), abs=1e-4)
    assert found["ood"].metric_args["hops"] == "4 to 8"


def test_a_limited_evaluation_says_so(run):
    (run / "evaluation.json").write_text(json.dumps({"chance": 0.125, "limit": 3}))
    assert "Measured on at most 3 questions per hop count and kind" in str(
        model_card(open_run(run), Names(REPO, "mit"))
    )


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'name' is undefined"):
        render("model_card.md", metadata="license: mit")


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (lambda card: card.replace("license: mit", "license: my own"), "license 'my own' is not one of the Hub's"),
        (lambda card: card.replace("value: 0.", "value: .nan # "), "no finite value"),
        (lambda card: card + "{{ hops }}", "'{{' was left"),
        (
            lambda card: card.replace("pipeline_tag: text-generation", "pipeline_tag: thinking"),
            "pipeline_tag 'thinking'",
        ),
        (lambda card: card.replace("---\n", "", 1), "there is no metadata block"),
        (lambda card: card.replace(f"- {REPO}", "- a/b/c"), "datasets: Repo id"),
    ],
)
def test_the_rules_find_what_is_wrong(hops, broken, problem):
    card = str(model_card(open_run(hops), Names(REPO, "mit", dataset_id=REPO, data_licence="mit")))
    assert any(problem in found for found in card_problems(broken(card), "model"))


# ---- what is refused, and what is sent


@pytest.mark.parametrize(
    ("data", "made_from"),
    [
        ({"task": "khop", "config": "cpu"}, ("khop", "cpu", {"seed": 3})),
        ({"task": "khop", "config": "cpu", "overrides": {"seed": 4}}, ("khop", "cpu", {"seed": 4})),
        ({"task": "text"}, ("text", "corpus", {"seed": 3})),
        ({"task": "text", "files": ["a.txt"]}, ("text", "files", {"seed": 3, "files": ["a.txt"]})),
        (
            {"task": "text", "overrides": {"dataset": {"path": "x"}}},
            ("text", "files", {"seed": 3, "dataset": {"path": "x"}}),
        ),
        ({"task": "molecules", "config": "moses"}, ("molecules", "moses", {"seed": 3})),
    ],
)
def test_published_data_are_those_of_the_recipe(tmp_path, data, made_from):
    recipe = {"data": {"seed": 3, "config": "cpu", "overrides": {}, "files": None} | data}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    section = TASKS[data["task"]].Data.of(open_run(tmp_path))
    assert (section.task, *section.preset()) == made_from


def test_a_dry_run_prints_every_file_and_sends_nothing(hops, hub, capsys):
    quiet = HfApi(endpoint=hub.url, token=False)
    assert publish(open_run(hops), REPO, dataset=True, space=True, private=True, dry_run=True, api=quiet) == {}
    assert hub.requests == []
    out = capsys.readouterr().out
    assert f"{hub.url}/{REPO}  (private)" in out
    assert f"{hub.url}/datasets/{REPO}  (private)" in out
    for name in SHIPPED:
        assert f"{(hops / 'model' / name).stat().st_size:>13,} {name}\n" in out
    assert f"{(hops / 'grid.jsonl').stat().st_size:>13,} run/grid.jsonl\n" in out
    assert "collection  tiny-khop  of these 3" in out
    assert "once its settings have a secret HF_TOKEN" in out
    tag = publishing.revision_of(hops / "model" / name for name in SHIPPED)
    shown = re.findall(r"^----- README.md of the (\w+), its card -----\n(.*?)\n----- the end", out, flags=re.M | re.S)
    assert [(kind, card_problems(card, kind)) for kind, card in shown] == [
        ("dataset", []), ("model", []), ("space", []),
    ]  # fmt: skip
    names = Names(REPO, "apache-2.0", REPO, "apache-2.0", space_id=REPO, revision=tag)
    assert shown[1][1] == str(model_card(open_run(hops), names)).strip("\n")


def test_what_was_announced_is_what_arrives_and_nothing_else(hops, hub, api, capsys):
    commits = publish(open_run(hops), REPO, dataset=True, api=api)
    out = capsys.readouterr().out
    for kind in ("model", "dataset"):
        files = hub.files(kind, REPO)
        announced = re.findall(r"^ +([\d,]+) (\S+)$", out.split(f"\n{kind} ")[1].split(" bytes in ")[0], flags=re.M)
        assert {path: len(content) for path, content in files.items() if path != ".gitattributes"} == {
            path: int(size.replace(",", "")) for size, path in announced
        }
        assert card_problems(files["README.md"].decode(), kind) == []
        assert hub.repositories[kind, REPO].commits[-1][0] == commits[kind]
        assert len(hub.repositories[kind, REPO].commits) == 2  # what the Hub made, and ours: never half of it
    files = hub.files("model", REPO)
    names = [record.name for record in hop_records.RECORDS]
    names += [*publishing.TRAINED, "run.json", "records/index.json"]
    records = {f"run/{name}" for name in names if (hops / name).exists()}
    figures = {f"figures/{name}.png" for name in ("grid", "loops", "hops", "training")}
    assert set(files) == SHIPPED | records | figures | {"README.md", ".gitattributes"}
    assert files["model.safetensors"] == (hops / "model" / "model.safetensors").read_bytes()
    linked = re.findall(r"\]\((figures/[^)]*)\)", files["README.md"].decode())
    assert set(linked) == figures
    [collection] = hub.collections.values()
    assert [(item["type"], item["id"]) for item in collection["items"]] == [("dataset", REPO), ("model", REPO)]


def test_the_space_is_the_page_and_names_the_published_model(hops, hub, api):
    publish(open_run(hops), REPO, dataset=True, space=True, api=api)
    files = hub.files("space", REPO)
    assert set(files) == {".gitattributes", "README.md", "app.py", "requirements.txt", "demo.json"}
    assert files["app.py"] == (ROOT / "hub_cards" / "space" / "app.py").read_bytes()
    assert json.loads(files["demo.json"])["hops"]["model"] == REPO
    assert card_problems(files["README.md"].decode(), "space") == []
    assert f"models:\n- {REPO}\n" in files["README.md"].decode()
    [collection] = hub.collections.values()
    assert [item["type"] for item in collection["items"]] == ["dataset", "model", "space"]


def test_publishing_again_changes_nothing(hops, hub, api):
    first = publish(open_run(hops), REPO, dataset=True, space=True, api=api)
    hub.requests.clear()
    assert publish(open_run(hops), REPO, dataset=True, space=True, api=api) == first
    assert not any(re.match("PUT|POST .*/commit/", line) for line in hub.requests)
    assert list(hub.repositories["model", REPO].tags.values()) == [first["model"]]


def test_what_an_earlier_publication_left_goes_and_what_others_put_there_stays(run, hub, api):
    """An old model.safetensors beside new shards would be what `from_pretrained` loads."""
    publish(open_run(run), REPO, api=api)
    others = {"LICENSE": b"mine", "adapters/mine.safetensors": b"mine"}
    mine = [CommitOperationAdd(path, content) for path, content in others.items()]
    api.create_commit(REPO, mine, commit_message="mine")
    weights = load_file(run / "model" / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for shard in set(names.values()):
        tensors = {name: weights[name] for name in weights if names[name] == shard}
        save_file(tensors, run / "model" / shard, metadata={"format": "pt"})
    (run / "model" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (run / "model" / "model.safetensors").unlink()
    (run / "figures" / "grid.png").unlink()
    publish(open_run(run), REPO, api=api)
    files = hub.files("model", REPO)
    assert {path for path in files if path.endswith(".safetensors")} == {*names.values(), "adapters/mine.safetensors"}
    assert "model.safetensors.index.json" in files
    assert "figures/grid.png" not in files
    assert {path: files[path] for path in others} == others


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda run: (run / "evaluation.json").unlink(), "has no evaluation.json: run `looped eval"),
        (lambda run: (run / "grid.jsonl").unlink(), "has no grid.jsonl: run `looped eval"),
        (lambda run: (run / "summary.json").unlink(), "the training has not finished"),
        (lambda run: change_recipe(run, init_from="runs/other/model"), "name it by --license"),
        (lambda run: change_recipe(run, task="chess"), "there is no task 'chess'"),
        (lambda run: (run / "recipe.yaml").write_text("name: frozen"), "has no data.task"),
    ],
)
def test_a_run_that_is_not_ready_is_refused_before_anything_is_sent(run, hub, api, breakage, message):
    breakage(run)
    with pytest.raises(ValueError, match=re.escape(message)):
        publish(open_run(run), REPO, dataset=True, api=api)
    assert writes(hub) == []


def test_a_model_links_to_the_one_it_started_from(hops, hub, api):
    change_recipe(hops, init_from="runs/other/model")
    publish(open_run(hops), REPO, licence="mit", base_model="user/other", api=api)
    assert ModelCard(hub.files("model", REPO)["README.md"].decode()).data.base_model == "user/other"
    with pytest.raises(ValueError, match="--base-model must be USER/NAME, got 'other'"):
        publish(open_run(hops), REPO, licence="mit", base_model="other", dry_run=True)
    change_recipe(hops, init_from=None)
    with pytest.raises(ValueError, match="started from no other weights: leave --base-model out"):
        publish(open_run(hops), REPO, base_model="user/other", dry_run=True)


def change_recipe(run: Path, task: str | None = None, **values):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | values
    recipe["data"]["task"] = task or recipe["data"]["task"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_data_that_no_builder_made_are_not_published(hops, monkeypatch):
    monkeypatch.delitem(BUILDERS, open_run(hops).task())
    with pytest.raises(ValueError, match="what a builder made, and the task khop has none: leave it out"):
        publish(open_run(hops), REPO, dataset=True, dry_run=True)


def test_text_is_not_published_under_a_licence_that_nobody_named(text, hub, api):
    """Nor does its card say in which folder of this machine it lay."""
    with pytest.raises(ValueError, match="name it by --dataset-license"):
        publish(open_run(text), REPO, dataset=True, api=api)
    assert hub.requests == []
    publish(open_run(text), REPO, dataset=True, data_licence="cc0-1.0", api=api)
    card = hub.files("dataset", REPO)["README.md"].decode()
    assert "license: cc0-1.0" in card
    assert "documents of one long file may go to different splits" in " ".join(card.split())
    assert "| files | *.txt |" in card
    assert str(text.parent) not in card
    assert "license: apache-2.0" in hub.files("model", REPO)["README.md"].decode()


def test_no_token_and_a_wrong_one_are_one_sentence_before_any_work(hops, hub, monkeypatch):
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    monkeypatch.setattr(publishing, "model_upload", lambda *_: pytest.fail("it worked before it asked for the token"))
    with pytest.raises(ValueError, match="no token for the Hub: run `hf auth login`"):
        publish(open_run(hops), REPO, api=HfApi(endpoint=hub.url))
    assert hub.requests == []
    with pytest.raises(ValueError, match="the Hub does not know this token"):
        publish(open_run(hops), REPO, api=HfApi(endpoint=hub.url, token="wrong"))
    with pytest.raises(ValueError, match="this token may only read"):
        publish(open_run(hops), REPO, api=HfApi(endpoint=hub.url, token=READ_TOKEN))
    with pytest.raises(ValueError, match="the token is for tester, team, and --repo-id names somebody"):
        publish(open_run(hops), "somebody/khop", api=HfApi(endpoint=hub.url, token=TOKEN))
    assert writes(hub) == []


def test_every_option_of_the_command_counts(hops, hub, monkeypatch, capfd):
    monkeypatch.setattr(publishing, "HfApi", partial(HfApi, endpoint=hub.url, token=TOKEN))
    options = ["--dataset", "--space", "--private", "--license", "mit", "--dataset-license", "cc0-1.0"]
    assert main(["publish", str(hops), "--repo-id", "team/khop", *options]) == 0
    licences = {"model": "mit", "dataset": "cc0-1.0", "space": "apache-2.0"}
    for kind, licence in licences.items():
        assert hub.repositories[kind, "team/khop"].private
        assert f"license: {licence}\n" in hub.files(kind, "team/khop")["README.md"].decode()
    [collection] = hub.collections.values()
    assert collection["private"]
    capfd.readouterr()
    assert main(["publish", str(hops), "--repo-id", "somebody/khop"]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("looped publish: the token is for tester, team, and --repo-id names somebody")


@pytest.mark.parametrize("repo_id", ["khop", "a/b/c", "me/k hop"])
def test_a_repo_id_must_have_a_user(hops, api, hub, repo_id):
    with pytest.raises(ValueError, match=r"must be USER/NAME|[Rr]epo id"):
        publish(open_run(hops), repo_id, api=api)
    assert hub.requests == []


def test_what_is_private_never_goes_to_a_public_repository(hops, hub, api):
    api.create_repo(REPO, repo_type="dataset")
    with pytest.raises(ValueError, match=f"the dataset {REPO} exists and is public"):
        publish(open_run(hops), REPO, dataset=True, private=True, api=api)
    assert ("model", REPO) not in hub.repositories
    publish(open_run(hops), f"{USER}/hidden", dataset=True, private=True, api=api)
    assert all(hub.repositories[kind, f"{USER}/hidden"].private for kind in ("model", "dataset"))
    with pytest.raises(HfHubHTTPError, match="404"):
        HfApi(endpoint=hub.url, token=False).model_info(f"{USER}/hidden")


# ---- accidents on the way


def test_an_upload_that_broke_off_is_resumed_and_sends_nothing_twice(hops, hub, api):
    hub.fail_once(r"POST /api/models/.*/commit/", "refuse")
    with pytest.raises(HfHubHTTPError):
        publish(open_run(hops), REPO, api=api)
    assert set(hub.files("model", REPO)) == {".gitattributes"}  # not half of it
    sent = [line for line in hub.requests if line.startswith("PUT")]
    assert len(sent) == 5  # weights and four figures
    hub.requests.clear()
    publish(open_run(hops), REPO, api=api)
    assert not [line for line in hub.requests if line.startswith("PUT")]
    assert set(hub.files("model", REPO)) > SHIPPED


def test_bytes_that_change_on_the_way_up_are_not_published(run, hub, api, monkeypatch):
    """The file is rewritten between its hash and its sending, as a training that still runs would do."""
    weights = run / "model" / "model.safetensors"
    sent = HfApi.preupload_lfs_files

    def late(self, *args, additions, **kwargs):
        for addition in additions:
            assert addition.upload_info.sha256
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        return sent(self, *args, additions=additions, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", late)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'"):
        publish(open_run(run), REPO, api=api)
    assert set(hub.files("model", REPO)) == {".gitattributes"}


def test_a_hub_that_is_not_there_is_one_sentence(hops):
    with pytest.raises(ValueError, match=r"cannot be reached .*: run the same command again later"):
        publish(open_run(hops), REPO, api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))


@pytest.fixture
def published(hops, hub, api):
    """The model of the run, and where it can be loaded from: keywords of huggingface_hub's downloads."""
    publish(open_run(hops), REPO, api=api)
    return hops / "model" / "model.safetensors"


def test_a_download_that_breaks_off_is_completed(published, hub, tmp_path):
    hub.fail_once(r"GET /cdn/", "break off")
    got = hf_hub_download(REPO, "model.safetensors", endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() == published.read_bytes()
    assert len([line for line in hub.requests if line.startswith("GET /cdn/")]) == 2


def test_a_download_of_another_size_raises_and_leaves_nothing(published, hub, tmp_path):
    hub.fail_once(r"GET /cdn/", "shorten")
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(REPO, "model.safetensors", endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    got = hf_hub_download(REPO, "model.safetensors", endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() == published.read_bytes()


def test_a_flipped_bit_is_found_by_verification(published, hub, api, tmp_path):
    """A download is compared by size, not by hash: that is what `hf cache verify` is for (docs/guides/publish.md)."""
    where = {"cache_dir": tmp_path / "cache"}
    snapshot_download(REPO, endpoint=hub.url, **where)
    assert api.verify_repo_checksums(REPO, **where).mismatches == []
    shutil.rmtree(tmp_path / "cache")
    hub.fail_once(r"GET /cdn/" + sha256(published), "flip")
    snapshot_download(REPO, endpoint=hub.url, **where)
    [wrong] = api.verify_repo_checksums(REPO, **where).mismatches
    assert wrong["path"] == "model.safetensors"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what others get


def commands_of_the_guide(run: Path) -> list[list[str]]:
    """The command lines of docs/guides/publish.md, of this run and the user of the tests."""
    lines = "".join(re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.S)).splitlines()
    return [line.replace("runs/quickstart", str(run)).replace("user/khop", REPO).split() for line in lines]


def test_the_guide_begins_with_commands_that_send_nothing(hops, capsys):
    measure, draw, show = commands_of_the_guide(hops)[:3]
    # The fixture has run these two.
    assert [measure, draw] == [["looped", "eval", str(hops)], ["looped", "plot", str(hops)]]
    assert main(show[1:]) == 0
    assert f"{hops}: nothing is sent, this is what would be" in capsys.readouterr().out


STRANGER = """
import json, os, re, sys, warnings
warnings.simplefilter("error")
sys.path = [p for p in sys.path if "site-packages" in p or "lib/python" in p]  # no working folder, no checkout
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]  # nor an editable install
repo, revision, code, *blocks = sys.argv[1:]
from datasets import load_dataset
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import modeling_looped
    raise SystemExit("the repository is importable: the test shows nothing")
except ModuleNotFoundError:
    pass
pinned = {"revision": revision, "code_revision": code, "trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(repo, **pinned)
tokenizer = AutoTokenizer.from_pretrained(repo, **pinned)
batch = tokenizer(["e1 r1 r0", "e3 r1"], return_tensors="pt", padding=True)
tokens = {n: model.generate(**batch, num_loops=n, max_new_tokens=2, do_sample=False).tolist() for n in (1, 3, 6)}
data = load_dataset(repo, "quickstart")
report = {"tokens": tokens, "rows": {name: len(rows) for name, rows in data.items()}, "row": data["test"][-1]}
report["snapshot"] = sorted(os.listdir(snapshot_download(repo, revision=revision)))
for block in blocks:
    exec(compile(block, "block", "exec"), {})
print(json.dumps(report))
"""


def settings_of(hub: LocalHub, home: Path) -> dict[str, str]:
    """What a user sets for another Hub than huggingface.co, and for a home of the tests' own."""
    settings = {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    return settings | {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}


def finish(command: list[str], **more) -> subprocess.CompletedProcess:
    """Run a command that must succeed; what it prints is kept."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **more)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done


def stranger(home: Path, hub: LocalHub, *arguments: str, **more: str) -> dict:
    """What a fresh process without this repository gets: the last line it prints, and the lines before."""
    output = finish([sys.executable, "-c", STRANGER, *arguments], cwd=home, env=settings_of(hub, home) | more).stdout
    *printed, report = output.strip().splitlines()
    return json.loads(report) | {"printed": printed}


ALONE = STRANGER.partition("repo, revision")[0]  # imports nothing of this repository


def test_the_lines_of_the_card_load_a_pinned_model_without_a_warning(hops, hub, api, tmp_path):
    """As printed. Without their `revision`, transformers warns of files of code; a later commit changes nothing."""
    publish(open_run(hops), REPO, api=api)
    card = hub.files("model", REPO)["README.md"].decode()
    api.create_commit(REPO, [CommitOperationAdd("modeling_looped.py", b"raise SystemExit(1)")], commit_message="break")
    [block] = python_blocks(card)
    done = finish([sys.executable, "-c", ALONE + block], cwd=tmp_path, env=settings_of(hub, tmp_path))
    assert f"```text\n{done.stdout}```" in card
    assert "new version of the following files" not in done.stderr
    api.create_commit(
        REPO, [CommitOperationAdd("modeling_looped.py", hops / "model" / "modeling_looped.py")], commit_message="mend"
    )
    unpinned = re.sub(r', revision="model-[0-9a-f]{8}"', "", block)
    assert unpinned != block
    done = finish([sys.executable, "-c", ALONE + unpinned], cwd=tmp_path, env=settings_of(hub, tmp_path / "new"))
    assert "new version of the following files" in done.stderr


TUNING = """
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from data_builders import DepthSampler, LoopCollator
from looplab.publish.trainer import LoopedTrainer as Trainer
import modeling_looped, sys
folder, repo_id, collates = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer("e1 r1 r0")["input_ids"]
rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 8)
collate = lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
if collates == "loops":
    collate = LoopCollator(DepthSampler("uniform", minimum=1, maximum=5, seed=0), collate)
settings = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "report_to": []}
arguments = TrainingArguments("tuned", hub_model_id=repo_id, use_cpu=True, disable_tqdm=True, **settings)
given = {"processing_class": tokenizer} if collates == "loops" else {}
trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate, **given)
trainer.train()
trainer.push_to_hub()
trainer.push_to_hub(license="mit", dataset="user/rows", blocking=False)
"""


@pytest.mark.parametrize("collates", ["loops", "rows"])
def test_a_trainer_pushes_the_same_card(hops, hub, tmp_path, collates):
    """What is on it is what the Trainer knows; its lines run as printed, with and without a tokenizer."""
    settings = settings_of(hub, tmp_path) | {"HF_TOKEN": TOKEN}
    finish([sys.executable, "-c", TUNING, str(hops / "model"), REPO, collates], cwd=tmp_path, env=settings)
    files = hub.files("model", REPO)
    card = files["README.md"].decode()
    check_order(card)
    assert card_problems(card, "model") == []
    data = ModelCard(card).data
    assert (data.license, data.datasets, data.base_model) == ("mit", ["user/rows"], None)
    assert re.findall(r"\]\((figures/[^)]*)\)", card) == ["figures/training.png"] == [n for n in files if "png" in n]
    assert ("Loops in training: 1 to 5, 3.0 on average" in card) == (collates == "loops")
    assert str(tmp_path) not in card
    [block] = python_blocks(card)
    done = finish([sys.executable, "-c", ALONE + block], cwd=tmp_path, env=settings_of(hub, tmp_path / "new"))
    assert len(done.stdout.splitlines()) == 3
    assert "new version of the following files" not in done.stderr


def test_what_is_published_works_where_this_repository_does_not_exist(hops, hub, api, tmp_path):
    """By repo id, revision and code revision, as docs/guides/publish.md and the card say; then without a network.

    The newest commit of the model has code that does not run: who pinned the code does not meet it.
    """
    *_, command, verify = commands_of_the_guide(hops)
    settings = settings_of(hub, tmp_path) | {"HF_TOKEN": TOKEN}
    settings["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)
    printed = finish([sys.executable, "-m", "looplab.cli", *command[1:]], cwd=ROOT, env=settings).stdout
    revision = re.search(rf"model +{hub.url}/{REPO} at commit (\w+)", printed)[1]
    broken = [CommitOperationAdd("modeling_looped.py", b"raise SystemExit('not this one')")]
    newest = api.create_commit(REPO, broken, commit_message="break").oid

    blocks = python_blocks(hub.files("model", REPO)["README.md"].decode())
    blocks += [block.replace("user/khop", REPO).replace("COMMIT", revision) for block in python_blocks(GUIDE)]
    report = stranger(tmp_path, hub, REPO, newest, revision, *blocks)

    model, tokenizer = load_run_model(open_run(hops))
    batch = tokenizer(["e1 r1 r0", "e3 r1"], return_tensors="pt", padding=True)
    for num_loops in (1, 3, 6):
        here = model.generate(**batch, num_loops=num_loops, max_new_tokens=2, do_sample=False)
        assert report["tokens"][str(num_loops)] == here.tolist()
    task = load_run_task(open_run(hops))
    assert report["rows"] == {split: len(rows) for split, rows in task.items()}
    assert report["row"] == task["test"][-1]
    assert set(report["snapshot"]) >= SHIPPED
    assert [line.split()[0] for line in report["printed"]] == ["1", "2", "5", "2", "8"]

    hf = str(Path(sys.executable).with_name("hf"))
    finish([hf, *verify[1:-1], verify[-1].replace("COMMIT", newest)], env=settings, cwd=tmp_path)
    hub.close()
    offline = stranger(tmp_path, hub, REPO, newest, revision, *blocks, HF_HUB_OFFLINE="1")
    assert offline == report


def test_the_card_of_the_hub_is_read_back_as_it_was_written(hops, hub, api):
    publish(open_run(hops), REPO, api=api)
    card = ModelCard(hub.files("model", REPO)["README.md"].decode())
    assert card.data.to_dict() == model_card(open_run(hops), Names(REPO, "apache-2.0")).data.to_dict()
