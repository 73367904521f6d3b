"""Data of the tasks: `datasets` builders, tokenizers, and batches of one length and one depth."""

from .batching import (
    DepthSampler,
    HopBatches,
    LoopCollator,
    LoopCollatorCallback,
    TextBatches,
    TextBlocks,
    encode_groups,
    encode_hops,
    encode_rows,
    encode_text,
    stack_rows,
)
from .composition import Composition, CompositionConfig
from .khop import Khop, KhopConfig
from .multiple_choice import MultipleChoice, MultipleChoiceConfig
from .tasks import export_parquet, load_task, load_text, task_builder
from .text import Text, TextConfig
from .tokenizers import dataset_byte_bpe, dataset_tokenizer, hop_tokenizer, train_byte_bpe

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
    "Text",
    "TextBatches",
    "TextBlocks",
    "TextConfig",
    "dataset_byte_bpe",
    "dataset_tokenizer",
    "encode_groups",
    "encode_hops",
    "encode_rows",
    "encode_text",
    "export_parquet",
    "hop_tokenizer",
    "load_task",
    "load_text",
    "stack_rows",
    "task_builder",
    "train_byte_bpe",
]
