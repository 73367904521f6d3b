"""Training on chains of relations."""

from collections import Counter

import torch
from accelerate import Accelerator

from data_builders import DepthSampler, HopBatches, dataset_tokenizer, encode_groups, load_task
from looplab.tasks.training import State, load_tokenizer
from looplab.training.recipe import Recipe
from looplab.training.run_folder import RunFolder
from modeling_looped import LoopedForCausalLM


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
