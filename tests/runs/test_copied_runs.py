"""A run that `--to FOLDER` made of a model was not trained here: no remedy is to train on."""

import pytest

from looplab.runs.folder import Run

DAMAGE = {
    "summary.json is missing": (lambda run: run.summary(), "without the records of its training"),
    "the model is missing": (lambda run: run.model_folder(), "make it again by --to"),
    "run.json is damaged": (lambda run: run.note(), "make it again by --to"),
    "the settings are missing": (lambda run: run.save_generation_settings(num_loops=3), "make it again by --to"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_the_remedy_is_to_make_it_again(what, tmp_path):
    call, words = DAMAGE[what]
    (tmp_path / "model").mkdir()
    for name in ("origin.json", "recipe.yaml"):
        (tmp_path / name).write_text("{}")
    if what == "run.json is damaged":
        (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=words) as error:
        call(Run(tmp_path))
    assert "train.py" not in str(error.value)
    (tmp_path / "origin.json").unlink()  # a run that was trained here
    with pytest.raises(ValueError, match=r"train\.py"):
        call(Run(tmp_path))
