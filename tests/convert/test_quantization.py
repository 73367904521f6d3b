"""Weights of few bits: laws of the rounding, of the calibration over loops, and of the folder that is written."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_builders import load_task
from looplab.cli import main
from looplab.convert.quantization import (
    DAMPING,
    Grid,
    collect_inputs,
    gptq,
    linears_of,
    nearest,
    output_error,
    packed_bytes,
    quantize_model,
    quantize_run,
    quantized_layers,
)
from looplab.instruments.recorder import record
from looplab.runs.folder import open_run
from looplab.tasks.hops.rows import load_run_task
from looplab.tasks.molecules.held_out import run_molecules
from looplab.tasks.quantizing import QUANTIZATION
from toys import FP32, make_ids, make_model

LOOPS = 4  # not the 3 of the toys' configuration
GROUP = 20  # divides neither 32 nor 48
SECTIONS = {"num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1}
KINDS = [
    {},
    {"loop_connection": "inject_concat", "attention_bias": True, "mlp_bias": True},
    {"loop_connection": "inject_add", "state_init": "normal", "gated_mlp": False, "kv_sharing": "first"},
    {"norm_placement": "sandwich", "norm_between_loops": True, "kv_sharing": "last"},
    {"loop_connection": "hyper", "loop_embedding": "learned", "max_num_loops": LOOPS},
]


def toy(**fields):
    return make_model(**SECTIONS, **fields)


def calibration(rows: int = 6, tokens: int = 40) -> list[torch.Tensor]:
    """Batches of unequal numbers of rows."""
    return [make_ids(rows, tokens, seed=2), make_ids(1, tokens, seed=3)]


def all_linears(model) -> dict[str, nn.Linear]:
    return {name: linear for layer in quantized_layers(model).items() for name, linear in linears_of(*layer).items()}


def correlated(size: int, samples: int = 200) -> torch.Tensor:
    """A Hessian of inputs that depend on each other."""
    draw = torch.Generator().manual_seed(5)
    inputs = torch.randn(samples, size, generator=draw) @ torch.randn(size, size, generator=draw)
    return 2 * inputs.T @ inputs


def weights(outputs: int = 12, inputs: int = 50) -> torch.Tensor:
    return 0.1 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(6))


# Rounding


@pytest.mark.parametrize("method", ["gptq", "nearest"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_group_takes_at_most_two_to_the_bits_values(method, bits):
    model = toy()
    quantize_model(model, calibration(), LOOPS, bits=bits, group=GROUP, method=method)
    most = 0
    for linear in all_linears(model).values():
        for group in linear.weight.split(GROUP, dim=1):
            most = max(most, *(len(row.unique()) for row in group))
    assert most <= 2**bits
    assert most > 2 ** (bits - 1)  # and it uses them


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3])
@pytest.mark.parametrize("shift", [0.0, 0.2, -0.2])
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_nearest_moves_no_weight_by_more_than_half_a_step(bits, shift, scale):
    """Also where all weights of a group have one sign, and where float16 holds the step badly or not at all."""
    weight = scale * (weights() + shift)
    for part, rounded in zip(weight.split(GROUP, 1), nearest(weight, bits, GROUP).split(GROUP, 1), strict=True):
        step = Grid.of(part, bits).scale
        assert torch.equal(step, step.half().float())
        assert ((part - rounded).abs() <= 0.51 * step).all()  # float32 rounds too: 2^16 codes of 2^-24 each
        span = part.amax(1, keepdim=True).clamp_min(0) - part.amin(1, keepdim=True).clamp_max(0)
        assert (step <= span / (2**bits - 1) * 1.002 + 2**-23).all()


def test_weights_of_zero_stay_zero():
    assert torch.equal(nearest(torch.zeros(3, 8), 4, 4), torch.zeros(3, 8))
    assert torch.equal(gptq(torch.zeros(3, 8), correlated(8), 4, 4), torch.zeros(3, 8))


@pytest.mark.parametrize("group", [1, GROUP, 50, 128])
def test_gptq_is_nearest_where_inputs_are_uncorrelated(group):
    weight = weights()
    for diagonal in (torch.ones(50), torch.arange(50.0), torch.zeros(50)):  # one or all inputs were always 0
        assert torch.equal(gptq(weight, diagonal.diag(), 4, group), nearest(weight, 4, group))


def one_column_at_a_time(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """GPTQ's equations 2 and 3, without blocks: after each column, repair the rest and strike it from the inverse."""
    weight, hessian = weight.double().clone(), hessian.double()
    damping = DAMPING * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian + damping * torch.eye(len(hessian)))
    for column in range(len(hessian)):
        if column % group == 0:
            grid = Grid.of(weight[:, column : column + group].float(), bits)
        rounded = grid.round(weight[:, column, None].float()).double()
        error = (weight[:, column, None] - rounded) / inverse[column, column]
        weight[:, column:] -= error * inverse[column, column:]
        assert torch.allclose(weight[:, column, None], rounded)
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return weight.float()


@pytest.mark.parametrize("group", [GROUP, 128])
def test_gptq_equals_its_naive_twin(group):
    weight, hessian = weights(), correlated(50)
    quantized = gptq(weight, hessian, 4, group)
    assert not torch.equal(quantized, nearest(weight, 4, group))
    torch.testing.assert_close(quantized, one_column_at_a_time(weight, hessian, 4, group), **FP32)


def test_an_input_that_was_always_zero_is_rounded_to_nearest():
    hessian = correlated(50)
    hessian[0], hessian[:, 0], hessian[30], hessian[:, 30] = 0, 0, 0, 0
    quantized = gptq(weights(), hessian, 4, GROUP)
    assert quantized.isfinite().all()
    assert torch.equal(quantized[:, 0], nearest(weights(), 4, GROUP)[:, 0])
    assert quantized[:, 30].abs().max() > 0
    assert quantized.equal(gptq(weights(), hessian * 2**-30, 4, GROUP))  # the 1 in its place has no say in the others


def test_packed_bytes_count_weights_scales_and_zero_points():
    linear = nn.Linear(48, 32)
    assert packed_bytes(linear, bits=4, group=48) == 32 * 48 // 2 + 32 * 20 // 8
    assert packed_bytes(linear, bits=4, group=20) == 32 * 48 // 2 + 3 * 32 * 20 // 8
    assert packed_bytes(linear, bits=3, group=128) == (32 * 48 * 3 + 32 * 19) // 8


# Calibration


@pytest.mark.parametrize("fields", KINDS)
def test_a_core_linear_is_calibrated_on_every_loop(fields):
    model, batches = toy(**fields), calibration()
    rows = quantize_model(model, batches, LOOPS, group=GROUP)
    tokens = sum(ids.numel() for ids in batches)
    assert set(rows) == set(all_linears(model))
    assert {name.split(".")[0] for name in rows} == {"prelude", "core", "coda"}
    for name, row in rows.items():
        assert row["samples"] == (LOOPS * tokens if name.startswith("core.") else tokens)


def test_the_hessian_is_the_sum_over_explicit_loops():
    """A naive twin: what a layer reads in a loop is what the layer before it put out, normalised."""
    model, batches = toy(), calibration()
    sums = {"core.1.self_attn.q_proj": torch.zeros(32, 32), "coda.0.self_attn.q_proj": torch.zeros(32, 32)}
    for ids in batches:
        states = record(model, ids, LOOPS).states
        for loop in range(LOOPS):
            rows = model.model.core[1].input_layernorm(states["core", loop, 0]).flatten(0, 1)
            sums["core.1.self_attn.q_proj"] += 2 * rows.T @ rows
        rows = model.model.coda[0].input_layernorm(states["core", LOOPS - 1, 1]).flatten(0, 1)
        sums["coda.0.self_attn.q_proj"] += 2 * rows.T @ rows
    linears = {name: all_linears(model)[name] for name in sums}
    for name, inputs in collect_inputs(model, linears, batches, LOOPS).items():
        torch.testing.assert_close(inputs.hessian / inputs.samples, sums[name] / inputs.samples, **FP32)


@pytest.mark.parametrize("fields", KINDS)
def test_gptq_errs_less_than_nearest_on_what_it_was_calibrated_on(fields):
    rows = quantize_model(toy(**fields), calibration(), LOOPS, group=GROUP)
    for row in rows.values():
        assert 0 < row["relative_error"] < row["nearest_relative_error"]


def test_the_method_nearest_needs_no_calibration():
    model, other = toy(), toy()
    quantize_model(model, calibration(), LOOPS, group=GROUP, method="nearest")
    for name, linear in all_linears(model).items():
        assert torch.equal(linear.weight, nearest(all_linears(other)[name].weight, 4, GROUP))


def test_a_layer_is_calibrated_behind_quantised_ones():
    """What the first linears of the coda read does not change after their turn, so their error can be found again."""
    model, batches = toy(), calibration()
    before = {name: linear.weight.clone() for name, linear in all_linears(model).items()}
    rows = quantize_model(model, batches, LOOPS, group=GROUP)
    linears = {name: linear for name, linear in all_linears(model).items() if name.startswith("coda.0.self_attn.q")}
    assert linears
    for name, inputs in collect_inputs(model, linears, batches, LOOPS).items():
        error = output_error(before[name], linears[name].weight, inputs.hessian)
        assert error == pytest.approx(rows[name]["relative_error"], rel=1e-4)


@torch.no_grad()
def test_the_error_of_an_output_is_that_of_the_outputs():
    model, ids = toy(), make_ids(4, 30)
    linear = model.model.prelude[0].self_attn.q_proj
    inputs = model.model.prelude[0].input_layernorm(model.model.embed_tokens(ids))
    hessian = collect_inputs(model, {"prelude.0.q": linear}, [ids], LOOPS)["prelude.0.q"].hessian
    rounded = nearest(linear.weight, 4, GROUP)
    expected = (inputs @ (linear.weight - rounded).T).norm() / (inputs @ linear.weight.T).norm()
    assert output_error(linear.weight, rounded, hessian) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("method", ["gptq", "nearest"])
def test_only_the_weights_of_the_named_linears_change(fields, method):
    model = toy(**fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = quantize_model(model, calibration(), LOOPS, group=GROUP, method=method)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.{name}.weight" for name in rows}
    assert changed == {name for name in before if name.endswith("_proj.weight")}


@torch.no_grad()
def test_four_bits_more_make_the_logits_more_than_eight_times_as_near():
    exact = toy()(make_ids(), num_loops=LOOPS).logits
    errors = []
    for bits in (4, 8, 12, 16):
        model = toy()
        quantize_model(model, calibration(), LOOPS, bits=bits, group=GROUP)
        errors.append(float((model(make_ids(), num_loops=LOOPS).logits - exact).abs().max()))
    assert all(fine < coarse / 8 for coarse, fine in pairwise(errors))
    assert errors[-1] < 1e-3 * float(exact.abs().max())


def test_bfloat16_weights_keep_their_dtype_and_their_few_values():
    model = toy().bfloat16()
    rows = quantize_model(model, calibration(), LOOPS, group=GROUP)
    assert all(row["relative_error"] < 0.3 for row in rows.values())
    for linear in all_linears(model).values():
        assert linear.weight.dtype == torch.bfloat16
        assert all(len(row.unique()) <= 16 for row in linear.weight[:, :GROUP])


def test_a_linear_that_sees_no_samples_is_an_error_and_hooks_are_gone():
    """Tools for plain transformers fell back silently on looped layers."""
    model = toy()
    model.model.core[1].spare = nn.Linear(32, 32)
    before = model.model.core[1].self_attn.q_proj.weight.clone()
    with pytest.raises(ValueError, match=r"core\.1\.spare has 0 calibration samples and must have 1120 \(280 tokens"):
        quantize_model(model, calibration(), LOOPS)
    assert torch.equal(model.model.core[1].self_attn.q_proj.weight, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_linear_that_misses_a_loop_is_an_error():
    model, calls = toy(), []
    up_proj, spare = model.model.core[0].mlp.up_proj, nn.Linear(32, 48)

    def only_once(inputs):
        calls.append(len(inputs))
        return up_proj(inputs) if len(calls) == 1 else spare(inputs)

    model.model.core[0].mlp.forward = lambda x: model.model.core[0].mlp.down_proj(only_once(x))
    with pytest.raises(ValueError, match="has 40 calibration samples and must have 160"):
        collect_inputs(model, {"core.0.mlp.up_proj": up_proj}, [make_ids(1, 40)], LOOPS)


def test_inputs_that_are_not_finite_are_an_error():
    model = toy()
    model.model.core[1].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(
        ValueError, match=r"inputs of core\.0\S* at loops=4 are not finite or too large: .* fewer loops"
    ):
        quantize_model(model, calibration(), LOOPS)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"bits": 1}, "bits must be an integer from 2 to 16, got 1: 4 is usual"),
        ({"bits": 4.0}, r"bits must be an integer from 2 to 16, got 4\.0"),
        ({"group": 0}, "group must be an integer >= 1, got 0: 128 weights"),
        ({"method": "gtpq"}, "method must be gptq or nearest, got 'gtpq'"),
    ],
)
def test_settings_out_of_range_are_one_sentence(setting, message):
    with pytest.raises(ValueError, match=message):
        quantize_model(toy(), calibration(), LOOPS, **setting)


# Runs


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """The smoke recipe of text on toy pages, with prelude and coda."""
    flags = ["--model.num_prelude_layers=1", "--model.num_coda_layers=1", "--optim.lr=1e-2"]
    return trained.copy(tmp_path_factory.mktemp("runs"), "text", *flags)


def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def texts(run: Path, split: str) -> torch.Tensor:
    """The tokens of a split in a row, of documents read without our blocks."""
    tokenizer = AutoTokenizer.from_pretrained(run / "model", trust_remote_code=True)
    data = yaml.safe_load((run / "recipe.yaml").read_text())["data"]
    rows = load_task("text", "files", files=data["files"], **data["overrides"])[split]
    return torch.tensor([i for text in rows["text"] for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])


@pytest.fixture(scope="module")
def report(run):
    quantize_run(open_run(run), group=GROUP, calibration_rows=9, num_loops=LOOPS)
    return open_run(run).read(QUANTIZATION)


def test_the_written_folder_has_the_logits_of_the_model_quantised_on_training_text(run, report):
    """A naive twin: blocks cut by hand from the training text, drawn by the seed."""
    model, stream = loaded(run / "model"), texts(run, "train")
    blocks = stream[: (len(stream) - 1) // 32 * 32].view(-1, 32)
    chosen = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))[:9]
    rows = quantize_model(model, [blocks[chosen]], LOOPS, group=GROUP)
    assert list(report["linears"]) == list(rows)
    for name, row in rows.items():
        assert report["linears"][name]["samples"] == row["samples"]
        assert report["linears"][name]["relative_error"] == pytest.approx(row["relative_error"], rel=1e-4)
    written = loaded(run / "model_int4")
    ids = stream[None, :40]
    torch.testing.assert_close(written(ids, num_loops=LOOPS).logits, model(ids, num_loops=LOOPS).logits, **FP32)


def test_perplexity_is_that_of_both_folders_on_test_text(run, report):
    stream = texts(run, "test")
    assert report["test_tokens"] == (len(stream) - 1) // 32 * 32 > 0
    for when, name in {"before": "model", "after": "model_int4"}.items():
        model, losses = loaded(run / name), []
        for start in range(0, report["test_tokens"], 32):
            ids = stream[None, start : start + 33]
            losses.append(model(ids, labels=ids, num_loops=LOOPS).loss.item())
        assert report["block_losses"][when] == pytest.approx(losses, abs=1e-5)
        expected = 2.718281828 ** (sum(losses) / len(losses))
        assert report["perplexity"][when] == pytest.approx(expected, rel=1e-4)
    assert report["perplexity"]["before"] != report["perplexity"]["after"]


def test_the_folder_has_the_files_of_the_model_and_nothing_half_is_left(run, report):
    names = {path.name for path in (run / "model").iterdir()}
    assert {path.name for path in (run / "model_int4").iterdir()} == names
    assert report["model"] == "model_int4"
    assert not [path for path in run.iterdir() if path.name.endswith((".partial", ".tmp"))]


def test_the_report_counts_bytes_and_calibration(run, report):
    linears = all_linears(loaded(run / "model"))
    size = report["bytes"]
    assert size["linears_before"] == sum(4 * linear.weight.numel() for linear in linears.values())
    assert size["linears_after"] == sum(packed_bytes(linear, 4, GROUP) for linear in linears.values())
    assert size["model_before"] - size["model_after"] == size["linears_before"] - size["linears_after"]
    assert size["model_before"] == 4 * json.loads((run / "summary.json").read_text())["parameters"]
    settings = {"method": "gptq", "bits": 4, "group": GROUP, "loops": LOOPS, "calibration_rows": 9, "seed": 0}
    assert settings.items() <= report.items()
    assert report["calibration_tokens"] == 9 * 32


def test_the_command_writes_and_says_what_it_measured(run, capsys):
    arguments = ["--bits", "3", "--method", "nearest", "--calibration-rows", "4", "--loops", "2", "--group", "16"]
    assert main(["quantize", str(run), *arguments]) == 0
    said = capsys.readouterr().out
    assert "nearest, 3 bits, groups of 16, over 2 loops and 128 training tokens" in said
    report = open_run(run).read(QUANTIZATION)
    assert f"{report['perplexity']['before']:.3f} -> {report['perplexity']['after']:.3f}" in said
    assert loaded(run / report["model"]).config.num_loops == 2
    assert report["model"] == "model_int3"
    assert all(row["relative_error"] == row["nearest_relative_error"] for row in report["linears"].values())


def test_too_many_calibration_rows_are_one_sentence_and_leave_the_old_report(run, report, capfd):
    before = (run / "quantization.json").read_text()
    assert main(["quantize", str(run), "--calibration-rows", "100000"]) == 2
    assert "calibration_rows must be from 1 to " in capfd.readouterr().err
    assert (run / "quantization.json").read_text() == before


@pytest.mark.parametrize("task", ["hops", "molecules"])
def test_every_task_is_quantised_and_measured_by_loops(trained, tmp_path, capsys, task):
    run = trained.copy(tmp_path, task)
    tokens = {"hops": 5, "molecules": 3}[task]
    assert main(["quantize", str(run), "--calibration-rows", str(tokens), "--bits", "8"]) == 0
    said, report = capsys.readouterr().out, open_run(run).read(QUANTIZATION)
    loops = loaded(run / "model").config.num_loops
    assert [row["loops"] for row in report["losses"]] == [n for n in (1, 2, 3, 4, 6, 8) if n <= 2 * loops and (
        n == loops or n & (n - 1) == 0)]  # fmt: skip
    for when, name in {"before": "model", "after": "model_int8"}.items():
        model, tokenizer = loaded(run / name), AutoTokenizer.from_pretrained(run / name, trust_remote_code=True)
        losses = naive_losses(task, run, model, tokenizer, loops)
        row = next(row for row in report["losses"] if row["loops"] == loops)
        assert row[when] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert f"{row[when]:.4f}" in said
    assert report["losses"][0]["before"] != report["losses"][0]["after"]
    seen = {row["samples"] for name, row in report["linears"].items() if name.startswith("core")}
    assert seen == {report["calibration_tokens"] * loops}


def naive_losses(task: str, run: Path, model, tokenizer, loops: int) -> list[float]:
    """The loss of every test row, one by one."""
    losses = []
    if task == "hops":
        trained = open_run(run).summary()["trained_hops"]
        rows = [row for row in load_run_task(open_run(run))["test"] if row["hops"] in trained]
    else:
        rows = run_molecules(open_run(run))["test"]
    for row in rows:
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids, num_loops=loops).logits[0]
        if task == "hops":
            logits, labels = logits[-1:], torch.tensor(tokenizer.convert_tokens_to_ids([row["answer"]]))
        else:
            labels = torch.cat([ids[0, 1:], torch.tensor([tokenizer.eos_token_id])])
        losses.append(torch.nn.functional.cross_entropy(logits, labels).item())
    return losses


def test_an_unquantised_run_names_the_command(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {task: text}")
    with pytest.raises(ValueError, match=r"has no quantization\.json: run `looped quantize"):
        open_run(tmp_path).read(QUANTIZATION)
