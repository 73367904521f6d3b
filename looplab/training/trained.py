"""What of a model a run trains: the section `train` of a recipe.

    full   every weight
    core   the layers of the core
    lora   adapters W + lora_alpha / r B A of matrices W (LoRA, arXiv 2106.09685; the library PEFT)

In each of them also what a dense model does not have: loop connection, loop embeddings, norm between loops, exit gate
and KV gates. All else keeps its value. A run saves whole models: adapters are added to the matrices.
"""

import re
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import nn

from modeling_looped import LoopedForCausalLM

from .processes import weights_of_model
from .recipe import Train

# Parameters of the loop itself, by their names.
OF_THE_LOOP = re.compile(r"model\.(connection|loop_embedding|core_norm|exit_gate)\.|.*\.kv_gate\.")


class Trained(ABC):
    """What is trained of a model, chosen by `train.what`."""

    def __init__(self, train: Train):
        self.train = train

    @abstractmethod
    def prepare(self, model: LoopedForCausalLM) -> None:
        """Let only what is trained have gradients.

        Raises:
            ValueError: the model has no such matrices.
        """

    def weights(self, model: LoopedForCausalLM) -> dict[str, torch.Tensor]:
        """Name -> weights of the model as one without adapters, whole or this process's part of them."""
        return weights_of_model(model)


@final
class Full(Trained):
    """Every weight."""

    def prepare(self, model: LoopedForCausalLM) -> None:
        pass


@final
class Core(Trained):
    """The layers of the core, and the loop's own."""

    def prepare(self, model: LoopedForCausalLM) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("model.core.") or OF_THE_LOOP.match(name) is not None)


@final
class Lora(Trained):
    """Adapters, and the loop's own."""

    def prepare(self, model: LoopedForCausalLM) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        sections = "core" if self.train.layers == "core" else "prelude|core|coda"
        config = LoraConfig(
            r=self.train.r,
            lora_alpha=self.train.lora_alpha,
            lora_dropout=self.train.lora_dropout,
            target_modules=rf"model\.({sections})\.\d+\..*\.({'|'.join(self.targets(model))})",
        )
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if OF_THE_LOOP.match(name):
                parameter.requires_grad_()

    def targets(self, model: LoopedForCausalLM) -> list[str]:
        """Names of the matrices that get adapters."""
        known = {
            name.rpartition(".")[2]
            for name, module in model.model.core.named_modules()
            if isinstance(module, nn.Linear) and ".kv_gate." not in name
        }
        asked = known if self.train.target_modules is None else self.train.target_modules
        for name in asked:
            if name not in known:
                raise ValueError(
                    f"train.target_modules names {name!r}, and the matrices of a layer are {', '.join(sorted(known))}."
                )
        return sorted(asked)

    @torch.no_grad()
    def weights(self, model: LoopedForCausalLM) -> dict[str, torch.Tensor]:
        """As of a model whose adapters are added to its matrices; the model in training keeps both apart."""
        from peft.tuners.lora import LoraLayer

        adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        weights = {}
        for name, tensor in weights_of_model(model).items():
            if ".lora_" in name:
                continue
            module, base, parameter = name.rpartition(".base_layer.")
            if base and parameter == "weight":
                tensor = tensor + adapters[module].get_delta_weight("default").to(tensor.dtype)
            weights[f"{module}.{parameter}" if base else name] = tensor
        return weights


TRAINED: dict[str, type[Trained]] = {"full": Full, "core": Core, "lora": Lora}
