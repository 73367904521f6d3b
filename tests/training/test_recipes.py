"""Every recipe can be run: its fields, its model, its depths and its data exist, and the paper's have its sizes."""

import glob
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from data_builders import DepthSampler, task_builder, train_byte_bpe
from looplab.instruments.flops import training_flops, update_flops
from looplab.training.optimizers import build_optimizers
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.layers_looped import LoopedLayer
from toy_runs import ended, launch_environment, measured, sharded, train_in
from toys import ROOT, make_texts, write_shards
from train import Recipe, main, read_recipe

RECIPES = ROOT / "recipes"
HYPERLOOP = sorted(RECIPES.glob("hyperloop/paper/*.yaml"))
PAPER = sorted(RECIPES.glob("paper/*.yaml"))
MOLECULES = sorted(RECIPES.glob("molecules/*.yaml"))
OURO = sorted(RECIPES.glob("ouro/*.yaml"))
MELT = sorted(RECIPES.glob("melt/**/*.yaml"))
LM = sorted(RECIPES.glob("lm/*.yaml"))
FILES = sorted(
    [*RECIPES.glob("*.yaml"), *RECIPES.glob("hyperloop/*.yaml"), *PAPER, *HYPERLOOP, *MOLECULES, *OURO, *MELT, *LM]
)
SPECIAL_TOKENS = 3  # of `hop_tokenizer`

# Kohli et al. 2026, arXiv 2604.07822: 2,000 entities + 200 relations + 7, 200 + 10 + 7; L8 has twice the layers.
PARAMETERS = {"composition": 30_051_840, "khop": 28_519_680, "composition_l8": 58_403_328}


def sampler(recipe: Recipe) -> DepthSampler:
    return DepthSampler(**{name: value for name, value in vars(recipe.depth).items() if value is not None})


def test_the_files_that_a_recipe_names_are_found_from_any_folder(tmp_path, monkeypatch):
    """Those of this package, unless the folder has its own."""
    monkeypatch.chdir(tmp_path)
    data = {file.stem: read_recipe(file).data for file in FILES}
    named = {name: each for name, each in data.items() if vars(each).get("files")}
    assert {"smoke_text", "smoke_molecules"} <= set(named)
    for name, each in named.items():
        found = [glob.glob(pattern, recursive=True) for pattern in each.preset()[1]["files"]]
        assert all(found), name
        assert all(Path(path).is_relative_to(ROOT) for paths in found for path in paths)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "own.md").write_text("own", encoding="utf-8")
    assert data["smoke_text"].preset()[1]["files"] == ["docs/**/*.md"]
    assert glob.glob("docs/**/*.md", recursive=True) == [str(Path("docs", "own.md"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(RECIPES)))
def test_a_recipe_describes_a_run(file):
    recipe = read_recipe(file)
    assert isinstance(recipe, Recipe)
    assert recipe.name == file.stem
    config = LoopedConfig(**({"vocab_size": 10} | recipe.model))
    depth = sampler(recipe)
    # What `generate` runs by default is in the trained range or beyond it, never below.
    assert depth.depths[0] <= config.num_loops
    if recipe.data.task in ("text", "molecules", "sequence"):  # their files need not be here
        return
    builder = task_builder(recipe.data.task, recipe.data.config, seed=recipe.data.seed, **recipe.data.overrides)
    if recipe.curriculum.stop_hops:
        assert recipe.curriculum.stop_hops <= builder.config.train_hops
    if "vocab_size" in recipe.model:
        assert config.vocab_size >= SPECIAL_TOKENS + builder.config.num_entities + builder.config.num_relations


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_the_papers_models_have_its_sizes(file):
    recipe = read_recipe(file)
    with torch.device("meta"):
        model = LoopedForCausalLM(LoopedConfig(**recipe.model))
    expected = PARAMETERS.get(recipe.name, PARAMETERS[recipe.data.task])
    assert model.num_parameters() == expected
    assert f"{expected:,} parameters" in " ".join(file.read_text().replace("\n#", "").split())


# Zeitoun et al. 2026, arXiv 2604.21254, in millions, with the vocabulary counted once as they do.
PUBLISHED = {
    "transformer_16l": 238.3,
    "looped_16l": 135.5,
    "hyperloop_16l": 135.7,
    "transformer_18l": 990.5,
    "looped_18l": 579.4,
    "hyperloop_18l": 579.7,
    "transformer_38l": 2018.1,
    "looped_38l": 990.5,
    "hyperloop_38l": 990.8,
}


@pytest.mark.parametrize("file", HYPERLOOP, ids=lambda file: file.stem)
def test_the_models_of_the_hyperloop_paper_have_its_sizes(file):
    recipe = read_recipe(file)
    with torch.device("meta"):
        model = LoopedForCausalLM(LoopedConfig(**recipe.model))
    all_of_it, once = model.num_parameters(), model.num_parameters() - model.lm_head.weight.numel()
    assert once / 1e6 == pytest.approx(PUBLISHED[file.stem], abs=0.05)
    assert f"{all_of_it:,} parameters, {once:,} with the vocabulary" in " ".join(file.read_text().split("\n# "))
    assert set(PUBLISHED) == {file.stem for file in HYPERLOOP}


# Ouro's released checkpoints with their gate, and MELT's gates of 24 layers (2 D^2 + D each).
OURO_PARAMETERS = {"ouro_1_4b": 1_434_652_673, "ouro_2_6b": 2_667_974_657}
MELT_GATES = 201_375_744


@pytest.mark.parametrize("file", OURO, ids=lambda file: file.stem)
def test_the_models_of_the_ouro_paper_have_its_sizes(file):
    fields = read_recipe(file).model
    with torch.device("meta"):
        model = LoopedForCausalLM(LoopedConfig(**fields))
    assert model.num_parameters() == OURO_PARAMETERS[file.stem]
    assert f"{OURO_PARAMETERS[file.stem]:,}" in file.read_text()
    # Four loops of 24 layers: 768 KiB of keys and values per token in bf16, and a quarter of it with one row.
    heads = 2 * model.config.num_key_value_heads * model.config.head_dim * 2
    assert model.config.num_hidden_layers * heads == {"ouro_1_4b": 786_432, "ouro_2_6b": 2 * 786_432}[file.stem]
    assert set(OURO_PARAMETERS) == {file.stem for file in OURO}


def test_the_model_of_the_melt_paper_has_its_size():
    fields = read_recipe(RECIPES / "ouro" / "ouro_1_4b.yaml").model
    for name in ("melt_interpolation", "melt_alignment"):
        recipe = read_recipe(RECIPES / "melt" / "paper" / f"{name}.yaml")
        with torch.device("meta"):
            model = LoopedForCausalLM(LoopedConfig(**fields | recipe.model))
        assert model.num_parameters() == OURO_PARAMETERS["ouro_1_4b"] + MELT_GATES
        assert model.config.num_hidden_layers * 2 * 16 * 128 * 2 == 196_608  # bytes per token
        assert recipe.batch_size * recipe.data.sequence_length == 320_000
        assert f"{MELT_GATES:,}" in (RECIPES / "melt" / "paper" / f"{name}.yaml").read_text()


LM_PARAMETERS = {"looped_135m": 134_757_376, "unrolled_12": 195_060_736}


def test_twins_of_a_language_model_cost_the_same(tmp_path):
    """FLOPs of an update, on the mean over loop counts; only model and depth differ."""
    recipes = {file.stem: read_recipe(file) for file in LM}
    flops = {}
    for name, recipe in recipes.items():
        config, depth = LoopedConfig(**recipe.model), sampler(recipe)
        with torch.device("meta"):
            assert LoopedForCausalLM(config).num_parameters() == LM_PARAMETERS[name]
        text = (RECIPES / "lm" / f"{name}.yaml").read_text()
        assert f"{LM_PARAMETERS[name]:,} parameters" in " ".join(text.replace("\n#", "").split())
        costs = [training_flops(config, 1, recipe.data.sequence_length, int(loops)) for loops in depth.depths]
        flops[name] = float(depth.probabilities @ costs)
        assert recipe.max_steps * recipe.batch_size * recipe.data.sequence_length == pytest.approx(1e10, rel=1e-3)
    assert flops["looped_135m"] == pytest.approx(flops["unrolled_12"], rel=1e-9)
    one, two = (recipe.resolved() for recipe in recipes.values())
    differ = {name for name in one if one[name] != two[name]}
    assert differ == {"name", "model", "depth", "eval_loops"}


@pytest.mark.slow
@pytest.mark.parametrize("launched", [{}, sharded()], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("file", LM, ids=lambda file: file.stem)
def test_a_language_model_takes_two_updates_on_a_local_stream(file, launched, tmp_path):
    """In two processes, each with a part of its own; narrower, and on shorter rows than the recipe."""
    texts = make_texts()
    dataset = write_shards(tmp_path / "shards", "parquet", texts)
    train_byte_bpe([text for shard in texts for text in shard], 300).save_pretrained(tmp_path / "tokenizer")
    model = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 300}
    data = {"sequence_length": 32, "validation_tokens": 64, "held_out_documents": 20, "shuffle_blocks": 8}
    data |= {"dataset": json.dumps(dataset), "tokenizer": tmp_path / "tokenizer", "parts": 2, "workers": 0}
    flags = [f"--model.{name}={value}" for name, value in model.items()]
    flags += [f"--data.{name}={value}" for name, value in data.items()]
    flags += ["--batch_size=8", "--accumulation_steps=2", "--max_steps=2", "--log_every=1", "--compile=false"]
    ended(train_in(2, tmp_path, f"lm/{file.name}", f"--output_dir={tmp_path}", *flags, **launched))
    losses = [loss for _, loss in measured(tmp_path / file.stem)]
    assert losses == pytest.approx([np.log(300)] * 2, abs=0.2)
    assert LoopedForCausalLM.from_pretrained(tmp_path / file.stem / "model").config.hidden_size == 32
    assert json.loads((tmp_path / file.stem / "summary.json").read_text())["hardware"]["processes"] == 2


@pytest.mark.slow
def test_a_model_of_the_hyperloop_paper_takes_a_step():
    """The smallest of the three sizes, in the recipe's precision; its text and tokenizer cannot be had offline."""
    recipe = read_recipe(RECIPES / "hyperloop" / "paper" / "hyperloop_16l.yaml")
    torch.manual_seed(0)
    model = LoopedForCausalLM(LoopedConfig(**recipe.model)).train()
    before = model.model.connection.gates[2].bias.clone()
    ids = torch.randint(32_000, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    for optimizer in build_optimizers(model, recipe.optim):
        optimizer.step()
    # ln 32,000, and half the variance of fresh logits: 1,024 products of weights of 0.02.
    assert loss.item() == pytest.approx(10.37 + 0.2, abs=0.5)
    assert not torch.equal(model.model.connection.gates[2].bias, before)


# Jindal and Ju 2026, arXiv 2605.06322, without the vocabulary: every token is as many parameters as the model is wide.
MOLECULE_PARAMETERS = {"ws_53k": 49_408, "ws_206k": 197_248, "gpt_527k": 517_536}
MOSES_TOKENS = 27


@pytest.mark.parametrize("file", MOLECULES, ids=lambda file: file.stem)
def test_the_models_of_molecules_have_their_sizes(file):
    """Those of the paper, however often the block runs; with its vocabulary of 69 to 71 tokens they have its names."""
    recipe = read_recipe(file)
    width = recipe.model["hidden_size"]
    with torch.device("meta"):
        model = LoopedForCausalLM(LoopedConfig(vocab_size=MOSES_TOKENS, **recipe.model))
    known = [size for name, size in MOLECULE_PARAMETERS.items() if file.stem.startswith(name)]
    gates = (width + 1) * model.config.exit_gate + (2 * width**2 + width) * (model.config.kv_sharing == "gated")
    for size in known:
        assert model.num_parameters() == size + MOSES_TOKENS * width + gates
    if file.stem in MOLECULE_PARAMETERS:
        name = int(file.stem.split("_")[1].removesuffix("k"))
        assert all((known[0] + width * tokens) // 1000 == name for tokens in (69, 70, 71))
    assert bool(known) != file.stem.startswith(("untied", "wide", "smoke", "molecules"))
    if not file.stem.startswith("smoke"):
        assert f"{model.num_parameters():,} parameters" in " ".join(file.read_text().replace("\n#", "").split())


def test_baselines_of_molecules_do_the_work_of_eight_passes():
    """Multiplications by matrices per token, those of the head included, within one part in a hundred."""
    work = {}
    for name in ("ws_53k_cpu", "untied_8_cpu", "wide_1_cpu"):
        recipe = read_recipe(RECIPES / "molecules" / f"{name}.yaml")
        config = LoopedConfig(vocab_size=MOSES_TOKENS, **recipe.model)
        with torch.device("meta"):
            model = LoopedForCausalLM(config)
        core = sum(parameter.numel() for parameter in model.model.core.parameters() if parameter.ndim == 2)
        work[name] = core * config.num_loops + MOSES_TOKENS * config.hidden_size
        assert "optim" not in recipe.model
    assert max(work.values()) < 1.01 * min(work.values())


# Few rows, so that evaluation is short; the paper's model, loops and precision.
SMALL = {
    "composition_r4": [
        "--data.overrides={num_entities: 40, num_relations: 20, out_degree: 10, ood_share: 0.1, phi: 2.0}"
    ],
    "khop_dynamic": [
        "--data.overrides={train_hops: 3, max_hops: 3, train_per_hop: 8, gate_per_hop: 2, test_per_hop: 2}",
        "--curriculum.stop_hops=3",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_paper_recipe_takes_a_step(name, tmp_path):
    flags = [f"--output_dir={tmp_path}", "--max_steps=1", "--batch_size=4", *SMALL[name]]
    recipe = read_recipe(RECIPES / "paper" / f"{name}.yaml", flags)
    summary = main(recipe)
    assert summary["steps"] == 1
    assert summary["parameters"] == PARAMETERS[recipe.data.task]
    assert LoopedForCausalLM.from_pretrained(tmp_path / name / "model").num_parameters() == summary["parameters"]


# docs/results/paper_scale.md

ROWS_PER_HOP = {"composition": {1: 40_000, 2: 273_600}, "khop": {1: 2_000} | dict.fromkeys(range(2, 41), 15_000)}
DENSE_BF16 = {"A100": 312, "H100 SXM": 989, "RTX 4090": 165, "RTX 5090": 209, "L4": 121}  # TFLOP/s
UTILISATION = 0.4
# RTX 5090, batch 128, 50 tokens: 19.6 updates/s of 4 layers x 5 loops.
REFERENCE_LAYER_CALLS = 19.6 * 20


def table(title: str) -> list[dict]:
    """Rows of the table below a heading of docs/results/paper_scale.md."""
    page = (ROOT / "docs" / "results" / "paper_scale.md").read_text()
    lines = page.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    header, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return [dict(zip(header, row, strict=True)) for row in rows]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_the_cost_of_every_paper_recipe_is_in_the_docs():
    rows = {row["recipe"].strip("`"): row for row in table("Cost")}
    assert set(rows) == {file.stem for file in PAPER}
    for name, row in rows.items():
        recipe = read_recipe(RECIPES / "paper" / f"{name}.yaml")
        config, depth = LoopedConfig(**recipe.model), sampler(recipe)
        hops = {k: n for k, n in ROWS_PER_HOP[recipe.data.task].items() if k <= int(row["hops"])}
        tokens = {k + 2: n / sum(hops.values()) for k, n in hops.items()}
        loops = dict(zip(depth.depths.tolist(), depth.probabilities.tolist(), strict=True))
        flops = update_flops(config, recipe.batch_size, tokens, loops)
        updates = 1e6 * number(row["M updates"])
        assert updates <= recipe.max_steps
        assert number(row["parameters"]) == PARAMETERS.get(name, PARAMETERS[recipe.data.task])
        assert number(row["TFLOP/update"]) == pytest.approx(flops / 1e12, rel=0.01)
        assert number(row["total EFLOP"]) == pytest.approx(flops * updates / 1e18, rel=0.01)
        for gpu, peak in DENSE_BF16.items():
            hours = flops * updates / (UTILISATION * peak * 1e12) / 3600
            assert number(row[gpu]) == pytest.approx(hours, rel=0.05)
        slow = updates * config.num_core_layers * depth.expected / REFERENCE_LAYER_CALLS / 3600
        assert number(row["5090, from the reference"]) == pytest.approx(slow, rel=0.05)


# Accelerate


def test_accelerate_reads_the_data_parallel_config():
    assert "ACCELERATE_USE_FSDP" not in launch_environment(RECIPES / "accelerate" / "ddp.yaml")


def test_accelerate_reads_the_sharding_config(monkeypatch):
    for name, value in launch_environment(RECIPES / "accelerate" / "fsdp2.yaml").items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.transformer_cls_names_to_wrap == [LoopedLayer.__name__]
    assert plugin.reshard_after_forward is False
