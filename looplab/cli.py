"""The command line: `looped train | plan | recipes | eval | halting | memory | plot | table | lens | dynamics |
fetch | tokenize | harness | frozen | ask | demo | bench | convert | quantize | export | publish | serve | study |
loopbench | phi`.

Nothing heavy is imported before the arguments are parsed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from looplab.instruments.devices import DEVICES
from looplab.publish.limits import LIMITS, Limits, option
from looplab.runs.records import PICTURES
from looplab.shipped import list_recipes
from looplab.tasks.registry import arguments_of, files_of, having, help_of, spelt
from looplab.training.recipe import add_recipe

from . import __version__
from .mistakes import Parser, Real, Whole, run_command

COUNT = Whole()
LOOPS = Whole(highest=10_000)
MODELS = "a run folder, a saved model's folder, the name of a model of this package, or USER/NAME on the Hub"


def named(text: str) -> str:
    """The type of an option that takes a file, folder or name. An empty one is refused, since an unset shell variable
    does not mean the current folder. A leading ~ is the home folder, since the shell leaves it in --output=~/x."""
    path = os.path.expanduser(text)
    if not text.strip() or "\0" in text or path.startswith("~"):
        raise argparse.ArgumentTypeError(f"must be a name, got {text!r}")
    return path


@contextmanager
def opened(verb: str, sources: str | Sequence[str], arguments, *names: str, to: str | None = None):
    """Within the block: runs of the models `sources`, their task, options that were given (see runs/sources.py).

    Args:
        names: options of the verb that a task may take.
        to: the folder that a model becomes, if it is not a run.
    """
    from looplab.runs.sources import opened_runs
    from looplab.tasks.registry import task_for

    names = (*names, *arguments_of(verb))
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    with opened_runs([sources] if isinstance(sources, str) else sources, to) as runs:
        runs = [placed(run, arguments) for run in runs]
        yield runs, task_for(verb, runs, *given), given


def placed(run, arguments):
    """The run with what the user says of the place of its data, or of the data of a model without a recipe."""
    from dataclasses import replace

    named = {name: vars(arguments).get(f"data.{name}") for name in ("files", "overrides")}
    given = {name: value for name, value in named.items() if value is not None}
    section = vars(arguments).get("data")
    if section is not None:
        if not run.bare:
            raise ValueError(f"--data is for a model without a recipe, and {run} has one: leave --data out.")
        given = section | given
    return replace(run, data=given)


def fields(text: str) -> dict:
    """The type of an option that takes fields and values."""
    from looplab.runs.yaml_text import parse_yaml

    values = parse_yaml(text, "the option")
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"must be fields and values, got {text!r}")
    return values


def report(run, text: str, path) -> None:
    """Print what was measured of a run, and where it is written."""
    kept = f"written to {path}" if run.given is None else "not kept: name a folder by --to"
    print(f"{text}\n\n{kept}")


def refuse_unkept(run, what: str, option: str = "--to") -> None:
    """Raise ValueError if nothing that `what` writes for a run stays. option: names a folder where it does."""
    if run.given is not None:
        raise ValueError(f"{run} is not a run, and {what} makes files: name a folder for them by {option}.")


def run_train(arguments) -> None:
    from looplab.training.recipe import read_recipe

    recipe = read_recipe(arguments.recipe, arguments.flags)  # a mistake in it is told before torch is imported
    from looplab.train import main

    main(recipe)


def run_plan(arguments) -> None:
    from looplab.training.recipe import read_recipe

    recipe = read_recipe(arguments.recipe, arguments.flags)
    from looplab.planning.plan import Setup, device_of, make_plan
    from looplab.planning.told import told

    device = device_of(arguments.gpu, arguments.memory, arguments.peak)
    setup = Setup(device, arguments.count, arguments.mfu, 1e9 * arguments.network)
    print(told(make_plan(recipe, setup, arguments.tokens)))


def run_recipes(arguments) -> None:
    print(list_recipes())


def run_eval(arguments) -> None:
    with opened("eval", arguments.run, arguments, "loops", "limit", to=arguments.to) as ([run], task, given):
        path = task.evaluate(run, **given)
        report(run, f"\n{run}\n{task.show(run)}", path)


def run_halting(arguments) -> None:
    from looplab.instruments.halting_settings import save_rule

    names = ("limit", "max_loops")
    with opened("halting", arguments.run, arguments, *names, to=arguments.to) as ([run], task, given):
        if arguments.save:
            refuse_unkept(run, "--save")
        path, text = task.halting(run, **given)
        if arguments.save:
            text += f"\n\n{save_rule(run, *task.best_rule(run))}"
        report(run, f"\n{run}\n{text}", path)


def run_plot(arguments) -> None:
    with opened("plot", arguments.runs, arguments, "format") as (runs, task, given):
        for run in runs if arguments.output is None else ():
            refuse_unkept(run, "looped plot", "--output")
        for path in task.plot(runs, arguments.output, **given):
            print(path)


def run_table(arguments) -> None:
    with opened("table", arguments.runs, arguments, "against") as (runs, task, given):
        print(task.table(runs, **given))


def run_lens(arguments) -> None:
    names = ("loops", "limit", "no_probes", "format")
    with opened("lens", arguments.run, arguments, *names, to=arguments.to) as ([run], task, given):
        refuse_unkept(run, "looped lens")
        for path in task.lens(run, **given):
            print(path)


def run_dynamics(arguments) -> None:
    from looplab.instruments.dynamics import dynamics_run
    from looplab.tasks.base import DYNAMICS

    with opened("dynamics", arguments.run, arguments, to=arguments.to) as ([run], task, _):
        refuse_unkept(run, "looped dynamics")
        for path in dynamics_run(
            run, DYNAMICS, task.sorts, arguments.loops, arguments.limit, arguments.format or "png"
        ):
            print(path)


def run_fetch(arguments) -> None:
    if arguments.name == "corpus":
        from looplab.pretrained.corpora import describe_corpus, fetch_corpus

        print(describe_corpus(fetch_corpus(arguments.output)))
    else:
        from looplab.pretrained.parts import fetch

        print(fetch(arguments.name, arguments.output))


def run_tokenize(arguments) -> None:
    from data_builders.token_shards import named_source, write_tokens
    from looplab.runs.digests import tokenizer_of
    from looplab.tasks.training import load_tokenizer

    tokenizer, folder = load_tokenizer("--tokenizer", arguments.tokenizer), Path(arguments.to)
    note = write_tokens(
        named_source(arguments.sources, arguments.name, arguments.split),
        tokenizer,
        tokenizer_of(tokenizer),
        folder,
        column=arguments.column,
        validation_split=arguments.validation_split,
        test_split=arguments.test_split,
        held_out_documents=arguments.held_out_documents,
        processes=arguments.processes,
    )
    shards = note["shards"].values()
    tokens, documents = (sum(shard[name] for shard in shards) for name in ("tokens", "documents"))
    print(f"{folder}: {tokens:,} tokens of {documents:,} documents; train on them by data: {{tokens: {folder}}}")


def run_harness(arguments) -> None:
    import logging

    from looplab.pretrained.harness import accuracies, score, settle_depth
    from looplab.runs.folder import to_json_lines
    from looplab.runs.models import load_model
    from looplab.runs.sources import find
    from looplab.runs.writing import check_file, write_whole

    # It would warn of a model that is loaded already, and of own data, both of which are intended.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if arguments.output is not None:
        check_file(Path(arguments.output))
    folder = find(arguments.model, looped=False).model_folder()
    model, tokenizer = load_model(folder, "save or fetch it again.", arguments.trust_remote_code)
    settle_depth(model)
    rows = score(model, tokenizer, arguments.task, arguments.split, arguments.limit, arguments.batch_size)
    print(f"{arguments.task} {arguments.split}: {accuracies(rows)}")
    if arguments.output is not None:
        print(f"written to {write_whole(Path(arguments.output), to_json_lines(rows))}")


def run_frozen(arguments) -> None:
    from looplab.pretrained.study import study

    path = study(arguments.recipe, arguments.stages, arguments.trust_remote_code, arguments.format or "png")
    print(f"{path.read_text(encoding='utf-8')}\nwritten to {path}")


def frozen_help() -> str:
    from looplab.pretrained.study import recipe_help

    return recipe_help()


def run_ask(arguments) -> None:
    with opened("ask", arguments.run, arguments, "loops") as ([run], task, given):
        task.ask(run, arguments.question, **given)


def run_demo(arguments) -> None:
    from looplab.publish.demo import demo
    from looplab.runs.sources import opened_runs

    with opened_runs(arguments.runs) as runs:
        demo(runs, port=arguments.port)


def run_bench(arguments) -> None:
    from looplab.bench.bench import bench
    from looplab.runs.sources import opened_runs

    named = "khop-51k" if arguments.run is None and arguments.requests else arguments.run
    with opened_runs([] if named is None else [named]) as runs:
        bench(
            arguments.output,
            widths=arguments.widths,
            layers=arguments.layers,
            loops=arguments.loops,
            rounds=arguments.rounds,
            run=placed(runs[0], arguments) if runs else None,
            compiled=not arguments.no_compile,
            quick=arguments.quick,
            contexts=arguments.contexts,
            memory_loops=arguments.memory_loops,
            growth=arguments.growth,
            requests=arguments.requests,
        )


def run_convert(arguments) -> None:
    from looplab.convert.conversion import convert

    done = convert(
        arguments.source,
        arguments.target,
        core=arguments.core,
        num_loops=arguments.loops,
        gguf_file=arguments.gguf_file,
        loop_connection=arguments.loop_connection,
    )
    first, last = done.core
    print(
        f"{done.folder}: of {done.num_layers} layers {first} to {last} are the core, "
        f"num_loops={done.num_loops} by default"
    )
    if done.identity is None:
        print("its tensors are the source's, bit for bit")
    else:
        blend = ""
        if done.blend is not None:
            loops, identity = done.blend
            blend = f"; at {loops} loops it is the source's training-free blend, to {identity.difference:.1e}"
        print(
            f"at 1 loop it is the source: the largest logit difference is {done.identity.difference:.1e} "
            f"(rounding explains {done.identity.tolerance:.1e}){blend}"
        )


def run_memory(arguments) -> None:
    from looplab.bench.memory import measure_memory, memory_table

    with opened("memory", arguments.run, arguments, to=arguments.to) as ([run], *_):
        path = measure_memory(run, arguments.chunks, arguments.limit, arguments.loops)
        report(run, memory_table(run), path)


def run_quantize(arguments) -> None:
    from looplab.convert.quantization import quantization_text, quantize_run
    from looplab.tasks.quantizing import QUANTIZATION

    with opened("quantize", arguments.run, arguments, to=arguments.to) as ([run], *_):
        refuse_unkept(run, "looped quantize")
        path = quantize_run(
            run,
            bits=arguments.bits,
            group=arguments.group,
            method=arguments.method,
            calibration_rows=arguments.calibration_rows,
            num_loops=arguments.loops,
        )
        report(run, quantization_text(run.read(QUANTIZATION)), path)


def run_export(arguments) -> None:
    from looplab.export.exporting import export_saved

    print(export_saved(arguments.model, arguments.to, arguments.quantize, arguments.loops, arguments.output).told())


def run_publish(arguments) -> None:
    from looplab.publish.publishing import publish, write_folder
    from looplab.runs.sources import opened_runs

    of_the_hub = ("dataset", "space", "private", "dry_run", "dataset_license")
    given = [f"--{name.replace('_', '-')}" for name in of_the_hub if getattr(arguments, name)]
    if arguments.folder is not None and given:
        raise ValueError(f"--folder writes the files of the model alone: leave {' and '.join(given)} out.")
    with opened_runs([arguments.run], copied=True) as [run]:
        if arguments.folder is not None:
            write_folder(run, Path(arguments.folder), arguments.license, arguments.base_model)
            return
        publish(
            placed(run, arguments),
            arguments.repo_id,
            dataset=arguments.dataset,
            space=arguments.space,
            private=arguments.private,
            dry_run=arguments.dry_run,
            licence=arguments.license,
            data_licence=arguments.dataset_license,
            base_model=arguments.base_model,
        )


def run_serve(arguments) -> None:
    from looplab.publish.serving import serve

    limits = Limits(**{name: getattr(arguments, name) for name in LIMITS})
    serve(arguments.model, host=arguments.host, port=arguments.port, device=arguments.device, limits=limits)


def run_study(arguments) -> None:
    from looplab.study.page import check_study, draw_study
    from looplab.study.study_file import read_study

    name, study = read_study(arguments.study)
    folder, runs = Path(arguments.to), Path(arguments.runs)
    if arguments.check:
        wrong = check_study(name, study, folder, runs)
        if wrong:
            raise ValueError(f"{wrong[0]} does not say what {folder / name}.jsonl says: run `looped study {name}`.")
        print(f"{name}: the pages say what the rows say")
        return
    from looplab.study.cells import check_arms, measurement, run_cells

    failed = []
    if not arguments.draw:
        check_arms(study)
        # A value that the measurement refuses is told before anything is trained; most arms have the same.
        for command in dict.fromkeys(tuple(measurement(study, arm, runs)) for arm in study.arms):
            parsed(command)
        failed = run_cells(name, study, folder / f"{name}.jsonl", runs, arguments.jobs)
    for path in draw_study(name, study, folder, runs):
        print(path)
    if failed:
        raise ValueError(f"{len(failed)} cells failed, first {failed[0]} The same command tries them again.")


def run_loopbench(arguments) -> None:
    from looplab.study.loopbench_file import read_bench
    from looplab.study.loopbench_page import check_bench, draw_bench

    name, bench = read_bench(arguments.bench)
    folder = Path(arguments.to)
    if arguments.check:
        if not check_bench(name, bench, folder):
            raise ValueError(
                f"{folder / name}.md does not say what {folder / name}.jsonl says: run `looped loopbench {name}`."
            )
        print(f"{name}: the page says what the rows say")
        return
    failed = []
    if not arguments.draw:
        from looplab.study.loopbench import run_bench

        names = arguments.tasks or list(bench.tasks), arguments.architectures or list(bench.architectures)
        wanted = (*names, arguments.seeds or bench.seeds)
        failed = run_bench(name, bench, wanted, folder / f"{name}.jsonl", Path(arguments.runs), arguments.jobs)
    for path in draw_bench(name, bench, folder):
        print(path)
    if failed:
        raise ValueError(f"{len(failed)} cells failed, first {failed[0]} The same command tries them again.")


def run_phi(arguments) -> None:
    from looplab.study.phi import phi_of

    print(phi_of(arguments.sources, Path(arguments.rows)))


def add_study(command: argparse.ArgumentParser, pages_say: str) -> None:
    """The options of what trains cells and draws their rows. pages_say: subject and verb of the help of --check."""
    command.add_argument("--jobs", type=Whole(highest=1024), default=1, metavar="N", help="trainings at once")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--draw", action="store_true", help="train nothing: draw the rows there are")
    what.add_argument(
        "--check", action="store_true", help=f"write nothing: look whether the {pages_say} what the rows say"
    )
    command.add_argument("--to", default="docs/results", metavar="FOLDER", help="of rows, page and figure")
    command.add_argument("--runs", default="runs", metavar="FOLDER", help="of the trainings")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `call`, the function that runs it with the arguments."""
    main_parser = Parser(prog="looped", description="Train, evaluate, plot, ask and measure looped models.")
    debug = {"action": "store_true", "help": "show the traceback of a mistake, too"}
    main_parser.add_argument("--debug", **debug)
    main_parser.add_argument("--version", action="version", version=f"looped-transformers {__version__}")
    formats = {"choices": PICTURES, "help": "of the figures (default: png)"}
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def files(verb: str) -> str:
        return ", ".join(files_of(verb))

    def add_arguments(command: Parser, verb: str) -> None:
        for name, argument in arguments_of(verb).items():
            words = f"{argument.help} {help_of(verb, name)}"
            several = "+" if argument.many else None
            command.add_argument(spelt(name), type=argument.type, nargs=several, metavar=argument.metavar, help=words)

    def add_run(command: Parser, verb: str | None = None) -> None:
        command.add_argument("run", metavar="RUN", help=MODELS + (f"; of {having(verb)}" if verb else ""))

    def add_data(command: Parser) -> None:
        words = "where the files are that the run was trained on, if they or the run have moved"
        command.add_argument("--data.files", type=named, nargs="+", metavar="FILE", help=words)
        words = 'the same for other fields, such as "dataset: {path: FOLDER, split: train}"'
        command.add_argument("--data.overrides", type=fields, metavar="FIELDS", help=words)

    def add_to(command: Parser) -> None:
        words = "make this folder a run with a copy of the model, for what is measured, if RUN is a model and no run"
        command.add_argument("--to", metavar="FOLDER", help=words)

    command = commands.add_parser("train", help="train a model by a recipe, in one process, to OUTPUT_DIR/NAME")
    add_recipe(command)
    command.set_defaults(call=run_train, flags=())

    command = commands.add_parser(
        "plan", help="say what training by a recipe would take: FLOPs, memory, traffic and hours; trains nothing"
    )
    add_recipe(command)
    command.add_argument("--gpu", default="h100", metavar="GPU", help=f"such as {', '.join(DEVICES)}; or any name")
    command.add_argument("--count", type=COUNT, default=8, metavar="N", help="GPUs")
    command.add_argument(
        "--mfu", type=Real(0.001, 1), default=0.4, metavar="SHARE", help="share of the GPU's peak that is reached"
    )
    command.add_argument("--memory", type=Real(0.1, 1e6), metavar="GB", help="of a GPU (default: what is known of it)")
    command.add_argument(
        "--peak", type=Real(0.001, 1e6), metavar="TFLOPS", help="TFLOP/s of a GPU (default: what is known of it)"
    )
    command.add_argument(
        "--network", type=Real(0.001, 1e6), default=50, metavar="GB", help="GB/s that a GPU sends to other machines"
    )
    command.add_argument("--tokens", type=COUNT, metavar="N", help="of a row of data, if the recipe does not say")
    command.set_defaults(call=run_plan, flags=())

    command = commands.add_parser("recipes", help="list the recipes that come with this package")
    command.set_defaults(call=run_recipes)

    command = commands.add_parser(
        "eval",
        help=f"measure a run at several loop counts, to files of its task ({files('eval')})",
    )
    add_run(command)
    command.add_argument(
        "--loops",
        type=LOOPS,
        nargs="+",
        metavar="R",
        help=f"loop counts {help_of('eval', 'loops')}",
    )
    command.add_argument(
        "--limit",
        type=COUNT,
        metavar="N",
        help=f"at most N test rows of each sort {help_of('eval', 'limit')}",
    )
    add_arguments(command, "eval")
    words = (
        "of a model without a recipe: what it is measured on, as in a recipe's section data, such as "
        '"{task: sequence, files: [mine.jsonl], grade: digits}"; all rows of files, the test rows of a generator'
    )
    command.add_argument("--data", type=fields, metavar="FIELDS", help=words)
    add_to(command)
    add_data(command)
    command.set_defaults(call=run_eval)

    command = commands.add_parser("halting", help=f"measure what halting rules save, to RUN/{files('halting')}")
    add_run(command)
    command.add_argument(
        "--max-loops",
        type=LOOPS,
        metavar="R",
        help=f"the largest budget {help_of('halting', 'max_loops')}",
    )
    add_arguments(command, "halting")
    command.add_argument(
        "--limit",
        type=COUNT,
        metavar="N",
        help=f"at most N rows of each sort, or samples {help_of('halting', 'limit')}",
    )
    command.add_argument(
        "--save",
        action="store_true",
        help="write the rule with the fewest loops at no loss of quality into RUN/model, for generate(halting=True)",
    )
    add_to(command)
    command.unsuggested = frozenset({"--save"})  # it replaces the rule that is there
    add_data(command)
    command.set_defaults(call=run_halting)

    command = commands.add_parser(
        "memory", help="measure quality and bytes of every KV policy and chunk length, to RUN/memory.jsonl"
    )
    add_run(command, "memory")
    command.add_argument(
        "--chunks",
        type=Whole(0),
        nargs="+",
        default=(1, 0),
        metavar="C",
        help="tokens of a chunk of the prompt; 1 is decoding, 0 the whole call (default: 1 0)",
    )
    command.add_argument("--limit", type=COUNT, metavar="N", help="at most N test rows of each sort")
    command.add_argument("--loops", type=LOOPS, metavar="R", help="default: the model's own")
    add_to(command)
    add_data(command)
    command.set_defaults(call=run_memory)

    command = commands.add_parser("plot", help="draw measurements and training curves, to RUN/figures")
    command.add_argument(
        "runs", metavar="RUN", nargs="+", help=f"{MODELS}; runs of one recipe are also drawn as a group"
    )
    command.add_argument(
        "--output",
        metavar="FOLDER",
        help="of the figures of one run (default: RUN/figures), or of groups (default: figures/NAMES beside the first "
        "run)",
    )
    command.add_argument("--format", **formats)
    command.set_defaults(call=run_plot)

    command = commands.add_parser(
        "table", help="a Markdown table of runs; runs of one recipe are a line with mean [lowest, highest]"
    )
    command.add_argument("runs", metavar="RUN", nargs="+", help=MODELS)
    command.add_argument(
        "--against",
        metavar="GROUP",
        help=f"compare the other groups to this one, seed by seed {help_of('table', 'against')}",
    )
    command.set_defaults(call=run_table)

    command = commands.add_parser(
        "lens",
        help=f"look into states, heads and loops of a model, to files of its task ({files('lens')})",
    )
    add_run(command)
    add_arguments(command, "lens")
    command.add_argument("--loops", type=LOOPS, metavar="R", help="default: the model's own")
    command.add_argument(
        "--limit", type=COUNT, metavar="N", help=f"at most N test rows of each sort {help_of('lens', 'limit')}"
    )
    command.add_argument(
        "--no-probes", action="store_true", default=None, help="skip the linear probes, which take most of the time"
    )
    add_to(command)
    command.add_argument("--format", **formats)
    add_data(command)
    command.set_defaults(call=run_lens)

    command = commands.add_parser(
        "dynamics", help=f"watch how the state moves from loop to loop, to RUN/{files('dynamics')} and a figure"
    )
    add_run(command, "dynamics")
    command.add_argument("--loops", type=LOOPS, metavar="R", help="default: twice the model's own")
    command.add_argument("--limit", type=COUNT, metavar="N", help="at most N test rows of each sort (default: 16)")
    add_to(command)
    command.add_argument("--format", **formats)
    add_data(command)
    command.set_defaults(call=run_dynamics)

    command = commands.add_parser(
        "fetch",
        help="download a pretrained model, benchmarks, molecules or a text corpus, and print the folder",
    )
    command.add_argument("name", choices=["smollm2", "benchmarks", "moses", "corpus"], help="what to download")
    command.add_argument("--output", metavar="FOLDER", help="default: looped/ in the cache of huggingface_hub")
    command.set_defaults(call=run_fetch)

    command = commands.add_parser("tokenize", help="tokenise a text once, into shards that runs map into memory")
    words = "files or globs of one kind (.jsonl, .parquet, .csv, .txt, .md), or a data set of the Hub, USER/NAME"
    command.add_argument("sources", type=named, nargs="+", metavar="DATA", help=words)
    command.add_argument("--tokenizer", type=named, required=True, metavar="TOKENIZER", help="folder of a tokenizer")
    words = "folder to write to; the same command goes on with one that was interrupted"
    command.add_argument("--to", type=named, required=True, metavar="TARGET", help=words)
    command.add_argument("--name", metavar="NAME", help="of a part of the data set, such as sample-10BT")
    command.add_argument("--split", default="train", metavar="NAME", help="of the data set (default: train)")
    command.add_argument("--column", default="text", metavar="NAME", help="that has the documents (default: text)")
    for split in ("validation", "test"):
        words = f"split of the data set to be the split {split}, in place of the first documents"
        command.add_argument(f"--{split}-split", metavar="NAME", help=words)
    words = "most documents of each split that is held out (default: 1000)"
    command.add_argument("--held-out-documents", type=COUNT, default=1000, metavar="N", help=words)
    words = "that tokenise at once (default: one for each core)"
    command.add_argument("--processes", type=COUNT, metavar="N", help=words)
    command.set_defaults(call=run_tokenize)

    command = commands.add_parser("harness", help="score a model on a multiple-choice benchmark")
    command.add_argument("model", metavar="MODEL", help=f"{MODELS}; any causal language model")
    command.add_argument("--task", required=True, metavar="NAME", help="the benchmark, such as arc_easy")
    command.add_argument(
        "--split", choices=["validation", "test"], default="validation", help="the items: validation for decisions"
    )
    command.add_argument("--limit", type=COUNT, metavar="N", help="the first N items; their order is random")
    command.add_argument(
        "--batch-size", type=Whole(highest=4096), default=8, metavar="N", help="choices that are scored at once"
    )
    command.add_argument("--output", metavar="FILE", help="a .jsonl file with a line per item, to compare models")
    trust = {"action": "store_true", "help": "run the Python code in the model's folder, if you trust its author"}
    command.add_argument("--trust-remote-code", **trust)
    command.set_defaults(call=run_harness)

    command = commands.add_parser("frozen", help="study the training-free looping of a pretrained model")
    command.add_argument(
        "recipe", metavar="RECIPE", help="such as recipes/frozen/smollm2.yaml, or a name of `looped recipes`"
    )
    command.more = frozen_help
    command.add_argument(
        "--stages",
        nargs="+",
        choices=("profile", "sweep", "confirm", "cost"),
        help="default: all that are not on file yet; without a grid, confirm alone",
    )
    command.add_argument("--trust-remote-code", **trust)
    command.add_argument("--format", **formats)
    command.set_defaults(call=run_frozen)

    command = commands.add_parser("ask", help="print a model's answer, or what it writes, at several loop counts")
    add_run(command, "ask")
    command.add_argument(
        "question",
        type=str,
        metavar="QUESTION",
        nargs="?",
        help='hops: an entity and relations, such as "e3 r1 r2" (default: a test question beyond the trained hops); '
        "sequence: a question (default: a test question beyond the trained grades); "
        "text, molecules: a beginning, which is written on (default: the first words of a test text; nothing)",
    )
    command.add_argument("--loops", type=LOOPS, nargs="+", metavar="R", help=f"loop counts {help_of('ask', 'loops')}")
    add_arguments(command, "ask")
    add_data(command)
    command.set_defaults(call=run_ask)

    command = commands.add_parser("demo", help="show a page with a loop slider on this machine (needs the extra demo)")
    command.add_argument("runs", metavar="RUN", nargs="+", help=f"{MODELS}: at most one on each of {having('demo')}")
    command.add_argument(
        "--port", type=Whole(highest=65_535), metavar="N", help="default: the first free port from 7860"
    )
    command.set_defaults(call=run_demo)

    command = commands.add_parser("bench", help="measure speed and memory against a Llama, to OUTPUT/bench.jsonl")
    command.add_argument("--output", default="runs/bench", metavar="FOLDER", help="of the measurements")
    command.add_argument(
        "--widths", type=Whole(64, 65_536, 64), nargs="+", default=[64, 256, 512], metavar="D", help="hidden sizes"
    )
    words = "of the looped model; the Llama has LAYERS x LOOPS layers (default: %(default)s)"
    command.add_argument(
        "--layers", type=Whole(highest=1024), default=2, metavar="LAYERS", help=f"core layers {words}"
    )
    command.add_argument("--loops", type=LOOPS, default=4, metavar="LOOPS", help=f"loops {words}")
    command.add_argument("--rounds", type=Whole(highest=10_000), default=7, metavar="N", help="interleaved pairs")
    command.add_argument(
        "--run",
        metavar="RUN",
        help=f"also measure drafts, or halting, on this trained model ({MODELS}; of {having('bench')})",
    )
    command.add_argument("--no-compile", action="store_true", help="skip the rows with torch.compile")
    command.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it works; the numbers mean nothing"
    )
    command.add_argument(
        "--contexts",
        type=COUNT,
        nargs="+",
        default=(),
        metavar="S",
        help="measure instead decoding after S tokens with each KV policy, and training in chunks",
    )
    command.add_argument(
        "--memory-loops", type=LOOPS, nargs="+", default=(4, 8), metavar="R", help="for --contexts (default: 4 8)"
    )
    command.add_argument(
        "--growth",
        action="store_true",
        help="measure and draw instead how time and memory grow with loops (to 1,000), batch rows, context and chunks",
    )
    command.add_argument(
        "--requests",
        type=COUNT,
        nargs="+",
        default=(),
        metavar="N",
        help="measure instead N requests of different depth at once, on RUN (default: khop-51k); with --contexts S, "
        "also a decoded token of rows of different depth after S tokens",
    )
    add_data(command)
    command.set_defaults(call=run_bench)

    command = commands.add_parser(
        "convert",
        help="make a looped model from a pretrained Llama, Mistral, Qwen2, Qwen3, Ouro, Nanbeige or Huginn",
    )
    command.add_argument("source", metavar="SOURCE", help="folder or Hub name of a causal language model")
    command.add_argument("target", metavar="TARGET", help="a folder that does not exist yet")
    command.add_argument(
        "--core",
        type=Whole(0),
        nargs=2,
        metavar=("A", "B"),
        help="first and last layer that loop, counted from 0 (default: four around 0.48 of the depth)",
    )
    command.add_argument(
        "--loops",
        type=LOOPS,
        metavar="K",
        help="the model's default loop count (default: 1; of a looped source its own)",
    )
    command.add_argument("--gguf-file", metavar="NAME", help="read this gguf file in SOURCE")
    command.add_argument(
        "--loop-connection",
        choices=("damped", "plain"),
        help="what more loops do before training: the training-free blend, which loses nothing; or the core again as "
        "it is, which loses much (default: damped; a looped source has its own)",
    )
    command.set_defaults(call=run_convert)

    command = commands.add_parser(
        "quantize", help="quantize the weights, to RUN/model_int4/ and RUN/quantization.json"
    )
    add_run(command, "quantize")
    command.add_argument("--bits", type=Whole(2, 16), default=4, metavar="N", help="bits per weight")
    command.add_argument("--group", type=COUNT, default=128, metavar="N", help="weights that share a scale")
    command.add_argument(
        "--method", choices=("gptq", "nearest"), default="gptq", help="gptq is calibrated over all loops"
    )
    command.add_argument(
        "--calibration-rows",
        type=COUNT,
        metavar="N",
        help="rows of training data: blocks of text, questions, molecules (default: 128, or all)",
    )
    command.add_argument("--loops", type=LOOPS, metavar="R", help="default: the model's own")
    add_to(command)
    add_data(command)
    command.set_defaults(call=run_quantize)

    command = commands.add_parser(
        "export", help="write a model for llama.cpp, for MLX, or as a stock model of transformers"
    )
    command.add_argument("model", metavar="MODEL", help=MODELS)
    command.add_argument(
        "--to",
        required=True,
        choices=("gguf", "mlx", "transformers"),
        help="gguf: a file for llama.cpp; mlx: a folder for mlx-lm; transformers: a folder of a stock model, such as "
        "a Llama, with a layer for every layer call",
    )
    command.add_argument(
        "--quantize", choices=("q8_0", "q4_0", "f16"), help="the weights become this (default: what they are)"
    )
    command.add_argument(
        "--loops",
        type=LOOPS,
        metavar="K",
        help="default: the model's own. Where the engine loops, what it runs unless it is told another number; "
        "elsewhere the only one",
    )
    command.add_argument(
        "--output",
        metavar="PATH",
        help="a new file or folder (default: RUN/export/NAME.gguf, RUN/export/NAME-mlx, ..)",
    )
    command.set_defaults(call=run_export)

    command = commands.add_parser("publish", help="put a run on the Hugging Face Hub, with a card and its records")
    command.add_argument("run", metavar="RUN", help=f"{MODELS}, that `looped eval` has measured")
    place = command.add_mutually_exclusive_group(required=True)
    place.add_argument("--repo-id", metavar="USER/NAME", help="of the model, its data and its page")
    place.add_argument("--folder", metavar="FOLDER", help="write the model, its card and its records to a new folder")
    command.add_argument("--dataset", action="store_true", help="also publish the data of the run")
    command.add_argument("--space", action="store_true", help="also publish the page of `looped demo`")
    command.add_argument("--private", action="store_true", help="visible to USER only")
    command.add_argument("--dry-run", action="store_true", help="print the upload only, without network or token")
    command.add_argument("--license", metavar="ID", help="of the model, such as mit (default: apache-2.0)")
    command.add_argument(
        "--dataset-license",
        metavar="ID",
        help="of the data (default for data that a seed generates: the licence of the model)",
    )
    command.add_argument(
        "--base-model",
        metavar="USER/NAME",
        help="the model on the Hub that the run started from; the card links to it",
    )
    add_data(command)
    command.set_defaults(call=run_publish)

    command = commands.add_parser("serve", help="serve a looped model with the OpenAI API, a loop count per request")
    command.add_argument("model", metavar="MODEL", help=MODELS)
    command.add_argument("--host", default="127.0.0.1", metavar="NAME", help="default: %(default)s, this machine only")
    command.add_argument(
        "--port",
        type=Whole(0, 65_535),
        default=8000,
        metavar="N",
        help="0 takes a free port",
    )
    command.add_argument("--device", metavar="NAME", help="such as cpu (default: the accelerator, if there is one)")
    for name, what in LIMITS.items():
        default = Limits.__dataclass_fields__[name].default
        kind = Whole(0 if name == "grace_seconds" else 1, 2**40)
        command.add_argument(option(name), type=kind, default=default, metavar="N", help=what)
    command.set_defaults(call=run_serve)

    command = commands.add_parser(
        "study", help="train and measure what a study compares, and draw its page from the rows, to FOLDER/NAME.*"
    )
    command.add_argument("study", metavar="NAME", help="a file, or a study of this package, such as far_hops")
    add_study(command, "pages say")
    command.set_defaults(call=run_study)

    command = commands.add_parser(
        "loopbench",
        help="train and measure tasks x architectures with one budget, and draw them, to FOLDER/NAME.*",
    )
    command.add_argument(
        "bench",
        metavar="NAME",
        nargs="?",
        default="loopbench",
        help="a file, or a bench of this package (default: loopbench)",
    )
    command.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="of the bench; a generator, such as reasoning_gym/gcd; or a recipe, whose data are taken (default: all "
        "of the bench)",
    )
    command.add_argument(
        "--architectures",
        nargs="+",
        metavar="NAME",
        help="of the bench; a loop connection; or a recipe, whose model is taken (default: all of the bench)",
    )
    command.add_argument(
        "--seeds", type=Whole(0), nargs="+", metavar="N", help="that are reported (default: the bench's)"
    )
    add_study(command, "page says")
    command.set_defaults(call=run_loopbench)

    command = commands.add_parser(
        "phi", help="fit what a loop is worth in layers of its own, to the losses of a study or of runs on text"
    )
    command.add_argument("sources", metavar="SOURCE", nargs="+", help="a study, such as phi, or run folders")
    command.add_argument("--rows", default="docs/results", metavar="FOLDER", help="of the rows of the study")
    command.set_defaults(call=run_phi)

    for command in commands.choices.values():
        command.register("type", None, named)  # the type of options that name none
        command.add_argument("--debug", default=argparse.SUPPRESS, **debug)
        command.set_defaults(parser=command)
    return main_parser


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of one command. Exits, with what is wrong, if they are none."""
    arguments, unknown = parser().parse_known_args(argv)
    if "flags" in arguments:
        arguments.flags = unknown
    else:
        arguments.parser.refuse_unknown(unknown)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, see `mistakes.py`."""
    arguments = parsed(argv)
    return run_command(arguments.parser.prog, lambda: arguments.call(arguments), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
