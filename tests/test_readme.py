"""Promise: what the README shows runs, and what it links to exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from melodi_hf.data.text import Document
from melodi_hf.data.tokens import train_tokenizer

from .cases import every_case
from .hub import USER, Hub
from .models import build

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = Path(os.__file__).read_text(encoding="utf-8")

CHECKS = f"""
assert melodi_hf.MelodiCache.load("book.memory").get_seq_length() > 5000
assert answer.shape[1] > 20
assert torch.isfinite(out.loss)
again = AutoModelForCausalLM.from_pretrained("{USER}/melodi-tuned", trust_remote_code=True)
tuned = AutoModelForCausalLM.from_pretrained("runs/tuned")
assert all(map(torch.equal, again.parameters(), tuned.parameters()))
"""


@pytest.fixture
def folder(tmp_path):
    """What the README's reader has: a run, a book and notes."""
    tokenizer = train_tokenizer([Document("os", TEXT)], 300, progress=False)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    run = tmp_path / "runs" / "quickstart"
    build("melodi", vocab_size=len(tokenizer), **special).save_pretrained(run)
    tokenizer.save_pretrained(run)
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "notes").mkdir()
    for i in range(3):
        (tmp_path / "notes" / f"{i}.txt").write_text(TEXT[5000 * i :][:5000], encoding="utf-8")
    return tmp_path


def test_code_runs_from_top_to_bottom(folder):
    """As one program, in a folder with what it names, on a Hub of its own."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    code = "\n".join([*blocks, CHECKS]).replace("you/melodi", f"{USER}/melodi")
    (folder / "readme.py").write_text(code, encoding="utf-8")
    with Hub() as hub:
        environment = hub.environment(folder / "home") | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "readme.py"]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ tokens read, \d+ bytes of memory", done.stdout)


@pytest.mark.slow
def test_section_on_training_runs_line_by_line(folder):
    section = README.split("## Training and evaluation")[1].split("\n## ")[0]
    lines = re.search(r"```\n(.*?)```", section, re.DOTALL)[1].splitlines()
    assert len(lines) >= 9
    for name in ("configuration", "training", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    told = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for line in lines:
        done = subprocess.run(
            line, shell=True, cwd=folder, env=told, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr[-3000:]}"
    for left in ("short", "two", "launched"):
        assert (folder / "runs" / left / "results.json").is_file()
    assert list((folder / "runs" / "plots").glob("*.png"))


@every_case("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_link_leads_somewhere(link):
    assert (ROOT / link).exists()


def test_it_is_short():
    assert len(README.splitlines()) <= 200
