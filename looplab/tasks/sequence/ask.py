"""`looped ask`: the answer that a model writes to one question, at several loop counts."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from data_builders.sequence_rows import Reader, check_known
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model, loops_to_try

from .data import SequenceData
from .rows import load_questions

LOOPS = (1, 2, 4, 8, 16)
BATCH = 64  # questions that are answered at once


def ask(run: Run, question: str | None = None, loops: Sequence[int] | None = None) -> None:
    """Print the answers to `question`, and the right one where the data have it.

    question: the first test row beyond the trained grades unless given; the hardest if there is none.

    Raises:
        ValueError: the question is empty, or has something in it that the tokenizer does not know.
    """
    if question is not None and not question.strip():
        raise ValueError("the question is empty: write one, or leave it out.")
    model, tokenizer = load_run_model(run, *(loops or ()))
    data, splits = SequenceData.of(run), load_questions(run)
    if question is None:
        question = first_beyond(splits["test"], run.summary()["trained_grades"])
    reader = data.reader(tokenizer)
    ids = tokens_of(reader, question)
    known = {
        row["answer"]: split for split in ("train", "validation", "test") for row in splits[split]
        if row["prompt"] == question
    }  # fmt: skip
    print(f"question  {reader.said(question)}")
    print(f"answer    {', '.join(f'{answer} ({split})' for answer, split in known.items()) or 'not in the data'}")
    print("loops     probability  answer")
    for num_loops in loops or loops_to_try(model, LOOPS):
        text, sure = written(model, reader, ids, num_loops)
        # Between words some tokenizers write one space, whatever the answer has there.
        verdict = "   right" if text.split() in map(str.split, known) else ""
        print(f"{num_loops:>5} {100 * sure:14.1f} %  {text}{verdict}".rstrip())


def tokens_of(reader: Reader, question: str) -> list[int]:
    """The tokens of a question as it is asked. Raises ValueError for what the tokenizer does not know."""
    try:
        return reader.question(question)
    except Exception:  # `tokenizers` raises plain Exceptions
        check_known(reader.tokenizer, [question])
        raise


@torch.inference_mode()
def written(model: PreTrainedModel, reader: Reader, ids: Sequence[int], num_loops: int) -> tuple[str, float]:
    """The answer that the model writes greedily to the tokens of a question, and its probability."""
    input_ids = torch.tensor([list(ids)], device=model.device)
    if reader.name == "in_place":
        logits = model(input_ids, num_loops=num_loops, use_cache=False).logits[0]  # (T, V)
        tokens = logits.argmax(-1)
    else:
        output = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), num_loops=num_loops, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        tokens, logits = output.sequences[0, len(ids) :], torch.stack(output.logits)[:, 0]
    sure = logits.float().log_softmax(-1).gather(1, tokens[:, None]).sum().exp()
    return reader.answer(tokens.tolist()), float(sure)


@torch.inference_mode()
def written_answers(
    model: PreTrainedModel, reader: Reader, questions: Sequence[Sequence[int]], num_loops: int
) -> list[str]:
    """The answers that the model writes to questions, in batches of one length, which need no padding."""
    by_length, answers = defaultdict(list), [""] * len(questions)
    for place, question in enumerate(questions):
        by_length[len(question)].append(place)
    for length, places in by_length.items():
        for start in range(0, len(places), BATCH):
            some = places[start : start + BATCH]
            ids = torch.tensor([list(questions[place]) for place in some], device=model.device)
            if reader.name == "in_place":
                tokens = model(ids, num_loops=num_loops, use_cache=False).logits.argmax(-1)
            else:
                mask = torch.ones_like(ids)
                output = model.generate(input_ids=ids, attention_mask=mask, num_loops=num_loops, do_sample=False)
                tokens = output[:, length:]
            for place, said in zip(some, tokens.tolist(), strict=True):
                answers[place] = reader.answer(said)
    return answers


def first_beyond(rows, trained: Sequence[int]) -> str:
    """The first prompt of the easiest grade that was not trained, or of the hardest if all were."""
    grades = rows["grade"][:]
    grade = min(set(grades) - set(trained), default=max(grades))
    return rows[grades.index(grade)]["prompt"]
