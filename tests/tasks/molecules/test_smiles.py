"""Laws of faults: each is found by itself, none is hidden by another, and a valid molecule has none."""

import pytest

from data_builders import smiles_tokenizer
from looplab.tasks.molecules.smiles import EXCLUSIVE, LABELS, canonical_or_none, exclusive_class, faults, unmatched


@pytest.mark.parametrize(
    ("smiles", "labels", "exclusive"),
    [
        ("CCO", [], "valid"),
        ("c1ccccc1", [], "valid"),
        ("C1CC2CCC1CC2", [], "valid"),
        ("C%10CC%10", [], "valid"),
        ("C12CC1C2", [], "valid"),
        ("", ["empty"], "other"),
        ("()", ["empty", "syntax"], "other"),
        ("C(C", ["brackets"], "bracket"),
        ("CC)C", ["brackets"], "bracket"),
        ("C)C(C", ["brackets"], "bracket"),
        ("C1CC", ["rings"], "ring"),
        ("C11", ["rings"], "other"),
        ("C1CC1C1", ["rings"], "ring"),
        ("C1CC2", ["rings"], "ring"),
        ("N(C)(C)(C)C", ["valence"], "valence"),
        ("c1cccc1", ["aromaticity"], "valence"),
        ("Cc", ["aromaticity"], "valence"),
        ("C((C)C", ["brackets"], "bracket"),
        ("C=", ["syntax"], "other"),
        ("C==C", ["syntax"], "other"),
        # Faults that the exclusive order hides.
        ("N(C)(C)(C)C(", ["brackets", "valence"], "bracket"),
        ("c1cccc1(C1C", ["brackets", "rings", "aromaticity"], "bracket"),
        ("F=C1C", ["rings", "valence"], "ring"),
    ],
)
def test_each_fault_is_found(smiles, labels, exclusive):
    assert faults(smiles) == labels
    assert exclusive_class(smiles) == exclusive
    assert set(labels) <= set(LABELS)
    assert exclusive in EXCLUSIVE


@pytest.mark.parametrize(
    ("smiles", "labels"),
    [
        ("CCO", ["truncated"]),
        ("CC(C", ["truncated", "brackets"]),
        ("CC(", ["truncated", "brackets"]),
        ("C1CC=", ["truncated", "rings"]),
        ("", ["truncated", "empty"]),
        ("N(C)(C)(C)C", ["truncated", "valence"]),
    ],
)
def test_a_sample_without_an_end_is_truncated_and_what_else_it_is(smiles, labels):
    assert faults(smiles, finished=False) == labels


def test_what_is_unmatched_is_named_by_place():
    tokenizer = smiles_tokenizer(["C(C1)C1)C2%10"])
    assert unmatched(tokenizer.tokenize("C(C1)C1)C2%10")) == ({7}, {9, 10})
    assert unmatched(tokenizer.tokenize("C1C1C1")) == (set(), {5})
    assert unmatched(tokenizer.tokenize("((C")) == ({0, 1}, set())


def test_a_number_may_be_used_again():
    """A digit in brackets, or of two digits, is another token; an even count of a digit is no proof of matched rings,
    and an odd one none of a fault."""
    assert faults("C1CC1C1CC1") == []
    assert faults("C%11CC%11") == []
    assert faults("[13CH4]") == []
    assert faults("C%11CC%(11)") == []
    assert unmatched(["C", "%11", "C", "C", "%(11)"]) == (set(), set())


def test_canonical_is_none_for_what_is_no_molecule(capfd):
    assert canonical_or_none("OCC") == "CCO"
    assert [canonical_or_none(smiles) for smiles in ("", "C(", "N(C)(C)(C)C", "c1cccc1")] == [None] * 4
    assert capfd.readouterr().err == ""
