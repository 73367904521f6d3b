"""Train a looped transformer on hops, text or molecules: `accelerate launch train.py RECIPE [--field value ...]`.

    while budget remains:
        batch = task.batches[step]        rows of one length and one loop count; a pure function of (seed, step)
        loss  = model(batch, num_loops)   mean cross-entropy of the tokens asked for, of all ranks and micro-batches
        update                            AdamW, or Muon for the matrices of the layers and AdamW for the rest
        every check_every steps:          task.check on held-out rows, and task.advance
        every checkpoint_every steps:     save the whole training state

    task       asks for                          check                          advance
    hops       the answer, at one readout token  accuracy by hops (the gate)    stage k passed -> train on 1..k+1 hops
    text       the next token, at every token    nats per token, perplexity     -
    molecules  the same, in rows of several      the same                       -

A run lives in `<output_dir>/<name>/`: recipe.yaml (resolved), metrics.jsonl, checkpoints/, and at the end model/ and
summary.json. The same command again resumes it, after `kill -9` too, with the losses the uninterrupted run would have
had. Curriculum and readout are those of Loop, Think, & Generalize (arXiv 2604.07822); the gate and the test are
different chains here.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, get_int_from_env, set_seed
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from data_builders import (
    DepthSampler,
    HopBatches,
    MoleculeBatches,
    PackedMolecules,
    TextBatches,
    TextBlocks,
    dataset_byte_bpe,
    dataset_smiles_tokenizer,
    dataset_tokenizer,
    encode_groups,
    load_molecules,
    load_task,
    load_text,
)
from looplab.distillation import Distillation, interpolated
from looplab.loading import blaming
from looplab.mistakes import Parser, run_command
from looplab.recipe import Optim, Recipe, field_names, flatten, read_recipe
from looplab.run_folder import RunFolder, State, held
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.losses_looped import exit_distribution

# Held-out tokens that go through the model at once: their logits are this times the vocabulary.
CHECKED_TOKENS = 2048


def build_optimizers(model: LoopedForCausalLM, optim: Optim) -> list[torch.optim.Optimizer]:
    """AdamW; with Muon, that takes the matrices of the layers (Jordan et al. 2024) and AdamW keeps the rest."""
    parts = [model.model.prelude, model.model.core, model.model.coda] if optim.kind == "muon" else []
    gates = [p for name, p in model.named_parameters() if ".kv_gate." in name and optim.kv_gate_lr is not None]
    taken = {id(p) for p in gates}
    matrices = [p for part in parts for p in part.parameters() if p.ndim == 2 and id(p) not in taken]
    taken |= {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        {"params": gates, "weight_decay": 0.0, "lr": optim.kv_gate_lr},
    ]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=tuple(optim.betas))]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=optim.muon_lr, weight_decay=optim.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def lr_factor(optim: Optim, stage_step: int, progress: float) -> float:
    """Multiplier of the learning rates, `stage_step` updates into the stage and with `progress` in [0, 1] of the run.

    A linear warm-up, times: 1 (constant), 1 - progress (linear), half a cosine, or 1 and a linear end over the last
    fifth (wsd), of which `final_share` stays.
    """
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * progress),
        "wsd": min(1.0, 5.0 * (1.0 - progress)),
    }[optim.schedule]
    shape = optim.final_share + (1.0 - optim.final_share) * shape
    return shape * min(1.0, (stage_step + 1) / max(1, optim.warmup_steps))


@torch.no_grad()
def held_out_accuracy(accelerator, model, rows: dict, hops: list[int], num_loops: int) -> dict[str, float]:
    """Share of `rows` whose argmax over the vocabulary at the readout is the answer; ranks share the work.

    rows: (hops, split_kind) -> (input_ids (N, T), answers (N,)). Result: "2", "3", .. and "2 id", "2 ood"..
    """
    right, total = Counter(), Counter()
    model.eval()
    for (k, split_kind), group in rows.items():
        if k not in hops:
            continue
        correct = torch.zeros((), device=accelerator.device)
        share = (part[accelerator.process_index :: accelerator.num_processes].split(512) for part in group)
        for input_ids, answers in zip(*share, strict=True):
            input_ids, answers = input_ids.to(accelerator.device), answers.to(accelerator.device)
            logits = model(
                input_ids=input_ids, logits_to_keep=1, num_loops=num_loops, use_cache=False
            ).logits  # (b, 1, V)
            correct += (logits[:, -1].argmax(-1) == answers).sum()
        for key in (str(k), f"{k} {split_kind}"):
            right[key] += accelerator.reduce(correct).item()
            total[key] += len(group[1])
    model.train()
    return {key: right[key] / total[key] for key in total}


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator,
    model: LoopedForCausalLM,
    held_out: TextBlocks | PackedMolecules,
    number: int,
    num_loops: int,
) -> float:
    """Mean cross-entropy, in nats per token, over the first `number` blocks or molecules; ranks share the work."""
    total, count = torch.zeros((2, 1), dtype=torch.float64, device=accelerator.device)
    model.eval()
    share = torch.arange(number)[accelerator.process_index :: accelerator.num_processes]
    for chosen in share.split(max(1, int(CHECKED_TOKENS / held_out.mean_length))):
        rows = {name: value.to(accelerator.device) for name, value in held_out.rows(chosen).items()}
        labels = rows.pop("shift_labels").flatten()
        logits = model(**rows, num_loops=num_loops, use_cache=False).logits  # (b, T, V)
        total += F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")
        count += (labels >= 0).sum()
    model.train()
    return (accelerator.reduce(total) / accelerator.reduce(count)).item()


@torch.no_grad()
def held_out_exits(
    accelerator: Accelerator,
    model: LoopedForCausalLM,
    held_out: TextBlocks | PackedMolecules,
    number: int,
    num_loops: int,
) -> dict[str, float]:
    """Where the exit gate would leave, means over the tokens of the first `number` blocks or molecules; ranks share
    the work.

    expected_loss (nats) of the loop a token leaves after, the mean loop, and the entropy (nats) of its distribution.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    model.eval()
    share = torch.arange(number)[accelerator.process_index :: accelerator.num_processes]
    for chosen in share.split(max(1, int(CHECKED_TOKENS / held_out.mean_length))):
        rows = {name: value.to(accelerator.device) for name, value in held_out.rows(chosen).items()}
        gate_logits, losses = model.exits(**rows, num_loops=num_loops)  # (b, T, R)
        p, loops = exit_distribution(gate_logits), torch.arange(1, num_loops + 1, device=gate_logits.device)
        each = torch.stack([(p * losses).sum(-1), (p * loops).sum(-1), torch.special.entr(p).sum(-1)])
        kept = rows["shift_labels"] != -100
        totals += torch.cat([each[:, kept].double().sum(1), kept.sum().double()[None]])
    model.train()
    *sums, tokens = accelerator.reduce(totals).tolist()
    return dict(zip(("expected_loss", "mean_loop", "entropy"), (value / tokens for value in sums), strict=True))


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LoopedForCausalLM:
    """A model with fresh weights for the ids of `tokenizer`, or that of `init_from`; ValueError if they do not fit."""
    # Ids may have holes.
    num_ids = 1 + max(tokenizer.get_vocab().values())
    if recipe.init_from is None:
        token_ids = {
            "vocab_size": num_ids,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        config = LoopedConfig(**(token_ids | recipe.model))
        if num_ids > config.vocab_size:
            raise ValueError(
                f"model.vocab_size must be at least {num_ids}, the tokens of the tokenizer, got {config.vocab_size}."
            )
        return LoopedForCausalLM(config)
    with blaming(recipe.init_from, "name another folder in init_from."):
        config = LoopedConfig.from_pretrained(recipe.init_from, **recipe.model)
    # KV gates that the weights were trained without start as fresh ones do.
    model = load_trained("init_from", recipe.init_from, may_lack=".kv_gate.", config=config)
    if num_ids > config.vocab_size:
        raise ValueError(f"init_from: {recipe.init_from} has {num_ids} tokens, and a model for {config.vocab_size}.")
    return model


def load_trained(field_name: str, folder: str, may_lack: str | None = None, **options) -> LoopedForCausalLM:
    """The model saved in a folder, in float32; ValueError, naming the recipe's field, if it is not whole.

    may_lack: part of the names of tensors that may be missing.
    """
    with blaming(folder, f"name another folder in {field_name}."):
        model, report = LoopedForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    missing = [name for name in report["missing_keys"] if may_lack is None or may_lack not in name]
    wrong = sorted([*missing, *report["unexpected_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if wrong:
        raise ValueError(f"{field_name}: the weights in {folder} do not fit its config.json ({wrong[0]}).")
    return model


def check_max_loops(config: LoopedConfig, asked: dict[str, int], eval_loops: list[int]):
    """ValueError for a field of the recipe that asks for loops the model has no parameters for."""
    for name, loops in (asked | {"eval_loops": max(eval_loops, default=1)}).items():
        if config.max_num_loops is not None and loops > config.max_num_loops:
            raise ValueError(
                f"{name} asks for {loops} loops, and model.max_num_loops is {config.max_num_loops}: raise it, or ask "
                "for fewer."
            )


def load_tokenizer(field_name: str, folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; ValueError, naming the recipe's field, if there is none."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise ValueError(f"{field_name}: there is no tokenizer in the folder {folder!r}.")
    with blaming(folder, f"name another folder in {field_name}."):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class HopTask:
    """Chains of relations: the answer is read at one token, and deeper chains come in as shallower ones are learnt."""

    logits_to_keep = 1
    generation = {"max_new_tokens": 1}  # noqa: RUF012

    def __init__(self, recipe: Recipe, depth: DepthSampler, accelerator: Accelerator, run: RunFolder):
        self.recipe, self.depth, self.accelerator = recipe, depth, accelerator
        data, curriculum = recipe.data, recipe.curriculum
        # Training rows by hop count, and the gate's held-out rows, which are not the test's.
        with accelerator.main_process_first():
            dataset = load_task(data.task, data.config, **({"seed": data.seed} | data.overrides))
            run.check_data(dataset)
        if recipe.init_from is None:
            self.tokenizer = dataset_tokenizer(dataset, readout=data.readout)
        else:
            self.tokenizer = load_tokenizer("init_from", recipe.init_from)
            if bool(self.tokenizer("")["input_ids"]) != (data.readout == "token"):
                raise ValueError(
                    f"data.readout is {data.readout}, but not so for the tokenizer in {recipe.init_from}."
                )
        self.train_rows = dataset["train"]
        self.gate_rows = encode_groups(dataset["validation"], self.tokenizer)
        self.gate_hops = sorted({k for k, _ in self.gate_rows})
        self.train_hops = sorted(self.train_rows.unique("hops"))
        self.start_hops = curriculum.start_hops or self.train_hops[-1]
        self.stop_hops = curriculum.stop_hops or self.train_hops[-1]
        ends = {self.start_hops, self.stop_hops}
        if self.start_hops > self.stop_hops or not ends <= set(self.train_hops) & set(self.gate_hops):
            raise ValueError(
                f"curriculum.start_hops {self.start_hops} and stop_hops {self.stop_hops} must be in order and have "
                f"both training rows (hops {self.train_hops}) and held-out rows (hops {self.gate_hops})."
            )

    def first_state(self) -> State:
        return State(stage=self.start_hops)

    def is_through(self, state: State) -> bool:
        """Whether the last stage has passed and the run is to end there, whatever budget remains."""
        return self.recipe.curriculum.after_last == "stop" and state.learnable_depth == self.stop_hops

    def begin(self, state: State):
        """Train on 1 .. `state.stage` hops."""
        data = self.recipe.data
        self.batches = HopBatches(
            self.train_rows, self.tokenizer, self.recipe.batch_size, self.recipe.seed, self.depth,
            hops=[k for k in self.train_hops if k <= state.stage], rank=self.accelerator.process_index,
            world=self.accelerator.num_processes, weighting=data.weighting, at_least_hops=data.at_least_hops,
            pad_to=data.pad_to,
        )  # fmt: skip

    def describe(self, batch: dict, state: State) -> dict:
        """What a training row of metrics.jsonl says beside loss and loops."""
        return {"stage": state.stage, "hops": batch["hops"]}

    def check(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """Measure the gate, note it in `state`, and return the row of metrics.jsonl."""
        hops = [k for k in self.gate_hops if k <= state.stage]
        accuracy = held_out_accuracy(self.accelerator, model, self.gate_rows, hops, num_loops)
        state.gate = {key: value for key, value in accuracy.items() if key.isdigit()}
        row = {"stage": state.stage, "gate": state.gate}
        row["gate_by_split_kind"] = {key: value for key, value in accuracy.items() if not key.isdigit()}
        if self.recipe.eval_loops:
            row["gate_at_loops"] = {
                str(r): held_out_accuracy(self.accelerator, model, self.gate_rows, hops, r)
                for r in self.recipe.eval_loops
            }
        return row

    def advance(self, state: State) -> bool:
        """Whether the check let a new stage begin; after the last one, the run may end."""
        curriculum = self.recipe.curriculum
        rested = state.step - state.stage_start >= curriculum.min_steps
        if not rested or state.gate[str(state.stage)] <= curriculum.threshold:
            return False
        state.learnable_depth = state.stage
        if state.stage == self.stop_hops:
            state.finished |= curriculum.after_last == "stop"
        elif not state.finished:
            state.stage, state.stage_start = next(k for k in self.train_hops if k > state.stage), state.step
            self.begin(state)
            return True
        return False

    def progress(self, state: State) -> dict:
        """What the progress bar shows beside the loss."""
        return {"stage": state.stage, "gate": state.gate.get(str(state.stage))}

    def summary(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """What was reached, the gate over all hops, and what was trained on."""
        gate = held_out_accuracy(self.accelerator, model, self.gate_rows, self.gate_hops, num_loops)
        return {
            "stage": state.stage,
            "learnable_depth": state.learnable_depth,
            "gate": {key: value for key, value in gate.items() if key.isdigit()},
            "gate_by_split_kind": {key: value for key, value in gate.items() if not key.isdigit()},
            "trained_hops": [k for k in self.train_hops if k <= state.stage],
        }

    def headline(self, summary: dict) -> str:
        return f"learnable depth {summary['learnable_depth']}, gate {summary['gate']}"


class TextTask:
    """Plain text: every token predicts the next, in blocks of one length, and there are no stages."""

    logits_to_keep = 0  # all
    generation = {}  # noqa: RUF012

    def __init__(self, recipe: Recipe, depth: DepthSampler, accelerator: Accelerator, run: RunFolder):
        self.recipe, self.depth, self.accelerator = recipe, depth, accelerator
        data = recipe.data
        with accelerator.main_process_first():
            dataset = load_text(data.files, **({"seed": data.seed} | data.overrides))
            run.check_data(dataset)
            if recipe.init_from is not None:
                self.tokenizer = load_tokenizer("init_from", recipe.init_from)
            elif data.tokenizer is not None:
                self.tokenizer = load_tokenizer("data.tokenizer", data.tokenizer)
            elif run.kept_tokenizer() is not None:
                with blaming(run.kept_tokenizer(), "delete it, and the tokenizer is learnt again."):
                    self.tokenizer = AutoTokenizer.from_pretrained(run.kept_tokenizer(), trust_remote_code=False)
            else:
                self.tokenizer = dataset_byte_bpe(dataset["train"], data.vocab_size)
            self.batches = TextBatches(
                dataset["train"], self.tokenizer, data.sequence_length, recipe.batch_size, recipe.seed, depth,
                rank=accelerator.process_index, world=accelerator.num_processes,
            )  # fmt: skip
            self.held_out = TextBlocks(dataset["validation"], self.tokenizer, data.sequence_length)
            # What `looped eval` measures on: refused now, and not when the training is done.
            TextBlocks(dataset["test"], self.tokenizer, data.sequence_length)
        self.num_held_out = len(self.held_out)
        if data.validation_tokens is not None:
            self.num_held_out = min(self.num_held_out, max(1, data.validation_tokens // data.sequence_length))

    def first_state(self) -> State:
        return State()

    def is_through(self, state: State) -> bool:
        """Whether the run is to end whatever budget remains: there are no stages to pass."""
        return False

    def begin(self, state: State):
        """Nothing: the batches are the same from the first step to the last."""

    def describe(self, batch: dict, state: State) -> dict:
        """What a training row of metrics.jsonl says beside loss and loops."""
        return {}

    def check(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """Measure the held-out loss, note it in `state`, and return the row of metrics.jsonl."""
        state.gate = {
            str(r): held_out_loss(self.accelerator, model, self.held_out, self.num_held_out, r)
            for r in dict.fromkeys([num_loops, *self.recipe.eval_loops])
        }
        row = self.measured(state, num_loops)
        if model.config.exit_gate:
            row["exits"] = held_out_exits(self.accelerator, model, self.held_out, self.num_held_out, num_loops)
        return row

    def measured(self, state: State, num_loops: int) -> dict:
        """Nats per token and perplexity at `num_loops` and, if asked for, at each of `eval_loops`."""
        # Not math.exp: it raises where the loss of a model that went astray is too large.
        values = {r: {"loss": loss, "perplexity": torch.tensor(loss).exp().item()} for r, loss in state.gate.items()}
        row = {"held_out": values[str(num_loops)]}
        if self.recipe.eval_loops:
            row["held_out_at_loops"] = {str(r): values[str(r)] for r in self.recipe.eval_loops}
        return row

    def advance(self, state: State) -> bool:
        """Whether the check let a new stage begin: there is one stage."""
        return False

    def progress(self, state: State) -> dict:
        """What the progress bar shows beside the loss."""
        return {"held_out": next(iter(state.gate.values()), None)}

    def summary(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """The last check, which came after the last step, and how much text there was."""
        return self.measured(state, num_loops) | {
            "train_tokens": self.batches.blocks.num_tokens,
            "held_out_tokens": self.num_held_out * self.held_out.sequence_length,
        }

    def headline(self, summary: dict) -> str:
        loss, perplexity = summary["held_out"].values()
        return (
            f"held-out text {loss:.3f} nats per token, perplexity {perplexity:.1f}, at {summary['gate_loops']} loops"
        )


class MoleculeTask(TextTask):
    """SMILES: as text, but each molecule is by itself, several of them in a row of one length."""

    # Jindal and Ju 2026, arXiv 2605.06322: how molecules are written.
    generation = {"do_sample": True, "temperature": 0.8, "top_k": 40, "max_new_tokens": 120}  # noqa: RUF012

    def __init__(self, recipe: Recipe, depth: DepthSampler, accelerator: Accelerator, run: RunFolder):
        self.recipe, self.depth, self.accelerator = recipe, depth, accelerator
        data = recipe.data
        with accelerator.main_process_first():
            dataset = load_molecules(data.config, data.files, **({"seed": data.seed} | data.overrides))
            run.check_data(dataset)
            if recipe.init_from is not None:
                self.tokenizer = load_tokenizer("init_from", recipe.init_from)
            else:
                self.tokenizer = dataset_smiles_tokenizer(dataset)
            self.batches = MoleculeBatches(
                dataset["train"], self.tokenizer, data.sequence_length, recipe.batch_size, recipe.seed, depth,
                rank=accelerator.process_index, world=accelerator.num_processes,
                spellings=data.spellings, spelling_seed=data.seed,
            )  # fmt: skip
            self.held_out = PackedMolecules(dataset["validation"], self.tokenizer, data.sequence_length)
            # What `looped eval` measures on: refused now, and not when the training is done.
            for split in dataset.keys() - {"train", "validation"}:
                PackedMolecules(dataset[split], self.tokenizer, data.sequence_length)
        self.num_held_out = len(self.held_out)
        if data.validation_tokens is not None:
            ends = self.held_out.lengths.cumsum()
            self.num_held_out = max(1, int((ends <= data.validation_tokens).sum()))

    def summary(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """The last check, which came after the last step, and how many molecules there were."""
        return self.measured(state, num_loops) | {
            "train_molecules": self.batches.num_molecules,
            "train_tokens": self.batches.num_tokens,
            "held_out_molecules": self.num_held_out,
        }

    def headline(self, summary: dict) -> str:
        return f"held-out molecules {summary['held_out']['loss']:.4f} nats per token, at {summary['gate_loops']} loops"


TASKS = {"khop": HopTask, "composition": HopTask, "text": TextTask, "molecules": MoleculeTask}


class LabelLoss:
    """Cross-entropy of the tokens asked for."""

    def __init__(self, recipe: Recipe, logits_to_keep: int):
        self.logits_to_keep, self.label_smoothing = logits_to_keep, recipe.optim.label_smoothing
        self.settings = {"num_grad_loops": recipe.num_grad_loops, "cut_chunks": recipe.cut_chunks}

    def begin(self, progress: float):
        """Called before an update with the share of the run that is done."""

    def __call__(self, model, rows: dict, labels: torch.Tensor, num_loops: int) -> torch.Tensor:
        """The loss of (b, T) rows with (b, K) labels, summed over the labels."""
        logits = model(
            **rows, logits_to_keep=self.logits_to_keep, num_loops=num_loops, use_cache=False, **self.settings
        ).logits  # (b, K, V)
        logits, labels = logits.flatten(0, 1).float(), labels.flatten()
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")


class ExitLoss(LabelLoss):
    """The model's own loss: expected under its exit gate, or the gate's alone (Ouro), see `losses_looped.py`."""

    def __init__(self, recipe: Recipe, logits_to_keep: int):
        super().__init__(recipe, logits_to_keep)
        if recipe.optim.label_smoothing or recipe.distill.teacher is not None:
            raise ValueError(
                "a model with an exit_gate learns from what every loop says of the labels: leave "
                "optim.label_smoothing and distill out."
            )

    def __call__(self, model, rows: dict, labels: torch.Tensor, num_loops: int) -> torch.Tensor:
        return model(
            **rows, shift_labels=labels, logits_to_keep=self.logits_to_keep, num_loops=num_loops, use_cache=False,
            num_items_in_batch=1, **self.settings,
        ).loss  # fmt: skip


class DistillationLoss:
    """What a teacher says of every token; labels are not used."""

    def __init__(self, recipe: Recipe, student: LoopedForCausalLM, accelerator: Accelerator):
        distill = recipe.distill
        if recipe.data.task == "molecules":
            raise ValueError("distill is for rows without padding, which packed molecules have: leave it out.")
        if recipe.num_grad_loops is not None or recipe.optim.label_smoothing:
            raise ValueError("distill takes neither num_grad_loops nor optim.label_smoothing: leave them out.")
        self.interpolates = distill.phase == "interpolation"
        if self.interpolates and (recipe.gradient_checkpointing or recipe.cut_chunks):
            raise ValueError(
                "distill.phase 'interpolation' keeps the rows of both memories, which gradient_checkpointing and "
                "cut_chunks would lose: leave them out."
            )
        teacher = load_trained("distill.teacher", distill.teacher).to(accelerator.device)
        alignment = 0.0 if self.interpolates else distill.alignment
        self.distillation = Distillation(student, teacher, alignment, distill.all_loops)
        self.student, self.alpha, self.accelerator = student, 0.0, accelerator
        self.settings = {"cut_chunks": recipe.cut_chunks, "use_cache": self.interpolates}

    def begin(self, progress: float):
        """The gated memory's share rises from 0 to 1 over the run."""
        self.alpha = progress

    def __call__(self, model, rows: dict, labels: torch.Tensor, num_loops: int) -> torch.Tensor:
        """The mean loss of (b, T) rows, times their (b, K) labels."""
        # Head and teacher are run outside of the model's forward, in the same precision.
        with (
            interpolated(self.student) if self.interpolates else nullcontext() as sharing,
            self.accelerator.autocast(),
        ):
            if sharing is not None:
                sharing.alpha = self.alpha
            loss = self.distillation(model, rows, num_loops, **self.settings)
        return loss * labels.numel()


def provenance(accelerator: Accelerator) -> dict:
    """Where a run was made: commit of this file's repository (None outside of one), machine, versions."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    git = shutil.which("git")
    commit = subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip() if git else ""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else []
    return {
        "commit": commit or None,
        "hardware": {
            "cpu": names[0] if names else platform.processor(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
            "processes": accelerator.num_processes,
        },
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "accelerate", "datasets")},
    }


def over(recipe: Recipe, state: State) -> bool:
    """Whether the budget is spent."""
    return state.step >= (recipe.max_steps or math.inf) or state.seconds >= (recipe.max_seconds or math.inf)


def main(recipe: Recipe) -> dict:
    """Run `recipe`, or go on with it, and return what summary.json holds.

    Raises ValueError for a recipe that cannot run, FloatingPointError when the loss is no longer finite.
    """
    # What may be left without a gradient, which DDP must be told: the prelude, by truncated back-propagation.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=recipe.num_grad_loops is not None)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "bf16": "bf16"}[recipe.precision],
        log_with=recipe.trackers or None,
        project_dir=Path(recipe.output_dir) / recipe.name,
        kwargs_handlers=[ddp],
    )
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
        return fit(recipe, accelerator, ddp, run)


def fit(recipe: Recipe, accelerator: Accelerator, ddp: DistributedDataParallelKwargs, run: RunFolder) -> dict:
    """`main` in the folder of the run, which this process holds."""
    optim, curriculum, world = recipe.optim, recipe.curriculum, accelerator.num_processes
    # Data: what the task trains and measures on.
    depth = recipe.depth.sampler(recipe.seed)
    task = TASKS[recipe.data.task](recipe, depth, accelerator, run)

    # Model: the same weights on every rank; after that each rank has its own dropout.
    set_seed(recipe.seed)
    looped = build_model(recipe, task.tokenizer)
    # A fresh object: the one derived from the model's config loses unknown fields such as num_loops on reload.
    looped.generation_config = GenerationConfig(
        num_loops=looped.config.num_loops,
        pad_token_id=task.tokenizer.pad_token_id,
        bos_token_id=task.tokenizer.bos_token_id,
        eos_token_id=task.tokenizer.eos_token_id,
        **task.generation,
    )
    gate_loops = recipe.gate_loops or looped.config.num_loops
    objective = (ExitLoss if looped.config.exit_gate else LabelLoss)(recipe, task.logits_to_keep)
    if recipe.distill.teacher is not None:
        objective = DistillationLoss(recipe, looped, accelerator)
    check_max_loops(looped.config, {"depth": int(depth.depths[-1]), "gate_loops": gate_loops}, recipe.eval_loops)
    # And the parameters of loops that a batch does not run; a KV gate has nothing to mix in the first.
    ddp.find_unused_parameters |= looped.config.loops_have_parameters or looped.config.kv_sharing == "gated"
    # And an exit gate's, which one loop does not ask; the gate's own stage gives nothing but the gate a gradient.
    ddp.find_unused_parameters |= looped.config.exit_gate
    set_seed(recipe.seed, device_specific=True)
    if recipe.gradient_checkpointing:
        looped.activation_checkpointing_enable()
    if recipe.compile:
        for module in looped.model.pieces():
            module.compile()
    model, *optimizers = accelerator.prepare(looped, *build_optimizers(looped, optim))

    # State: from the newest intact checkpoint, or the beginning.
    state = run.load_checkpoint(accelerator) or task.first_state()
    task.begin(state)
    run.begin(task.tokenizer, state)
    if state.finished and not over(recipe, state) and not task.is_through(state):
        # A larger budget: what the check at the end left undone, as there was no step to come, is done now.
        state.finished = False
        if state.step % curriculum.check_every == 0 and task.advance(state) and curriculum.restart_optimizer:
            for optimizer in optimizers:
                optimizer.state.clear()
    accelerator.project_configuration.logging_dir = run.folder
    accelerator.init_trackers("tracker", config={k: str(v) for k, v in flatten(asdict(recipe)).items()})
    progress_bar = tqdm(
        total=recipe.max_steps,
        initial=state.step,
        disable=not accelerator.is_main_process,
        unit="step",
        mininterval=1.0,
    )

    def write_row(row: dict):
        if accelerator.is_main_process:
            with run.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        accelerator.log(flatten({k: v for k, v in row.items() if k != "step"}), step=row["step"])

    # What another run reached is where this one begins.
    if recipe.init_from is not None and state.step == 0:
        write_row({"step": 0, "seconds": 0.0} | task.check(looped, state, gate_loops))
    model.train()
    began = time.perf_counter() - state.seconds
    while not state.finished:
        # One update. The schedule follows the steps, or the clock where only that limits the run.
        progress = state.step / recipe.max_steps if recipe.max_steps else state.seconds / recipe.max_seconds
        factor = lr_factor(optim, state.step - curriculum.restart_optimizer * state.stage_start, min(1.0, progress))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        objective.begin(min(1.0, progress))
        batch = task.batches[state.step]
        tensors = {name: value.to(accelerator.device) for name, value in batch.items() if torch.is_tensor(value)}
        # Molecules fill the rows of ranks and micro-batches unevenly: they say how many labels there are in all.
        num_labels = batch.get("num_labels", tensors["shift_labels"].numel() * world)
        chunks = [value.chunk(recipe.accumulation_steps) for value in tensors.values()]
        parts = [dict(zip(tensors, part, strict=True)) for part in zip(*chunks, strict=True)]
        loss = torch.zeros((), device=accelerator.device)
        for index, rows in enumerate(parts):
            # Ranks exchange gradients once per update.
            with nullcontext() if index == len(parts) - 1 else accelerator.no_sync(model):
                labels = rows.pop("shift_labels")  # (b, K)
                part = objective(model, rows, labels, batch["num_loops"])
                part = part * (world / num_labels)  # DDP averages over ranks
                accelerator.backward(part)
            loss += part.detach()
        # The clock is the main process's, so that all ranks stop at the same step.
        seconds = (time.perf_counter() - began) * accelerator.is_main_process
        loss, seconds = accelerator.reduce(torch.stack([loss / world, loss.new_tensor(seconds)])).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss} at step {state.step + 1}; that update was not made. Lower the learning rate or set "
                f"optim.clip under another --name. The checkpoints before it are in {run.checkpoints}."
            )
        if optim.clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), optim.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        state.step += 1
        state.tokens += batch.get("num_labels", tensors["input_ids"].numel() * world)
        state.seconds = seconds
        state.finished = over(recipe, state)
        progress_bar.update()

        if state.step % recipe.log_every == 0 or state.finished:
            write_row(
                {"step": state.step, "loss": loss, "lr": optim.lr * factor, "num_loops": batch["num_loops"]}
                | task.describe(batch, state)
                | {"seconds": seconds, "tokens": state.tokens}
            )
            progress_bar.set_postfix(loss=f"{loss:.3f}", **task.progress(state), refresh=False)

        if state.step % curriculum.check_every == 0 or state.finished:
            write_row({"step": state.step, "seconds": seconds} | task.check(looped, state, gate_loops))
            if task.advance(state) and curriculum.restart_optimizer:
                for optimizer in optimizers:
                    optimizer.state.clear()

        if state.step in recipe.snapshots and accelerator.is_main_process:
            run.save_folder(f"snapshots/step-{state.step:09d}", looped, task.tokenizer)
        if state.step % recipe.checkpoint_every == 0 or state.finished:
            run.save_checkpoint(accelerator, state)

    # The result: a model folder that loads anywhere, and what it took to make it.
    progress_bar.close()
    summary = {
        "name": recipe.name,
        "recipe": "recipe.yaml",
        "seed": recipe.seed,
        "steps": state.step,
        "seconds": state.seconds,
        "tokens": state.tokens,
        "parameters": looped.num_parameters(),
        **task.summary(looped, state, gate_loops),
        "gate_loops": gate_loops,
        "trained_loops": {"minimum": int(depth.depths[0]), "maximum": int(depth.depths[-1]), "mean": depth.expected},
        **provenance(accelerator),
    }
    if accelerator.is_main_process:
        run.save_folder("model", looped, task.tokenizer)
        run.write_summary(summary)
    accelerator.print(f"{run.folder}: {state.step} steps, {task.headline(summary)}")
    accelerator.end_training()
    return summary


if __name__ == "__main__":
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="fields: " + " ".join(f"--{name}" for name in field_names()),
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="YAML file of the fields below")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake, too")
    arguments, flags = parser.parse_known_args()
    rank = get_int_from_env(["LOCAL_RANK"], 0)
    sys.exit(run_command("train.py", lambda: main(read_recipe(arguments.recipe, flags)), arguments.debug, rank))
