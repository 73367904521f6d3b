"""Batches of the hop tasks. A batch has one hop count, hence one length, and one loop count.

    num_loops = depth(step)                                    the same on every rank
    hops      = one hop count, drawn in proportion to its rows
    rows      = the next rows in the shuffled epochs of that hop count; each rank takes a contiguous share

Every draw is a pure function of (seed, step), so that a resumed training sees the same batches.
Legend: N rows, b batch rows of one rank, T tokens.
"""

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .depth import DepthSampler
from .epochs import GroupedEpochs, check_share
from .hop_rows import hop_table


def encode_hops(
    split: Dataset, tokenizer: PreTrainedTokenizerBase, hops: list[int] | None = None
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Hop count -> (input_ids (N, T) long, answers (N,) long), for the hop counts `hops`, or for all.

    The answer is read at the last column of input_ids. The ids are the same as from the tokenizer row by row, and come
    many times faster. Raises ValueError for an unknown word, and as `hop_table`.
    """
    table = hop_table(split)
    if hops is not None:
        table = table.filter(pc.is_in(table["hops"], pa.array(hops, table["hops"].type)))
    return {group[0]: rows for group, rows in _encode(table, tokenizer, ["hops"]).items()}


def encode_groups(
    split: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """(hops, split_kind) -> (input_ids (N, T), answers (N,)), as `encode_hops`: results are told by these groups."""
    return _encode(hop_table(split, ["split_kind"]), tokenizer, ["hops", "split_kind"])


def encode_rows(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The split with columns input_ids (T,) and shift_labels (1,), for stock Trainer with `LoopCollator`.

    Raises ValueError as `encode_hops`.
    """
    encode_hops(split, tokenizer)  # its errors name the row and the column

    def encode(batch: dict) -> dict:
        answers = tokenizer.convert_tokens_to_ids(batch["answer"])
        return {"input_ids": tokenizer(batch["text"])["input_ids"], "shift_labels": [[answer] for answer in answers]}

    return split.map(encode, batched=True)


def _encode(table: pa.Table, tokenizer: PreTrainedTokenizerBase, columns: list[str]) -> dict[tuple, tuple]:
    # The tokenizer's template appends this to every row: the readout token, or nothing.
    readout = torch.tensor(tokenizer("")["input_ids"], dtype=torch.long)
    groups = {}
    for key in table.group_by(columns).aggregate([]).sort_by([(name, "ascending") for name in columns]).to_pylist():
        chosen = [pc.equal(table[name], key[name]) for name in columns]
        rows = table.filter(chosen[0] if len(chosen) == 1 else pc.and_(*chosen))
        words = _token_ids(pc.list_flatten(pc.utf8_split_whitespace(rows["text"])), tokenizer)
        input_ids = torch.cat([words.view(len(rows), -1), readout.expand(len(rows), -1)], dim=1)  # (N, T)
        groups[tuple(key[name] for name in columns)] = input_ids, _token_ids(rows["answer"], tokenizer)
    return groups


def _token_ids(words: pa.ChunkedArray, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Ids (M,) of words: each distinct word is looked up once."""
    coded = words.combine_chunks().dictionary_encode()
    vocabulary = tokenizer.get_vocab()
    distinct = [vocabulary.get(word) for word in coded.dictionary.to_pylist()]
    if None in distinct:
        unknown = coded.dictionary[distinct.index(None)]
        raise ValueError(f"the tokenizer has no token for '{unknown}': it was made for another graph.")
    return torch.tensor(distinct)[torch.from_numpy(coded.indices.to_numpy().astype(np.int64))]


class HopBatches(torch.utils.data.Dataset):
    """Batches of one hop count and one loop count; item `step` is this rank's share of the *global* batch `step`:

        {"input_ids": (b, T) long, "shift_labels": (b, 1) long, "logits_to_keep": 1, "num_loops": int, "hops": int}

    An item is a pure function of (seed, step): a resumed training sees the same batches, and `world` ranks together
    see the batches that one would. Within a hop count the rows come in shuffled epochs, each row once per epoch. There
    is no last item: index the object, or use a DataLoader with `batch_size=None, sampler=range(start, stop)`.

    split: rows with the columns text, answer, hops. batch_size: rows of the global batch. depth: draws `num_loops`.
    hops: the hop counts to draw from, all by default. weighting: hop counts are drawn in proportion to their "rows",
    or "uniform". at_least_hops: raise `num_loops` to the batch's hop count where it is smaller. (The paper draws the
    two independently, and so asks a core that follows one relation per loop for answers that it cannot reach.)
    pad_to: fill rows up to this length with copies of the readout token, masked by "attention_mask", before the
    readout token that is read. The answers stay the same; the work is that of the paper's code, which pads to 50.

    Raises ValueError for a batch size that does not divide, a hop count without rows, or rows longer than pad_to.
    """

    def __init__(
        self,
        split: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int,
        depth: DepthSampler,
        hops: list[int] | None = None,
        rank: int = 0,
        world: int = 1,
        weighting: Literal["rows", "uniform"] = "rows",
        at_least_hops: bool = False,
        pad_to: int | None = None,
    ):
        check_share(batch_size, rank, world)
        if weighting not in ("rows", "uniform"):
            raise ValueError(f"weighting must be rows or uniform, got {weighting!r}.")
        self._split, self._rows = split, encode_hops(split, tokenizer, hops)
        missing = sorted(set(hops or []) - set(self._rows))
        if missing or not self._rows:
            raise ValueError(f"the split has no rows of {missing or 'any'} hops; it has {sorted(set(split['hops']))}.")
        self.hops = list(self._rows)
        longest = max(input_ids.shape[1] for input_ids, _ in self._rows.values())
        if pad_to is not None and (pad_to < longest or not tokenizer("")["input_ids"]):
            raise ValueError(
                f"pad_to must be at least {longest}, the longest row, and needs a readout token; got {pad_to}."
            )
        self.pad_to = pad_to
        self.num_rows = {k: len(answers) for k, (_, answers) in self._rows.items()}
        self.batch_size, self.seed, self.depth, self.rank, self.world = batch_size, seed, depth, rank, world
        self.at_least_hops = at_least_hops
        weights = [self.num_rows[k] if weighting == "rows" else 1 for k in self.hops]
        self._epochs = GroupedEpochs(
            self.num_rows, weights, batch_size, seed, groups="hops of steps", rows="rows of epochs"
        )

    def chosen(self, step: int) -> np.ndarray:
        """Numbers (batch_size,) in the split of the rows of the global batch `step`."""
        k, chosen = self._epochs.batch(step)
        return np.flatnonzero(np.array(self._split["hops"]) == k)[chosen]

    def __getitem__(self, step: int) -> dict:
        if step < 0:
            raise IndexError(f"step must be >= 0, got {step}.")
        k, chosen = self._epochs.batch(step, self.rank, self.world)
        input_ids, answers = self._rows[k]
        batch = {
            # Four times as fast as input_ids[chosen].
            "input_ids": input_ids.index_select(0, chosen),
            "shift_labels": answers.index_select(0, chosen)[:, None],
            "logits_to_keep": 1,
            "num_loops": max(self.depth(step), k if self.at_least_hops else 1),
            "hops": k,
        }
        return batch if self.pad_to is None else batch | pad_rows(batch["input_ids"], self.pad_to)


def pad_rows(input_ids: torch.Tensor, length: int) -> dict:
    """Rows (b, T), padded to `length` with copies of their last token, the readout token, masked but for the last."""
    num_copies = length - input_ids.shape[1]
    mask = torch.ones(len(input_ids), length, dtype=torch.long)
    mask[:, input_ids.shape[1] - 1 : -1] = 0
    return {"input_ids": torch.cat([input_ids, input_ids[:, -1:].expand(-1, num_copies)], 1), "attention_mask": mask}
