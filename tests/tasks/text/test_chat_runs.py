"""A run on conversations: it learns what assistants wrote, resumes, and is measured on that."""

import math
import re

import pytest
import torch
from chat_toys import make_chats, make_tokenizer, write_chats
from transformers import AutoTokenizer

from data_builders import ChatBlocks, load_task
from looplab.cli import main as looped
from looplab.runs.folder import open_run
from looplab.tasks.text.perplexity import TextQuantizing
from modeling_looped import LoopedForCausalLM
from toy_runs import measured, rows_of
from toys import ROOT
from train import main, read_recipe

SHARES = {"validation_share": 0.2, "test_share": 0.2}
NO_CHATS = {
    "--data.vocab_size=300": "which conversations need: name one in init_from or data.tokenizer",
    "--data.files=[a.txt, b.jsonl]": "data.files mixes text and conversations (b.jsonl)",
    "--data.files=[a.txt]": "data.assistant_only_loss is for conversations",
}


@pytest.fixture
def flags(tmp_path):
    """Flags of the smoke recipe, for sixty conversations."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    files = write_chats(tmp_path / "chats.jsonl", make_chats())
    return [
        f"--output_dir={tmp_path}", f"--data.files=[{files}]", f"--data.tokenizer={tmp_path / 'tokenizer'}",
        "--data.vocab_size=null", "--data.sequence_length=16", "--data.validation_tokens=null",
        f"--data.overrides={SHARES}", "--max_steps=4", "--checkpoint_every=2", "--check_every=2", "--batch_size=4",
        "--model.residual_dropout=0.2",
    ]  # fmt: skip


def recipe(flags, *more):
    return read_recipe(ROOT / "recipes" / "smoke_text.yaml", [*flags, *more])


def test_a_run_on_conversations_resumes_and_is_measured_on_what_assistants_wrote(flags, tmp_path):
    main(recipe(flags, "--name=whole"))
    main(recipe(flags, "--name=cut"))
    for later in ("model", "checkpoints/step-000000004"):
        (tmp_path / "cut" / later).rename(tmp_path / later.replace("/", "-"))
    main(recipe(flags, "--name=cut"))
    assert measured(tmp_path / "cut") == measured(tmp_path / "whole")
    folder = tmp_path / "whole" / "model"
    model, tokenizer = LoopedForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert looped(["eval", str(tmp_path / "whole"), "--loops", "1", "2"]) == 0
    (row,) = [row for row in rows_of(tmp_path / "whole" / "text.jsonl") if row["loops"] == 2]
    splits = load_task("text", "chats", files=[str(tmp_path / "chats.jsonl")], **SHARES)
    for split, check in (("validation", True), ("test", False)):
        blocks = ChatBlocks(splits[split], tokenizer, 16)
        rows = blocks.rows(torch.arange(len(blocks)))
        with torch.no_grad():
            log_p = model(rows["input_ids"], num_loops=2).logits.log_softmax(-1)
        losses = [
            [-log_p[i, t, label].item() for t, label in enumerate(labels) if label != -100]
            for i, labels in enumerate(rows["shift_labels"].tolist())
        ]
        if check:
            loops = open_run(tmp_path / "whole").summary()["gate_loops"]
            assert loops == 2
            every = [loss for block in losses for loss in block]
            assert measured(tmp_path / "whole", "held_out")[-1][1]["loss"] == pytest.approx(sum(every) / len(every))
        else:
            means = [sum(block) / len(block) for block in losses]
            assert row["block_losses"] == pytest.approx(means, rel=1e-4)
            assert row["tokens"] == sum(map(len, losses))
            assert TextQuantizing(open_run(tmp_path / "whole"), tokenizer).test_tokens == row["tokens"]
    assert looped(["lens", str(tmp_path / "whole"), "--limit", "1"]) == 0  # of all tokens
    assert all(math.isfinite(row["next"]) for row in rows_of(tmp_path / "whole" / "lens.jsonl"))


def test_a_bad_row_stops_a_run_before_it_begins(flags, tmp_path):
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 61: no message is of an assistant.*: correct the row"):
        main(recipe(flags, "--name=bad"))
    assert not (tmp_path / "bad" / "metrics.jsonl").exists()
    make_tokenizer(template=None).save_pretrained(tmp_path / "tokenizer")
    write_chats(tmp_path / "chats.jsonl", make_chats())
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="the tokenizer has no chat template, which conversations need"):
        main(recipe(flags, "--name=bad"))


@pytest.mark.parametrize("flag", NO_CHATS)
def test_fields_that_do_not_go_with_conversations_are_refused(flag, flags):
    more = [flag, "--data.assistant_only_loss=true"] if "files" in flag else [flag, "--data.tokenizer=null"]
    with pytest.raises(ValueError, match=re.escape(NO_CHATS[flag])):
        recipe(flags, *more)
