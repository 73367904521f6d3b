"""What every looped model has in common for transformers: what it supports, how it is made, loaded and saved."""

import copy
import os
from typing import Self

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from .configuration_looped import LoopedConfig
from .depth_looped import count_to_save, mark_saved_settings
from .generation_looped import GENERATION_SETTINGS
from .halting_looped import Rule
from .initial_looped import SetsInitialValues
from .layers_looped import LoopedAttention, LoopedLayer

MOST_GRAPHS = 256  # of a forward, one for every loop count and shape; torch admits no more of all models together


class LoopedPreTrainedModel(PreTrainedModel):
    """Base of all looped models: how their weights start, and how they are loaded and saved."""

    config: LoopedConfig
    rule_class = Rule  # what halting rules of one's own derive from; a model of remote code has its own
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LoopedLayer", "GatedLoopedLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LoopedLayer,
        "attentions": LoopedAttention,
    }

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and self.config.embedding_init_std is not None:
            init.normal_(module.weight, mean=0.0, std=self.config.embedding_init_std)
        if isinstance(module, SetsInitialValues):
            module.initialize()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: LoopedConfig | str | os.PathLike | None = None,
        num_loops: int | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> Self:
        """Load a model from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path: the folder, or a Hub name.
            config: its configuration, if loaded already.
            num_loops: loops of a call that does not say; those of the saved files by default. `depth_looped.py` says
                what goes before what.
            generation_config: used in place of the saved one.
            **kwargs: as in `PreTrainedModel.from_pretrained` (dtype, device_map, revision, ...), and fields of
                `LoopedConfig`.

        Raises:
            OSError: there is no such folder or Hub name.
        """
        if num_loops is not None and isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)  # the caller's stays as it is
            config.num_loops = num_loops
        elif num_loops is not None:
            kwargs["num_loops"] = num_loops
        loaded = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, generation_config=generation_config, **kwargs
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.can_generate() and generation_config is None:
            mark_saved_settings(model.generation_config)
        return loaded

    def get_compiled_call(self, compile_config):
        """As in transformers, but every loop count, which has a graph of its own, is compiled.

        torch gives up after `recompile_limit` graphs, 8 by default, and goes on without a word and without the graph.
        """
        compiled = super().get_compiled_call(compile_config)

        def call(*args, **kwargs):
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, fail_on_recompile_limit_hit=True):
                return compiled(*args, **kwargs)

        return call

    def floating_point_ops(self, inputs: dict) -> int:
        """FLOPs of a training step on `inputs`: 6 for each token and parameter that is no embedding, as `Trainer`
        estimates, those of the core as often as it loops. (Trainer itself counts the core once.)

        Args:
            inputs: of a call: input_ids (B, T), and num_loops, an int or (B,), or else the configuration's.
        """
        num_loops = inputs.get("num_loops")
        loops = torch.as_tensor(self.config.num_loops if num_loops is None else num_loops).float().mean().item()
        core = sum(parameter.numel() for parameter in self.base_model.core.parameters())
        used = self.num_parameters(exclude_embeddings=True) + (loops - 1) * core
        return round(6 * inputs["input_ids"].numel() * used)

    def _initialize_weights(self, module, is_custom_code=False):
        # Libraries look for modules whose type is exactly nn.Linear, so values that a linear of ours starts with are
        # set by the module that owns it. Of custom code transformers passes over modules without parameters of their
        # own, since it may fill weights that were loaded; ours are filled through `init`, which spares those.
        super()._initialize_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """Save weights, configuration, generation config and this code, as `PreTrainedModel.save_pretrained`.

        Loop settings put into the derived generation config survive a reload.
        """
        if self.can_generate() and any(name in self.generation_config.to_dict() for name in GENERATION_SETTINGS):
            # Marked as derived from the model config, its custom fields would be dropped on load.
            self.generation_config._from_model_config = False
            count = count_to_save(self.config, self.generation_config)
            if count is not None:
                self.generation_config.num_loops = count
        super().save_pretrained(save_directory, *args, **kwargs)
