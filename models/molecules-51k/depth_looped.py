"""Which loop count a call runs: one law for everything that runs a model.

    the call's argument
      > `num_loops` of the generation config given to the call
      > `num_loops` of the model's generation config, where it was set in memory
      > `num_loops` of the configuration, where it was given to `from_pretrained` or set in memory
      > `num_loops` of the saved generation config
      > `num_loops` of the saved configuration

`forward` has no generation config: it takes its argument, or else the configuration in memory. What was read from a
file is a `SavedCount`, so that a copy of a generation config, which a pipeline makes, still tells a saved count from
one that somebody set.
"""

import os
from typing import Self

import torch
from transformers import GenerationConfig, PreTrainedConfig


class SavedCount(int):
    """A loop count that was read from a file: any that is set in memory goes before it."""


class SavedDepth:
    """Base of configurations with `num_loops`, before PreTrainedConfig: it marks counts that were read from files."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> Self:
        """Load a configuration from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path: the folder, or a Hub name.
            *args, **kwargs: as in `PreTrainedConfig.from_pretrained`; keywords that are fields go before the file.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # pyright: ignore
        return mark_saved(loaded, kwargs)  # pyright: ignore[reportReturnType]

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As `PreTrainedConfig.from_dict`; keywords that are fields go before the dict."""
        from_file = "name_or_path" in kwargs  # AutoConfig reads the file itself, and adds this
        loaded = super().from_dict(config_dict, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return mark_saved(loaded, kwargs) if from_file else loaded

    def to_dict(self) -> dict:
        """All fields, with plain values: whoever writes the dict may not know a `SavedCount`."""
        output = super().to_dict()  # pyright: ignore[reportAttributeAccessIssue]
        return output | {"num_loops": int(output["num_loops"])}


def mark_saved(loaded, asked: dict):
    """`loaded`, which was read from a file under the keywords `asked`: a configuration, or (configuration, rest)."""
    config = loaded[0] if isinstance(loaded, tuple) else loaded
    if not {"num_loops", "num_hidden_layers"} & set(asked):
        config.num_loops = SavedCount(config.num_loops)
    return loaded


def mark_saved_settings(generation_config: GenerationConfig) -> None:
    """Note that the count of a generation config, if it has one, was read from a file."""
    count = stored_count(generation_config)
    if type(count) is int:  # anything else is refused when it is used
        generation_config.num_loops = SavedCount(count)


def stored_count(generation_config: GenerationConfig) -> int | None:
    """Its `num_loops`, or None."""
    return vars(generation_config).get("num_loops")


def asked_count(*generation_configs: GenerationConfig | None) -> int | None:
    """The first count that somebody set in one of these, or None."""
    stored = [stored_count(config) for config in generation_configs if config is not None]
    return next((count for count in stored if count is not None and not isinstance(count, SavedCount)), None)


def generation_count(config: PreTrainedConfig, *generation_configs: GenerationConfig | None) -> int:
    """The loops of `generate` where the call has no argument.

    Args:
        config: the configuration of the model, or of the loop of a frozen one.
        generation_configs: the call's, if it has one, and the model's.
    """
    asked = asked_count(*generation_configs)
    if asked is not None:
        return asked
    if not isinstance(config.num_loops, SavedCount):
        return config.num_loops
    stored = [stored_count(each) for each in generation_configs if each is not None]
    return next((count for count in stored if count is not None), config.num_loops)


def count_to_save(config: PreTrainedConfig, generation_config: GenerationConfig) -> int | None:
    """The `num_loops` of a generation config that is saved: what `generate` runs, where it says a count at all."""
    return None if stored_count(generation_config) is None else generation_count(config, generation_config)


def too_many_loops(num_loops: int, max_num_loops: int) -> str:
    """What a refusal says of a loop count above `max_num_loops`."""
    return (
        f"num_loops={num_loops} must be in 1 .. max_num_loops={max_num_loops}: loops beyond have no gates or "
        "embedding of their own. Ask for fewer loops, or train with hyper_gates='shared' and "
        "loop_embedding='sinusoidal', which run at any count."
    )


def check_loops_of_rows(num_loops, batch_size: int) -> int | torch.Tensor:
    """An int >= 1, or a (B,) LongTensor of such; ValueError for anything else."""
    if isinstance(num_loops, torch.Tensor):
        if num_loops.dtype != torch.long or num_loops.shape != (batch_size,):
            raise ValueError(
                f"num_loops as a tensor must be a LongTensor of shape ({batch_size},), one depth per row, got "
                f"{num_loops.dtype} of shape {tuple(num_loops.shape)}."
            )
        if batch_size and int(num_loops.min()) < 1:
            raise ValueError(f"num_loops must be >= 1 in every row, got {num_loops.tolist()}.")
        return num_loops
    if isinstance(num_loops, bool) or not isinstance(num_loops, int) or num_loops < 1:
        raise ValueError(f"num_loops must be an int >= 1 or a LongTensor with one depth per row, got {num_loops!r}.")
    return num_loops
