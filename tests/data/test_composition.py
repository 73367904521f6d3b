"""The composition task: the out-of-distribution split really is one, and the paper's counts come out."""

import doctest
import hashlib
from collections import Counter

import numpy as np
import pytest

from data_builders import Composition, load_task

# The graph of the laws: 100 entities, a fifth of 1,500 facts OOD, and no relation pair held out.
GRAPH = {"num_entities": 100, "num_relations": 20, "out_degree": 15, "ood_share": 0.2, "phi": 9.0, "id_holdout": 0.05,
         "pair_holdout": 0.0}  # fmt: skip
KINDS = ("atomic", "train", "id", "ood", "ood_first", "ood_second", "pair")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def cpu(cache):
    return load_task("composition", "cpu", cache_dir=cache, **GRAPH)


@pytest.fixture(scope="module")
def paired(cache):
    """The same graph with a tenth of the relation pairs held out."""
    return load_task("composition", "cpu", cache_dir=cache, **(GRAPH | {"pair_holdout": 0.1}))


@pytest.fixture(scope="module")
def paper(cache):
    return load_task("composition", "paper", cache_dir=cache)


def rows_of(dataset, *split_kinds: str) -> list[dict]:
    return [row for split in dataset.values() for row in split.to_list() if row["split_kind"] in split_kinds]


def facts_used(row: dict, facts: dict) -> list[tuple[str, str]]:
    """The two (entity, relation) facts that a composition walks over."""
    head, first, second = row["text"].split()
    return [(head, first), (facts[head, first], second)]


@pytest.fixture(scope="module")
def facts(cpu):
    return {tuple(row["text"].split()): row["answer"] for row in rows_of(cpu, "atomic")}


@pytest.mark.parametrize("name", ["cpu", "paired"])
def test_every_answer_is_found_by_walking_the_graph(name, facts, request):
    for row in rows_of(request.getfixturevalue(name), *KINDS):
        walked = [row["text"].split()[0]]
        for relation in row["text"].split()[1:]:
            walked.append(facts[walked[-1], relation])
        assert row["answer"] == walked[-1]
        assert row["path"] == [int(word[1:]) for word in walked]
        assert row["hops"] == len(walked) - 1


def test_every_entity_has_out_degree_distinct_relations(facts):
    assert Counter(head for head, _ in facts) == {f"e{i}": 15 for i in range(100)}
    assert {relation for _, relation in facts} == {f"r{i}" for i in range(20)}
    assert set(facts.values()) == {f"e{i}" for i in range(100)}


def test_ood_facts_are_known_and_never_composed(cpu, facts):
    """Found again from the rows alone: no fact of an OOD question is part of any training composition."""
    composed = {fact for row in rows_of(cpu, "train") for fact in facts_used(row, facts)}
    for row in rows_of(cpu, "ood"):
        for fact in facts_used(row, facts):
            assert fact in facts
            assert fact not in composed


def test_id_questions_use_facts_that_are_composed_in_training(cpu, facts):
    composed = {fact for row in rows_of(cpu, "train") for fact in facts_used(row, facts)}
    used = [fact for row in rows_of(cpu, "id") for fact in facts_used(row, facts)]
    assert sum(fact in composed for fact in used) / len(used) > 0.99
    never = {fact for row in rows_of(cpu, "ood") for fact in facts_used(row, facts)}
    assert not never & set(used)


def test_every_composition_of_two_ood_facts_is_held_out(cpu, facts):
    """All of them by brute force, so that the held-out set is not a chosen one."""
    ood_facts = {fact for row in rows_of(cpu, "ood") for fact in facts_used(row, facts)}
    possible = {
        f"{head} {first} {second}"
        for head, first in ood_facts
        for place, second in ood_facts
        if place == facts[head, first]
    }
    assert possible == {row["text"] for row in rows_of(cpu, "ood")}


def test_exactly_the_named_fact_of_a_mixed_question_is_ood(cpu, facts):
    """OOD facts are those of the ood questions: the cpu preset composes each of them with another at least once."""
    ood_facts = {fact for row in rows_of(cpu, "ood") for fact in facts_used(row, facts)}
    assert len(ood_facts) > 0.95 * 300
    composed = {fact for row in rows_of(cpu, "train") for fact in facts_used(row, facts)}
    for kind, place in (("ood_first", 0), ("ood_second", 1)):
        rows = rows_of(cpu, kind)
        assert len(rows) == 1_000
        used = [facts_used(row, facts) for row in rows]
        assert sum(pair[place] in ood_facts for pair in used) > 0.95 * 1_000
        assert not composed & {pair[place] for pair in used}
        assert not ood_facts & {pair[1 - place] for pair in used}
        assert sum(pair[1 - place] in composed for pair in used) > 0.99 * 1_000


def test_mixed_questions_are_a_sample_of_all(cache, cpu, facts):
    """A cap above their number gives every composition of one OOD fact, by brute force; the preset's is part of it."""
    builder = Composition(config_name="cpu", cache_dir=cache, test_per_kind=10_000, **GRAPH)
    relations, tails, ood = builder.graph
    for kind, wanted in (("ood_first", (True, False)), ("ood_second", (False, True))):
        possible = {
            f"e{first // 15} r{relations[first]} r{relations[second]}"
            for first in range(1_500)
            for second in range(15 * tails[first], 15 * tails[first] + 15)
            if (ood[first], ood[second]) == wanted
        }
        heads = builder.compositions()[kind]
        assert {f"e{a // 15} r{relations[a]} r{relations[b]}" for a, b in heads} == possible
        assert {row["text"] for row in rows_of(cpu, kind)} < possible
        assert len({row["path"][0] for row in rows_of(cpu, kind)}) > 90


def test_held_out_pairs_are_in_no_other_composition(paired):
    def pairs(*kinds):
        return {tuple(row["text"].split()[1:]) for row in rows_of(paired, *kinds)}

    assert len(rows_of(paired, "pair")) == 1_000
    assert len(pairs("pair")) == 40
    assert len(pairs("train")) == 400 - 40
    assert not pairs("pair") & pairs("train", "id", "ood", "ood_first", "ood_second")
    # Each of the relations is still composed in both places.
    assert all({pair[place] for pair in pairs("train")} == {f"r{i}" for i in range(20)} for place in (0, 1))


def test_facts_of_pair_questions_are_composed_in_training(paired, facts):
    composed = {fact for row in rows_of(paired, "train") for fact in facts_used(row, facts)}
    used = [fact for row in rows_of(paired, "pair") for fact in facts_used(row, facts)]
    assert sum(fact in composed for fact in used) / len(used) > 0.99
    assert not {fact for row in rows_of(paired, "ood") for fact in facts_used(row, facts)} & set(used)


def test_holding_out_pairs_takes_nothing_from_the_id_questions(cpu, paired):
    for kind in ("atomic", "train", "id", "ood_first", "ood_second"):
        assert len(rows_of(paired, kind)) == len(rows_of(cpu, kind))
    assert rows_of(paired, "atomic") == rows_of(cpu, "atomic")
    assert {row["text"] for row in rows_of(paired, "ood")} < {row["text"] for row in rows_of(cpu, "ood")}


def test_what_the_paper_left_open_is_in_test_alone_and_after_its_rows(cache, cpu):
    """The gate of training averages over validation: it must not move. Nor may an older run's rows."""
    assert set(cpu["train"]["split_kind"][:]) == {"atomic", "train"}
    assert set(cpu["validation"]["split_kind"][:]) == {"id", "ood"}
    bare = load_task("composition", "cpu", cache_dir=cache, test_per_kind=0, **GRAPH)
    assert bare["train"].to_list() == cpu["train"].to_list()
    assert bare["validation"].to_list() == cpu["validation"].to_list()
    assert bare["test"].to_list() == cpu["test"].to_list()[: len(bare["test"])]
    assert set(bare["test"]["split_kind"][:]) == {"id", "ood"}


@pytest.mark.parametrize(("seed", "expected"), [(0, "89834efc4347b78f"), (1, "aea6a8312bbb16af")])
def test_rows_are_those_of_the_first_version(cache, seed, expected):
    """SHA-256 of the texts of train, id and ood as version 1.0.0 made them."""
    dataset = load_task("composition", "cpu", cache_dir=cache, seed=seed, **GRAPH)
    texts = [row["text"] for row in rows_of(dataset, "atomic", "train", "id", "ood")]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == expected


def test_no_item_is_in_two_splits_or_twice_in_one(cpu, paired, paper):
    for dataset in (cpu, paired, paper):
        texts = [text for split in dataset.values() for text in split["text"][:]]
        assert len(set(texts)) == len(texts)


def test_cpu_preset_is_small_and_its_test_is_not(cache):
    preset = load_task("composition", "cpu", cache_dir=cache)
    assert Counter(preset["train"]["split_kind"][:]) == {"atomic": 1_000, "train": 11_480}
    assert set(preset["test"]["split_kind"][:]) == {"id", "ood", "ood_first", "ood_second", "pair"}
    for split in ("validation", "test"):
        assert min(Counter(preset[split]["split_kind"][:]).values()) >= 300


def test_paper_preset_has_the_paper_counts(paper):
    """40,000 facts, 7.2 x 38,000 compositions, 0.5 % of about 721,900 held out, about 2,000 OOD questions."""
    assert Counter(paper["train"]["split_kind"][:]) == {"atomic": 40_000, "train": 273_600}
    held_out = Counter(paper["validation"]["split_kind"][:]) + Counter(paper["test"]["split_kind"][:])
    assert abs(held_out["id"] - 0.005 * 721_900) < 10
    assert abs(held_out["ood"] - 2_000) < 100
    validation, test = (Counter(paper[split]["split_kind"][:]) for split in ("validation", "test"))
    assert all(abs(validation[kind] - test[kind]) <= 1 for kind in ("id", "ood"))


@pytest.mark.parametrize("seed", [0, 1])
def test_paper_statistics_of_the_graph(seed):
    """What the generator of arXiv 2604.07822 gives: 721.8 k both ID, 76.2 k one OOD, 2,017 both OOD; train has 38.1 %
    of the pool and nearly all relation pairs, so that only the composition of facts is held out."""
    builder = Composition(config_name="paper", seed=seed)
    relations, tails, ood = builder.graph
    second_ood = ood.reshape(2_000, 20)[tails]
    assert ood.sum() == 2_000
    assert abs((~ood[:, None] & ~second_ood).sum() - 721_900) < 1_500
    assert abs((ood[:, None] ^ second_ood).sum() - 76_100) < 1_500
    assert abs((ood[:, None] & second_ood).sum() - 2_000) < 100
    chains = builder.compositions()
    every = Composition(config_name="paper", seed=seed, test_per_kind=100_000).compositions()
    assert abs(len(every["ood_first"]) + len(every["ood_second"]) - 76_100) < 1_500
    assert len(chains["ood_first"]) == len(chains["ood_second"]) == 1_000
    assert len(chains["train"]) / (len(chains["id"]) / 0.005 * 0.995) == pytest.approx(0.381, abs=0.001)
    seen = np.zeros((200, 200), dtype=bool)
    seen[tuple(relations[chains["train"]].T)] = True
    assert 39_930 <= seen.sum() <= 39_980
    assert seen[tuple(relations[chains["ood"]].T)].mean() >= 0.997
    # The commonest answer after each second relation is nearly worthless, above all out of distribution.
    answers = np.zeros((200, 2_000), dtype=int)
    np.add.at(answers, (relations[chains["train"][:, 1]], tails[chains["train"][:, 1]]), 1)
    commonest = answers.argmax(axis=1)
    held_out = {kind: chains[kind][:, 1] for kind in ("id", "ood")}
    guess = {kind: (commonest[relations[last]] == tails[last]).mean() for kind, last in held_out.items()}
    assert guess["id"] < 0.02
    assert guess["ood"] < 0.006


def test_another_seed_is_another_folder_and_other_data(cache, cpu, facts):
    other = load_task("composition", "cpu", cache_dir=cache, seed=1, **GRAPH)
    assert other.cache_files != cpu.cache_files
    assert {tuple(row["text"].split()): row["answer"] for row in rows_of(other, "atomic")} != facts


def test_same_seed_same_rows(tmp_path, cpu):
    again = load_task("composition", "cpu", cache_dir=tmp_path, **GRAPH)
    assert all(again[split].to_list() == cpu[split].to_list() for split in cpu)
    streamed = Composition(config_name="cpu", cache_dir=tmp_path, **GRAPH).as_streaming_dataset(split="test")
    assert list(streamed) == cpu["test"].to_list()


def test_the_docstring_draws_a_real_example(cache):
    test = doctest.DocTestParser().get_doctest(
        Composition.__doc__,
        {"load_task": lambda name, config_name: load_task(name, config_name, cache_dir=cache)},
        "Composition",
        None,
        None,
    )
    assert len(test.examples) == 1
    assert doctest.DocTestRunner().run(test).failed == 0
    row = eval(test.examples[0].want)
    (_, first, second), path = row["text"].split(), row["path"]
    assert f"e{path[0]} --{first}--> e{path[1]} --{second}--> e{path[2]}" in Composition.__doc__


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ph": 7.2}, "ph'. Did you mean 'phi'"),
        ({"phi": 12.0}, "phi must be at most 11.4[0-9] for this graph, got 12.0"),
        ({"phi": 0}, "phi must be > 0"),
        ({"pair_holdout": 0.3}, "phi must be at most 7.[0-9]+ for this graph and pair_holdout 0.3, got 9.0"),
        ({"pair_holdout": 1.0}, r"pair_holdout must be 0, or at least 0.0025 \(one pair\) and below 1, got 1.0"),
        ({"pair_holdout": 0.001}, "pair_holdout must be 0, or at least 0.0025"),
        ({"test_per_kind": -1}, "test_per_kind must be a whole number >= 0"),
        ({"ood_share": 0.0}, "ood_share must be above 0 and below 1"),
        ({"id_holdout": 1.5}, "id_holdout must be above 0 and below 1"),
        ({"out_degree": 21}, "out_degree 21 is above num_relations 20"),
        ({"num_entities": 1}, "num_entities must be a whole number >= 2"),
        ({"ood_share": 0.001}, "held-out compositions are too few"),
    ],
)
def test_a_bad_field_raises_and_builds_nothing(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_task("composition", "cpu", cache_dir=tmp_path, **(GRAPH | overrides))
    assert not list(tmp_path.rglob("*.arrow"))
