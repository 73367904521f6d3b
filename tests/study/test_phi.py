"""`looped phi`: the law and its slopes, a known phi is found, and what a grid cannot tell is said."""

from dataclasses import replace

import numpy as np
import pytest

from looplab.cli import main
from looplab.runs.folder import open_run, to_json_lines
from looplab.study.phi import Fit, Point, fit, log_losses, phi_text, point_of, points_of_runs, points_of_study
from looplab.study.study_file import digests_of, read_study
from looplab.training.recipe import read_recipe
from modeling_looped import LoopedConfig
from toys import make_model


def law(once: float, looped: float, loops: int, tokens: float, phi: float) -> float:
    """E = 1.7, A and B of losses that small models have."""
    return 1.7 + 1.5 * ((once + loops**phi * looped) / 2e5) ** -0.35 + 1.2 * (tokens / 4e5) ** -0.3


def points(phi: float, noise: float, kind: str = "plain", seed: int = 0) -> list[Point]:
    """The grid of studies/phi.yaml: one seed, two widths, 1, 2 and 4 loops, three lengths of training."""
    draw, found = np.random.default_rng(seed), []
    for width in (32, 64):
        for loops in (1, 2, 4):
            for updates in (100, 200, 400):
                once, looped, tokens = 24 * width**2, 12 * width**2 * (4 // loops), 2048 * updates
                loss = law(once, looped, loops, tokens, phi) * np.exp(noise * draw.standard_normal())
                found.append(Point(kind, loops, once, looped, tokens, loss))
    return found


def test_the_law_is_the_papers_and_its_slopes_are_right():
    numbers = np.array([np.log(1.7), np.log(1.5), 0.35, np.log(1.2), 0.3, 0.4])
    rows = np.array([[p.loops, p.once / 2e5, p.looped / 2e5, p.tokens / 4e5, p.loss] for p in points(0.4, 0.0)]).T
    logs, slopes = log_losses(numbers, rows)
    np.testing.assert_allclose(np.exp(logs), rows[-1])
    for index in range(6):
        step = 1e-6 * np.eye(6)[index]
        around = [log_losses(numbers + sign * step, rows)[0] for sign in (1, -1)]
        np.testing.assert_allclose(slopes[:, index], (around[0] - around[1]) / 2e-6, atol=1e-7)


@pytest.mark.parametrize("phi", [0.0, 0.45, 1.0])
def test_a_known_phi_is_found_within_its_interval(phi):
    found = fit(points(phi, noise=0.002), resamples=12)
    low, high = found.interval
    assert low <= phi <= high
    assert found.identified
    assert found.error < 0.004
    assert high - low < 0.2
    assert fit(points(phi, noise=0.0), resamples=1).phi == pytest.approx(phi, abs=0.02)


def test_one_run_that_went_astray_moves_phi_little():
    """By squares it would be -0.49."""
    rows = points(0.45, noise=0.001)
    astray = [*rows[:-1], replace(rows[-1], loss=1.5 * rows[-1].loss)]
    assert fit(astray, resamples=1).phi == pytest.approx(0.45, abs=0.02)


def test_a_grid_that_cannot_tell_says_so():
    text = phi_text([*points(0.45, noise=0.2), *points(0.6, noise=0.001, kind="hyper")], resamples=8)
    assert "| plain | 18 | 1, 2, 4 | not known |" in text
    assert "The loop plain: the interval of phi is wider than 1 or open" in text
    assert "The loop hyper:" not in text


@pytest.mark.parametrize(
    ("interval", "identified"),
    [((0.2, 0.9), True), ((-0.3, 0.8), False), ((2.5, 3.0), False), ((-1.0, -0.5), False), ((0.0, 1.0), True)],
)
def test_known_is_an_interval_within_the_unit_range(interval, identified):
    """3 and -1 are where phi is sought no further: an interval that ends there is open."""
    assert Fit("plain", 9, (1, 2), 0.5, interval, 1.7, 0.3, 0.3, 0.01).identified == identified


def test_runs_that_cannot_tell_are_refused():
    rows = points(0.4, noise=0.0)
    for few, said in (
        (rows[:6], "the loop plain has 6 runs"),
        ([row for row in rows if row.loops == 2], "different loops 1"),
        ([row for row in rows if row.once == rows[0].once], "sizes 1"),
        ([row for row in rows if row.tokens == rows[0].tokens], "tokens 1"),
    ):
        with pytest.raises(ValueError, match=said):
            fit(few)
    assert "the loop hyper has 6 runs" in phi_text([*rows, *points(0.4, 0.0, "hyper")[:6]], resamples=1)
    with pytest.raises(ValueError, match="there are no runs"):
        phi_text([])


def test_a_point_counts_the_core_once_and_no_embeddings():
    fields = {"num_prelude_layers": 1, "tie_word_embeddings": False, "loop_connection": "hyper", "max_num_loops": 4}
    model = make_model(**fields, hyper_mixing="static")
    point = point_of(model.config, 10, 2.0)
    core = sum(p.numel() for p in model.model.core.parameters())
    words = model.get_input_embeddings().weight.numel() + model.lm_head.weight.numel()
    assert (point.kind, point.loops, point.looped) == ("hyper, static", 3, core)
    assert point.once == sum(p.numel() for p in model.parameters()) - core - words


def test_a_run_gives_its_tokens_and_its_loss(trained, tmp_path, capsys):
    run = open_run(trained.copy(tmp_path, "text"))
    assert main(["eval", str(run.folder)]) == 0
    (point,) = points_of_runs([run])
    recipe = read_recipe(str(run.folder / "recipe.yaml"), [])
    assert point.tokens == run.summary()["tokens"]
    assert point.tokens == recipe.max_steps * recipe.batch_size * recipe.data.sequence_length  # as of a study's arm
    assert main(["phi", str(run.folder)]) == 2
    assert "the loop plain has 1 runs" in capsys.readouterr().err
    assert main(["phi", str(trained("hops"))]) == 2


def test_the_study_of_this_package_is_a_grid_that_tells(tmp_path, capsys, monkeypatch):
    """Rows as if all its runs had followed the law, with another phi for each connection."""
    name, study = read_study("phi")
    known = {"plain": 0.4, "static": 0.6, "hyperloop": 0.7}
    draw, rows, digests = np.random.default_rng(0), [], digests_of(study)
    for arm, what in study.arms.items():
        config = LoopedConfig(**read_recipe(what.recipe, [f"--{k}={v}" for k, v in what.overrides.items()]).model)
        point = point_of(config, 2048 * what.overrides["max_steps"], 0.0)
        phi = known[arm.split("_")[0]]
        loss = law(point.once, point.looped, point.loops, point.tokens, phi) * np.exp(0.001 * draw.standard_normal())
        facts = {"arm": arm, "seed": 10, "recipe": digests[arm], "commit": "c0ffee"}
        rows += [facts | {"loops": point.loops, "loss": loss}, facts | {"loops": 9, "loss": 99.0}]
    (tmp_path / "phi.jsonl").write_text(to_json_lines(rows))
    found = points_of_study(name, study, tmp_path)
    assert len(found) == len(study.arms)
    assert {point.kind for point in found} == {"plain", "hyper, static", "hyper, diagonal"}
    monkeypatch.setattr("looplab.study.phi.phi_text", lambda points: phi_text(points, resamples=5))
    assert main(["phi", "phi", "--rows", str(tmp_path)]) == 0
    table = capsys.readouterr().out.strip().splitlines()[2:]
    for line, (_, phi) in zip(table, known.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert float(cells[3]) == pytest.approx(phi, abs=0.03)
        assert cells[1:3] == ["18", "1, 2, 4"]


def test_a_study_of_something_else_is_refused(capsys):
    assert main(["phi", "far_hops"]) == 2
    assert "losses of text, and the rows of the study far_hops, grid.jsonl, have none" in capsys.readouterr().err
