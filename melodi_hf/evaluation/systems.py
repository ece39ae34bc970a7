"""Write the page of systems: what each carries, its size and cost, and its paper.

    python -m melodi_hf.evaluation.systems model_cards/systems.md

Text and published numbers are read from systems.json, which cards and tables use too. Floats, bytes
and FLOPs are computed from the configurations.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PreTrainedConfig

import melodi_hf  # noqa: F401  registers the models in CONFIG_MAPPING
from melodi_hf.evaluation.command_line import output_file
from melodi_hf.evaluation.markdown import markdown_table

FILE = Path(__file__).with_name("systems.json")
MODELS = "../melodi_hf/models"  # relative to the page
SEGMENT = 4096  # tokens, as in MELODI's paper
BFLOAT16 = 2  # bytes

INTRODUCTION = f"""\
# Systems

Written by `python -m melodi_hf.evaluation.systems model_cards/systems.md` from
`melodi_hf/evaluation/systems.json` and the configurations.

All systems share one decoder: RMS norm, keys and queries of unit length with a temperature per
head, T5's relative positions, no token attends to itself, tied embeddings. Numbers are for the
papers' size, layers of 1024 channels and windows of 512 tokens. Floats: the memory that a row
carries from window to window, counted as in the papers. Bytes: the cache of one row during
generation in bfloat16, including the current window. FLOPs: forward, per token, in segments of
{SEGMENT:,} tokens with full memory, including the head over T5's vocabulary.
"""


class Published(NamedTuple):
    """A perplexity published in a paper."""

    model: str
    perplexity: float
    per: str  # token or word
    of: str  # documents and vocabulary
    source: str


class Size(NamedTuple):
    """A model of a paper: its configuration, and the memory size that the paper reports."""

    model: dict[str, Any]
    printed: float | None  # million


class System(NamedTuple):
    """An entry of systems.json."""

    name: str
    carries: str  # from one window to the next
    memory: str  # its name on cards
    reaches: str  # on cards; fields such as {config.window_length} are filled in
    paper: str
    code: list[str]  # files in models/
    released: str  # code by the papers' authors
    differs: list[str]  # from the paper
    sizes: dict[str, Size]
    published: list[Published]


@cache
def read_systems() -> dict[str, System]:
    """Read all systems by model type, in the order of pages and tables."""
    return {
        name: parse_system(given) for name, given in json.loads(FILE.read_text("utf-8")).items()
    }


def parse_system(given: Mapping[str, Any]) -> System:
    sizes = {name: Size(**size) for name, size in given["sizes"].items()}
    return System(
        **{**given, "sizes": sizes, "published": [Published(**x) for x in given["published"]]}
    )


def build_config(system: str, size: Size) -> PreTrainedConfig:
    return CONFIG_MAPPING[system](**size.model)


def sizes_table(systems: Mapping[str, System]) -> str:
    """Make a table with one row per model of a paper."""
    rows = []
    for kind, system in systems.items():
        for name, size in system.sizes.items():
            config = build_config(kind, size)
            rows.append(
                [
                    system.name,
                    name,
                    config.memory_floats(),
                    None if size.printed is None else f"{size.printed}M",
                    config.cache_bytes(BFLOAT16),
                    config.forward_flops(SEGMENT) / SEGMENT / 1e6,
                ]
            )
    headers = ["system", "model", "floats per row", "reported in the paper"]
    return markdown_table([*headers, "bytes of the cache", "million FLOPs per token"], rows)


def system_section(system: System) -> str:
    """Write the section of one system."""
    code = ", ".join(f"[`{file}`]({MODELS}/{file})" for file in system.code)
    differs = "\n".join(f"- {each}" for each in system.differs)
    return (
        f"## {system.name}\n\n"
        f"Carried from window to window: {system.carries}.\n\n"
        f"Paper: {system.paper}. Code: {code}. Released code: {system.released}.\n\n"
        f"Differs from the paper:\n\n{differs}\n"
    )


def systems_page() -> str:
    systems = read_systems()
    return "\n".join(
        [INTRODUCTION, sizes_table(systems) + "\n", *map(system_section, systems.values())]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the page of systems.")
    parser.add_argument("file", type=output_file, help="such as model_cards/systems.md")
    file = parser.parse_args(arguments).file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(systems_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
