"""Looped transformers for Hugging Face. The modules of this folder are what a saved model ships as its remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_looped import LoopedConfig
from .modeling_looped import (
    LoopedForCausalLM,
    LoopedForSequenceClassification,
    LoopedModel,
    LoopedPreTrainedModel,
)

AutoConfig.register("looped", LoopedConfig, exist_ok=True)
LoopedConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, LoopedModel),
    (AutoModelForCausalLM, LoopedForCausalLM),
    (AutoModelForSequenceClassification, LoopedForSequenceClassification),
):
    auto_class.register(LoopedConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "LoopedConfig",
    "LoopedForCausalLM",
    "LoopedForSequenceClassification",
    "LoopedModel",
    "LoopedPreTrainedModel",
]
