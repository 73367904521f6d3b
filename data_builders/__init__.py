"""Data of the tasks: `datasets` builders, tokenizers, and batches of one length and one depth."""

from importlib import import_module

# A module is imported when one of its names is first used: most modules import torch and datasets, and `looped table`
# should not wait for them.
NAMES = {
    "builders": (
        "export_parquet",
        "load_molecules",
        "load_task",
        "load_text",
        "task_builder",
    ),
    "collator": (
        "LoopCollator",
        "LoopCollatorCallback",
        "stack_rows",
    ),
    "composition": (
        "Composition",
        "CompositionConfig",
    ),
    "depth": ("DepthSampler",),
    "hop_batches": (
        "HopBatches",
        "encode_groups",
        "encode_hops",
        "encode_rows",
    ),
    "khop": (
        "Khop",
        "KhopConfig",
    ),
    "molecule_batches": (
        "MoleculeBatches",
        "PackedMolecules",
    ),
    "molecules": (
        "Molecules",
        "MoleculesConfig",
        "augment",
        "canonical_smiles",
        "random_smiles",
    ),
    "multiple_choice": (
        "MultipleChoice",
        "MultipleChoiceConfig",
    ),
    "text": (
        "Text",
        "TextConfig",
    ),
    "text_batches": (
        "TextBatches",
        "TextBlocks",
        "encode_text",
    ),
    "tokenizers": (
        "dataset_byte_bpe",
        "dataset_smiles_tokenizer",
        "dataset_tokenizer",
        "hop_tokenizer",
        "smiles_tokenizer",
        "train_byte_bpe",
    ),
}
MODULE_OF = {name: module for module, names in NAMES.items() for name in names}

__all__ = sorted(MODULE_OF)


def __getattr__(name: str):
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{MODULE_OF[name]}", __name__), name)
