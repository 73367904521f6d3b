"""Training on chains of relations: the curriculum, and what a run measures of itself."""

import json

import pytest
import torch
import yaml
from transformers import AutoTokenizer, GenerationConfig

from data_builders import load_task
from modeling_looped import LoopedForCausalLM
from toy_runs import measured
from train import main


@pytest.mark.slow
def test_the_curriculum_adds_a_hop_when_the_gate_passes(hops, tmp_path):
    """Two entities make every relation a swap or nothing: parity, learnt in seconds."""
    flags = [
        "--data.overrides={num_entities: 2, num_relations: 8, train_hops: 3, max_hops: 8, gate_per_hop: 64}",
        "--data.weighting=uniform",
        "--batch_size=64",
    ]
    curriculum = "--curriculum={start_hops: 2, threshold: 0.9, min_steps: 30, after_last: stop}"
    summary = main(hops("run", *flags, "--check_every=25", curriculum, "--max_steps=400"))
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


def test_the_model_folder_alone_scores_what_the_run_measured(hops, tmp_path):
    summary = main(hops("run"))
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


def test_an_answer_may_be_read_at_the_last_relation(hops, tmp_path):
    """The tokenizer that is saved appends nothing, and the run measured what the folder alone answers."""
    summary = main(hops("run", "--data.readout=last", "--data.weighting=uniform", "--max_steps=60"))
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


def test_composition_is_measured_by_split_kind(hops, tmp_path):
    """Two hops of known facts (id) are learnt long before those of facts never composed in training (ood)."""
    data = "--data={task: composition, overrides: {num_entities: 20, num_relations: 5, out_degree: 5, phi: 2.0}}"
    summary = main(hops("run", data, "--curriculum.start_hops=null", "--model.position_embedding=learned"))
    assert summary["trained_hops"] == [1, 2]
    [(_, by_kind), *_] = measured(tmp_path / "run", "gate_by_split_kind")
    assert set(by_kind) == set(summary["gate_by_split_kind"]) == {"2 id", "2 ood"}


def test_an_exit_gate_learns_from_hops_as_well(hops, tmp_path):
    main(hops("run", "--model.exit_gate=true", "--max_steps=3"))
    model = LoopedForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.model.exit_gate.weight.any()  # zero in a fresh model
