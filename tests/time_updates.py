"""Time an update of a recipe as it trains, against the same update without what makes it faster.

    python tests/time_updates.py hyperloop/small_looped 7 [--precision bf16]

    as it was     torch's Muon, layers and loss run eagerly, attention in the precision of the training
    + Muon        looplab/training/muon.py
    + attention   in float32 where heads are short, see `SlotAttention.is_slow_in_bfloat16`
    + compiled    layers and loss, as `compile: true` does

Rows are random tokens in the shape of the recipe's: hops of 8 relations, blocks of text, two molecules a sequence. All
run in turn in one process; times are of its processor, so that other work of the machine counts little.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[1])]

import torch  # noqa: E402
from transformers import AttentionInterface  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402

from looplab.training.objectives import LabelLoss  # noqa: E402
from looplab.training.optimizers import build_optimizers  # noqa: E402
from looplab.training.recipe import Recipe, read_recipe  # noqa: E402
from modeling_looped import LoopedConfig, LoopedForCausalLM  # noqa: E402

# sdpa under a name for which attention keeps its precision.
AS_IT_WAS = "sdpa_as_it_was"
AttentionInterface.register(AS_IT_WAS, sdpa_attention_forward)
AttentionMaskInterface.register(AS_IT_WAS, sdpa_mask)

VARIANTS = {
    "as it was": {},
    "+ Muon": {"muon": True},
    "+ attention": {"muon": True, "attention": True},
    "+ compiled": {"muon": True, "attention": True, "compiled": True},
}


def batch_of(recipe: Recipe, vocabulary: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
    """Inputs (b, T), labels (b, K), and `logits_to_keep`, K or 0 for all."""
    draw = torch.Generator().manual_seed(0)
    reads_one = recipe.data.task in ("khop", "composition")
    length = 9 if reads_one else recipe.data.sequence_length
    packed = recipe.data.task == "molecules"
    rows = recipe.batch_size // 2 if packed else recipe.batch_size
    ids = torch.randint(3, vocabulary, (rows, length), generator=draw)
    labels = torch.randint(3, vocabulary, (rows, 1 if reads_one else length), generator=draw)
    inputs = {"input_ids": ids}
    if packed:
        inputs["position_ids"] = (torch.arange(length) % ((length + 1) // 2)).repeat(rows, 1)
    return inputs, labels, int(reads_one)


def update_of(recipe: Recipe, muon=False, attention=False, compiled=False) -> Callable[[], None]:
    """A call that makes one update of a fresh model of the recipe."""
    vocabulary = 2048 if recipe.data.task == "text" else 64
    torch.manual_seed(0)
    model = LoopedForCausalLM(LoopedConfig(**({"vocab_size": vocabulary} | recipe.model))).train()
    if not attention:
        model.set_attn_implementation(AS_IT_WAS)
    optimizers = build_optimizers(model, recipe.optim)
    if not muon:
        optimizers = [stock(optimizer) for optimizer in optimizers]
    recipe.compile = compiled
    for piece in model.model.pieces() if compiled else ():
        piece.compile()
    inputs, labels, kept = batch_of(recipe, vocabulary)
    loss, loops = LabelLoss(recipe, kept), round(recipe.depth.sampler(0).expected)

    def update() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            total = loss(model, inputs, labels, loops, 0.0)
        (total / labels.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return update


def stock(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """torch's Muon in the place of ours."""
    if not isinstance(optimizer, torch.optim.Muon):
        return optimizer
    (group,) = optimizer.param_groups
    return torch.optim.Muon(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("rounds", type=int, nargs="?", default=7)
    arguments, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    updates, times = {}, {}
    for name, settings in VARIANTS.items():
        update = updates[name] = update_of(read_recipe(arguments.recipe, flags), **settings)
        start = time.process_time()
        update()
        times[name] = []
        print(f"{name:<12} first update {time.process_time() - start:6.1f} s", flush=True)
        update()
    for _ in range(arguments.rounds):
        for name, update in updates.items():
            start = time.process_time()
            update()
            times[name].append(time.process_time() - start)
    first = times["as it was"]
    for name, own in times.items():
        ratios = [before / now for before, now in zip(first, own, strict=True)]
        print(f"{name:<12}{1e3 * median(own):8.1f} ms   x{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")


if __name__ == "__main__":
    main()
