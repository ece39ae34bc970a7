"""Compute the cost of recipes without running them.

    python training/costs.py                             all recipes of the paper
    python training/costs.py configuration/ablations.yaml    those of a file
    python training/costs.py --renew                     write the costs into the headers of the
                                                         recipes and into configuration/README.md

FLOPs are those of `config.training_flops` over the whole run. Hours are not measured: they are
those of one chip that reaches `UTILISATION` of the speed that its data sheet promises.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from parts.recipe import Recipe, list_recipes, load_recipe, split_name
from transformers import PreTrainedConfig

from melodi_hf.evaluation.command_line import FAILURES, one_line
from melodi_hf.evaluation.tables import markdown_table, update_blocks

PEAK_FLOPS = {"H200": 989e12, "TPU v5e chip": 197e12}  # per second, dense bfloat16
UTILISATION = 0.4  # assumed for every chip and system
CONFIGURATION = Path(__file__).resolve().parents[1] / "configuration"
HEAD_LINES = re.compile(r"^# Cost.*\n# Memory.*$", re.MULTILINE)


def build_config(recipe: Recipe) -> PreTrainedConfig:
    """Build the configuration with a tokenizer of the recipe's vocabulary size."""
    return recipe.model_config(vocab_size=recipe.tokenizer.vocab_size)


def run_flops(recipe: Recipe) -> int:
    """Compute the FLOPs of all steps; gradient checkpointing computes the layers twice."""
    asked, length, config = recipe.training, recipe.data.segment_length, build_config(recipe)
    row = config.training_flops(length)
    if asked.gradient_checkpointing:
        row += config.forward_flops(length, with_logits=False)
    return row * asked.num_rows * asked.gradient_accumulation_steps * asked.steps


def chip_hours(flops: int) -> dict[str, int]:
    """Estimate the hours on one chip, by chip name."""
    return {chip: round(flops / peak / UTILISATION / 3600) for chip, peak in PEAK_FLOPS.items()}


def head_lines(file: Path) -> str:
    """Write the header lines on cost: of a recipe, or of all rows of a table."""
    recipes = [load_recipe(name) for name in list_recipes(file)]
    flops = sum(map(run_flops, recipes))
    hours = " or ".join(f"{n:,} hours of one {chip}" for chip, n in chip_hours(flops).items())
    rows = f" of all {len(recipes)} rows" if len(recipes) > 1 else ""
    memory = {build_config(recipe).memory_floats() for recipe in recipes}
    floats = " to ".join(f"{n:,}" for n in sorted({min(memory), max(memory)}))
    return (
        f"# Cost{rows}: {flops:.2e} FLOPs; {hours}, at {UTILISATION:.0%} of peak.\n"
        f"# Memory: {floats} floats per document."
    )


def format_expected(recipe: Recipe) -> str:
    number = recipe.expect.perplexity
    return "" if number is None else f"{number:.2f}"  # two digits, as in the papers


def cost_table(files: Iterable[Path]) -> str:
    """Make a table with one row per recipe, and per row of a table file."""
    rows = []
    for name in (name for file in files for name in list_recipes(file)):
        file, row = split_name(name)
        recipe = load_recipe(name)
        flops = run_flops(recipe)
        values = [format_expected(recipe), build_config(recipe).memory_floats(), float(flops)]
        rows.append([f"`{row or file.name}`", *values, *chip_hours(flops).values()])
    headers = ["recipe", "perplexity", "floats of memory", "FLOPs"]
    return markdown_table([*headers, *(f"hours, {chip}" for chip in PEAK_FLOPS)], rows)


def paper_tables() -> dict[str, str]:
    """Make the paper's tables by the names used in configuration/README.md."""
    folders = sorted(path for path in (CONFIGURATION / "paper").iterdir() if path.is_dir())
    tables = {f"paper/{folder.name}": cost_table(sorted(folder.iterdir())) for folder in folders}
    return {**tables, "ablations": cost_table([CONFIGURATION / "ablations.yaml"])}


def updated_files() -> dict[Path, str]:
    """Return the updated text of every file that contains costs."""
    files = [*CONFIGURATION.glob("paper/**/*.yaml"), CONFIGURATION / "ablations.yaml"]
    texts = {file: HEAD_LINES.sub(head_lines(file), file.read_text("utf-8")) for file in files}
    readme = CONFIGURATION / "README.md"
    return {**texts, readme: update_blocks(readme.read_text("utf-8"), paper_tables())}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Compute the cost of recipes without running them."
    )
    parser.add_argument("file", type=Path, nargs="*", help="recipes or tables of recipes")
    parser.add_argument(
        "--renew", action="store_true", help="write the costs into recipes and pages"
    )
    options = parser.parse_args(arguments)
    try:
        if options.renew:
            for file, text in updated_files().items():
                file.write_text(text, "utf-8")
        elif options.file:
            print(cost_table(options.file))
        else:
            for name, table in paper_tables().items():
                print(name, table, sep="\n\n", end="\n\n")
    except FAILURES as error:
        parser.error(one_line(error))


if __name__ == "__main__":
    main()
