"""`push_to_hub` of a `transformers.Trainer`, with the card of this project in place of the Trainer's draft.

    from looplab.publish.trainer import LoopedTrainer as Trainer

    class Tuner(CardMixin, SFTTrainer): ...     # a Trainer of another library

The card has what the Trainer knows: the losses that it logged, its settings, the loops that a `LoopCollator` drew.
What nobody knows is left out. As in publishing.py, the commit gets a tag, which the lines on the card load.
"""

from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers import __version__ as transformers_version
from transformers.utils.hub import hf_api

from data_builders import LoopCollator
from looplab.runs.seeds import to_markdown
from looplab.runs.writing import write_whole
from looplab.tasks.card import Names, between, loops_shown

from .cards import TAGS, base_values, render
from .publishing import model_files, revision_of

FIGURE = "figures/training.png"


class CardMixin:
    """Before a Trainer among the bases of a class: its model card is that of `looped publish`.

    A model that is not a causal LM of this project, such as a PEFT adapter, keeps the card of the Trainer.
    """

    def create_model_card(
        self,
        model_name: str | None = None,
        *,
        license: str | None = None,
        language: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        finetuned_from: str | None = None,
    ) -> None:
        """Write README.md, and the picture it shows, to the output folder. Trainer calls it before it pushes.

        Args:
            model_name: the title; the name of the repository unless given.
            license, language, tags: for the Hub, as it spells them; licence and language are left out unless given.
            dataset: Hub ids of the data.
            finetuned_from: Hub id of the model that the weights come from; if it was loaded from the Hub, this is
                known.
        """
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        if not (isinstance(model, PreTrainedModel) and model.config.model_type == "looped" and model.can_generate()):
            super().create_model_card(model_name=model_name, tags=tags)
            return
        folder = Path(self.args.output_dir)
        names = Names(self.hub_model_id or self.args.hub_model_id or str(folder), license, revision=self.card_tag())
        datasets = [dataset] if isinstance(dataset, str) else dataset or []
        name = model.config._name_or_path
        start = finetuned_from or (name if name and not Path(name).exists() else None)
        data = ModelCardData(
            license=license,
            language=language,
            base_model=start,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=list(dict.fromkeys([*TAGS, *([tags] if isinstance(tags, str) else tags or [])])),
            datasets=datasets or None,
        )
        values = base_values(names, model.config.to_dict(), papers=()) | trainer_values(self, model)
        values |= {"finetuned_from": linked(start) if start else None}
        values |= {"data": ", ".join(linked(each, "datasets/") for each in datasets)}
        values |= {"figures": self.draw_training(folder)} | ({"name": model_name} if model_name else {})
        card = ModelCard(render("model_trainer.md", metadata=data.to_yaml(), **values))
        write_whole(folder / "README.md", str(card))

    def card_tag(self) -> str | None:
        """The tag of the model that is saved in the output folder; None if there is none yet."""
        folder = Path(self.args.output_dir)
        return revision_of(model_files(folder)) if (folder / "config.json").is_file() else None

    def draw_training(self, folder: Path) -> list[dict]:
        """Draw the losses, if matplotlib is installed (the extra `plots`); returns the figures of the card."""
        rows = self.state.log_history
        losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        if len(losses) < 2 or find_spec("matplotlib") is None:
            return []
        from matplotlib.figure import Figure

        from looplab.instruments.drawing import FRAME, save, tidy

        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*losses, strict=True), ".-", color="0.6", label="training")
        held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color=FRAME, linewidth=3, label="held out")
        axes.legend(frameon=False)
        tidy(axes, "loss", "updates")
        save(figure, folder / FIGURE)
        return [{"path": FIGURE, "caption": "Loss over the updates of the training"}]

    def push_to_hub(self, *args, token: str | None = None, **kwargs) -> CommitInfo | Future | None:
        """As `Trainer.push_to_hub`; then give the commit its tag, for which it waits also with blocking=False."""
        pushed = super().push_to_hub(*args, token=token, **kwargs)
        tag = self.card_tag() if self.is_world_process_zero() else None
        if tag:
            commit = pushed.result() if isinstance(pushed, Future) else pushed
            api, token = hf_api(), token or self.args.hub_token
            api.create_tag(self.hub_model_id, tag=tag, revision=commit.oid, token=token, exist_ok=True)
        return pushed


class LoopedTrainer(CardMixin, Trainer):
    """`transformers.Trainer`, with our card."""


def linked(repo_id: str, kind: str = "") -> str:
    return f"[{repo_id}](https://huggingface.co/{kind}{repo_id})"


def trainer_values(trainer: Trainer, model: PreTrainedModel) -> dict:
    """The values of `model_trainer.md` that the Trainer knows."""
    args, state, config = trainer.args, trainer.state, model.config
    loops, collator = config.num_loops, trainer.data_collator
    depths = [int(depth) for depth in collator.depth.depths] if isinstance(collator, LoopCollator) else []
    rows = [row for row in state.log_history if any(name.startswith("eval_") for name in row)]
    timed = ("_runtime", "_per_second")
    table = [{name: shown(value) for name, value in row.items() if not name.endswith(timed)} for row in rows]
    losses = [row["loss"] for row in state.log_history if "loss" in row]
    numbers = [(f"{model.num_parameters():,}", "parameters"), (str(loops), "loops, unless you ask for others")]
    if rows and "eval_loss" in rows[-1]:
        numbers.insert(0, (f"{rows[-1]['eval_loss']:.3f}", "loss on held-out data"))
    elif losses:
        numbers.insert(0, (f"{losses[-1]:.3f}", "loss on the last batches of the training"))
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    most = config.max_num_loops or 2 * loops
    tokenizer = trainer.processing_class
    return {
        "parameters": f"{model.num_parameters():,}",
        "layers": "layer" if config.num_core_layers == 1 else f"{config.num_core_layers} layers",
        "looped": loops > 1,
        "numbers": numbers,
        "loops_shown": loops_shown({1, loops, min(2 * loops, most)}),
        "loops_text": between(min(depths), max(depths)) if depths else None,
        "mean_loops": f"{collator.depth.expected:.1f}" if depths else None,
        "chat": tokenizer is not None and bool(tokenizer.chat_template),
        "prompt": None if tokenizer is None else prompt_for(tokenizer),
        "table": to_markdown(table) if table else "",
        "training": {
            "updates": f"{state.global_step:,} of {batch} rows",
            "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
            "seed": args.seed,
            "versions": f"torch {torch.__version__}, transformers {transformers_version}",
        },
        "limit": None,
    }


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def prompt_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """A word that the tokenizer knows: "The" of English text, or the first of its own words."""
    words = tokenizer.get_vocab()
    if any(word in words for word in ("The", "\u0120The", "\u2581The", "T")):
        return "The"
    ids = (number for number in sorted(words.values()) if number not in tokenizer.all_special_ids)
    return next(word for word in map(tokenizer.decode, ids) if word.isalnum())
