"""Laws of names from elsewhere: a name that people know is a field's alias, or answered; no suggestion deletes."""

import re
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig

from command_lines import VERBS, arguments_of
from looplab.cli import main
from looplab.pretrained import study
from looplab.runs.sections import field_names, flatten, leaves
from looplab.runs.yaml_text import parse_yaml, to_yaml
from looplab.training.names import ALIASES, ANSWERS, choice, clipped, listed, same, several
from looplab.training.recipe import Recipe, own_sections, read_recipe
from toys import ROOT

SMOKE = ROOT / "recipes" / "smoke.yaml"
TEXT = ROOT / "recipes" / "smoke_text.yaml"
LORA = {"name": "r", "model": {}, "init_from": "a", "max_steps": 1, "depth": {"kind": "fixed", "mean": 2}}
CHAT = {"task": "text", "files": ["a.jsonl"], "sequence_length": 8, "tokenizer": "a"}
OURS = {name: item for task in ("khop", "text") for name, item in leaves(Recipe, own_sections(task)).items()}
# Arguments of run_clm.py, run_clm_no_trainer.py and others of transformers, in any version.
SCRIPTS = [
    "model_name_or_path", "model_type", "config_overrides", "config_name", "tokenizer_name", "cache_dir",
    "use_fast_tokenizer", "model_revision", "token", "trust_remote_code", "torch_dtype", "dtype",
    "low_cpu_mem_usage", "dataset_name", "dataset_config_name", "train_file", "validation_file", "max_train_samples",
    "max_eval_samples", "streaming", "block_size", "overwrite_cache", "validation_split_percentage",
    "preprocessing_num_workers", "keep_linebreaks", "per_device_train_batch_size", "learning_rate",
    "num_train_epochs", "max_train_steps", "num_warmup_steps", "checkpointing_steps", "with_tracking", "report_to",
    "push_to_hub", "evaluation_strategy", "overwrite_output_dir", "warmup_ratio", "no_cuda", "logging_dir",
    "group_by_length", "adafactor", "fp16_opt_level", "mixed_precision", "attn_implementation", "use_peft", "lora_r",
    "lora_alpha", "lora_target_modules", "load_in_4bit",
]  # fmt: skip
KNOWN = [item.name for form in (TrainingArguments, SFTConfig, ModelConfig, ScriptArguments) for item in fields(form)]
NAMES = list(dict.fromkeys([*KNOWN, *SCRIPTS, *ALIASES, *ANSWERS]))


def value_of(recipe: Recipe, name: str):
    return flatten(vars_of(recipe))[name]


def vars_of(section) -> dict:
    return {name: vars_of(v) if hasattr(v, "__dataclass_fields__") else v for name, v in vars(section).items()}


def theirs(name: str) -> list[tuple]:
    """(value that people write, value of our field) for an alias."""
    convert, item = ALIASES[name].convert, OURS[ALIASES[name].field]
    if convert is clipped:
        return [(0, None), (0.5, 0.5)]
    if convert is listed:
        return [("none", []), ("tensorboard", ["tensorboard"]), (["tensorboard", "wandb"], ["tensorboard", "wandb"])]
    if convert.__qualname__.startswith(choice.__name__):
        values = convert.__closure__[0].cell_contents
        return list(values.items())
    if convert is several:
        return [("q_proj", ["q_proj"]), (["q_proj", "k_proj"], ["q_proj", "k_proj"])]
    if item.type in (bool, bool | None):
        return [(True, True), (False, False)]
    return [(24, 24)] if item.type is int or item.type == int | None else [(0.25, 0.25)]


def refused(path, *flags: str) -> str:
    with pytest.raises(ValueError, match=r"\w") as error:
        read_recipe(path, flags)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_people_know_is_ours_or_an_alias_or_answered(name, tmp_path):
    assert name in OURS or name in ALIASES or name in ANSWERS
    if name in ALIASES or name in OURS:
        return
    (tmp_path / "r.yaml").write_text(SMOKE.read_text(encoding="utf-8") + f"{name}: 1\n", encoding="utf-8")
    hyphens = name.replace("_", "-")
    for said in (
        refused(SMOKE, f"--{name}", "1"),
        refused(SMOKE, f"--{hyphens}=1"),
        refused(SMOKE, f"--{name}", "--max_steps=3"),
        refused(SMOKE, f"--{name}"),
        refused(tmp_path / "r.yaml"),
    ):
        assert said == f"{name} is not a recipe field: {ANSWERS[name]}."
    for section in ("optim", "data", "depth"):
        if (section, name) == ("data", "dataset"):  # a field, of other tasks
            continue
        assert f"{section}.{name} is not a recipe field: " in refused(SMOKE, f"--{section}.{name}=1")


def recipe_of(name: str, tmp_path) -> tuple:
    """A recipe in which an alias means something, and the flags that it needs for that."""
    field = ALIASES[name].field
    (tmp_path / "lora.yaml").write_text(to_yaml(LORA), encoding="utf-8")
    (tmp_path / "chat.yaml").write_text(to_yaml(LORA | {"init_from": None, "data": CHAT}), encoding="utf-8")
    path = {"data": TEXT, "train": tmp_path / "lora.yaml"}.get(field.split(".")[0], SMOKE)
    path = tmp_path / "chat.yaml" if name == "assistant_only_loss" else path
    needed = {"optim.lr": ["--optim.kind=adamw"], "train.what": []}
    return path, needed.get(field, ["--train.what=lora"] if field.startswith("train.") else [])


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_means_its_field_in_every_spelling(name, tmp_path):
    field = ALIASES[name].field
    path, needed = recipe_of(name, tmp_path)
    for written, value in theirs(name):
        text = to_yaml({name: written}).partition(": ")[2].strip() if not isinstance(written, list) else str(written)
        hyphens = name.replace("_", "-")
        for flags in ([f"--{name}", text], [f"--{name}={text}"], [f"--{hyphens}", text], [f"--{hyphens}={text}"]):
            assert value_of(read_recipe(path, [*needed, *flags]), field) == value
        values = without(parse_yaml(path.read_text(encoding="utf-8"), "here"), field)
        (tmp_path / "r.yaml").write_text(to_yaml(values | {name: written}), encoding="utf-8")
        assert value_of(read_recipe(tmp_path / "r.yaml", needed), field) == value
        assert value_of(read_recipe(tmp_path / "r.yaml", [*needed, f"--{field}={plain(value)}"]), field) == value
    if ALIASES[name].switch:
        assert value_of(read_recipe(path, [f"--{name}", *needed]), field) == theirs(name)[0][1]


def plain(value) -> str:
    return to_yaml({"x": value}).partition(":")[2].strip() if not isinstance(value, list) else str(value)


def without(values: dict, name: str) -> dict:
    """`values` less the field at a dotted name, so that an alias may stand for it; another one if it is needed."""
    section, _, leaf = name.rpartition(".")
    if not section:
        return {n: v for n, v in values.items() if n != leaf}
    kept = {n: v for n, v in values.get(section, {}).items() if n != leaf}
    return values | {section: kept}


@pytest.mark.parametrize("name", [name for name, alias in ALIASES.items() if alias.convert is same])
def test_a_wrong_value_is_told_under_the_name_that_was_written(name, tmp_path):
    path, needed = recipe_of(name, tmp_path)
    field = ALIASES[name].field
    for wrong in ("[[1]]", "wrong"):
        assert f"{name}, which is {field} here, " in refused(path, *needed, f"--{name}={wrong}")
        said = refused(path, *needed, f"--{field}={wrong}")
        assert field in said
        assert "which is" not in said


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_and_its_field_are_not_given_both(name, tmp_path):
    field, (written, value) = ALIASES[name].field, theirs(name)[0]
    one, two = f"--{name}={plain(written)}", f"--{field}={plain(value)}"
    said = {refused(SMOKE, one, two), refused(SMOKE, two, one)}
    assert all(f"--{name}" in each and f"--{field}" in each and "name the same field" in each for each in said)
    section, _, leaf = field.rpartition(".")
    if section and name != "optim":  # which cannot be both a section and a value
        assert "name the same field" in refused(SMOKE, f"--{section}={{{leaf}: {plain(value)}}}", one)
        values = {section: {leaf: 7}, name: written}
    else:
        values = {leaf: 7, name: written}
    if name != "optim":
        (tmp_path / "r.yaml").write_text(to_yaml(values), encoding="utf-8")
        assert f"{field} and {name} name the same field" in refused(tmp_path / "r.yaml")
    others = [other for other in ALIASES if other != name and ALIASES[other].field == field]
    for other in others:
        assert "name the same field" in refused(SMOKE, one, f"--{other}={plain(theirs(other)[0][0])}")


def test_a_rate_of_adamw_is_not_that_of_a_run_with_muon():
    said = refused(SMOKE, "--learning_rate=3e-4")
    assert "optim.lr" in said
    assert "optim.muon_lr" in said
    assert read_recipe(SMOKE, ["--learning_rate=3e-4", "--optim", "adamw_torch"]).optim.lr == 3e-4


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--report_to=all", "one by one"), ("--lr_scheduler_type=polynomial", "linear, cosine"),
        ("--optim=sgd", "adamw"), ("--bf16=maybe", "true, false"), ("--mixed_precision=fp8", "no, bf16"),
        ("--optim=[]", "adamw"),
    ],
)  # fmt: skip
def test_a_value_that_its_field_cannot_have_is_refused(flag, words):
    said = refused(SMOKE, flag)
    assert said.startswith(flag.partition("=")[0])
    assert words in said


def test_an_answer_names_what_there_is_and_nothing_that_deletes():
    places = {name for task in ("khop", "text") for name in field_names(Recipe, own_sections(task))}
    options = {option for verb in VERBS for action in arguments_of(verb) for option in action.option_strings}
    for name, answer in ANSWERS.items():
        for quoted in re.findall(r"`(.+?)`", answer):
            program, *words = quoted.split()
            if program == "looped":
                assert words[0] in VERBS, name
                assert {word for word in words if word.startswith("--")} <= options, name
            elif program != "accelerate":
                assert quoted in places, name
                assert quoted == "data.overrides" or quoted not in deleting(), name
        assert not re.search(rf"\b({'|'.join(deleting())})\b", answer), name
        assert not answer.endswith(".")
    assert not {alias.field for alias in ALIASES.values()} & deleting()
    assert all(alias.field in OURS and name not in OURS for name, alias in ALIASES.items())


def deleting() -> set[str]:
    return {name for name, item in OURS.items() if item.metadata.get("deletes")}


@settings(max_examples=40)
@given(st.data())
def test_no_suggestion_deletes(data):
    """Names within three strokes of `overwrite`, in any section."""
    [target] = deleting()
    letters = list(target)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(letters) - 1))
        new = data.draw(st.sampled_from(["", "x", "_dir", "_output", "s", "-"]))
        letters[place : place + data.draw(st.integers(0, 1))] = new
        letters = letters or ["o"]
    name = "".join(letters).strip("-") or "o"
    if name == target:
        return
    prefix = data.draw(st.sampled_from(["", "optim.", "data."]))
    said = refused(SMOKE, f"--{prefix}{name}", "true")
    assert not re.search(rf"mean {target}\b|--{target}\b|`{target}`", said), said


def test_a_switch_may_stand_alone_but_none_that_deletes():
    for name, item in OURS.items():
        if item.type is bool and not name.startswith("data.") and name not in deleting():
            assert value_of(read_recipe(SMOKE, [f"--{name}"]), name) is True
            assert value_of(read_recipe(SMOKE, [f"--{name}", "--seed=3"]), name) is True
            assert value_of(read_recipe(SMOKE, [f"--{name}", "false"]), name) is False
    for name in deleting():
        assert f"cannot read the argument '--{name}'" in refused(SMOKE, f"--{name}")
    assert "cannot read the argument '--max_steps'" in refused(SMOKE, "--max_steps", "--seed=3")


def test_a_field_of_the_model_is_found():
    assert "did you mean model.hidden_size?" in refused(SMOKE, "--hidden_size=64")
    assert "`looped train --help`" in refused(SMOKE, "--zzzz=64")
    with pytest.raises(ValueError, match="not a recipe field"):
        study.build({"learning_rate": 1}, study.FrozenRecipe)


@pytest.mark.parametrize("line", [["--per_device_train_batch_size", "8"], ["--fp16"], ["--learning_rate=1e-3"]])
def test_the_command_says_so_in_one_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "smoke", *line]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"looped train: {line[0].removeprefix('--').partition('=')[0]} is not ")
    assert list(tmp_path.iterdir()) == []
