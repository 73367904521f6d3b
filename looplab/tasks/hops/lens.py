"""Where in a looped model the entities of a chain can be read out, and where they cause the answer.

    chains = chains_of(rows, tokenizer)          e35 --r3--> e46 --r19--> e12, asked as "e35 r3 r19"
    facts  = facts_of(train_rows, tokenizer)     (V, V)  entity x relation -> entity

    logit_lens(model, chains)                    which entity of the path each state reads out
    clean, corrupted = corrupt(chains, facts, position=0)
    patch(model, clean, corrupted)               one clean state in the corrupted run: does the answer come back?
    swap_bridge(model, chains, facts)            bridge b exchanged with b' in one state: does the answer follow b'?
    realign(model, chains)                       what a state says, embedded, in its place: are more answers right?

Each returns a list of records, one per layer call and position, or set of positions, named as in
instruments/recorder.py. Shares are in [0, 1]. Sources: Loop, Think & Generalize (arXiv 2604.07822), for two hops;
DiscoLoop (arXiv 2607.00341) for `realign`.
Legend: N chains, T tokens, K hops, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import datasets
import numpy as np
import torch
from torch.nn.functional import cosine_similarity, normalize
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplab.instruments.recorder import Recording, edit, layer_calls, record

from .rows import answered

BATCH = 512  # chains in a forward pass


@dataclass(frozen=True)
class Chains:
    """Questions of one hop count and split kind, as token ids.

    input_ids (N, T): position 0 is the start entity, position i is relation i, the last position is the readout.
    path (N, K + 1): the entities from the start to the answer; the entities between the two are the bridges.
    """

    hops: int
    split_kind: str
    input_ids: torch.Tensor
    path: torch.Tensor

    @property
    def answers(self) -> torch.Tensor:
        return self.path[:, -1]

    def keep(self, rows: torch.Tensor) -> "Chains":
        return Chains(self.hops, self.split_kind, self.input_ids[rows], self.path[rows])

    def split(self, size: int = BATCH) -> Iterator["Chains"]:
        for rows in torch.arange(len(self.path)).split(size):
            yield self.keep(rows)

    @property
    def batches(self) -> int:
        """How many `split` gives."""
        return -(-len(self.path) // BATCH)

    def labels(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """A word for each position: h, r1, r2, ..., and the readout token if there is one."""
        words = ["h", *(f"r{hop}" for hop in range(1, self.hops + 1))]
        return words + tokenizer.convert_ids_to_tokens(self.input_ids[0, len(words) :].tolist())


def chains_of(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, hops: int, limit: int | None = None
) -> list[Chains]:
    """The chains of `hops` hops, one `Chains` per split kind; of more than `limit` chains the same `limit` every time.

    Raises:
        ValueError: there are no such chains.
    """
    counts, kinds = np.array(rows["hops"][:]), np.array(rows["split_kind"][:])
    if hops not in counts:
        raise ValueError(f"there are no chains of hops={hops}; there are {sorted(set(counts.tolist()))}.")
    groups = []
    for kind in sorted(set(kinds[counts == hops].tolist())):
        members = np.flatnonzero((kinds == kind) & (counts == hops))
        if limit is not None and limit < len(members):
            members = np.sort(np.random.default_rng(0).choice(members, limit, replace=False))
        chosen = rows.select(members)
        words = [f"e{entity}" for path in chosen["path"][:] for entity in path]
        path = torch.tensor(tokenizer.convert_tokens_to_ids(words)).view(-1, hops + 1)
        groups.append(Chains(hops, kind, torch.tensor(tokenizer(chosen["text"][:])["input_ids"]), path))
    return groups


def facts_of(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids (V, V): entity x relation -> the entity that the relation leads to; -1 if there is no such fact."""
    facts = torch.full((len(tokenizer), len(tokenizer)), -1)
    known = rows.select(np.flatnonzero(np.array(rows["hops"][:]) == 1))
    asked = torch.tensor(tokenizer(known["text"][:])["input_ids"])
    facts[asked[:, 0], asked[:, 1]] = torch.tensor(tokenizer.convert_tokens_to_ids(known["answer"][:]))
    return facts


def follow(facts: torch.Tensor, entities: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
    """The path (..., K + 1) from `entities` (...) along `relations` (..., K); -1 from the first missing fact on."""
    path = [entities]
    for relation in relations.unbind(-1):
        path.append(torch.where(path[-1] >= 0, facts[path[-1], relation], -1))
    return torch.stack(path, dim=-1)


def corrupt(chains: Chains, facts: torch.Tensor, position: int, seed: int = 0) -> tuple[Chains, Chains]:
    """The chains, and for each the same chain with another word at `position` that leads to another answer.

    The other word is drawn from all that make a chain of the graph. Chains without such a word are left out of both.

    Raises:
        ValueError: there is no start entity and no relation at `position`.
    """
    if not 0 <= position <= chains.hops:
        raise ValueError(
            f"position must be 0 (the start entity) to {chains.hops} (the last relation), got {position}: nothing "
            "else of the question can be changed."
        )
    words = ((facts >= 0).any(dim=0 if position else 1)).nonzero().squeeze(1)  # relations, or entities
    questions = chains.input_ids[:, None].repeat(1, len(words), 1)  # (N, words, T)
    questions[..., position] = words
    paths = follow(facts, questions[..., 0], questions[..., 1 : chains.hops + 1])  # (N, words, K + 1)
    rows, chosen = draw((paths[..., -1] >= 0) & (paths[..., -1] != chains.answers[:, None]), seed)
    return chains.keep(rows), Chains(chains.hops, chains.split_kind, questions[rows, chosen], paths[rows, chosen])


def draw(allowed: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of `allowed` (N, choices) with at least one choice, one of the choices of each, drawn uniformly).

    Raises ValueError if no row has a choice.
    """
    rows = allowed.any(dim=1).nonzero().squeeze(1)
    if len(rows) == 0:
        raise ValueError("no chain can be changed so that its answer changes: the graph is too small.")
    generator = torch.Generator().manual_seed(seed)
    return rows, allowed[rows].float().multinomial(1, generator=generator).squeeze(1)


def position_sets(chains: Chains) -> list[list[int]]:
    """Each position alone, then all relations together, since a model may keep an entity at several positions."""
    sets = [[position] for position in range(chains.input_ids.shape[1])]
    if chains.hops > 1:
        sets.append(list(range(1, chains.hops + 1)))
    return sets


def recordings(
    model: PreTrainedModel, chains: Chains, num_loops: int | None, task: str
) -> Iterator[tuple[Chains, Recording]]:
    """The chains batch by batch, and the recording of the model on each batch. task: for the progress bar."""
    with tqdm(total=len(chains.path), desc=f"{task}, {chains.split_kind}", unit="chain") as bar:
        for batch in chains.split():
            yield batch, record(model, batch.input_ids, num_loops)
            bar.update(len(batch.path))


def accuracy(model: PreTrainedModel, chains: Chains, num_loops: int | None = None) -> float:
    """Share of chains whose answer is the argmax at the readout."""
    return answered(model, chains.input_ids, chains.answers, num_loops=num_loops)[0].float().mean().item()


@torch.no_grad()
def logit_lens(model: PreTrainedModel, chains: Chains, num_loops: int | None = None) -> list[dict]:
    """Read out every state, and see where each entity of the path stands in the readout.

    A record per layer call, position and `hop` of the path (0 the start, K the answer): `top1`, share of chains whose
    argmax is that entity; `mrr`, its mean reciprocal rank; `log_prob`, its mean log-probability in nats.
    """
    calls, width = layer_calls(model.config, num_loops), chains.input_ids.shape[1]
    sums = torch.zeros(len(calls), width, chains.hops + 1, 3, dtype=torch.float64)
    for batch, recording in recordings(model, chains, num_loops, "logit lens"):
        path = batch.path.to(recording.logits.device)
        for i, call in enumerate(calls):
            log_probs = recording.readout(call).float().log_softmax(-1)  # (N, T, V)
            best = log_probs.argmax(-1)
            for hop, entity in enumerate(path.T):
                own = log_probs.gather(-1, entity[:, None, None].expand(-1, width, 1))
                rank = 1 + (log_probs > own).sum(-1)
                seen = torch.stack([best == entity[:, None], 1 / rank, own.squeeze(-1)], dim=-1)  # (N, T, 3)
                sums[i, :, hop] += seen.double().sum(0).cpu()
    means = (sums / len(chains.path)).tolist()
    return [
        {**call._asdict(), "position": position, "hop": hop, "n": len(chains.path)}
        | dict(zip(("top1", "mrr", "log_prob"), values, strict=True))
        for call, at_call in zip(calls, means, strict=True)
        for position, at_position in enumerate(at_call)
        for hop, values in enumerate(at_position)
    ]


@torch.no_grad()
def patch(model: PreTrainedModel, source: Chains, target: Chains, num_loops: int | None = None) -> list[dict]:
    """Run the chains `target` with one state from the run of `source`: does the answer of `source` come out?

    patch(clean, corrupted) shows what the state suffices for; patch(corrupted, clean) shows what it is needed for. A
    record per layer call and set of `positions` (`position_sets`):

        recovered        share of chains whose argmax becomes the answer of `source`
        logit_recovery   gain in the logit of the source's answer minus the logit of the target's answer: 0 as in the
                         target run, 1 as in the source run (mean gain over chains / mean gain that is possible)
        unpatched        share of target runs that give the source's answer without the state
        source           share of source runs that give it: about the most that can be recovered

    Raises:
        ValueError: `source` and `target` differ in shape, and so do not belong together chain by chain.
    """
    if source.input_ids.shape != target.input_ids.shape:
        raise ValueError(
            f"source {tuple(source.input_ids.shape)} and target {tuple(target.input_ids.shape)} must have one shape: "
            "a row of one is patched into the same row of the other; `corrupt` makes such pairs."
        )
    calls, sets, num_rows = layer_calls(model.config, num_loops), position_sets(source), len(source.path)

    def outcome(logits: torch.Tensor, wanted: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Sums over the batch, (2,): chains that give the wanted answer; lead of its logit over the other answer's."""
        logits = logits[:, -1].double().cpu()
        lead = (logits.gather(1, wanted[:, None]) - logits.gather(1, other[:, None])).squeeze(1)
        return torch.stack([logits.argmax(-1) == wanted, lead], dim=1).sum(0)

    at_source, at_target = torch.zeros(2, 2, dtype=torch.float64)
    patched = torch.zeros(len(calls), len(sets), 2, dtype=torch.float64)
    with tqdm(
        total=patched[..., 0].numel() * source.batches, desc=f"patching, {source.split_kind}", unit="state"
    ) as bar:
        for given, run in zip(source.split(), target.split(), strict=True):
            answers = given.answers, run.answers
            states = record(model, given.input_ids, num_loops)
            at_source += outcome(states.logits, *answers)
            at_target += outcome(record(model, run.input_ids, num_loops).logits, *answers)
            for i, call in enumerate(calls):
                for j, positions in enumerate(sets):
                    state = states.states[call][:, positions]
                    with edit(model, call, lambda _, state=state: state, positions):
                        patched[i, j] += outcome(record(model, run.input_ids, num_loops).logits, *answers)
                    bar.update()
    gain = at_source[1] - at_target[1]
    return [
        {
            **call._asdict(),
            "positions": positions,
            "recovered": (patched[i, j, 0] / num_rows).item(),
            "logit_recovery": ((patched[i, j, 1] - at_target[1]) / gain).item() if gain else None,
            "unpatched": (at_target[0] / num_rows).item(),
            "source": (at_source[0] / num_rows).item(),
            "n": num_rows,
        }
        for i, call in enumerate(calls)
        for j, positions in enumerate(sets)
    ]


def redirect(chains: Chains, facts: torch.Tensor, hop: int, seed: int = 0) -> tuple[Chains, Chains]:
    """The chains, and for each the same question with another entity in its path after `hop` hops.

    The other entity is drawn from all entities from which the rest of the question leads to another answer. Chains
    without such an entity are left out of both.

    Raises:
        ValueError: there is no bridge after `hop` hops.
    """
    if not 1 <= hop < chains.hops:
        raise ValueError(
            f"hop must be a bridge's, from 1 to {chains.hops - 1} in chains of {chains.hops} hops, got {hop}."
        )
    others = (facts >= 0).any(dim=1).nonzero().squeeze(1)
    starts = others.expand(len(chains.path), -1)  # (N, entities)
    rest = chains.input_ids[:, None, hop + 1 : chains.hops + 1].expand(-1, len(others), -1)
    paths = follow(facts, starts, rest)
    rows, chosen = draw((paths[..., -1] >= 0) & (paths[..., -1] != chains.answers[:, None]), seed)
    kept = chains.keep(rows)
    path = torch.cat([kept.path[:, :hop], paths[rows, chosen]], dim=1)
    return kept, Chains(kept.hops, kept.split_kind, kept.input_ids, path)


def exchange(first: torch.Tensor, second: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of a state (N, K, D) that exchanges its components along two directions (N, D).

    It is the reflection that maps one direction to the other. Components orthogonal to both stay, and so does the
    length of the state. For equal directions it is the identity.
    """
    across = normalize(normalize(first, dim=-1) - normalize(second, dim=-1), dim=-1)[:, None]  # (N, 1, D)

    def change(state: torch.Tensor) -> torch.Tensor:
        return state - 2 * (state * across).sum(-1, keepdim=True) * across

    return change


def random_step(change: Callable[[torch.Tensor], torch.Tensor], generator: torch.Generator) -> Callable:
    """The control of `change`: a step of the same length in a random direction."""

    def step(state: torch.Tensor) -> torch.Tensor:
        length = (change(state) - state).norm(dim=-1, keepdim=True)
        noise = torch.randn(state.shape, generator=generator).to(state)
        return state + length * normalize(noise, dim=-1)

    return step


@torch.no_grad()
def swap_bridge(
    model: PreTrainedModel,
    chains: Chains,
    facts: torch.Tensor,
    *,
    hop: int = 1,
    num_loops: int | None = None,
    directions: torch.Tensor | None = None,
    seed: int = 0,
) -> list[dict]:
    """Exchange the directions of the bridge b and of another entity b' in one state: does the answer follow b'?

    A record per layer call and set of `positions` (`position_sets`): share of chains that answer as from b'
    (`swapped`) and as from b (`kept`), and the same shares after a random step of equal length (`random_swapped`,
    `random_kept`).

    Args:
        hop: the bridge after `hop` hops.
        directions: (V, D), a direction per token; the weights of the head unless given.

    Raises:
        ValueError: there is no bridge after `hop` hops.
    """
    chains, redirected = redirect(chains, facts, hop, seed)
    directions = model.get_output_embeddings().weight if directions is None else directions.to(model.device)
    calls, sets, num_rows = layer_calls(model.config, num_loops), position_sets(chains), len(chains.path)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(len(calls), len(sets), 4, dtype=torch.long)
    with tqdm(
        total=counts[..., 0].numel() * chains.batches, desc=f"bridge swap, {chains.split_kind}", unit="state"
    ) as bar:
        for before, after in zip(chains.split(), redirected.split(), strict=True):
            swap = exchange(directions[before.path[:, hop]], directions[after.path[:, hop]])
            for i, call in enumerate(calls):
                for j, positions in enumerate(sets):
                    for k, change in enumerate((swap, random_step(swap, generator))):
                        with edit(model, call, change, positions):
                            answers = record(model, before.input_ids, num_loops).logits[:, -1].argmax(-1).cpu()
                        counts[i, j, 2 * k] += (answers == after.answers).sum()
                        counts[i, j, 2 * k + 1] += (answers == before.answers).sum()
                    bar.update()
    names = ("swapped", "kept", "random_swapped", "random_kept")
    return [
        {**call._asdict(), "positions": positions, "hop": hop}
        | dict(zip(names, shares, strict=True))
        | {"n": num_rows}
        for call, at_call in zip(calls, (counts / num_rows).tolist(), strict=True)
        for positions, shares in zip(sets, at_call, strict=True)
    ]


@torch.no_grad()
def realign(model: PreTrainedModel, chains: Chains, *, hop: int = 1, num_loops: int | None = None) -> list[dict]:
    """Put a token's embedding into the place of a state after a loop, without training: are more answers right?

    DiscoLoop's intervention (arXiv 2607.00341). The state is the output of the last core layer of a loop that another
    follows, at relations (`position_sets`, without the start and the readout). A record per loop, set of `positions`,
    token (`of`) and `weight`, the share of the embedding in what replaces the state (0.5: half of the state stays):

        of          "said": the token that norm and head read from the state; "bridge": the bridge, whatever they read
        realigned   share of chains that are answered so
        unchanged   share of chains that are answered without
        decoded     share of states that say the bridge
        aligned     mean cosine of the states and the bridge's embedding

    Args:
        hop: the bridge after `hop` hops.
    """
    ends = [call for call in layer_calls(model.config, num_loops) if call.section == "core"]
    ends = ends[model.config.num_core_layers - 1 :: model.config.num_core_layers][:-1]
    outside = {0, chains.input_ids.shape[1] - 1}
    sets = [positions for positions in position_sets(chains) if not outside & set(positions)]
    weights, num_rows, embed = (0.5, 1.0), len(chains.path), model.model.embed_words
    right = torch.zeros(len(ends), len(sets), 2, len(weights), dtype=torch.float64)
    seen = torch.zeros(len(ends), len(sets), 2, dtype=torch.float64)
    unchanged = 0.0

    def answers(batch: Chains) -> int:
        found, _ = answered(model, batch.input_ids, batch.answers, num_loops=num_loops)
        return int(found.sum())

    with tqdm(total=right.numel() * chains.batches, desc=f"realignment, {chains.split_kind}", unit="state") as bar:
        for batch in chains.split():
            unchanged += answers(batch) / num_rows
            recording = record(model, batch.input_ids, num_loops)
            for i, call in enumerate(ends):
                likeliest = recording.readout(call).argmax(-1)  # (N, T)
                for j, positions in enumerate(sets):
                    said = likeliest[:, positions]
                    bridge = batch.path[:, hop, None].to(said.device).expand_as(said)
                    cosine = cosine_similarity(recording.states[call][:, positions], embed(bridge), dim=-1)
                    seen[i, j, 0] += (said == bridge).double().mean(-1).sum().cpu() / num_rows
                    seen[i, j, 1] += cosine.double().mean(-1).sum().cpu() / num_rows
                    for k, tokens in enumerate((said, bridge)):
                        for m, weight in enumerate(weights):
                            with edit(model, call, partial(torch.lerp, end=embed(tokens), weight=weight), positions):
                                right[i, j, k, m] += answers(batch) / num_rows
                            bar.update()
    return [
        {**call._asdict(), "positions": positions, "hop": hop, "of": of, "weight": weight}
        | {"realigned": right[i, j, k, m].item(), "unchanged": unchanged}
        | dict(zip(("decoded", "aligned"), seen[i, j].tolist(), strict=True))
        | {"n": num_rows}
        for i, call in enumerate(ends)
        for j, positions in enumerate(sets)
        for k, of in enumerate(("said", "bridge"))
        for m, weight in enumerate(weights)
    ]
