"""Looped transformers for Hugging Face. The modules of this folder are what a saved model ships as its remote code."""

from importlib import metadata

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_looped import LoopedConfig
from .frozen_looped import FrozenLoopedConfig, FrozenLoopedForCausalLM, attach, default_window, detach, looped
from .modeling_looped import (
    LoopedForCausalLM,
    LoopedForSequenceClassification,
    LoopedModel,
    LoopedPreTrainedModel,
)

try:
    __version__ = metadata.version("looped-transformers")
except metadata.PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

AutoConfig.register("looped", LoopedConfig, exist_ok=True)
LoopedConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, LoopedModel),
    (AutoModelForCausalLM, LoopedForCausalLM),
    (AutoModelForSequenceClassification, LoopedForSequenceClassification),
):
    auto_class.register(LoopedConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)

AutoConfig.register("frozen_looped", FrozenLoopedConfig, exist_ok=True)
AutoModelForCausalLM.register(FrozenLoopedConfig, FrozenLoopedForCausalLM, exist_ok=True)

__all__ = [
    "FrozenLoopedConfig",
    "FrozenLoopedForCausalLM",
    "LoopedConfig",
    "LoopedForCausalLM",
    "LoopedForSequenceClassification",
    "LoopedModel",
    "LoopedPreTrainedModel",
    "attach",
    "default_window",
    "detach",
    "looped",
]
