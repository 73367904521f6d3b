"""Train a looped transformer on hops, text, molecules or questions: `looped train RECIPE [--field value ...]`, in one
process, or `accelerate launch -m looplab.train RECIPE [--field value ...]`, in as many as it is told.

    while budget remains:
        batch = task.batches[step]        rows of one length and one loop count; a pure function of (seed, step)
        loss  = model(batch, num_loops)   mean cross-entropy of the labels of all ranks and micro-batches
        update                            AdamW, or Muon for the matrices of the layers and AdamW for the rest; of all
                                          weights, of the core's, or of adapters (`train`)
        every check_every steps:          task.check on held-out rows, and task.advance
        every checkpoint_every steps:     save the whole training state; and once a signal asks for it

    task       labels                            held-out check           advance
    hops       the answer, at the last token     accuracy by hop count    stage k passed -> train on 1..k+1 hops
    text       the next token, at every token    nats per token           -
    molecules  the next token, at every token    nats per token           -
    sequence   the answer, token by token        right answers by grade   grade g passed -> train on the next, too

A run lives in `<output_dir>/<name>/`: recipe.yaml (resolved), metrics.jsonl, checkpoints/, and at the end model/ and
summary.json. The same command again resumes it, after `kill -9` too, with the losses the uninterrupted run would have
had. Curriculum and readout are those of Loop, Think, & Generalize (arXiv 2604.07822); here the held-out check and the
test have different chains.

looplab/training/ has the recipe, the model, the objectives, the optimizers and the run folder; what a task does in
training is in looplab/tasks/TASK/training.py.
"""

import argparse
import json
import logging
import math
import sys
import time
from contextlib import ExitStack, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import get_int_from_env, set_seed
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from looplab.mistakes import Parser, run_command
from looplab.tasks.registry import TASKS
from looplab.tasks.training import State
from looplab.training.checkpoints import RandomStates, TrainingState
from looplab.training.model import build_model, check_max_loops, may_lack_gradients
from looplab.training.objectives import make_objective
from looplab.training.optimizers import build_optimizers, lr_factor, restart, set_rates
from looplab.training.processes import ModelFiles, make_accelerator, whole_weights
from looplab.training.provenance import provenance
from looplab.training.recipe import Recipe, add_recipe, read_recipe
from looplab.training.run_folder import RunFolder, held
from looplab.training.stopping import REQUEUE, listening
from looplab.training.trackers import Trackers, check_trackers, closed_trackers
from looplab.training.trained import TRAINED
from looplab.training.watch import Watch


def main(recipe: Recipe) -> dict:
    """Run `recipe`, or go on with it, and return what summary.json holds.

    Raises:
        ValueError: a recipe that cannot run.
        FloatingPointError: the loss is no longer finite, or far above those before it.
        SystemExit: with REQUEUE, after the checkpoint that a signal asked for.
    """
    check_trackers(recipe.trackers)
    if recipe.compile:
        check_compiler()
    accelerator = make_accelerator(recipe)
    world = accelerator.num_processes
    if recipe.batch_size % (world * recipe.accumulation_steps):
        raise ValueError(
            f"batch_size {recipe.batch_size} does not divide into {world} processes x {recipe.accumulation_steps} "
            "accumulation_steps: change one of them."
        )
    with held(recipe, accelerator) as run:
        if run.complete:
            accelerator.print(f"{run.final}: finished, and its checkpoints are gone: it is left as it is")
            return run.summary()
        with ExitStack() as stack:
            stack.enter_context(closed_trackers(accelerator))
            summary = fit(recipe, accelerator, run, stack)
        accelerator.end_training()
        return summary


def fit(recipe: Recipe, accelerator: Accelerator, run: RunFolder, stack: ExitStack) -> dict:
    """`main` in the folder of the run, which this process holds. stack: what ends with the training."""
    # Data: what the task trains and measures on.
    depth = recipe.depth.sampler(recipe.seed)
    with accelerator.main_process_first():
        splits = run.splits()
        run.check_data(splits)
    task = TASKS[recipe.data.task].training(recipe, splits, depth, accelerator, run.kept_tokenizer())

    # Model: the same weights on every rank; after that each rank has its own dropout.
    set_seed(recipe.seed)
    looped = build_model(recipe, task.tokenizer, task.generation)
    num_parameters, trained = looped.num_parameters(), TRAINED[recipe.train.what](recipe.train)
    trained.prepare(looped)
    check_loops = recipe.gate_loops or looped.config.num_loops
    objective = make_objective(recipe, looped, task, accelerator)
    most_loops = {"depth": int(depth.depths[-1]), "gate_loops": check_loops, **task.most_loops()}
    check_max_loops(looped.config, most_loops, recipe.eval_loops)
    accelerator.ddp_handler.find_unused_parameters = may_lack_gradients(recipe, looped.config)
    set_seed(recipe.seed, device_specific=True)
    if recipe.gradient_checkpointing:
        looped.activation_checkpointing_enable()
    if recipe.compile:
        for module in looped.model.pieces():
            module.compile()
    optimizers = build_optimizers(looped, recipe.optim, fused=accelerator.device.type == "cuda")
    model, *optimizers = accelerator.prepare(looped, *optimizers)
    random_states = RandomStates(accelerator, recipe.seed + accelerator.process_index)
    training = TrainingState(accelerator, looped, optimizers, {"random": random_states, **task.parts()})

    # State: from the newest intact checkpoint, or the beginning.
    state = run.load_checkpoint(training) or task.first_state()
    task.begin(state)
    run.begin(task.tokenizer, state)
    if state.finished and not over(recipe, state) and not task.is_through(state):
        # The budget has grown. The last check could not begin a stage, because the run ended there: it does so now.
        state.finished = False
        if state.step % recipe.check_every == 0 and task.advance(state):
            restart(optimizers)
    trackers = Trackers(recipe, accelerator, run, state)
    watch = Watch(recipe, looped.config, task, accelerator, run, state)
    progress_bar = tqdm(
        total=recipe.max_steps,
        initial=state.step,
        disable=not accelerator.is_main_process,
        unit="update",
        mininterval=1.0,
    )

    def write_row(row: dict):
        if accelerator.is_main_process:
            with run.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        trackers.log(row)

    def files() -> ModelFiles:
        return ModelFiles(looped, trained.weights(looped), recipe.max_shard_size)

    def check() -> dict:
        with whole_weights(accelerator, looped):
            return task.check(looped, state, check_loops)

    # The row of step 0 says what the model of `init_from` had reached.
    if recipe.init_from is not None and state.step == 0:
        write_row({"step": 0, "seconds": 0.0} | check())
    model.train()
    paces = recipe.log_every, recipe.check_every
    unread: list[tuple[int, torch.Tensor]] = []  # (step, loss, seconds, stop) of updates whose loss was not read yet
    asked, stops, saved = stack.enter_context(listening()), False, state.seconds
    began = time.perf_counter() - state.seconds
    while not (state.finished or stops):
        # The schedule follows the steps, or the clock where only that limits the run.
        progress = state.step / recipe.max_steps if recipe.max_steps else state.seconds / recipe.max_seconds
        progress = min(1.0, progress)
        factor = lr_factor(recipe.optim, task.schedule_step(state), progress)
        set_rates(optimizers, factor)

        # Gradients of one batch: a sum over its micro-batches, a mean over the ranks.
        with watch.waiting():
            batch = task.batches[state.step]
        watch.count(batch)
        num_labels, num_tokens = task.sizes(batch)
        micro_batches = split(batch, recipe.accumulation_steps, accelerator.device)
        loss = torch.zeros((), device=accelerator.device)
        for index, rows in enumerate(micro_batches):
            # Ranks exchange gradients once per update.
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                labels = rows.pop("shift_labels")  # (b, K)
                part = objective(model, rows, labels, batch["num_loops"], progress)
                part = part * (accelerator.num_processes / num_labels)  # DDP averages over ranks
                accelerator.backward(part)
            loss += part.detach()

        # The clock is the main process's, so that all ranks stop at one step. The loss of the update before is read,
        # while an accelerator computes on; an update after which something is written reads its own.
        seconds = time.perf_counter() - began if accelerator.is_main_process else 0.0
        stop = float(asked.is_set())
        shares = torch.stack([loss / accelerator.num_processes, *loss.new_tensor([seconds, stop])])
        state.step += 1
        state.tokens += num_tokens
        unread.append((state.step, accelerator.reduce(shares)))
        saves = state.seconds - saved >= (recipe.checkpoint_seconds or math.inf)
        saves |= state.step % recipe.checkpoint_every == 0
        writes = saves or over(recipe, state) or any(state.step % every == 0 for every in paces)
        writes |= state.step in recipe.snapshots
        while len(unread) > (0 if writes else 1):
            step, shares = unread.pop(0)
            loss, state.seconds, stop = shares.tolist()
            watch.check(step, loss)
            stops |= stop > 0
            writes |= stops or over(recipe, state)
        state.finished = over(recipe, state)
        logs = state.step % recipe.log_every == 0 or state.finished
        if recipe.optim.clip is not None or logs:
            # With an infinite bound the gradients stay as they are.
            norm = accelerator.clip_grad_norm_(model.parameters(), recipe.optim.clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress_bar.update()

        # Rows, checks, snapshots and checkpoints, each at its own pace and all of them at the end.
        if logs:
            write_row(
                {"step": state.step, "loss": loss, "lr": recipe.optim.lr * factor, "num_loops": batch["num_loops"]}
                | {"grad_norm": number_of(norm)}
                | task.describe(batch, state)
                | {"seconds": state.seconds, "tokens": state.tokens}
                | watch.row(state)
            )
            progress_bar.set_postfix(loss=f"{loss:.3f}", **task.progress(state), refresh=False)
        if state.step % recipe.check_every == 0 or state.finished:
            write_row({"step": state.step, "seconds": state.seconds} | check())
            if task.advance(state):
                restart(optimizers)
        if state.step in recipe.snapshots:
            run.save_model(f"snapshots/step-{state.step:09d}", files(), task.tokenizer)
        if saves or stops or state.finished:
            run.save_checkpoint(training, state)
            saved = state.seconds
        run.end_checkpoint(wait=stops or state.finished)
    if not state.finished:
        progress_bar.close()
        accelerator.print(f"{run.folder}: asked to stop, and saved after {state.step} steps; the same command goes on")
        raise SystemExit(REQUEUE)

    # The result: a model folder that loads anywhere, and what it took to make it.
    progress_bar.close()
    with whole_weights(accelerator, looped):
        measured = task.summary(looped, state, check_loops)
    summary = {
        "name": recipe.name,
        "recipe": "recipe.yaml",
        "seed": recipe.seed,
        "steps": state.step,
        "seconds": state.seconds,
        "tokens": state.tokens,
        "parameters": num_parameters,
        "trained_parameters": looped.num_parameters(only_trainable=True),
        **measured,
        "gate_loops": check_loops,
        "trained_loops": {"minimum": int(depth.depths[0]), "maximum": int(depth.depths[-1]), "mean": depth.expected},
        **provenance(accelerator),
    }
    run.save_model("model", files(), task.tokenizer)
    if accelerator.is_main_process:
        run.write_summary(summary)
    accelerator.print(f"{run.folder}: {state.step} steps, {task.headline(summary)}")
    return summary


def check_compiler() -> None:
    """ValueError if torch.compile finds no compiler for code that runs on the CPU."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ValueError(
            "compile=true needs a C++ compiler, and torch found none: install g++, or set compile to false."
        ) from error


def over(recipe: Recipe, state: State) -> bool:
    """Whether the budget is spent."""
    return state.step >= (recipe.max_steps or math.inf) or state.seconds >= (recipe.max_seconds or math.inf)


def number_of(norm: torch.Tensor | None) -> float | None:
    """The norm of the gradients before they were clipped; None where the launcher clips by itself and keeps it."""
    if isinstance(norm, DTensor):  # sharded
        norm = norm.full_tensor()
    return None if norm is None else float(norm)


def split(batch: dict, number: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The tensors of a batch on `device`, as at most `number` micro-batches."""
    tensors = {name: value.to(device).chunk(number) for name, value in batch.items() if torch.is_tensor(value)}
    return [dict(zip(tensors, part, strict=True)) for part in zip(*tensors.values(), strict=True)]


def program(name: str) -> int:
    """Train as the arguments of this process say, and return the exit status. name: how messages call the program."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake, too")
    arguments, flags = parser.parse_known_args()
    rank = get_int_from_env(["LOCAL_RANK"], 0)
    if rank > 0:  # what all ranks find out is said by the first alone
        logging.getLogger("looplab").setLevel(logging.ERROR)
    return run_command(name, lambda: main(read_recipe(arguments.recipe, flags)), arguments.debug, rank)


if __name__ == "__main__":
    sys.exit(program("looplab.train"))
