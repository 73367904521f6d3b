"""Keys and values of requests that are at different loops, and how their tokens attend to them.

A cell is a token that loops now: a batch row of one token for the layers, whose attention alone knows to which request
it belongs. A page holds the entries of one request in one slot, in every layer of a section:

    short   contexts of at most SHORT[-1] tokens lie in pools that all requests share: one gather reads the pages of
            all cells. At such lengths it costs less than a call per request
    long    longer contexts lie in tensors of the request's own, twice as long as needed, but never longer than the
            request may get: a call per request reads views of them, and no context is copied

Legend: N cells, b requests, T tokens of one of them, S tokens that are read, K key-value heads, d head size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .layers_looped import SlotAttention

SHORT = (32, 128)  # tokens of a page, of each pool


def page_capacity(num_tokens: int) -> int:
    """Tokens that a page has room for which is made for so many."""
    fits = [capacity for capacity in SHORT if num_tokens <= capacity]
    return fits[0] if fits else -(-num_tokens // SHORT[-1]) * SHORT[-1]


@final
class Pool:
    """Short pages of all requests: a tensor (pages, capacity, 2, K, d) per layer, longer by a quarter when it is full.

    Args:
        num_layers: of the section.
        capacity: tokens of a page.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.num_layers, self.capacity = num_layers, capacity
        self.clear()

    def clear(self) -> None:
        """Free the memory, when nobody has a page."""
        self.tensors: list[torch.Tensor | None] = [None] * self.num_layers
        self.num_pages, self.free = 0, []

    def take(self, count: int) -> list[int]:
        """Pages that nobody has, filled with zeros: what was never written is read as well, with a weight of 0, which
        does not hide the infinities that an earlier request may have left."""
        if len(self.free) < count:
            more = max(self.num_pages // 4, count)
            self.free = [*range(self.num_pages, self.num_pages + more), *self.free]
            self.num_pages += more
        taken = self.free[len(self.free) - count :]
        del self.free[len(self.free) - count :]
        for tensor in filter(torch.is_tensor, self.tensors):
            tensor[[page for page in taken if page < len(tensor)]] = 0  # `of_layer` makes the others
        return taken

    def of_layer(self, layer: int, entries: torch.Tensor) -> torch.Tensor:
        """The (pages, capacity, 2, K, d) of a layer whose entries are like these (N, 2, K, d)."""
        tensor = self.tensors[layer]
        if tensor is None or len(tensor) < self.num_pages:
            grown = entries.new_zeros(self.num_pages, self.capacity, *entries.shape[1:])
            if tensor is not None:
                grown[: len(tensor)] = tensor
            self.tensors[layer] = tensor = grown
        return tensor


@final
class Pages:
    """The pages of one request in one section.

    Args:
        pools: of the section, the smallest capacity first.
        count: how many pages.
        most: the most tokens that the request may have.

    Attributes:
        pool: which pool they are in, and `short` their numbers in it, while the context is short.
        long: of each layer, (count, 2, K, capacity, d), from then on; None before the first entry.
    """

    def __init__(self, pools: Sequence[Pool], count: int, most: int):
        self.pools, self.count, self.most, self.capacity = pools, count, most, 0
        self.pool: Pool | None = None
        self.short: list[int] = []
        self.long: list[torch.Tensor | None] = []

    def make_room(self, num_tokens: int) -> None:
        """Have room for a context of so many tokens."""
        if num_tokens <= self.capacity:
            return
        olds, used = self.long or self._of_pool(), self.capacity  # copies, (count, 2, K, tokens, d) each
        self.release()
        self.pool = next((pool for pool in self.pools if num_tokens <= pool.capacity), None)
        if self.pool is None:
            self.capacity = min(page_capacity(self.most), page_capacity(2 * num_tokens))
            self.long = [None if old is None else self._grown(old) for old in olds]
        else:
            self.capacity, self.short = self.pool.capacity, self.pool.take(self.count)
            for layer, old in enumerate(olds):
                if old is not None:
                    entries = old.permute(0, 3, 1, 2, 4)  # (count, tokens, 2, K, d)
                    self.pool.of_layer(layer, entries.flatten(0, 1))[self.short, :used] = entries

    def release(self) -> None:
        """Give everything back."""
        if self.pool is not None:
            self.pool.free += self.short
        self.pool, self.short, self.long, self.capacity = None, [], [], 0

    def of_layer(self, layer: int, entries: torch.Tensor) -> torch.Tensor:
        """The (count, 2, K, capacity, d) of a layer whose entries are like these (T, 2, K, d)."""
        tensor = self.long[layer]
        if tensor is None:
            _, two, heads, size = entries.shape
            self.long[layer] = tensor = entries.new_zeros(self.count, two, heads, self.capacity, size)
        return tensor

    def _of_pool(self) -> list[torch.Tensor | None]:
        if self.pool is None:
            return [None] * self.pools[0].num_layers
        return [None if each is None else each[self.short].permute(0, 2, 3, 1, 4) for each in self.pool.tensors]

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        new = old.new_zeros(*old.shape[:3], self.capacity, old.shape[4])
        new[:, :, :, : old.shape[3]] = old
        return new


@final
@dataclass(frozen=True)
class Span:
    """Cells of one request: tokens one after the other, at one loop.

    Args:
        pages: of the request.
        page: which of them the loop reads and writes.
        start: tokens of the request before these.
        length: T.
        writes: whether the loop writes; under `natural` only the first does.
    """

    pages: Pages
    page: int
    start: int
    length: int
    writes: bool = True


@final
@dataclass(frozen=True)
class Sight:
    """What a token sees of its own request.

    Args:
        window: itself and so many tokens before it, less one; None for all of them.
        own_apart: its own entry is the current one, which no page holds (`natural`).
        dtype: of the mask.
    """

    window: int | None
    own_apart: bool
    dtype: torch.dtype

    def mask(self, places: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Of tokens at `places` (b, T), what they see of entries at `columns` (S,): (b, 1, T, S), or with the current
        entries behind them (b, 1, T, S + T)."""
        places = places.unsqueeze(-1)
        seen = columns < places if self.own_apart else columns <= places
        if self.window is not None:
            seen = seen & (columns > places - self.window)
        if self.own_apart:
            num_tokens = places.shape[1]
            own = torch.eye(num_tokens, dtype=torch.bool, device=places.device)
            seen = torch.cat([seen, own.expand(len(seen), -1, -1)], dim=-1)
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=places.device)
        return mask.masked_fill_(~seen, torch.finfo(self.dtype).min).unsqueeze(1)


def attend(attention: SlotAttention, query, keys, values, mask) -> torch.Tensor:
    """(b, H, T, d), (b, K, S, d) twice and a mask (b, 1, T, S) or None -> (b, T, H, d)."""
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation,  # pyright: ignore[reportArgumentType]
        eager_attention_forward,
    )
    return interface(attention, query, keys, values, mask, dropout=0.0, scaling=attention.scaling)[0]


@final
class ShortSpans:
    """Cells of requests whose contexts are short, read by one gather.

    Args:
        spans: of the requests, all in one pool.
        cells: (n,), which of the N cells they are; None for all.
    """

    def __init__(self, spans: Sequence[Span], cells: torch.Tensor | None, sight: Sight, device: torch.device):
        pool = spans[0].pages.pool
        assert pool is not None
        self.cells, self.sight, self.pool = cells, sight, pool
        pages = [span.pages.short[span.page] for span in spans]
        self.pages = torch.tensor(pages, device=device)  # (b,)
        self.num_tokens = max(span.length for span in spans)  # T
        self.num_read = max(span.start + span.length for span in spans)  # S
        both = list(zip(pages, spans, strict=True))
        where = [page * pool.capacity + span.start + t for page, span in both for t in range(span.length)]
        self.where = torch.tensor(where, device=device)  # (n,) in the flattened pool
        writing = [span.writes for span in spans for _ in range(span.length)]
        self.writing = None if all(writing) else torch.tensor(writing, device=device)
        starts = torch.tensor([span.start for span in spans], device=device)
        places = starts.unsqueeze(1) + torch.arange(self.num_tokens, device=device)
        self.mask = sight.mask(places.clamp_max(self.num_read - 1), torch.arange(self.num_read, device=device))
        if self.num_tokens > 1:  # where each cell is among (b, T)
            grid = [b * self.num_tokens + t for b, span in enumerate(spans) for t in range(span.length)]
            self.grid = torch.tensor(grid, device=device)  # (n,)

    def attend(self, attention: SlotAttention, layer: int, query: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """Queries (n, H, 1, d) and entries (n, 2, K, d) -> (n, 1, H, d)."""
        pool = self.pool.of_layer(layer, entries)
        if self.writing is None:
            pool.flatten(0, 1).index_copy_(0, self.where, entries)
        else:
            pool.flatten(0, 1).index_copy_(0, self.where[self.writing], entries[self.writing])
        read = pool[:, : self.num_read].index_select(0, self.pages)  # (b, S, 2, K, d)
        if self.sight.own_apart:
            read = torch.cat([read, self._spread(entries)], dim=1)
        keys, values = read.transpose(1, 3).unbind(2)  # (b, K, S, d)
        queries = self._spread(query.squeeze(2)).transpose(1, 2)  # (b, H, T, d)
        output = attend(attention, queries, keys, values, self.mask)  # (b, T, H, d)
        return output if self.num_tokens == 1 else output.flatten(0, 1)[self.grid].unsqueeze(1)

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """(n, ...) -> (b, T, ...), 0 where a request has fewer tokens."""
        if self.num_tokens == 1:
            return values.unsqueeze(1)
        blank = values.new_zeros(len(self.pages) * self.num_tokens, *values.shape[1:])
        return blank.index_copy_(0, self.grid, values).unflatten(0, (len(self.pages), self.num_tokens))


@final
class LongSpan:
    """Cells of one request whose context is long.

    Args:
        span: of the request.
        cells: which of the N cells they are.
    """

    def __init__(self, span: Span, cells: slice, sight: Sight, device: torch.device):
        self.cells, self.span, self.sight = cells, span, sight
        self.end = span.start + span.length
        self.begin = 0 if sight.window is None else max(0, span.start + 1 - sight.window)
        self.mask = None  # of one token, which sees all that is read
        if span.length == 1:
            self.read_to = self.end - sight.own_apart
        else:
            self.read_to = self.end
            places = torch.arange(span.start, self.end, device=device).unsqueeze(0)
            self.mask = sight.mask(places, torch.arange(self.begin, self.end, device=device))

    def attend(self, attention: SlotAttention, layer: int, query: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """Queries (T, H, 1, d) and entries (T, 2, K, d) -> (T, 1, H, d)."""
        page = self.span.pages.of_layer(layer, entries)[self.span.page]  # (2, K, capacity, d)
        current = entries.permute(1, 2, 0, 3)  # (2, K, T, d)
        if self.span.writes:
            page[:, :, self.span.start : self.end] = current
        read = page[:, :, self.begin : self.read_to]
        if self.sight.own_apart:
            read = torch.cat([read, current], dim=2)
        keys, values = read.unsqueeze(1)  # (1, K, S, d)
        return attend(attention, query.permute(2, 1, 0, 3), keys, values, self.mask).transpose(0, 1)


@final
class Reads:
    """How the cells of a layer call read and write their pages.

    Args:
        spans: of the requests, in the order of their cells.
        sight: what a token sees.
    """

    def __init__(self, spans: Sequence[Span], sight: Sight, device: torch.device):
        places, cell = [], 0
        for span in spans:
            places.append(cell)
            cell += span.length
        # Short contexts, by their pool and by whether there are several tokens, to whose number one would be padded.
        shorts: dict[tuple[int, bool], list[tuple[int, Span]]] = {}
        self.groups: list[ShortSpans | LongSpan] = []
        for place, span in zip(places, spans, strict=True):
            if span.pages.long:
                self.groups.append(LongSpan(span, slice(place, place + span.length), sight, device))
            else:
                shorts.setdefault((span.pages.capacity, span.length > 1), []).append((place, span))
        for group in shorts.values():
            members = [span for _, span in group]
            cells = None
            if len(group) < len(spans):
                numbers = [place + t for place, span in group for t in range(span.length)]
                cells = torch.tensor(numbers, device=device)
            self.groups.append(ShortSpans(members, cells, sight, device))


@final
class CellAttention:
    """Stands in for the attention of a layer, whose batch rows are cells.

    Args:
        attention: one of the layer's.
        layer: its number in the section.

    Attributes:
        entries: (N, 2, K, d), the keys and values of its last call.
    """

    entries: torch.Tensor

    def __init__(self, attention: SlotAttention, layer: int, reads: Reads):
        self.attention, self.layer, self.reads = attention, layer, reads

    def __call__(self, query, key, value, past_key_values=None, **kwargs) -> tuple[torch.Tensor, None]:
        """Queries (N, H, 1, d), keys and values (N, K, 1, d) -> (N, 1, H, d)."""
        if past_key_values is not None:  # a layer that asks what it attended to, see `natural`
            past_key_values.update(key, value, self.layer)
        self.entries = entries = torch.stack([key, value], dim=1).squeeze(3)
        groups = self.reads.groups
        if len(groups) == 1:
            return groups[0].attend(self.attention, self.layer, query, entries), None
        output = query.new_empty(len(query), 1, *query.shape[1::2])
        for group in groups:
            cells = group.cells
            output[cells] = group.attend(self.attention, self.layer, query[cells], entries[cells])
        return output, None


def write(spans: Iterable[Span], layer: int, entries: torch.Tensor) -> None:
    """Overwrite the entries of spans by these (N, 2, K, d), cell by cell."""
    cell = 0
    for span in spans:
        new, places = entries[cell : cell + span.length], slice(span.start, span.start + span.length)
        cell += span.length
        if span.pages.pool is None:
            span.pages.of_layer(layer, new)[span.page, :, :, places] = new.permute(1, 2, 0, 3)
        else:
            span.pages.pool.of_layer(layer, new)[span.pages.short[span.page], places] = new


def fill(spans: Iterable[Span]) -> None:
    """Copy the entries of spans to the pages of all later loops."""
    copies: dict[Pool, tuple[list[int], list[int]]] = {}  # from where to where in each flattened pool
    for span in spans:
        pages, end = span.pages, span.start + span.length
        if pages.pool is None:
            for tensor in filter(torch.is_tensor, pages.long):
                tensor[span.page + 1 :, :, :, span.start : end] = tensor[span.page, :, :, span.start : end]
            continue
        sources, targets = copies.setdefault(pages.pool, ([], []))
        source, *later = (page * pages.capacity for page in pages.short[span.page :])
        for target in later:
            sources += range(source + span.start, source + end)
            targets += range(target + span.start, target + end)
    for pool, places in copies.items():
        for tensor in filter(torch.is_tensor, pool.tensors):
            flat = tensor.flatten(0, 1)
            sources, targets = torch.tensor(places, device=flat.device)
            flat.index_copy_(0, targets, flat[sources])
