"""The section `data` of a recipe on molecules."""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

from data_builders.fields import number
from looplab.tasks.language.data import LanguageData


@strict
@dataclass
class MoleculeData(LanguageData):
    """`files` are .csv or .smi. Molecules are packed into sequences of `sequence_length` tokens."""

    task: Literal["molecules"] = "molecules"  # SMILES
    config: str = "cpu"  # preset of the builder, if no files are named
    spellings: int | None = number(at_least=1)  # random SMILES of each molecule; every epoch trains on another one

    def preset(self) -> tuple[str, dict]:
        return self.of_files(self.config)
