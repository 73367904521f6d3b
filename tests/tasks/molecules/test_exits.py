"""Laws of exits on molecules: padding is neither run nor counted, a rule that never fires is all loops, parts add up.

The run is a few steps of the smoke recipe with an exit gate, on toy molecules.
"""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from data_builders import PackedMolecules
from looplab.bench.pair import QUICK
from looplab.bench.speculation import speculation_rows
from looplab.cli import main
from looplab.instruments.halting_settings import HaltingSetting, setting_of
from looplab.runs.folder import open_run
from looplab.tasks.language.exits import between_counts, counted_calls, decode
from looplab.tasks.molecules import samples
from looplab.tasks.molecules.exits import cheapest, kind_rows, loops_of_tokens, molecule_rows, sample_row, timed_row
from looplab.tasks.molecules.figures import exits_figure
from looplab.tasks.molecules.held_out import loss_of_molecules, run_molecules
from looplab.tasks.molecules.records import HALTING
from looplab.tasks.molecules.samples import write_molecules, write_tokens
from looplab.tasks.molecules.sizes import SAMPLINGS, Sizes
from looplab.tasks.molecules.smiles import KINDS, token_kinds
from looplab.tasks.molecules.task import MoleculeTask
from looplab.tasks.registry import TASKS
from modeling_looped import LoopedForCausalLM
from toy_runs import failure

NEVER = {"rule": "q_exit", "q": 1.0}
EARLY = {"rule": "latent", "threshold": 0.4}
LOOPS = 4


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    flags = ["--model.exit_gate=true", f"--model.num_loops={LOOPS}", "--optim.lr=1e-2", "--max_steps=60"]
    flags += ["--check_every=1000", "--checkpoint_every=1000"]
    return open_run(trained.copy(tmp_path_factory.mktemp("exits"), "molecules", *flags))


@pytest.fixture(scope="module")
def loaded(run):
    folder = run.folder / "model"
    return LoopedForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def test_split(run, loaded):
    return PackedMolecules(run_molecules(run)["test"], loaded[1], 76)


@pytest.fixture
def rows(test_split, loaded):
    return molecule_rows(test_split, torch.arange(len(test_split)), loaded[1])


SMALL = Sizes(
    batch=10,
    max_tokens=25,
    reference=0,
    decoded=(1, 2),
    timed=(1, 3),
    thresholds=1,
)


# Teacher-forced


def test_the_decoded_loss_is_that_of_packed_molecules(loaded, rows, test_split):
    """Token by token through the cache, and rows that are short padded: still every token once."""
    decoded = decode(loaded[0], rows, 0, LOOPS, None)
    assert int(decoded.real.sum()) == test_split.num_tokens
    assert len(set(decoded.real.sum(1).tolist())) > 3
    loss = loss_of_molecules(loaded[0], test_split, [LOOPS], len(test_split))[LOOPS]
    assert float(decoded.losses[decoded.real].mean()) == pytest.approx(loss, abs=1e-5)


def test_padding_is_neither_run_nor_counted(loaded, rows, test_split):
    """A row beside longer ones is as it is alone, and a core layer sees as many rows as there are tokens and loops."""
    with counted_calls(loaded[0]) as calls:
        together = decode(loaded[0], rows, 0, LOOPS, EARLY)
    assert sum(calls) == int(together.loops.sum())
    assert not together.loops[~together.real].any()
    assert len(together.loops[together.real].unique()) > 2
    for index in range(3):
        length = int(together.real[index].sum())
        row = {name: value[index : index + 1, :length] for name, value in rows.items()}
        alone = decode(loaded[0], row, 0, LOOPS, EARLY)
        assert torch.equal(alone.loops[0], together.loops[index, :length])
        torch.testing.assert_close(alone.losses[0], together.losses[index, :length], rtol=1e-4, atol=1e-5)


def test_kinds_of_tokens():
    tokens = ["C", "c", "1", "(", "=", "O", ")", "[nH]", "Cl", "%12", ".", "1", "%12", "1"]
    kinds = ["atom", "atom", "ring open", "branch open", "bond", "atom", "branch close", "atom", "atom", "ring open"]
    kinds += ["bond", "ring close", "ring close", "ring open", "end"]
    assert token_kinds(tokens) == kinds
    assert token_kinds([]) == ["end"]
    assert set(token_kinds(tokens)) == set(KINDS)


def test_kinds_average_to_the_whole(loaded, rows):
    """Loops, losses and agreement of the kinds, weighted by their tokens; there is an end to every molecule."""
    model, tokenizer = loaded
    found = kind_rows(model, tokenizer, rows, [HaltingSetting(EARLY, LOOPS), HaltingSetting(NEVER, LOOPS)], LOOPS)
    for halting in (EARLY, NEVER):
        mine = [row for row in found if row["rule"] == halting["rule"]]
        decoded = decode(model, rows, 0, LOOPS, halting)
        tokens = sum(row["tokens"] for row in mine)
        assert tokens == int(decoded.real.sum())
        assert [row["tokens"] for row in mine if row["kind"] == "end"] == [len(rows["input_ids"])]
        for name, values in (("loops", decoded.loops), ("loss", decoded.losses)):
            mean = sum(row[name] * row["tokens"] for row in mine) / tokens
            assert mean == pytest.approx(float(values[decoded.real].double().mean()), abs=1e-6)
    assert all(row["loss"] == row["full_loss"] and row["loops"] == LOOPS for row in found if row["rule"] == "q_exit")


def test_kinds_are_those_of_the_labels_they_are_measured_on(loaded, test_split):
    """C1CC1: a ring is opened by the second token, closed by the fifth, and then the molecule ends."""
    _, tokenizer = loaded
    ids = tokenizer("C1CC1")["input_ids"][1:]
    rows = {"input_ids": torch.tensor([[1, *ids]]), "shift_labels": torch.tensor([[*ids, tokenizer.eos_token_id]])}
    found = {row["kind"]: row for row in kind_rows(*loaded, rows, [HaltingSetting(EARLY, LOOPS)], LOOPS)}
    decoded = decode(loaded[0], rows, 0, LOOPS, EARLY)
    for kind, places in {"atom": [0, 2, 3], "ring open": [1], "ring close": [4], "end": [5]}.items():
        assert found[kind]["tokens"] == len(places)
        assert found[kind]["loss"] == pytest.approx(float(decoded.losses[0, places].mean()), abs=1e-6)


def test_the_cheapest_threshold_is_within_a_hundredth_of_a_nat_of_the_best_fixed_count():
    def row(q, loss, loops):
        return {"rule": "q_exit", "q": q, "loss": loss, "full_loss": 1.0, "loops": loops, "num_loops": 8}

    rows = [row(0.1, 1.2, 1.0), row(0.5, 0.909, 3.0), row(0.7, 0.89, 4.0), row(0.9, 1.0, 7.0)]
    fixed = [row(None, loss, loops) | {"rule": "fixed"} for loss, loops in ((1.3, 1), (0.9, 3))]
    assert cheapest([*rows, *fixed]) == [rows[1]]
    assert cheapest([rows[0], row(0.2, 1.1, 2.0), *fixed]) == [row(0.2, 1.1, 2.0)]  # the nearest
    assert setting_of(rows[1]) == HaltingSetting({"rule": "q_exit", "q": 0.5}, 8)


# Sampled


def test_a_rule_that_never_fires_writes_the_molecules_of_all_loops(loaded):
    never, full = (sample_row(*loaded, HaltingSetting(halting, LOOPS), 25, None, SMALL) for halting in (NEVER, None))
    same = ("n", "validity", "loops", "tokens")
    assert {name: never[name] for name in same} == {name: full[name] for name in same}
    assert (never["n"], never["loops"]) == (25, LOOPS)
    assert sample_row(*loaded, HaltingSetting(EARLY, LOOPS), 25, None, SMALL)["loops"] < LOOPS


def test_loops_are_counted_up_to_the_end(loaded):
    """By hand, sample by sample, from what the tokenizer reads back."""
    model, tokenizer = loaded
    output = write_tokens(model, tokenizer, 20, SAMPLINGS[0], LOOPS, 0, SMALL.max_tokens, halting=EARLY)
    loops, lengths = [], set()
    for sequence, used in zip(output.sequences[:, 1:].tolist(), output.loops_used.tolist(), strict=True):
        ends = [place for place, token in enumerate(sequence) if token == tokenizer.eos_token_id]
        stop = ends[0] + 1 if ends else len(sequence)
        lengths.add(stop)
        loops += used[:stop]
    assert len(lengths) > 3
    assert loops_of_tokens(output, tokenizer.eos_token_id).tolist() == loops
    assert write_molecules(model, tokenizer, 20, SAMPLINGS[0], LOOPS, 0, SMALL.max_tokens) == samples.samples_of(
        write_tokens(model, tokenizer, 20, SAMPLINGS[0], LOOPS, 0, SMALL.max_tokens, halting=NEVER).sequences,
        tokenizer,
    )


def test_a_fixed_count_makes_its_share_of_the_calls(loaded):
    row = timed_row(*loaded, HaltingSetting(None, 1), HaltingSetting(None, LOOPS), 3, 2, SMALL.max_tokens)
    assert row["layer_calls"] == row["row_calls"] == 1 / LOOPS
    row = timed_row(*loaded, HaltingSetting(EARLY, LOOPS), HaltingSetting(None, LOOPS), 3, 2, SMALL.max_tokens)
    assert row["row_calls"] < row["layer_calls"] <= 1
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]


def test_a_rule_is_compared_to_the_line_between_fixed_counts():
    fixed = {1: 0.0, 2: 0.5, 4: 0.9}
    assert [between_counts(fixed, loops) for loops in (1, 1.5, 2, 3, 4)] == pytest.approx([0, 0.25, 0.5, 0.7, 0.9])
    with pytest.raises(ValueError, match="5 loops are not between 1 and 4"):
        between_counts(fixed, 5)


# looped halting, plot, bench


@pytest.fixture(scope="module")
def said(run):
    """What `looped halting` prints; the run has what it measured."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setitem(TASKS, "molecules", MoleculeTask(replace(SMALL, max_tokens=10)))
        assert main(["halting", str(run.folder), "--limit", "4"]) == 0
    return output.getvalue()


@pytest.mark.slow
def test_halting_writes_and_prints_every_measure(run, said):
    rows = run.read(HALTING)
    by_measure = {name: [row for row in rows if row["measure"] == name] for name in ("exit", "kind", "sample")}
    assert sum(map(len, by_measure.values())) == len(rows)
    settings = [(rule, LOOPS) for rule in ("kl_entropy", "latent", "q_exit")]
    settings += [("fixed", count) for count in (1, 2, 3)]
    assert [(row["rule"], row["num_loops"]) for row in by_measure["exit"]] == [s for s in settings for _ in range(2)]
    assert [(row["rule"], row["num_loops"]) for row in by_measure["sample"]] == [*settings, ("fixed", LOOPS)]
    assert {row["rule"] for row in by_measure["kind"]} == {"kl_entropy", "latent", "q_exit"}
    for row in by_measure["sample"]:
        assert [cell["batch"] for cell in row["timed"]] == [1, 3]
        if row["rule"] == "fixed":
            assert (row["loops"], row["fixed_validity"]) == (row["num_loops"], row["validity"]["share"])
    lines = said.splitlines()
    assert sum(line.startswith("fixed") for line in lines) == 2 * 3 + 4
    assert "ring close" in said
    assert lines[-1] == f"written to {run.folder / 'halting.jsonl'}"


@pytest.mark.slow
@pytest.mark.usefixtures("said")
def test_the_picture_of_exits_is_drawn(run):
    figure = exits_figure(run)
    labels = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert labels == {"fixed counts", "kl_entropy", "latent", "q_exit"}
    fixed = [row for row in run.read(HALTING) if row["measure"] == "sample" and row["rule"] == "fixed"]
    x, y = figure.axes[0].get_lines()[0].get_data()
    assert list(x) == [1, 2, 3, 4]
    assert list(y) == [100 * row["validity"]["share"] for row in fixed]
    assert main(["plot", str(run.folder)]) == 0
    assert (run.folder / "figures" / "exits.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_said(run, capfd):
    assert "num_loops=1 leaves no loop out" in failure(capfd, "halting", run.folder, "--max-loops", "1")
    assert "looped halting --max-hops is not for molecules: it is for khop" in failure(
        capfd, "halting", run.folder, "--max-hops", "3"
    )


def test_drafts_of_molecules_end_where_the_molecule_ends(run, loaded):
    prompts = MoleculeTask().prompts(run, loaded[1], 2, 5)
    assert prompts.shape == (2, 5)
    assert prompts[0, 0] == loaded[1].bos_token_id
    rows = speculation_rows(run, QUICK, rounds=1)
    assert [(row["mode"], row["draft_loops"]) for row in rows] == [
        (mode, draft) for mode in ("greedy", "sampled") for draft in (1, 2) for _ in range(2)
    ]
    assert all(0 < row["tokens"] <= QUICK.new_tokens for row in rows)
    assert json.dumps(rows)
