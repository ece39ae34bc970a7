"""A recipe says everything that a run depends on, and nothing that nobody reads."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from recipe import check_files, load_recipe
from transformers import AutoModelForCausalLM

RECIPES = sorted((Path(__file__).parents[1] / "configuration").glob("*.yaml"))
QUICKSTART = next(path for path in RECIPES if path.stem == "quickstart")


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_recipe_builds_its_model(path):
    config = load_recipe(path).model_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() > 0


def test_head_tells_command_cost_and_number(path):
    head = path.read_text(encoding="utf-8").split("\nmodel:")[0]
    assert f"python training/train.py configuration/{path.name}" in head
    assert "minutes" in head
    assert "Expect" in head


def test_recipe_survives_json(path):
    recipe = load_recipe(path)
    assert json.loads(json.dumps(recipe.as_dict()))["training"]["seed"] == recipe.training.seed


def test_values_are_those_of_the_file():
    given = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    recipe = load_recipe(QUICKSTART)
    assert recipe.training.steps == given["training"]["steps"]
    assert recipe.training.learning_rate == float(given["training"]["learning_rate"])
    assert recipe.model_config().hidden_size == given["model"]["hidden_size"]
    assert recipe.data.files == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.step=1", "did you mean 'steps'"),
        ("evaluations.seed=1", "did you mean 'evaluation'"),
        ("model.hiden_size=8", "did you mean 'hidden_size'"),
        ("evaluation.nothing_like_it=1", "allowed are max_documents"),
    ],
)
def test_unknown_keys_are_refused_with_a_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(QUICKSTART, [change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.steps", "write section.key=value"),
        ("training=1", "write section.key=value"),
        ("training.steps=many", "training.steps is 'many': it should be of type int"),
        ("training.steps=true", "training.steps is True"),
        ("training.steps=0", "training.steps is 0: it should be 1 or more"),
        ("training.weight_decay=-1", "it should be 0 or more"),
        ("training.learning_rate=.nan", "it should be 0 or more"),
        ("training.optimizer=sgd", "allowed are adamw, adafactor"),
        ("training.log_every=100000", "nothing would be logged"),
        ("training.steps=[", "is not YAML"),
        ("model.type=mamba3", "model.type is 'mamba3'"),
        ("model.window_length=0", "window_length is 0"),
        ("model.hidden_size=wide", "hidden_size"),
        ("data.segment_length=100", "not a multiple of model.window_length, 64: take 64"),
        ("tokenizer.vocab_size=null", "it should be of type int"),
    ],
)
def test_wrong_values_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(QUICKSTART, [change])


def test_set_reads_values_as_yaml():
    changes = {
        "training.learning_rate=1e-3": lambda r: r.training.learning_rate == 1e-3,
        "training.learning_rate=1": lambda r: r.training.learning_rate == 1.0,
        "training.gradient_checkpointing=true": lambda r: r.training.gradient_checkpointing is True,
        "data.files=[a.txt, b.txt]": lambda r: r.data.files == ("a.txt", "b.txt"),
        "data.files=a=b.txt": lambda r: r.data.files == ("a=b.txt",),
        "data.max_documents=null": lambda r: r.data.max_documents is None,
        "model.long_memory_layers=[]": lambda r: list(r.model_config().long_memory_layers) == [],
    }
    for change, holds in changes.items():
        assert holds(load_recipe(QUICKSTART, [change])), change
    recipe = load_recipe(QUICKSTART, ["training.seed=1", "training.seed=2"])
    assert recipe.training.seed == 2, "the last one counts"


def test_recipe_that_leaves_a_key_out_is_refused(tmp_path):
    given = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    del given["training"]["seed"]
    path = tmp_path / "forgetful.yaml"
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(ValueError, match="training leaves out seed"):
        load_recipe(path)


def test_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(QUICKSTART.read_text() + "  \nexpect: {perplexity: 1.0, spread: 1.0}\n")
    with pytest.raises(ValueError, match="expect stands twice"):
        load_recipe(path)


def test_recipe_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="there is no recipe"):
        load_recipe("configuration/missing.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.source=files"], r"data.files names no file: add --set data.files=PATH"),
        (["data.files=a.txt"], "data.files is given, but data.source is standard_library"),
        (["data.source=pg19"], "owner/name"),
        (["tokenizer.path=nowhere/at/all"], "does not exist"),
    ],
)
def test_files_that_are_not_named_or_not_there_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_files(load_recipe(QUICKSTART, changes))
