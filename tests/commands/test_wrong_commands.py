"""Whatever is wrong with a command line is one sentence on stderr and exit status 2, and no file changes.

Most cases are made from the parser: an option or a command that is new has them, too.
"""

import argparse
import json
import shutil
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from command_lines import READ, VERBS, arguments_of, command, readable
from forks import Fork
from looplab import cli, mistakes
from looplab.cli import Whole, main
from looplab.mistakes import Real, run_command
from looplab.shipped import recipe_files
from toy_runs import edit_json
from toys import ROOT


def all_files(folder: Path) -> dict[str, tuple]:
    """What lies below `folder`, so that any change shows; caches of `datasets` may grow."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "cache" not in path.relative_to(folder).parts:
            stat = path.lstat()
            found[str(path)] = (stat.st_size, stat.st_mtime_ns) if path.is_file() else ()
    return found


def test_no_option_is_abbreviated():
    """`--loop 3` was taken for `--loops 3`, and would mean another option once there is a --loop."""
    parser = cli.parser()
    for verb, of_verb in VERBS.items():
        options = of_verb._option_string_actions
        for short in {option[:-1] for option in options if len(option) > 4} - options.keys():
            assert short in parser.parse_known_args([*command(verb), short])[1], (verb, short)


@pytest.fixture
def refused(toy_runs, tmp_path, monkeypatch, capfd):
    """refused(line, *words): run a wrong command line, and hold it to the law; `words` must be in the sentence."""
    new = tmp_path / "new"
    new.mkdir()
    monkeypatch.chdir(new)  # a verb that writes somewhere of its own accord would do it here

    def check(line: list[str], *words: str) -> str:
        before = all_files(toy_runs), all_files(tmp_path)
        places = {"runs": toy_runs, "new": new, "tmp": tmp_path}
        try:
            status = main([argument.format(**places) for argument in line])
        except SystemExit as end:
            status = end.code
        said = [text for text in capfd.readouterr().err.splitlines() if text.strip()]
        assert status == 2, said
        assert len(said) == 1, said
        assert said[0].startswith("looped")
        for word in words:
            assert word.format(**places) in said[0]
        assert (all_files(toy_runs), all_files(tmp_path)) == before
        return said[0]

    return check


NUMBERS = ("-1", "0", "nan", "inf", "1e9", "1000000000", "9" * 30, "x", "", "1.5", "0x10")


def wrong_numbers():
    for verb in VERBS:
        for action in arguments_of(verb):
            if isinstance(action.type, Whole):
                for value in NUMBERS:
                    try:
                        action.type(value)
                    except argparse.ArgumentTypeError:
                        line = command(verb, action, value)
                        yield pytest.param(line, action.option_strings[0], value, id=readable(line))


@pytest.mark.parametrize(("line", "option", "value"), list(wrong_numbers()))
def test_a_number_out_of_range(refused, line, option, value):
    refused(line, f"argument {option}: must be", repr(value))


def test_every_number_says_its_range():
    """Where it is declared; what is no number is a name, a choice or a text."""
    for verb in VERBS:
        for action in arguments_of(verb):
            known = action.type in (None, str, cli.named, cli.fields) or isinstance(action.type, Whole | Real)
            assert known, f"{verb} {action.dest}"


def wrong_paths():
    for verb in VERBS:
        for action in arguments_of(verb):
            if action.metavar in READ:
                for value in ("{new}/nowhere", "{tmp}/file", "{tmp}/folder", "", " "):
                    line = command(verb, action, value)
                    yield pytest.param(line, value, action, id=readable(line))


@pytest.mark.parametrize(("line", "value", "action"), list(wrong_paths()))
def test_a_path_that_is_not_what_is_asked_for(refused, tmp_path, line, value, action):
    (tmp_path / "file").write_bytes(b"\x00\xff no text")
    (tmp_path / "folder").mkdir()
    refused(line, value if value.strip() else f"{'/'.join(action.option_strings) or action.metavar}: must be a name")


@pytest.mark.parametrize("verb", VERBS)
def test_an_argument_that_lacks_or_is_unknown(refused, verb):
    needed = [action for action in arguments_of(verb) if action.required and action.nargs != argparse.REMAINDER]
    for action in needed:
        refused([verb], "required", "/".join(action.option_strings) or action.metavar or action.dest)
    if needed and verb not in ("train", "plan"):  # whose other arguments are the fields of a recipe
        refused([*command(verb), "--colour", "blue"], f"looped {verb}: unknown argument '--colour'")


def test_a_recipe_or_a_field_that_there_is_not(refused):
    refused(["train", "smoke", "--optim.learning", "3"], "looped train: optim.learning is not a recipe field")
    refused(["train", "quikstart"], "no recipe quikstart", "did you mean quickstart?")
    refused(["train", "zzz"], "no recipe zzz", "`looped recipes`")
    refused(["train", "recipes/zzz.yaml"], "recipes/zzz.yaml cannot be read")


@pytest.mark.parametrize("name", recipe_files())
def test_a_recipe_of_another_command(refused, name):
    """By its name and by its file; the message says what it is."""
    verb, other = ("train", "frozen") if name.startswith("frozen/") else ("frozen", "train")
    for spelt in (name, str(recipe_files()[name])):
        refused([verb, spelt], f"a recipe of `looped {other}`", f"a recipe of `looped {verb}` is expected")


@pytest.mark.parametrize("verb", ["train", "frozen"])
def test_something_else_than_a_recipe(refused, toy_runs, tmp_path, verb):
    (tmp_path / "folder").mkdir()
    (tmp_path / "list.yaml").write_text("[1, 2]", encoding="utf-8")
    (tmp_path / "empty.yaml").write_text("# nothing", encoding="utf-8")
    if verb == "frozen":  # `looped train RUN` goes on with the run
        refused([verb, "{runs}/hops"], "{runs}/hops", "a recipe of `looped frozen` is expected")
    refused([verb, "{tmp}/folder"], "{tmp}/folder is a folder", "`looped recipes`")
    refused([verb, "{runs}/hops/model"], "{runs}/hops/model is a folder")
    refused([verb, "{runs}/hops/model/config.json"], "is the configuration of a model")
    refused([verb, str(ROOT / "recipes" / "accelerate" / "ddp.yaml")], "a configuration of `accelerate launch")
    refused([verb, "{runs}/hops/model/model.safetensors"], "model.safetensors cannot be read as text")
    for name in ("list", "empty"):
        refused([verb, f"{{tmp}}/{name}.yaml"], f"{name}.yaml is not a recipe")


def test_a_command_that_there_is_not(refused):
    refused(["evaluate", "{runs}/hops"], "evaluate", "'eval'")
    refused([], "COMMAND")
    assert "did you mean --loops?" in refused(["eval", "{runs}/hops", "--lops", "3"])


# What may be wrong in a model's folder.


def put(file, **fields):
    return lambda folder: edit_json(folder / file, **fields)


def write(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def cut(file, size):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
DAMAGES = {
    **{
        f"config.json is {text!r}": write(CONFIG, text) for text in (b"", b"[]", b"null", b"{}", b"3", b'{"a', b"\xff")
    },
    **{
        f"{name} is {value!r}": put(CONFIG, **{name: value})
        for name, values in {
            "num_loops": ("3", 0, -1, None, [2], 2.5),
            "num_core_layers": (3, "x", 0, 1e9),
            "hidden_size": (48, -32, "32", 0),
            "vocab_size": (7, "x", None),
            "num_attention_heads": (0, 5, "x"),
            "intermediate_size": (20, None),
            "kv_sharing": ("lasst", 3),
            "hidden_act": ("sillu", 3),
            "rope_parameters": ("x",),
            "model_type": ("looopd", 3, None),
            "head_dim": (-2, "x"),
            "no_such_field": (1,),
            "quantization_config": (3,),
            "dtype": ("float33",),
        }.items()
        for value in values
    },
    **{f"weights of {size} bytes": cut(WEIGHTS, size) for size in (0, 4, 100, 1000, -100)},
    "weights of text": write(WEIGHTS, b"not weights at all"),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no config.json": lambda folder: (folder / CONFIG).unlink(),
    **{f"tokenizer.json is {text!r}": write(TOKENIZER, text) for text in (b"", b"{}", b"null", b"[", b"\xff")},
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "tokenizer_config.json is cut": cut("tokenizer_config.json", 20),
    "generation_config.json is cut": cut("generation_config.json", 20),
}
# The commands that load the model of a run, and what else each is told so that it is quick.
LOADERS = {
    "ask": ["hops"],
    "eval": ["text", "--limit", "1"],
    "halting": ["hops", "--limit", "1", "--max-loops", "1"],
    "memory": ["text", "--limit", "1"],
    "lens": ["hops", "--no-probes", "--limit", "1"],
    "quantize": ["text", "--calibration-rows", "1"],
}


def damaged_models():
    """Every damage meets two of the commands, in turn."""
    verbs = list(LOADERS)
    for number, damage in enumerate(DAMAGES):
        for verb in (verbs[number % len(verbs)], verbs[(number + 1 + number // len(verbs)) % len(verbs)]):
            yield pytest.param(verb, damage, id=f"{verb}, {damage}")


@pytest.mark.parametrize(("verb", "damage"), list(damaged_models()))
def test_a_damaged_model_is_named(refused, toy_runs, tmp_path, verb, damage):
    task, *options = LOADERS[verb]
    run = Path(shutil.copytree(toy_runs / task, tmp_path / "run"))
    DAMAGES[damage](run / "model")
    refused([verb, "{tmp}/run", *options], "{tmp}/run")


# Fields that a Llama does not have, and files that it can do without.
SPARED = ("num_core_layers", "num_loops", "num_lay", "kv_sharing", "no_such", "generation", "head_dim", "no tokenizer")


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if not damage.startswith(SPARED)])
def test_a_damaged_source_is_not_converted(refused, toy_runs, tmp_path, damage):
    shutil.copytree(toy_runs / "llama", tmp_path / "source")
    DAMAGES[damage](tmp_path / "source")
    refused(["convert", "{tmp}/source", "{new}/looped"])


@pytest.mark.parametrize("verb", ["harness", "serve"])
@pytest.mark.parametrize("damage", list(DAMAGES)[::7])
def test_a_damaged_folder_is_neither_scored_nor_served(refused, toy_runs, tmp_path, verb, damage):
    shutil.copytree(toy_runs / "hops" / "model", tmp_path / "model")
    DAMAGES[damage](tmp_path / "model")
    refused([verb, "{tmp}/model", *(["--task", "arc_easy"] if verb == "harness" else [])], "{tmp}/model")


# (command line, words of the sentence)
HOPS, TEXT, MOLECULES = ("{runs}/hops", "{runs}/text", "{runs}/molecules")
WRONG = [
    # options of another task
    *((["eval", run, "--masked", "3"], "eval --masked is not for") for run in (HOPS, TEXT)),
    *((["eval", run, "--max-hops", "3"], "--max-hops") for run in (TEXT, MOLECULES)),
    *((["eval", run, "--max-loops", "3"], "--max-loops") for run in (TEXT, MOLECULES)),
    *((["halting", run, "--max-hops", "3"], "--max-hops") for run in (TEXT, MOLECULES)),
    *((["lens", MOLECULES, option, value], option) for option, value in (("--snapshot", "all"), ("--hops", "2"))),
    (["table", HOPS, "--against", "x"], "--against"),
    # runs of another task
    *((["ask", run, "--loops", "5"], "max_num_loops=4") for run in (TEXT,)),
    (["ask", HOPS, "--temperature", "1"], "--temperature is not for khop"),
    (["lens", TEXT, "--no-probes"], "--no-probes is not for text"),
    (["lens", HOPS, "--text", "a"], "--text is not for khop"),
    (["lens", TEXT, "--loops", "5"], "max_num_loops=4"),
    (["memory", MOLECULES], "{runs}/molecules is a run on molecules"),
    (["demo", TEXT, TEXT], "{runs}/text is a second run"),
    (["demo", HOPS, HOPS], "{runs}/hops is a second run"),
    *(([verb, HOPS, TEXT], "read them apart") for verb in ("plot", "table")),
    # values that the run decides about
    (["eval", TEXT, "--loops", "5"], "5"),
    (["memory", TEXT, "--loops", "5"], "5"),
    (["quantize", TEXT, "--loops", "5"], "5"),
    (["quantize", TEXT, "--calibration-rows", "100000"], "100000"),
    (["eval", HOPS, "--max-hops", "1"], "max_hops"),
    (["lens", HOPS, "--hops", "40"], "40"),
    (["lens", HOPS, "--snapshot", "step-7"], "step-7"),
    (["lens", HOPS, "--snapshot", "../model"], "../model"),
    (["ask", HOPS, ""], "the question is empty"),
    (["ask", HOPS, "  "], "the question is empty"),
    (["ask", HOPS, "e1 r99"], "r99"),
    *(
        ([verb, name], f"{name} is a recipe, not a run: train it by `looped train {name}`")
        for verb in ("ask", "eval", "plot", "table", "lens", "memory", "quantize", "halting", "demo", "serve")
        for name in ("smoke", "molecules/smoke_molecules", "recipes/smoke.yaml")
    ),
    (["ask", HOPS, "where is e1?"], "where"),
    (["table", TEXT, "--against", "none"], "none"),
    (["plot", MOLECULES, "--output", "{runs}/study.yaml"], "{runs}/study.yaml"),
    (["bench", "--quick", "--output", "{runs}/study.yaml"], "{runs}/study.yaml"),
    (["bench", "--contexts", "1000000000"], "--contexts 1000000000"),
    (["bench", "--widths", "65536"], "--widths 65536"),
    (["bench", "--widths", "100"], "'100'"),
    # models
    (["convert", "{runs}/llama", "{runs}/hops"], "{runs}/hops exists"),
    (["convert", "{runs}/llama", "{runs}/study.yaml"], "{runs}/study.yaml"),
    (["convert", "{runs}/llama", "{new}/x", "--core", "3", "9"], "(3, 9)"),
    (["convert", "{runs}/llama", "{new}/x", "--core", "4", "2"], "(4, 2)"),
    (["convert", "{runs}/llama", "{new}/x", "--core", "4"], "--core"),
    (["convert", "{runs}/llama", "{new}/x", "--gguf-file", "none.gguf"], "none.gguf"),
    (["convert", "{runs}/hops/model", "{new}/x"], "looped"),
    (["export", "{runs}/hops", "--to", "onnx"], "'onnx'"),
    (["export", "{runs}/hops", "--to", "gguf", "--quantize", "q5_k"], "'q5_k'"),
    (["export", "{runs}/hops", "--to", "transformers", "--quantize", "q8_0"], "--quantize q8_0"),
    (["export", "{runs}/hops", "--to", "gguf", "--loops", "600"], "--loops 600"),
    (["export", "{runs}/hops", "--to", "gguf", "--output", "{runs}/study.yaml"], "{runs}/study.yaml exists"),
    (["export", "{runs}/hops", "--to", "mlx", "--output", "{runs}/text"], "{runs}/text exists"),
    (["export", "{runs}/llama", "--to", "gguf"], "{runs}/llama holds a LlamaForCausalLM"),
    (["harness", "{runs}/hops/model", "--task", "none"], "'none'"),
    (["harness", "{runs}/hops/model", "--task", "arc_easy", "--split", "train"], "'train'"),
    (["harness", "{runs}/hops/model", "--task", "arc_easy", "--output", "{runs}/hops"], "{runs}/hops is not a file"),
    (["fetch", "everything"], "everything"),
    (["fetch", "moses", "--output", "{runs}/hops"], "{runs}/hops holds something else"),
    (["fetch", "corpus", "--output", "{runs}/hops"], "{runs}/hops holds something else"),
    (["frozen", "{runs}/hops/recipe.yaml"], "{runs}/hops/recipe.yaml"),
    (["frozen", "{runs}/study.yaml", "--stages", "confirm"], "sweep"),
    (["frozen", "{runs}/study.yaml", "--stages", "all"], "'all'"),
    (["quantize", TEXT, "--method", "best"], "'best'"),
    # publishing
    *((["publish", HOPS, "--repo-id", name, "--dry-run"], name) for name in ("x", "a/b/c", "user/na me", "/")),
    (["publish", HOPS, "--repo-id", "u/x", "--base-model", "u/y", "--dry-run"], "--base-model"),
    (["publish", TEXT, "--repo-id", "u/x", "--dataset", "--dry-run"], "--dataset-license"),
    (["publish", MOLECULES, "--repo-id", "u/x", "--dry-run"], "looped eval"),
]


@pytest.mark.parametrize(("line", "words"), [pytest.param(*case, id=readable(case[0])) for case in WRONG])
def test_what_a_command_cannot_do(refused, line, words):
    refused(line, words)


# The sentence itself.


class OfTheDisk(OSError):
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a must be 1,\n  got 2."), "a must be 1, got 2."),
        (FileNotFoundError(2, "No such file or directory", "x/y"), "x/y: No such file or directory"),
        (OfTheDisk("the disk is full"), "the disk is full"),
        (json.JSONDecodeError("Expecting value", "", 0), "Expecting value: line 1 column 1 (char 0)"),
        (FloatingPointError("loss is nan"), "loss is nan"),
        (ModuleNotFoundError("No module named 'rdkit'"), "a package is missing (No module named 'rdkit')."),
        (MemoryError(), "there is not enough memory for this: ask for less at once."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 byte"), "there is not enough memory for this"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_mistake_is_one_line_and_its_traceback_on_demand(capsys, error, said):
    def fail():
        raise error

    assert run_command("looped eval", fail) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"looped eval: {said}")
    assert run_command("looped eval", fail, debug=True) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("Traceback (most recent call last):", line)


def test_fields_of_configurations_are_named(capsys):
    from modeling_looped import LoopedConfig

    for fields, said in (
        ({"num_loops": -1}, "x: num_loops must be an integer >= 1, got -1"),
        ({"num_loops": "3"}, "x: Field 'num_loops' expected int, got str (value: '3')"),
        ({"prefill_chunk": -1}, "x: prefill_chunk must be an integer >= 1 or None, got -1."),
    ):
        assert run_command("x", lambda fields=fields: LoopedConfig(**fields)) == 2
        assert capsys.readouterr().err == said + "\n"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_who_stops_a_command_is_told_nothing(capfd, error, status):
    def stop():
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.dup2", lambda *_: None)  # pytest still needs its stdout
        assert run_command("x", stop) == status
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [KeyError("loops"), TypeError("x"), AssertionError(), RuntimeError("shapes")])
def test_a_fault_of_ours_stays_a_traceback(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        run_command("x", fail)


def test_of_several_processes_the_first_speaks_first(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr(mistakes.time, "sleep", waited.append)

    def fail(error):
        raise error

    assert [run_command("x", lambda: fail(ValueError("no")), rank=rank) for rank in range(3)] == [2, 2, 2]
    assert capsys.readouterr().err == "x: no\nx, process 1: no\nx, process 2: no\n"
    assert len(waited) == 2  # a launcher kills the others when one ends, before they speak
    assert run_command("x", lambda: fail(OSError("my disk is full")), rank=1) == 2
    assert capsys.readouterr().err == "x: my disk is full\n"


@pytest.mark.parametrize(
    "line", [["--debug", "ask", "{}/none"], ["ask", "--debug", "{}/none"], ["ask", "{}/none", "--debug"]]
)
def test_debug_may_stand_anywhere(toy_runs, capsys, line):
    assert main([argument.format(toy_runs) for argument in line]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_train_says_a_sentence_once(tmp_path):
    """As `looped` does, with --debug its traceback; the second process on a machine leaves it to the first."""
    arguments = [str(ROOT / "recipes" / "smoke.yaml"), "--lr=3", "--curriculum.check_every=5"]
    arguments += [f"--output_dir={tmp_path / 'runs'}"]
    forks = [
        Fork(ROOT / "train.py", *arguments, *more, log=tmp_path / f"{number}.log", LOCAL_RANK=rank)
        for number, (more, rank) in enumerate([([], "0"), ([], "1"), (["--debug"], "0")])
    ]
    assert [fork.status() for fork in forks] == [2, 2, 2]
    once, nothing, debugged = (fork.printed() for fork in forks)
    # Libraries that are installed may say something of their own when they are imported.
    assert [said.count("train.py: lr is not a recipe field; did you mean optim.lr?") for said in (once, debugged)] == [
        1,
        1,
    ]
    assert [said.count("curriculum.check_every is now check_every") for said in (once, nothing)] == [1, 0]
    assert "train.py:" not in nothing
    assert ["Traceback" in said for said in (once, nothing, debugged)] == [False, False, True]
    assert not (tmp_path / "runs").exists()


# Packages that come with an extra


def extras() -> dict[str, set[str]]:
    """Module -> the extras of the project that install it."""
    needs = [Requirement(need) for need in metadata.requires("looped-transformers")]
    found = {}
    for need in (need for need in needs if need.marker):
        for extra in ("plots", "eval", "molecules", "serve", "export", "demo"):
            if need.marker.evaluate({"extra": extra}):
                found.setdefault(need.name.replace("-", "_"), set()).add(extra)
    return found


@pytest.mark.parametrize("module", extras())
def test_a_package_of_an_extra_that_is_missing_names_the_extra(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ImportError) as error:
        import_module(module)
    commands = tuple(f"pip install 'looped-transformers[{extra}]'." for extra in extras()[module])
    assert mistakes.sentence(error.value).endswith(commands)


def test_another_package_that_is_missing_is_named():
    with pytest.raises(ImportError) as error:
        import_module("no_such_package_of_ours")
    assert mistakes.sentence(error.value) == "a package is missing (No module named 'no_such_package_of_ours')."
