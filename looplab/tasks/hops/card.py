"""The model card and the section of demo.json of a run on hops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult

from data_builders import Khop
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model
from looplab.runs.seeds import to_markdown
from looplab.tasks.card import Card, Names, between, loops_shown
from modeling_looped.halting_looped import entropy_bound

from .data import HopData
from .records import EVALUATION, GRID, HALTING
from .results import THRESHOLDS, depth_facts
from .rows import facts_of_task, first_question_beyond, line_order, load_run_task


@dataclass(frozen=True)
class HopCard(Card):
    """The card of a model that follows chains.

    Args:
        says: a sentence on the task, with {depth} for the deepest trained hop count.
        split_kinds: split kind -> what its questions are.
    """

    says: str
    split_kinds: Mapping[str, str]
    Data = HopData
    template = "model_hops.md"
    metrics = ("accuracy",)
    tags = Khop.TAGS
    papers = ("2604.07822",)

    def results(self, run: Run, names: Names) -> list[EvalResult]:
        """Mean accuracy over hop counts, for each held-out kind, at the chosen loop count."""
        facts, hops = depth_facts(run), {}
        for row in run.read(GRID):
            hops.setdefault(row["split_kind"], set()).add(row["hops"])
        return [
            self.result(
                run, names, "accuracy", f"Accuracy, {kind}, {facts['loops']} loops", round(accuracy, 4),
                {"num_loops": facts["loops"], "split_kind": kind, "hops": between(min(hops[kind]), max(hops[kind]))},
            )
            for kind, accuracy in facts["accuracy"].items()
        ]  # fmt: skip

    def values(self, run: Run) -> dict:
        """The values of `model_hops.md` beyond `common_values`."""
        task, grid, facts, summary = load_run_task(run), run.read(GRID), depth_facts(run), run.summary()
        evaluation, (low, high) = run.read(EVALUATION), run.trained_loops()
        question = first_question_beyond(task["test"], summary["trained_hops"])
        number = task["test"]["text"][:].index(question)
        words = {word for text in task["train"]["text"][:] for word in text.split()}
        measured = {row["split_kind"] for row in grid}
        depth, reach = max(summary["trained_hops"]), facts["reach"][0.9]
        mean = sum(facts["accuracy"].values()) / len(facts["accuracy"])
        shown = loops_shown({row["loops"] for row in grid})
        return {
            "numbers": [
                (f"{100 * mean:.1f} %", f"right on held-out questions, with {facts['loops']} loops"),
                (f"{reach} hops", f"answered at 90 %; {depth} were trained"),
                (f"{summary['parameters']:,}", "parameters"),
            ],
            "output": answers(run, question, shown),
            "task_text": self.says.format(depth=depth),
            "question": question,
            "answer": task["test"]["answer"][number],
            "loops_shown": shown,
            "chance": f"{100 * evaluation['chance']:.1f}",
            "kinds": {kind: text for kind, text in self.split_kinds.items() if kind in measured},
            "table": grid_markdown(grid, low, high),
            "loops": facts["loops"],
            "reach": " / ".join(str(facts["reach"][threshold]) for threshold in THRESHOLDS),
            "learnable_depth": facts["learnable_depth"],
            "entities": sum(word[0] == "e" for word in words),
            "relations": sum(word[0] == "r" for word in words),
            "hops_text": between(min(summary["trained_hops"]), depth),
            "limit": evaluation["limit"],
            "limit_of": "questions per hop count and kind",
        }


def answers(run: Run, question: str, loops: Sequence[int]) -> str:
    """What the lines of code on the card print: loop count and answer."""
    model, tokenizer = load_run_model(run, *loops)
    inputs = tokenizer(question, return_tensors="pt").to(model.device)
    said = {count: model.generate(**inputs, num_loops=count)[0, -1] for count in loops}
    return "\n".join(f"{count} {tokenizer.decode(token)}" for count, token in said.items())


def grid_markdown(rows: Sequence[dict], low: int, high: int) -> str:
    """The grid as a Markdown table, accuracies in %: a line per (split kind, hops), a column per loop count.

    low, high: smallest and largest trained loop count, whose columns are marked.
    """
    cells = {(row["split_kind"], row["hops"], row["loops"]): row for row in rows}
    loops = sorted({row["loops"] for row in rows})
    lines = []
    for line in sorted({key[:2] for key in cells}, key=line_order):
        row = cells[(*line, loops[0])]
        cell = {"questions": line[0], "hops": f"{line[1]}{'*' if row['trained'] else ''}", "n": str(row["n"])}
        for count in loops:
            name = f"[{count}]" if low <= count <= high else str(count)
            cell[name] = f"{100 * cells[(*line, count)]['accuracy']:.1f}"
        lines.append(cell)
    return to_markdown(lines)


def hops_part(run: Run, config: dict) -> dict:
    """The section of demo.json about a run, see `Task.demo_part`."""
    task, summary = load_run_task(run), run.summary()
    facts = facts_of_task(task)
    answers = {answer for known in facts.values() for answer in known.values()}
    number = sum(len(known) for known in facts.values())
    deepest = max(task["test"]["hops"][:])
    loops = max(2 * run.trained_loops()[1], deepest + deepest // 4)  # a hop takes a loop in models that reach far
    entity, known = next(iter(facts.items()))
    relation, other = next(iter(known.items()))
    return {
        "text": f"A looped transformer of {summary['parameters']:,} parameters knows {number:,} facts such as "
        f"{entity} {relation} &rarr; {other}. Asked to follow several in a row, it thinks as many loops as you say.",
        "facts": facts,
        "trained_hops": [min(summary["trained_hops"]), max(summary["trained_hops"])],
        "max_hops": deepest,
        "max_loops": min(loops, config.get("max_num_loops") or loops),  # a gate per loop sets a limit
        "chance": 1 / len(answers),
        "halting": halting_of(run, config["vocab_size"]),
    }


def halting_of(run: Run, vocab_size: int) -> dict:
    """The thresholds of KL + entropy that `looped halting` chose on validation rows; if it did not, the paper's.

    The paper's bound on entropy is scaled by ln V (arXiv 2604.07822 has V = 217). Unscaled, its 3 nats would be nearly
    the most that 27 words allow, and every answer would count as settled.
    """
    if run.has(HALTING):
        for row in run.read(HALTING):
            if row["measure"] == "chosen" and row["rule"] == "kl_entropy":
                return {name: row[name] for name in ("rule", "kl_threshold", "max_entropy")}
    return {"rule": "kl_entropy", "kl_threshold": 0.01, "max_entropy": entropy_bound(vocab_size)}
