"""Training on the next token, at every token."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoTokenizer

from data_builders import DepthSampler, PackedMolecules, TextBatches, TextBlocks, dataset_byte_bpe, load_text
from looplab.runs.models import blaming
from looplab.tasks.training import State, load_tokenizer
from looplab.training.recipe import Recipe
from looplab.training.run_folder import RunFolder
from modeling_looped import LoopedForCausalLM
from modeling_looped.losses_looped import exit_distribution

# Held-out tokens that go through the model at once: their logits are this times the vocabulary.
CHECKED_TOKENS = 2048


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
