"""Check a question by the words that a run's tokenizer has on file: a mistake is told before torch is imported."""

import json

from looplab.runs.folder import Run


def words_of(run: Run) -> dict[str, int]:
    """Word -> id in RUN/model/tokenizer.json, without special tokens; {} if the file is damaged, of which loading it
    will say more."""
    try:
        parts = json.loads((run.model_folder() / "tokenizer.json").read_text(encoding="utf-8"))
        special = {token["content"] for token in parts["added_tokens"]}
        return {word: number for word, number in parts["model"]["vocab"].items() if word not in special}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def check_question(run: Run, question: str) -> None:
    """Raise ValueError for a question that is empty, or has a word that the tokenizer does not know."""
    if not question.strip():
        raise ValueError('the question is empty: give an entity and relations, such as "e3 r1 r2", or leave it out.')
    known = words_of(run)
    unknown = [word for word in question.split() if word not in known]
    if known and unknown:
        like = " ".join(min((word for word in known if word[0] == letter), default="") for letter in "err").strip()
        raise ValueError(f"unknown words {unknown} in the question {question!r}; questions look like: {like}.")
