"""`looped demo RUN...`: the page with the loop slider, as the files of a Hugging Face Space, made from runs.

    app.py            a copy of hub_cards/space/app.py, which imports nothing of this project
    requirements.txt  hub_cards/space/requirements.txt, and the packages that the tasks need
    README.md         hub_cards/space/README.md, filled with settings, title and text
    demo.json         the models, and the graph, hops and loops they were trained on

A published Space has the same files with repo ids in place of folders: `space_files([run], ["user/name"])`.
"""

import json
import tempfile
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from huggingface_hub import SpaceCard, SpaceCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplab.runs.folder import AGAIN, Run
from looplab.runs.models import load_model, load_run_model
from looplab.runs.writing import write_whole
from looplab.shipped import shipped
from looplab.tasks.registry import task_for

from .cards import project_links

TEMPLATES = shipped("hub_cards") / "space"
GRADIO = "6.31.0"  # the version that the page is tested with, and that a Space installs


def space_files(runs: Sequence[Run], models: Sequence[str]) -> dict[str, str]:
    """Name -> text, for the files of the Space that shows `runs`.

    Args:
        runs: at most one run of each kind of task that the page can show.
        models: for each run, the repo id or folder that the page loads.

    Raises:
        ValueError: a run has not finished, the page cannot show its task, or there are two runs of a kind.
    """
    parts = demo_parts(runs, models)
    settings = {"title": "Move the loop slider", "project": project_line(), **parts}
    needed = [line for run in runs for line in task_for("demo", [run]).demo_requirements]
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
    text = " ".join(part["text"] for part in parts.values())
    readme = SpaceCard.from_template(card, template_path=str(TEMPLATES / "README.md"), title=card.title, text=text)
    requirements = (TEMPLATES / "requirements.txt").read_text(encoding="utf-8")
    return {
        "app.py": (TEMPLATES / "app.py").read_text(encoding="utf-8"),
        "requirements.txt": requirements + "".join(f"{line}\n" for line in needed),
        "README.md": str(readme),
        "demo.json": json.dumps(settings, indent=1) + "\n",
    }


def project_line() -> str:
    """The line at the foot of the page, in Markdown: the project, and the pages that its package links to."""
    links = "".join(f" [{name}]({url})" for name, url in project_links().items())
    return f"Made with **looped-transformers**: `looped demo`, described in `docs/guides/demo.md`.{links}"


def demo_parts(runs: Sequence[Run], models: Sequence[str]) -> dict[str, dict]:
    """Kind of task -> the section of demo.json about its run. Arguments and errors are those of `space_files`."""
    parts = {}
    for run, model in zip(runs, models, strict=True):
        task = task_for("demo", [run])
        if task.kind in parts:
            raise ValueError(f"{run} is a second run on {task.kind}: the page shows one.")
        config = json.loads((run.model_folder() / "config.json").read_text(encoding="utf-8"))
        low, high = (config["num_loops"],) * 2 if run.bare else run.trained_loops()
        part = {"model": model, "trained_loops": [low, high]}
        part["max_loops"] = min(2 * high, config.get("max_num_loops") or 2 * high)  # a gate per loop sets a limit
        parts[task.kind] = part | task.demo_part(run, config)
    return parts


def write_space(runs: Sequence[Run], folder: Path) -> Path:
    """Write the Space of `runs` to `folder`; it loads the models from the folders of the runs."""
    files = space_files(runs, [str(run.model_folder().resolve()) for run in runs])
    for name, text in files.items():
        write_whole(folder / name, text)
    return folder


def load_app(folder: Path) -> ModuleType:
    """The module app.py in `folder`.

    Raises:
        ImportError: gradio is not installed.
    """
    spec = spec_from_file_location("looped_space", folder / "app.py")
    app = module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


def load_here(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Replaces `load` of app.py, which would run the code in the folder of the model."""
    loaded, tokenizer = load_model(model, AGAIN)
    return loaded.cpu(), tokenizer


def demo(runs: Sequence[Run], port: int | None = None) -> None:
    """Serve the page of the runs on this machine until interrupted; prints its address.

    Args:
        port: the first free port from 7860 unless given.

    Raises:
        ValueError: as `space_files` and `load_app`.
        OSError: the port is taken.
    """
    for run in runs:
        task_for("demo", [run])
        load_run_model(run)  # raises if tensors are missing, which the page would not notice
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_space(runs, Path(temporary))
        app = load_app(folder)
        app.load = load_here
        app.make_page(folder).launch(server_port=port, css=app.CSS, theme=app.THEME)
