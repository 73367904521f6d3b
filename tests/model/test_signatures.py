"""What `help` and an editor show of the public classes: their own words, and the arguments that a call takes."""

import inspect
import pydoc
import re

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification

import modeling_looped
from families import make_frozen
from modeling_looped import LoopedForCausalLM, LoopedForSequenceClassification, LoopedModel, looped
from modeling_looped.frozen_looped import FrozenLoopedForCausalLM
from modeling_looped.generation_looped import LoopedGenerationMixin
from toys import make_model

LOOPED = [LoopedModel, LoopedForCausalLM, LoopedForSequenceClassification]
FORWARD = {"num_loops", "num_grad_loops", "cut_chunks", "halting", "observe", "generator", "cache", "token_type_ids"}


def parameters(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def named(function) -> dict[str, object]:
    """Name -> default, of what a call may name."""
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: one.default for name, one in parameters(function).items() if one.kind not in stars}


@pytest.mark.parametrize("name", modeling_looped.__all__)
def test_help_begins_with_our_own_words(name):
    public = getattr(modeling_looped, name)
    own = vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__
    assert own
    assert own.strip()[0].isupper() or own.strip()[0] == "`"
    members = vars(public).values() if inspect.isclass(public) else []
    for words in (own, *(member.__doc__ or "" for member in members if callable(member))):
        assert not re.search(r"None Model|\[`None`\]|overrides the `__call__`", words)
    assert own.strip().splitlines()[0] in pydoc.plain(pydoc.render_doc(public))


def test_generate_shows_all_that_it_takes():
    """Ours in front of `**kwargs`, and everything of this version of transformers, in its order."""
    ours, theirs = parameters(LoopedForCausalLM.generate), named(GenerationMixin.generate)
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {name: ours[name].default for name in theirs} == theirs
    added = {name for name in named(LoopedForCausalLM.generate) if name not in theirs}
    assert added == {"num_loops", "halting", "draft_loops"}
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in added)
    for name, one in ours.items():
        assert name == "self" or name in LoopedGenerationMixin.generate.__doc__
        assert name in ("self", "kwargs") or one.annotation is not inspect.Parameter.empty


def test_generate_hands_on_all_that_it_takes(monkeypatch):
    """Every argument arrives where transformers reads it, and nothing that was not given."""
    got, model = {}, make_model()
    theirs = {name: object() for name in named(GenerationMixin.generate) if name != "self"}
    theirs["generation_config"] = None
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, **given: got.update(given))
    model.generate(*theirs.values(), num_loops=3, halting="kl", max_new_tokens=1)
    assert got == theirs | {"num_loops": 3, "halting": "kl", "max_new_tokens": 1}
    got.clear()
    model.generate()
    assert set(got) == set(theirs)
    assert set(got.values()) == {None}


@pytest.mark.parametrize("model_class", LOOPED)
def test_forward_shows_the_arguments_of_the_loop(model_class):
    assert set(named(model_class.forward)) >= FORWARD
    full = LoopedForCausalLM.forward.__doc__
    assert all(f"            {name}: " in full for name in named(LoopedForCausalLM.forward) if name != "self")


def test_a_classifier_takes_what_the_generic_one_takes():
    theirs = set(named(GenericForSequenceClassification.forward))
    assert theirs <= set(named(LoopedForSequenceClassification.forward))


@pytest.mark.parametrize("model_class", [*LOOPED, FrozenLoopedForCausalLM])
def test_loading_shows_the_loop_count(model_class):
    shown = parameters(model_class.from_pretrained)
    assert list(shown)[:1] == list(parameters(PreTrainedModel.from_pretrained))[:1]
    assert {"config", "num_loops", "kwargs"} <= set(shown)


def test_loading_without_a_count_takes_the_saved_one(tmp_path):
    make_model(num_loops=3).save_pretrained(tmp_path)
    assert LoopedForCausalLM.from_pretrained(tmp_path, num_loops=None).config.num_loops == 3
    assert LoopedForCausalLM.from_pretrained(tmp_path, num_loops=5).config.num_loops == 5


def test_a_looped_frozen_model_shows_its_arguments_until_it_is_detached():
    model = make_frozen("llama")
    before = {name: named(getattr(model, name)) for name in ("forward", "generate")}
    with looped(model):
        for name, theirs in before.items():
            assert named(getattr(model, name)) == theirs | {"num_loops": None, "num_looped_tokens": None}
            assert "num_looped_tokens" in getattr(model, name).__doc__
        ids = torch.tensor([[5, 3, 8]])
        model.generate(ids, num_loops=2, num_looped_tokens=1, max_new_tokens=1)
    assert {name: named(getattr(model, name)) for name in before} == before


def test_attach_takes_what_looped_takes():
    assert named(modeling_looped.attach) == named(looped)
