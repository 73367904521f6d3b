"""`looped lens` on text: what it measures, against a call per loop count, and that it goes on where it stopped."""

import json
import math

import pytest
import torch

from looplab.cli import main
from looplab.runs.folder import open_run
from looplab.runs.models import load_run_model
from looplab.tasks.language import lens
from looplab.tasks.language.lens_figures import lens_figure, means, shown
from looplab.tasks.text.perplexity import run_blocks
from toy_runs import failure, rows_of
from toys import make_model


@pytest.fixture
def run(trained, tmp_path):
    return trained.copy(tmp_path, "text")


@pytest.mark.parametrize("fields", [[], ["--model.kv_sharing=last", "--model.prefill_chunk=4"]])
def test_every_number_is_that_of_a_call_with_so_many_loops(trained, tmp_path, fields):
    run = trained.copy(tmp_path, "text", *fields)
    assert main(["lens", str(run), "--loops", "3", "--limit", "2"]) == 0
    model, tokenizer = load_run_model(open_run(run))
    blocks, rows = run_blocks(open_run(run), tokenizer)["test"], rows_of(run / "lens.jsonl")
    numbers = sorted({row["block"] for row in rows if row["measure"] == "block"})
    assert len(numbers) == 2
    for number in numbers:
        found = blocks.rows(torch.tensor([number]))
        with torch.no_grad():
            p = [model(found["input_ids"], num_loops=r).logits[0].softmax(-1) for r in (1, 2, 3)]
        for loops in (1, 2, 3):
            (row,) = (r for r in rows if r["measure"] == "block" and r["block"] == number and r["loops"] == loops)
            here, last = p[loops - 1], p[-1]
            tokens = range(len(here))
            final = last.argmax(-1)
            labels = found["shift_labels"][0]
            expected = {
                "entropy": sum(-(here[t] * here[t].log()).sum() for t in tokens),
                "kl": sum((last[t] * (last[t] / here[t]).log()).sum() for t in tokens),
                "next": sum(-here[t, labels[t]].log() for t in tokens),
                "agrees": sum(here[t].argmax() == final[t] for t in tokens),
                "rank": sum(1 + (here[t] > here[t, final[t]]).sum() for t in tokens),
            }
            for name, value in expected.items():
                assert row[name] == pytest.approx(float(value) / len(here), abs=2e-4), name
    tokens = [row for row in rows if row["measure"] == "token" and row["loops"] == 3]
    assert all(row["agrees"] and row["rank"] == 1 and row["kl"] == 0 for row in tokens)
    assert len(tokens) == min(lens.TOKENS, blocks.sequence_length)


def test_a_lens_that_was_interrupted_goes_on(run, monkeypatch, capfd):
    line = ["lens", str(run), "--limit", "12"]
    assert main(line) == 0
    whole = rows_of(run / "lens.jsonl")
    (run / "lens.jsonl").unlink()
    measured, real = [], lens.block_rows

    def interrupted(*arguments):
        if len(measured) == 9:
            measured.append(None)
            raise KeyboardInterrupt
        measured.append(arguments[3])
        return real(*arguments)

    monkeypatch.setattr(lens, "block_rows", interrupted)
    assert main(line) == 130
    assert len({row.get("block") for row in rows_of(run / "lens.jsonl")} - {None}) == 8  # what was written
    assert main(line) == 0
    assert len(measured) == 9 + 1 + 4  # what was not
    assert rows_of(run / "lens.jsonl") == whole
    assert main([*line, "--loops", "1"]) == 0  # another measurement begins anew
    assert {row["last"] for row in rows_of(run / "lens.jsonl")} == {1}


def test_a_text_of_ones_own(run, tmp_path, capfd):
    assert main(["lens", str(run), "--text", "reads the $x_1$ 日本 loop"]) == 0
    rows = rows_of(run / "lens.jsonl")
    assert {row["measure"] for row in rows} == {"token"}
    assert "".join(row["token"] for row in rows if row["loops"] == 1).startswith("reads the $x_1$ ")
    assert [row["next"] for row in rows if row["follows"] is None] == [None] * len({row["loops"] for row in rows})
    assert (run / "figures" / "lens.png").is_file()
    assert "no tokens" in failure(capfd, "lens", run, "--text", "")


def test_the_figure_shows_every_loop_and_token():
    rows = [
        {"measure": "token", "position": position, "token": f" t{position}", "follows": None, "loops": loops}
        | {"top": "word" * position, "sure": 0.5, "rank": 1, "entropy": 1.0, "kl": 0.0, "next": None, "agrees": True}
        for position in range(4)
        for loops in range(1, 6)
    ]
    above, below = lens_figure(rows).subfigs
    assert [text.get_text() for text in above.axes[0].get_yticklabels()] == ["1", "2", "3", "4", "5"]
    assert [text.get_text() for text in above.axes[0].get_xticklabels()] == ["·t0", "·t1", "·t2", "·t3"]
    assert len(above.axes[0].texts) == 20
    assert len(below.axes) == 3
    assert "next" not in means(rows)[1]
    assert shown(" averylongtoken") == "·averylo…"
    assert not math.isnan(json.loads(json.dumps(means(rows)))["1"]["kl"])


def test_distances_of_a_model_whose_loops_differ():
    model = make_model(residual_init="normal", initializer_range=0.4)
    ids = torch.randint(0, model.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    readings = lens.read_loops(model, ids, torch.full_like(ids, -100), 4)
    with torch.no_grad():
        log_p = [model(ids, num_loops=loops).logits.log_softmax(-1) for loops in (1, 2, 3, 4)]
    for loops, reading in readings.items():
        here, last = log_p[loops - 1], log_p[-1]
        kl = torch.nn.functional.kl_div(here, last, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(reading["kl"], kl, atol=1e-4, rtol=1e-3)
        assert (reading["kl"] > 0.01).all() or loops == 4
        assert reading["rank"].tolist() == [
            [1 + int((row > row[final]).sum()) for row, final in zip(rows, finals, strict=True)]
            for rows, finals in zip(here, last.argmax(-1), strict=True)
        ]
        assert reading["next"].isnan().all()
