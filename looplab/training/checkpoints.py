"""What a checkpoint holds, and how any number of processes writes and reads it.

    tensors/            weights and moments by name, written by torch.distributed.checkpoint: each process its part
    process-00001.pt    what process 1 alone knows: `parts`, by name
    state.json          last: the state, and the digest of every file

Another number of processes reads the same folder: torch deals the tensors anew, and a part gets what all processes
wrote. A new thing to keep is a new entry of `parts`.
"""

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from looplab.runs.digests import sha256_of
from looplab.tasks.training import Part

from .processes import weights_of_model

TENSORS = "tensors"  # folder in a checkpoint
WEIGHTS, MOMENTS = "model.", "optimizer."  # beginnings of the names in it


class RandomStates:
    """The random number generators of this process; where the number of processes has changed they begin anew.

    Args:
        seed: of this process, then.
    """

    def __init__(self, accelerator: Accelerator, seed: int):
        self.accelerator, self.seed = accelerator, seed

    def state_dict(self) -> dict:
        version, keys, gauss = random.getstate()
        name, numbers, *rest = np.random.get_state()  # noqa: NPY002 (what libraries draw from)
        state = {"python": [version, list(keys), gauss], "numpy": [name, numbers.tolist(), *rest]}
        state["torch"] = torch.get_rng_state()
        if self.accelerator.device.type != "cpu":
            state["device"] = torch.get_device_module(self.accelerator.device).get_rng_state()
        return state

    def load_state_dicts(self, states: Sequence[dict]) -> None:
        if len(states) != self.accelerator.num_processes:
            set_seed(self.seed)
            return
        state = states[self.accelerator.process_index]
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))
        name, numbers, *rest = state["numpy"]
        np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if "device" in state and self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).set_rng_state(state["device"])


class TrainingState:
    """Model, optimizers and parts of a training, as they are written to a checkpoint and read from one.

    Several processes write in the background (`torch.distributed.checkpoint.async_save`), from a copy in the memory of
    the host, while the training goes on.

    Args:
        model: in training; its weights may be sharded.
        optimizers: of the model, as accelerate prepared them.
        parts: name -> what each process keeps beside tensors.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        parts: Mapping[str, Part],
    ):
        self.accelerator, self.model, self.optimizers, self.parts = accelerator, model, optimizers, parts
        # A group of its own: what the background sends does not mix with what the training sends.
        self.group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def weights(self) -> dict[str, torch.Tensor]:
        return {f"{WEIGHTS}{name}": tensor for name, tensor in weights_of_model(self.model).items()}

    def moments(self) -> dict[str, torch.Tensor]:
        """Name -> what the optimizers keep of a parameter. Their rates are the recipe's, see `set_rates`."""
        names = names_of(self.model)
        return {
            f"{MOMENTS}{names[parameter]}.{key}": tensor
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, tensor in state.items()
        }

    def write(self, folder: Path) -> "Future[dict[str, str]]":
        """Begin to write to `folder`, which is there. The result, once all is written: digests of the files in it,
        on the main process."""
        own = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(own, folder / f"process-{self.accelerator.process_index:05d}.pt")
        tensors, alone = self.weights() | self.moments(), self.group is None
        # In the background there is time to wait for the disk.
        writer = dcp.FileSystemWriter(folder / TENSORS, sync_files=not alone)
        if alone:
            with undisturbed():
                dcp.save(tensors, storage_writer=writer, no_dist=True)
            return completed(digests_of(folder))
        # It is done on one process when it is done on all.
        written = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        if not self.accelerator.is_main_process:
            return written
        executor = ThreadPoolExecutor(1)
        return executor.submit(lambda: (written.result(), digests_of(folder))[1])

    def read(self, folder: Path) -> None:
        """Go on from a checkpoint whose files are whole.

        Raises:
            ValueError: it is of another model.
        """
        if not (folder / TENSORS).is_dir():  # written by an older version
            self.accelerator.load_state(folder)
            return
        reader = dcp.FileSystemReader(folder / TENSORS)
        known = reader.read_metadata().state_dict_metadata
        weights = self.weights()
        for name in sorted({name for name in known if name.startswith(WEIGHTS)} ^ weights.keys()):
            raise ValueError(f"it {'lacks' if name in weights else 'has'} {name.removeprefix(WEIGHTS)}")
        for name, tensor in weights.items():
            if known[name].size != tensor.shape:
                raise ValueError(
                    f"its {name.removeprefix(WEIGHTS)} is {tuple(known[name].size)}, here it is {tuple(tensor.shape)}"
                )
        states = [self.empty_states(optimizer, known) for optimizer in self.optimizers]
        moments = {name: value for each in states for state in each.values() for name, value in state.items()}
        with undisturbed():
            dcp.load(weights | moments, storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        for optimizer, each in zip(self.optimizers, states, strict=True):
            filled = {
                index: {name.rpartition(".")[2]: moments[name] for name in state} for index, state in each.items()
            }
            optimizer.load_state_dict({"state": filled, "param_groups": optimizer.state_dict()["param_groups"]})
        wrote = [torch.load(path, weights_only=True) for path in sorted(folder.glob("process-*.pt"))]
        for name, part in self.parts.items():
            part.load_state_dicts([own[name] for own in wrote])

    def empty_states(self, optimizer: torch.optim.Optimizer, known: Mapping) -> dict[int, dict[str, torch.Tensor]]:
        """Place of a parameter in the optimizer -> name -> room for what a checkpoint has of it.

        Moments that are as large as the parameter are divided as it is.
        """
        names = names_of(self.model)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        places = {names[parameter]: index for index, parameter in enumerate(parameters)}
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, kept in known.items():
            index = places.get(name.removeprefix(MOMENTS).rpartition(".")[0]) if name.startswith(MOMENTS) else None
            if index is not None:
                alike, dtype = parameters[index].detach(), kept.properties.dtype
                whole = kept.size == alike.shape
                room = torch.zeros_like(alike, dtype=dtype) if whole else torch.zeros(kept.size, dtype=dtype)
                states.setdefault(index, {})[name] = room
        return states


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """Parameter -> its name."""
    return {parameter: name for name, parameter in model.named_parameters()}


def completed(result: dict[str, str]) -> "Future[dict[str, str]]":
    """A future that has its result."""
    future: Future[dict[str, str]] = Future()
    future.set_result(result)
    return future


def digests_of(folder: Path) -> dict[str, str]:
    """Path in `folder` -> SHA-256, of all files."""
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within the block, torch does not warn that one process is all there is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
