"""Laws of `looped plan`: its numbers by hand, what it suggests, what it refuses; and the page it writes."""

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from looplab.cli import main
from looplab.instruments.devices import DEVICES
from looplab.planning import page
from looplab.planning.memory import SINGLE, WAYS
from looplab.planning.plan import IN_A_MACHINE, LARGEST_SHARE, Setup, device_of, make_plan
from looplab.planning.told import told
from looplab.tasks.registry import TASKS
from looplab.training.recipe import read_recipe
from modeling_looped import LoopedForCausalLM
from toys import ROOT, make_ids


def plan_of(name: str, *flags: str, count: int = 1, gpu: str = "h100", share: float = 0.4):
    return make_plan(read_recipe(ROOT / "recipes" / f"{name}.yaml", flags), Setup(DEVICES[gpu], count, share))


def test_flops_are_those_of_the_depths_that_training_draws():
    """The mean over every loop count with its chance, each counted by torch."""
    plan = plan_of("smoke_text", "--depth={kind: uniform, minimum: 1, maximum: 3}", "--model.vocab_size=400")
    model = LoopedForCausalLM(plan.config).train()
    model.set_attn_implementation("eager")
    ids = make_ids(8, 32)
    counted = []
    for loops in (1, 2, 3):
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids, num_loops=loops, use_cache=False).loss.backward()
        counted.append(counter.get_total_flops())
    assert plan.loops == {1: pytest.approx(1 / 3), 2: pytest.approx(1 / 3), 3: pytest.approx(1 / 3)}
    assert plan.flops() == pytest.approx(sum(counted) / 3)
    assert plan.tokens == 8 * 32


def test_hours_are_flops_at_a_share_of_the_peak():
    plan = plan_of("ouro/ouro_1_4b", count=64, share=0.5)
    assert plan.hours == pytest.approx(357_628 * plan.flops() / (64 * 0.5 * 989e12) / 3600)
    twice = replace(plan, setup=replace(plan.setup, count=128, share=0.25))
    assert twice.hours == pytest.approx(plan.hours)
    assert plan.tokens_per_second * 64 * plan.hours * 3600 == pytest.approx(plan.tokens * 357_628)


def test_a_run_that_time_ends_has_the_updates_that_fit_into_it():
    plan = plan_of("smoke_text", "--max_steps=null", "--max_seconds=7200")
    assert plan.hours == pytest.approx(2)


def test_the_smallest_count_fits_and_fewer_do_not():
    plan = plan_of("ouro/ouro_1_4b", count=64)
    count, way = plan.smallest()
    assert plan.fits(plan.process(way, count))
    assert plan.process(way, count).total <= LARGEST_SHARE * 80e9
    for fewer in (less for less in plan.counts() if less < count):
        assert not any(plan.fits(plan.process(each, fewer)) for each in WAYS)
    tiny = replace(plan, setup=replace(plan.setup, device=replace(plan.setup.device, memory=10**9)))
    assert tiny.smallest() is None
    assert {tiny.binds(way) for way in WAYS} == {"memory"}
    assert "none: raise accumulation_steps" in told(tiny)


def test_what_binds_is_the_slower_of_sending_and_computing():
    plan = plan_of("ouro/ouro_1_4b", count=64)
    assert plan.binds("DDP") == "computing"
    process = plan.process("DDP", 64)
    slow = replace(plan, setup=replace(plan.setup, network=process.sent / plan.compute_seconds(64) / 2))
    assert slow.send_seconds(process, 64) == pytest.approx(2 * slow.compute_seconds(64))
    assert slow.binds("DDP") == "traffic"
    assert slow.setup.link(IN_A_MACHINE) == plan.setup.device.link


def test_sharding_divides_what_it_divides():
    plan = plan_of("ouro/ouro_1_4b", count=64)
    whole, part = plan.process("DDP", 64), plan.process("FSDP2", 64)
    assert part.held["optimizer"] == -(-whole.held["optimizer"] // 64)
    assert part.held["weights"] - 2 * plan.weights.all == -(-whole.held["weights"] // 64)
    assert part.held["activations"] == whole.held["activations"]
    alone = plan.process("DDP", 1)
    assert (alone.sent, alone.held["gradients"]) == (0, SINGLE * plan.weights.trained)


def test_hop_counts_come_in_the_shares_of_their_rows():
    """Of chains the builder knows how many rows there are of each; the answer is learnt alone."""
    shape = read_recipe(ROOT / "recipes" / "paper" / "composition_r4.yaml").data.shape()
    assert shape.vocabulary == 3 + 2_000 + 200
    assert shape.tokens == {3: 40_000 / 313_600, 4: 273_600 / 313_600}
    assert shape.logits == 1
    data = TASKS["khop"].Data(config="quickstart", readout="last", weighting="uniform")
    assert data.shape().tokens == {k + 1: 1 / 8 for k in range(1, 9)}


@pytest.mark.slow
def test_the_command_reads_no_data_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--data.files=[nowhere/*.md]", "--gpu", "mine", "--memory", "96", "--peak", "500", "--count", "2"]
    assert main(["plan", "smoke_text", *flags]) == 0
    said = capsys.readouterr().out
    assert said.startswith("smoke_text on 2 x mine (96 GB, 500 TFLOP/s in fp32), 40 % of the peak")
    for what in ("FLOPs per token", "activations", "sent per update", "binds", "hours", "smallest"):
        assert f"\n{what}" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["smoke_text", "--gpu", "h101"], "--gpu h101 is not known: say its --memory in GB and its --peak"),
        (["smoke_text", "--count", "3"], "batch_size 8 does not divide into 3 processes x 1 accumulation_steps"),
        (["molecules/smoke_molecules"], "say --tokens N"),
        (["melt/text_scratch", "--data.vocab_size=null", "--data.tokenizer=x"], "say --model.vocab_size N"),
        (["smoke_text", "--optim.lrr=3"], "optim.lrr is not a recipe field"),
        (["retrofit_smollm2", "--init_from=/nowhere"], "name another folder in init_from"),
    ],
)
def test_what_is_not_known_is_asked_for(line, said, capsys):
    assert main(["plan", *line]) == 2
    assert said in capsys.readouterr().err


def test_a_named_gpu_may_have_more_memory():
    assert device_of("H100", memory=94).memory == 94 * 10**9
    assert device_of("h100", memory=94).bf16 == DEVICES["h100"].bf16


# docs/results/plans.md

EVERY = page.LANGUAGE | page.HOPS
FEW = ("lm/looped_135m", "ouro/ouro_1_4b", "hyperloop/paper/hyperloop_16l", "paper/composition_r4")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FEW)) for name in EVERY])
def test_the_page_says_what_the_code_says(name):
    """`python -m looplab.planning.page` writes it anew."""
    written = (ROOT / "docs" / page.PAGE).read_text(encoding="utf-8")
    assert f"| {' | '.join(page.cells(name, *EVERY[name]))} |" in written


def test_the_reported_speed_is_a_share_of_the_peak():
    written = (ROOT / "docs" / page.PAGE).read_text(encoding="utf-8")
    assert 0.2 < page.reported_share() < 0.6
    assert f"That is {100 * page.reported_share():.0f} % of the peak" in written
    assert sum(line.startswith("| `") for line in written.splitlines()) == len(EVERY)
