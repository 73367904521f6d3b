"""The k-hop task: what a row says is true on the graph, no item is in two splits, and the cache never lies."""

import doctest
import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest

from data_builders import Khop, export_parquet, hop_rows, khop, load_task
from data_builders.hop_rows import FEATURES
from data_builders.seeding import source_hash

# The graph of the quickstart with fewer hops: laws do not need its 65,000 rows.
SMALL = {"train_hops": 3, "max_hops": 8}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def quickstart(cache):
    return load_task("khop", "quickstart", cache_dir=cache, **SMALL)


@pytest.fixture(scope="module")
def paper(cache):
    return load_task("khop", "paper", cache_dir=cache)


def facts_of(dataset) -> dict[tuple[str, str], str]:
    """(entity, relation) -> entity, read from the atomic rows as a student would."""
    atomic = np.flatnonzero(dataset["train"].with_format("arrow")[:]["hops"].to_numpy() == 1)
    return {tuple(row["text"].split()): row["answer"] for row in dataset["train"].select(atomic).to_list()}


def rows_per_hop(split) -> dict[int, int]:
    hops = split["hops"][:]
    return {k: hops.count(k) for k in sorted(set(hops))}


def files_of(builder) -> dict[str, str]:
    """Name -> digest of the data files a builder has written."""
    files = Path(builder.cache_dir).glob("*.arrow")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_answer_is_found_by_walking_the_graph(quickstart):
    """The walker knows the atomic rows only, and goes one word at a time."""
    facts = facts_of(quickstart)
    for split in quickstart.values():
        for row in split.to_list():
            place, *relations = row["text"].split()
            walked = [place]
            for relation in relations:
                walked.append(facts[walked[-1], relation])
            assert row["answer"] == walked[-1]
            assert row["path"] == [int(word[1:]) for word in walked]
            assert row["hops"] == len(relations)


def test_relations_are_bijections(quickstart, paper):
    for dataset, num_entities, num_relations in ((quickstart, 20, 4), (paper, 200, 10)):
        facts = facts_of(dataset)
        entities = {f"e{i}" for i in range(num_entities)}
        assert {relation for _, relation in facts} == {f"r{i}" for i in range(num_relations)}
        for relation in {relation for _, relation in facts}:
            arrows = {place: answer for (place, name), answer in facts.items() if name == relation}
            assert set(arrows) == entities
            assert set(arrows.values()) == entities


def test_no_item_is_in_two_splits_or_twice_in_one(quickstart, paper):
    """Gate and test are separate splits; the paper used one set of items for both."""
    for dataset in (quickstart, paper):
        texts = [text for split in dataset.values() for text in split["text"][:]]
        assert len(set(texts)) == len(texts)


def test_paper_preset_has_the_paper_sizes(paper):
    deep = range(2, 41)
    assert rows_per_hop(paper["train"]) == {1: 2_000} | dict.fromkeys(deep, 15_000)
    assert rows_per_hop(paper["validation"]) == rows_per_hop(paper["test"]) == dict.fromkeys(deep, 375)


def test_programs_are_uniform_at_every_place(cache):
    """Also in the longest programs, which are drawn in two parts."""
    starts, relations = Khop(config_name="paper", cache_dir=cache).programs(40, "train")
    # 75 starts of each entity and 1,500 uses of each relation are expected, give or take five standard deviations.
    assert abs(np.bincount(starts, minlength=200) - 75).max() < 5 * 75**0.5
    for place in range(40):
        assert abs(np.bincount(relations[:, place], minlength=10) - 1_500).max() < 5 * 1_350**0.5


def test_few_programs_leave_three_quarters_to_train(quickstart):
    """Two hops over 20 x 4 are 320 programs in all: 40 for the gate, 40 for the test, not 375."""
    assert rows_per_hop(quickstart["train"]) == {1: 80, 2: 240, 3: 960}
    held_out = {2: 40, 3: 160} | dict.fromkeys(range(4, 9), 375)
    assert rows_per_hop(quickstart["validation"]) == rows_per_hop(quickstart["test"]) == held_out


@pytest.mark.parametrize(("far_hops", "beyond"), [(0, []), (8, []), (16, [16]), (30, [16, 24])])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_far_hops_are_held_out_rows_beside_the_same_others(cache, quickstart, far_hops, beyond, split):
    """Every eighth hop count; a run that goes further is trained and tested on the same other rows."""
    far = load_task("khop", "quickstart", cache_dir=cache, far_hops=far_hops, **SMALL)
    assert far["train"]["text"][:] == quickstart["train"]["text"][:]
    rows, near = far[split].to_list(), quickstart[split].to_list()
    assert rows[: len(near)] == near
    rows = rows[len(near) :]
    assert Counter(row["hops"] for row in rows) == dict.fromkeys(beyond, 375)
    facts = facts_of(quickstart)
    for row in rows[::50]:
        place, *relations = row["text"].split()
        for relation in relations:
            place = facts[place, relation]
        assert (place, "ood", len(relations)) == (row["answer"], row["split_kind"], row["hops"])


def test_split_kind_says_what_train_holds(quickstart):
    assert {(row["hops"], row["split_kind"]) for row in quickstart["train"].to_list()} == {
        (1, "atomic"),
        (2, "train"),
        (3, "train"),
    }
    for split in ("validation", "test"):
        for row in quickstart[split].to_list():
            assert row["split_kind"] == ("id" if row["hops"] <= 3 else "ood")


def test_training_on_fewer_hops_keeps_the_test(cache, quickstart):
    """So that runs of different depth are compared on the same items; only their split_kind differs."""
    shallow = load_task("khop", "quickstart", cache_dir=cache, **(SMALL | {"train_hops": 2}))
    assert set(shallow["train"]["hops"]) == {1, 2}
    for split in ("validation", "test"):
        assert shallow[split]["text"][:] == quickstart[split]["text"][:]
    assert {
        k for k, kind in zip(shallow["test"]["hops"], shallow["test"]["split_kind"], strict=True) if kind == "id"
    } == {2}


def test_same_seed_same_bytes(tmp_path):
    built = []
    for folder in ("one", "two"):
        builder = Khop(config_name="quickstart", cache_dir=tmp_path / folder, **SMALL)
        builder.download_and_prepare()
        built.append(files_of(builder))
    assert len(built[0]) == 3
    assert built[0] == built[1]


def test_another_seed_is_another_folder_and_other_data(cache, quickstart):
    """A peer's cache file name lacked the seed: asking for seed 1 returned the data of seed 0."""
    other = load_task("khop", "quickstart", cache_dir=cache, seed=1, **SMALL)
    assert facts_of(other) != facts_of(quickstart)
    shared = set(other["test"]["text"]) & set(quickstart["test"]["text"])
    assert len(shared) < len(other["test"]) / 5
    builders = [Khop(config_name="quickstart", cache_dir=cache, seed=seed, **SMALL) for seed in (0, 1, 2)]
    assert len({builder.cache_dir for builder in builders}) == 3


def test_a_field_given_its_own_value_is_not_a_second_cache_folder(cache, quickstart):
    same = load_task("khop", "quickstart", cache_dir=cache, seed=0, num_entities=20, **SMALL)
    assert same.cache_files == quickstart.cache_files


def test_a_changed_generator_does_not_reuse_old_data(tmp_path):
    """`datasets` keys its cache by version, not by code: the fingerprint of the source is part of our folder."""
    source = tmp_path / "khop.py"
    source.write_text(Path(khop.__file__).read_text())
    assert source_hash(str(source)) == source_hash(khop.__file__)
    source.write_text(source.read_text().replace("HELD_OUT = 8", "HELD_OUT = 4"))
    assert source_hash(str(source)) != source_hash(khop.__file__)
    builder = Khop(config_name="quickstart", cache_dir=tmp_path, **SMALL)
    assert source_hash(khop.__file__, hop_rows.__file__) in Path(builder.cache_dir).parts


def test_streaming_gives_the_same_rows(cache, quickstart):
    """An example depends on (config, seed, split, its place), not on how the data is read."""
    builder = Khop(config_name="quickstart", cache_dir=cache, **SMALL)
    streamed = builder.as_streaming_dataset(split="train")
    assert streamed.num_shards == 3
    assert list(streamed) == quickstart["train"].to_list()


def test_features_are_typed(quickstart):
    assert all(split.features == FEATURES for split in quickstart.values())


def test_the_docstring_draws_a_real_example(cache):
    test = doctest.DocTestParser().get_doctest(
        Khop.__doc__,
        {"load_task": lambda name, config_name: load_task(name, config_name, cache_dir=cache)},
        "Khop",
        None,
        None,
    )
    assert len(test.examples) == 1
    assert doctest.DocTestRunner().run(test).failed == 0
    row = eval(test.examples[0].want)
    words = [f"e{row['path'][0]}", *row["text"].split()[1:]]
    steps = [f"--{relation}--> e{place}" for relation, place in zip(words[1:], row["path"][1:], strict=True)]
    assert " ".join([words[0], *steps]) in Khop.__doc__


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train_hop": 3}, "train_hop'. Did you mean 'train_hops'"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"num_entities": 20.5}, "num_entities must be a whole number"),
        ({"num_relations": 1}, "num_relations must be a whole number >= 2"),
        ({"train_hops": True}, "train_hops must be a whole number"),
        ({"train_hops": 9}, "max_hops 8 is below train_hops 9"),
        ({"test_per_hop": 0}, "test_per_hop must be"),
        ({"seed": None}, "seed must have a value"),
    ],
)
def test_a_bad_field_raises_and_builds_nothing(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_task("khop", "quickstart", cache_dir=tmp_path, **(SMALL | overrides))
    assert not list(tmp_path.rglob("*.arrow"))


def test_unknown_names_come_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'khop'"):
        load_task("khopp", "cpu", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'quickstart'"):
        load_task("khop", "quikstart", cache_dir=tmp_path)


def test_deep_tests_are_new_programs_not_longer_copies(quickstart):
    """Some beginnings of held-out programs are themselves in train, as in the paper; the programs are not."""
    train = set(quickstart["train"]["text"])
    deep = [row["text"] for row in quickstart["test"].to_list() if row["split_kind"] == "ood"]
    assert not train & set(deep)
    assert all(len(text.split()) > 4 for text in deep)


def test_export_opens_without_our_code(tmp_path, quickstart, cache):
    """The folder is parquet and a card: what a Hub dataset repository holds. Two configs share one folder."""
    folder = export_parquet("khop", "quickstart", tmp_path / "hub", cache_dir=cache, **SMALL)
    export_parquet("khop", "cpu", folder, cache_dir=cache, train_per_hop=50, gate_per_hop=5, test_per_hop=7)
    assert {path.name for path in folder.iterdir()} == {"README.md", "quickstart", "cpu"}
    assert datasets.get_dataset_config_names(str(folder)) == ["quickstart", "cpu"]
    loaded = datasets.load_dataset(str(folder), "quickstart", cache_dir=tmp_path / "cache")
    for split, rows in quickstart.items():
        assert loaded[split].features == FEATURES
        assert loaded[split].to_list() == rows.to_list()
    streamed = datasets.load_dataset(str(folder), "cpu", split="test", streaming=True, cache_dir=tmp_path / "cache")
    hops = [row["hops"] for row in streamed]
    assert all(first <= second for first, second in pairwise(hops))
    assert hops.count(16) == 7
    card = (folder / "README.md").read_text()
    assert "| train_per_hop | 50 |" in card
    assert "{'text'" not in card


def test_export_never_overwrites(tmp_path, cache):
    folder = export_parquet("khop", "quickstart", tmp_path / "hub", cache_dir=cache, **SMALL)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="quickstart exists"):
        export_parquet("khop", "quickstart", folder, cache_dir=cache, seed=1, **SMALL)
    with pytest.raises(ValueError, match="something else than the task composition"):
        export_parquet("composition", "cpu", folder, cache_dir=cache)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="choose an empty or a new folder"):
        export_parquet("khop", "quickstart", tmp_path / "mine", cache_dir=cache, **SMALL)


def test_progress_is_visible(tmp_path, capsys):
    load_task("khop", "quickstart", cache_dir=tmp_path, **SMALL)
    assert "Generating train split" in capsys.readouterr().err
