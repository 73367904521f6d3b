"""The task molecules, see `tasks.base.Task`."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from looplab.mistakes import Whole
from looplab.runs.folder import Run
from looplab.tasks.base import Argument, Drafting, Figure, Task
from looplab.tasks.language.options import ASKING, ASKING_DEFAULTS

from .data import MoleculeData
from .records import EVALUATION, HALTING, RECORDS
from .sizes import SAMPLINGS, Sizes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class MoleculeTask(Task):
    """Molecules as SMILES. --limit and --masked of `looped` are numbers of samples.

    Args:
        sizes: of the measurements.
    """

    name = kind = "molecules"
    Data = MoleculeData
    records = RECORDS
    figures: ClassVar = {
        "validity": Figure("Validity, and loss on test molecules, by loops"),
        "exits": Figure("Validity against mean loops of a token: halting rules, and fixed loop counts"),
        "faults": Figure("What is wrong with the molecules, by loops"),
        "molecules": Figure("Some valid molecules that the model wrote"),
        "ablations": Figure("Validity without one attention head, by loop and head"),
        "readouts": Figure("Validity if every loop is read by a head of its own, or by the head of the last loop"),
        "training": Figure("Training: loss and held-out measure over time"),
        "dynamics": Figure("How the state moves from loop to loop", "dynamics"),
    }
    files = ("samples/model.json", "samples/*-loops*.jsonl")
    arguments: ClassVar = {
        ("eval", "masked"): Argument("also N samples whose every prefix can become a molecule", "N", Whole()),
        **ASKING,
    }
    defaults: ClassVar = {
        "eval --limit": "10,000 samples",
        "halting --limit": "1,000 samples",
        "eval --loops": "1 to twice the model's own",
        "halting --max-loops": "the model's own loops",
        "lens --limit": "300 molecules",
        **ASKING_DEFAULTS,
    }
    demo_requirements = ("rdkit>=2026.3",)
    drafting = Drafting(texts=16, prompt=5, drawn=SAMPLINGS[0].arguments(), ends=True)

    def __init__(self, sizes: Sizes | None = None):
        self.sizes = sizes or Sizes()

    def training(self, recipe, splits, depth, accelerator, kept_tokenizer):
        from .training import MoleculeTraining

        return MoleculeTraining(recipe, splits, depth, accelerator, kept_tokenizer)

    def evaluate(
        self,
        run: Run,
        *,
        loops: Sequence[int] | None = None,
        limit: int | None = None,
        masked: int | None = None,
    ) -> Path:
        """Write the files of `evaluation.evaluate_run`."""
        from .evaluation import evaluate_run

        return evaluate_run(run, loops, limit, masked, sizes=self.sizes)

    def show(self, run: Run) -> str:
        from .exits import sampled_text
        from .results import samples_text

        halting = run.read(EVALUATION).get("halting")
        return samples_text(run) if halting is None else f"{samples_text(run)}\n{sampled_text(halting)}"

    def table(self, runs: Sequence[Run], *, against: str | None = None) -> str:
        from .results import markdown_table

        return markdown_table(runs, against)

    def plot(self, runs: Sequence[Run], output: str | Path | None, *, format: str = "png") -> list[Path]:
        from .figures import plot_runs

        return plot_runs(runs, output, format)

    def halting(self, run: Run, *, limit: int | None = None, max_loops: int | None = None) -> tuple[Path, str]:
        """Write RUN/halting.jsonl by `exits.halting_run`."""
        from .exits import halting_run, halting_text

        return halting_run(run, max_loops, limit, sizes=self.sizes), halting_text(run.read(HALTING))

    def best_rule(self, run: Run) -> tuple[Mapping | None, str]:
        from looplab.tasks.language.exits import best_rule

        return best_rule(run.read(HALTING))

    def lens(
        self, run: Run, *, loops: int | None = None, limit: int | None = None, no_probes: bool = False
    ) -> list[Path]:
        """Write what `probes`, `ablations` and `readouts` measure."""
        from .ablations import ablate_run
        from .probes import probe_run
        from .readouts import read_run

        limit = 300 if limit is None else limit
        paths = [] if no_probes else [probe_run(run, loops, limit)]
        return [*paths, ablate_run(run, loops, limit, self.sizes), read_run(run, loops, limit, self.sizes)]

    def ask(
        self,
        run: Run,
        question: str | None,
        *,
        loops: Sequence[int] | None = None,
        new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> None:
        """Print what `language.ask` writes after the beginning of a SMILES, which may be empty, and whether it is a
        molecule."""
        from looplab.runs.models import load_run_model
        from looplab.tasks.language.ask import ask

        from .smiles import canonical_or_none

        model, tokenizer = load_run_model(run, *(loops or ()))
        start = question or ""

        def verdict(written: str) -> str:
            return "a molecule" if canonical_or_none(start + written) else "no molecule"

        checked = verdict if find_spec("rdkit") else None
        ask(model, tokenizer, start, loops, new_tokens, temperature, seed, checked)

    def quantizing(self, run: Run, tokenizer: "PreTrainedTokenizerBase"):
        from .quantizing import MoleculeQuantizing

        return MoleculeQuantizing(run, tokenizer)

    def sorts(self, run: Run, tokenizer: "PreTrainedTokenizerBase", limit: int):
        """Test molecules, in batches of one length."""
        from data_builders import PackedMolecules

        from .held_out import run_molecules
        from .quantizing import one_length

        test = run_molecules(run)["test"]
        test = test.select(range(min(limit, len(test))))
        molecules = PackedMolecules(test, tokenizer, MoleculeData.of(run).sequence_length)
        return {"molecules": [ids for ids, _ in one_length(molecules, range(len(test)), tokenizer.bos_token_id)]}

    def prompts(self, run: Run, tokenizer: "PreTrainedTokenizerBase", count: int, length: int) -> "torch.Tensor":
        """`<bos>` and the first tokens of test molecules."""
        import torch

        from data_builders import PackedMolecules
        from data_builders.text_batches import spread_blocks

        from .held_out import run_molecules

        test = PackedMolecules(run_molecules(run)["test"], tokenizer, MoleculeData.of(run).sequence_length)
        numbers = spread_blocks(len(test), count).tolist()
        return torch.tensor([[tokenizer.bos_token_id, *test.tokens(n)[: length - 1].tolist()] for n in numbers])

    def card(self):
        from .card import MoleculeCard

        return MoleculeCard()

    def data_licence(self, config: str, licence: str) -> str | None:
        """The licence of MOSES; only the user knows the licence of other files."""
        return {"moses": "mit"}.get(config)

    def demo_part(self, run: Run, config: dict) -> dict:
        from .card import molecules_part

        return molecules_part(run, config)
