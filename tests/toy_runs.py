"""A folder with what commands are tried on: a finished run of every kind of task, a dense model, a recipe of a study.

hops, text, molecules   runs of two steps; hops and text are evaluated
llama                   a dense model with its tokenizer
study.yaml              a recipe for `looped frozen`, of that model
"""

import json
from pathlib import Path

import yaml
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

import train
from data_builders.tokenizers import hop_tokenizer
from looplab.cli import main
from toys import SIZES, write_pages

ROOT = Path(__file__).parents[1]
SHORT = ["--max_steps=2", "--curriculum.check_every=2", "--checkpoint_every=2", "--optim.warmup_steps=0"]


def make_toy_runs(folder: Path) -> None:
    """Write all of it; the caller has given `datasets` a cache."""
    pages = write_pages(folder / "pages")
    tasks = {
        "hops": ("smoke.yaml", ["--snapshots=[1]"]),
        "text": (
            "smoke_text.yaml",
            [
                f"--data.files={pages}",
                "--data.vocab_size=280",
                "--data.overrides={document_characters: 500, validation_share: 0.1, test_share: 0.1}",
                "--model.loop_embedding=learned",
                "--model.max_num_loops=4",
            ],
        ),
        "molecules": (
            "molecules/smoke_molecules.yaml",
            [f"--data.files=[{ROOT}/docs/molecules/toys.smi]"],
        ),
    }
    for name, (recipe, flags) in tasks.items():
        flags = [f"--name={name}", f"--output_dir={folder}", *SHORT, *flags]
        train.main(train.read_recipe(ROOT / "recipes" / recipe, flags))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["eval", str(folder / "hops"), "--loops", "1", "2", "--max-loops", "3"]) == 0
    assert main(["eval", str(folder / "text"), "--loops", "1", "2"]) == 0
    write_llama(folder / "llama")
    study = {"name": "study", "model": str(folder / "llama"), "output_dir": str(folder / "studies")}
    study |= {"sweep": {"arc_easy": 4}, "confirm": {"arc_easy": 4}, "grid": [{"num_loops": 2}]}
    study |= {"cost": {"loops": [2], "prompt": 4, "new_tokens": 2, "rounds": 1}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))


def write_llama(folder: Path) -> None:
    """A dense Llama of six layers and a tokenizer."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_core_layers", "num_loops")}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=6)).save_pretrained(folder)
    hop_tokenizer(num_entities=20, num_relations=4).save_pretrained(folder)


def edit_json(path: Path, **fields) -> None:
    """Put fields over those of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
