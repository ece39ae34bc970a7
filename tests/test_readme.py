"""Promise: what the README shows runs, and what it links to exists."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_runs_from_top_to_bottom():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["answer"].shape == (1, 7 + 20)
    assert names["cache"].get_seq_length() == 5000 + 7 + 19
    assert torch.isfinite(names["out"].loss)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_link_leads_somewhere(link):
    assert (ROOT / link).exists()


def test_it_is_short():
    assert len(README.splitlines()) <= 200
