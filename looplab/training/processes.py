"""How the processes of a training divide it: what the launcher asks for, and weights that are sharded among them.

    one process     python train.py                                      all weights, the whole batch
    data-parallel   recipes/accelerate/ddp.yaml                          all weights, a part of each batch
    sharded         recipes/accelerate/fsdp2.yaml                        a part of the weights, too (FSDP2)
    hybrid          the same, with accelerate's parallelism_config       as sharded, in several groups of processes

accelerate reads what its launcher put into the environment, and prepares the model.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ParallelismConfig,
    get_int_from_env,
    parse_flag_from_env,
)
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from modeling_looped import LoopedForCausalLM

from .recipe import Recipe

# Variable by which accelerate's launcher asks for an engine -> its name.
ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def make_accelerator(recipe: Recipe) -> Accelerator:
    """What the launcher asks for.

    Raises:
        ValueError: it asks for what is not trained here, or what these processes cannot do.
    """
    for variable, engine in ENGINES.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"the launcher asks for {engine}, and looped models are trained by DDP or FSDP2: take "
                "recipes/accelerate/ddp.yaml or fsdp2.yaml. Stages of a pipeline would wait for each other, because "
                "every loop comes back to the first of them."
            )
    if get_int_from_env(["TORCHELASTIC_MAX_RESTARTS"], 0) and parse_flag_from_env("TORCHELASTIC_USE_AGENT_STORE"):
        # Of one store for all tries, a second try reads the addresses of the first (pytorch issue 135712), and waits.
        raise ValueError(
            "torchrun --max-restarts would wait for ever at its first restart: put "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 into the environment of torchrun."
        )
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        asked = ParallelismConfig()
        for size in ("tp_size", "cp_size", "sp_size"):
            if vars(asked)[size] > 1:
                raise ValueError(
                    f"the launcher's parallelism_config asks for {size} {vars(asked)[size]}, and a training here "
                    "divides batches and weights, not layers or texts: set dp_replicate_size and dp_shard_size alone."
                )
    shards = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if shards:
        if get_int_from_env(["FSDP_VERSION"], 1) != 2:
            raise ValueError(
                "the launcher asks for the first version of FSDP: set fsdp_version to 2 in its config, as in "
                "recipes/accelerate/fsdp2.yaml."
            )
        # accelerate shards what it calls GPUs, and would leave CPU processes data-parallel without a word.
        processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        if processes.distributed_type == DistributedType.MULTI_CPU:
            processes.distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "bf16": "bf16"}[recipe.precision],
        log_with=recipe.trackers or None,
        project_dir=Path(recipe.output_dir) / recipe.name,
        kwargs_handlers=[DistributedDataParallelKwargs()],  # `fit` sets it when it knows the model
    )
    if shards and accelerator.num_processes > 1 and not accelerator.is_fsdp2:
        raise ValueError(f"accelerate does not shard on {accelerator.device.type}: take recipes/accelerate/ddp.yaml.")
    return accelerator


@contextmanager
def whole_weights(accelerator: Accelerator, model: LoopedForCausalLM) -> Iterator[None]:
    """Within the block every process has the whole weights, and may call the model as often as it likes.

    A sharded model gathers a layer when the layer is called: a process with one batch more than the others would wait
    for them for ever.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    frees = [unit for unit in units if unit is not model and accelerator.state.fsdp_plugin.reshard_after_forward]
    for unit in frees:
        unit.set_reshard_after_forward(False, recurse=False)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
        for unit in frees:
            unit.set_reshard_after_forward(True, recurse=False)


def weights_of_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> weights in the memory of the model, whole or this process's part of them; those that are tied once."""
    kept: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach() for name, tensor in kept.values()}


class ModelFiles:
    """The files of a model, whose weights may be sharded. No process holds more of them than its part and one file.

    Args:
        weights: by name, whole or sharded.
        max_shard_size: of a file of weights, such as "5GB".
    """

    def __init__(self, model: LoopedForCausalLM, weights: Mapping[str, torch.Tensor], max_shard_size: str):
        self.model, self.weights = model, weights
        sizes = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in weights.items()
        }
        self.plan = split_torch_state_dict_into_shards(
            sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )

    def whole(self, name: str) -> torch.Tensor:
        """One tensor; every process of a sharded model must ask for it."""
        tensor = self.weights[name]
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def help_to_save(self) -> None:
        """What the other processes do while one of them is in `save_pretrained`."""
        for names in self.plan.filename_to_tensors.values():
            for name in names:
                self.whole(name)

    def save_pretrained(self, folder: Path) -> None:
        """As that of the model."""
        # All but the weights, and of the model's own class: a sharded one has torch's.
        with torch.device("meta"), no_bar():
            plain = LoopedForCausalLM(self.model.config)
            plain.generation_config = self.model.generation_config
            plain.save_pretrained(folder, state_dict={})
        for file, names in self.plan.filename_to_tensors.items():
            tensors = {name: self.whole(name).cpu().contiguous() for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
        if self.plan.is_sharded:
            metadata = {"total_parameters": self.model.num_parameters(), **self.plan.metadata}
            index = {"metadata": metadata, "weight_map": self.plan.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


@contextmanager
def no_bar() -> Iterator[None]:
    """Within the block transformers shows no progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
