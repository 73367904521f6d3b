"""k-hop chains over permutation relations (Kohli et al. 2026, arXiv 2604.07822; the depth task).

    graph     num_relations random permutations of num_entities entities
    program   (start entity, relation_1 .. relation_k); its answer is the entity the k relations lead to
    hop 1     every program, all in train (the atomic facts)
    hop k     distinct programs, drawn uniformly: first those of test, then validation, then train

The relations are permutations because, with random maps, the answer soon depends on the last relations only.
"""

from dataclasses import dataclass

import datasets
import numpy as np

from . import hop_rows
from .fields import check_fields, number, numbers
from .hop_rows import FEATURES, hop_tables
from .seeding import source_hash, stream

VERSION = datasets.Version("1.0.0")

# Where a hop count has few programs, validation and test get at most one in so many each; train gets three quarters.
HELD_OUT = 8

FAR_STEP = 8  # between the hop counts beyond max_hops

# Programs are numbered, and distinct numbers are drawn. Numbers stay below this limit, since numpy counts in 64 bits.
NUMBERED_PROGRAMS = 2**62


@dataclass
class KhopConfig(datasets.BuilderConfig):
    """Sizes of the graph and of the splits; any field may be given to `Khop` or `load_task` by name."""

    version: datasets.Version = VERSION
    num_entities: int = number(200, at_least=2, whole=True)
    num_relations: int = number(10, at_least=2, whole=True)
    train_hops: int = number(40, at_least=1, whole=True)  # train holds 1 .. train_hops
    max_hops: int = number(40, at_least=2, whole=True)  # validation and test hold 2 .. max_hops
    train_per_hop: int = number(15_000, at_least=1, whole=True)
    gate_per_hop: int = number(375, at_least=1, whole=True)  # validation rows: the held-out check of a curriculum
    test_per_hop: int = number(375, at_least=1, whole=True)
    far_hops: int = number(0, at_least=0, whole=True)  # validation and test go on to here, in steps of FAR_STEP
    # Validation and test hold these hop counts instead, to measure a trained model there.
    held_out_hops: list[int] | None = numbers(None, at_least=2, whole=True, distinct=True)
    seed: int = number(0, at_least=0, whole=True)

    def train_rows(self) -> dict[int, int]:
        """Hop count -> rows of the split train."""
        facts = self.num_entities * self.num_relations
        return {1: facts} | dict.fromkeys(range(2, self.train_hops + 1), self.train_per_hop)


class Khop(datasets.ArrowBasedBuilder):
    """k-hop chains: train (hops 1 .. train_hops), validation and test (hops 2 .. max_hops), pairwise disjoint.

    Configs: `paper` (200 entities x 10 relations, hops to 40), `cpu` (50 x 6, trained to 6 hops, tested to 16) and
    `quickstart` (20 x 4, trained to 8, tested to 24); with the field `far_hops` they go further, in steps of 8,
    and the field `held_out_hops` names hop counts one by one. `split_kind` is "atomic" or "train" in train; in
    validation and test it is "id" for a hop count that train holds, and "ood" for a deeper one. The rows of a hop
    count depend only on graph sizes, rows per hop and seed, so that a run trained to fewer hops is tested on the same
    rows. One example, e10 --r1--> e12 --r1--> e15 --r2--> e14:

    >>> load_task("khop", "quickstart")["test"][41]
    {'text': 'e10 r1 r1 r2', 'answer': 'e14', 'hops': 3, 'split_kind': 'id', 'path': [10, 12, 15, 14]}

    Rows are made as Arrow tables: the 616,250 rows of `paper` take seconds, row by row they would take a minute.
    Raises ValueError for a config field that is unknown, not a whole number, or too small.
    """

    VERSION = VERSION
    TAGS = ("synthetic", "multi-hop")  # what the card of an exported data set is found by on the Hub
    BUILDER_CONFIG_CLASS = KhopConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        KhopConfig(name="paper", description="The paper's sizes: 200 entities, 10 relations, hops to 40."),
        KhopConfig(
            name="cpu",
            description="Small: 50 entities, 6 relations, trained to 6 hops, tested to 16.",
            num_entities=50,
            num_relations=6,
            train_hops=6,
            max_hops=16,
        ),
        KhopConfig(
            name="quickstart",
            description="Smaller: 20 entities, 4 relations, trained to 8 hops, tested to 24.",
            num_entities=20,
            num_relations=4,
            train_hops=8,
            max_hops=24,
        ),
    ]

    def __init__(self, *args, hash: str | None = None, **kwargs):
        super().__init__(*args, hash=hash or source_hash(__file__, hop_rows.__file__), **kwargs)
        config = self.config
        check_fields(config)
        if config.max_hops < config.train_hops:
            raise ValueError(f"max_hops {config.max_hops} is below train_hops {config.train_hops}: raise max_hops.")

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES, description=self.config.description)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        train, held_out = range(1, self.config.train_hops + 1), self.held_out_hops()
        hops = {"train": train, "validation": held_out, "test": held_out}
        # `datasets` shares out the items of a list among processes and streaming workers.
        return [datasets.SplitGenerator(split, {"split": split, "hops": list(hops[split])}) for split in hops]

    def held_out_hops(self) -> list[int]:
        """The hop counts of validation and test: unless named, 2 .. max_hops and then multiples of FAR_STEP up to
        far_hops."""
        if self.config.held_out_hops is not None:
            return sorted(self.config.held_out_hops)
        far = range((self.config.max_hops // FAR_STEP + 1) * FAR_STEP, self.config.far_hops + 1, FAR_STEP)
        return [*range(2, self.config.max_hops + 1), *far]

    def _generate_tables(self, split: str, hops: list[int]):
        tables = self.relation_tables()
        for k in hops:
            if k == 1:
                split_kind = "atomic"
            else:
                split_kind = "train" if split == "train" else "id" if k <= self.config.train_hops else "ood"
            starts, relations = self.programs(k, split)
            path = [starts]
            for step in range(k):
                path.append(tables[relations[:, step], path[-1]])
            for i, table in enumerate(hop_tables(relations, np.stack(path, axis=1), split_kind)):
                yield (k, i), table

    def relation_tables(self) -> np.ndarray:
        """(num_relations, num_entities): the entity that each relation leads to from each entity, a permutation."""
        identity = np.tile(np.arange(self.config.num_entities), (self.config.num_relations, 1))
        return stream(self.config.seed, "khop relations").permuted(identity, axis=1)

    def programs(self, hops: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Start entities (N,) and relations (N, hops) of the programs with `hops` hops in a split."""
        config = self.config
        base = config.num_relations
        if hops == 1:
            starts, relations = np.divmod(np.arange(config.num_entities * base), base)
            return starts, relations[:, None]
        # All splits are drawn together, whichever is asked for: each program goes to one split only.
        total = config.num_entities * base**hops
        cap = total // HELD_OUT
        num_test, num_validation = min(config.test_per_hop, cap), min(config.gate_per_hop, cap)
        num_train = min(config.train_per_hop, total - num_test - num_validation)
        rng = stream(config.seed, "khop programs", hops)
        # A long program has a number for its first hops only: programs that differ there are distinct.
        numbered_hops = hops
        while config.num_entities * base**numbered_hops > NUMBERED_PROGRAMS:
            numbered_hops -= 1
        numbers = rng.choice(
            config.num_entities * base**numbered_hops, num_test + num_validation + num_train, replace=False
        )
        starts, rest = np.divmod(numbers, base**numbered_hops)
        beginning = rest[:, None] // base ** np.arange(numbered_hops - 1, -1, -1) % base
        relations = np.hstack([beginning, rng.integers(base, size=(len(numbers), hops - numbered_hops))])
        share = {
            "test": slice(0, num_test),
            "validation": slice(num_test, num_test + num_validation),
            "train": slice(num_test + num_validation, None),
        }[split]
        return starts[share], relations[share]
