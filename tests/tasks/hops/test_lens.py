"""Laws of lens, patching, bridge swap and probes, on a small graph and models with random weights."""

import datasets
import numpy as np
import pytest
import torch

from data_builders import hop_tokenizer
from looplab.instruments.linear_probe import fit_probe, probe_accuracy, random_twin, with_bias
from looplab.instruments.recorder import edit, layer_calls, record
from looplab.tasks.hops.lens import (
    Chains,
    accuracy,
    chains_of,
    corrupt,
    exchange,
    facts_of,
    follow,
    logit_lens,
    patch,
    random_step,
    realign,
    redirect,
    swap_bridge,
)
from looplab.tasks.hops.probes import probe_path, unseen
from toys import FP32, make_model

ENTITIES, RELATIONS = 8, 3
# (entity, relation) -> entity; entity 7 has no facts, and relation 2 leaves only some.
GRAPH = {
    (entity, relation): int(tail)
    for (entity, relation), tail in np.ndenumerate(np.random.default_rng(0).integers(ENTITIES, size=(7, RELATIONS)))
    if relation < 2 or entity % 2
}


@pytest.fixture(scope="module")
def tokenizer():
    return hop_tokenizer(ENTITIES, RELATIONS)


@pytest.fixture(scope="module")
def rows():
    """All facts, and all chains of two facts; every third of those is held out."""
    paths = [((head, tail), (relation,)) for (head, relation), tail in GRAPH.items()]
    paths += [
        ((head, bridge, GRAPH[bridge, second]), (first, second))
        for (head, first), bridge in GRAPH.items()
        for second in range(RELATIONS)
        if (bridge, second) in GRAPH
    ]
    kinds = [
        "atomic" if len(relations) == 1 else "id" if i % 3 == 0 else "train" for i, (_, relations) in enumerate(paths)
    ]
    return datasets.Dataset.from_dict(
        {
            "text": [
                " ".join([f"e{path[0]}", *(f"r{relation}" for relation in relations)]) for path, relations in paths
            ],
            "answer": [f"e{path[-1]}" for path, _ in paths],
            "hops": [len(relations) for _, relations in paths],
            "split_kind": kinds,
            "path": [list(path) for path, _ in paths],
        }
    )


@pytest.fixture(scope="module")
def facts(rows, tokenizer):
    return facts_of(rows, tokenizer)


@pytest.fixture(scope="module")
def groups(rows, tokenizer):
    return {chains.split_kind: chains for chains in chains_of(rows, tokenizer, hops=2)}


@pytest.fixture(scope="module")
def chains(groups):
    return groups["id"]


@pytest.fixture(scope="module", params=["plain", "sections", "norm_between_loops"])
def model(request, tokenizer):
    kinds = {
        "plain": {"num_core_layers": 1, "num_loops": 2},
        "sections": {"num_prelude_layers": 1, "num_coda_layers": 1, "num_loops": 2, "loop_connection": "inject_add"},
        "norm_between_loops": {"norm_between_loops": True, "num_core_layers": 1, "num_loops": 2},
    }
    return make_model(vocab_size=len(tokenizer), **kinds[request.param])


def brute_force(tokenizer, question):
    """The path of a question (T,) of ids, by the graph itself; None where a fact is missing."""
    entity, *relations = [
        int(word[1:]) for word in tokenizer.convert_ids_to_tokens(question.tolist()) if word != "<ans>"
    ]
    path = [entity]
    for relation in relations:
        if (path[-1], relation) not in GRAPH:
            return None
        path.append(GRAPH[path[-1], relation])
    return tokenizer.convert_tokens_to_ids([f"e{entity}" for entity in path])


def test_chains_are_the_questions_and_their_paths(groups, rows, tokenizer):
    assert {kind: len(chains.path) for kind, chains in groups.items()} == {
        kind: sum(row["split_kind"] == kind for row in rows) for kind in ("id", "train")
    }
    for chains in groups.values():
        assert chains.labels(tokenizer) == ["h", "r1", "r2", "<ans>"]
        for question, path in zip(chains.input_ids, chains.path, strict=True):
            assert path.tolist() == brute_force(tokenizer, question)


def test_without_a_readout_token_the_last_relation_is_the_readout(chains, tokenizer):
    shorter = Chains(2, "id", chains.input_ids[:, :3], chains.path)
    assert shorter.labels(tokenizer) == ["h", "r1", "r2"]


def test_a_limit_takes_the_same_chains_every_time(rows, tokenizer):
    first, again = (chains_of(rows, tokenizer, hops=2, limit=5) for _ in range(2))
    assert [len(chains.path) for chains in first] == [5, 5]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, again, strict=True))


def test_a_hop_count_without_chains_is_refused(rows, tokenizer):
    with pytest.raises(ValueError, match=r"no chains of hops=3; there are \[1, 2\]"):
        chains_of(rows, tokenizer, hops=3)


def test_following_stops_where_a_fact_is_missing(facts, tokenizer):
    entities = tokenizer.convert_tokens_to_ids([f"e{i}" for i in range(ENTITIES)])
    relations = tokenizer.convert_tokens_to_ids([f"r{i}" for i in range(RELATIONS)])
    questions = torch.cartesian_prod(*map(torch.tensor, (entities, relations, relations)))
    for question, path in zip(questions, follow(facts, questions[:, 0], questions[:, 1:]), strict=True):
        known = brute_force(tokenizer, question)
        assert (path[-1] == -1) if known is None else (path.tolist() == known)


def test_a_missing_fact_is_not_looked_up_again():
    """Index -1 is the last token: its facts must not continue a chain that has ended."""
    facts = torch.full((3, 3), -1)
    facts[2, 1] = 2
    assert follow(facts, torch.tensor([0, 2]), torch.tensor([[1, 1], [1, 1]])).tolist() == [[0, -1, -1], [2, 2, 2]]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_corrupted_chain_differs_in_one_word_and_in_its_answer(chains, facts, tokenizer, position):
    clean, corrupted = corrupt(chains, facts, position)
    assert len(clean.path) > len(chains.path) / 2
    differs = clean.input_ids != corrupted.input_ids
    assert differs[:, position].all()
    assert differs.sum() == len(differs)
    assert (clean.answers != corrupted.answers).all()
    for question, path in zip(corrupted.input_ids, corrupted.path, strict=True):
        assert path.tolist() == brute_force(tokenizer, question)


def test_a_redirected_chain_goes_on_from_another_bridge(chains, facts, tokenizer):
    kept, redirected = redirect(chains, facts, hop=1)
    assert torch.equal(kept.input_ids, redirected.input_ids)
    assert (kept.answers != redirected.answers).all()
    for question, path in zip(redirected.input_ids, redirected.path, strict=True):
        from_bridge = torch.stack([path[1], question[2]])
        assert path[1:].tolist() == brute_force(tokenizer, from_bridge)
    assert torch.equal(kept.path[:, 0], redirected.path[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda chains, facts: corrupt(chains, facts, 3), r"position must be 0 .* to 2 .*, got 3"),
        (lambda chains, facts: redirect(chains, facts, 2), r"hop must be a bridge's, from 1 to 1 .* got 2"),
        (lambda chains, facts: corrupt(chains, torch.full_like(facts, -1), 0), "the graph is too small"),
    ],
)
def test_what_cannot_be_changed_is_refused(chains, facts, change, message):
    with pytest.raises(ValueError, match=message):
        change(chains, facts)


@pytest.mark.parametrize("num_loops", [1, 3])
def test_the_lens_at_the_last_call_is_the_models_answer(model, chains, num_loops):
    table = logit_lens(model, chains, num_loops)
    last = layer_calls(model.config, num_loops)[-1]
    (row,) = [
        row
        for row in table
        if (row["section"], row["loop"], row["layer"]) == last and row["position"] == 3 and row["hop"] == 2
    ]
    logits = record(model, chains.input_ids, num_loops).logits[:, -1]
    log_probs = logits.log_softmax(-1).gather(1, chains.answers[:, None])
    order = logits.argsort(descending=True)
    ranks = 1 + (order == chains.answers[:, None]).nonzero()[:, 1]
    assert (
        row["top1"] == pytest.approx(accuracy(model, chains, num_loops)) == pytest.approx((ranks == 1).float().mean())
    )
    assert row["mrr"] == pytest.approx((1 / ranks).mean().item(), rel=1e-5)
    assert row["log_prob"] == pytest.approx(log_probs.mean().item(), rel=1e-5)


def test_the_lens_has_a_row_per_call_position_and_entity_of_the_path(model, chains):
    table = logit_lens(model, chains)
    sites = [((row["section"], row["loop"], row["layer"]), row["position"], row["hop"]) for row in table]
    calls = layer_calls(model.config)
    assert sites == [(call, position, hop) for call in calls for position in range(4) for hop in range(3)]


def test_batches_do_not_change_a_table(chains, facts, tokenizer, monkeypatch):
    model = make_model(vocab_size=len(tokenizer), num_core_layers=1, num_loops=2)
    pair = corrupt(chains, facts, 0)
    whole = [*logit_lens(model, chains), *patch(model, *pair)]
    monkeypatch.setattr(Chains.split, "__defaults__", (7,))
    for row, again in zip(whole, [*logit_lens(model, chains), *patch(model, *pair)], strict=True):
        assert row.keys() == again.keys()
        numbers = [name for name, value in row.items() if isinstance(value, float)]
        assert [row[name] for name in numbers] == pytest.approx([again[name] for name in numbers], abs=1e-4)


def at(table, call, positions):
    (row,) = [
        row
        for row in table
        if (row["section"], row["loop"], row["layer"]) == tuple(call) and row["positions"] == positions
    ]
    return row


def test_patching_the_readout_of_the_last_call_gives_the_source_run(model, chains, facts):
    clean, corrupted = corrupt(chains, facts, 0)
    for source, target in ((clean, corrupted), (corrupted, clean)):
        row = at(patch(model, source, target), layer_calls(model.config)[-1], [3])
        assert row["recovered"] == pytest.approx(row["source"]) == pytest.approx(accuracy(model, source))
        assert row["logit_recovery"] == pytest.approx(1.0, abs=1e-4)
        assert row["n"] == len(clean.path)


def test_patching_a_state_that_is_the_same_in_both_changes_nothing(model, chains, facts):
    for changed in (1, 2):
        table = patch(model, *corrupt(chains, facts, changed))
        for call in layer_calls(model.config):
            for position in range(changed):  # no look-ahead: these words and states are those of both runs
                row = at(table, call, [position])
                assert row["recovered"] == row["unpatched"]
                assert row["logit_recovery"] == pytest.approx(0.0, abs=1e-5)


def test_after_the_last_call_only_the_readout_counts(model, chains, facts):
    last = layer_calls(model.config)[-1]
    patched, swapped = patch(model, *corrupt(chains, facts, 0)), swap_bridge(model, chains, facts)
    reached = accuracy(model, redirect(chains, facts, 1)[0])
    for positions in ([0], [1], [2], [1, 2]):
        assert at(patched, last, positions)["logit_recovery"] == pytest.approx(0.0, abs=1e-5)
        assert at(swapped, last, positions)["kept"] == pytest.approx(reached)


def test_a_cell_of_the_tables_is_what_editing_by_hand_gives(chains, facts, tokenizer):
    model = make_model(vocab_size=len(tokenizer), num_core_layers=1, num_loops=3, tie_word_embeddings=False)
    clean, corrupted = corrupt(chains, facts, 0)
    states = record(model, clean.input_ids).states["core", 1, 0]
    with edit(model, ("core", 1, 0), lambda _: states[:, 1:3], [1, 2]):
        said = record(model, corrupted.input_ids).logits[:, -1].argmax(-1)
    row = at(patch(model, clean, corrupted), ("core", 1, 0), [1, 2])
    assert row["recovered"] == pytest.approx((said == clean.answers).float().mean().item())

    kept, redirected = redirect(chains, facts, 1)
    directions = torch.nn.functional.normalize(model.lm_head.weight.detach(), dim=-1)
    change = exchange(directions[kept.path[:, 1]], directions[redirected.path[:, 1]])
    with edit(model, ("core", 1, 0), change, [1]):
        said = record(model, kept.input_ids).logits[:, -1].argmax(-1)
    row = at(swap_bridge(model, chains, facts), ("core", 1, 0), [1])
    assert row["swapped"] == pytest.approx((said == redirected.answers).float().mean().item())
    assert row["kept"] == pytest.approx((said == kept.answers).float().mean().item())


@pytest.mark.parametrize("of", ["said", "bridge"])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_realigned_state_is_the_embedding_of_what_it_says_or_of_the_bridge(
    chains, tokenizer, of, weight, monkeypatch
):
    """The state is replaced by hand, chain by chain, and what the model then says is taken for the right answer. It is
    read at relation 1, since a random model hardly hands a state on to the readout."""

    def answered(model, input_ids, answers, num_loops):
        return model(input_ids, num_loops=num_loops).logits[:, 1].argmax(-1) == answers, None

    monkeypatch.setattr("looplab.tasks.hops.lens.answered", answered)
    fields = {"num_prelude_layers": 1, "embedding_multiplier": 3.0, "tie_word_embeddings": False}
    model = make_model(vocab_size=len(tokenizer), num_core_layers=2, num_loops=3, **fields)
    states = record(model, chains.input_ids).states["core", 1, 1][:, 1]
    words, bridge = 3.0 * model.get_input_embeddings().weight.detach(), chains.path[:, 1]
    said = model.readout(states).argmax(-1)
    answers = []
    for ids, word in zip(chains.input_ids, words[{"said": said, "bridge": bridge}[of]], strict=True):
        with edit(model, ("core", 1, 1), lambda state, word=word: (1 - weight) * state + weight * word, [1]):
            answers.append(model(ids[None]).logits[0, 1].argmax())
    path = torch.cat([chains.path[:, :2], torch.stack(answers)[:, None]], dim=1)
    asked = Chains(2, "id", chains.input_ids, path)
    rows = realign(model, asked)
    assert [row["positions"] for row in rows[::4]] == [[1], [2], [1, 2]] * 2
    table = {(row["loop"], row["of"], row["weight"]): row for row in rows if row["positions"] == [1]}
    assert table.keys() == {(i, token, share) for i in (0, 1) for token in ("said", "bridge") for share in (0.5, 1.0)}
    right = {key: row["realigned"] for key, row in table.items()}
    assert right[1, of, weight] == pytest.approx(1)
    assert max(share for key, share in right.items() if key != (1, of, weight)) < 0.95
    row = table[1, of, weight]
    assert row["unchanged"] == pytest.approx(accuracy(model, asked))
    assert row["decoded"] == pytest.approx((said == bridge).float().mean().item())
    cosine = torch.nn.functional.cosine_similarity(states, words[bridge])
    assert row["aligned"] == pytest.approx(cosine.mean().item(), abs=1e-6)


def test_one_loop_has_no_state_to_realign(chains, tokenizer):
    assert realign(make_model(vocab_size=len(tokenizer)), chains, num_loops=1) == []


def test_runs_of_different_shape_cannot_be_patched(model, chains):
    with pytest.raises(ValueError, match=r"source .* and target .* must have one shape"):
        patch(model, chains, chains.keep(torch.arange(2)))


def directions_of(rows, seed):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def test_exchanging_two_directions_swaps_their_components_and_nothing_else():
    first, second, state = directions_of(5, 0), directions_of(5, 1), directions_of(15, 2).view(5, 3, 16)
    change = exchange(first, second)

    def along(state, direction):
        return (state * torch.nn.functional.normalize(direction, dim=-1)[:, None]).sum(-1)

    changed = change(state)
    torch.testing.assert_close(along(changed, first), along(state, second), **FP32)
    torch.testing.assert_close(along(changed, second), along(state, first), **FP32)
    torch.testing.assert_close(changed.norm(dim=-1), state.norm(dim=-1), **FP32)
    torch.testing.assert_close(change(changed), state, **FP32)
    # What it adds lies in the plane of the two.
    plane = torch.linalg.qr(torch.stack([first, second], dim=-1)).Q  # (5, 16, 2)
    step = changed - state
    torch.testing.assert_close(step @ plane @ plane.transpose(1, 2), step, **FP32)


def test_exchanging_a_direction_with_itself_is_the_identity(chains, facts, tokenizer):
    state, same = directions_of(15, 2).view(5, 3, 16), directions_of(5, 0)
    assert torch.equal(exchange(same, same.clone())(state), state)
    # All tokens with one direction: every b' is b, and neither the swap nor its control does anything.
    model = make_model(vocab_size=len(tokenizer), num_core_layers=1, num_loops=2)
    table = swap_bridge(model, chains, facts, directions=torch.ones(len(tokenizer), model.config.hidden_size))
    kept, redirected = redirect(chains, facts, 1)
    for row in table:
        assert row["kept"] == row["random_kept"] == pytest.approx(accuracy(model, kept))
        assert row["swapped"] == row["random_swapped"] == pytest.approx(accuracy(model, redirected))


def test_at_the_readout_an_exchange_swaps_the_two_tokens():
    """A head with rows of one length reads components off the state, which keeps its norm."""
    model = make_model(norm_type="rmsnorm", tie_word_embeddings=False)
    weight = torch.nn.functional.normalize(model.lm_head.weight.detach(), dim=-1)
    model.lm_head.weight.data.copy_(weight)
    ids = torch.randint(1, 50, (4, 5), generator=torch.Generator().manual_seed(0))
    before = record(model, ids).logits[:, -1]
    first, second = before.argmax(-1), before.argmin(-1)
    with edit(model, ("core", 2, 1), exchange(weight[first], weight[second]), [-1]):
        after = record(model, ids).logits[:, -1]
    for now, then in ((first, second), (second, first)):
        torch.testing.assert_close(after.gather(1, now[:, None]), before.gather(1, then[:, None]), **FP32)


def test_the_random_control_is_as_long_as_the_swap():
    change, state = exchange(directions_of(5, 0), directions_of(5, 1)), directions_of(15, 2).view(5, 3, 16)
    step = random_step(change, torch.Generator().manual_seed(0))(state) - state
    torch.testing.assert_close(step.norm(dim=-1), (change(state) - state).norm(dim=-1), **FP32)
    assert not torch.allclose(step, change(state) - state, atol=0.1)


def planted(rows, seed, classes=4):
    """Features whose first `classes` coordinates say the label, among noise."""
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    features = directions_of(rows, seed + 100)
    features[:, :classes] += 5.0 * torch.nn.functional.one_hot(labels, classes)
    return features, labels + 11  # token ids


def test_a_probe_finds_a_planted_direction():
    (features, labels), (test_features, test_labels) = planted(400, 0), planted(200, 1)
    offset = 5.0 * torch.arange(16)  # a mean that is not the probe's business
    accuracy, majority = probe_accuracy(features + offset, labels, test_features + offset, test_labels)
    assert accuracy > 0.97
    assert majority < 0.35


def test_a_probe_on_random_labels_is_no_better_than_the_majority():
    features, test_features = directions_of(600, 0), directions_of(400, 1)
    labels, test_labels = ((directions_of(rows, seed)[:, 0] > 0.8).long() for rows, seed in ((600, 2), (400, 3)))
    accuracy, majority = probe_accuracy(features, labels, test_features, test_labels)
    assert majority == (test_labels == 0).float().mean()
    assert accuracy <= majority + 3 * (majority * (1 - majority) / 400) ** 0.5
    # A probe that may not use its features guesses the majority.
    assert probe_accuracy(features, labels, test_features, test_labels, penalty=1e4)[0] == pytest.approx(majority)


def test_a_probe_is_at_the_minimum_of_its_loss():
    features, labels = planted(100, 0)
    weights = fit_probe(features, labels - 11, 4, penalty=0.1).requires_grad_()
    loss = torch.nn.functional.cross_entropy(with_bias(features) @ weights, labels - 11)
    (loss + 0.05 * weights[:-1].square().sum()).backward()
    assert weights.grad.abs().max() < 1e-3


def test_a_probe_is_fitted_on_no_chain_that_begins_as_a_test_chain(groups):
    train, test = groups["train"], groups["id"].keep(torch.arange(6))
    for hop in (1, 2):
        known = {tuple(words[: hop + 1]) for words in test.input_ids.tolist()}
        kept = [i for i, words in enumerate(train.input_ids.tolist()) if tuple(words[: hop + 1]) not in known]
        assert unseen(train, test, hop).tolist() == kept
    assert len(unseen(train, test, 1)) < len(unseen(train, test, 2)) == len(train.path)


def test_probes_of_a_path_have_their_controls(groups, tokenizer):
    model = make_model(vocab_size=len(tokenizer), num_core_layers=1, num_loops=1, residual_init="zero")
    train, test = groups["train"], groups["id"].keep(torch.arange(6))
    table = probe_path(model, train, test)
    assert [(row["position"], row["hop"]) for row in table] == [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2)]
    for row in table:
        answers = train.path[unseen(train, test, row["hop"]), row["hop"]]
        assert row["majority"] == pytest.approx(
            (test.path[:, row["hop"]] == answers.mode().values).float().mean().item()
        )
        assert (row["n"], row["n_train"]) == (6, len(answers))
    with pytest.raises(ValueError, match="begins with the 1 facts of a test chain"):
        probe_path(model, train, train)


def test_the_random_twin_is_another_model_of_the_same_kind(tokenizer):
    model = make_model(vocab_size=len(tokenizer), residual_init="zero")
    before = torch.random.get_rng_state()
    twin, again, other = random_twin(model), random_twin(model), random_twin(model, seed=1)
    assert not torch.equal(twin.lm_head.weight, other.lm_head.weight)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (twin.config.residual_init, model.config.residual_init) == ("normal", "zero")
    for name, parameter in twin.named_parameters():
        assert parameter.shape == model.get_parameter(name).shape
        assert torch.equal(parameter, again.get_parameter(name))
    ids = torch.tensor([[3, 4, 5]])
    states = record(twin, ids).states["core", 0, 0][0, 2], record(twin, ids.flip(1)).states["core", 0, 0][0, 0]
    assert not torch.equal(*states)  # its layers do something: token 5 after 3 and 4 is not token 5 alone
