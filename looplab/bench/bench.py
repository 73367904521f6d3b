"""`looped bench`: the speed and memory of a looped model against a Llama of the same width and unrolled depth.

    training     an update (forward, backward, AdamW), tokens/s; eager, and with each layer compiled
    decode       greedy `generate` at batch 1, new tokens/s; eager with a dynamic cache, compiled with a static cache
    kv_bytes     bytes of the cache tensors per token, for each kv_sharing
    hyper        an update of Hyperloop's gated streams, tokens/s, against the plain loop of the same layers
    requests     requests of different depth together; see `requests.py`
    context      decoding at long contexts, new tokens/s; see `contexts.py`
    chunks       an update with gated KV, tokens/s; see `contexts.py`
    growth       seconds and bytes over loops, batch rows, context and tokens trained in chunks; see `growth.py`
    halting      layer calls and seconds of the KL + entropy rule against a fixed loop count, on a trained run
    speculation  decoding with `draft_loops` against plain decoding at batch 1, new tokens/s: on a trained run, and, as
                 the upper limit, in a model whose loops change nothing, so that all drafts are accepted

Both models run the same matrix products on the same tokens; Llama has num_loops times as many layers of weights. The
two run in turn (A B A B ...) in one process, so that other work of the machine slows both, and a ratio is the median
of the pairs. Speeds of two machines do not compare.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
from tqdm.auto import tqdm

from looplab.instruments.timing import machine, matmul_peak, ratio_text
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model
from looplab.runs.writing import check_folder, write_whole
from looplab.tasks.registry import task_for

from .pair import QUICK, Workload
from .speculation import CONFIDENCE, accepted_row, speculation_rows
from .speed import decode_row, hyper_row, kv_row, training_row


def bench(
    output: str | Path,
    *,
    widths: Sequence[int] = (64, 256, 512),
    layers: int = Workload.layers,
    loops: int = Workload.loops,
    rounds: int = 7,
    run: Run | None = None,
    compiled: bool = True,
    quick: bool = False,
    contexts: Sequence[int] = (),
    memory_loops: Sequence[int] = (4, 8),
    growth: bool = False,
    requests: Sequence[int] = (),
) -> Path:
    """Measure, print a table and write OUTPUT/bench.jsonl, one line per measurement; returns its path.

    Args:
        widths: hidden sizes; a head is 64 wide.
        layers, loops: of the looped model; the Llama has their product in layers.
        rounds: interleaved pairs of each ratio: each side is timed so many times.
        run: a trained run, which adds the rows of halting or of speculation that its task has.
        compiled: add rows with torch.compile, which take minutes to compile.
        quick: tiny sizes and two rounds, to see that it works.
        contexts: cached tokens; if given, only `contexts.py` is measured.
        memory_loops: loop counts for `contexts`.
        growth: measure what `growth.py` does instead, and draw OUTPUT/growth.png.
        requests: rows at once; if given, only `requests.py` is measured, on `run` and, with `contexts`, on random
            models.

    Raises:
        ValueError: the task of the run has no such rows, `output` is not a folder, or more memory is needed than is
            free.
    """
    from .contexts import context_lines, memory_plan
    from .growth import FEW_POINTS, POINTS, draw_growth, growth_lines, growth_plan
    from .requests import exit_plan, request_lines, request_rows

    check_folder(Path(output))
    if run is not None:
        task_for("bench", [run])
        load_run_model(run)  # refuses a run that cannot be measured, before the other measurements
    if requests and (run is None or not task_for("bench", [run]).has("chains")):
        raise ValueError("--requests answers chains: name a run of khop or composition with --run.")
    work = replace(QUICK if quick else Workload(), layers=layers, loops=loops)
    widths, rounds = ((32,), 2) if quick else (widths, rounds)
    check_memory(max(widths), work, max(contexts, default=0), max(memory_loops) if contexts else work.loops)
    compiling = (False, True) if compiled else (False,)
    peak = matmul_peak(work.matmul)
    if growth:
        plan = growth_plan(widths, work, rounds, FEW_POINTS if quick else POINTS)
    elif requests:
        plan = exit_plan(widths, work, rounds, contexts)
    elif contexts:
        plan = memory_plan(widths, work, rounds, contexts, memory_loops)
    else:
        plan = [partial(training_row, width, work, rounds, how, peak) for width in widths for how in compiling]
        plan += [partial(decode_row, width, work, rounds, how) for width in widths for how in compiling]
        plan += [partial(kv_row, width, work, policy) for width in widths for policy in ("per_loop", "last", "gated")]
        plan += [partial(hyper_row, width, work, rounds, how) for width in widths for how in compiling]
        plan += [partial(accepted_row, width, work, rounds) for width in widths]
    rows = [measure() for measure in tqdm(plan, desc="measuring", unit="row")]
    if requests:
        assert run is not None
        rows += request_rows(run, work, rounds, requests)
    elif run is not None and not (contexts or growth):
        rows += task_rows(run, work, rounds)
    facts = machine() | {"matmul_peak_gflops": peak, "layers": work.layers, "loops": work.loops}
    rows = [facts | row for row in rows]
    print("\n".join([bench_table(rows), *context_lines(rows), *growth_lines(rows), *request_lines(rows)]))
    if growth:
        draw_growth(rows, Path(output))
    return write_whole(Path(output) / "bench.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def task_rows(run: Run, work: Workload, rounds: int) -> list[dict]:
    """The rows of halting and of speculation on a trained run, as far as its task has them."""
    task = task_for("bench", [run])
    rows = task.time_halting(run, work.rows_per_hop, rounds) if task.has("time_halting") else []
    return rows + (speculation_rows(run, work, rounds) if task.has("prompts") else [])


def check_memory(width: int, work: Workload, context: int, loops: int) -> None:
    """Raise ValueError if the largest pair of models does not fit into the free memory, estimated from below.

    Args:
        context: cached tokens of a decoding step; 0 if updates are measured, too.
    """
    depth = work.layers * loops
    weights = depth * 13 * width**2  # of the Llama: 4 matrices of width x width, 3 of width x 3 widths
    training = 4 * weights + 20 * work.batch * work.tokens * depth * width  # gradients, two moments; activations
    decoding = 2 * weights + 4 * depth * width * context  # keys and values of both models
    numbers = decoding if context else max(training, decoding)
    needed, free = 4 * numbers, psutil.virtual_memory().available  # bytes; float32
    if needed > free:
        asked = f"--widths {width}"
        if context:
            asked += f" --contexts {context} --memory-loops {loops}"
        raise ValueError(
            f"{asked}: at least {needed / 1e9:,.0f} GB of memory are needed and {free / 1e9:,.0f} GB are free; "
            "ask for less."
        )


def bench_table(rows: Sequence[dict]) -> str:
    """The rows as text, a table per kind of measurement; `context_lines` has those of `contexts.py`."""
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
            "\nself-speculation against plain decoding, batch 1; calls: layer calls as a share of plain decoding's"
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
        text.append(f"\nhalting on {halting[0]['run']}, {halting[0]['rows']} test rows")
        columns = f"{'rule':<12}{'loops':>6}{'used':>7}{'calls saved':>13}{'accuracy':>10}{'fixed':>8}"
        text.append(f"{columns}   speed (fixed / halted seconds)")
    for row in halting:
        text.append(
            f"{row['mode']:<12}{row['loops']:>6}{row['loops_used']:>7.1f}{100 * row['layer_calls_saved']:>11.0f} %"
            f"{100 * row['accuracy']:>8.1f} %{100 * row['fixed_accuracy']:>6.1f} %   "
            f"{ratio_text(row)}"
        )
    return "\n".join(text)
