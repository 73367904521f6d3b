"""Every number of a recipe has a range, every path a home, and a recipe that cannot be run is refused by the name of
the field."""

import copy
import re
from dataclasses import fields, is_dataclass
from typing import get_args

import datasets
import pytest

from data_builders import (
    CompositionConfig,
    DepthSampler,
    KhopConfig,
    MoleculesConfig,
    MultipleChoiceConfig,
    TextConfig,
)
from data_builders.fields import Range
from looplab.cli import parser
from looplab.pretrained import study as frozen
from looplab.runs.sections import build, defaults, field_names
from looplab.runs.yaml_text import to_yaml
from looplab.tasks.registry import TASKS
from looplab.training.recipe import Recipe, build_recipe, own_sections, read_recipe, recipe_defaults
from toys import ROOT

HOPS = {
    "name": "run",
    "model": {},
    "max_steps": 3,
    "depth": {"kind": "fixed", "mean": 2},
}
TEXT = HOPS | {"data": {"task": "text", "files": ["a.txt"], "sequence_length": 8, "vocab_size": 300}}
MOLECULES = HOPS | {"data": {"task": "molecules", "files": ["a.smi"], "sequence_length": 8}}
STUDY = {
    "name": "s",
    "model": "smollm2",
    "sweep": {"piqa": 2, "text": 2},
    "confirm": {"piqa": 2},
    "grid": [{"num_loops": 2}],
}
JUNK = [
    float("nan"), float("inf"), -float("inf"), -1, -1e-9, 0, 0.5, 1, 1.5, 1e308, 2**31, 2**63, 10**30, 10**400, True,
    "3", "", [], [0], [1, 1], [float("nan")], {}, None,
]  # fmt: skip


def leaves(section: type, prefix: str = "") -> dict:
    """Dotted name -> field; of a recipe, those of all tasks."""
    kinds = [(item, [item.type]) for item in fields(section)]
    if section is Recipe:
        kinds = [(i, [own_sections(task).get(i.name, i.type) for task in TASKS]) for i in fields(section)]
    found = {}
    for item, types in kinds:
        for kind in types:
            found |= leaves(kind, f"{prefix}{item.name}.") if is_dataclass(kind) else {prefix + item.name: item}
    return found


def types_of(annotation) -> set:
    """The plain types in an annotation: of `list[int] | None` list[int], int and NoneType."""
    return {annotation, *(inner for part in get_args(annotation) for inner in types_of(part))}


def is_number(item) -> bool:
    return bool({int, float} & types_of(item.type))


def is_path(name: str) -> bool:
    return name.split(".")[-1] in ("output_dir", "init_from", "files", "tokenizer", "teacher", "benchmarks", "tokens")


FORMS = [Recipe, frozen.FrozenRecipe, frozen.LoopSetting]
BUILDERS = [KhopConfig, CompositionConfig, TextConfig, MoleculesConfig, MultipleChoiceConfig]


def put(values: dict, name: str, value) -> dict:
    values = copy.deepcopy(values)
    *sections, leaf = name.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[leaf] = value
    return values


def refusal(call, *args, **kwargs) -> str | None:
    """What a ValueError says, or None."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("form", [*FORMS, *BUILDERS], ids=lambda form: form.__name__)
def test_a_number_without_a_range_cannot_be_added(form):
    inherited = {item.name for item in fields(datasets.BuilderConfig)} if form in BUILDERS else set()
    for name, item in leaves(form).items():
        if name.split(".")[0] in inherited:
            continue
        if is_number(item):
            assert isinstance(item.metadata.get("range"), Range), name
        assert bool(item.metadata.get("path")) == (is_path(name) and form not in BUILDERS) or name == "model", name


@pytest.mark.parametrize("name", [name for name, item in leaves(Recipe).items() if is_number(item)])
def test_junk_in_a_number_of_a_recipe_is_refused_by_name(name):
    """Or makes a recipe; what is accepted lies in the range that the field declares."""
    refused = 0
    for base in (HOPS, TEXT, MOLECULES):
        for value in JUNK:
            said = refusal(build_recipe, put(base, name, value))
            if said is not None:
                refused += 1
                section, _, leaf = name.rpartition(".")
                assert leaf in said
                assert section in said
                assert "\n" not in said
    assert refused >= 3 * 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim.clip", 0), ("optim.clip", -1), ("curriculum.threshold", 95), ("curriculum.threshold", 1),
        ("curriculum.threshold", -0.1), ("curriculum.min_steps", -1), ("optim.warmup_steps", -5),
        ("max_seconds", float("nan")), ("max_seconds", 0), ("eval_loops", [4, 4]), ("snapshots", [4, 4]),
        ("eval_loops", [0]), ("optim.lr", -1), ("optim.lr", float("inf")), ("optim.betas", [0.9, 1]),
        ("optim.betas", [0.9]), ("optim.betas", [0.9, True]), ("optim.weight_decay", -0.1), ("seed", -1),
        ("seed", 2**32), ("data.seed", -1), ("optim.final_share", 1), ("distill.alignment", -1), ("gate_loops", 0),
        ("num_grad_loops", 0), ("depth.mean", 0), ("depth.mean", 10**9), ("depth.mean", float("nan")),
        ("curriculum.start_hops", 0), ("batch_size", 10**30), ("data.pad_to", 0),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=name.replace(".", r"[.:] ?")):
        build_recipe(put(HOPS, name, value))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("depth", {"kind": "poisson", "rate": 3, "minimum": 5, "maximum": 2}, "depth: .*minimum <= maximum"),
        ("depth", {"kind": "uniform", "minimum": 1}, "depth: depth uniform takes minimum, maximum; maximum is None"),
        ("depth", {"kind": "fixed", "mean": 2, "sigma": 1}, "depth: .*sigma is 1"),
        ("depth", {"kind": "fixed", "mean": 2.5}, "depth: mean: loops must be whole numbers"),
        ("depth", {"kind": "poisson", "mean": 9, "minimum": 1, "maximum": 8}, "depth: mean 9 must lie between"),
        ("curriculum", {"start_hops": 3, "stop_hops": 2}, r"curriculum\.start_hops 3 must not be above"),
        ("data", {"seed": 3, "overrides": {"seed": 4}}, r"data\.seed and data\.overrides\.seed name the same thing"),
        ("max_steps", None, "no budget"),
        ("model", {"hiden_size": 8}, "model: .*hidden_size"),
        ("model", {"num_loops": 0}, "model: .*num_loops"),
        ("model", {"num_loops": "3"}, "model: .*num_loops"),
        ("model", {"hidden_size": 10, "num_attention_heads": 3}, "model: .*num_attention_heads"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        build_recipe(put(HOPS, name, value))


def test_a_warm_up_may_be_longer_than_the_run():
    assert build_recipe(put(HOPS, "optim.warmup_steps", 100)).optim.warmup_steps == 100


@pytest.mark.parametrize("name", [name for name, item in leaves(Recipe).items() if item.metadata.get("path")])
def test_a_path_may_begin_at_home(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    many = "list" in str(leaves(Recipe)[name].type)
    base = TEXT if name.startswith("data") else HOPS
    if name in ("data.tokenizer", "data.tokens"):
        base = put(base, "data.vocab_size", None)
    if name == "data.tokens":
        base = put(base, "data.files", None)

    def read(path: str) -> str:
        value = build_recipe(put(base, name, [path] if many else path))
        for part in name.split("."):
            value = getattr(value, part)
        return value[0] if many else value

    assert read("~/x/y") == str(tmp_path / "x" / "y")
    assert read("x/~y") == "x/~y"
    for path, message in (("~nobody_here/x", "nobody"), ("", "must name"), ("a\0b", "must name")):
        with pytest.raises(ValueError, match=rf"{re.escape(name)}.*{message}"):
            read(path)


def test_a_flag_is_read_as_the_file_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    smoke = ROOT / "recipes" / "smoke.yaml"
    assert read_recipe(smoke, ["--output_dir=~/runs"]).output_dir == str(tmp_path / "runs")
    assert read_recipe(smoke, ["--max_steps", "010"]).max_steps == 10
    (tmp_path / "r.yaml").write_bytes(smoke.read_bytes())
    assert read_recipe("~/r.yaml").name == "smoke"
    for flag, message in {
        "--max_steps=1:30": r"max_steps has a wrong type.*'1:30'",
        "--overwrite=yes": r"overwrite has a wrong type.*'yes'",
        "--optim={lr: 1, lr: 2}": r"the argument --optim, line 1, .*lr comes twice",
        "--optim.betas=[*a, *a]": r"the argument --optim\.betas, line 1, .*alias",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_recipe(smoke, [flag])


@pytest.mark.parametrize(
    "command", ["eval ~/x", "bench --output=~/x", "convert ~/x ~/y", "plot ~/x ~/y", "frozen ~/x"]
)
def test_a_folder_of_a_command_may_begin_at_home(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = vars(parser().parse_args(command.split())).values()
    found = [each for value in values for each in (value if isinstance(value, list) else [value])]
    assert str(tmp_path / "x") in found
    assert not [each for each in found if str(each).startswith("~")]
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(command.replace("~", "~nobody_here").split())
    assert "~nobody_here/x" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["", "optim", "depth", "model", "data", "data.overrides"])
def test_a_field_or_a_section_named_twice_is_refused(section, tmp_path):
    lines = (ROOT / "recipes" / "smoke.yaml").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    if section:
        lines += (
            [f"{section.split('.')[0]}: {{}}"] if section != "data.overrides" else ["data: {overrides: {a: 1, a: 2}}"]
        )
    else:
        lines += ["name: other"]
    (tmp_path / "r.yaml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"r\.yaml, line \d+, column \d+: \S+ comes twice"):
        read_recipe(tmp_path / "r.yaml")


# Sections of a task's own


BASES = {"khop": HOPS, "composition": put(HOPS, "data.task", "composition"), "text": TEXT, "molecules": MOLECULES}
BASES["sequence"] = put(TEXT, "data", {"task": "sequence", "files": ["a.jsonl"]})
FOREIGN = [
    (task, name)
    for task in TASKS
    for name in recipe_defaults(task)
    if name.split(".")[0] in own_sections(task) and name not in defaults(Recipe, own_sections(task))
]


@pytest.mark.parametrize(("task", "name"), FOREIGN)
def test_a_field_of_another_task_is_refused_and_its_default_passed_over(task, name):
    """Older versions wrote the fields of all tasks into every recipe.yaml."""
    base, (section, _, leaf) = BASES[task], name.partition(".")
    assert build_recipe(put(base, name, recipe_defaults(task)[name])) == build_recipe(base)
    owners = [other for other in TASKS if name in defaults(Recipe, own_sections(other))]
    with pytest.raises(
        ValueError, match=rf"{section}\.{leaf} is not for the task {task}: .*{' and '.join(owners)} have"
    ):
        build_recipe(put(base, name, "other"))


@pytest.mark.parametrize("task", ["tex", "hops", "", None, 3, [], {"task": "text"}])
def test_a_task_that_does_not_exist_is_refused(task):
    with pytest.raises(
        ValueError, match=r"data\.task must be one of khop, composition, text, molecules, sequence, got .*mean \w+"
    ):
        build_recipe(put(HOPS, "data.task", task))


def test_check_every_may_still_be_in_the_curriculum(tmp_path, caplog):
    """In a file, in a flag and in a section that is a flag, over a recipe of either form; it is said once."""
    for place in ("check_every", "curriculum.check_every"):
        (tmp_path / "r.yaml").write_text(to_yaml(put(HOPS, place, 7)), encoding="utf-8")
        for flags, value in (
            ([], 7), (["--check_every=8"], 8), (["--curriculum.check_every", "8"], 8),
            (["--curriculum={check_every: 8, min_steps: 2}"], 8), (["--curriculum={min_steps: 2}"], 7),
        ):  # fmt: skip
            caplog.clear()
            recipe = read_recipe(tmp_path / "r.yaml", flags)
            assert recipe.check_every == value
            assert recipe.curriculum.min_steps == (2 if "min_steps" in str(flags) else 0)
            old = "curriculum" in place or "check_every: 8" in str(flags) or "curriculum.check" in str(flags)
            assert caplog.text.count("curriculum.check_every is now check_every") == old
    (tmp_path / "r.yaml").write_text(to_yaml(put(put(HOPS, place, 7), "check_every", 7)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"check_every and curriculum\.check_every name the same thing"):
        read_recipe(tmp_path / "r.yaml")


# Depths


@pytest.mark.parametrize("kind", ["fixed", "uniform", "poisson", "lognormal_poisson"])
@pytest.mark.parametrize("name", ["rate", "mean", "minimum", "maximum", "sigma", "seed"])
def test_a_depth_is_drawn_or_refused(kind, name):
    """Whatever a field holds, the distribution is one, or the error names the field or the pair that is wrong."""
    given = {"fixed": {"mean": 3}, "uniform": {"minimum": 1, "maximum": 4}}
    given |= {"poisson": {"rate": 3, "minimum": 1, "maximum": 4}}
    given["lognormal_poisson"] = given["poisson"] | {"sigma": 0.5}
    for value in JUNK:
        fields = given[kind] | {name: value}
        said = refusal(DepthSampler, kind, **fields)
        if said is not None:
            assert re.search(rf"{name}|loops must be whole", said), value
        else:
            sampler = DepthSampler(kind, **fields)
            assert sampler.probabilities.sum() == pytest.approx(1)
            assert sampler.depths[0] <= sampler(0) <= sampler.depths[-1] <= 10_000


# Studies of frozen models


@pytest.mark.parametrize("name", [name for name, item in leaves(frozen.FrozenRecipe).items() if is_number(item)])
def test_junk_in_a_number_of_a_study_is_refused_by_name(name):
    for value in [*JUNK, {"piqa": 0}, {"piqa": True}]:
        said = refusal(build, put(STUDY, name, value), frozen.FrozenRecipe)
        assert said is None or name.split(".")[-1] in said, value


@pytest.mark.parametrize("name", [name for name, item in leaves(frozen.LoopSetting).items() if is_number(item)])
def test_junk_in_a_setting_is_refused_before_any_work(name):
    for value in JUNK:
        said = refusal(frozen.make_setting, {"num_loops": 2, "horizon": 2, name: value})
        assert said is None or "is not a setting" in said
        assert said or name in ("beta", "window") or value not in (0, -1, "3")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cost": {"loop": [2]}}, r"cost\.loop is not a recipe field; did you mean cost\.loops"),
        ({"cost": {"rounds": 0}}, r"cost\.rounds must be >= 1"),
        ({"sweep": {"piqa": 0}}, r"sweep\.piqa must be >= 1"),
        ({"grid": [{"num_loops": []}]}, r"block without a setting"),
        ({"grid": [{}]}, r"block without a setting"),
        ({"name": "../x"}, r"name must be a plain folder name"),
        ({"confirm": {"quiz": 2}}, r"quiz is no task of a study: sweep and confirm take text, arc_challenge"),
        ({"output_dir": "~nobody_here/x"}, r"output_dir.*nobody"),
    ],
)
def test_a_study_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build(STUDY | fields, frozen.FrozenRecipe)


def test_names_of_fields_are_those_of_leaves_and_sections():
    assert set(leaves(Recipe)) < {name for task in TASKS for name in field_names(Recipe, own_sections(task))}
    assert set(leaves(frozen.FrozenRecipe)) < set(field_names(frozen.FrozenRecipe))
