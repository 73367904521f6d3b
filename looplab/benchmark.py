"""Speed and memory against an equally wide, equally deep (unrolled) Llama, and what halting saves.

    training   forward + backward + AdamW step, tokens/s; eager and with each layer compiled
    decode     `generate`, greedy, batch 1, new tokens/s; eager with a dynamic cache, compiled with a static one
    kv_bytes   bytes of the cache tensors per token, for each kv_sharing
    hyper      training step of Hyperloop's gated streams, tokens/s, against the plain loop of the same layers
    context    decoding at long contexts, and chunks: training with gated KV, see `contexts.py`
    halting    layer calls and wall time of the KL + entropy rule against fixed loops, on a trained run
    speculation  decoding with `draft_loops` against plain decoding, batch 1, new tokens/s: on a trained run on text or
               molecules, and where every draft is accepted because loops change nothing, which is as fast as it gets

Both models run the same matrix products on the same tokens; the looped one has num_core_layers layers of weights,
Llama num_loops times as many. They are timed in turn (A B A B ...) in one process, so that what else the machine does
hits both, and a ratio is the median over the pairs. Nothing here is a test: numbers of two machines do not compare.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

import psutil
import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from looplab.instruments.timing import compared, interleaved, machine, matmul_peak, ratio_text, seconds_per_unit
from looplab.runs.folder import open_run
from looplab.runs.models import load_run_model
from looplab.runs.writing import check_folder, write_whole
from looplab.tasks.hops.halting import halting_rows
from looplab.tasks.molecules.samples import SETTINGS
from looplab.tasks.molecules.task import molecule_prompts
from looplab.tasks.text.task import text_prompts
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.cache_looped import CACHE_NAME

CONFIDENCE = "assistant_confidence_threshold"
CONFIDENCES = (0.4, 0.8)  # that of transformers, and one under which drafts are surer, and shorter


@dataclass(frozen=True)
class Workload:
    """What is run at every width: a core of `layers` x `loops`, `batch` x `tokens` per training step."""

    layers: int = 2
    loops: int = 4
    vocab: int = 512
    batch: int = 16
    tokens: int = 64
    prompt: int = 16
    new_tokens: int = 64
    prompts: int = 4
    molecules: int = 16  # that are written
    molecule_prompt: int = 5  # tokens, `<bos>` among them
    matmul: int = 1536
    rows_per_hop: int = 64
    steps: int = 8  # decoded at each context
    chunks: tuple[int, ...] = (16, 64, 256, 512)  # tokens


QUICK = Workload(
    vocab=64,
    batch=2,
    tokens=8,
    prompt=4,
    new_tokens=4,
    prompts=1,
    molecules=1,
    matmul=64,
    rows_per_hop=4,
    steps=1,
    chunks=(4,),
)


def forward_flops(
    config: LoopedConfig, batch: int, tokens: int, num_loops: int, logits_kept: int | None = None
) -> int:
    """Matrix-product FLOPs (2 per multiply-add) of one forward; a training step is three times that.

    Every loop counts. Attention is counted over all tokens x tokens pairs, norms and activations not at all.

    Args:
        logits_kept: positions whose logits are computed, all unless given.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = 2 * hidden * (2 * heads + 2 * keys) + 4 * tokens * heads
    mlp = 2 * hidden * config.intermediate_size * (3 if config.gated_mlp else 2)
    layer_calls = config.num_prelude_layers + config.num_coda_layers + config.num_core_layers * num_loops
    connection = num_loops * connection_flops(config)
    head = 2 * hidden * config.vocab_size
    return batch * (tokens * (layer_calls * (attention + mlp) + connection) + (logits_kept or tokens) * head)


def connection_flops(config: LoopedConfig) -> int:
    """Matrix-product FLOPs of the loop connection, per token and loop."""
    hidden, streams = config.hidden_size, config.num_streams
    if config.loop_connection != "hyper":
        return {"plain": 0, "inject_add": 0, "inject_concat": 4 * hidden * hidden}[config.loop_connection]
    gates, mixing = {
        "diagonal": (3 * streams, 0),
        "identity": (2 * streams, 0),
        "sinkhorn": (2 * streams + streams**2, streams**2),
        "static": (0, streams**2),
    }[config.hyper_mixing]
    return 2 * streams * hidden * gates + 2 * mixing * hidden


def update_flops(config: LoopedConfig, batch: int, tokens: dict[int, float], loops: dict[int, float]) -> float:
    """FLOPs of one update of `batch` rows that are read at one position: 3 x `forward_flops` (backward is two).

    Without attention and head this is the usual 6 x layer weights x loops x tokens.

    Args:
        tokens: length of a batch's rows -> its share of the updates.
        loops: number of loops -> its share of the updates.
    """
    cost = {(t, r): forward_flops(config, batch, t, r, logits_kept=1) for t in tokens for r in loops}
    return 3 * sum(tokens[t] * loops[r] * cost[t, r] for t, r in cost)


def build_pair(width: int, work: Workload, kv_sharing: str = "per_loop") -> tuple[LoopedForCausalLM, LlamaForCausalLM]:
    """A looped model and a Llama of the same width whose depth is the loops unrolled; random weights."""
    sizes = model_sizes(width, work)
    looped = LoopedConfig(**sizes, num_core_layers=work.layers, num_loops=work.loops, kv_sharing=kv_sharing)
    llama = LlamaConfig(**sizes, num_hidden_layers=work.layers * work.loops)
    return LoopedForCausalLM(looped), LlamaForCausalLM(llama)


def model_sizes(width: int, work: Workload) -> dict:
    """Configuration fields that all sides of a comparison share."""
    return {
        "vocab_size": work.vocab,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 64),
        "max_position_embeddings": 2 * max(work.tokens, work.prompt + work.new_tokens),
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def training_step(model: PreTrainedModel, input_ids: torch.Tensor) -> Callable[[], None]:
    """One update of `model` on `input_ids` (B, T): forward, backward, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, **cache) -> Callable[[], None]:
    """Greedy `generate` of exactly `new_tokens` after `prompt` (1, T)."""
    model.eval()
    mask = torch.ones_like(prompt)

    def decode() -> None:
        model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **cache)

    return decode


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer, and what a loop reads and writes, on its own, in place; the loop stays in Python."""
    torch.compiler.reset()  # a second width would otherwise be compiled for sizes that may change
    for piece in model.model.pieces() if isinstance(model, LoopedForCausalLM) else model.model.layers:
        piece.compile()


def training_row(width: int, work: Workload, rounds: int, compiled: bool, peak: float) -> dict:
    looped, llama = build_pair(width, work)
    if compiled:
        compile_layers(looped)
        compile_layers(llama)
    input_ids = torch.randint(1, work.vocab, (work.batch, work.tokens), generator=torch.Generator().manual_seed(0))
    pairs = interleaved(training_step(looped, input_ids), training_step(llama, input_ids), rounds)
    row = {
        "measure": "training",
        "unit": "tokens/s",
        "mode": "compiled layers" if compiled else "eager",
        "width": width,
    }
    row |= compared(pairs, input_ids.numel())
    flops = 3 * forward_flops(looped.config, work.batch, work.tokens, work.loops)
    gflops = flops / median(ours for ours, _ in pairs) / 1e9
    return row | {"batch": work.batch, "tokens": work.tokens, "gflops": gflops, "of_peak": gflops / peak}


def hyper_row(width: int, work: Workload, rounds: int, compiled: bool) -> dict:
    """Hyperloop (arXiv 2604.21254) of begin 1, middle `layers` x 3 and end 1 against the plain loop of the same."""
    sections = {"num_prelude_layers": 1, "num_core_layers": work.layers, "num_coda_layers": 1, "num_loops": 3}
    sizes = model_sizes(width, work) | sections
    plain = LoopedForCausalLM(LoopedConfig(**sizes))
    hyper = LoopedForCausalLM(LoopedConfig(**sizes, loop_connection="hyper", loop_embedding="learned"))
    if compiled:
        compile_layers(hyper)
        compile_layers(plain)
    input_ids = torch.randint(1, work.vocab, (work.batch, work.tokens), generator=torch.Generator().manual_seed(0))
    pairs = interleaved(training_step(hyper, input_ids), training_step(plain, input_ids), rounds)
    row = {"measure": "hyper", "unit": "tokens/s", "mode": "compiled" if compiled else "eager", "width": width}
    row |= compared(pairs, input_ids.numel(), ("hyper", "plain"))
    return row | {"batch": work.batch, "tokens": work.tokens}


def decode_row(width: int, work: Workload, rounds: int, compiled: bool) -> dict:
    looped, llama = build_pair(width, work)
    cache = {}
    if compiled:
        torch.compiler.reset()
        cache = {"cache_implementation": "static"}
        for model in (looped, llama):
            model.forward = torch.compile(model.forward, dynamic=False)
    prompt = torch.randint(1, work.vocab, (1, work.prompt), generator=torch.Generator().manual_seed(0))
    pairs = interleaved(*(decoding(model, prompt, work.new_tokens, **cache) for model in (looped, llama)), rounds)
    mode = "compiled, static cache" if compiled else "eager"
    row = {"measure": "decode", "unit": "tokens/s", "mode": mode, "width": width}
    return row | compared(pairs, work.new_tokens) | {"batch": 1, "tokens": work.new_tokens}


@torch.inference_mode()
def kv_bytes_per_token(model: PreTrainedModel, tokens: int) -> float:
    """Bytes of all cache tensors after `tokens` tokens, per token."""
    cache = model.eval()(torch.ones(1, tokens, dtype=torch.long), use_cache=True)[CACHE_NAME]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / tokens


def kv_row(width: int, work: Workload, kv_sharing: str) -> dict:
    looped, llama = (kv_bytes_per_token(model, work.tokens) for model in build_pair(width, work, kv_sharing))
    row = {"measure": "kv_bytes", "unit": "bytes/token", "mode": kv_sharing, "width": width}
    return row | {"looped": looped, "llama": llama, "ratio": looped / llama, "tokens": work.tokens}


@torch.inference_mode()
def speculation_row(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, rounds: int, ends: bool = False, **settings
) -> dict:
    """Speculative over plain decoding of exactly `new_tokens` after each of `prompts` (N, T), one by one.

    assistant_confidence_threshold, draft_loops, num_loops: of the speculative side
    acceptance     share of the drafted tokens that were accepted
    per_call       tokens per verification
    layer_calls    of speculation, as a share of those of plain decoding of as many tokens
    tokens         written per prompt, mean

    Args:
        ends: a text may also end before, by its `eos_token_id`; the ratio is of tokens per second either way.
        settings: of the speculative side; those but `draft_loops` are also the plain side's.
    """
    model.eval()
    length = {"max_new_tokens": new_tokens, "return_dict_in_generate": True}
    settings |= length if ends else length | {"min_new_tokens": new_tokens}
    plain = {name: value for name, value in settings.items() if name != "draft_loops"}

    def decode(settings: dict) -> list:
        return [model.generate(ids, attention_mask=torch.ones_like(ids), **settings) for ids in prompts.split(1)]

    def written(outputs: list) -> int:
        return sum(output.sequences.shape[1] - prompts.shape[1] for output in outputs)

    outputs = decode(settings)
    drafted, accepted, verified = (sum(counts) for counts in zip(*map(tallies, outputs), strict=True))
    config, loops = model.config, settings["num_loops"]
    calls = config.num_prelude_layers + config.num_coda_layers + config.num_core_layers * loops
    pairs = interleaved(
        lambda: written(decode(settings)), lambda: written(decode(plain)), rounds, warmup=1, timed=seconds_per_unit
    )
    return {
        "measure": "speculation",
        "unit": "tokens/s",
        **{name: settings[name] for name in ("draft_loops", "num_loops", CONFIDENCE)},
        "acceptance": accepted / drafted,
        "per_call": (accepted + verified) / verified,
        "layer_calls": sum(o.layer_calls for o in outputs) / (calls * (written(outputs) - len(outputs))),
        **compared(pairs, 1, ("speculative", "plain")),
        "batch": 1,
        "tokens": written(outputs) / len(outputs),
    }


def tallies(output) -> tuple[int, int, int]:
    """Drafted tokens, accepted ones and verifications of a generate output."""
    return int(output.drafted.sum()), int(output.accepted.sum()), len(output.drafted)


def accepted_row(width: int, work: Workload, rounds: int) -> dict:
    """One draft loop of twice `work.loops` in a fresh model, whose layers are the identity: all drafts are right."""
    config = LoopedConfig(
        **model_sizes(width, work), num_core_layers=work.layers, num_loops=2 * work.loops, residual_init="zero"
    )
    prompts = torch.randint(1, work.vocab, (1, work.prompt), generator=torch.Generator().manual_seed(0))
    settings = {"draft_loops": 1, "num_loops": 2 * work.loops, "num_assistant_tokens": 8, CONFIDENCE: 0.0}
    row = speculation_row(LoopedForCausalLM(config), prompts, work.new_tokens, rounds, **settings)
    return {"mode": "all accepted", "width": width} | row


def speculation_rows(folder: str | Path, work: Workload, rounds: int) -> list[dict]:
    """Greedy and sampled text, or molecules, of a run at its largest trained loop count, after prompts of its test
    split; molecules are sampled as `molecules.SETTINGS[0]` says, and end where they end."""
    run = open_run(folder)
    model, tokenizer = load_run_model(run)
    loops, molecules = run.trained_loops()[1], run.task() == "molecules"
    prompts = (molecule_prompts if molecules else text_prompts)(run, tokenizer, work).to(model.device)
    drawn = {"temperature": SETTINGS[0].temperature, "top_k": SETTINGS[0].top_k} if molecules else {}
    results = []
    for do_sample, draft_loops, sure in product((False, True), (1, 2, 4), CONFIDENCES):
        if draft_loops >= loops:
            continue
        settings = {"draft_loops": draft_loops, "num_loops": loops, CONFIDENCE: sure}
        settings |= {"do_sample": True, **drawn} if do_sample else {"do_sample": False}
        row = speculation_row(model, prompts, work.new_tokens, rounds, ends=molecules, **settings)
        mode = "sampled" if do_sample else "greedy"
        results.append({"mode": mode, "run": run.name, "width": model.config.hidden_size} | row)
    return results


def bench(
    output: str | Path,
    *,
    widths: Sequence[int] = (64, 256, 512),
    rounds: int = 7,
    run: str | Path | None = None,
    compiled: bool = True,
    quick: bool = False,
    contexts: Sequence[int] = (),
    memory_loops: Sequence[int] = (4, 8),
) -> Path:
    """Measure, print a table and write OUTPUT/bench.jsonl, one row per measurement.

    Args:
        widths: hidden sizes; a head is 64 wide.
        rounds: timed pairs per ratio.
        run: a trained run for the halting rows or, where it is one on text or molecules, for those of speculation.
        compiled: also the rows with torch.compile, which take minutes to compile.
        quick: tiny sizes and two rounds, to see that it works.
        contexts: measure these instead: decoding after so many tokens with each KV sharing, and training in chunks.
        memory_loops: loop counts of the contexts.

    Raises:
        ValueError: no such run, `output` is no folder, or the measurements need more memory than is free.
    """
    from .contexts import context_lines, memory_plan

    check_folder(Path(output))
    if run is not None:
        load_run_model(open_run(run))  # a run that cannot be measured is refused before the rest is
    work = QUICK if quick else Workload()
    widths, rounds = ((32,), 2) if quick else (widths, rounds)
    check_memory(max(widths), work, max(contexts, default=0), max(memory_loops) if contexts else work.loops)
    modes = (False, True) if compiled else (False,)
    peak = matmul_peak(work.matmul)
    plan = [lambda w=w, c=c: [training_row(w, work, rounds, c, peak)] for w in widths for c in modes]
    plan += [lambda w=w, c=c: [decode_row(w, work, rounds, c)] for w in widths for c in modes]
    plan += [lambda w=w, s=s: [kv_row(w, work, s)] for w in widths for s in ("per_loop", "last", "gated")]
    plan += [lambda w=w, c=c: [hyper_row(w, work, rounds, c)] for w in widths for c in modes]
    plan += [lambda w=w: [accepted_row(w, work, rounds)] for w in widths]
    if run is not None:
        measured = speculation_rows if open_run(run).task() in ("text", "molecules") else halting_rows
        plan.append(lambda: measured(run, work, rounds))
    if contexts:
        plan = memory_plan(widths, work, rounds, contexts, memory_loops)
    facts = machine() | {"matmul_peak_gflops": peak, "layers": work.layers, "loops": work.loops}
    rows = []
    for measure in tqdm(plan, desc="measuring", unit="row"):
        rows += [facts | row for row in measure()]
    print("\n".join([bench_table(rows), *context_lines(rows)]))
    return write_whole(Path(output) / "bench.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def check_memory(width: int, work: Workload, context: int, loops: int) -> None:
    """ValueError if the largest pair of models, in training or after `context` cached tokens, does not fit into the
    memory that is free; an estimate from below."""
    depth = work.layers * loops
    weights = depth * 13 * width**2  # of the Llama: 4 square matrices, 3 of 3 times the width
    training = 4 * weights + 20 * work.batch * work.tokens * depth * width  # gradients, two moments; activations
    decoding = 2 * weights + 4 * depth * width * context  # keys and values of both
    needed, free = 4 * max(0 if context else training, decoding), psutil.virtual_memory().available  # float32
    if needed > free:
        what = f"--widths {width}" + f" --contexts {context} --memory-loops {loops}" * bool(context)
        raise ValueError(
            f"{what}: at least {needed / 1e9:,.0f} GB of memory are needed and {free / 1e9:,.0f} GB are free; "
            "ask for less."
        )


def bench_table(rows: Sequence[dict]) -> str:
    """The rows as text, one block per kind of measurement."""
    facts = rows[0]
    depth = facts["layers"] * facts["loops"]
    text = [
        f"\n{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}, transformers "
        f"{facts['transformers']}, {facts['dtype']}, matmul peak {facts['matmul_peak_gflops']:.0f} GFLOP/s",
        f"{facts['layers']} layers x {facts['loops']} loops against a Llama of {depth} layers; "
        "ratio = looped / Llama, median of interleaved pairs (min - max)",
        f"{'':<10} {'mode':<23}{'width':>6}{'looped':>10}{'Llama':>10}  ratio",
    ]
    for row in rows:
        if row["measure"] not in ("training", "decode", "kv_bytes"):
            continue
        line = f"{row['measure']:<10} {row['mode']:<23}{row['width']:>6}{row['looped']:>10.0f}{row['llama']:>10.0f}"
        ratio = ratio_text(row) if "ratio_min" in row else f"{row['ratio']:.2f}"
        line += f"  {ratio} {row['unit']}"
        if "gflops" in row:
            line += f"; {row['gflops']:.1f} GFLOP/s, {100 * row['of_peak']:.0f} % of peak"
        text.append(line)
    streams = [row for row in rows if row["measure"] == "hyper"]
    if streams:
        text.append(
            "\nfour gated streams between loops (hyper) against the plain loop, training, 1 -> 2 x 3 -> 1 layers"
        )
    for row in streams:
        text.append(
            f"{row['measure']:<10} {row['mode']:<23}{row['width']:>6}{row['hyper']:>10.0f}{row['plain']:>10.0f}"
            f"  {ratio_text(row)} {row['unit']}"
        )
    drafts = [row for row in rows if row["measure"] == "speculation"]
    if drafts:
        text.append(
            "\nself-speculation against plain decoding, batch 1; calls: of layers, as a share of plain decoding's"
        )
        columns = f"{'text':<14}{'width':>6}{'draft':>7}{'loops':>7}{'sure':>6}{'accepted':>10}{'tokens/call':>13}"
        text.append(f"{columns}{'calls':>7}   ratio of tokens/s")
    for row in drafts:
        text.append(
            f"{row['mode']:<14}{row['width']:>6}{row['draft_loops']:>7}{row['num_loops']:>7}{row[CONFIDENCE]:>6}"
            f"{100 * row['acceptance']:>8.0f} %{row['per_call']:>13.2f}{100 * row['layer_calls']:>5.0f} %   "
            f"{ratio_text(row)}"
        )
    halting = [row for row in rows if row["measure"] == "halting"]
    if halting:
        text.append(f"\nhalting on {halting[0]['run']}, {halting[0]['rows']} rows of mixed hops")
        columns = f"{'rule':<12}{'loops':>6}{'used':>7}{'calls saved':>13}{'accuracy':>10}{'fixed':>8}"
        text.append(f"{columns}   speed (fixed / halted seconds)")
    for row in halting:
        text.append(
            f"{row['mode']:<12}{row['loops']:>6}{row['loops_used']:>7.1f}{100 * row['layer_calls_saved']:>11.0f} %"
            f"{100 * row['accuracy']:>8.1f} %{100 * row['fixed_accuracy']:>6.1f} %   "
            f"{ratio_text(row)}"
        )
    return "\n".join(text)
