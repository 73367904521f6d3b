"""Fields of a recipe on molecules."""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

from data_builders.fields import number
from looplab.tasks.language.data import LanguageData


@strict
@dataclass
class MoleculeData(LanguageData):
    """`files` are .csv or .smi; `sequence_length` is the tokens of a row, in which molecules are packed."""

    task: Literal["molecules"] = "molecules"
    config: str = "cpu"  # preset of the builder, where no files are named
    spellings: int | None = number(at_least=1)  # random SMILES of each molecule, another one in every epoch

    def load(self):
        from data_builders import load_molecules

        return load_molecules(self.config, self.files, **({"seed": self.seed} | self.overrides))
