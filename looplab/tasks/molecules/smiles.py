"""The faults of a SMILES, each looked for independently of the others.

    label         the fault                                                      found in
    truncated     no end within the tokens that were allowed                     the sample
    empty         no atom                                                        the string
    brackets      a branch that is never closed, or closed before it is opened   its tokens
    rings         a ring bond that is never closed, or closed at the atom        its tokens
                  where it began
    syntax        rdkit cannot read it as a graph                                the repaired string
    valence       an atom has more bonds than it can have                        the repaired graph
    aromaticity   an aromatic atom outside of a ring, or an aromatic ring        the repaired graph
                  whose double bonds cannot be placed

A sample may have several labels. The repaired string has no unmatched parentheses and ring bonds, so that a wrong
bracket does not hide a wrong valence. SMolLM (arXiv 2605.06322) stops at the first fault, so that valence errors can
appear only when brackets and rings are right: `exclusive_class` is its class.
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

# rdkit's name for a problem of a graph -> label.
PROBLEMS = {
    "AtomValenceException": "valence",
    "AtomKekulizeException": "aromaticity",
    "KekulizeException": "aromaticity",
}


def canonical_or_none(smiles: str) -> str | None:
    """The canonical SMILES, or None if it is not a molecule. rdkit prints nothing."""
    from rdkit import rdBase

    chem = rdkit_chem()
    with rdBase.BlockLogs():
        molecule = chem.MolFromSmiles(smiles)
        if molecule is None or not molecule.GetNumAtoms():
            return None
        return chem.MolToSmiles(molecule)


def unmatched(tokens: Sequence[str]) -> tuple[set[int], set[int]]:
    """(indices of unmatched parentheses, indices of unmatched ring bonds) among the tokens."""
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
    """The kind, one of `KINDS`, of each token and of the end. The dot between molecules counts as a bond."""
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
        # Bonds and branches after the last atom had no time to be used.
        repaired = re.sub(r"[-=#$:/\\(.]+$", "", repaired)
    with rdBase.BlockLogs():
        graph = chem.MolFromSmiles(repaired, sanitize=False)
        if graph is None:
            found.add("syntax")
        else:
            found |= {PROBLEMS.get(problem.GetType(), "syntax") for problem in chem.DetectChemistryProblems(graph)}
    # An invalid sample in which nothing was found must have a label.
    return [label for label in LABELS if label in found] or ["syntax"]


def exclusive_class(smiles: str) -> str:
    """The class of a sample in SMolLM's evaluation, one of `EXCLUSIVE`."""
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
