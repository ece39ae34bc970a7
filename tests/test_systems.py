"""Promise: every system has its page, its card and its row, and their figures are the papers'."""

import re
from pathlib import Path

import pytest
from parts.recipe import list_recipes, load_recipe
from transformers import CONFIG_MAPPING

from melodi_hf.evaluation import systems
from melodi_hf.evaluation.cards import CITATIONS, describe_memory, write_card
from melodi_hf.evaluation.systems import build_config, read_systems, systems_page
from melodi_hf.models.configuration_decoder import DecoderConfig

from .cases import every_case
from .models import EACH, SYSTEMS, build

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "melodi_hf" / "models"
REGISTERED = {
    name
    for name in CONFIG_MAPPING._extra_content
    if issubclass(CONFIG_MAPPING[name], DecoderConfig)
}
SIZES = [
    pytest.param(name, size, id=f"{name}, {words}")
    for name, system in read_systems().items()
    for words, size in system.sizes.items()
]


def test_page_is_what_the_command_writes(tmp_path):
    written = tmp_path / "systems.md"
    systems.main([str(written)])
    told = (ROOT / "model_cards" / "systems.md").read_text(encoding="utf-8")
    assert told == written.read_text(encoding="utf-8"), (
        "renew it: python -m melodi_hf.evaluation.systems model_cards/systems.md"
    )


def test_every_system_has_its_entry_its_citation_and_its_row():
    assert {"melodi", "transformer_xl", "plain_transformer"} <= REGISTERED
    assert set(read_systems()) == REGISTERED
    assert set(CITATIONS) == REGISTERED
    compared = list_recipes(ROOT / "configuration" / "comparison.yaml")
    assert {load_recipe(name).model["type"] for name in compared} == REGISTERED
    assert {config.model_type for config, _ in SYSTEMS.values()} == REGISTERED


@every_case(("name", "size"), SIZES)
def test_floats_are_those_that_the_paper_prints(name, size):
    floats = build_config(name, size).memory_floats()
    assert f"| {floats:,} |" in systems_page()
    if size.printed is not None:
        # Paper: some are sums of parts that were rounded before.
        assert floats / 1e6 == pytest.approx(size.printed, abs=0.1)


@every_case("name", read_systems())
def test_the_page_says_what_is_carried_and_leads_to_the_code(name):
    text, system = systems_page(), read_systems()[name]
    section = text.split(f"\n## {system.name}\n")[1].split("\n## ")[0]
    assert system.carries in section
    assert len(re.findall(r"^- ", section, re.MULTILINE)) == len(system.differs) > 0
    links = re.findall(r"\]\((?!http)([^)]+)\)", section)
    assert len(links) == len(system.code) > 0
    for link in links:
        assert (ROOT / "model_cards" / link).is_file()
    assert f"modeling_{name}.py" in system.code


@pytest.mark.parametrize("name", [*EACH, "plain_transformer"])
def test_one_template_serves_every_system(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    text = write_card(tmp_path, None).read_text(encoding="utf-8")
    system = read_systems()[model.config.model_type]
    assert f"\n# {system.name}\n" in text
    assert f"Carried from window to window: {system.carries}." in text
    memory = describe_memory(model.config)
    assert memory in text
    assert f"| {model.config.memory_floats():,} |" in memory
    assert not re.search(r"[${}]", memory)
    assert CITATIONS[model.config.model_type].strip() in text
