"""Time replies whose tokens enter on a guess (`draft_loops` of `generate_each`) against those of `generate`.

    python tests/time_drafts.py 5

Greedy replies of 30 tokens to the beginnings of ten molecules, by `molecules-51k` at its 8 loops. All sides write the
same tokens. They run in turn in one process; times are of its processor, so that other work of the machine counts
little.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from looplab.instruments.timing import cpu_seconds  # noqa: E402
from modeling_looped import LoopedForCausalLM  # noqa: E402

NEW_TOKENS = 30
COMMON = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    folder = ROOT / "models" / "molecules-51k"
    model, tokenizer = LoopedForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    lines = (ROOT / "docs" / "molecules" / "toys.smi").read_text().split("\n")
    prompts = [tokenizer(line.split()[0])["input_ids"][:6] for line in lines[:60:6]]

    def one_by_one(draft_loops: int) -> list[list[int]]:
        outputs = [model.generate(torch.tensor([ids]), draft_loops=draft_loops, **COMMON)[0] for ids in prompts]
        return [output[len(ids) :].tolist() for output, ids in zip(outputs, prompts, strict=True)]

    def together(rows: int, draft_loops: int | None) -> list[list[int]]:
        return [each.tokens for each in model.generate_each(prompts, max_rows=rows, draft_loops=draft_loops, **COMMON)]

    sides: dict[str, Callable[[], list]] = {f"generate, drafts {n}": lambda n=n: one_by_one(n) for n in (0, 4)}
    for rows in (1, 4, 16):
        for n in (None, 1, 2, 4):
            sides[f"{rows} at once, drafts {n or 0}"] = lambda rows=rows, n=n: together(rows, n)
    plain, *others = (side() for side in sides.values())
    assert all(other == plain for other in others)
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(cpu_seconds(side))
    first = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratios = [before / after for before, after in zip(first, times, strict=True)]
        milliseconds = 1000 * median(times) / NEW_TOKENS / len(prompts)
        print(
            f"{name:<24}{milliseconds:6.2f} ms a token  {median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
