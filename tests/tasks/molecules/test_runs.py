"""Laws of reading runs on molecules: samples follow from their seed and resume, measures equal naive twins, tables
equal numbers worked out by hand.

Runs are a few steps of the smoke recipe on toy molecules; two seeds of a loop and two of a plain stack.
"""

import json
import shutil
from itertools import combinations
from pathlib import Path
from statistics import fmean

import datasets
import numpy as np
import pytest
import torch
from rdkit import Chem, DataStructs
from rdkit.Chem import rdFingerprintGenerator
from transformers import AutoTokenizer

from data_builders import PackedMolecules, load_molecules
from looplab.cli import main
from looplab.runs.folder import open_run
from looplab.tasks.molecules import chemnet
from looplab.tasks.molecules.chemnet import frechet_distance
from looplab.tasks.molecules.evaluation import default_loops, evaluate_run
from looplab.tasks.molecules.held_out import loss_of_molecules
from looplab.tasks.molecules.measures import fingerprints, internal_diversity, measure
from looplab.tasks.molecules.records import MOLECULES
from looplab.tasks.molecules.samples import write_molecules
from looplab.tasks.molecules.sizes import SAMPLINGS, Sizes
from looplab.tasks.molecules.task import MoleculeTask
from looplab.tasks.registry import TASKS
from modeling_looped import LoopedForCausalLM
from toy_runs import failure

pytestmark = pytest.mark.slow

PLAIN = ["--model.num_core_layers=2", "--model.num_loops=1", "--eval_loops=[]", "--depth={kind: fixed, mean: 1}"]

SMALL = Sizes(batch=20, max_tokens=40, reference=0)


@pytest.fixture(scope="module")
def home(trained, tmp_path_factory):
    """Runs mol_seed0, mol_seed1, plain_seed0 and plain_seed1, evaluated with 40 samples in batches of 20, without
    ChemNet."""
    folder = tmp_path_factory.mktemp("molecules")
    for seed in (0, 1):
        for name, flags, steps in (("mol", ["--optim.lr=1e-2"], 100), ("plain", PLAIN, 5)):
            flags = [f"--name={name}_seed{seed}", f"--seed={seed}", f"--max_steps={steps}", *flags]
            flags += ["--check_every=1000", "--checkpoint_every=1000"]
            run = open_run(trained.copy(folder, "molecules", *flags))
            evaluate_run(run, limit=40, loops=[1, 3] if name == "mol" else None, sizes=SMALL)
    return folder


@pytest.fixture
def run(home, tmp_path):
    """A copy of the first run to break."""
    return open_run(shutil.copytree(home / "mol_seed0", tmp_path / "mol_seed0"))


@pytest.fixture(scope="module")
def loaded(home):
    folder = home / "mol_seed0" / "model"
    return LoopedForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


# Samples


def test_samples_follow_from_the_seed_and_need_no_cache(loaded):
    """The random state outside is left alone; without the KV cache the same molecules come out."""
    before = torch.random.get_rng_state()
    first = write_molecules(*loaded, 30, SAMPLINGS[0], 3, 1, SMALL.max_tokens)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert write_molecules(*loaded, 30, SAMPLINGS[0], 3, 1, SMALL.max_tokens) == first
    assert write_molecules(*loaded, 30, SAMPLINGS[0], 3, 1, SMALL.max_tokens, use_cache=False) == first
    assert write_molecules(*loaded, 30, SAMPLINGS[0], 3, 2, SMALL.max_tokens) != first
    assert sum(row["finished"] for row in first) > 15
    assert not any("<" in row["smiles"] for row in first)


def test_the_model_read_after_fewer_loops_is_the_model_that_runs_fewer(loaded):
    model, tokenizer = loaded
    ids = tokenizer("CC(Br)c1cc", return_tensors="pt")["input_ids"]
    whole = model(ids, num_loops=2).logits
    model.config.num_loops = 2
    torch.testing.assert_close(model(ids).logits, whole)
    model.config.num_loops = 3


def test_sampling_goes_on_where_it_was_cut(run, home):
    """Half a batch is drawn again; more samples go on from those that are there; another model starts over."""
    path = run.folder / "samples" / "T0.8-top40-loops3.jsonl"
    whole = path.read_text().splitlines()
    assert len(whole) == 40
    path.write_text("\n".join(whole[:25]) + "\n")
    evaluate_run(run, loops=[3], limit=60, sizes=SMALL)
    again = path.read_text().splitlines()
    assert (len(again), again[:40]) == (60, whole)
    assert [row["n"] for row in run.read(MOLECULES)] == [60, 60]
    shutil.copytree(home / "mol_seed1" / "model", run.folder / "model", dirs_exist_ok=True)
    evaluate_run(run, loops=[3], limit=20, sizes=SMALL)
    assert path.read_text().splitlines() != whole[:20]
    assert not (run.folder / "samples" / "T0.8-top40-loops1.jsonl").exists()


def test_a_line_per_setting_and_loop_count(home):
    rows = open_run(home / "mol_seed0").read(MOLECULES)
    assert [(row["setting"], row["loops"]) for row in rows] == [("T0.8-top40", 3), ("T1.0", 3), ("T0.8-top40", 1)]
    assert [(r["setting"], r["loops"]) for r in open_run(home / "plain_seed0").read(MOLECULES)] == [
        ("T0.8-top40", 1),
        ("T1.0", 1),
    ]
    assert default_loops(8) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16]
    assert default_loops(1) == [1]


# Measures


def test_measures_of_known_samples():
    """Six valid ones, of four molecules, one of them a training row; one has no end, and would be valid."""
    smiles = ["CCO", "OCC", "c1ccccc1", "CCN", "CCN", "CCCl", "C(C", "", "N(C)(C)(C)C"]
    rows = [{"smiles": text, "finished": True} for text in smiles] + [{"smiles": "CCCC", "finished": False}]
    measured = measure(rows, datasets.Dataset.from_dict({"text": ["CCO", "CCCC"]}))
    assert measured["n"] == 10
    assert measured["validity"]["share"] == 6 / 10
    assert measured["uniqueness"]["share"] == 4 / 6
    assert measured["novelty"]["share"] == 3 / 4
    assert {label: cell["share"] for label, cell in measured["faults"].items() if cell["share"]} == {
        "truncated": 0.1,
        "empty": 0.1,
        "brackets": 0.1,
        "valence": 0.1,
    }
    exclusive = {name: cell["share"] for name, cell in measured["exclusive"].items()}
    assert exclusive == {"valid": 0.7, "bracket": 0.1, "ring": 0.0, "valence": 0.1, "other": 0.1}
    low, high = measured["validity"]["interval"]
    assert (low, high) == pytest.approx((0.3127, 0.8318), abs=1e-4)  # Wilson of 6 in 10


def test_nothing_valid_has_no_other_measures():
    measured = measure([{"smiles": "C(", "finished": True}], datasets.Dataset.from_dict({"text": ["C"]}))
    assert measured["validity"]["share"] == 0
    nothing = {"share": None, "interval": None}
    assert [measured[name] for name in ("uniqueness", "novelty", "diversity")] == [nothing] * 3


def test_diversity_is_that_of_all_pairs():
    """A naive twin with rdkit's own similarity; and the interval is that of the jackknife."""
    smiles = ["CCO", "c1ccccc1", "CCN", "CCCl", "Oc1ccccc1", "NC(=O)c1ccsc1", "CC(C)Br", "C1CCCC1N"]
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    prints = [generator.GetFingerprint(Chem.MolFromSmiles(text)) for text in smiles]

    def naive(chosen):
        return 1 - fmean(DataStructs.TanimotoSimilarity(a, b) for a, b in combinations(chosen, 2))

    diversity, (low, high) = internal_diversity(fingerprints(smiles))
    assert diversity == pytest.approx(naive(prints), abs=1e-6)
    left_out = [naive(prints[:i] + prints[i + 1 :]) for i in range(len(prints))]
    count = len(prints)
    spread = (sum((value - fmean(left_out)) ** 2 for value in left_out) * (count - 1) / count) ** 0.5
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.25)


def test_the_test_loss_is_what_the_model_itself_says(home, loaded):
    run, (model, tokenizer) = open_run(home / "mol_seed0"), loaded
    splits = load_molecules("files", run.recipe()["data"]["files"], **run.recipe()["data"]["overrides"])
    for row in run.read(MOLECULES):
        total = count = 0
        for text in splits["test"]["text"]:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            total += model(ids, labels=ids, num_loops=row["loops"]).loss.item() * (ids.numel() - 1)
            count += ids.numel() - 1
        assert row["loss"] == pytest.approx(total / count, abs=1e-5)
    packed = PackedMolecules(splits["test"], tokenizer, 76)
    assert loss_of_molecules(model, packed, [3], 10_000)[3] == run.read(MOLECULES)[0]["loss"]


def test_the_frechet_distance_of_gaussians():
    """By hand in one dimension, (m1 - m2)^2 + (s1 - s2)^2; none to itself; and that of commuting covariances."""
    assert frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]])) == pytest.approx(5)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    mean, cov = values.mean(0), np.cov(values.T)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(mean, cov, mean + 1, 4 * cov) == pytest.approx(6 + np.trace(cov))


def test_chemnet_comes_with_its_package():
    """Two samples of the same kind are nearer than two kinds."""
    alcohols = [f"{'C' * n}O" for n in range(2, 22)]
    rings = [f"c1ccccc1{'C' * n}N" for n in range(20)]
    one, two, other = (chemnet.statistics_of(smiles) for smiles in (alcohols[::2], alcohols[1::2], rings))
    assert chemnet.activations(["CCO"]).shape == (1, 512)
    assert frechet_distance(*one, *two) < frechet_distance(*one, *other)


# looped eval, table, plot


def test_eval_prints_what_it_measured(run, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "molecules", MoleculeTask(SMALL))
    assert main(["eval", str(run.folder), "--loops", "1", "--limit", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("T")][:3] == [
        ["T0.8-top40", "[3]"],
        ["T1.0", "[3]"],
        ["T0.8-top40", "[1]"],
    ]
    assert any("times as many as without the KV cache" in line for line in lines)
    assert lines[-1] == f"written to {run.folder / 'molecules.jsonl'}"


def test_a_table_is_the_mean_over_seeds(home, capsys):
    folders = [str(home / f"{name}_seed{seed}") for name in ("mol", "plain") for seed in (0, 1)]
    assert main(["table", *folders, "--against", "plain"]) == 0
    header, _, *lines = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    )
    cells = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    runs = {name: [open_run(home / f"{name}_seed{seed}") for seed in (0, 1)] for name in ("mol", "plain")}
    valid = {name: [100 * run.read(MOLECULES)[0]["validity"]["share"] for run in pair] for name, pair in runs.items()}
    found = cells["mol"]["T0.8-top40: validity %"]
    assert found.split()[0] == f"{fmean(valid['mol']):.1f}"
    points = [mol - plain for mol, plain in zip(valid["mol"], valid["plain"], strict=True)]
    assert cells["mol"]["T0.8-top40: points of validity over plain"].split()[0] == f"{fmean(points):.1f}"
    assert cells["plain"]["T0.8-top40: points of validity over plain"] == "-"
    assert cells["mol"]["loops"] == "3"


def test_plots_are_written(home, capsys):
    folders = [str(home / f"{name}_seed{seed}") for name in ("mol", "plain") for seed in (0, 1)]
    assert main(["plot", *folders]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = {path.name for path in paths}
    assert names == {
        "training.png", "validity.png", "faults.png", "molecules.png", "held_out.png", "faults_mol.png",
        "faults_plain.png",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_what_was_not_measured_is_asked_for(run, capfd):
    for file in ("molecules.jsonl", "evaluation.json"):
        (run.folder / file).unlink()
    assert "run `looped eval" in failure(capfd, "table", run.folder)
    assert "looped eval --max-hops is not for molecules: it is for khop" in failure(
        capfd, "eval", run.folder, "--max-hops", "3"
    )


def test_other_molecules_than_those_of_the_training_are_refused(run, capfd):
    summary = run.summary()
    (run.folder / "summary.json").write_text(json.dumps(summary | {"train_molecules": 7}))
    assert "was trained on 7 molecules and its recipe now gives 141" in failure(capfd, "eval", run.folder)
