"""The model card and the section of demo.json of a run on questions."""

import json
from collections.abc import Sequence

from huggingface_hub import EvalResult

from looplab.instruments.drawing import spread
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model
from looplab.runs.seeds import to_markdown
from looplab.tasks.card import Card, Names, between, loops_shown
from modeling_looped.generation_looped import CALIBRATED

from .ask import first_beyond, tokens_of, written
from .data import SequenceData
from .records import EVALUATION, GRADES
from .results import THRESHOLDS, WORDS, facts_of, lines_of, percent, shown
from .rows import load_questions

EXAMPLES = 8  # test questions in the demo
# Measure -> its name on the Hub, and for the reader.
METRICS = {"exact": ("exact_match", "Right answers"), "score": ("accuracy", "Score")}
MOST_LINES = 24  # of the card's table


class SequenceCard(Card):
    """The card of a model that answers questions."""

    Data = SequenceData
    template = "model_sequence.md"
    metrics = ("exact_match",)
    tags = ("question-answering",)

    def results(self, run: Run, names: Names) -> list[EvalResult]:
        """Right answers to test rows of trained grades, and of higher ones, at the chosen loop count."""
        facts = facts_of(run)
        metric, name = METRICS[facts["measure"]]
        parts = {"trained grades": facts["trained"], "higher grades": facts["beyond"]}
        return [
            self.result(
                run, names, metric, f"{name}, {part}, {facts['loops']} loops", round(value, 4),
                {"num_loops": facts["loops"], "grades": part},
            )
            for part, value in parts.items()
            if value is not None
        ]  # fmt: skip

    def values(self, run: Run) -> dict:
        """The values of `model_sequence.md` beyond `common_values`."""
        rows, facts, summary, evaluation = run.read(GRADES), facts_of(run), run.summary(), run.read(EVALUATION)
        splits, data = load_questions(run), SequenceData.of(run)
        question = first_beyond(splits["test"], summary["trained_grades"])
        number = splits["test"]["prompt"][:].index(question)
        shown_loops = loops_shown({row["loops"] for row in rows})
        grades = summary["trained_grades"]
        beyond = percent(facts["beyond"])
        second = (beyond, "of harder questions than any in training") if facts["beyond"] is not None else (
            shown(facts["reach"][0.9]), "is the highest grade answered at 90 %"
        )  # fmt: skip
        model, tokenizer = load_run_model(run, *shown_loops)
        reader = data.reader(tokenizer)
        said = {count: written(model, reader, tokens_of(reader, question), count)[0] for count in shown_loops}
        return {
            "numbers": [
                (percent(facts["trained"]), f"{WORDS[facts['measure']]} of trained grades, {facts['loops']} loops"),
                second,
                (f"{summary['parameters']:,}", "parameters"),
            ],
            "output": "\n".join(f"{count} {answer}" for count, answer in said.items()),
            "in_place": data.in_place,
            "chat": reader.name == "chat",
            "question": json_of(reader.asked(question)) if reader.name == "chat" else json_of(question),
            "answer": json_of(splits["test"]["answer"][number]),
            "loops_shown": shown_loops,
            "loops": facts["loops"],
            "measure": WORDS[facts["measure"]],
            "by": evaluation["by"],
            "chance": f"{100 * evaluation['chance']:.1f}",
            "grades_text": between(min(grades), max(grades)),
            "reach": " / ".join(shown(facts["reach"][threshold]) for threshold in THRESHOLDS),
            "table": grades_markdown(rows, facts["measure"], run.trained_loops()),
            "rows": f"{summary['rows']['train']:,}",
            "data_source": f"`{data.generator}`" if data.generator else "files of the user",
            "asked": one_line(reader.said(question)),
            "limit": evaluation["limit"],
            "limit_of": "rows of each grade and kind",
        }


def json_of(value) -> str:
    """A value as it is written in Python and JSON alike."""
    return json.dumps(value, ensure_ascii=False)


def one_line(text: str) -> str:
    """The beginning of a text, for a line of Markdown."""
    line = " ".join(text.replace("`", "'").split())
    return line if len(line) <= 80 else f"{line[:80]} ..."


def grades_markdown(rows: Sequence[dict], measure: str, trained_loops: tuple[int, int]) -> str:
    """The grid of the test rows as a Markdown table, in %: a line per grade and kind, a column per loop count."""
    test, (low, high) = lines_of(rows, "test"), trained_loops
    kinds, lines = any(kind for _, kind in test), []
    for grade, kind in spread(sorted(test), MOST_LINES):
        at = test[grade, kind]
        first = next(iter(at.values()))
        cell = {"grade": f"{grade}{'*' if first['trained'] else ''}"} | ({"kind": kind or "-"} if kinds else {})
        cell["n"] = str(first["n"])
        for count in loops_shown(set(at)):
            cell[f"[{count}]" if low <= count <= high else str(count)] = f"{100 * at[count][measure]:.1f}"
        lines.append(cell)
    return to_markdown(lines)


def sequence_part(run: Run, config: dict) -> dict:
    """The section of demo.json about a run, see `Task.demo_part`: questions of the split test, with their answers."""
    splits, data, summary = load_questions(run), SequenceData.of(run), run.summary()
    test, trained = splits["test"], set(summary["trained_grades"])
    order = sorted(range(len(test)), key=test["grade"][:].__getitem__)
    rows = [test[number] for number in spread(order, EXAMPLES)]
    examples = [
        {"prompt": row["prompt"], "answer": row["answer"], "grade": row["grade"], "trained": row["grade"] in trained}
        for row in rows
    ]
    rule = run.generation_settings().get(CALIBRATED)
    return {
        "text": f"A looped transformer of {summary['parameters']:,} parameters answers questions such as those in the "
        f"list; it was trained on grades {between(min(trained), max(trained))}, and runs as many loops as you say.",
        "examples": examples,
        "in_place": data.in_place,
        "chat": "messages" if data.messages else "prompts" if data.chat else None,
        "halting": rule or {"rule": "kl", "kl_threshold": 0.01},
        "halting_info": "chosen by looped halting --save" if rule else "not calibrated for this model",
    }
