"""Where the text of a run comes from: an object for each kind, which `TextData.source` chooses.

    Rows      files, or a data set that is read as a whole, cut into documents and dealt to the splits
    Stream    a data set that is read on the way, while the model trains
    Shards    tokens that `looped tokenize` wrote, mapped into memory

Nothing here imports torch before it is needed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, final

from looplab.runs.digests import tokenizer_of
from looplab.runs.folder import Run
from looplab.tasks.data import COPY, read_copy
from looplab.tasks.language.data import LanguageData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data_builders import DepthSampler, StreamBatches, TextBatches, TextBlocks
    from looplab.tasks.training import TrainingRecipe

# Fields of `data` that only a stream has, and fields of `data.overrides` that a stream has, too.
STREAMED = ("shuffle_blocks", "parts", "workers", "prefetch", "held_out_documents")
OVERRIDES = ("column", "validation_split", "test_split")


class Source(ABC):
    """The text of `data`, a section of a recipe: a `TextData`."""

    def __init__(self, data: LanguageData):
        self.data = data

    def tokenizers(self, init_from: str | None) -> dict[str, str | int | None]:
        """Field of the recipe -> what it says of the tokenizer; exactly one of them must say something."""
        return {"init_from": init_from, "data.tokenizer": self.data.tokenizer, "data.vocab_size": self.data.vocab_size}

    def check(self) -> None:
        """Raise ValueError for fields that are of another kind of text."""
        for name in STREAMED:
            if vars(self.data)[name] != type(self.data).__dataclass_fields__[name].default:
                raise ValueError(
                    f"data.{name} is for a stream, a data.dataset with streaming: true: leave it out of this recipe."
                )

    @abstractmethod
    def load(self, **changed) -> Mapping:
        """The splits train, validation and test. changed: fields of the builder, if there is one."""

    @abstractmethod
    def find(self, run: Run, **changed) -> Mapping:
        """The splits of a run, wherever they are now, see `looplab/tasks/data.py`."""

    @abstractmethod
    def kept(self, splits: Mapping) -> Mapping:
        """The splits that a run keeps a copy of."""

    @abstractmethod
    def blocks(self, split, tokenizer: "PreTrainedTokenizerBase") -> "TextBlocks":
        """The blocks of a split, `sequence_length` tokens each. Raises ValueError for a text too short for one."""

    @abstractmethod
    def batches(
        self,
        train,
        tokenizer: "PreTrainedTokenizerBase",
        recipe: "TrainingRecipe",
        depth: "DepthSampler",
        rank: int,
        world: int,
    ) -> "TextBatches | StreamBatches":
        """The training batches of process `rank` of `world`."""

    def run_blocks(self, run: Run, tokenizer: "PreTrainedTokenizerBase") -> dict[str, "TextBlocks"]:
        """The blocks of a run that can be looked at when it is trained: `test`, which it has never seen, and `train`.

        Raises:
            ValueError: the text is not what the run was trained on, or too short for a block.
        """
        splits = self.data.splits_of(run)
        run.check_data(splits)
        return {split: self.blocks(splits[split], tokenizer) for split in ("train", "test")}

    def first_words(self, run: Run, number: int) -> str:
        """The first words of the split test of a run."""
        return " ".join(self.data.splits_of(run)["test"][0]["text"].split()[:number])


@final
class Rows(Source):
    """The builder `data_builders.text.Text` makes the splits."""

    def load(self, **changed) -> Mapping:
        return LanguageData.load(self.data, **changed)

    def find(self, run: Run, **changed) -> Mapping:
        return LanguageData.find(self.data, run, **changed)

    def kept(self, splits: Mapping) -> Mapping:
        return LanguageData.kept(self.data, splits)

    def blocks(self, split, tokenizer: "PreTrainedTokenizerBase") -> "TextBlocks":
        from data_builders import ChatBlocks, TextBlocks

        if not self.data.chats:
            return TextBlocks(split, tokenizer, self.data.sequence_length)
        return ChatBlocks(split, tokenizer, self.data.sequence_length, self.data.assistant_only_loss is not False)

    def batches(self, train, tokenizer, recipe, depth, rank, world) -> "TextBatches":
        return block_batches(self.blocks(train, tokenizer), tokenizer, recipe, depth, rank, world)

    def run_blocks(self, run: Run, tokenizer: "PreTrainedTokenizerBase") -> dict[str, "TextBlocks"]:
        splits = self.data.splits_of(run)
        trained_on = run.summary()["train_tokens"]
        blocks = {split: self.blocks(splits[split], tokenizer) for split in ("train", "test")}
        found = blocks["train"].num_tokens
        if found != trained_on:
            raise ValueError(
                f"the text of {run} has {found} training tokens now and had {trained_on} when it was trained, so "
                f"its test split may be known to the model{run.data_changes(splits)}: restore the files its recipe "
                "names, say by --data.files where they are now, or train again."
            )
        run.check_data(splits)
        return blocks


@final
class Stream(Source):
    """The training text is a `data_builders.streams.StreamedText`. What is held out is read before the first update;
    the run keeps a copy of it, and needs the stream no more when it is trained."""

    def tokenizers(self, init_from: str | None) -> dict[str, str | int | None]:
        if self.data.vocab_size is not None:
            raise ValueError(
                "data.vocab_size learns a tokenizer from the whole text, which a stream never has: name one in "
                "data.tokenizer or init_from."
            )
        return super().tokenizers(init_from)

    def check(self) -> None:
        if self.data.files is not None:
            raise ValueError("data.files and data.dataset both name the text: leave one of them out.")
        for name in self._overrides():
            if name not in OVERRIDES:
                raise ValueError(
                    f"data.overrides.{name} is not for a stream, whose documents are whole rows: leave it out; there "
                    f"are {', '.join(OVERRIDES)}."
                )
        for name, value in self._overrides().items():
            if not isinstance(value, str):
                raise ValueError(f"data.overrides.{name} must be a name, got {value!r}.")

    def load(self, **changed) -> Mapping:
        return self._splits()

    def find(self, run: Run, **changed) -> Mapping:
        began_in, copy = run.note().get("folder"), run.folder / COPY
        named = self if began_in is None else self.data.located(Path(began_in)).source
        return named._splits(read_copy(copy) if copy.is_dir() else None)

    def _splits(self, held_out: Mapping | None = None) -> Mapping:
        from data_builders.streams import load_streams

        data = self.data
        return load_streams(
            data.named_dataset, held_out_documents=data.held_out_documents, held_out=held_out, **self._overrides()
        )

    def _overrides(self) -> dict:
        return {name: value for name, value in self.data.overrides.items() if name != "dataset"}

    def kept(self, splits: Mapping) -> Mapping:
        return {name: rows for name, rows in splits.items() if name != "train"}

    def blocks(self, split, tokenizer: "PreTrainedTokenizerBase") -> "TextBlocks":
        from data_builders import TextBlocks

        return TextBlocks(split, tokenizer, self.data.sequence_length)

    def batches(self, train, tokenizer, recipe, depth, rank, world) -> "StreamBatches":
        from data_builders import StreamBatches

        data = self.data
        return StreamBatches(
            train, tokenizer, data.sequence_length, recipe.batch_size, recipe.seed, depth,
            rank=rank, world=world, parts=data.parts,
            buffer=data.shuffle_blocks, workers=data.workers, prefetch=data.prefetch,
        )  # fmt: skip

    def run_blocks(self, run: Run, tokenizer: "PreTrainedTokenizerBase") -> dict[str, "TextBlocks"]:
        """`train` are the rows of the split validation: those that were trained on are gone."""
        splits = self.data.splits_of(run)
        run.check_data(splits, only="test")
        named = {"train": "validation", "test": "test"}
        return {name: self.blocks(splits[split], tokenizer) for name, split in named.items()}


@final
class Shards(Source):
    """The splits are `data_builders.token_shards.TokenSplit`s."""

    def tokenizers(self, init_from: str | None) -> dict[str, str | int | None]:
        return {
            "data.tokenizer": self.data.tokenizer,
            "data.vocab_size": self.data.vocab_size,
            "data.tokens": self.data.tokens,
        }

    def check(self) -> None:
        super().check()
        if self.data.files is not None or self.data.named_dataset is not None:
            named = "files" if self.data.files is not None else "dataset"
            raise ValueError(f"data.{named} and data.tokens both name the text: leave one of them out.")
        for name in self.data.overrides:
            raise ValueError(
                f"data.overrides.{name} is not for data.tokens, which are as they were written: leave it out."
            )

    def load(self, **changed) -> Mapping:
        from data_builders.token_shards import load_tokens

        return load_tokens(Path(self.data.tokens))

    def find(self, run: Run, **changed) -> Mapping:
        began_in = run.note().get("folder")
        named = self if began_in is None else self.data.located(Path(began_in)).source
        return named.load() if Path(named.data.tokens).is_dir() else self.load()

    def kept(self, splits: Mapping) -> Mapping:
        return {}

    def blocks(self, split, tokenizer: "PreTrainedTokenizerBase") -> "TextBlocks":
        from data_builders.token_shards import TokenBlocks

        if split.tokenizer != tokenizer_of(tokenizer):
            raise ValueError(
                f"the tokens in {self.data.tokens} are of another tokenizer than the model: write them again "
                "by `looped tokenize` with the tokenizer of init_from."
            )
        return TokenBlocks(split, tokenizer, self.data.sequence_length)

    def batches(self, train, tokenizer, recipe, depth, rank, world) -> "TextBatches":
        return block_batches(self.blocks(train, tokenizer), tokenizer, recipe, depth, rank, world)

    def first_words(self, run: Run, number: int) -> str:
        from looplab.tasks.training import load_tokenizer

        tokens = self.data.splits_of(run)["test"].rows[0]["input_ids"][: 4 * number]
        text = load_tokenizer("data.tokens", f"{self.data.tokens}/tokenizer").decode(tokens)
        return " ".join(text.split()[:number])


def block_batches(
    blocks: "TextBlocks", tokenizer: "PreTrainedTokenizerBase", recipe: "TrainingRecipe", depth, rank: int, world: int
) -> "TextBatches":
    """Batches of blocks that are all there."""
    from data_builders import TextBatches

    length = recipe.data.sequence_length
    return TextBatches(blocks, tokenizer, length, recipe.batch_size, recipe.seed, depth, rank=rank, world=world)
