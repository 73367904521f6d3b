"""`looped ask`: a model's answer to one question at several loop counts."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from looplab.runs.folder import Run
from looplab.runs.models import load_run_model

from .rows import facts_of_task, first_question_beyond, load_run_task

LOOPS = (1, 2, 4, 8, 16)


def true_path(facts: dict[str, dict[str, str]], question: str) -> list[str] | None:
    """The entities along the chain of `question`, by the facts (see `facts_of_task`); None if a fact is missing."""
    entity, *relations = question.split()
    path = [entity]
    for relation in relations:
        if relation not in facts.get(path[-1], {}):
            return None
        path.append(facts[path[-1]][relation])
    return path


def ask(run: Run, question: str | None = None, loops: Sequence[int] | None = None) -> None:
    """Print the generated answer to `question` ("e3 r1 r2") at several loop counts, and the true chain.

    Without a question, `first_question_beyond` chooses one of the split test.

    question: one that `questions.check_question` has passed.
    """
    loops = LOOPS if loops is None else loops
    model, tokenizer = load_run_model(run, *loops)
    task = load_run_task(run)
    question = first_question_beyond(task["test"], run.summary()["trained_hops"]) if question is None else question
    words = question.split()
    path = true_path(facts_of_task(task), question)
    print(f"question  {question}")
    if path is None:
        print("chain     not in the graph: the question is an entity followed by relations it has")
    else:
        steps = "".join(f" -{relation}-> {entity}" for relation, entity in zip(words[1:], path[1:], strict=True))
        print(f"chain     {path[0]}{steps}   ({len(path) - 1} hops)")
    print("loops     answer   probability")
    inputs = tokenizer(question, return_tensors="pt").to(model.device)
    for num_loops in loops:
        answer, probability = generate_answer(model, inputs, num_loops)
        word = tokenizer.decode(answer)
        place = "" if path is None or word not in path else "correct" if word == path[-1] else on_the_way(path, word)
        print(f"{num_loops:>5}     {word:<8} {100 * probability:10.1f} %   {place}".rstrip())


def on_the_way(path: list[str], word: str) -> str:
    """Says at which hop of the true path the answered `word` lies."""
    return f"(the chain after {path.index(word)} of {len(path) - 1} hops)"


@torch.inference_mode()
def generate_answer(model: PreTrainedModel, inputs: dict, num_loops: int) -> tuple[int, float]:
    """(id, probability) of the one generated token."""
    output = model.generate(
        **inputs,
        num_loops=num_loops,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    token = int(output.sequences[0, -1])
    return token, float(output.logits[0][0].softmax(-1)[token])
