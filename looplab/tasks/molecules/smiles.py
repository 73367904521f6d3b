"""What is wrong with a SMILES, each fault looked for by itself.

    label         the fault                                                      found in
    truncated     no end within the tokens that were allowed                     the sample
    empty         no atom                                                        the string
    brackets      a branch that is closed before it is opened, or never          its tokens
    rings         a ring bond that is opened and never closed, or closed at      its tokens
                  the atom it began at
    syntax        rdkit cannot read it as a graph                                the repaired string
    valence       an atom has more bonds than it can have                        the repaired graph
    aromaticity   an aromatic atom outside of a ring, or no way to place the     the repaired graph
                  double bonds of an aromatic ring

A sample may have several labels. The repaired string is the one without unmatched parentheses and ring bonds, so
that a bracket does not hide a valence. `exclusive_class` is the order of SMolLM (arXiv 2605.06322), which stops at the
first fault: there valence errors can only appear once brackets and rings are right, whatever the model does.
"""

import re
from collections import Counter
from collections.abc import Sequence

from data_builders.molecules import rdkit_chem
from data_builders.tokenizers import SMILES_TOKEN

TOKEN = re.compile(SMILES_TOKEN)
RING = re.compile(r"[0-9]|%[0-9]{2}|%\([0-9]+\)")
LABELS = ("truncated", "empty", "brackets", "rings", "syntax", "valence", "aromaticity")
KINDS = ("atom", "bond", "branch open", "branch close", "ring open", "ring close", "end")
EXCLUSIVE = ("valid", "bracket", "ring", "valence", "other")

# What rdkit calls the problems of a graph.
PROBLEMS = {
    "AtomValenceException": "valence",
    "AtomKekulizeException": "aromaticity",
    "KekulizeException": "aromaticity",
}


def canonical_or_none(smiles: str) -> str | None:
    """The canonical SMILES, or None for what is no molecule; rdkit's messages are kept off the terminal."""
    from rdkit import rdBase

    chem = rdkit_chem()
    with rdBase.BlockLogs():
        molecule = chem.MolFromSmiles(smiles)
        if molecule is None or not molecule.GetNumAtoms():
            return None
        return chem.MolToSmiles(molecule)


def unmatched(tokens: Sequence[str]) -> tuple[set[int], set[int]]:
    """Indices of the tokens that leave branches, and ring bonds, without their other half."""
    open_branches, open_rings, atoms = [], {}, 0
    branches, rings = set(), set()
    for i, token in enumerate(tokens):
        if token == "(":
            open_branches.append(i)
        elif token == ")":
            if open_branches:
                open_branches.pop()
            else:
                branches.add(i)
        elif RING.fullmatch(token):
            number = int(token.strip("%()"))
            if number in open_rings:
                start, at = open_rings.pop(number)
                if at == atoms:  # both ends at one atom
                    rings |= {start, i}
            else:
                open_rings[number] = i, atoms
        elif token[0].isalpha() or token[0] in "[*":
            atoms += 1
    return branches | set(open_branches), rings | {start for start, _ in open_rings.values()}


def token_kinds(tokens: Sequence[str]) -> list[str]:
    """The one of `KINDS` of each token, and of the end after them; the dot between molecules counts as a bond."""
    kinds, rings = [], set()
    for token in tokens:
        if token in "()":
            kinds.append("branch open" if token == "(" else "branch close")
        elif RING.fullmatch(token):
            number = int(token.strip("%()"))
            kinds.append("ring close" if number in rings else "ring open")
            rings ^= {number}
        else:
            kinds.append("atom" if token[0].isalpha() or token[0] in "[*" else "bond")
    return [*kinds, "end"]


def faults(smiles: str, finished: bool = True) -> list[str]:
    """The labels of a sample, in the order of `LABELS`; none for a valid molecule."""
    if finished and canonical_or_none(smiles) is not None:
        return []
    from rdkit import rdBase

    chem = rdkit_chem()
    tokens = TOKEN.findall(smiles)
    branches, rings = unmatched(tokens)
    found = set()
    if not finished:
        found.add("truncated")
    if not any(token[0].isalpha() or token[0] in "[*" for token in tokens):
        found.add("empty")
    if branches:
        found.add("brackets")
    if rings:
        found.add("rings")
    repaired = "".join(token for i, token in enumerate(tokens) if i not in branches | rings)
    if not finished:
        # What comes after the last atom could not be used yet.
        repaired = re.sub(r"[-=#$:/\\(.]+$", "", repaired)
    with rdBase.BlockLogs():
        graph = chem.MolFromSmiles(repaired, sanitize=False)
        if graph is None:
            found.add("syntax")
        else:
            found |= {PROBLEMS.get(problem.GetType(), "syntax") for problem in chem.DetectChemistryProblems(graph)}
    # A string that is in order once its halves are out needs no other name; one without a label must have one.
    return [label for label in LABELS if label in found] or ["syntax"]


def exclusive_class(smiles: str) -> str:
    """The one class that SMolLM's evaluation puts a sample in, see `EXCLUSIVE`."""
    if canonical_or_none(smiles) is not None:
        return "valid"
    from rdkit import rdBase

    depth, lowest = 0, 0
    for character in smiles:
        depth += {"(": 1, ")": -1}.get(character, 0)
        lowest = min(lowest, depth)
    if lowest < 0 or depth:
        return "bracket"
    if any(count % 2 for token, count in Counter(TOKEN.findall(smiles)).items() if RING.fullmatch(token)):
        return "ring"
    with rdBase.BlockLogs():
        graph = rdkit_chem().MolFromSmiles(smiles, sanitize=False)
    return "valence" if graph is not None and graph.GetNumAtoms() else "other"
