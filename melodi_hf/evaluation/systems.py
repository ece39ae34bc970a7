"""What the systems are, side by side: what is carried, how much, at what cost, from which paper.

    python -m melodi_hf.evaluation.systems model_cards/systems.md

Words and papers' figures stand in systems.json, which cards and tables read too; numbers of floats,
bytes and FLOPs are computed from the configurations.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PreTrainedConfig

import melodi_hf  # noqa: F401  makes our configurations known to CONFIG_MAPPING
from melodi_hf.evaluation.command_line import output_file
from melodi_hf.evaluation.markdown import markdown_table
from melodi_hf.models.costs import forward_flops, held_bytes

FILE = Path(__file__).with_name("systems.json")
MODELS = "../melodi_hf/models"  # as seen from the page
SEGMENT = 4096  # tokens, as in MELODI's paper
BFLOAT16 = 2  # bytes

INTRODUCTION = f"""\
# Systems

Written by `python -m melodi_hf.evaluation.systems model_cards/systems.md` from
`melodi_hf/evaluation/systems.json` and the configurations.

All systems stand on one skeleton: RMS norm, keys and queries of unit length with a temperature per
head, T5's relative positions, no token attends to itself, tied embeddings. Numbers are those of the
papers' size, layers of 1024 channels and windows of 512 tokens. Floats are what a row carries from
window to window, counted as the papers count; bytes are what generation holds for a row in
bfloat16, the open window included; FLOPs are those of reading a token, forward, in segments of
{SEGMENT:,} tokens with all memory filled, the head over T5's vocabulary included.
"""


class Published(NamedTuple):
    """A perplexity that a paper tells."""

    model: str
    perplexity: float
    per: str  # token or word
    of: str  # documents and vocabulary
    source: str


class Size(NamedTuple):
    """A model of a paper: the fields of its configuration, and the floats that the paper prints."""

    model: dict[str, Any]
    printed: float | None  # million


class System(NamedTuple):
    """An entry of systems.json."""

    name: str
    carries: str  # from one window to the next
    memory: str  # what cards call it
    reaches: str  # on cards; {config.window_length} stands for the field
    paper: str
    code: list[str]  # files in models/
    released: str  # by the papers' authors
    differs: list[str]  # from the paper
    sizes: dict[str, Size]
    published: list[Published]


@cache
def read_systems() -> dict[str, System]:
    """All systems by their model type, in the order of pages and tables."""
    return {name: system_of(given) for name, given in json.loads(FILE.read_text("utf-8")).items()}


def system_of(given: Mapping[str, Any]) -> System:
    sizes = {name: Size(**size) for name, size in given["sizes"].items()}
    return System(
        **{**given, "sizes": sizes, "published": [Published(**x) for x in given["published"]]}
    )


def config_of(system: str, size: Size) -> PreTrainedConfig:
    return CONFIG_MAPPING[system](**size.model)


def sizes_table(systems: Mapping[str, System]) -> str:
    """One row per model of a paper."""
    rows = []
    for kind, system in systems.items():
        for name, size in system.sizes.items():
            config = config_of(kind, size)
            rows.append(
                [
                    system.name,
                    name,
                    config.memory_floats(),
                    None if size.printed is None else f"{size.printed}M",
                    held_bytes(config, BFLOAT16),
                    forward_flops(config, SEGMENT) / SEGMENT / 1e6,
                ]
            )
    headers = ["system", "model", "floats per row", "the paper prints"]
    return markdown_table([*headers, "bytes held", "million FLOPs per token"], rows)


def section(system: System) -> str:
    """All that is told of one system in words."""
    code = ", ".join(f"[`{file}`]({MODELS}/{file})" for file in system.code)
    differs = "\n".join(f"- {each}" for each in system.differs)
    return (
        f"## {system.name}\n\n"
        f"Carried from window to window: {system.carries}.\n\n"
        f"Paper: {system.paper}. Code: {code}. Released code: {system.released}.\n\n"
        f"Differs from the paper:\n\n{differs}\n"
    )


def page() -> str:
    systems = read_systems()
    return "\n".join([INTRODUCTION, sizes_table(systems) + "\n", *map(section, systems.values())])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the page of systems.")
    parser.add_argument("file", type=output_file, help="such as model_cards/systems.md")
    file = parser.parse_args(arguments).file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
