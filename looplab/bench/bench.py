"""Speed and memory against an equally wide, equally deep (unrolled) Llama, and what halting saves.

    training   forward + backward + AdamW step, tokens/s; eager and with each layer compiled
    decode     `generate`, greedy, batch 1, new tokens/s; eager with a dynamic cache, compiled with a static one
    kv_bytes   bytes of the cache tensors per token, for each kv_sharing
    hyper      training step of Hyperloop's gated streams, tokens/s, against the plain loop of the same layers
    context    decoding at long contexts, and chunks: training with gated KV, see `contexts.py`
    halting    layer calls and wall time of the KL + entropy rule against fixed loops, on a trained run
    speculation  decoding with `draft_loops` against plain decoding, batch 1, new tokens/s: on a trained run, and where
               every draft is accepted because loops change nothing, which is as fast as it gets

Both models run the same matrix products on the same tokens; the looped one has num_core_layers layers of weights,
Llama num_loops times as many. They are timed in turn (A B A B ...) in one process, so that what else the machine does
hits both, and a ratio is the median over the pairs. Nothing here is a test: numbers of two machines do not compare.
"""

import json
from collections.abc import Sequence
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
    rounds: int = 7,
    run: Run | None = None,
    compiled: bool = True,
    quick: bool = False,
    contexts: Sequence[int] = (),
    memory_loops: Sequence[int] = (4, 8),
) -> Path:
    """Measure, print a table and write OUTPUT/bench.jsonl, one row per measurement.

    Args:
        widths: hidden sizes; a head is 64 wide.
        rounds: timed pairs per ratio.
        run: a trained one, for rows of speculation or of halting: what its task has.
        compiled: also the rows with torch.compile, which take minutes to compile.
        quick: tiny sizes and two rounds, to see that it works.
        contexts: measure these instead: decoding after so many tokens with each KV sharing, and training in chunks.
        memory_loops: loop counts of the contexts.

    Raises:
        ValueError: the run's task has neither, `output` is no folder, or more memory is needed than is free.
    """
    from .contexts import context_lines, memory_plan

    check_folder(Path(output))
    if run is not None:
        task_for("bench", [run])
        load_run_model(run)  # a run that cannot be measured is refused before the rest is
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
        plan.append(lambda: task_rows(run, work, rounds))
    if contexts:
        plan = memory_plan(widths, work, rounds, contexts, memory_loops)
    facts = machine() | {"matmul_peak_gflops": peak, "layers": work.layers, "loops": work.loops}
    rows = []
    for measure in tqdm(plan, desc="measuring", unit="row"):
        rows += [facts | row for row in measure()]
    print("\n".join([bench_table(rows), *context_lines(rows)]))
    return write_whole(Path(output) / "bench.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def task_rows(run: Run, work: Workload, rounds: int) -> list[dict]:
    """Drafts on a trained run, and halting, as far as its task has them."""
    task = task_for("bench", [run])
    rows = task.time_halting(run, work.rows_per_hop, rounds) if task.has("time_halting") else []
    return rows + (speculation_rows(run, work, rounds) if task.has("prompts") else [])


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
