"""Laws of `looped memory`: a line is the model it names, measured by its task's own measure; bytes by arithmetic."""

import pytest
import torch

from data_builders.text_batches import spread_blocks
from looplab.bench.memory import measure_memory, with_memory
from looplab.cli import main
from looplab.runs.folder import open_run
from looplab.runs.models import load_run_model
from looplab.tasks.text.perplexity import block_losses, run_blocks
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.cache_layers_looped import CACHE_NAME
from toy_runs import rows_of
from toys import FP32, KV_SHARINGS, make_ids, make_model


def lines(path) -> dict:
    return {(row["kv_sharing"], row["chunk"]): row for row in rows_of(path)}


@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
def test_the_weights_are_those_of_the_checkpoint(kv_sharing):
    base = "gated" if kv_sharing == "gated" else "per_loop"
    model = make_model(kv_sharing=base)
    twin = with_memory(model, kv_sharing, None)
    assert twin.config.kv_sharing == kv_sharing
    assert model.config.kv_sharing == base
    fresh = LoopedForCausalLM(LoopedConfig.from_dict(model.config.to_dict() | {"kv_sharing": kv_sharing})).eval()
    fresh.load_state_dict(model.state_dict())
    assert twin(make_ids()).logits.equal(fresh(make_ids()).logits)


def test_every_memory_of_a_per_loop_run_is_measured(trained, tmp_path, capsys):
    run = trained.copy(tmp_path, "text")
    assert main(["memory", str(run), "--chunks", "1", "0", "--limit", "3"]) == 0
    table = capsys.readouterr().out
    rows = lines(run / "memory.jsonl")
    assert list(rows) == [
        ("per_loop", 0), ("first", 0), ("natural", 0), ("last", 1), ("last", 0), ("mean", 1), ("mean", 0)
    ]  # fmt: skip
    assert [row["trained"] for row in rows.values()] == [True] + [False] * 6
    # 2 loops of one layer; keys and values of 32 floats.
    assert {key: row["kv_bytes"] for key, row in rows.items()} == {
        key: 2 * 32 * 4 * (2 if key[0] == "per_loop" else 1) for key in rows
    }
    # One call is one chunk, in which a loop's queries see its own rows.
    assert rows["last", 0]["loss"] == pytest.approx(rows["per_loop", 0]["loss"], abs=1e-6)
    assert rows["last", 1]["loss"] != pytest.approx(rows["per_loop", 0]["loss"], abs=1e-6)
    assert "per_loop*" in table
    assert "written to" in table


def test_a_line_is_the_loss_of_decoding(trained, tmp_path):
    """Token by token through a cache, against the line of chunk 1."""
    run = trained.copy(tmp_path, "text", "--model.kv_sharing=gated", "--model.prefill_chunk=8")
    rows = lines(measure_memory(open_run(run), chunks=(1, 8), limit=2))
    assert list(rows) == [("gated", 1), ("gated", 8)]
    model, tokenizer = load_run_model(open_run(run))
    blocks = run_blocks(open_run(run), tokenizer)["test"]
    numbers = spread_blocks(len(blocks), 2)
    expected = block_losses(model, blocks, numbers, [2])[2]
    torch.testing.assert_close(torch.tensor(rows["gated", 8]["block_losses"]).double(), expected, **FP32)
    chosen = blocks.rows(numbers)
    with torch.inference_mode():
        cache, logits = None, []
        for token in chosen["input_ids"].split(1, dim=1):
            output = model(token, **{CACHE_NAME: cache}, use_cache=True)
            cache = output[CACHE_NAME]
            logits.append(output.logits)
    losses = torch.nn.functional.cross_entropy(
        torch.cat(logits, 1).transpose(1, 2), chosen["shift_labels"], reduction="none"
    ).mean(1)
    torch.testing.assert_close(torch.tensor(rows["gated", 1]["block_losses"]), losses, **FP32)


def test_hops_are_measured_by_accuracy(trained, tmp_path):
    run = trained.copy(tmp_path, "hops")
    rows = lines(measure_memory(open_run(run), chunks=(1,), limit=8, loops=3))
    assert {row["loops"] for row in rows.values()} == {3}
    assert all(0 <= row["interval"][0] <= row["accuracy"] <= row["interval"][1] <= 1 for row in rows.values())
    assert len({row["n"] for row in rows.values()}) == 1
    # Without positions and with layers at the identity's start nothing else is the same by chance.
    assert rows["per_loop", 0]["kv_bytes"] == 3 * rows["last", 1]["kv_bytes"]


def test_a_run_without_a_measure_is_named(tmp_path, capfd):
    (tmp_path / "recipe.yaml").write_text("data: {task: molecules}\n")
    (tmp_path / "summary.json").write_text("{}")
    assert main(["memory", str(tmp_path)]) == 2
    assert "looped memory is not for molecules: it is for hops, text, sequence" in capfd.readouterr().err
