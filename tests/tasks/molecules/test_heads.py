"""Laws of taking attention heads away and of reading each pass by a head fitted for it; `looped lens` on a toy run."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from data_builders import PackedMolecules, load_molecules
from looplab.cli import main
from looplab.instruments.recorder import edit_head, record, watching_heads
from looplab.instruments.timing import counted_calls
from looplab.runs.folder import open_run, rows_on_file
from looplab.runs.intervals import paired_interval, wilson_interval
from looplab.runs.models import weights_digest
from looplab.tasks.molecules import readouts as molecule_readouts
from looplab.tasks.molecules.ablations import ablations_text, cell_of, mean_outputs, token_kinds
from looplab.tasks.molecules.figures import plot_runs
from looplab.tasks.molecules.held_out import HeldOut, loss_of_molecules
from looplab.tasks.molecules.readouts import features_of, fit_head, nats_of, with_head
from looplab.tasks.molecules.records import ABLATIONS, READOUTS
from looplab.tasks.molecules.samples import write_molecules
from looplab.tasks.molecules.sizes import SAMPLINGS, Sizes
from looplab.tasks.molecules.task import MoleculeTask
from looplab.tasks.registry import TASKS
from modeling_looped import LoopedForCausalLM
from toys import FP32, make_ids, make_model

KINDS = {
    "plain": {},
    "sections": {"num_prelude_layers": 1, "num_coda_layers": 1},
    "gated": {"kv_sharing": "gated"},
}


@pytest.fixture(params=KINDS)
def model(request):
    return make_model(**KINDS[request.param])


def logits_of(model, **arguments):
    with torch.no_grad():
        return model(make_ids(), num_loops=3, **arguments).logits


# Heads that are taken away


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_head_that_is_left_as_it_is_changes_nothing(model, use_cache):
    before = logits_of(model, use_cache=use_cache)
    with edit_head(model, ("core", 1, 1), 2, lambda output: 1.0 * output):
        assert torch.equal(logits_of(model, use_cache=use_cache), before)


def test_without_its_heads_a_call_is_without_its_attention(model):
    """The naive twin: that run of the layer is the identity plus its MLP, a weight left out of the others alone."""
    call, layer, runs = ("core", 1, 0), model.model.core[0], []

    def without(module, arguments, output):
        runs.append(module)
        return (torch.zeros_like(output[0]), output[1]) if len(runs) == call[1] + 1 else None

    handle = layer.self_attn.register_forward_hook(without)
    wanted = logits_of(model)
    handle.remove()

    def zero_all(current, outputs):
        return torch.zeros_like(outputs) if current == call else None

    with watching_heads(model, zero_all):
        torch.testing.assert_close(logits_of(model), wanted, **FP32)
    with (
        edit_head(model, call, 0, torch.zeros_like),
        edit_head(model, call, 1, torch.zeros_like),
        edit_head(model, call, 2, torch.zeros_like),
        edit_head(model, call, 3, torch.zeros_like),
    ):
        torch.testing.assert_close(logits_of(model), wanted, **FP32)
    assert not torch.allclose(logits_of(model), wanted, **FP32)


def test_what_comes_before_the_pass_stays_and_what_comes_after_changes(model):
    intact = record(model, make_ids(), 3).states
    with edit_head(model, ("core", 1, 0), 1, torch.zeros_like):
        ablated = record(model, make_ids(), 3).states
    first = list(intact).index(("core", 1, 0))
    for i, call in enumerate(intact):
        assert torch.equal(intact[call], ablated[call]) == (i < first), call


@pytest.mark.parametrize("kind", ["plain", "sections"])
def test_a_decoding_step_takes_away_the_same_as_the_whole_row(kind):
    """The pass is counted anew in every forward: with the KV cache the last token has the logits of the row."""
    model, ids = make_model(**KINDS[kind]), make_ids()
    with edit_head(model, ("core", 2, 0), 3, torch.zeros_like), torch.no_grad():
        whole = model(ids, num_loops=3, use_cache=False).logits
        step = model(ids[:, :-1], num_loops=3, use_cache=True)
        last = model(ids[:, -1:], num_loops=3, past_key_values=step.past_key_values, use_cache=True).logits
    torch.testing.assert_close(last[:, -1], whole[:, -1], **FP32)


def test_an_error_leaves_the_model_as_it_was(model):
    before = logits_of(model)
    with pytest.raises(RuntimeError, match="stop"), edit_head(model, ("core", 0, 0), 0, torch.zeros_like):
        raise RuntimeError("stop")
    assert torch.equal(logits_of(model), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.model.core.modules())


def test_a_head_or_a_pass_that_is_not_there_is_refused(model):
    with (
        pytest.raises(ValueError, match="there is no head 4: the model has 4"),
        edit_head(model, ("core", 0, 0), 4, abs),
    ):
        pass
    with pytest.raises(ValueError, match="no forward reached"), edit_head(model, ("core", 5, 0), 0, torch.zeros_like):
        logits_of(model)


# Intervals of differences


def test_the_interval_of_a_paired_share():
    """Newcombe's (1998) formula by hand where nothing correlates; its mirror image; not empty without a change."""
    before, after = [True, True, False, False] * 10, [True, False, True, False] * 10
    low, high = wilson_interval(0.5, 40)
    half = math.hypot(0.5 - low, high - 0.5)
    assert paired_interval(before, after) == pytest.approx((-half, half))
    before, after = [True] * 30 + [False] * 10, [True] * 20 + [False] * 20
    low, high = paired_interval(before, after)
    assert paired_interval(after, before) == pytest.approx((-high, -low))
    assert low < -0.25 < high < 0
    unpaired = math.hypot(0.75 - wilson_interval(0.75, 40)[0], wilson_interval(0.5, 40)[1] - 0.5)
    assert high + 0.25 < unpaired
    assert -0.1 < paired_interval(before, before)[0] < 0 < paired_interval(before, before)[1] < 0.1
    assert paired_interval([True] * 40, [True] * 40)[0] < 0


def test_a_paired_interval_holds_the_difference_as_often_as_it_says():
    draw, held = torch.Generator().manual_seed(0), 0
    for _ in range(1000):
        common, own = torch.rand(60, generator=draw), torch.rand(60, generator=draw)
        before, after = common < 0.8, (common < 0.8) & (own < 0.9)  # 80 % and 72 %
        low, high = paired_interval(before.tolist(), after.tolist())
        held += low <= -0.08 <= high
    assert 930 <= held <= 985


# A toy run


@pytest.fixture(scope="module")
def home(trained, tmp_path_factory):
    """A run of the smoke recipe, `mol`."""
    folder = tmp_path_factory.mktemp("molecule_heads")
    flags = ["--optim.lr=1e-2", "--max_steps=100", "--checkpoint_every=1000", "--check_every=1000"]
    trained.copy(folder, "molecules", "--name=mol", *flags)
    return folder


@pytest.fixture(scope="module")
def parts(home):
    """The run, its model, tokenizer and splits."""
    run = open_run(home / "mol")
    folder, data = run.model_folder(), run.recipe()["data"]
    loaded = LoopedForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return run, *loaded, load_molecules("files", data["files"], **data["overrides"])


def test_tokens_of_molecules_have_the_loss_of_packed_ones(parts):
    _, model, tokenizer, splits = parts
    molecules = HeldOut(tokenizer, splits["test"]["text"][:], rows=7)
    nats = molecules.nats(model, 3)
    packed = PackedMolecules(splits["test"], tokenizer, 76)
    assert nats.mean().item() == pytest.approx(loss_of_molecules(model, packed, [3], 1000)[3], abs=1e-5)
    assert torch.equal(molecules.owner.bincount(), torch.from_numpy(packed.lengths))
    kinds = token_kinds(tokenizer, molecules.labels)
    assert sum(kinds[name] for name in ("close", "ring", "other")).eq(1).all()
    assert int(kinds["close"].sum()) == sum(text.count(")") for text in splits["test"]["text"][:])
    mean, (low, high) = molecules.mean_of(nats, kinds["close"])
    assert low < mean < high
    assert mean == pytest.approx(nats[kinds["close"]].mean().item())


def test_means_are_over_real_tokens_alone(parts):
    """The naive twin: each molecule by itself, without a place that is filled up."""
    _, model, tokenizer, splits = parts
    texts = splits["validation"]["text"][:]
    means, alone = mean_outputs(model, HeldOut(tokenizer, texts), 3), {}
    with torch.no_grad(), watching_heads(model, lambda call, outputs: alone.setdefault(call, []).append(outputs[0])):
        for text in texts:
            model(tokenizer(text, return_tensors="pt")["input_ids"], num_loops=3)
    assert list(means) == list(alone)
    for call, mean in means.items():
        torch.testing.assert_close(mean, torch.cat(alone[call]).mean(0), **FP32)


def test_the_own_head_as_a_fresh_one_is_the_model(parts):
    """In loss and in samples, at every pass; the embedding does not follow a head that is put in."""
    _, model, tokenizer, splits = parts
    molecules = HeldOut(tokenizer, splits["test"]["text"][:])
    twin = with_head(model, model.lm_head.weight.detach())
    for count in (1, 3):
        assert torch.equal(molecules.nats(twin, count), molecules.nats(model, count))
        samples = [write_molecules(one, tokenizer, 10, SAMPLINGS[0], count, seed=0) for one in (model, twin)]
        assert samples[0] == samples[1]
    other = with_head(model, torch.zeros_like(model.lm_head.weight))
    assert torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert molecules.nats(other, 3).allclose(torch.tensor(math.log(model.config.vocab_size)))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_fresh_head_is_at_the_minimum(parts):
    """Less than 1 % of the gradient is left (some tokens of toys can be told apart, and their weights grow for ever);
    where it was fitted it is better than the model's own."""
    _, model, tokenizer, splits = parts
    packed = PackedMolecules(splits["train"], tokenizer, 76)
    by_loops, labels = features_of(model, map(packed.rows, torch.arange(len(packed)).split(256)), (3, 1))
    assert list(by_loops) == [1, 3]
    for count, features in by_loops.items():
        assert len(features) == packed.num_tokens
        weight, loss = fit_head(features, labels, model.config.vocab_size)
        assert loss == pytest.approx(F.cross_entropy(F.linear(features, weight), labels).item(), abs=1e-4)
        gradients = []
        for at in (torch.zeros_like(weight), weight):
            at.requires_grad_()
            F.cross_entropy(F.linear(features, at), labels).backward()
            gradients.append(at.grad.norm())
        assert gradients[1] < 0.01 * gradients[0]
        own = F.cross_entropy(F.linear(features, model.lm_head.weight.detach()), labels).item()
        assert own == pytest.approx(loss_of_molecules(model, packed, [count], 1000)[count], abs=1e-5)
        assert loss < own


def test_one_pass_reads_what_a_call_per_loop_count_reads(parts):
    """The naive twin runs the model anew for each loop count: same inputs of the head, same losses of both heads."""
    _, model, tokenizer, splits = parts
    molecules = HeldOut(tokenizer, splits["test"]["text"][:], rows=7)
    with counted_calls(model) as calls:
        by_loops, labels = features_of(model, molecules.inputs(), (1, 2, 3))
    assert len(calls) == 3 * len(molecules.batches)
    assert torch.equal(labels, molecules.labels)
    other = with_head(model, torch.randn(model.lm_head.weight.shape))
    for count, features in by_loops.items():
        real = [(ids, following >= 0) for ids, following in molecules.batches]
        alone = [model.model(ids, num_loops=count, use_cache=False).last_hidden_state[seen] for ids, seen in real]
        assert torch.equal(features, torch.cat(alone))
        for one in (model, other):
            torch.testing.assert_close(nats_of(one.lm_head, features, labels), molecules.nats(one, count), **FP32)


@pytest.mark.slow
def test_lens_writes_prints_and_draws(home, tmp_path, monkeypatch, capsys):
    """Every cell once; started again, what is there is kept and only what is missing is measured."""
    monkeypatch.setitem(TASKS, "molecules", MoleculeTask(Sizes(max_tokens=30)))
    run = open_run(shutil.copytree(home / "mol", tmp_path / "mol"))
    command = ["lens", str(run.folder), "--limit", "12", "--no-probes"]
    assert main(command) == 0
    said = capsys.readouterr().out
    rows, readouts = run.read(ABLATIONS), run.read(READOUTS)
    heads, layers = 2, 1
    assert len({cell_of(row) for row in rows}) == len(rows) == 2 * 3 * layers * heads
    assert [(row["loops"], row["head"]) for row in readouts] == [(p, h) for p in (1, 2, 3) for h in ("own", "fresh")]
    assert ablations_text(rows) in said
    for row in rows:
        low, high = row["loss"]["all"]["interval"]
        assert low <= row["loss"]["all"]["change"] <= high
        assert row["validity"]["interval"][0] <= row["validity"]["change"] <= row["validity"]["interval"][1]
    whole = (run.folder / "ablations.jsonl").read_text(), (run.folder / "readouts.jsonl").read_text()
    (run.folder / "ablations.jsonl").write_text("\n".join(whole[0].splitlines()[:-2]) + "\n")
    (run.folder / "readouts.jsonl").write_text("\n".join(whole[1].splitlines()[:-2]) + "\n")
    assert main(command) == 0
    assert ((run.folder / "ablations.jsonl").read_text(), (run.folder / "readouts.jsonl").read_text()) == whole
    calls = []
    monkeypatch.setattr(molecule_readouts, "readout_rows", lambda *arguments: calls.append(arguments) or [])
    assert main(command) == 0
    assert not calls
    paths = [path.name for path in plot_runs([run])]
    assert {"ablations.png", "readouts.png"} <= set(paths)
    # Other weights: nothing is kept.
    (run.folder / "ablations.jsonl").write_text(json.dumps(rows[0] | {"weights": "others"}) + "\n")
    assert rows_on_file(run.folder / "ablations.jsonl", {"weights": weights_digest(run)}) == []
