"""Which tokens a token sees: the attention pattern of a model, one of `PATTERNS`.

    causal          itself and the tokens before it, or those of them in its sliding window
    prefix          a token of the prompt sees the whole prompt, a token of the answer all before it. `token_type_ids`
                    say which is which, 0 for the prompt and 1 for the answer, as in PaliGemma (arXiv 2407.07726)
    bidirectional   every token of the text. There is no next token and no cache: answers are read in place

The masks are those of transformers, for any attention that takes them. Padding is seen by no token.

Legend: B batch rows, T tokens of this call, S cached and new tokens, D hidden size.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)

PROMPT, ANSWER = 0, 1  # token types
MASKS = ("eager", "sdpa", "flex_attention")  # attentions that take a mask of any form
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # whole texts, causal or not


class Pattern(ABC):
    """Which tokens a token sees.

    Attributes:
        is_causal: what an attention without a mask does.
        looks_ahead: whether a token may see later ones.
        tells_prompts: whether `token_type_ids` tell a prompt from its answer.
        takes_cache: whether a call may go on from an earlier one.
        attentions: the attention implementations that it is right in; None for all.
        sharings: the KV policies that it is right with; None for all.
    """

    is_causal: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True
    tells_prompts: ClassVar[bool] = False
    takes_cache: ClassVar[bool] = True
    attentions: ClassVar[tuple[str, ...] | None] = None
    sharings: ClassVar[tuple[str, ...] | None] = None

    def check_types(self, token_type_ids: torch.Tensor | None, embeds: torch.Tensor) -> None:
        """ValueError for token types where there are none."""
        if token_type_ids is not None:
            raise ValueError(
                "token_type_ids tell a prompt from its answer where attention_pattern='prefix', and this model has "
                "another: leave them out."
            )

    @abstractmethod
    def mask(
        self,
        config,
        embeds: torch.Tensor,
        attention_mask,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None = None,
        slot: int | None = None,
    ):
        """The mask of a call as the attention of `config` takes it.

        Args:
            embeds: (B, T, D); only sizes, type and device count.
            attention_mask: (B, S), 0 for padding; a mask that is prepared, which is returned; or None.
            position_ids: (B or 1, T).
            token_type_ids: (B, T).
            slot: the cache layer that says how many tokens are seen; None where all of them say the same.
        """


@final
class Causal(Pattern):
    """A token sees itself and earlier ones."""

    looks_ahead = False

    def mask(self, config, embeds, attention_mask, cache, position_ids, token_type_ids=None, slot=None):
        if sees_all(config, embeds, attention_mask, cache):
            return None
        create = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
        return create(config, embeds, attention_mask, cache, position_ids, layer_idx=slot)


@final
class Prefix(Pattern):
    """The tokens of a prompt see each other, too. Without types a text is a prompt, and what follows it an answer."""

    tells_prompts = True
    attentions = MASKS
    sharings = ("per_loop", "first", "natural")

    def check_types(self, token_type_ids, embeds) -> None:
        if token_type_ids is not None and token_type_ids.shape != embeds.shape[:2]:
            raise ValueError(
                f"token_type_ids must say of each token whether it is the prompt's (0) or the answer's (1), in the "
                f"shape {tuple(embeds.shape[:2])}, got {tuple(token_type_ids.shape)}."
            )

    def mask(self, config, embeds, attention_mask, cache, position_ids, token_type_ids=None, slot=None):
        if sees_all(config, embeds, attention_mask, cache):
            return None
        blocks = None
        if embeds.shape[1] > 1:  # a token alone sees itself and what is before it, in any pattern
            blocks = self.blocks(embeds, attention_mask, cache, position_ids, token_type_ids)
        return create_causal_mask(
            config, embeds, attention_mask, cache, position_ids, block_sequence_ids=blocks, layer_idx=slot
        )

    def blocks(self, embeds, attention_mask, cache, position_ids, token_type_ids) -> torch.Tensor | None:
        """(B, S): the number of its text for a token of a prompt, -1 for any other; None where no prompt is new."""
        past = 0 if cache is None else int(cache.get_seq_length())
        if token_type_ids is None:
            if past:
                return None
            token_type_ids = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        texts = packed_texts(embeds, attention_mask, position_ids)
        texts = torch.zeros_like(token_type_ids) if texts is None else texts
        return F.pad(texts.masked_fill(token_type_ids != PROMPT, -1), (past, 0), value=-1)


@final
class Bidirectional(Pattern):
    """Every token sees every other one of its text."""

    is_causal, takes_cache = False, False
    attentions = (*MASKS, *FLASH)
    sharings = ("per_loop",)

    def mask(self, config, embeds, attention_mask, cache, position_ids, token_type_ids=None, slot=None):
        texts = packed_texts(embeds, attention_mask, position_ids)
        packed = None if texts is None else packed_sequence_mask_function(texts)
        if packed is not None and config._attn_implementation in FLASH:
            raise ValueError(
                f"texts packed into one batch row see each other under {config._attn_implementation}: give one text "
                "a batch row, or call model.set_attn_implementation('sdpa')."
            )
        return create_bidirectional_mask(config, embeds, attention_mask, and_mask_function=packed)


def packed_texts(embeds: torch.Tensor, attention_mask, position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """(B, T): the number of its text for each token, where positions begin anew in a batch row; or None."""
    if attention_mask is not None or position_ids is None:
        return None
    return find_packed_sequence_indices(position_ids.expand(len(embeds), -1))


def is_step(config, embeds: torch.Tensor) -> bool:
    """Whether these (B, T, ...) are one token that sdpa lets see every token before it."""
    return embeds.shape[1] == 1 and config.sliding_window is None and config._attn_implementation == "sdpa"


def sees_all(config, embeds: torch.Tensor, attention_mask, cache: Cache | None) -> bool:
    """Whether sdpa needs no mask: for one token and a cache that grows, and no padding. `create_causal_mask` finds the
    same, in three times the time."""
    if not is_step(config, embeds) or cache is None or cache.is_compileable or torch.compiler.is_compiling():
        return False
    if not isinstance(attention_mask, torch.Tensor):
        return attention_mask is None
    # An accelerator would wait.
    return attention_mask.ndim == 2 and attention_mask.device.type == "cpu" and bool(attention_mask.all())


def mask_of_step(config, embeds: torch.Tensor, attention_mask, cache: Cache) -> torch.Tensor | None:
    """The mask (B, 1, 1, S) of one token that is written to a static cache, where it is the row mask with what is not
    filled; None where transformers has to make it.

    Args:
        embeds: (B, T, ...); only T counts.
        attention_mask: (B, cached tokens + T), 0 for padding; or None.
    """
    if not is_step(config, embeds) or not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    unfilled = cache.get_max_length(0) - attention_mask.shape[1]
    return F.pad(attention_mask.bool(), (0, unfilled))[:, None, None]


PATTERNS: dict[str, Pattern] = {"causal": Causal(), "prefix": Prefix(), "bidirectional": Bidirectional()}


def check_pattern(config) -> None:
    """ValueError where the attention of `config` has no mask for its pattern."""
    attentions, name = PATTERNS[config.attention_pattern].attentions, config._attn_implementation
    if attentions is not None and name not in attentions:
        raise ValueError(
            f"attention_pattern={config.attention_pattern!r} needs a mask that the attention {name!r} does not take: "
            "call model.set_attn_implementation('sdpa')."
        )


__all__ = ["ANSWER", "PATTERNS", "PROMPT", "Pattern", "check_pattern"]
