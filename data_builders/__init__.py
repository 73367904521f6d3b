"""Data of the hop tasks: `datasets` builders, tokenizers, and batches of one length and one depth."""

from .batching import (
    DepthSampler,
    HopBatches,
    LoopCollator,
    LoopCollatorCallback,
    encode_groups,
    encode_hops,
    encode_rows,
    stack_rows,
)
from .composition import Composition, CompositionConfig
from .khop import Khop, KhopConfig
from .multiple_choice import MultipleChoice, MultipleChoiceConfig
from .tasks import export_parquet, load_task, task_builder
from .tokenizers import dataset_tokenizer, hop_tokenizer

__all__ = [
    "Composition",
    "CompositionConfig",
    "DepthSampler",
    "HopBatches",
    "Khop",
    "KhopConfig",
    "LoopCollator",
    "LoopCollatorCallback",
    "MultipleChoice",
    "MultipleChoiceConfig",
    "dataset_tokenizer",
    "encode_groups",
    "encode_hops",
    "encode_rows",
    "export_parquet",
    "hop_tokenizer",
    "load_task",
    "stack_rows",
    "task_builder",
]
