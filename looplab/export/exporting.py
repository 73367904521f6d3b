"""`looped export RUN --to gguf | mlx | transformers`: write a model for the engines where people run models."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from looplab.runs.models import check_loops, load_model
from looplab.runs.sources import find
from looplab.runs.writing import below, whole_folder
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.depth_looped import generation_count
from modeling_looped.generation_looped import CALIBRATED

from .stock import LLAMA, Target, check_count, family_of, rope_of, rotates_evenly, unroll

GGUF_OF = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Args:
        path: the file or folder.
        architecture: what it is for its engine.
        layers: of the file, one after the other.
        num_loops: how often these layers run by default, or how often the core was written.
        loops_there: whether the engine loops them, so that it can be told another number.
        remarks: what the engine does otherwise than `generate`, a sentence each.
    """

    path: Path
    architecture: str
    layers: int
    num_loops: int
    loops_there: bool
    remarks: tuple[str, ...]

    def told(self) -> str:
        """What was written and how its depth is set, a line each."""
        size = sum(file.stat().st_size for file in [self.path, *self.path.rglob("*")] if file.is_file())
        lines = [
            f"{self.path}: {self.architecture}, {self.layers} layer{'s' * (self.layers > 1)}, {size / 1e6:.1f} MB"
        ]
        if not self.loops_there:
            lines.append(f"the depth is fixed at {self.num_loops} loops, a layer for every layer call")
        elif self.path.is_dir():
            lines.append(
                f"{self.num_loops} loops by default; 16: mlx_lm.load('{self.path}', model_config={{'num_loops': 16}})"
            )
        else:
            lines.append(
                f"{self.num_loops} loops by default; 16: llama-server -m {self.path} --override-kv "
                "nanbeige.num_loops=int:16"
            )
        return "\n".join([*lines, *self.remarks])


def can_loop(config: LoopedConfig, target: Target) -> bool:
    """Whether `target` has an architecture that loops such layers itself."""
    if target == "transformers" or family_of(config, target) is not LLAMA:
        return False
    if config.num_prelude_layers + config.num_coda_layers:
        return False
    if target == "gguf":  # which has no place for the bias of the output projection
        return not (config.attention_bias or config.mlp_bias)
    # Beside other rope_parameters, transformers reads no tokenizer of an architecture that it does not know.
    return rotates_evenly(rope_of(config))


def export(
    model: LoopedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    target: Target,
    quantize: str | None = None,
    num_loops: int | None = None,
    name: str | None = None,
) -> Export:
    """Write a looped model for another engine.

    Args:
        path: a file (gguf) or folder that does not exist.
        target: "gguf" for llama.cpp, "mlx" for mlx-lm, "transformers" for whatever loads a stock model.
        quantize: what the weights become, "q8_0", "q4_0" or "f16"; unless given they stay as they are.
        num_loops: how often the core runs; what `generate` runs unless given. Where the engine loops, it is the number
            that it runs if it is not told another one.
        name: of the model, for people; that of `path` unless given.

    Raises:
        ValueError: the engine has not what a field of the configuration or the tokenizer asks for, `path` exists, or
            the engine cannot run so many layers.
        ImportError: a package is not installed.
    """
    config = model.config
    num_loops = generation_count(config, model.generation_config) if num_loops is None else num_loops
    check_count(config, num_loops)
    if path.exists():
        raise ValueError(f"{path} exists: name another one with --output, or delete it.")
    if target == "transformers" and quantize not in (None, "f16"):
        raise ValueError(f"--quantize {quantize} is of gguf and mlx: leave it out, or ask the engine to quantize.")
    loops_there = can_loop(config, target)
    stock = unroll(model, 1 if loops_there else num_loops, target)
    layers = stock.config.num_hidden_layers
    loops, said = None, [*remarks(model)]
    if loops_there:
        loops = {"num_loops": num_loops, "skip_loop_final_norm": not config.norm_between_loops}
    if target == "gguf":
        from .gguf_file import MOST_LAYERS, write_gguf
        from .gguf_tokenizer import read_vocabulary

        most = layers * num_loops if loops_there else layers
        if most > MOST_LAYERS:
            raise ValueError(
                f"--loops {num_loops} makes {most} layers, and llama.cpp ends the process beyond {MOST_LAYERS}: ask "
                "for fewer."
            )
        vocabulary = read_vocabulary(tokenizer, config.vocab_size, list_of(model.generation_config.eos_token_id))
        if vocabulary.after is not None:
            said.append(
                "llama-completion takes no tokenizer that ends a text with a token, as this one with "
                f"{vocabulary.tokens[vocabulary.after]!r}: use llama-server"
            )
        kind = quantize or GGUF_OF.get(model.dtype, "f32")
        write_gguf(path, stock, vocabulary, name or path.stem, kind, loops)
    else:
        from .mlx_folder import write_folder, write_mlx

        with whole_folder(path) as partial:
            if target == "mlx":
                write_mlx(partial, stock, tokenizer, quantize, loops)
            else:
                write_folder(partial, stock, tokenizer, torch.float16 if quantize == "f16" else None)
    return Export(
        path=path,
        architecture="nanbeige" if loops_there else stock.config.model_type,
        layers=layers,
        num_loops=num_loops,
        loops_there=loops_there,
        remarks=tuple(said),
    )


def list_of(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def remarks(model: LoopedForCausalLM) -> Iterator[str]:
    """What `generate` would do and no engine does."""
    if model.config.exit_gate:
        yield "its exit gate is left out: no engine halts by one"
    if any(vars(model.generation_config).get(name) is not None for name in ("halting", CALIBRATED)):
        yield "its halting rule is left out: every token runs all loops"
    if model.config.max_num_loops is not None:
        yield f"max_num_loops={model.config.max_num_loops} is not known there: ask for no more"


def export_saved(
    source: str, target: Target, quantize: str | None = None, num_loops: int | None = None, output: str | None = None
) -> Export:
    """Export the model called `source`, see `sources.py`: to RUN/export/, or of what is no run to this folder.

    The rest is as in `export`.
    """
    found = find(source)
    model, tokenizer = load_model(found.model_folder(), "take a whole model.", device="cpu")
    check_loops(model, found.model_folder(), num_loops)
    name = Path(source).name if found.kind == "Hub" else found.folder.resolve().name
    end = "" if quantize is None else f"-{quantize}"
    file = f"{name}{end}.gguf" if target == "gguf" else f"{name}-{target}{end}"
    place = below(found.folder, "export") if found.kind == "run" else Path.cwd()
    path = place / file if output is None else Path(output)
    return export(model, tokenizer, path, target, quantize, num_loops, name)
