"""What recipes cost, before any of them is run.

    python training/costs.py                             all recipes of the paper
    python training/costs.py configuration/ablations.yaml    those of a file
    python training/costs.py --renew                     writes the figures into the heads of the
                                                         recipes and into configuration/README.md

FLOPs are those of `melodi_hf.models.costs` over the whole run. Hours are not measured: they are
those of one chip that reaches `UTILISATION` of the speed that its data sheet promises.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from parts.recipe import Recipe, load_recipe, recipes_of, split_name
from transformers import PreTrainedConfig

from melodi_hf.evaluation.command_line import FAILURES, one_line
from melodi_hf.evaluation.tables import markdown_table, renew_blocks
from melodi_hf.models.costs import forward_flops, training_flops

PEAK_FLOPS = {"H200": 989e12, "TPU v5e chip": 197e12}  # per second, dense bfloat16
UTILISATION = 0.4  # assumed, of any chip and any system
CONFIGURATION = Path(__file__).resolve().parents[1] / "configuration"
HEAD_LINES = re.compile(r"^# Cost.*\n# Memory.*$", re.MULTILINE)


def config_of(recipe: Recipe) -> PreTrainedConfig:
    """The model as it will be: what a recipe does not say comes with a tokenizer of its size."""
    return recipe.model_config(vocab_size=recipe.tokenizer.vocab_size)


def run_flops(recipe: Recipe) -> int:
    """FLOPs of all steps; checkpointing computes the layers twice."""
    asked, length, config = recipe.training, recipe.data.segment_length, config_of(recipe)
    row = training_flops(config, length)
    if asked.gradient_checkpointing:
        row += forward_flops(config, length, with_logits=False)
    return row * asked.num_rows * asked.gradient_accumulation_steps * asked.steps


def chip_hours(flops: int) -> dict[str, int]:
    """Hours of one chip, by its name."""
    return {chip: round(flops / peak / UTILISATION / 3600) for chip, peak in PEAK_FLOPS.items()}


def head_lines(file: Path) -> str:
    """What the head of a file tells of its cost: its own, or that of all rows of a table."""
    recipes = [load_recipe(name) for name in recipes_of(file)]
    flops = sum(map(run_flops, recipes))
    hours = " or ".join(f"{n:,} hours of one {chip}" for chip, n in chip_hours(flops).items())
    rows = f" of all {len(recipes)} rows" if len(recipes) > 1 else ""
    memory = {config_of(recipe).memory_floats() for recipe in recipes}
    floats = " to ".join(f"{n:,}" for n in sorted({min(memory), max(memory)}))
    return (
        f"# Cost{rows}: {flops:.2e} FLOPs; {hours}, at {UTILISATION:.0%} of peak.\n"
        f"# Memory: {floats} floats per document."
    )


def expected(recipe: Recipe) -> str:
    number = recipe.expect.perplexity
    return "" if number is None else f"{number:.2f}"  # as papers print it


def cost_table(files: Iterable[Path]) -> str:
    """One row for each recipe, and for each row of a table."""
    rows = []
    for name in (name for file in files for name in recipes_of(file)):
        file, row = split_name(name)
        recipe = load_recipe(name)
        flops = run_flops(recipe)
        figures = [expected(recipe), config_of(recipe).memory_floats(), float(flops)]
        rows.append([f"`{row or file.name}`", *figures, *chip_hours(flops).values()])
    headers = ["recipe", "perplexity", "floats of memory", "FLOPs"]
    return markdown_table([*headers, *(f"hours, {chip}" for chip in PEAK_FLOPS)], rows)


def tables_of_the_paper() -> dict[str, str]:
    """By the name that a block of configuration/README.md asks for."""
    folders = sorted(path for path in (CONFIGURATION / "paper").iterdir() if path.is_dir())
    tables = {f"paper/{folder.name}": cost_table(sorted(folder.iterdir())) for folder in folders}
    return {**tables, "ablations": cost_table([CONFIGURATION / "ablations.yaml"])}


def renewed() -> dict[Path, str]:
    """Every file that holds figures of this kind, with the figures that it should hold."""
    files = [*CONFIGURATION.glob("paper/**/*.yaml"), CONFIGURATION / "ablations.yaml"]
    texts = {file: HEAD_LINES.sub(head_lines(file), file.read_text("utf-8")) for file in files}
    readme = CONFIGURATION / "README.md"
    return {**texts, readme: renew_blocks(readme.read_text("utf-8"), tables_of_the_paper())}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What recipes cost, before any of them is run.")
    parser.add_argument("file", type=Path, nargs="*", help="recipes or tables of them")
    parser.add_argument("--renew", action="store_true", help="write the figures where they belong")
    options = parser.parse_args(arguments)
    try:
        if options.renew:
            for file, text in renewed().items():
                file.write_text(text, "utf-8")
        elif options.file:
            print(cost_table(options.file))
        else:
            for name, table in tables_of_the_paper().items():
                print(name, table, sep="\n\n", end="\n\n")
    except FAILURES as error:
        parser.error(one_line(error))


if __name__ == "__main__":
    main()
