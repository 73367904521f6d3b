"""The page with the loop slider: a folder that is a whole Hugging Face Space, from runs; `looped demo RUN` runs it.

    hub_cards/space/app.py            as it is: it imports nothing of this project
    hub_cards/space/requirements.txt  as it is, and rdkit where there are molecules to draw
    hub_cards/space/README.md         filled: Space settings, title, text
    demo.json                         which models; the graph, hops and loops they were trained on

A published Space is the same files with repo ids in place of folders: `space_files([run], ["user/name"])`.
"""

import json
import tempfile
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from huggingface_hub import SpaceCard, SpaceCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hub_cards
from looplab.runs.folder import AGAIN, Run, open_run
from looplab.runs.models import load_model, load_run_model
from looplab.runs.writing import write_whole
from looplab.tasks.hops.card import hops_part
from looplab.tasks.hops.task import HopReader
from looplab.tasks.molecules.card import molecules_part
from looplab.tasks.registry import READERS

TEMPLATES = Path(hub_cards.__file__).parent / "space"
GRADIO = "6.31.0"  # what a Space installs: the version the page is tested with


def space_files(runs: Sequence[Run], models: Sequence[str]) -> dict[str, str]:
    """Name -> text of every file of the Space that shows `runs`.

    Args:
        runs: a run on hops, one on molecules, or both.
        models: of each run, the repo id or folder that the page loads.

    Raises:
        ValueError: a run has not finished, is on another task, or there are two of a kind.
    """
    settings = demo_settings(runs, models)
    card = SpaceCardData(
        title=settings["title"],
        emoji="\N{CLOCKWISE RIGHTWARDS AND LEFTWARDS OPEN CIRCLE ARROWS}",
        colorFrom="indigo",
        colorTo="blue",
        sdk="gradio",
        sdk_version=GRADIO,
        app_file="app.py",
        license="apache-2.0",
        models=[model for model in models if not Path(model).is_absolute()] or None,
        tags=["looped-transformers"],
    )
    text = " ".join(settings[part]["text"] for part in PARTS if part in settings)
    readme = SpaceCard.from_template(card, template_path=str(TEMPLATES / "README.md"), title=card.title, text=text)
    requirements = (TEMPLATES / "requirements.txt").read_text(encoding="utf-8")
    return {
        "app.py": (TEMPLATES / "app.py").read_text(encoding="utf-8"),
        "requirements.txt": requirements + ("rdkit>=2026.3\n" if "molecules" in settings else ""),
        "README.md": str(readme),
        "demo.json": json.dumps(settings, indent=1) + "\n",
    }


def demo_settings(runs: Sequence[Run], models: Sequence[str]) -> dict:
    """What demo.json says of `runs`; arguments and errors as of `space_files`."""
    parts = {}
    for run, model in zip(runs, models, strict=True):
        kind = "hops" if isinstance(READERS.get(run.task()), HopReader) else run.task()
        if kind not in PARTS:
            raise ValueError(f"{run.folder} is a run on {run.task()}: the page shows hops and molecules.")
        if kind in parts:
            raise ValueError(f"{run.folder} is a second run on {kind}: the page shows one.")
        low, high = run.trained_loops()
        config = json.loads((run.model_folder() / "config.json").read_text(encoding="utf-8"))
        part = {"model": model, "trained_loops": [low, high]}
        part["max_loops"] = min(2 * high, config.get("max_num_loops") or 2 * high)  # a gate per loop sets a limit
        parts[kind] = part | PARTS[kind](run, config)
    return {"title": "Move the loop slider", **parts}


PARTS = {"hops": hops_part, "molecules": molecules_part}


def write_space(runs: Sequence[Run], folder: Path) -> Path:
    """Write the Space of `runs` to `folder`, to load their models from where they are."""
    files = space_files(runs, [str(run.model_folder().resolve()) for run in runs])
    for name, text in files.items():
        write_whole(folder / name, text)
    return folder


def load_app(folder: Path) -> ModuleType:
    """The app.py in `folder`.

    Raises:
        ImportError: gradio is not installed.
    """
    spec = spec_from_file_location("looped_space", folder / "app.py")
    app = module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


def load_here(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """In place of the page's own `load`, which runs the code in a model's folder."""
    loaded, tokenizer = load_model(model, AGAIN)
    return loaded.cpu(), tokenizer


def demo(folders: Sequence[str | Path], port: int | None = None) -> None:
    """Serve the page of the runs in `folders` on this machine until interrupted; prints its address.

    Args:
        port: gradio's first free one from 7860 unless given.

    Raises:
        ValueError: as `space_files` and `load_app`.
        OSError: the port is taken.
    """
    runs = [open_run(folder) for folder in folders]
    for run in runs:
        load_run_model(run)  # the page would load one that is not whole
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_space(runs, Path(temporary))
        app = load_app(folder)
        app.load = load_here
        app.make_page(folder).launch(server_port=port, css=app.CSS, theme=app.THEME)
