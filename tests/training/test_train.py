"""Laws of train.py: interrupted equals uninterrupted, a batch is the same however it is split, errors come first.

Runs are a few steps of the smoke recipe with a smaller task.
"""

import importlib.metadata
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from accelerate import Accelerator
from transformers import AutoTokenizer, GenerationConfig

from data_builders import load_task, train_byte_bpe
from looplab.runs.yaml_text import parse_yaml
from looplab.tasks.language.training import held_out_exits
from looplab.training.optimizers import lr_factor
from looplab.training.recipe import Optim, build_recipe
from modeling_looped import LoopedForCausalLM
from toy_runs import measured, reset_accelerator
from toys import ROOT, make_model, write_pages
from train import main, read_recipe

SMOKE = ROOT / "recipes" / "smoke.yaml"


@pytest.fixture
def recipe(tmp_path):
    """recipe("name", "--field=value", ...): the smoke recipe, its runs below the test's folder."""
    return lambda name, *flags: read_recipe(SMOKE, [f"--output_dir={tmp_path}", f"--name={name}", *flags])


def launch(*command: str, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-2000:]


# Resume


HYPER = ("--model.loop_connection=hyper", "--model.num_streams=2")
DROPOUT = "--model.residual_dropout=0.2"


def test_a_resumed_run_equals_an_uninterrupted_one(recipe, tmp_path):
    """Weights, both optimizers, dropout, warm-up, data and depth streams: any of them off would move the loss."""
    main(recipe("whole", DROPOUT))
    main(recipe("parts", DROPOUT))
    for later in ("model", "checkpoints/step-000000020"):
        (tmp_path / "parts" / later).rename(tmp_path / later.replace("/", "-"))
    main(recipe("parts", DROPOUT))
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")
    assert measured(tmp_path / "parts", "gate") == measured(tmp_path / "whole", "gate")
    weights = [
        LoopedForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_a_killed_run_equals_an_uninterrupted_one(recipe, tmp_path):
    """kill -9 at any moment, then the same command: no row is lost, doubled or different."""
    flags = ["--max_steps=300", "--checkpoint_every=40", "--check_every=50", DROPOUT]
    process = launch("train.py", str(SMOKE), f"--output_dir={tmp_path}", "--name=killed", *flags)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 60:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_at = len(measured(tmp_path / "killed"))
    assert 60 - 2 <= killed_at < 300
    main(recipe("killed", *flags))
    main(recipe("whole", *flags))
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")
    assert measured(tmp_path / "killed", "gate") == measured(tmp_path / "whole", "gate")


def test_a_corrupt_checkpoint_is_passed_over(recipe, tmp_path, caplog):
    main(recipe("run", "--checkpoint_every=6"))
    whole = measured(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    weights = checkpoints / "step-000000020" / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:-100])
    (checkpoints / "partial").mkdir()
    (checkpoints / "partial" / "optimizer.bin").write_text("half")
    main(recipe("run", "--checkpoint_every=6"))
    assert "step-000000020 is incomplete or corrupt" in caplog.text
    assert measured(tmp_path / "run") == whole
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000000018", "step-000000020"]


def test_without_an_intact_checkpoint_the_run_begins_again(recipe, tmp_path, caplog):
    main(recipe("run"))
    whole = measured(tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text('{"state": {"sta')
    main(recipe("run"))
    assert caplog.text.count("is incomplete or corrupt") == 2
    assert measured(tmp_path / "run") == whole


def test_a_finished_run_is_left_as_it_is(recipe, tmp_path):
    first = main(recipe("run"))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    second = main(recipe("run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    assert second == first


def test_another_recipe_in_an_existing_run_raises(recipe, tmp_path):
    main(recipe("run"))
    whole = measured(tmp_path / "run")
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.001 -> 0\.5.*--overwrite true"):
        main(recipe("run", "--optim.lr=0.5"))
    assert measured(tmp_path / "run") == whole
    main(recipe("run", "--optim.lr=0.5", "--overwrite=true"))
    assert measured(tmp_path / "run") != whole


# One batch, however it is split


@pytest.mark.parametrize("flags", [[], ["--data.pad_to=12"]])
def test_accumulated_micro_batches_are_one_batch(recipe, tmp_path, flags):
    main(recipe("whole", "--optim.kind=adamw", *flags))
    main(recipe("parts", "--optim.kind=adamw", "--accumulation_steps=2", *flags))
    assert [loss for _, loss in measured(tmp_path / "parts")] == pytest.approx(
        [loss for _, loss in measured(tmp_path / "whole")], abs=1e-5
    )


@pytest.mark.slow
def test_two_processes_are_one_batch(recipe, tmp_path):
    """DDP over gloo, accumulating; `accelerate launch --cpu --num_processes 2` would start one process only."""
    flags = ["--optim.kind=adamw", "--accumulation_steps=2"]
    command = ["--nproc_per_node=2", "--standalone", "train.py", str(SMOKE), f"--output_dir={tmp_path}"]
    finish(launch("-m", "torch.distributed.run", *command, "--name=two", *flags, ACCELERATE_USE_CPU="true"))
    main(recipe("one", *flags))
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["hardware"]["processes"] == 2
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert [step for step, _ in two] == [step for step, _ in one]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-5)
    assert measured(tmp_path / "two", "gate") == measured(tmp_path / "one", "gate")
    assert len(list((tmp_path / "two" / "checkpoints" / "step-000000020").glob("random_states_*.pkl"))) == 2


def test_a_batch_that_does_not_divide_raises(recipe):
    with pytest.raises(ValueError, match=r"batch_size 16 does not divide into 1 processes x 3"):
        main(recipe("run", "--accumulation_steps=3"))


# Gate and curriculum


def test_evaluating_more_often_changes_nothing(recipe, tmp_path):
    """Training mode is on again after each evaluation, else dropout would be off for ever (Kohli et al.'s code)."""
    main(recipe("often", DROPOUT, "--check_every=2"))
    main(recipe("never", DROPOUT, "--check_every=1000"))
    assert measured(tmp_path / "often") == measured(tmp_path / "never")


@pytest.mark.slow
def test_the_curriculum_adds_a_hop_when_the_gate_passes(recipe, tmp_path):
    """Two entities make every relation a swap or nothing: parity, learnt in seconds."""
    flags = [
        "--data.overrides={num_entities: 2, num_relations: 8, train_hops: 3, max_hops: 8, gate_per_hop: 64}",
        "--data.weighting=uniform",
        "--batch_size=64",
    ]
    curriculum = "--curriculum={start_hops: 2, threshold: 0.9, min_steps: 30, after_last: stop}"
    summary = main(recipe("run", *flags, "--check_every=25", curriculum, "--max_steps=400"))
    trained, checked = {2: set(), 3: set()}, []
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "hops" in row:
            trained[row["stage"]].add(row["hops"])
        else:
            checked.append((row["stage"], row["gate"][str(row["stage"])]))
    assert trained == {2: {1, 2}, 3: {1, 2, 3}}
    assert max(i for i, (stage, _) in enumerate(checked) if stage == 2) >= 1  # min_steps: not at the first check
    assert [accuracy > 0.9 for _, accuracy in checked][-1]
    assert summary["learnable_depth"] == summary["stage"] == 3
    assert summary["trained_hops"] == [1, 2, 3]
    assert summary["steps"] < 400


# The result


def test_the_model_folder_alone_scores_what_the_run_measured(recipe, tmp_path):
    summary = main(recipe("run"))
    folder = tmp_path / "run" / "model"
    model, tokenizer = LoopedForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).num_loops == model.config.num_loops == 4
    validation = load_task(
        "khop",
        "quickstart",
        num_entities=8,
        num_relations=2,
        train_hops=3,
        max_hops=8,
        gate_per_hop=16,
        test_per_hop=16,
    )
    two_hops = validation["validation"].filter(lambda hops: hops == 2, input_columns="hops")
    answers = []
    for text in two_hops["text"]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        answers.append(tokenizer.decode(model.generate(ids)[0, ids.shape[1] :]))
    accuracy = sum(given == asked for given, asked in zip(answers, two_hops["answer"], strict=True)) / len(answers)
    assert accuracy == pytest.approx(summary["gate"]["2"])


def test_snapshots_keep_the_model_on_its_way(recipe, tmp_path):
    """Each is a model folder; the last step's is the model, and keeping them changes nothing."""
    main(recipe("kept", DROPOUT, "--snapshots=[5, 20]"))
    main(recipe("bare", DROPOUT))
    assert measured(tmp_path / "kept") == measured(tmp_path / "bare")
    snapshots = sorted((tmp_path / "kept" / "snapshots").iterdir())
    assert [folder.name for folder in snapshots] == ["step-000000005", "step-000000020"]
    early, late, final = (
        LoopedForCausalLM.from_pretrained(folder).state_dict() for folder in (*snapshots, tmp_path / "kept" / "model")
    )
    assert all(torch.equal(late[key], final[key]) for key in final)
    assert not all(torch.equal(early[key], final[key]) for key in final)


def test_an_answer_may_be_read_at_the_last_relation(recipe, tmp_path):
    """The tokenizer that is saved appends nothing, and the run measured what the folder alone answers."""
    summary = main(recipe("run", "--data.readout=last", "--data.weighting=uniform", "--max_steps=60"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert len(tokenizer("e1 r0 r1")["input_ids"]) == 3
    model = LoopedForCausalLM.from_pretrained(tmp_path / "run" / "model")
    overrides = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"]["overrides"]
    gate = load_task("khop", "quickstart", **overrides)["validation"]
    two_hops = gate.filter(lambda hops: hops == 2, input_columns="hops")
    ids = torch.tensor(tokenizer(two_hops["text"][:])["input_ids"])
    answers = tokenizer.convert_ids_to_tokens(model(ids).logits[:, -1].argmax(-1).tolist())
    right = [given == asked for given, asked in zip(answers, two_hops["answer"], strict=True)]
    assert sum(right) / len(right) == pytest.approx(summary["gate"]["2"])


def test_the_summary_tells_what_was_trained(recipe, tmp_path):
    summary = main(recipe("run", "--trackers=[tensorboard]", "--eval_loops=[2, 6]"))
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 20
    assert summary["trained_hops"] == [1, 2]
    assert summary["trained_loops"]["minimum"] == 2
    assert summary["trained_loops"]["maximum"] == 4
    assert summary["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(summary["gate"]) == {str(k) for k in range(2, 9)}
    assert all(set(value) == {"2", "6"} for _, value in measured(tmp_path / "run", "gate_at_loops"))
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["optim"]["lr"] == 1e-3
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


# Precision, memory, speed


def test_bf16_takes_steps_near_fp32(recipe, tmp_path):
    main(recipe("fp32"))
    reset_accelerator()
    main(recipe("bf16", "--precision=bf16"))
    first, second = measured(tmp_path / "fp32"), measured(tmp_path / "bf16")
    assert second != first
    assert second[0][1] == pytest.approx(first[0][1], abs=2e-2)


def test_checkpointed_layers_give_the_same_losses(recipe, tmp_path):
    """They are computed again in the backward pass, and to the same numbers."""
    calls = {"kept": 0, "computed_again": 0}
    for name, flag in (("kept", "false"), ("computed_again", "true")):

        def count(module, args, name=name):
            calls[name] += 1

        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        main(recipe(name, "--optim.kind=adamw", f"--gradient_checkpointing={flag}"))
        hook.remove()
    assert calls["computed_again"] > calls["kept"]
    assert [loss for _, loss in measured(tmp_path / "computed_again")] == pytest.approx(
        [loss for _, loss in measured(tmp_path / "kept")], abs=1e-5
    )


def test_num_grad_loops_cuts_the_gradient(recipe, tmp_path):
    main(recipe("all"))
    main(recipe("last", "--num_grad_loops=1"))
    all_loops, last_loop = measured(tmp_path / "all"), measured(tmp_path / "last")
    assert last_loop[0] == all_loops[0]
    assert last_loop[-1] != all_loops[-1]


def test_label_smoothing_is_that_of_the_first_loss(recipe, tmp_path):
    """(1 - s) CE(gold) + s x mean CE over the vocabulary, on the first batch of the same weights."""
    main(recipe("plain"))
    main(recipe("smooth", "--optim.label_smoothing=0.4"))
    main(recipe("flat", "--optim.label_smoothing=0.999999"))
    plain, smooth, flat = (measured(tmp_path / name)[0][1] for name in ("plain", "smooth", "flat"))
    assert flat != pytest.approx(plain, abs=1e-3)
    assert smooth == pytest.approx(0.6 * plain + 0.4 * flat, abs=1e-4)


@pytest.mark.slow
# Both come from inside torch 2.13's compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_give_the_same_losses(recipe, tmp_path):
    """Layers and, here, the gates that read and write the streams between loops."""
    flags = [
        "--optim.kind=adamw",
        "--max_steps=2",
        "--data.overrides.max_hops=3",
        *HYPER,
        "--model.hyper_gates=shared",
    ]
    main(recipe("eager", *flags))
    main(recipe("compiled", *flags, "--compile=true"))
    assert [loss for _, loss in measured(tmp_path / "compiled")] == pytest.approx(
        [loss for _, loss in measured(tmp_path / "eager")], abs=1e-4
    )


def test_a_run_ends_with_its_time(recipe):
    summary = main(recipe("run", "--max_steps=null", "--max_seconds=0.3"))
    assert 0.3 <= summary["seconds"] < 30
    assert summary["steps"] >= 1


def test_schedules():
    """Warm-up counts from the stage's start; every shape but constant ends at zero."""
    for schedule in ("constant", "linear", "cosine", "wsd"):
        optim = Optim(schedule=schedule, warmup_steps=10)
        assert lr_factor(optim, 4, 0.0) == 0.5
        assert lr_factor(optim, 100, 0.0) == 1.0
        assert lr_factor(optim, 100, 1.0) == pytest.approx(float(schedule == "constant"), abs=1e-12)
    assert lr_factor(optim, 100, 0.8) == pytest.approx(1.0)
    assert lr_factor(optim, 100, 0.9) == pytest.approx(0.5)
    cosine = Optim(schedule="cosine", final_share=0.1)
    assert [lr_factor(cosine, 100, progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])


# Errors come before any work


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--optim.learning_rate=1", r"optim\.learning_rate is not a recipe field"),
        ("--optim.lrr=1", r"did you mean optim\.lr\?"),
        ("--lr=1", r"did you mean optim\.lr\?"),
        ("--batchsize=1", r"did you mean batch_size\?"),
        ("--curiculum.start_hops=2", r"did you mean curriculum\?"),
        ("--optim.lr=fast", r"section optim: Field 'lr'"),
        ("--batch_size=2.5", r"'batch_size' expected int"),
        ("--depth=4", r"'depth' expected Depth"),
        ("--max_steps.a=4", r"max_steps is a value"),
        ("--optim.kind=sgd", r"'kind'.*'adamw', 'muon'"),
        ("--batch_size=0", r"batch_size must be >= 1, got 0"),
        ("--check_every=0", r"check_every must be >= 1"),
        ("--max_steps=null", r"no budget: set max_steps, max_seconds"),
        ("--name=../elsewhere", r"name must be a plain folder name"),
        ("--optim.label_smoothing=1", r"label_smoothing must be in \[0, 1\), got 1"),
        ("--optim.betas=[0.9]", r"optim\.betas must be two numbers"),
        ("max_steps=3", r"cannot read the argument 'max_steps=3'"),
        ("--overwrite", r"cannot read the argument '--overwrite'"),
    ],
)
def test_a_recipe_that_cannot_be_read_raises(flag, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(SMOKE, [flag])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.hiden_size=8", r"hidden_size"),
        ("--depth.kind=fixed", r"fixed takes mean"),
        ("--data.overrides.num_entitys=8", r"num_entit"),
        ("--data.pad_to=3", r"pad_to must be at least 4, the longest row"),
        ("--curriculum.start_hops=9", r"start_hops 9"),
    ],
)
def test_a_recipe_that_cannot_run_raises(recipe, tmp_path, flag, message):
    with pytest.raises(ValueError, match=message):
        main(recipe("run", flag))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    # Nothing was trained, so the corrected recipe may have the folder.
    main(recipe("run", "--max_steps=1"))


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"name"):
        build_recipe({"model": {}, "max_steps": 1})


def test_numbers_are_read_as_in_yaml_1_2():
    assert parse_yaml("[1e-4, 3E5, .5, 10, e3, r1]", "here") == [1e-4, 3e5, 0.5, 10, "e3", "r1"]


def test_an_output_folder_that_cannot_be_written_raises(recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write to .*another --output_dir"):
        main(recipe("run", f"--output_dir={tmp_path / 'file'}"))


def test_a_loss_that_is_not_finite_stops_the_run(recipe, tmp_path):
    """The update that would have spread the NaN is not made, and no checkpoint holds it."""
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step \d+"):
        main(recipe("run", "--optim.kind=adamw", "--optim.lr=1e30", "--checkpoint_every=1"))
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        json.loads((checkpoint / "state.json").read_text())


def test_loops_without_parameters_are_refused_before_training(recipe, tmp_path):
    for flag, name in (("--gate_loops=5", "gate_loops"), ("--eval_loops=[2, 6]", "eval_loops"), (None, "depth")):
        flags = [*HYPER, "--model.num_loops=2", "--depth={kind: fixed, mean: 2}", *([flag] if flag else [])]
        flags += [] if flag else ["--depth={kind: fixed, mean: 3}"]
        with pytest.raises(ValueError, match=f"{name} asks for .* loops, and model.max_num_loops is 2"):
            main(recipe("run", *flags))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_help_names_every_field(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert {"--optim.lr", "--curriculum.stop_hops", "--max_seconds"} <= set(capsys.readouterr().out.split())


def test_composition_is_measured_by_split_kind(recipe, tmp_path):
    """Two hops of known facts (id) are learnt long before those of facts never composed in training (ood)."""
    data = "--data={task: composition, overrides: {num_entities: 20, num_relations: 5, out_degree: 5, phi: 2.0}}"
    summary = main(recipe("run", data, "--curriculum.start_hops=null", "--model.position_embedding=learned"))
    assert summary["trained_hops"] == [1, 2]
    [(_, by_kind), *_] = measured(tmp_path / "run", "gate_by_split_kind")
    assert set(by_kind) == set(summary["gate_by_split_kind"]) == {"2 id", "2 ood"}


# Text


TEXT_RECIPE = ROOT / "recipes" / "smoke_text.yaml"
AT_LOOPS = "held_out_at_loops"


@pytest.fixture
def text(tmp_path):
    """text("name", "--field=value", ...): the smoke recipe of text, on toy pages."""
    flags = [f"--output_dir={tmp_path}", f"--data.files={write_pages(tmp_path / 'pages')}", "--data.vocab_size=280"]
    return lambda name, *more: read_recipe(TEXT_RECIPE, [*flags, f"--name={name}", *more])


def test_a_resumed_text_run_equals_an_uninterrupted_one(text, tmp_path):
    whole = main(text("whole", DROPOUT))
    main(text("parts", DROPOUT))
    for later in ("model", "checkpoints/step-000000020"):
        (tmp_path / "parts" / later).rename(tmp_path / later.replace("/", "-"))
    parts = main(text("parts", DROPOUT))
    for key in ("loss", "held_out", AT_LOOPS):
        assert measured(tmp_path / "parts", key) == measured(tmp_path / "whole", key)
    assert [step for step, _ in measured(tmp_path / "whole", "held_out")] == [10, 20]
    assert main(text("whole", DROPOUT)) == whole
    assert parts["held_out"] == whole["held_out"]
    assert not {"gate", "learnable_depth", "stage", "trained_hops"} & set(whole)


def test_accumulated_blocks_are_one_batch(text, tmp_path):
    flags = ["--optim.kind=adamw"]
    main(text("whole", *flags))
    main(text("parts", *flags, "--accumulation_steps=4"))
    main(text("again", *flags, "--gradient_checkpointing=true"))
    whole = [loss for _, loss in measured(tmp_path / "whole")]
    assert [loss for _, loss in measured(tmp_path / "parts")] == pytest.approx(whole, abs=1e-5)
    assert [loss for _, loss in measured(tmp_path / "again")] == pytest.approx(whole, abs=1e-5)


def test_an_exit_gate_is_trained_in_two_stages(text, tmp_path):
    """First model and gate by the expected loss, then the gate alone: the weights of the rest do not move."""
    gate = (
        "--model={num_core_layers: 1, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_loops: 3, "
    )
    main(text("first", gate + "exit_gate: true, exit_entropy_weight: 0.05}"))
    stage = ["--data.vocab_size=null", f"--init_from={tmp_path / 'first' / 'model'}", "--optim.kind=adamw"]
    main(text("second", *stage, "--model={exit_loss: gate}"))
    first, second = (LoopedForCausalLM.from_pretrained(tmp_path / run / "model") for run in ("first", "second"))
    assert second.config.exit_loss == "gate"
    moved = {name for name, value in second.state_dict().items() if not torch.equal(value, first.state_dict()[name])}
    assert moved == {"model.exit_gate.weight", "model.exit_gate.bias"}
    for run in ("first", "second"):
        for _, exits in measured(tmp_path / run, "exits"):
            assert 1 < exits["mean_loop"] < 3
            assert 0 < exits["entropy"] <= math.log(3)
    # Another task's readout, and what the loss cannot be combined with.
    with pytest.raises(ValueError, match=r"leave optim\.label_smoothing"):
        main(text("third", gate + "exit_gate: true}", "--optim.label_smoothing=0.1"))


@pytest.mark.parametrize("exit_loss", ["expected", "gate"])
def test_micro_batches_of_an_exit_gate_are_one_batch(text, tmp_path, exit_loss):
    """What is logged is a mean over labels, however an update is split; it was once divided by them twice."""
    flags = ["--optim.kind=adamw", "--max_steps=3", f"--model.exit_loss={exit_loss}", "--model.exit_gate=true"]
    main(text("whole", *flags))
    main(text("split", *flags, "--accumulation_steps=4"))
    whole, split = ([loss for _, loss in measured(tmp_path / name)] for name in ("whole", "split"))
    assert split == pytest.approx(whole, abs=1e-5)
    assert whole[0] == pytest.approx({"expected": 5.63, "gate": 0.7}[exit_loss], abs=0.5)  # ln 280; near even odds


@torch.no_grad()
def test_measured_exits_are_those_of_a_naive_sum():
    model = make_model(exit_gate=True, num_loops=3)
    torch.nn.init.normal_(model.model.exit_gate.weight)
    ids = torch.arange(1, 49).view(4, 12)
    labels = torch.where(ids % 5 == 0, -100, ids + 1)

    measured = held_out_exits(Accelerator(), model, [{"input_ids": ids, "shift_labels": labels}], 3)
    kept, left = labels != -100, torch.ones(4, 12)
    expected = mean_loop = entropy = 0.0
    for loops in (1, 2, 3):
        logits = model(ids, num_loops=loops).logits
        state = model.model(ids, num_loops=loops).last_hidden_state  # already normalised
        chance = model.model.exit_logits(state).sigmoid() if loops < 3 else torch.ones(4, 12)
        p, left = left * chance, left * (1 - chance)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        expected += float((p * loss)[kept].mean())
        mean_loop += loops * float(p[kept].mean())
        entropy -= float((p * p.log())[kept].mean())
    assert measured == pytest.approx({"expected_loss": expected, "mean_loop": mean_loop, "entropy": entropy}, rel=1e-4)


def test_an_exit_gate_learns_from_hops_as_well(recipe, tmp_path):
    main(recipe("run", "--model.exit_gate=true", "--max_steps=3"))
    model = LoopedForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.model.exit_gate.weight.any()  # zero in a fresh model


@pytest.mark.slow
def test_two_processes_read_one_text(text, tmp_path):
    """DDP over gloo; the main process tokenises, and both measure the held-out loss of one. Of the loops, each with
    gates of its own, a batch runs some: DDP would wait for ever for the gradients of the others."""
    flags = [
        *HYPER,
        "--model.max_num_loops=4",
        "--optim.kind=adamw",
        "--accumulation_steps=2",
        "--data.validation_tokens=224",
    ]
    main(text("one", *flags))
    command = ["--nproc_per_node=2", "--standalone", "train.py", str(TEXT_RECIPE), f"--output_dir={tmp_path}"]
    flags += [f"--data.files=[{tmp_path}/pages/*.txt]", "--data.vocab_size=280", "--name=two"]
    cache = str(tmp_path / "other_cache")
    finish(launch("-m", "torch.distributed.run", *command, *flags, ACCELERATE_USE_CPU="true", HF_DATASETS_CACHE=cache))
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["hardware"]["processes"] == 2
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["held_out_tokens"] == 7 * 32
    for path in ([], ["1"], ["4"]):
        key = AT_LOOPS if path else "held_out"
        one, two = (
            [(step, (value[path[0]] if path else value)["loss"]) for step, value in measured(tmp_path / name, key)]
            for name in ("one", "two")
        )
        assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-5)
    losses = [[loss for _, loss in measured(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_measuring_text_more_often_changes_nothing(text, tmp_path):
    main(text("often", DROPOUT, "--check_every=2"))
    main(text("never", DROPOUT, "--check_every=1000", "--eval_loops=[]"))
    assert measured(tmp_path / "often") == measured(tmp_path / "never")


def test_the_model_folder_alone_has_the_loss_the_run_measured(text, tmp_path):
    """A naive twin: the held-out documents in a row, one block after the other, the model's own loss."""
    summary = main(text("run"))
    folder = tmp_path / "run" / "model"
    model, tokenizer = LoopedForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).num_loops == 2
    data = text("run").data
    held_out = load_task("text", "files", files=data.files, **data.overrides)["validation"]
    stream = [i for text in held_out["text"] for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    for num_loops, expected in ({None: summary["held_out"]} | summary[AT_LOOPS]).items():
        losses = []
        for start in range(0, 256, 32):
            ids = torch.tensor([stream[start : start + 33]])
            loops = None if num_loops is None else int(num_loops)
            losses.append(model(ids, labels=ids, num_loops=loops).loss.item())
        loss = sum(losses) / len(losses)
        assert expected["loss"] == pytest.approx(loss, abs=1e-5)
        assert expected["perplexity"] == pytest.approx(2.718281828**loss, rel=1e-4)
    assert summary["held_out_tokens"] == 256
    assert set(summary[AT_LOOPS]) == {"1", "2", "4"}


@pytest.mark.slow
def test_text_is_learnt(text):
    """From the entropy of the vocabulary to near that of the toy's thirteen words."""
    summary = main(text("run", "--max_steps=150", "--check_every=1000", "--optim.lr=1e-2"))
    assert summary["held_out"]["loss"] < 3.0 < 5.6


def test_bf16_text_is_near_fp32(text, tmp_path):
    main(text("fp32"))
    reset_accelerator()
    main(text("bf16", "--precision=bf16"))
    first, second = measured(tmp_path / "fp32"), measured(tmp_path / "bf16")
    assert second != first
    assert second[0][1] == pytest.approx(first[0][1], abs=2e-2)


# Starting from a saved model

FRESH = "--model={}"  # what comes with the weights


def test_a_run_begins_where_another_ended(text, tmp_path):
    """Weights, configuration and tokenizer come along; the first row measures what was taken over."""
    first = main(text("first"))
    flags = [f"--init_from={tmp_path / 'first' / 'model'}", FRESH, "--data.vocab_size=null"]
    main(text("second", *flags))
    begun = [(key, measured(tmp_path / "second", key)[0]) for key in ("held_out", AT_LOOPS)]
    assert begun == [(key, (0, first[key])) for key in ("held_out", AT_LOOPS)]
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name / "model") for name in ("first", "second")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    configs = [json.loads((tmp_path / name / "model" / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0] == configs[1]
    # A run that is begun again before its first checkpoint has that row once.
    whole = measured(tmp_path / "second", "held_out")
    for checkpoint in (tmp_path / "second" / "checkpoints").iterdir():
        (checkpoint / "state.json").unlink()
    main(text("second", *flags))
    assert measured(tmp_path / "second", "held_out") == whole


def test_fields_that_keep_the_weights_may_change(text, tmp_path):
    first = main(text("first"))
    flags = [f"--init_from={tmp_path / 'first' / 'model'}", "--data.vocab_size=null"]
    second = main(text("second", *flags, "--model={num_loops: 4, residual_dropout: 0.1}"))
    assert measured(tmp_path / "second", "held_out")[0][1] == first[AT_LOOPS]["4"]
    assert second["gate_loops"] == 4
    model = LoopedForCausalLM.from_pretrained(tmp_path / "second" / "model")
    assert (model.config.num_loops, model.config.residual_dropout) == (4, 0.1)
    with pytest.raises(ValueError, match=r"model\.hidden_size comes with the weights .*takes only .*num_loops"):
        text("third", *flags, "--model={num_loops: 4, hidden_size: 32}")


def test_half_precision_weights_are_trained_in_full(text, tmp_path):
    main(text("first", "--max_steps=1"))
    folder = tmp_path / "first" / "model"
    LoopedForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    main(text("second", f"--init_from={folder}", FRESH, "--data.vocab_size=null"))
    assert LoopedForCausalLM.from_pretrained(tmp_path / "second" / "model").dtype == torch.float32


def test_hops_too_may_begin_from_a_saved_model(recipe, tmp_path):
    first = main(recipe("first"))
    flags = [f"--init_from={tmp_path / 'first' / 'model'}", FRESH]
    main(recipe("second", *flags))
    step, gate = measured(tmp_path / "second", "gate")[0]
    assert (step, gate) == (0, {k: first["gate"][k] for k in gate})
    with pytest.raises(ValueError, match=r"data\.readout is last, but not so for the tokenizer"):
        main(recipe("third", *flags, "--data.readout=last"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "tokenizer_config.json").unlink(),
            r"init_from: there is no tokenizer in the folder",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                (folder / "config.json").read_text().replace('"num_coda_layers": 0', '"num_coda_layers": 1')
            ),
            r"init_from: the weights in .* do not fit its config\.json \(model\.coda\.0",
        ),
        (
            lambda folder: train_byte_bpe(["a b c"] * 9 + ["other words entirely"] * 9, 300).save_pretrained(folder),
            r"has 2\d\d tokens, and a model for 262",
        ),
    ],
)
def test_a_folder_that_is_no_whole_model_raises(text, tmp_path, damage, message):
    main(text("first", "--max_steps=1", "--data.vocab_size=262"))
    damage(tmp_path / "first" / "model")
    with pytest.raises(ValueError, match=message):
        main(text("second", f"--init_from={tmp_path / 'first' / 'model'}", FRESH, "--data.vocab_size=null"))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--curriculum.start_hops=2", r"curriculum\.start_hops is not for the task text: leave it out"),
        ("--curriculum.threshold=0.5", r"curriculum\.threshold is not for the task text"),
        ("--data.pad_to=50", r"data\.pad_to is not for the task text"),
        ("--data.config=paper", r"data\.config is not for the task text"),
        ("--data.sequence_length=null", r"data\.sequence_length must be set for the task text"),
        ("--data.validation_tokens=0", r"data\.validation_tokens must be >= 1, got 0"),
        ("--data.vocab_size=null", r"one of init_from, data\.tokenizer, data\.vocab_size, got none"),
        ("--data.tokenizer=folder", r"got data\.tokenizer and data\.vocab_size"),
        ("--init_from=folder", r"got init_from and data\.vocab_size"),
        ("--data.task=khop", r"data\.files is not for the task khop"),
    ],
)
def test_a_field_of_another_task_raises(flag, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(TEXT_RECIPE, [flag])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_too_short_for_a_block_is_named_before_the_first_step(text, tmp_path, split):
    shares = {"validation": (0.02, 0.3), "test": (0.3, 0.02)}[split]
    fields = f"{{document_characters: 100, validation_share: {shares[0]}, test_share: {shares[1]}}}"
    with pytest.raises(ValueError, match=rf"the split {split} has \d+ tokens, too few for a block of 600"):
        main(text("run", f"--data.overrides={fields}", "--data.sequence_length=600"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tokenizer_may_come_from_a_folder(text, tmp_path):
    main(text("first", "--max_steps=1"))
    folder = tmp_path / "first" / "model"
    main(text("second", "--max_steps=1", "--data.vocab_size=null", f"--data.tokenizer={folder}"))
    assert measured(tmp_path / "second") == measured(tmp_path / "first")
    with pytest.raises(ValueError, match=r"data\.tokenizer: there is no tokenizer in the folder 'nowhere'"):
        main(text("third", "--data.vocab_size=null", "--data.tokenizer=nowhere"))


# One KV row per token

GATED = "--model={kv_sharing: gated, prefill_chunk: 5, num_loops: 3}"


def gated_from(tmp_path, *flags: str) -> list[str]:
    return [f"--init_from={tmp_path / 'first' / 'model'}", "--data.vocab_size=null", GATED, *flags]


def distilled_from(tmp_path, phase: str, *flags: str) -> list[str]:
    teacher = [f"--distill.teacher={tmp_path / 'first' / 'model'}", f"--distill.phase={phase}"]
    return gated_from(tmp_path, *teacher, *flags)


@pytest.mark.slow
def test_a_gated_model_trains_on_labels_from_a_per_loop_one(text, tmp_path):
    """Its weights are taken over, its gates are new, and chunks cut or not give the same first loss."""
    main(text("first"))
    flags = gated_from(tmp_path, "--optim.kind=adamw")
    main(text("whole", *flags))
    main(text("cut", *flags, "--cut_chunks=true"))
    main(text("again", *flags, "--gradient_checkpointing=true"))
    whole, cut, again = (measured(tmp_path / name) for name in ("whole", "cut", "again"))
    assert whole[0] == cut[0]
    assert whole[-1] != cut[-1]
    assert [loss for _, loss in again] == pytest.approx([loss for _, loss in whole], abs=1e-5)
    assert LoopedForCausalLM.from_pretrained(tmp_path / "whole" / "model").config.prefill_chunk == 5


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["interpolation", "alignment"])
def test_a_resumed_distillation_equals_an_uninterrupted_one(text, tmp_path, phase):
    main(text("first"))
    flags = distilled_from(tmp_path, phase)
    main(text("whole", *flags))
    main(text("parts", *flags))
    for later in ("model", "checkpoints/step-000000020"):
        (tmp_path / "parts" / later).rename(tmp_path / later.replace("/", "-"))
    main(text("parts", *flags))
    for key in ("loss", "held_out"):
        assert measured(tmp_path / "parts", key) == measured(tmp_path / "whole", key)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-6), ("bf16", 1e-3)])
def test_the_interpolation_begins_at_the_teacher(text, tmp_path, precision, rounding):
    """In the first update alpha is 0: the student is the teacher, and only later there is something to learn. Under
    bf16 both memories once had different precisions, and could not be mixed."""
    main(text("first"))
    reset_accelerator()
    still = ("--optim.lr=0", "--optim.muon_lr=0", f"--precision={precision}")
    main(text("second", *distilled_from(tmp_path, "interpolation", *still)))
    losses = [loss for _, loss in measured(tmp_path / "second")]
    assert losses[0] == pytest.approx(0.0, abs=rounding)
    assert losses[-1] > losses[0]


@pytest.mark.slow
def test_gates_can_learn_at_a_rate_of_their_own(text, tmp_path):
    main(text("first"))
    still = ("--optim.lr=0", "--optim.muon_lr=0")
    main(text("gates", *distilled_from(tmp_path, "alignment", *still, "--optim.kv_gate_lr=0.01")))
    before, after = (LoopedForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("first", "gates"))
    known = before.state_dict()
    moved = {name for name, value in after.state_dict().items() if not value.equal(known.get(name, torch.empty(0)))}
    assert moved
    assert all(".kv_gate." in name for name in moved)
    assert after.model.core[0].kv_gate.of_input.weight.abs().sum() > 0


@pytest.mark.slow
def test_two_processes_distil_one_batch(text, tmp_path):
    """The loss is computed inside the forward that DDP wraps, or ranks would not exchange their gradients."""
    main(text("first"))
    flags = distilled_from(tmp_path, "alignment", "--optim.kind=adamw")
    main(text("one", *flags))
    command = ["--nproc_per_node=2", "--standalone", "train.py", str(TEXT_RECIPE), f"--output_dir={tmp_path}"]
    flags += [f"--data.files=[{tmp_path}/pages/*.txt]", "--name=two"]
    cache = str(tmp_path / "other_cache")
    finish(launch("-m", "torch.distributed.run", *command, *flags, ACCELERATE_USE_CPU="true", HF_DATASETS_CACHE=cache))
    losses = [[loss for _, loss in measured(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gradient_checkpointing=true"], "keeps the rows of both memories"),
        (["--cut_chunks=true"], "keeps the rows of both memories"),
        (["--num_grad_loops=1"], "takes neither num_grad_loops"),
        (["--model={kv_sharing: last, num_loops: 3}"], "set model.kv_sharing to gated"),
    ],
)
def test_a_distillation_that_cannot_be_is_refused(text, tmp_path, flags, message):
    main(text("first", "--max_steps=1"))
    with pytest.raises(ValueError, match=message):
        main(text("second", *distilled_from(tmp_path, "interpolation", *flags)))
