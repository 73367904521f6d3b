"""Conversations that no two are alike, and tokenizers whose templates write them out in several ways."""

import json
import random
from pathlib import Path

from data_builders import train_byte_bpe

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<eos>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Marks what is the assistant's: the content and the end of the turn.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<eos>' }}{% endgeneration %}{% else %}{{ message['content'] + '<eos>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Leaves out of earlier turns what comes before </think>, as reasoning models do.
FORGETS = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
)
WORDS = [
    "the",
    "a",
    "loop",
    "reads",
    "writes",
    "state",
    "token",
    "layer",
    "again",
    "of",
    "and",
    "then",
    "more",
    "deep",
    "café",
    "数",
]


def make_chats(count: int = 60, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 9))) + draw.choice(["", "?", ".\n\nSo: ", " "])

    chats = []
    for number in range(count):
        messages = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": f"{text()}{number}"}]
        chats.append({"messages": messages})
    return chats


def write_chats(path: Path, chats: list[dict]) -> str:
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return str(path)


def make_tokenizer(template: str | None = CHATML):
    tokenizer = train_byte_bpe([" ".join(WORDS) * 3], 300)
    tokenizer.chat_template = template
    return tokenizer
