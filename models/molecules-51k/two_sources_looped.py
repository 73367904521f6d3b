"""Keys from two sources: a token sees what earlier tokens left in the first pass, and its own current entry.

That is what token-by-token decoding does where only the first pass over a token writes to the cache, done for all
tokens of a call at once. Source: arXiv 2605.23872, whose prefill differs (`prefill="iterated"` in `frozen_looped.py`).

Legend: B batch rows, T tokens of a call, S cached tokens and these T, H key-value heads, d head size.
"""

import torch
from transformers.cache_utils import Cache, StaticLayer


def own_columns(cache: Cache | None, slot: int, keys: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(T,), where the entries of a call are among the keys (B, H, S, d) that it attended to, and has written."""
    end = keys.shape[-2]
    written = None if cache is None else cache.layers[slot]
    if isinstance(written, StaticLayer) and keys is written.keys:  # the whole buffer, filled or not
        end = torch.as_tensor(written.get_seq_length(), device=keys.device).clamp(max=end)
    return torch.arange(num_tokens, device=keys.device) + (end - num_tokens)


def two_sources(
    natural: tuple[torch.Tensor, torch.Tensor], current: tuple[torch.Tensor, torch.Tensor], columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first pass, (B, H, S, d) each, and the current ones, (B, H, T, d) -> what is attended to.

    For one token that is (B, H, S, d), the current entry in the place of the old one; for several (B, H, S + T, d).
    """
    if len(columns) == 1:
        return replaced(natural, current, columns)
    keys, values = (torch.cat(pair, dim=-2) for pair in zip(natural, current, strict=True))
    return keys, values


def replaced(natural, current, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, H, S, d), with the entries at `columns` (T,) replaced by the current ones (B, H, T, d)."""
    keys, values = (old.index_copy(-2, columns, new) for old, new in zip(natural, current, strict=True))
    return keys, values


def two_source_mask(mask: torch.Tensor | None, columns: torch.Tensor, num_keys: int) -> torch.Tensor | None:
    """The mask of a call, (B or 1, heads or 1, T, S), made one for `two_sources`: (..., T, S + T) for several tokens.

    num_keys: S.
    """
    num_tokens = len(columns)
    if num_tokens == 1:
        return mask
    if mask is None:  # sdpa's own causal mask: the keys of this call, then the empty entries of a static cache
        mask = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=columns.device).tril()[None, None]
    own = torch.eye(num_tokens, dtype=torch.bool, device=columns.device).expand(*mask.shape[:-1], num_tokens)
    lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    if mask.dtype != torch.bool:
        own = torch.zeros_like(own, dtype=mask.dtype).masked_fill(~own, lowest)
    earlier = mask.clone()
    earlier[..., torch.arange(num_tokens, device=columns.device), columns] = lowest
    return torch.cat([earlier, own], dim=-1)


class FirstPass:
    """Stands in for the cache of a layer in the first pass: it writes through, and keeps what was attended to."""

    keys: torch.Tensor  # (B, H, S, d)
    values: torch.Tensor

    def __init__(self, cache: Cache | None):
        self.cache = cache

    def update(self, keys, values, slot: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, T, d) -> (B, H, S, d)."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, slot, *args, **kwargs)
        self.keys, self.values = keys, values
        return keys, values


class LaterPass:
    """Stands in for the cache of a layer in a later pass, which writes nothing. See `two_sources`."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor):
        self.keys, self.values, self.columns = keys, values, columns

    def update(self, keys, values, slot: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, T, d) -> (B, H, S, d) for one token, (B, H, S + T, d) for several."""
        return two_sources((self.keys, self.values), (keys, values), self.columns)
