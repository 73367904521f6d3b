"""What a model says to rows whose answers it is shown as it goes: right tokens, right answers, and their loss.

A greedy answer is right if and only if, with the right answer before it, every token of it is the likeliest, the
end-of-text token included. One forward pass over prompt and answer therefore tells at all loop counts (`at_loops`)
whether `generate` would write the answer. This is so where tokens of one call see each other as tokens of successive
calls do: everywhere but under KV policies that rewrite their entries (`Sharing.rewrites`). There the same tokens are
decoded one by one, with the cache.

Legend: N rows, T tokens of a row, K labels of an answer.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from data_builders import EncodedRows
from data_builders.packing import IGNORED
from looplab.instruments.at_loops import at_loops

TOKENS = 4096  # of a forward pass


@dataclass(frozen=True)
class Said:
    """Answers to N rows at one loop count; every tensor is (N,).

    Args:
        right: tokens of the answer that are right.
        labels: tokens of the answer.
        loss: nats, summed over them.
    """

    right: torch.Tensor
    labels: torch.Tensor
    loss: torch.Tensor

    @property
    def exact(self) -> torch.Tensor:
        """(N,) bool, whether the whole answer is right."""
        return self.right == self.labels


def decodes(model: PreTrainedModel) -> bool:
    """Whether answers have to be decoded token by token to know what the model would say."""
    return model.model.sharing.rewrites and model.config.prefill_chunk != 1


def said_at(
    model: PreTrainedModel,
    rows: EncodedRows,
    numbers: Sequence[int],
    loops: Collection[int],
    *,
    one_pass: bool | None = None,
    bar: tqdm | None = None,
) -> dict[int, Said]:
    """Loop count -> what the model says to the rows `numbers` (N,), in their order.

    one_pass: read all tokens of an answer from one pass, although `decodes(model)`.
    """
    counts, numbers = sorted(set(loops)), list(map(int, numbers))
    read = decoded_batch if decodes(model) and not one_pass else read_batch
    place = {number: index for index, number in enumerate(numbers)}
    found = torch.zeros(len(counts), 3, len(numbers), dtype=torch.float64)
    for batch in rows.by_length(numbers, TOKENS):
        at = torch.tensor([place[number] for number in batch])
        for index, values in enumerate(read(model, rows, batch, counts)):
            found[index, :, at] = values.double().cpu()
        if bar is not None:
            bar.update(len(batch))
    return {count: Said(*values) for count, values in zip(counts, found, strict=True)}


@torch.no_grad()
def read_batch(
    model: PreTrainedModel, rows: EncodedRows, batch: Sequence[int], counts: Sequence[int]
) -> list[torch.Tensor]:
    """right, labels and loss (3, b) of rows of one length, at every loop count, from one pass."""
    inputs = {name: value.to(model.device) for name, value in rows.stacked(batch).items()}
    if model.model.pattern.tells_prompts:
        types = torch.from_numpy(np.stack([rows.types(number) for number in batch]))
        inputs["token_type_ids"] = types.to(model.device)
    labels = inputs.pop("shift_labels")
    labels = labels[:, int(rows.firsts[batch].min()) :]  # (b, K)
    real = labels != IGNORED

    def read(logits: torch.Tensor) -> torch.Tensor:  # (b, K, V)
        each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")  # 0 where ignored
        right = (logits.argmax(-1) == labels) & real
        return torch.stack([right.sum(1), real.sum(1), each.view_as(labels).sum(1)])

    return list(at_loops(model, counts, read, logits_to_keep=labels.shape[1], **inputs).values())


@dataclass(frozen=True)
class Decoded:
    """Answers decoded token by token; every tensor is (b, K).

    Args:
        said: the likeliest token.
        loss: nats of the right one.
        loops: of the token.
    """

    said: torch.Tensor
    loss: torch.Tensor
    loops: torch.Tensor


@torch.no_grad()
def decode_answers(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, num_loops: int, halting: dict | None = None
) -> Decoded:
    """Decode as `generate` does, with the right tokens (b, K) put in place of those that the model would say: the
    prompt in one call, then a token per call.

    input_ids: (b, T), of which the first T - K + 1 are the prompt.
    """
    cache, length = DynamicCache(), labels.shape[1]
    call = {"past_key_values": cache, "use_cache": True, "num_loops": num_loops, "halting": halting}
    start, steps = input_ids.shape[1] - length + 1, []
    for step in range(length):
        part = input_ids[:, :start] if step == 0 else input_ids[:, start + step - 1 : start + step]
        output = model(part, logits_to_keep=1, **call)
        logits = output.logits[:, -1].float()
        loss = F.cross_entropy(logits, labels[:, step], reduction="none")
        steps.append((logits.argmax(-1), loss, output.loops_used[:, -1]))
    return Decoded(*(torch.stack(part, dim=1) for part in zip(*steps, strict=True)))


def decoded_batch(
    model: PreTrainedModel, rows: EncodedRows, batch: Sequence[int], counts: Sequence[int]
) -> list[torch.Tensor]:
    """As `read_batch`, decoded token by token."""
    found = torch.zeros(len(counts), 3, len(batch))
    for first, members in same_first(rows, batch):
        inputs = rows.stacked([batch[member] for member in members])
        ids, labels = inputs["input_ids"].to(model.device), inputs["shift_labels"][:, first:].to(model.device)
        for index, count in enumerate(counts):
            done = decode_answers(model, ids, labels, count)
            right = (done.said == labels).sum(1)
            found[index, :, members] = torch.stack(
                [right.cpu(), torch.full(right.shape, labels.shape[1]), done.loss.sum(1).cpu()]
            ).float()
    return list(found)


def same_first(rows: EncodedRows, batch: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    """(where the answer begins, places in `batch` of the rows whose answer begins there), of rows of one length."""
    firsts = rows.firsts[batch]
    return [(int(first), torch.from_numpy(np.flatnonzero(firsts == first))) for first in np.unique(firsts)]
