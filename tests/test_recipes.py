"""Every recipe can be run: its fields, its model, its depths and its data exist."""

from pathlib import Path

import pytest

from data_builders import DepthSampler, task_builder
from modeling_looped import LoopedConfig, LoopedForCausalLM
from train import Recipe, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("paper/*.yaml")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(RECIPES)))
def test_a_recipe_describes_a_run(file):
    recipe = read_recipe(file)
    assert isinstance(recipe, Recipe)
    assert recipe.name == file.stem
    config = LoopedConfig(vocab_size=10, **recipe.model)
    depth = DepthSampler(**{name: value for name, value in vars(recipe.depth).items() if value is not None})
    # What `generate` runs by default lies in the trained range.
    assert depth.depths[0] <= config.num_loops <= depth.depths[-1]
    builder = task_builder(recipe.data.task, recipe.data.config, seed=recipe.data.seed, **recipe.data.overrides)
    if recipe.curriculum.stop_hops:
        assert recipe.curriculum.stop_hops <= builder.config.train_hops


def test_the_papers_model_has_its_size():
    """28,519,680 parameters for its 217 tokens (Kohli et al. 2026, arXiv 2604.07822, k-hop)."""
    recipe = read_recipe(RECIPES / "paper" / "khop_dynamic.yaml")
    model = LoopedForCausalLM(LoopedConfig(vocab_size=217, **recipe.model))
    assert model.num_parameters() == 28_519_680
