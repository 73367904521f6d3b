"""Laws of reading runs on text: eval equals a naive twin, tables equal numbers worked out by hand, plots their files.

Runs are twenty steps of the smoke recipe on toy pages: a loop and a plain stack, three seeds each.
"""

import json
import shutil
from math import exp
from statistics import fmean, stdev

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from data_builders import TextBlocks, load_text, train_byte_bpe
from data_builders.text_batches import spread_blocks
from looplab.cli import main
from looplab.runs.folder import open_run
from looplab.runs.intervals import bootstrap_intervals
from looplab.runs.models import count_parameters
from looplab.runs.seeds import group_runs
from looplab.tasks.language.figures import held_out_figure, training_figure
from looplab.tasks.registry import task_of
from looplab.tasks.text import perplexity
from looplab.tasks.text.figures import perplexity_figure, plot_runs
from looplab.tasks.text.perplexity import block_losses, evaluate_run
from looplab.tasks.text.records import EVALUATION, PERPLEXITY
from looplab.tasks.text.results import markdown_table
from modeling_looped import LoopedForCausalLM
from toy_runs import failure
from toys import SIZES, count_layer_calls, make_model, write_pages

pytestmark = pytest.mark.slow

PLAIN = ["--model.num_core_layers=2", "--model.num_loops=1", "--model.tie_word_embeddings=false", "--eval_loops=[]"]
PLAIN += ["--depth={kind: fixed, mean: 1}"]
T2 = 4.303  # 97.5 % quantile of Student's t for two degrees of freedom


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """Folders of two groups of three seeds, evaluated: loop_seed0 .. 2 and plain_seed0 .. 2."""
    home = tmp_path_factory.mktemp("text")
    folders = [
        trained.copy(home, "text", f"--name={name}_seed{seed}", f"--seed={seed}", *flags)
        for name, flags in (("loop", []), ("plain", PLAIN))
        for seed in range(3)
    ]
    for folder in folders:
        evaluate_run(open_run(folder))
    return folders


@pytest.fixture
def runs(evaluated, tmp_path):
    """Copies of them to break."""
    return [open_run(shutil.copytree(folder, tmp_path / folder.name)) for folder in evaluated]


def splits_of(run) -> datasets.DatasetDict:
    data = run.recipe()["data"]
    return load_text(data["files"], **data["overrides"])


def cells_of(table: str) -> dict[str, dict[str, str]]:
    """Group -> column -> cell."""
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


# looped eval


def test_the_loss_of_each_block_is_what_the_model_itself_says(runs):
    """A naive twin: the test documents in a row, one block after the other, the model's own loss."""
    run = runs[0]
    model = LoopedForCausalLM.from_pretrained(run.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    texts = splits_of(run)["test"]["text"]
    stream = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = run.read(PERPLEXITY)
    assert [row["loops"] for row in rows] == [1, 2, 4]  # the model's own 2 and the recipe's eval_loops
    for row in rows:
        losses = []
        for start in range(0, (len(stream) - 1) // 32 * 32, 32):
            ids = torch.tensor([stream[start : start + 33]])
            losses.append(model(ids, labels=ids, num_loops=row["loops"]).loss.item())
        assert row["block_losses"] == pytest.approx(losses, abs=1e-5)
        assert row["loss"] == pytest.approx(fmean(losses), abs=1e-5)
        assert row["perplexity"] == pytest.approx(exp(fmean(losses)), rel=1e-4)
        assert row["tokens"] == 32 * len(losses)
        assert row["interval"][0] < row["perplexity"] < row["interval"][1]


def test_the_test_split_is_neither_that_of_the_checks_nor_the_training(runs):
    splits = splits_of(runs[0])
    texts = {name: set(rows["text"]) for name, rows in splits.items()}
    assert texts["test"]
    assert not texts["test"] & (texts["validation"] | texts["train"])
    tokenizer = AutoTokenizer.from_pretrained(runs[0].folder / "model")
    assert (
        perplexity.run_blocks(runs[0], tokenizer)["test"].num_tokens
        == TextBlocks(splits["test"], tokenizer, 32).num_tokens
    )


def test_a_limit_takes_the_same_blocks_every_time_evenly_spread(runs):
    run = runs[0]
    whole, text = run.read(PERPLEXITY)[1]["block_losses"], run.read(PERPLEXITY)[1]["text"]
    firsts = [evaluate_run(run, [2], limit=4).read_text() for _ in range(2)]
    assert firsts[0] == firsts[1]
    [row] = run.read(PERPLEXITY)
    last = len(whole) - 1
    assert last > 8
    assert row["block_losses"] == pytest.approx([whole[number] for number in (0, last // 3, 2 * last // 3, last)])
    assert row["tokens"] == 4 * 32
    assert row["text"] != text
    assert run.read(EVALUATION)["limit"] == 4
    evaluate_run(run, [2], limit=10_000)
    assert run.read(PERPLEXITY)[0]["block_losses"] == whole


def test_spread_blocks_are_each_there_once():
    for total, limit in ((10, 1), (10, 3), (10, 9), (10, 10), (2_000_000, 1_999_999)):
        numbers = spread_blocks(total, limit)
        assert len(numbers.unique()) == len(numbers) == limit
        assert (numbers[0], numbers[-1]) == (0, total - 1 if limit > 1 else 0)
    assert spread_blocks(3, None).tolist() == [0, 1, 2]


def test_the_interval_of_blocks_that_are_alike_is_their_loss():
    """Sums in another order round to another mean, which would lie outside."""
    for count, loss in ((1, 3.1), (55, 2.7), (102, 3.1)):
        [row] = perplexity.text_rows({2: torch.full((count,), loss, dtype=torch.float64)}, 32 * count, "digest")
        low, high = row["interval"]
        assert low <= row["perplexity"] <= high
        assert (low, high) == pytest.approx((exp(loss), exp(loss)))


def test_how_many_rows_go_through_the_model_at_once_does_not_matter(runs, monkeypatch):
    whole = [row["block_losses"] for row in runs[0].read(PERPLEXITY)]
    monkeypatch.setattr(perplexity, "TOKENS", 1)
    evaluate_run(runs[0])
    for row, losses in zip(runs[0].read(PERPLEXITY), whole, strict=True):
        assert row["block_losses"] == pytest.approx(losses, abs=1e-5)


def test_loops_beyond_those_of_the_model_are_refused_in_its_own_words(trained, tmp_path, capfd):
    flags = ["--model.loop_connection=hyper", "--depth={kind: uniform, minimum: 1, maximum: 2}", "--eval_loops=[1]"]
    folder = trained.copy(tmp_path, "text", *flags, "--max_steps=1")
    message = failure(capfd, "eval", folder, "--loops", "1", "3")
    assert "num_loops=3 must be in 1 .. max_num_loops=2" in message
    assert not (folder / "text.jsonl").exists()
    assert main(["eval", str(folder)]) == 0
    assert [row["loops"] for row in open_run(folder).read(PERPLEXITY)] == [1, 2]


def test_such_loops_are_refused_before_any_work():
    split = datasets.Dataset.from_dict({"text": ["a few words " * 40]})
    blocks = TextBlocks(split, train_byte_bpe(["a b"], 258), 16)
    model = make_model(loop_connection="hyper", num_loops=2, vocab_size=260)
    calls = count_layer_calls(model)
    with pytest.raises(ValueError, match=r"max_num_loops=2"):
        block_losses(model, blocks, spread_blocks(len(blocks), 3), [1, 3])
    assert not calls


def test_eval_prints_a_line_per_loop_count(runs, capsys):
    assert main(["eval", str(runs[0].folder), "--loops", "1", "6", "--limit", "3"]) == 0
    header, columns, *lines = capsys.readouterr().out.splitlines()[2:5]
    assert header == "Test split, 3 blocks, 96 tokens; [ ] marks trained loop counts."
    assert columns.split()[0] == "loops"
    rows = runs[0].read(PERPLEXITY)
    assert lines[0].split()[:3] == ["[1]", f"{rows[0]['loss']:.4f}", f"{rows[0]['perplexity']:.2f}"]
    assert not list(runs[0].folder.glob("*.tmp"))


def test_text_that_has_changed_since_the_training_is_refused(trained, tmp_path, capfd):
    """Else documents of the training might be in the test split."""
    folder = trained("text", f"--data.files={write_pages(tmp_path / 'pages')}", "--max_steps=1")
    (tmp_path / "pages" / "page003.txt").unlink()
    message = failure(capfd, "eval", folder)
    assert "training tokens now and had" in message
    assert "restore the files its recipe names" in message


@pytest.mark.parametrize("option", ["--max-hops", "--max-loops"])
def test_options_of_hops_are_refused(evaluated, capfd, option):
    assert f"looped eval {option} is not for text: it is for" in failure(capfd, "eval", evaluated[0], option, "3")


# Parameters


def test_parameters_are_counted_with_both_vocabulary_matrices_one_or_none():
    """By hand: 2 layers of 3 D D attention (keys and values are halves), 3 D I MLP and 2 norms; 1 final norm."""
    hidden, inner, words = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    layers = 2 * (3 * hidden * hidden + 3 * hidden * inner + 2 * hidden) + hidden
    tied = count_parameters(make_model())
    assert tied == {"all": layers + words * hidden, "layers": layers, "one_vocabulary": tied["all"]}
    untied = count_parameters(make_model(tie_word_embeddings=False))
    assert untied == {**tied, "all": tied["all"] + words * hidden}
    more = {"loop_connection": "hyper", "loop_embedding": "learned", "position_embedding": "learned"}
    joined = count_parameters(make_model(**more))
    assert joined["layers"] - layers == joined["all"] - tied["all"] - 64 * hidden > 0


# looped table


def t_interval_by_hand(values) -> tuple[float, float]:
    half = T2 * stdev(values) / 3**0.5
    return fmean(values) - half, fmean(values) + half


def test_the_table_has_the_numbers_of_the_files(runs):
    cells = cells_of(markdown_table(runs))
    for name, members, own, line in (("loop", runs[:3], 2, 1), ("plain", runs[3:], 1, 0)):
        values = [exp(fmean(run.read(PERPLEXITY)[line]["block_losses"])) for run in members]
        low, high = t_interval_by_hand(values)
        summaries = [run.summary() for run in members]
        rates = [20 * 8 * 32 / summary["seconds"] for summary in summaries]
        parameters = summaries[0]["parameters"]
        expected = {
            "seeds": "3",
            "loops": str(own),
            "test perplexity": f"{fmean(values):,.2f} [{min(values):,.2f}, {max(values):,.2f}]",
            "95 % t-interval": f"[{low:,.2f}, {high:,.2f}]",
            "training tokens": "5,120",
            "tokens/s": f"{fmean(rates):,.0f} [{min(rates):,.0f}, {max(rates):,.0f}]",
            "parameters": f"{parameters:,}",
            "with one vocabulary matrix": f"{parameters - (280 * 32 if name == 'plain' else 0):,}",
            "without embeddings": f"{parameters - (2 if name == 'plain' else 1) * 280 * 32:,}",
        }
        assert {column: cells[name][column] for column in expected} == expected
    assert not [column for column in cells["loop"] if "against" in column or "INT" in column]


def test_groups_are_compared_seed_by_seed_on_the_same_blocks(runs):
    cells = cells_of(markdown_table(runs, against="plain"))
    blocks = [
        [
            there - here
            for here, there in zip(*(run.read(PERPLEXITY)[line]["block_losses"] for run, line in pair), strict=True)
        ]
        for pair in [((runs[3 + seed], 0), (runs[seed], 1)) for seed in range(3)]
    ]
    means = [fmean(each) for each in blocks]
    low, high = t_interval_by_hand(means)
    assert cells["loop"]["nats per token against plain"] == f"{fmean(means):+.4f}"
    assert cells["loop"]["pairs"] == "3"
    assert cells["loop"]["95 % over seeds"] == f"[{low:+.4f}, {high:+.4f}]"
    [(low, high)] = bootstrap_intervals(torch.tensor(blocks).double().mean(0, keepdim=True).numpy())
    assert cells["loop"]["95 % over blocks"] == f"[{low:+.4f}, {high:+.4f}]"
    assert cells["plain"]["nats per token against plain"] == "-"
    reverse = cells_of(markdown_table(runs, against="loop"))
    assert float(reverse["plain"]["nats per token against loop"]) == -float(f"{fmean(means):+.4f}")


def test_only_seeds_that_both_groups_have_are_paired(runs):
    cells = cells_of(markdown_table([*runs[:2], *runs[4:]], against="plain"))["loop"]
    assert (cells["pairs"], cells["95 % over seeds"]) == ("1", "-")
    alone = fmean(runs[1].read(PERPLEXITY)[1]["block_losses"]) - fmean(runs[4].read(PERPLEXITY)[0]["block_losses"])
    assert cells["nats per token against plain"] == f"{alone:+.4f}"
    unpaired = cells_of(markdown_table([runs[0], runs[4]], against="plain"))["loop"]
    assert not [column for column in unpaired if "against" in column]


def test_runs_measured_on_different_blocks_are_not_compared(runs, capfd):
    evaluate_run(runs[0], [2], limit=4)
    folders = [run.folder for run in runs]
    message = failure(capfd, "table", *folders, "--against", "plain")
    assert "were measured on different blocks" in message
    assert main(["table", *map(str, folders)]) == 0


def test_a_baseline_that_is_not_there_is_named_with_the_nearest(runs, capfd):
    message = failure(capfd, "table", *(run.folder for run in runs), "--against", "plane")
    assert message == "looped table: no group is called 'plane'; did you mean 'plain'? There are loop, plain."


def test_two_runs_of_one_recipe_and_seed_are_not_paired(runs, tmp_path):
    again = open_run(shutil.copytree(runs[0].folder, tmp_path / "loop_again"))
    with pytest.raises(ValueError, match="have the same recipe and seeds: leave one out"):
        markdown_table([again, *runs], against="plain")


def test_a_table_says_what_to_measure_first(runs, capfd):
    evaluate_run(runs[0], [1, 4])
    assert "has no line at the model's own 2 loops" in failure(capfd, "table", runs[0].folder)
    (runs[1].folder / "text.jsonl").unlink()
    assert f"has no text.jsonl: run `looped eval {runs[1].folder}` first" in failure(capfd, "table", runs[1].folder)


# After quantization


def quantize(run, after: float, bits: int = 4):
    """What `looped quantize` writes, as far as the table reads it."""
    facts = {"method": "gptq", "bits": bits, "perplexity": {"before": 30.0, "after": after}}
    (run.folder / "quantization.json").write_text(json.dumps(facts))


def test_the_table_has_perplexities_after_quantization_where_a_whole_group_has_them(runs):
    for run, after in zip(runs[:3], (32.0, 33.0, 34.0), strict=True):
        quantize(run, after)
    quantize(runs[3], 32.5)
    cells = cells_of(markdown_table(runs))
    assert cells["loop"]["gptq INT4: before"] == "30.00"
    assert cells["loop"]["gptq INT4: after"] == "33.00 [32.00, 34.00]"
    assert cells["plain"]["gptq INT4: after"] == "-"
    quantize(runs[2], 34.0, bits=8)
    with pytest.raises(ValueError, match="quantized as gptq INT4 and gptq INT8: choose one"):
        markdown_table(runs)
    (runs[0].folder / "quantization.json").write_text('{"method": "gptq"')
    with pytest.raises(ValueError, match=r"quantization\.json cannot be read .*looped quantize"):
        markdown_table(runs)


# looped plot


def line(axes, label: str) -> tuple[list, list]:
    [found] = [artist for artist in axes.lines if artist.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def band(axes, index: int = 0) -> dict[float, tuple[float, float]]:
    """x -> (lowest, highest) of a shaded band."""
    heights = {}
    for x, y in axes.collections[index].get_paths()[0].vertices:
        heights.setdefault(x, []).append(y)
    return {x: (min(ys), max(ys)) for x, ys in heights.items()}


def checks(run) -> list[dict]:
    return [row for row in run.metrics() if "held_out" in row]


def test_the_training_is_drawn_over_its_tokens(runs):
    [axes] = training_figure(runs[0]).axes
    batches = [row for row in runs[0].metrics() if "loss" in row]
    assert line(axes, "logged batches") == ([row["tokens"] for row in batches], [row["loss"] for row in batches])
    x = [10 * 8 * 32, 20 * 8 * 32]
    assert line(axes, "held out, own loops") == (x, [row["held_out"]["loss"] for row in checks(runs[0])])
    for count, word in (("1", "1 loop"), ("2", "2 loops"), ("4", "4 loops")):
        losses = [row["held_out_at_loops"][count]["loss"] for row in checks(runs[0])]
        assert line(axes, f"held out, {word}") == (x, losses)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training tokens", "loss (nats per token)")
    [axes] = training_figure(runs[3]).axes  # a recipe without eval_loops
    assert [artist.get_label() for artist in axes.lines] == ["logged batches", "held out, own loops"]


def test_groups_are_drawn_as_means_with_the_t_interval_over_seeds(runs):
    [axes] = held_out_figure(list(group_runs(runs).items())).axes
    losses = [[row["held_out"]["loss"] for row in checks(run)] for run in runs[:3]]
    x, middle = line(axes, "loop")
    assert x == [10 * 8 * 32, 20 * 8 * 32]
    assert middle == pytest.approx([fmean(column) for column in zip(*losses, strict=True)])
    for tokens, column in zip(x, zip(*losses, strict=True), strict=True):
        assert band(axes)[tokens] == pytest.approx(t_interval_by_hand(column), rel=1e-3)
    assert axes.get_title(loc="left") == "band: 95 % t-interval over 3 seeds"
    [axes] = held_out_figure([("one", runs[:1])]).axes
    assert not axes.collections


def test_perplexity_is_drawn_over_loops_of_a_run_with_the_interval_over_its_blocks(runs):
    [axes] = perplexity_figure([("loop", runs[:1])]).axes
    rows = runs[0].read(PERPLEXITY)
    assert line(axes, "loop") == ([1, 2, 4], [row["perplexity"] for row in rows])
    assert band(axes) == {row["loops"]: pytest.approx(tuple(row["interval"])) for row in rows}
    [span] = axes.patches
    assert (span.get_x(), span.get_x() + span.get_width()) == (0.5, 4.5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]


def test_a_group_of_one_loop_count_is_a_point_beside_the_others(runs):
    groups = list(group_runs(runs).items())
    [axes] = perplexity_figure(groups).axes
    values = [[row["perplexity"] for row in run.read(PERPLEXITY)] for run in runs[:3]]
    assert line(axes, "loop")[1] == pytest.approx([fmean(column) for column in zip(*values, strict=True)])
    [point] = axes.containers
    assert (point.get_label(), list(point.lines[0].get_xdata())) == ("plain", [1])
    assert axes.get_title(loc="left") == "band: 95 % t-interval over 3 seeds"
    assert perplexity_figure(groups[1:]) is None


def test_plot_draws_each_run_and_the_groups(runs):
    folders = [runs[0].folder / "figures", runs[1].folder / "figures", runs[3].folder / "figures"]
    groups = runs[0].folder.parent / "figures" / "loop_and_plain"
    paths = plot_runs([runs[0], runs[1], runs[3]])
    expected = [folder / f"{name}.png" for folder in folders[:2] for name in ("training", "perplexity")]
    assert paths == [*expected, folders[2] / "training.png", groups / "held_out.png", groups / "perplexity.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_run_is_drawn_before_it_is_evaluated_but_not_before_its_first_check(runs, capfd):
    (runs[0].folder / "text.jsonl").unlink()
    assert plot_runs(runs[:1]) == [runs[0].folder / "figures" / "training.png"]
    metrics = runs[0].folder / "metrics.jsonl"
    metrics.write_text("".join(f"{row}\n" for row in metrics.read_text().splitlines() if "held_out" not in row))
    assert "has no training and held-out rows yet" in failure(capfd, "plot", runs[0].folder)


# Which task


def test_runs_of_different_tasks_are_read_apart(runs, capfd):
    recipe = runs[1].folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("task: text", "task: khop"))
    for command in ("table", "plot"):
        message = failure(capfd, command, runs[0].folder, runs[1].folder)
        assert message == (
            f"looped {command}: {runs[0].folder} is a run on text and {runs[1].folder} on khop: read them apart."
        )
    assert "looped table --against is not for khop: it is for text, molecules" in failure(
        capfd, "table", runs[1].folder, "--against", "loop"
    )
    recipe.write_text(recipe.read_text().replace("task: khop", "task: chess"))
    with pytest.raises(ValueError, match=r"there is no task 'chess'; there are khop, composition, text"):
        task_of(runs)
    recipe.write_text("name: x\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml has no data\.task"):
        task_of(runs)
