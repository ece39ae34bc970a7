"""Every row and column of the paper's tables has a recipe: its sizes, its memory, its number."""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from costs import chip_hours, run_flops, updated_files
from parts.recipe import list_recipes, load_recipe

from .cases import every_case

CONFIGURATION = Path(__file__).parents[1] / "configuration"
ABLATIONS = CONFIGURATION / "ablations.yaml"
COVERED = 65536  # tokens of a document in the long-term memory


class Row(NamedTuple):
    """What a table says of one recipe."""

    floats: int  # of memory
    perplexity: float
    sizes: tuple[int, ...] | str | None = None  # S and L, or a system; None: a Transformer-XL
    layers: int = 12
    width: int = 1024
    window: int = 512
    segment: int = 4096
    column: str = "pg19_t5"


def named(sizes):
    if isinstance(sizes, str):
        return sizes
    return "melodi_s{}_l{}".format(*sizes) if sizes else "transformer_xl"


COLUMNS = ("pg19_meena", "pg19_t5", "pg19_custom", "arxiv_meena", "arxiv_custom", "c4_custom")
# floats; perplexities of 12 layers (poster), of 13 (arXiv 2410.03156v1)
MEMORIZING = "memorizing_transformer"
MAIN = {
    None: (
        12_582_912,
        (8.76, 11.54, 12.63, 2.61, 3.23, 18.61),
        (8.65, 11.41, 12.42, 2.60, 3.22, 18.22),
    ),
    (192, 32): (
        10_747_904,
        (8.22, 10.66, 11.66, 2.13, 2.55, 18.03),
        (8.08, 10.51, 11.47, 2.12, 2.54, 17.55),
    ),
    (128, 64): (
        18_350_080,
        (8.16, 10.61, 11.66, 2.13, 2.55, 18.01),
        (8.06, 10.44, 11.42, 2.11, 2.52, 17.53),
    ),
    (192, 96): (
        27_525_120,
        (8.08, 10.48, 11.47, 2.11, 2.51, 17.75),
        (7.91, 10.29, 11.27, 2.09, 2.49, 17.25),
    ),
    "block_recurrent": (
        13_107_200,
        (8.47, 11.12, 12.11, 2.27, 2.73, 18.27),
        (8.30, 10.98, 11.90, 2.26, 2.70, 17.82),
    ),
    MEMORIZING: (
        146_800_640,
        (8.15, 10.74, 11.68, 2.15, 2.57, 17.88),
        (8.07, 10.62, 11.53, 2.14, 2.56, 17.37),
    ),
}
# layers, width: floats and perplexity of Transformer-XL, S128+L64, S192+L96, Memorizing Transformer
MODEL_SCALING = {
    (24, 1024): (
        (25_165_824, 10.15),
        (19_922_944, 9.30),
        (29_884_416, 9.16),
        (159_383_552, 9.45),
    ),
    (36, 1024): (
        (37_748_736, 9.61),
        (21_495_808, 8.81),
        (32_243_712, 8.70),
        (171_966_464, 8.92),
    ),
    (16, 1536): (
        (25_165_824, 9.69),
        (28_311_552, 8.89),
        (42_467_328, 8.79),
        (226_492_416, 9.01),
    ),
}
# segment, window: the same of Transformer-XL, S:W = 1:4 with L:W = 1:8, S:W = 3:8 with L:W = 3:16,
# Memorizing Transformer
WINDOW_SCALING = {
    (4096, 1024): (
        (25_165_824, 11.26),
        (19_922_944, 10.47),
        (29_884_416, 10.36),
        (159_383_552, 10.64),
    ),
    (8192, 1024): (
        (25_165_824, 11.18),
        (19_922_944, 10.27),
        (29_884_416, 10.19),
        (159_383_552, 10.42),
    ),
    (8192, 2048): (
        (50_331_648, 10.94),
        (23_068_672, 10.20),
        (34_603_008, 10.10),
        (184_549_376, 10.38),
    ),
}


def rows_of_the_tables():
    rows = {}
    for sizes, (floats, poster, _) in MAIN.items():
        for column, perplexity in zip(COLUMNS, poster, strict=True):
            rows[f"main/{named(sizes)}_{column}"] = Row(floats, perplexity, sizes, column=column)
    for (layers, width), cells in MODEL_SCALING.items():
        for sizes, cell in zip(
            (None, (128, 64), (192, 96), "memorizing_transformer"), cells, strict=True
        ):
            name = f"model_scaling/{named(sizes)}_{layers}x{width}"
            rows[name] = Row(*cell, sizes, layers, width)
    for (segment, window), cells in WINDOW_SCALING.items():
        quarter, three_eighths = (window // 4, window // 8), (3 * window // 8, 3 * window // 16)
        for sizes, cell in zip(
            (None, quarter, three_eighths, "memorizing_transformer"), cells, strict=True
        ):
            name = f"window_scaling/{named(sizes)}_{segment}_{window}"
            rows[name] = Row(*cell, sizes, window=window, segment=segment)
    return {**rows, "melodi_s128_l64_13x1024": Row(18_481_152, 10.95, (128, 64), layers=13)}


ROWS = rows_of_the_tables()

# Perplexities of the ablations: short-term memory downwards, long-term memory to the right; and the
# floats of each memory as they are printed, in millions
GRID_LONG = {0: "0.0", 8: "2.1", 16: "4.2", 32: "8.4", 64: "16.8", 96: "25.2"}
GRID_SHORT = {8: "0.1", 16: "0.2", 32: "0.4", 64: "0.9", 128: "1.7", 192: "2.6", 256: "3.4"}
GRID = {
    8: (11.81, 11.69, 11.59, 11.42, 11.34, 11.15),
    16: (11.75, 11.63, 11.47, 11.35, 11.24, 11.10),
    32: (11.60, 11.57, 11.40, 11.25, 11.11, 11.07),
    64: (11.52, 11.43, 11.36, 11.23, 11.08, 10.98),
    128: (11.39, 11.41, 11.27, 11.08, 10.95, 10.90),
    192: (11.28, 11.25, 11.14, 11.02, 10.89, 10.83),
    256: (11.26, 11.23, 11.11, 10.93, 10.83, 10.77),
}


def test_every_row_and_column_has_its_recipe_and_there_are_no_others():
    files = (CONFIGURATION / "paper").rglob("*.*")
    found = {file.relative_to(CONFIGURATION / "paper").as_posix() for file in files}
    assert found == {f"{name}.yaml" for name in ROWS}
    assert len(found) == len(MAIN) * 6 + 3 * 4 + 3 * 4 + 1


@every_case("name", ROWS)
def test_recipe_is_its_row(name):
    row, recipe = ROWS[name], load_recipe(CONFIGURATION / "paper" / f"{name}.yaml")
    assert_trained_as_the_paper_trains(recipe, name)
    assert_reads_its_column(recipe, row.column)
    config = recipe.model_config()
    assert config.memory_floats() == row.floats
    assert recipe.expect.perplexity == row.perplexity
    assert recipe.expect.spread is None
    assert recipe.data.segment_length == row.segment
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    assert sizes == (row.layers, row.width, 4 * row.width)
    assert (config.num_attention_heads, config.head_dim) == (row.width // 128, 128)
    assert (config.window_length, config.dropout, config.attention_dropout) == (
        row.window,
        0.05,
        0.05,
    )
    assert not config.mask_empty_memory  # as released
    if row.sizes is None:
        assert config.model_type == "transformer_xl"
        return
    if row.sizes == "block_recurrent":
        assert config.model_type == row.sizes
        assert (list(config.recurrent_layers), config.num_state_vectors) == ([9], 512)
        assert (config.gate, config.gate_configuration) == ("fixed", "skip")
        assert config.state_reads_previous_window
        return
    if row.sizes == MEMORIZING:
        assert_released_memory(config, row)
        return
    short, long = row.sizes
    assert config.model_type == "melodi"
    assert (config.num_summary_tokens, config.num_short_memory_tokens) == (short, short)
    assert (config.num_long_memory_tokens, config.long_memory_windows) == (
        long,
        COVERED // row.window,
    )
    assert list(config.long_memory_layers) == [row.layers // 2]
    assert config.mix_tokens


def assert_released_memory(config, row):
    """Dense attention in a side layer, over what came before a segment and the segment itself."""
    assert config.model_type == "memorizing_transformer"
    assert (config.memory_length, config.memory_layer) == (COVERED, row.layers // 2)
    assert (config.placement, config.side_residual) == ("side", "double")
    assert (config.retrieval, config.memory_combination) == ("dense", "joint")
    assert config.segment_windows * config.window_length == row.segment
    assert config.mlp_bias


def assert_trained_as_the_paper_trains(recipe, name):
    training = recipe.training
    assert training.steps == (200_000 if name == "melodi_s128_l64_13x1024" else 500_000)
    assert training.num_rows * training.gradient_accumulation_steps == 32
    assert (training.optimizer, training.schedule) == ("adafactor", "paper")
    assert (training.learning_rate, training.warmup_steps) == (0.01, 1000)
    assert (training.weight_decay, training.max_grad_norm) == (0.0, 0.0)
    assert training.precision == "bfloat16"


def assert_reads_its_column(recipe, column):
    """Its documents and its vocabulary."""
    corpus, vocabulary = column.split("_")
    sources = {"pg19": "emozilla/pg19", "arxiv": "files", "c4": "allenai/c4"}
    assert recipe.data.source == sources[corpus]
    assert (recipe.data.subset, recipe.data.min_tokens) == (
        ("en", 4096) if corpus == "c4" else (None, 0)
    )
    assert recipe.data.max_documents is None
    assert recipe.evaluation.max_documents is None
    from_t5 = vocabulary == "t5"
    assert recipe.tokenizer.path == ("google-t5/t5-base" if from_t5 else None)
    # the recipe's own size goes before that of a tokenizer
    assert recipe.model_config(vocab_size=32000).vocab_size == (32128 if from_t5 else 32000)


@every_case("sizes", MAIN)
def test_head_gives_both_numbers_of_the_main_table_and_what_cannot_be_compared(sizes):
    _, poster, first_version = MAIN[sizes]
    for column, name in enumerate(COLUMNS):
        path = CONFIGURATION / "paper" / "main" / f"{named(sizes)}_{name}.yaml"
        head = path.read_text(encoding="utf-8").split("\nmodel:")[0]
        assert f": {poster[column]:.2f} with 12 layers (poster" in head, path
        assert f"has {first_version[column]:.2f} with 13." in head, path
        assert ("stands in for it" in head) == ("t5" not in name), path
        assert ("data.test_files=TEST" in head) == ("arxiv" in name), path


def test_ablations_are_the_grid_and_the_branching():
    names = [f"S{short}_L{long}" for short, long in product(GRID, GRID_LONG)]
    names += ["S128_L0_without_branching", "S128_L64_without_branching"]
    assert list_recipes(ABLATIONS) == [f"{ABLATIONS}:{name}" for name in names]


@every_case("short", GRID)
def test_row_of_the_grid(short):
    for place, long in enumerate(GRID_LONG):
        assert_cell_of_the_grid(short, place, long)


def assert_cell_of_the_grid(short, place, long):
    recipe = load_recipe(f"{ABLATIONS}:S{short}_L{long}")
    config = recipe.model_config()
    assert recipe.expect.perplexity == GRID[short][place]
    assert recipe.training.steps == 200_000
    without_short = load_recipe(
        f"{ABLATIONS}:S{short}_L{long}", ["model.num_short_memory_tokens=0"]
    )
    of_long = without_short.model_config().memory_floats()
    assert f"{of_long / 1e6:.1f}" == GRID_LONG[long]
    assert f"{(config.memory_floats() - of_long) / 1e6:.1f}" == GRID_SHORT[short]
    assert config.memory_floats() == 13 * short * 1024 + 2 * 128 * long * 1024
    assert (config.num_summary_tokens, config.num_short_memory_tokens) == (short, short)
    assert list(config.long_memory_layers) == ([6] if long else [])
    assert config.mix_tokens


@pytest.mark.parametrize(("long", "without", "with_it"), [(0, 11.68, 11.39), (64, 11.24, 10.95)])
def test_rows_of_the_branching(long, without, with_it):
    plain = load_recipe(f"{ABLATIONS}:S128_L{long}").as_dict()
    changed = load_recipe(f"{ABLATIONS}:S128_L{long}_without_branching").as_dict()
    assert plain["model"].pop("mix_tokens")
    assert not changed["model"].pop("mix_tokens")
    assert plain["expect"].pop("perplexity") == with_it
    assert changed["expect"].pop("perplexity") == without
    plain["model"].pop("num_long_memory_tokens"), changed["model"].pop("num_long_memory_tokens")
    assert changed == plain


# Cost


def test_figures_in_heads_and_tables_are_those_of_the_counts():
    for file, text in updated_files().items():
        assert file.read_text(encoding="utf-8") == text, "python training/costs.py --renew"


def test_each_recipe_of_the_paper_stands_in_the_tables_once():
    text = (CONFIGURATION / "README.md").read_text(encoding="utf-8")
    for name in [Path(name).name + ".yaml" for name in ROWS if "/" in name]:
        assert text.count(f"| `{name}` |") == 1
    for name in list_recipes(ABLATIONS):
        assert text.count(f"| `{name.rpartition(':')[2]}` |") == 1


def test_run_costs_its_steps():
    name = CONFIGURATION / "paper" / "main" / "melodi_s128_l64_pg19_t5.yaml"
    plain = load_recipe(name, ["training.gradient_checkpointing=false"])
    per_token = 3 * (468.1e6 + 65.8e6)  # layers, logits
    assert run_flops(plain) == pytest.approx(per_token * 4096 * 32 * 500_000, rel=1e-3)
    again = per_token + 468.1e6
    assert run_flops(load_recipe(name)) == pytest.approx(again * 4096 * 32 * 500_000, rel=1e-3)
    fewer = ["training.num_rows=8", "training.gradient_accumulation_steps=4"]
    assert run_flops(load_recipe(name, fewer)) == run_flops(load_recipe(name))


def test_trained_vocabulary_counts_with_the_size_it_will_have():
    recipe = load_recipe(CONFIGURATION / "paper" / "main" / "transformer_xl_pg19_custom.yaml")
    row = recipe.model_config(vocab_size=32000).training_flops(4096)
    assert run_flops(recipe) > row * 32 * 500_000
    larger = load_recipe(
        CONFIGURATION / "paper" / "main" / "transformer_xl_pg19_custom.yaml",
        ["tokenizer.vocab_size=32128"],
    )
    more = 3 * 2 * 128 * 1024 * 4096 * 32 * 500_000
    assert run_flops(larger) - run_flops(recipe) == more


def test_hours_are_those_of_a_chip_at_its_share_of_the_data_sheet():
    hour_of_h200 = 989e12 * 0.4 * 3600
    assert chip_hours(int(1000 * hour_of_h200)) == {"H200": 1000, "TPU v5e chip": 5020}
