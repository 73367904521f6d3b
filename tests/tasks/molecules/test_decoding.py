"""Laws of what reads and steers a molecule as it is written: masked decoding keeps prefixes completable, probes find
what is in the states and not what the controls give."""

import pytest
import torch
from transformers import LogitsProcessorList

from data_builders import smiles_tokenizer
from looplab.tasks.molecules.masking import ValidPrefix
from looplab.tasks.molecules.probes import grammar, probe_grammar, probes_text, states_by_call
from looplab.tasks.molecules.samples import write_molecules
from looplab.tasks.molecules.sizes import SAMPLINGS
from looplab.tasks.molecules.smiles import faults
from toys import make_model

SMILES = [
    f"{chain}{ring}{tail}"
    for chain in ("C", "CC(C)", "NC(=O)", "O=C(C(F)Br)", "C(C(C)N)S")
    for ring in ("c1ccccc1", "C1CCC2CC2C1", "c1cc[nH]c1")
    for tail in ("", "O", "C#N")
]


@pytest.fixture(scope="module")
def tokenizer():
    return smiles_tokenizer(SMILES)


@pytest.fixture
def model(tokenizer):
    fields = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
    return make_model(vocab_size=len(tokenizer), **fields)


def ids_of(tokenizer, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt")["input_ids"]


# Masking


def test_tokens_that_cannot_follow_are_taken_out(tokenizer):
    """By hand: what may come after each prefix; the logits of the others stay as they are."""
    mask = ValidPrefix(tokenizer)
    scores = torch.zeros(1, len(tokenizer))
    vocabulary = tokenizer.get_vocab()
    for prefix, may, may_not in (
        ("", "CN", ["(", ")", "=", "<eos>", "<pad>", "<bos>"]),
        ("C", ["C", "(", "1", "<eos>"], [")", "<bos>"]),
        ("C(", ["C", "="], [")", "(", "<eos>"]),
        ("C(C", ["C", ")", "1"], ["<eos>"]),
        ("C1CC", ["1", "C"], ["<eos>"]),
        ("FC", ["C", "<eos>"], []),
        ("CF", ["<eos>"], ["C", "=", "1"]),
        ("C#N", ["<eos>"], ["C"]),
    ):
        kept = mask(ids_of(tokenizer, prefix), scores)[0]
        assert all(kept[vocabulary[token]] == 0 for token in may), prefix
        assert all(kept[vocabulary[token]] == -torch.inf for token in may_not), prefix


def test_every_prefix_of_a_molecule_is_kept(tokenizer):
    mask = ValidPrefix(tokenizer)
    for smiles in SMILES:
        ids = [*ids_of(tokenizer, smiles)[0].tolist(), tokenizer.eos_token_id]
        for i in range(1, len(ids)):
            scores = torch.zeros(1, len(tokenizer))
            assert mask(torch.tensor([ids[:i]]), scores)[0, ids[i]] == 0


def test_rows_that_have_ended_and_unlikely_tokens(tokenizer):
    """An ended row is left alone; a likely token that cannot follow is no reason to allow an unlikely one unasked."""
    mask = ValidPrefix(tokenizer)
    vocabulary = tokenizer.get_vocab()
    scores = torch.full((2, len(tokenizer)), -20.0)
    scores[:, vocabulary[")"]] = 5.0
    ids = torch.cat([torch.tensor([[1, vocabulary["C"], 2]]), torch.tensor([[1, vocabulary["C"], vocabulary["C"]]])])
    masked = mask(ids, scores)
    assert torch.equal(masked[0], scores[0])
    assert masked[1, vocabulary[")"]] == -torch.inf
    assert masked[1, vocabulary["C"]] == -20


def test_even_a_random_model_ends_where_it_may(model, tokenizer):
    """At a molecule, or at a prefix that nothing can follow; and it writes other things unmasked."""
    mask = ValidPrefix(tokenizer)
    masked = write_molecules(
        model, tokenizer, 12, SAMPLINGS[0], 2, seed=0, logits_processor=LogitsProcessorList([mask])
    )
    plain = write_molecules(model, tokenizer, 12, SAMPLINGS[0], 2, seed=0)
    ended = [row["smiles"] for row in masked if row["finished"]]
    assert len(ended) > 3
    for smiles in ended:
        dead_end = not any(mask.may_follow(smiles, token) for token in range(len(tokenizer)))
        assert dead_end or mask.may_follow(smiles, tokenizer.eos_token_id)
    assert any({"brackets", "rings"} & set(faults(row["smiles"], row["finished"])) for row in plain)


# Probes


def test_grammar_counts_what_is_open():
    assert grammar(["C", "(", "C", "1", ")", "C", "1"]) == [
        (0, 0), (0, 0), (1, 0), (1, 0), (1, 1), (0, 1), (0, 1), (0, 0),
    ]  # fmt: skip
    assert [rings for _, rings in grammar(["C", "1", "C", "%12", "C", "1", "C", "%12"])] == [0, 0, 1, 1, 2, 2, 1, 1, 0]


def test_states_are_those_of_each_molecule_alone(model, tokenizer):
    rows = [tokenizer(text)["input_ids"] for text in ("CC", "NC(=O)c1ccccc1", "CO")]
    found = states_by_call(model, rows, tokenizer.pad_token_id, 2)
    alone = [states_by_call(model, [row], tokenizer.pad_token_id, 2) for row in rows]
    assert list(found) == [("embedding", 0, 0), *(("core", loop, layer) for loop in (0, 1) for layer in (0, 1))]
    for call, states in found.items():
        torch.testing.assert_close(states, torch.cat([each[call] for each in alone]), rtol=1e-4, atol=1e-5)


def test_a_probe_finds_what_is_put_into_the_states_and_the_controls_do_not(model, tokenizer):
    """A layer that writes the number of open branches into its output."""
    opens, closes = (tokenizer.get_vocab()[token] for token in "()")
    seen = {}
    model.model.register_forward_pre_hook(lambda m, a, k: seen.update(ids=k["input_ids"]), with_kwargs=True)

    def write_depth(layer, arguments, output):
        depth = ((seen["ids"] == opens).int() - (seen["ids"] == closes).int()).cumsum(1)
        output = output.clone()
        output[..., :4] = 10.0 * torch.nn.functional.one_hot(depth.clamp(0, 3).long(), 4)
        return output

    model.model.core[1].register_forward_hook(write_depth)
    rows = probe_grammar(model, tokenizer, SMILES, num_loops=2)
    assert len(rows) == 2 * 2 * 2
    told = [row for row in rows if row["target"] == "bracket_depth" and row["layer"] == 1]
    for row in told:
        assert row["accuracy"] == 1.0
        assert row["shuffled"] <= row["majority"] + 0.05
        assert row["over_controls"] == row["accuracy"] - max(
            row[name] for name in ("majority", "shuffled", "embedding", "random_init")
        )
        assert row["embedding"] < 1.0
    assert len(probes_text(rows).splitlines()) == 9


def test_too_few_molecules_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="at least ten molecules, got 3"):
        probe_grammar(model, tokenizer, SMILES[:3], 2)
