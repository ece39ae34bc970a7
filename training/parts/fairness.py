"""What must be equal in all rows of a comparison, and how far apart their sizes may be."""

from collections.abc import Mapping

import torch
from transformers import AutoModelForCausalLM

from melodi_hf.evaluation.comparison import TOLERANCE
from parts.recipe import Recipe

EQUAL = ("data", "tokenizer", "training", "evaluation")  # sections of a recipe


def check_fair(recipes: Mapping[str, Recipe]) -> dict[str, int]:
    """Refuse rows that are fed, trained or scored otherwise than the first, or of which one is
    larger than another; the number of parameters of each.

    Raises ValueError with the row, what it has, and what it should have.
    """
    first, base = next(iter(recipes.items()))
    wanted = base.as_dict()
    for row, recipe in recipes.items():
        given = recipe.as_dict()
        for section in EQUAL:
            for key, value in given[section].items():
                if value != wanted[section][key]:
                    raise ValueError(
                        f"row {row} has {section}.{key}={value}, row {first} "
                        f"{wanted[section][key]}: rows that are compared may differ in model and "
                        "expect only; change it for all by --set"
                    )
    counts = {row: parameters(recipe) for row, recipe in recipes.items()}
    low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[high] > counts[low] * (1 + TOLERANCE):
        odd, other = sorted((low, high), key=lambda row: -abs(counts[row] - counts[first]))
        raise ValueError(
            f"row {odd} has {counts[odd]:,} parameters, row {other} {counts[other]:,}, which is "
            f"more than {TOLERANCE:.0%} apart: {remedy(recipes[odd], counts[other] - counts[odd])}"
        )
    return counts


def parameters(recipe: Recipe) -> int:
    """Of the model with the vocabulary that the recipe asks for."""
    config = recipe.model_config(vocab_size=recipe.tokenizer.vocab_size)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def remedy(recipe: Recipe, missing: int) -> str:
    """The width of the feed-forward network that makes up for what is missing."""
    config = recipe.model_config(vocab_size=recipe.tokenizer.vocab_size)
    per_channel = config.num_hidden_layers * (2 * config.hidden_size + config.mlp_bias)
    width = config.intermediate_size + round(missing / per_channel)
    return f"try model.intermediate_size={width} instead of {config.intermediate_size}"
