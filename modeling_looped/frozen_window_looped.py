"""The window of a frozen model that is looped: hooks on its layers, and the caches that their extra passes see.

A pass here is one run of a layer within a call. The natural pass is the model's own; the extra passes are ours.

Legend: B batch rows, T tokens of a call, S cached tokens and these T, D hidden size, H key-value heads, d head size.
"""

import inspect
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from contextvars import Context
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .frozen_solvers_looped import METHODS
from .growing_looped import GrowingLayer
from .two_sources_looped import own_columns, replaced, two_source_mask, two_sources

CACHE_ARGUMENTS = ("past_key_values", "cache", "layer_past")
TWO_SOURCES = "sdpa_two_sources"
QUERY_BLOCK = 128

ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


def default_window(num_layers: int) -> tuple[int, int]:
    """The depth rule: four layers around 0.48 of the depth, [c - 1, c + 2] with c = floor(0.48 N), both inclusive."""
    centre = int(0.48 * num_layers)
    return max(centre - 1, 0), min(centre + 2, num_layers - 1)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers, in order.

    Raises:
        ValueError: the model is not a decoder with one list of `num_hidden_layers` layers.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"looped() takes a transformers PreTrainedModel, got {type(model).__name__}: give the model inside of "
            "it (PEFT: merge_and_unload(); DDP: .module; compiled: loop first, then compile)."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; only decoder-only models can be looped.")
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        module
        for module in model.get_decoder().modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} cannot be looped: expected one list of num_hidden_layers={count} decoder layers, "
            f"found {len(lists)}. Models that share or repeat their layers have a loop of their own."
        )
    return list(lists[0])


class Layer:
    """One layer of a window, with the arguments and the results of its last natural pass.

    Args:
        module: the layer.
        index: its number in the model, which is its slot of the KV cache.
        model: the whole model.

    Raises:
        ValueError: extra passes would change what the layer remembers of earlier tokens.
    """

    def __init__(self, module: nn.Module, index: int, model: PreTrainedModel):
        name = type(module).__name__
        self.module, self.index = module, index
        self.names = list(inspect.signature(module.forward).parameters)
        cache_names = [argument for argument in CACHE_ARGUMENTS if argument in self.names]
        layer_types = model.config.get_text_config(decoder=True).to_dict().get("layer_types")
        kind = layer_types[index] if layer_types else "full_attention"
        if cache_names and any(isinstance(m, nn.Conv1d) for m in module.modules()):
            kind = "a convolution over tokens"
        if not cache_names or kind not in ATTENTION_LAYERS:
            raise ValueError(
                f"layer {index} ({name}, {kind if cache_names else 'no KV cache argument'}) cannot be looped: its "
                "memory is not a KV cache but a recurrent or convolution state, which every extra pass would advance. "
                "Choose a window of attention layers."
            )
        if {"alibi", "position_bias"} & set(self.names) or "crossattention" in dict(module.named_children()):
            raise ValueError(
                f"layer {index} ({name}) cannot be looped: it attends with an ALiBi bias or to an encoder, which "
                "extra passes cannot follow."
            )
        if any(buffer.ndim == 4 and buffer.shape[-1] == buffer.shape[-2] for buffer in module.buffers()):
            raise ValueError(
                f"layer {index} ({name}) cannot be looped: its attention has a causal mask of its own, which knows "
                "one source of keys and not the two of an extra pass."
            )
        self.cache_name = cache_names[0]
        self.routers = [m for m in module.modules() if type(m).__name__.endswith("Router")]
        experts = [
            n for n, m in module.named_modules() if n.endswith("experts") or type(m).__name__.endswith("Experts")
        ]
        if experts and not self.routers:
            raise ValueError(
                f"layer {index} ({name}) cannot be looped: it has experts but no module named *Router whose choice "
                "could be kept for the extra passes."
            )
        self.arguments: dict = {}
        self.natural: NaturalCache | None = None
        self.routes: list = []

    def open(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """Note the arguments of a natural pass, put the recording cache in, and return the hidden states (B, T, D)."""
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        hidden_states = arguments.pop(self.names[0])
        self.natural = NaturalCache(arguments.get(self.cache_name), self)
        self.routes = []
        self.arguments = arguments | {self.cache_name: self.natural}
        return hidden_states

    def close(self) -> None:
        """Forget the call: it holds on to a whole prompt's keys."""
        self.arguments, self.natural, self.routes = {}, None, []

    def again(self, hidden_states: torch.Tensor, cache, mask) -> torch.Tensor:
        """One more pass of this layer, (B, T, D) -> (B, T, D)."""
        arguments = self.arguments | {self.cache_name: cache, "attention_mask": mask}
        return first_of(self.module(hidden_states, **arguments))


def first_of(output):
    """The hidden states in the output of a layer, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


class LayerCache:
    """Stands in for the KV cache inside one layer; layers that need more of a cache than `update` are refused."""

    def __init__(self, layer: Layer):
        self.layer = layer

    def __getattr__(self, name: str):
        raise AttributeError(
            f"layer {self.layer.index} ({type(self.layer.module).__name__}) reads past_key_values.{name}: only layers "
            "that do nothing but update their KV cache can be looped."
        )


class NaturalCache(LayerCache):
    """The cache of a natural pass: it writes through, and remembers the keys and values that the layer attended to."""

    keys: torch.Tensor  # (B, H, S, d)
    values: torch.Tensor  # (B, H, S, d)
    columns: torch.Tensor  # (T,), where the tokens of this call are among the S

    def __init__(self, cache: Cache | None, layer: Layer):
        super().__init__(layer)
        self.cache, self.updated = cache, False

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """(B, H, T, d) of this call -> (B, H, S, d)."""
        if self.updated or layer_idx != self.layer.index:
            raise RuntimeError(
                f"layer {self.layer.index} ({type(self.layer.module).__name__}) shares or repeats KV slots (slot "
                f"{layer_idx}): it cannot be looped."
            )
        self.updated = True
        self.keys, self.values = key_states, value_states
        if self.cache is not None:
            self.keys, self.values = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        self.columns = own_columns(self.cache, layer_idx, self.keys, key_states.shape[-2])
        return self.keys, self.values

    def replaced(self, key_states, value_states) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that the layer saw, (B, H, S, d) each, with the entries of this call replaced."""
        return replaced((self.keys, self.values), (key_states, value_states), self.columns)

    def rewrite(self, num_tokens: int, key_states, value_states) -> tuple[torch.Tensor, torch.Tensor]:
        """Overwrite the entries of the first `num_tokens` tokens of this call; returns all, (B, H, S, d) each."""
        columns, written = self.columns[:num_tokens], self.cache.layers[self.layer.index]
        keys, values = key_states[:, :, :num_tokens], value_states[:, :, :num_tokens]
        # Compiled code holds on to the tensors of a static layer; a growing one would copy all of them to new room.
        in_place = isinstance(written, StaticLayer) or (
            isinstance(written, GrowingLayer) and not torch.is_grad_enabled()
        )
        if in_place:
            written.keys.index_copy_(-2, columns, keys)
            written.values.index_copy_(-2, columns, values)
        else:
            written.keys = written.keys.index_copy(-2, columns, keys)
            written.values = written.values.index_copy(-2, columns, values)
        return written.keys, written.values  # pyright: ignore[reportReturnType]


class NaturalContext(LayerCache):
    """`prefill="natural"`: a token sees the natural keys of earlier tokens, and its own current key."""

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """-> (B, H, S, d) for one token, (B, H, S + T, d) for several: natural keys, then current ones."""
        natural = self.layer.natural
        return two_sources((natural.keys, natural.values), (key_states, value_states), natural.columns)

    mask = staticmethod(two_source_mask)

    @staticmethod
    @contextmanager
    def attention(config: PreTrainedConfig, num_tokens: int, masks: Iterable[torch.Tensor | None]):
        """Within the block the extra passes attend in blocks of queries, unless a mask shows a token later ones.

        Tokens of an image or of a prefix see later ones.
        """
        before = config._attn_implementation
        if before == "sdpa" and num_tokens > QUERY_BLOCK:
            later = [mask[..., -2 * num_tokens : -num_tokens].triu(1).any() for mask in masks if mask is not None]
            config._attn_implementation = "sdpa" if any(later) else TWO_SOURCES
        try:
            yield
        finally:
            config._attn_implementation = before


def sdpa_two_sources(module, query, key, value, attention_mask, **kwargs):
    """sdpa over the keys of `NaturalContext`, block by block of queries, without the keys that no query of it sees.

    A block sees no natural keys after its own and no current keys but its own: at T tokens without a past that is
    little more than T * T / 2 products instead of the mask's 2 T * T.
    """
    num_tokens, num_natural = query.shape[2], key.shape[2] - query.shape[2]
    outputs = []
    for start in range(0, num_tokens, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, num_tokens)
        # No token of the block stands behind this column: entries of a static cache may be empty, never missing.
        natural, own = slice(num_natural - num_tokens + end), slice(num_natural + start, num_natural + end)
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module,
            query[:, :, start:end],
            torch.cat([key[:, :, natural], key[:, :, own]], dim=2),
            torch.cat([value[:, :, natural], value[:, :, own]], dim=2),
            torch.cat([attention_mask[..., start:end, natural], attention_mask[..., start:end, own]], dim=-1),
            **kwargs,
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(TWO_SOURCES, sdpa_two_sources)


class IteratedContext(LayerCache):
    """`prefill="iterated"`: tokens see the current keys of this call, and the cached keys of earlier calls."""

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """-> (B, H, S, d)."""
        return self.layer.natural.replaced(key_states, value_states)

    @staticmethod
    def mask(mask: torch.Tensor | None, columns: torch.Tensor, num_keys: int) -> torch.Tensor | None:
        """The layer's mask, as it is: current keys stand where natural ones stood."""
        return mask

    @staticmethod
    def attention(config: PreTrainedConfig, num_tokens: int, masks: Iterable[torch.Tensor | None]):
        """The extra passes attend as the natural pass does."""
        return nullcontext()


class LastPass(LayerCache):
    """The writing pass of `cache="last"`: it overwrites the entries of the looped tokens."""

    def __init__(self, layer: Layer, num_tokens: int):
        super().__init__(layer)
        self.num_tokens = num_tokens

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """(B, H, T, d) of this call -> (B, H, S, d), with the entries of the looped tokens overwritten."""
        return self.layer.natural.rewrite(self.num_tokens, key_states, value_states)


CONTEXTS = {"natural": NaturalContext, "iterated": IteratedContext}


class Window:
    """Consecutive layers that are looped together: hooks on them turn their natural pass into a loop.

    The model itself runs the natural pass, so that one loop is the base model bit for bit. The extra passes follow
    when the last layer has returned, and replace its output.

    Args:
        layers: in order.
        loop: the `Loop` of `frozen_looped.py` that they belong to.
    """

    def __init__(self, layers: list[Layer], loop):
        self.layers, self.loop = layers, loop
        self.context = CONTEXTS[loop.config.prefill]
        self.solver = METHODS[loop.config.method][0]
        self.looping = False

    def hook(self) -> list:
        """Register on the layers, before any other hook; returns the handles."""
        handles = []
        for layer in self.layers:
            before = partial(self.before, layer)
            handles.append(layer.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            for position, router in enumerate(layer.routers):
                handles.append(router.register_forward_hook(partial(self.route, layer, position), prepend=True))
        handles.append(self.layers[-1].module.register_forward_hook(self.after, prepend=True))
        return handles

    def before(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict):
        """Natural call of a layer: note its arguments; at the first layer, also where the loop starts."""
        if self.looping:
            return None
        hidden_states = layer.open(args, kwargs)
        if layer is self.layers[0]:
            self.start = hidden_states
            self.end = self.loop.looped_tokens(layer, hidden_states.shape[1])
            for each in self.layers:
                self.loop.check_rewritable(each, layer.natural.cache)
        return (hidden_states,), layer.arguments

    def route(self, layer: Layer, position: int, module: nn.Module, args: tuple, output):
        """Keep the choice that a router made in the natural pass, and give it to the extra passes."""
        if self.looping:
            return layer.routes[position]
        layer.routes.append(output)
        return None

    def after(self, module: nn.Module, args: tuple, output):
        """The natural output of the last layer, (B, T, D) -> the output after the loop, (B, T, D)."""
        if self.looping:
            return None
        natural = first_of(output)
        self.looping = True
        try:
            # transformers' recorder of hidden states, attentions and router logits is a context variable: without it
            # they are the natural pass's, one per layer. torch.compile cannot trace a change of context.
            apart = self.run if torch.compiler.is_compiling() else partial(Context().run, self.run)
            looped_states = apart(natural)
        finally:
            self.looping = False
            del self.start
            for layer in self.layers:
                layer.close()
        if looped_states is None:
            return None
        return (looped_states, *output[1:]) if isinstance(output, tuple) else looped_states

    def run(self, natural: torch.Tensor) -> torch.Tensor | None:
        """The natural output (B, T, D) -> (B, T, D) after the loop; None where nothing is looped."""
        config, num_loops = self.loop.config, self.loop.num_loops
        if num_loops == 1 or config.natural_weight == 1 or self.end == 0:
            return None
        for layer in self.layers:
            if not layer.natural.updated:
                raise RuntimeError(
                    f"layer {layer.index} ({type(layer.module).__name__}) did not update its KV cache: it cannot be "
                    "looped."
                )
        masks = {}
        for layer in self.layers:
            mask = layer.arguments.get("attention_mask")
            if id(mask) not in masks:
                columns, keys = layer.natural.columns, layer.natural.keys
                masks[id(mask)] = self.context.mask(mask, columns, keys.shape[-2])

        def evaluate(x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer.again(x, self.context(layer), masks[id(layer.arguments.get("attention_mask"))])
            return x

        start = self.start.to(natural.device)
        step = 1 / num_loops if config.step is None else config.step
        text_config = self.loop.model.config.get_text_config(decoder=True)
        with self.context.attention(text_config, natural.shape[1], masks.values()):
            endpoint = self.solver(evaluate, start, natural, num_loops, step)
        x = endpoint
        if config.cache == "last" and self.layers[0].natural.cache is not None:
            for layer in self.layers:
                x = layer.again(x, LastPass(layer, self.end), layer.arguments.get("attention_mask"))
        looped_states = torch.lerp(endpoint, natural, config.natural_weight)
        if self.end < natural.shape[1]:
            looped_states = torch.cat([looped_states[:, : self.end], natural[:, self.end :]], dim=1)
        return looped_states
