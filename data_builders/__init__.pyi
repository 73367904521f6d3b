"""What `data_builders` exports: __init__.py reads the names here, and so do editors and type checkers."""

from .builders import export_parquet as export_parquet
from .builders import load_molecules as load_molecules
from .builders import load_task as load_task
from .builders import load_text as load_text
from .builders import task_builder as task_builder
from .chats import ChatBlocks as ChatBlocks
from .chats import encode_chats as encode_chats
from .collator import LoopCollator as LoopCollator
from .collator import LoopCollatorCallback as LoopCollatorCallback
from .collator import stack_rows as stack_rows
from .composition import Composition as Composition
from .composition import CompositionConfig as CompositionConfig
from .depth import DepthSampler as DepthSampler
from .hop_batches import HopBatches as HopBatches
from .hop_batches import encode_groups as encode_groups
from .hop_batches import encode_hops as encode_hops
from .hop_batches import encode_rows as encode_rows
from .khop import Khop as Khop
from .khop import KhopConfig as KhopConfig
from .molecule_batches import MoleculeBatches as MoleculeBatches
from .molecule_batches import PackedMolecules as PackedMolecules
from .molecules import Molecules as Molecules
from .molecules import MoleculesConfig as MoleculesConfig
from .molecules import augment as augment
from .molecules import canonical_smiles as canonical_smiles
from .molecules import random_smiles as random_smiles
from .multiple_choice import MultipleChoice as MultipleChoice
from .multiple_choice import MultipleChoiceConfig as MultipleChoiceConfig
from .questions import Questions as Questions
from .questions import QuestionsConfig as QuestionsConfig
from .sequence_batches import OneLength as OneLength
from .sequence_batches import PackedSequences as PackedSequences
from .sequence_rows import EncodedRows as EncodedRows
from .sequence_rows import encode_questions as encode_questions
from .sequence_rows import reader_of as reader_of
from .sequences import SameAnswer as SameAnswer
from .sequences import SequenceGenerator as SequenceGenerator
from .sequences import Verifier as Verifier
from .streams import StreamBatches as StreamBatches
from .streams import StreamedText as StreamedText
from .streams import load_streams as load_streams
from .text import Text as Text
from .text import TextConfig as TextConfig
from .text_batches import TextBatches as TextBatches
from .text_batches import TextBlocks as TextBlocks
from .text_batches import encode_text as encode_text
from .tokenizers import dataset_byte_bpe as dataset_byte_bpe
from .tokenizers import dataset_smiles_tokenizer as dataset_smiles_tokenizer
from .tokenizers import dataset_tokenizer as dataset_tokenizer
from .tokenizers import hop_tokenizer as hop_tokenizer
from .tokenizers import sequence_bpe as sequence_bpe
from .tokenizers import sequence_tokenizer as sequence_tokenizer
from .tokenizers import smiles_tokenizer as smiles_tokenizer
from .tokenizers import train_byte_bpe as train_byte_bpe

__all__ = [
    "ChatBlocks",
    "Composition",
    "CompositionConfig",
    "DepthSampler",
    "EncodedRows",
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
    "OneLength",
    "PackedMolecules",
    "PackedSequences",
    "Questions",
    "QuestionsConfig",
    "SameAnswer",
    "SequenceGenerator",
    "StreamBatches",
    "StreamedText",
    "Text",
    "TextBatches",
    "TextBlocks",
    "TextConfig",
    "Verifier",
    "augment",
    "canonical_smiles",
    "dataset_byte_bpe",
    "dataset_smiles_tokenizer",
    "dataset_tokenizer",
    "encode_chats",
    "encode_groups",
    "encode_hops",
    "encode_questions",
    "encode_rows",
    "encode_text",
    "export_parquet",
    "hop_tokenizer",
    "load_molecules",
    "load_streams",
    "load_task",
    "load_text",
    "random_smiles",
    "reader_of",
    "sequence_bpe",
    "sequence_tokenizer",
    "smiles_tokenizer",
    "stack_rows",
    "task_builder",
    "train_byte_bpe",
]
