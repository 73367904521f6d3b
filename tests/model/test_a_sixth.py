"""A system that is added by a class and a name runs through everything: the model, training, generation, the tools."""

import ast
import json
from itertools import product

import pytest
import torch

import train
from looplab.bench.memory import memories
from looplab.cli import main
from looplab.instruments.flops import connection_flops, forward_flops
from looplab.instruments.halting_settings import rules_to_try, setting_of, threshold_text
from looplab.instruments.traces import trace
from looplab.tasks.hops.halting import loops_used, sweep
from modeling_looped import LoopedForCausalLM
from modeling_looped.cache_looped import SHARINGS, OneEntrySharing
from modeling_looped.connections_looped import CONNECTIONS, Connection
from modeling_looped.gates_looped import KV_GATES, KVGate
from modeling_looped.halting_looped import RULES, Rule
from modeling_looped.losses_looped import EXIT_LOSSES, ExitObjective
from toys import FP32, ROOT, make_config, make_ids, make_model, stepwise


class HalfConnection(Connection):
    """state = (state + core(state)) / 2."""

    @classmethod
    def flops(cls, config, loops) -> int:
        return 0

    def read(self, state, embeds, loop):
        return state, None

    def write(self, state, carry, output, loop):
        return (state + output) / 2


class FirstEntries:
    """What stays of a step: the entries of its first loop."""

    def add(self, keys, values, rows, is_first):
        if is_first:
            self.first = keys, values

    def result(self):
        return self.first


class EarlySharing(OneEntrySharing):
    """Tokens of one chunk see each other at the current loop, later chunks see the first loop."""

    rewrites = True
    stays = FirstEntries


class HalfGate(KVGate):
    """h_t = (h_{t-1} + x_t) / 2."""

    def mix(self, hidden_states, latent, loop):
        return torch.lerp(hidden_states, latent, 0.5)


class EntropyRule(Rule):
    """Halt at the first loop with H(p_t) < bound (nats)."""

    def __init__(self, bound: float = 3.0):
        self.bound = bound

    def step(self, memory, state, readout):
        log_p = readout(state).float().log_softmax(-1)
        return None, -(log_p.exp() * log_p).sum(-1) < self.bound

    def stops(self, trace):
        return trace.entropy < self.bound

    @classmethod
    def grid(cls, effort, vocab_size):
        return [{"bound": bound} for bound in (3.4, 3.0)]


class EveryLoopLoss(ExitObjective):
    """The mean of the losses of all loops."""

    def per_token(self, gate_logits, losses, loops_run):
        return losses.sum(-1) / loops_run


@pytest.fixture(autouse=True)
def a_sixth(monkeypatch):
    for registry, name, kind in (
        (CONNECTIONS, "half", HalfConnection),
        (SHARINGS, "early", EarlySharing),
        (KV_GATES, "half", HalfGate),
        (RULES, "entropy", EntropyRule),
        (EXIT_LOSSES, "every_loop", EveryLoopLoss),
    ):
        monkeypatch.setitem(registry, name, kind)


NEW = {
    "connection": {"loop_connection": "half"},
    "policy": {"kv_sharing": "early", "prefill_chunk": 2},
    "gate": {"kv_sharing": "gated", "kv_gate": "half"},
    "objective": {"exit_gate": True, "exit_loss": "every_loop"},
}


@pytest.mark.parametrize("kind", NEW)
def test_it_changes_the_model_trains_and_is_saved(kind, tmp_path):
    model, ids = make_model(**NEW[kind]), make_ids()
    old = make_model(**{"exit_gate": kind == "objective", "kv_sharing": "gated" if kind == "gate" else "per_loop"})
    assert not model(ids, labels=ids).loss.equal(old(ids, labels=ids).loss)
    model.train()(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval().save_pretrained(tmp_path)
    assert LoopedForCausalLM.from_pretrained(tmp_path)(ids).logits.equal(model(ids).logits)


@pytest.mark.parametrize("kind", NEW)
def test_it_decodes_token_by_token_what_it_computes_at_once(kind):
    rewrites = SHARINGS[NEW[kind].get("kv_sharing", "per_loop")].rewrites
    model, ids = make_model(**NEW[kind] | ({"prefill_chunk": 1} if rewrites else {})), make_ids()
    torch.testing.assert_close(stepwise(model, ids, [1] * 7), model(ids).logits, **FP32)
    mixed = model(ids, num_loops=torch.tensor([3, 1, 2])).logits
    for row, loops in enumerate((3, 1, 2)):
        alone = model(ids[row : row + 1], num_loops=loops).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, **FP32)


@pytest.mark.parametrize("kind", NEW)
def test_it_generates_with_every_rule_and_drafts_or_says_why_not(kind):
    model, ids = make_model(**NEW[kind]), make_ids(rows=1)
    call = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    for rule in ("kl", "entropy"):
        assert model.generate(ids, num_loops=5, halting=rule, **call).loops_used.max() <= 5
    if model.model.sharing.rewrites:
        with pytest.raises(ValueError, match="cannot verify drafted tokens"):
            model.generate(ids, draft_loops=1, **call)
    else:
        drafted = model.generate(ids, draft_loops=1, **call).sequences
        assert drafted.equal(model.generate(ids, **call).sequences)


def test_the_tools_know_it():
    model = make_model(loop_connection="half")
    assert connection_flops(model.config, range(2)) == 0
    assert forward_flops(model.config, 1, 4, 2) == forward_flops(make_config(), 1, 4, 2)
    assert {"early": [None, 1]}.items() <= {
        sharing: [chunk for name, chunk in memories(model, (0, 1)) if name == sharing] for sharing in SHARINGS
    }.items()
    for effort in ("traced", "decoded", "sampled"):
        assert {"rule": "entropy", "bound": 3.4} in rules_to_try(model.config, effort)
    row = {"rule": "entropy", "bound": 3.4, "num_loops": 4}
    assert setting_of(row).row() == row
    assert threshold_text(row) == "3.4"


def test_a_rule_stops_on_a_trace_where_it_stops_in_a_run():
    model, ids = make_model(), make_ids(rows=12)
    traced, used = trace(model, ids, ids[:, 0], 6), set()
    for setting in (setting for setting in sweep(model.config, [6]) if setting.rule == "entropy"):
        run = model(ids, num_loops=6, halting=setting.halting, logits_to_keep=1).loops_used[:, -1]
        assert run.equal(loops_used(setting, traced))
        used |= set(run.tolist())
    assert len(used) > 1


@pytest.mark.slow
def test_a_run_trains_on_it_and_commands_read_the_run(tmp_path, capsys):
    model = "--model={loop_connection: half, kv_sharing: early, exit_gate: true, exit_loss: every_loop}"
    flags = [f"--output_dir={tmp_path}", "--name=sixth", "--max_steps=2", "--optim.warmup_steps=0", model]
    train.main(train.read_recipe(ROOT / "recipes" / "smoke.yaml", flags))
    assert main(["memory", str(tmp_path / "sixth"), "--chunks", "1", "--limit", "8"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "sixth" / "memory.jsonl").read_text().splitlines()]
    assert [row["kv_sharing"] for row in rows if row["trained"]] == ["early"]
    assert "early" in capsys.readouterr().out


FIELDS = {"kv_sharing": SHARINGS, "loop_connection": CONNECTIONS, "exit_loss": EXIT_LOSSES, "kv_gate": KV_GATES}
# Distillation is from one entry per loop into the latent of KV gates: it is about these two.
NAMED_ON_PURPOSE = [("distillation.py", "gated"), ("distillation.py", "per_loop")]


def test_nothing_asks_a_system_for_its_name():
    """What differs between systems they say themselves: a name that code compares with is a place to forget."""
    found = []
    for path in sorted([*ROOT.glob("modeling_looped/*.py"), *ROOT.glob("looplab/**/*.py"), ROOT / "train.py"]):
        compares = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
        for node in compares:
            sides = [node.left, *node.comparators]
            fields = [side.attr for side in sides if isinstance(side, ast.Attribute) and side.attr in FIELDS]
            strings = [part.value for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant)]
            found += [(path.name, name) for field, name in product(fields, strings) if name in FIELDS[field]]
    assert found == NAMED_ON_PURPOSE
