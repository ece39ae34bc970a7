"""What is saved carries its code: it works, and is saved again, where there is no melodi_hf."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, pipeline

import melodi_hf.models
from melodi_hf.data.text import Document
from melodi_hf.data.tokens import train_tokenizer

from .models import EACH, assert_near, build
from .remote_user import SMOOTHING, TEXT, generate, write

MODELS = Path(melodi_hf.models.__file__).parent
# The program that loads all models runs once, not once in each process of pytest-xdist.
pytestmark = pytest.mark.xdist_group("remote_code")

SYSTEMS = {
    "melodi": "Melodi",
    "transformer_xl": "TransformerXL",
    "plain_transformer": "PlainTransformer",
    "compressive_transformer": "CompressiveTransformer",
    "block_recurrent": "BlockRecurrent",
    "elastic_memory": "ElasticMemory",
    "memorizing_transformer": "MemorizingTransformer",
}
BUILT_ON = {"plain_transformer": ["modeling_transformer_xl.py"]}
IDS = torch.arange(1, 22)[None] * 7 % 61


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document("a", TEXT)], 300, progress=False)


@pytest.fixture(scope="module")
def models(tokenizer):
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    return {name: build(name, vocab_size=len(tokenizer), **special) for name in EACH}


@pytest.fixture(scope="module")
def seen(models, tokenizer, tmp_path_factory):
    """What a process that cannot import the package sees of the saved models."""
    arguments, root = [], tmp_path_factory.mktemp("remote")
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        arguments += [str(root / name), str(root / f"{name}_again"), json.dumps(IDS.tolist())]
    program = Path(__file__).with_name("remote_user.py")
    subprocess.run(
        [sys.executable, str(program), *arguments],
        cwd=root,
        env=os.environ | {"HF_MODULES_CACHE": str(root / "modules")},
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=300,
    )
    return {name: json.loads((root / f"{name}_again/seen.json").read_text()) for name in EACH}


def imported(file):
    """The files that a module imports, and what these import in turn."""
    tree = ast.parse((MODELS / file).read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = {f"{node.module}.py" for node in nodes}
    return names.union(*(imported(name) for name in names))


def save_by_trainer(model, folder):
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    Trainer(model, arguments).save_model(str(folder))


WAYS = {
    "whole": lambda model, folder: model.save_pretrained(folder),
    "headless": lambda model, folder: model.model.save_pretrained(folder),
    "checkpoint": save_by_trainer,
}


def auto_map(name):
    system = SYSTEMS[name]
    return {
        "AutoConfig": f"configuration_{name}.{system}Config",
        "AutoModel": f"modeling_{name}.{system}Model",
        "AutoModelForCausalLM": f"modeling_{name}.{system}ForCausalLM",
        "AutoModelForDecision": f"modeling_{name}.{system}ForCausalLM",
    }


@pytest.mark.parametrize(
    ("name", "way"),
    [*(("melodi", way) for way in WAYS), *((n, "headless") for n in SYSTEMS if n != "melodi")],
)
def test_folder_holds_the_code_of_its_system_and_no_other(name, way, tmp_path):
    WAYS[way](build(name), tmp_path)  # a new one: what was saved before would be remembered
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == auto_map(name)
    code = {path.name: path.read_text() for path in tmp_path.glob("*.py")}
    own = f"modeling_{name}.py"
    assert code.keys() == {own} | imported(own)
    assert code == {file: (MODELS / file).read_text() for file in code}
    assert "meliad.py" not in code
    modeling = {file for file in code if file.startswith("modeling_")}
    assert modeling == {own, *BUILT_ON.get(name, ())}


def test_what_is_a_neighbour_is_found():
    """The last test would pass on an `imported` that finds nothing."""
    assert imported("modeling_melodi.py") >= {"decoder.py", "windows.py", "cache.py"}


@pytest.mark.parametrize("name", EACH)
def test_code_is_refused_without_trust_and_the_tokenizer_is_not(seen, tokenizer, name):
    for told in seen[name]["refused"].values():
        assert "pass the argument `trust_remote_code=True` to allow custom code" in told
    assert seen[name]["encoded"] == [tokenizer(TEXT).input_ids] * 2


@pytest.mark.parametrize("name", EACH)
def test_model_is_the_same_without_the_package(seen, models, name):
    model, without = models[name], seen[name]
    parts = model.config, model.model, model
    assert without["classes"] == [type(part).__name__ for part in parts]
    config = model.config
    assert without["config"] == [config.model_type, config.memory_floats(), config.logit_scale]
    with torch.no_grad():
        assert_near(torch.tensor(without["logits"]), model(IDS).logits, atol=1e-6)
        hidden = model.model(IDS).last_hidden_state
    assert_near(torch.tensor(without["hidden"]), hidden, atol=1e-6)
    assert without["generated"] == generate(model, IDS)
    assert without["generated"][: IDS.shape[1]] == IDS[0].tolist()


@pytest.mark.parametrize("name", EACH)
def test_pipeline_writes_the_same_without_the_package(seen, models, tokenizer, name):
    generator = pipeline("text-generation", model=models[name], tokenizer=tokenizer)
    assert seen[name]["written"] == write(generator)


@pytest.mark.parametrize("name", EACH)
def test_copies_of_copies_work(seen, name):
    again = seen[name]["again"]
    assert again.keys() == {"whole", "headless", "inner"}
    for way, generated in again.items():
        assert generated == seen[name]["generated"]
        assert f".{way}." in seen[name]["code_of_copies"][way]


@pytest.mark.parametrize("name", EACH)
def test_label_smoothing_shifts_the_labels_without_the_package(seen, models, name):
    with torch.no_grad():
        logits = models[name](IDS).logits[0, :-1]
    surprise = -logits.log_softmax(-1)
    plain = F.cross_entropy(logits, IDS[0, 1:])
    expected = (1 - SMOOTHING) * plain + SMOOTHING * surprise.mean()
    assert seen[name]["smoothed_loss"] == pytest.approx(expected.item(), rel=1e-5)
