"""What the backward pass of chunks needs of the cache: the entries of every chunk are kept once.

    chunk i, one layer call   attends to the entries of chunks 0 .. i, (B, K, S + C, d), joined into one tensor
    autograd would keep       that tensor, for every chunk, layer and loop: memory that grows with the square of T
    kept here                 the entries of this chunk, and the parts of the earlier ones, which all calls share

The backward pass joins the parts again, to the same numbers. What attention keeps in another form stays as it is: the
weights of eager attention, and entries under a sliding window, which bounds them.

Legend: B batch rows, K key-value heads, H query heads, S tokens of earlier chunks, C tokens of this one, d head size.
"""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, final

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.cache_utils import Cache

from .cache_layers_looped import readable, recent_entries


class Joined(NamedTuple):
    """Stands for keys or values (B, H, S + C, d): parts (B, K, C, d) to join, each head `repeats` = H / K times."""

    parts: list[torch.Tensor]
    repeats: int
    dtype: torch.dtype

    def join(self) -> torch.Tensor:
        """The keys or values."""
        whole = torch.cat(self.parts, dim=2).to(self.dtype)
        return whole if self.repeats == 1 else whole.repeat_interleave(self.repeats, dim=1)


@final
class SavedEntries:
    """Keeps the entries of chunks that run through `cache` once.

    Args:
        cache: an empty one.
    """

    def __init__(self, cache: Cache):
        self.cache = cache
        self.parts: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}  # slot -> keys, values of each chunk
        self.seen = 0  # S
        self.mask: torch.Tensor | None = None  # that attention kept last

    def note(self, num_tokens: int) -> None:
        """The cache has got the entries of so many tokens, a chunk."""
        for slot, layer in enumerate(self.cache.layers):
            if layer.is_initialized:
                keys, values = self.parts.setdefault(slot, ([], []))
                recent = recent_entries(readable(self.cache, slot), num_tokens)
                for parts, entries in zip((keys, values), recent, strict=True):
                    parts.append(entries.detach().clone())
        self.seen += num_tokens
        self.mask = None

    def kept(self) -> AbstractContextManager:
        """Within the block, in which the next chunk runs, autograd keeps parts."""
        return saved_tensors_hooks(self._pack, lambda kept: kept.join() if isinstance(kept, Joined) else kept)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Joined:
        if tensor.ndim != 4 or self.seen == 0:
            return tensor
        if tensor.shape[2] > self.seen:
            return self._joined(tensor)
        if tensor.shape[3] > self.seen and tensor.is_cpu:  # every layer call makes its own copy of the mask
            if self.mask is not None and self.mask.shape == tensor.shape and self.mask.equal(tensor):
                return self.mask
            self.mask = tensor
        return tensor

    def _joined(self, tensor: torch.Tensor) -> torch.Tensor | Joined:
        """The parts of keys or values; the tensor itself if it is something else."""
        for is_of in (is_the_same, has_the_same_heads):
            for slot, (keys, values) in self.parts.items():
                layer: Any = self.cache.layers[slot]
                for whole, parts in ((layer.keys, keys), (layer.values, values)):
                    if is_of(tensor, whole):
                        own = whole[:, :, self.seen :].detach().clone()
                        return Joined([*parts, own], tensor.shape[1] // whole.shape[1], tensor.dtype)
        return tensor


def is_the_same(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether both are one place in memory."""
    return tensor.data_ptr() == whole.data_ptr() and tensor.shape == whole.shape and tensor.dtype == whole.dtype


def has_the_same_heads(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether `tensor` (B, H, S + C, d) has each head of `whole` (B, K, S + C, d) H / K times, in any precision.

    Numbers are compared on a CPU alone: an accelerator would have to wait for them.
    """
    heads, key_heads = tensor.shape[1], whole.shape[1]
    if not tensor.is_cpu or heads % key_heads or tensor.shape[2] != whole.shape[2]:
        return False
    repeated, whole = tensor.unflatten(1, (key_heads, heads // key_heads)), whole.to(tensor.dtype)
    return all(repeated[:, :, i].equal(whole) for i in range(heads // key_heads))
