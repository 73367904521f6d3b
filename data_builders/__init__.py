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
from .molecules import Molecules, MoleculesConfig, augment, canonical_smiles, random_smiles
from .multiple_choice import MultipleChoice, MultipleChoiceConfig
from .packing import MoleculeBatches, PackedMolecules
from .tasks import export_parquet, load_molecules, load_task, load_text, task_builder
from .text import Text, TextConfig
from .tokenizers import (
    dataset_byte_bpe,
    dataset_smiles_tokenizer,
    dataset_tokenizer,
    hop_tokenizer,
    smiles_tokenizer,
    train_byte_bpe,
)

__all__ = [
    "Composition",
    "CompositionConfig",
    "DepthSampler",
    "HopBatches",
    "Khop",
    "KhopConfig",
    "LoopCollator",
    "LoopCollatorCallback",
    "MoleculeBatches",
    "Molecules",
    "MoleculesConfig",
    "MultipleChoice",
    "MultipleChoiceConfig",
    "PackedMolecules",
    "Text",
    "TextBatches",
    "TextBlocks",
    "TextConfig",
    "augment",
    "canonical_smiles",
    "dataset_byte_bpe",
    "dataset_smiles_tokenizer",
    "dataset_tokenizer",
    "encode_groups",
    "encode_hops",
    "encode_rows",
    "encode_text",
    "export_parquet",
    "hop_tokenizer",
    "load_molecules",
    "load_task",
    "load_text",
    "random_smiles",
    "smiles_tokenizer",
    "stack_rows",
    "task_builder",
    "train_byte_bpe",
]
