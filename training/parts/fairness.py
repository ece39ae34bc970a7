"""Check that the rows of a comparison differ in the model only, and have similar sizes."""

from collections.abc import Mapping

import torch
from transformers import AutoModelForCausalLM

from melodi_hf.evaluation.comparison import TOLERANCE
from parts.recipe import Recipe

EQUAL = ("data", "tokenizer", "training", "evaluation")  # sections of a recipe


def check_fair(recipes: Mapping[str, Recipe]) -> dict[str, int]:
    """Check that rows have equal data, training, evaluation and size; return parameter counts.

    Raises ValueError with the row, its value, and the value that is required.
    """
    first, base = next(iter(recipes.items()))
    wanted = base.as_dict()
    for row, recipe in recipes.items():
        given = recipe.as_dict()
        for section in EQUAL:
            for key, value in given[section].items():
                if value != wanted[section][key]:
                    raise ValueError(
                        f"row {row} has {section}.{key}={value}, row {first} has "
                        f"{wanted[section][key]}: compared rows may differ in model and expect "
                        "only; set it for all rows by --set"
                    )
    counts = {row: count_parameters(recipe) for row, recipe in recipes.items()}
    low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[high] > counts[low] * (1 + TOLERANCE):
        odd, other = sorted((low, high), key=lambda row: -abs(counts[row] - counts[first]))
        raise ValueError(
            f"row {odd} has {counts[odd]:,} parameters, row {other} {counts[other]:,}, which is "
            f"more than {TOLERANCE:.0%} apart: "
            f"{suggest_width(recipes[odd], counts[other] - counts[odd])}"
        )
    return counts


def count_parameters(recipe: Recipe) -> int:
    """Count the parameters of the model with the recipe's vocabulary size."""
    config = recipe.model_config(vocab_size=recipe.tokenizer.vocab_size)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def suggest_width(recipe: Recipe, missing: int) -> str:
    """Suggest a feed-forward width that makes the parameter counts equal."""
    config = recipe.model_config(vocab_size=recipe.tokenizer.vocab_size)
    per_channel = config.num_hidden_layers * (2 * config.hidden_size + config.mlp_bias)
    width = config.intermediate_size + round(missing / per_channel)
    return f"try model.intermediate_size={width} instead of {config.intermediate_size}"
