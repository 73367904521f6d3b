"""The tasks khop and composition, see `tasks.base.Task`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from looplab.mistakes import Whole
from looplab.runs.folder import Run
from looplab.tasks.base import Argument, Figure, Task

from .data import HopCurriculum, HopData
from .records import HALTING, RECORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HOPS = Whole(highest=1_000)


class HopTask(Task):
    """The verbs of both tasks on chains of hops."""

    kind = "hops"
    Data, Curriculum = HopData, HopCurriculum
    records = RECORDS
    measured = "accuracy"
    figures: ClassVar = {
        "grid": Figure("Accuracy in % over hops and loops; a frame around what was trained"),
        "loops": Figure("Accuracy after every loop"),
        "hops": Figure("Accuracy by hops, at the loops chosen on the validation questions"),
        "halting": Figure("Accuracy against loops used, by halting rule"),
        "learning": Figure("Accuracy by kind of question, over training"),
        "dynamics": Figure("How the state moves from loop to loop", "dynamics"),
        "training": Figure("Training: loss and held-out measure over time"),
        "lens": Figure("Share of chains in which a state reads out the bridge, and the answer", "lens", True),
        "patch": Figure("Share of corrupted runs that give the clean answer after one clean state was put in", "lens",
                        True),
        "swap": Figure("Share of runs that follow the other bridge after its direction was exchanged", "lens", True),
        "realign": Figure("Share of chains that are right with a token's embedding in the place of one state", "lens",
                          True),
        "probe": Figure("Accuracy of a linear probe for the bridge, and for the answer", "lens", True),
        "stages": Figure("What states say and cause, over training", "lens"),
    }  # fmt: skip
    arguments: ClassVar = {
        ("eval", "max_loops"): Argument("last loop for held-out rows", "R", Whole(highest=10_000)),
        ("lens", "snapshot"): Argument("a folder of RUN/snapshots, or 'all' of them", "step-N"),
        ("lens", "hops"): Argument("length of the chains", "K", HOPS),
    }
    defaults: ClassVar = {
        "eval --loops": "1 2 3 4 6 8 12 16",
        "eval --max-loops": "50",
        "halting --max-loops": "50",
        "lens --hops": "the longest trained on, at most 4",
        "lens --limit": "300 chains per split kind",
        "ask --loops": "1 2 4 8 16",
    }

    def training(self, recipe, splits, depth, accelerator, kept_tokenizer):
        from .training import HopTraining

        return HopTraining(recipe, splits, depth, accelerator, kept_tokenizer)

    def evaluate(
        self,
        run: Run,
        *,
        loops: Sequence[int] | None = None,
        limit: int | None = None,
        max_loops: int | None = None,
    ) -> Path:
        """Write the files of `evaluation.evaluate_run`."""
        from .evaluation import evaluate_run

        return evaluate_run(run, loops, limit, max_loops)

    def show(self, run: Run) -> str:
        from .evaluation import grid_text
        from .results import depth_text

        return f"{grid_text(run)}\n\n{depth_text(run)}"

    def table(self, runs: Sequence[Run]) -> str:
        from .results import markdown_table

        return markdown_table(runs)

    def plot(self, runs: Sequence[Run], output: str | Path | None, *, format: str = "png") -> list[Path]:
        from .figures import plot_runs

        return plot_runs(runs, output, format)

    def halting(self, run: Run, *, limit: int | None = None, max_loops: int | None = None) -> tuple[Path, str]:
        """Write RUN/halting.jsonl by `halting.halting_run`."""
        from .halting import halting_run
        from .results import halting_text

        return halting_run(run, max_loops, None, limit), halting_text(run.read(HALTING))

    def best_rule(self, run: Run) -> tuple[Mapping | None, str]:
        from .results import CRITERION

        return next((row for row in run.read(HALTING) if row["measure"] == "best"), None), CRITERION

    def graded(self, run: Run):
        from .results import graded

        return graded(run)

    def lens(
        self,
        run: Run,
        *,
        snapshot: str | None = None,
        hops: int | None = None,
        loops: int | None = None,
        limit: int | None = None,
        no_probes: bool = False,
        format: str = "png",
    ) -> list[Path]:
        """Write and draw what `mechanism.lens_run` measures."""
        from .mechanism import lens_run

        return lens_run(
            run, snapshot=snapshot, hops=hops, num_loops=loops, limit=limit, probes=not no_probes, format=format
        )

    def ask(self, run: Run, question: str | None, *, loops: Sequence[int] | None = None) -> None:
        from .questions import check_question

        if question is not None:
            check_question(run, question)
        from .ask import ask

        ask(run, question, loops)

    def measure(self, run: Run, tokenizer: "PreTrainedTokenizerBase", limit: int | None):
        from .evaluation import HopMeasure

        return HopMeasure(run, tokenizer, limit)

    def quantizing(self, run: Run, tokenizer: "PreTrainedTokenizerBase"):
        from .quantizing import HopQuantizing

        return HopQuantizing(run, tokenizer)

    def sorts(self, run: Run, tokenizer: "PreTrainedTokenizerBase", limit: int):
        """By hop count, or by split kind where all rows have one: at most six of them, from the first to the last."""
        from looplab.instruments.drawing import spread

        from .rows import KIND_WORDS, groups_of, load_run_task

        groups = groups_of(load_run_task(run)["test"], tokenizer, limit)
        deep = len({group.hops for group in groups}) > 1
        kinds = [KIND_WORDS.get(group.split_kind, group.split_kind) for group in groups]
        names = [f"{group.hops} hops" for group in groups] if deep else kinds
        found = {name: [group.input_ids] for name, group in zip(names, groups, strict=True)}
        return {name: found[name] for name in spread(list(found), 6)}

    def time_halting(self, run: Run, number: int, rounds: int) -> list[dict]:
        from .halting import halting_rows

        return halting_rows(run, number, rounds)

    def chains(self, run: Run, tokenizer: "PreTrainedTokenizerBase", number: int, most: int):
        from .rows import groups_of, load_run_task

        groups = groups_of(load_run_task(run)["test"], tokenizer, number)
        return [
            (ids, group.hops, answer)
            for group in groups
            if group.hops <= most
            for ids, answer in zip(group.input_ids.tolist(), group.answers.tolist(), strict=True)
        ]

    def card(self):
        from .card import HopCard

        return HopCard(self.says, self.split_kinds)

    def data_licence(self, config: str, licence: str) -> str:
        """The licence of the model: nobody else has rights in data that a seed generates."""
        return licence

    def demo_part(self, run: Run, config: dict) -> dict:
        from .card import hops_part

        return hops_part(run, config)


class Khop(HopTask):
    """Chains of any length through a graph of permutations."""

    name = "khop"
    arguments: ClassVar = HopTask.arguments | {
        ("eval", "max_hops"): Argument("test chains of up to K hops", "K", HOPS),
        ("eval", "hops"): Argument("test chains of these hop counts alone", "K", HOPS, many=True),
        ("halting", "max_hops"): Argument("chains of up to K hops", "K", HOPS),
    }
    says = "Its graph is permutations, and it was trained on chains of up to {depth} hops."
    split_kinds: ClassVar = {
        "id": "chains that training did not have, of hop counts that its data hold",
        "ood": "chains of more hops than any in its data",
    }

    def evaluate(
        self,
        run: Run,
        *,
        loops: Sequence[int] | None = None,
        limit: int | None = None,
        max_loops: int | None = None,
        max_hops: int | None = None,
        hops: Sequence[int] | None = None,
    ) -> Path:
        from .evaluation import evaluate_run

        return evaluate_run(run, loops, limit, max_loops, max_hops, hops)

    def halting(
        self,
        run: Run,
        *,
        limit: int | None = None,
        max_loops: int | None = None,
        max_hops: int | None = None,
    ) -> tuple[Path, str]:
        from .halting import halting_run
        from .results import halting_text

        return halting_run(run, max_loops, max_hops, limit), halting_text(run.read(HALTING))


class Composition(HopTask):
    """Questions of two facts; training composes some pairs of facts, and others never."""

    name = "composition"
    says = "It was trained on single facts and on pairs of some; others it never saw in a pair."
    split_kinds: ClassVar = {
        "id": "two facts that training composed, but not with each other",
        "ood": "two facts that training never composed with anything",
        "ood_first": "the first of two facts was never composed in training",
        "ood_second": "the second of two facts was never composed in training",
        "pair": "two relations that never follow each other in training",
    }
