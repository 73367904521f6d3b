"""Two-hop composition over a random knowledge graph (Kohli et al. 2026, arXiv 2604.07822; data of Wang et al. 2024,
arXiv 2405.15071).

    graph         every entity has out_degree facts: distinct random relations, each to a random entity
    facts         a share ood_share of the facts is OOD, the others are ID; all facts are in train (split_kind atomic)
    composition   fact (h, r1, b) then fact (b, r2, t), asked as "h r1 r2"
      both ID     a share id_holdout is held out (id); phi x (number of ID facts) of the others are in train (train)
      both OOD    held out (ood): each fact is known, neither was ever composed with another
      one OOD     held out (ood_first, ood_second); the paper has no such rows
      pair        both ID, but no training composition follows r2 after r1; the paper has no such rows
"""

from dataclasses import dataclass
from functools import cached_property

import datasets
import numpy as np

from . import hop_rows
from .fields import check_fields, number
from .hop_rows import FEATURES, hop_tables
from .seeding import source_hash, stream

VERSION = datasets.Version("1.1.0")


@dataclass
class CompositionConfig(datasets.BuilderConfig):
    """Sizes of the graph and of the splits; any field may be given to `Composition` or `load_task` by name."""

    version: datasets.Version = VERSION
    num_entities: int = number(2_000, at_least=2, whole=True)
    num_relations: int = number(200, at_least=1, whole=True)
    out_degree: int = number(20, at_least=1, whole=True)
    ood_share: int | float = number(0.05, above=0, below=1)  # of the facts
    phi: int | float = number(7.2, above=0)  # train compositions per ID fact
    id_holdout: int | float = number(0.005, above=0, below=1)  # of the compositions of two ID facts
    pair_holdout: int | float = number(0.0)  # of the ordered pairs of relations
    test_per_kind: int = number(1_000, at_least=0, whole=True)  # most rows of ood_first, of ood_second and of pair
    seed: int = number(0, at_least=0, whole=True)

    def train_rows(self) -> dict[int, int]:
        """Hop count -> rows of the split train."""
        facts = self.num_entities * self.out_degree
        return {1: facts, 2: round(self.phi * (facts - round(self.ood_share * facts)))}


class Composition(datasets.ArrowBasedBuilder):
    """Two-hop questions over a knowledge graph: does a model compose facts that it never saw composed?

    Configs: `paper` (2,000 entities, 40,000 facts, 273,600 train compositions) and `cpu` (50 entities, 1,000 facts,
    11,480 train compositions). The rows of train have `split_kind` "atomic" (hops 1) or "train" (hops 2). The held-out
    compositions ("id" and "ood", hops 2) go half to validation and half to test; the paper tests on all of them, so
    its test sets are validation and test together.

    Some kinds are not in the paper, and only test has them, so that no decision in training rests on them:
    "ood_first" and "ood_second", where one of the two facts is OOD, and with `pair_holdout` also "pair", two ID facts
    whose relations never follow each other in training. Only "pair" has such relations, so that each kind leaves out
    one thing. If `pair_holdout` is 0, train, "id" and "ood" follow the paper's recipe.

    One example, e15 --r15--> e0 --r19--> e8:

    >>> load_task("composition", "cpu")["test"][337]
    {'text': 'e15 r15 r19', 'answer': 'e8', 'hops': 2, 'split_kind': 'ood', 'path': [15, 0, 8]}

    Rows are made as Arrow tables: the 321,221 rows of `paper` take a second, row by row they would take half a minute.
    Raises ValueError for a config field that is unknown or out of range.
    """

    VERSION = VERSION
    TAGS = ("synthetic", "multi-hop")  # what the card of an exported data set is found by on the Hub
    BUILDER_CONFIG_CLASS = CompositionConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        CompositionConfig(name="paper", description="The paper's sizes: 2,000 entities, 200 relations, 40,000 facts."),
        CompositionConfig(
            name="cpu",
            description="Half an hour on a CPU core: 50 entities, 20 relations, 1,000 facts, 18 % of them OOD.",
            num_entities=50,
            num_relations=20,
            out_degree=20,
            ood_share=0.18,
            phi=14.0,
            id_holdout=0.05,
            pair_holdout=0.05,
        ),
    ]

    def __init__(self, *args, hash: str | None = None, **kwargs):
        super().__init__(*args, hash=hash or source_hash(__file__, hop_rows.__file__), **kwargs)
        config = self.config
        check_fields(config)
        if config.out_degree > config.num_relations:
            raise ValueError(
                f"out_degree {config.out_degree} is above num_relations {config.num_relations}: an entity's relations "
                "are distinct."
            )
        one_pair = 1 / config.num_relations**2
        if config.pair_holdout != 0 and not one_pair <= config.pair_holdout < 1:
            raise ValueError(
                f"pair_holdout must be 0, or at least {one_pair:g} (one pair) and below 1, got {config.pair_holdout}."
            )

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES, description=self.config.description)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        facts = np.arange(self.config.num_entities * self.config.out_degree)[:, None]  # (facts, 1)
        chains = self.compositions()
        groups = {
            "train": [("atomic", facts), ("train", chains["train"])],
            "validation": [(split_kind, chains[split_kind][::2]) for split_kind in ("id", "ood")],
            "test": [
                *((split_kind, chains[split_kind][1::2]) for split_kind in ("id", "ood")),
                *((kind, chains[kind]) for kind in ("ood_first", "ood_second", "pair") if len(chains[kind])),
            ],
        }
        return [datasets.SplitGenerator(split, {"groups": groups[split]}) for split in groups]

    def _generate_tables(self, groups: list[tuple[str, np.ndarray]]):
        relations, tails, _ = self.graph
        for split_kind, facts in groups:
            path = np.hstack([facts[:, :1] // self.config.out_degree, tails[facts]])
            for i, table in enumerate(hop_tables(relations[facts], path, split_kind)):
                yield (split_kind, i), table

    @cached_property
    def graph(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Relation, tail entity and OOD mark of each fact, (num_entities * out_degree,) each. Fact i starts at entity
        i // out_degree."""
        config = self.config
        relations = np.tile(np.arange(config.num_relations), (config.num_entities, 1))
        relations = stream(config.seed, "composition relations").permuted(relations, axis=1)[:, : config.out_degree]
        tails = stream(config.seed, "composition tails").integers(config.num_entities, size=relations.size)
        ood = np.zeros(relations.size, dtype=bool)
        facts = stream(config.seed, "composition ood facts").permutation(relations.size)
        ood[facts[: round(config.ood_share * relations.size)]] = True
        return relations.ravel(), tails, ood

    @cached_property
    def held_out_pairs(self) -> np.ndarray:
        """(num_relations, num_relations): True where training never has the second relation after the first."""
        num_relations = self.config.num_relations
        pairs = stream(self.config.seed, "composition pairs").permutation(num_relations**2)
        held_out = np.zeros(num_relations**2, dtype=bool)
        held_out[pairs[: round(self.config.pair_holdout * num_relations**2)]] = True
        return held_out.reshape(num_relations, num_relations)

    def compositions(self) -> dict[str, np.ndarray]:
        """split_kind -> chains of two facts (N, 2), in random order; all kinds but train are held out.

        Raises ValueError if the graph is too small for `phi`, or for at least two held-out chains of each kind.
        """
        config = self.config
        relations, tails, ood = self.graph
        # Composition c is fact c // out_degree, then fact number c % out_degree of the entity that it leads to.
        first = np.repeat(np.arange(len(tails)), config.out_degree)
        second = (tails[:, None] * config.out_degree + np.arange(config.out_degree)).ravel()
        id_id, seen_pair = ~ood[first] & ~ood[second], ~self.held_out_pairs[relations[first], relations[second]]
        shuffle = stream(config.seed, "composition order").permutation
        pool = shuffle(np.flatnonzero(id_id & seen_pair))
        both_ood = shuffle(np.flatnonzero(ood[first] & ood[second] & seen_pair))
        num_held_out = round(config.id_holdout * id_id.sum())
        num_train = round(config.phi * (~ood).sum())
        if num_held_out + num_train > len(pool):
            most = (len(pool) - num_held_out) / (~ood).sum()
            cause = f" and pair_holdout {config.pair_holdout}" if config.pair_holdout else ""
            raise ValueError(f"phi must be at most {most:.2f} for this graph{cause}, got {config.phi}.")
        if num_held_out < 2 or len(both_ood) < 2:
            raise ValueError(
                f"the held-out compositions are too few ({num_held_out} ID, {len(both_ood)} OOD): raise num_entities, "
                "out_degree, id_holdout or ood_share."
            )
        chosen = {"id": pool[:num_held_out], "train": pool[num_held_out:][:num_train], "ood": both_ood}
        test_only = {
            "ood_first": ood[first] & ~ood[second] & seen_pair,
            "ood_second": ~ood[first] & ood[second] & seen_pair,
            "pair": id_id & ~seen_pair,
        }
        for split_kind, members in test_only.items():
            shuffle = stream(config.seed, f"composition {split_kind}").permutation
            chosen[split_kind] = shuffle(np.flatnonzero(members))[: config.test_per_kind]
        return {split_kind: np.stack([first[c], second[c]], axis=1) for split_kind, c in chosen.items()}
