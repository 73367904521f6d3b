"""Distillation into a model that caches one entry per token, from the same model with an entry per loop (MELT).

    phase         keys and values                               loss
    interpolation alpha gated + (1 - alpha) per loop,           KD
                  alpha 0 -> 1 over the run
    alignment     gated                                         KD + beta mean (o_student - o_teacher)^2

    KD = mean over tokens and loops t of KL(p_teacher^t || p_student^t), each loop read through final norm and head;
    o  = what attention adds, after its output projection and before a sandwich norm: every core layer of every loop,
         mean over layers, loops, tokens and channels

The student starts from the teacher's weights. It runs chunk by chunk; the teacher runs whole sequences. The
interpolation mixes cached entries as well: loop t sees a past token as alpha times its gated entry plus 1 - alpha
times its entry of loop t. `train.py` runs both phases (`distill` in a recipe). Source: MELT (arXiv 2605.07721), whose
text was not available: the linear ramp, KD as the only loss of the first phase, what o is and its mean are our
choices. Legend: B batch rows, T tokens, C tokens of a chunk, S cached tokens, D hidden size, K heads, d head size, R
loops.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.cache_layers_looped import RewritingDynamicLayer
from modeling_looped.cache_looped import GatedKeys, OneEntrySharing
from modeling_looped.calls_looped import LoopStates


class InterpolatedLayer(RewritingDynamicLayer):
    """Both memories of one core layer: the gated entry of every token, and beside it an entry for every loop."""

    def __init__(self, sharing: "InterpolatedSharing"):
        super().__init__()
        self.sharing = sharing
        self.of_loops: list[DynamicLayer] = []

    def open_step(self) -> None:
        super().open_step()
        self.loop = 0

    def update(self, key_states, value_states, *args, **kwargs):
        """Keys and values (2B, K, C, d), the gated ones first -> the mixed entries of all tokens (B, K, S, d)."""
        if self.loop == len(self.of_loops):
            self.of_loops.append(DynamicLayer())
        (keys, own_keys), (values, own_values) = key_states.chunk(2), value_states.chunk(2)
        keys, values = super().update(keys, values)
        own_keys, own_values = self.of_loops[self.loop].update(own_keys, own_values)
        self.loop += 1
        alpha = self.sharing.alpha
        # Not lerp: it takes one precision only, and under autocast the two caches may differ.
        return alpha * keys + (1 - alpha) * own_keys, alpha * values + (1 - alpha) * own_values


class InterpolatedSharing(OneEntrySharing):
    """A share alpha of the gated entry and 1 - alpha of the loop's own: R + 1 entries per token, for training only."""

    rewrites = True

    def __init__(self, config: LoopedConfig, alpha: float):
        super().__init__(config)
        self.alpha = alpha

    def key_source(self) -> GatedKeys:
        return GatedKeys()

    def layer_like(self, layer) -> InterpolatedLayer:
        return InterpolatedLayer(self)


def both_inputs(gate: nn.Module, arguments: tuple, latent: torch.Tensor) -> torch.Tensor:
    """Hook behind a KV gate: one call computes keys and values of both memories, from (2B, T, D)."""
    return torch.cat([latent, arguments[0]])


def gated_half(gate: nn.Module, arguments: tuple) -> tuple:
    """Hook before a KV gate: keep the gated half of the latent, which `both_inputs` returned."""
    hidden_states, latent, loop = arguments
    return hidden_states, None if latent is None else latent[: len(hidden_states)], loop


@contextmanager
def interpolated(model: LoopedForCausalLM, alpha: float) -> Iterator[None]:
    """Within the block `model`, which has kv_sharing="gated", runs on the mixture of both memories.

    Call it with `use_cache=True`, one depth for all batch rows and without a padding mask. `alpha`, 0 .. 1, is the
    share of the gated memory: 0 is the model with an entry per loop, whatever the chunks.
    """
    base = model.model
    gated, base.sharing = base.sharing, InterpolatedSharing(model.config, alpha)
    handles = []
    for layer in base.core:
        handles.append(layer.kv_gate.register_forward_pre_hook(gated_half))
        handles.append(layer.kv_gate.register_forward_hook(both_inputs))
    try:
        yield
    finally:
        base.sharing = gated
        for handle in handles:
            handle.remove()


@contextmanager
def attention_outputs(model: LoopedForCausalLM) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Within the block: core layer -> its attention outputs (B, C, D), in the order of its calls."""
    outputs = {index: [] for index in range(len(model.model.core))}
    handles = [
        layer.self_attn.register_forward_hook(lambda module, _, output, index=index: outputs[index].append(output[0]))
        for index, layer in enumerate(model.model.core)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def by_loop(outputs: dict[int, list[torch.Tensor]], num_loops: int) -> torch.Tensor:
    """Join the chunks that `attention_outputs` saw, in the order of its calls -> (layers, R, B, T, D)."""
    return torch.stack(
        [
            torch.stack([torch.cat(calls[loop::num_loops], dim=1) for loop in range(num_loops)])
            for calls in outputs.values()
        ]
    )


class Distillation:
    """The loss of a student that learns the distributions of a teacher.

        loss = Distillation(student, teacher)(model, {"input_ids": ids}, num_loops)

    Args:
        student: a LoopedForCausalLM with kv_sharing="gated" and without a coda.
        teacher: a LoopedForCausalLM with kv_sharing="per_loop" and the same layers; it gets no gradient.
        alignment: beta, weight of the attention outputs' distance.
        all_loops: compare the distributions of every loop; if False, the distributions of the last loop alone.

    Raises:
        ValueError: models that cannot be compared loop by loop.
    """

    def __init__(
        self, student: LoopedForCausalLM, teacher: LoopedForCausalLM, alignment: float = 0.0, all_loops: bool = True
    ):
        check_pair(student.config, teacher.config)
        self.teacher = teacher.eval().requires_grad_(False)
        self.alignment, self.all_loops = alignment, all_loops
        self.student = student

    def __call__(self, model: nn.Module, inputs: dict, num_loops: int, **settings) -> torch.Tensor:
        """The loss, a scalar: nats per token, and the weighted distance of the attention outputs.

        Args:
            model: the student, or what wraps it (DistributedDataParallel).
            inputs: of its forward and the teacher's: input_ids (B, T).
            num_loops: R, of both.
            settings: more arguments of the student's forward.
        """
        states = LoopStates()
        with attention_outputs(self.student) if self.alignment else nullcontext({}) as outputs:
            # Nothing reads the logits; DDP learns from them which parameters get a gradient.
            model(**inputs, num_loops=num_loops, logits_to_keep=1, observe=states, **settings)
        taught, aligned = self.targets(inputs, num_loops)
        loops = range(num_loops) if self.all_loops else [num_loops - 1]
        pairs = [(states.visits[t][1], taught.visits[t][1]) for t in loops]
        loss = torch.stack([self.divergence(*pair) for pair in pairs]).mean()
        if aligned is not None:
            ours = by_loop(outputs, num_loops)
            loss = loss + self.alignment * (ours.float() - aligned.float()).square().mean()
        return loss

    @torch.no_grad()
    def targets(self, inputs: dict, num_loops: int) -> tuple[LoopStates, torch.Tensor | None]:
        """The teacher's states, and its attention outputs where they count."""
        states = LoopStates()
        with attention_outputs(self.teacher) as outputs:
            self.teacher.model(**inputs, num_loops=num_loops, observe=states, use_cache=False)
        return states, by_loop(outputs, num_loops) if self.alignment else None

    def divergence(self, state: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """Mean over tokens of KL(teacher || student) in nats, of states (B, T, D)."""
        student = self.student.readout(state).float().log_softmax(-1)
        teacher = self.teacher.readout(taught).float().log_softmax(-1)
        return (teacher.exp() * (teacher - student)).sum(-1).mean()


def check_pair(student: LoopedConfig, teacher: LoopedConfig) -> None:
    """ValueError unless each loop of the student can be compared with the same loop of the teacher."""
    if student.kv_sharing != "gated":
        raise ValueError(f"distill: the student has kv_sharing={student.kv_sharing!r}: set model.kv_sharing to gated.")
    if teacher.kv_sharing != "per_loop":
        raise ValueError(
            f"distill.teacher has kv_sharing={teacher.kv_sharing!r}: name a teacher with kv_sharing='per_loop'."
        )
    if student.num_coda_layers:
        raise ValueError(
            f"distill: every loop is read out, which num_coda_layers={student.num_coda_layers} after the last loop do "
            "not allow: use a model without a coda."
        )
    ours, theirs = student.to_dict(), teacher.to_dict()
    for name in ("vocab_size", "hidden_size", "num_prelude_layers", "num_core_layers", "num_coda_layers"):
        if ours[name] != theirs[name]:
            raise ValueError(f"distill: the student has {name}={ours[name]}, the teacher {theirs[name]}.")
