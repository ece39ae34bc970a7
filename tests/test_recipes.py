"""A recipe says everything that a run depends on, and nothing that no one reads."""

import json
import re
from itertools import takewhile
from pathlib import Path

import pytest
import torch
import yaml
from parts.recipe import check_files, list_recipes, load_recipe, run_name, without_expectation
from transformers import AutoModelForCausalLM

from melodi_hf.data.text import Document

from .cases import every_case

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for path in (ROOT / "configuration").rglob("*.yaml")
    if path.parent.name != "accelerate"  # files of another kind
)
RECIPES = [name for file in FILES for name in list_recipes(file)]
FOLDERS = {}  # of a folder or a table: its recipes
for file in FILES:
    recipes = list_recipes(file)
    folder = file.parent if len(recipes) == 1 else file
    FOLDERS.setdefault(folder.relative_to(ROOT).as_posix(), []).extend(recipes)
QUICKSTART = ROOT / "configuration" / "quickstart.yaml"


@pytest.mark.parametrize("folder", FOLDERS)
def test_recipes_build_their_models(folder):
    built = set()
    for name in FOLDERS[folder]:
        recipe = load_recipe(name)
        config = recipe.model_config()
        if config.to_json_string() not in built:
            built.add(config.to_json_string())
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            assert model.num_parameters() > 0, name
        assert json.loads(json.dumps(recipe.as_dict()))["training"]["seed"] == recipe.training.seed


def test_no_two_recipes_run_under_one_name():
    assert len(set(map(run_name, RECIPES))) == len(RECIPES)


def test_heads_give_command_cost_and_number():
    for file in FILES:
        lines = file.read_text(encoding="utf-8").splitlines()
        head = "\n".join(takewhile(lambda line: line.startswith("#"), lines))
        assert f"#   python training/train.py {file.relative_to(ROOT).as_posix()}" in head
        assert "minutes" in head or "hours" in head, file
        assert "Expect" in head, file


def test_values_are_those_of_the_file():
    given = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    recipe = load_recipe(QUICKSTART)
    assert recipe.training.steps == given["training"]["steps"]
    assert recipe.training.learning_rate == float(given["training"]["learning_rate"])
    assert recipe.model_config().hidden_size == given["model"]["hidden_size"]
    assert recipe.data.files == ()


@every_case(
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


@every_case(
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
        ("training.log_every=100000", "nothing would be logged; add --set training.log_every=N"),
        ("training.seed=4294967296", "4294967296: it should be 4294967295 or less"),
        ("training.steps=[", "is not YAML"),
        ("model.type=mamba3", "model.type is 'mamba3': allowed are plain_transformer, transf"),
        ("model.type=meloddi", "did you mean 'melodi'"),
        ("model.type=llama", "model.type is 'llama': allowed are"),
        ("model.type=null", "model.type is None: allowed are"),
        ("model.type=[melodi]", "model.type is .'melodi'.: did you mean 'melodi'"),
        ("model.window_length=0", "window_length is 0"),
        ("model.hidden_size=wide", "hidden_size"),
        ("data.segment_length=100", "not a multiple of model.window_length, 64: use 64"),
        ("tokenizer.vocab_size=null", "it should be of type int"),
    ],
)
def test_wrong_values_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(QUICKSTART, [change])


@every_case("steps", [1, 5, 9, 10, 11])
def test_a_short_run_is_logged_at_its_end(steps):
    recipe = load_recipe(QUICKSTART, [f"training.steps={steps}"])
    assert (recipe.training.steps, recipe.training.log_every) == (steps, min(10, steps))
    with pytest.raises(ValueError, match="nothing would be logged"):
        load_recipe(QUICKSTART, [f"training.steps={steps}", "training.log_every=12"])


@every_case(
    ("changes", "kept"),
    [
        ([], True),
        (["data.files=a.txt", "data.test_files=[b.txt]"], True),
        (["tokenizer.path=a/b"], True),
        (["training.steps=5", "expect.perplexity=99"], True),
        (["training.steps=5"], False),
        (["training.seed = 1"], False),
        (["data.files=a.txt", "evaluation.max_documents=1"], False),
    ],
    ids=str,
)
def test_a_changed_recipe_is_not_expected_to_reach_its_number(changes, kept):
    recipe = load_recipe(QUICKSTART, changes)
    assert (without_expectation(recipe, changes).expect == recipe.expect) is kept


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
    with pytest.raises(ValueError, match="training lacks seed"):
        load_recipe(path)


def test_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(QUICKSTART.read_text() + "  \nexpect: {perplexity: 1.0, spread: 1.0}\n")
    with pytest.raises(ValueError, match="expect occurs twice"):
        load_recipe(path)


def test_recipe_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="there is no recipe"):
        load_recipe("configuration/missing.yaml")


@every_case("missing", ["missing.yaml", "configuration/quickstat.yaml", "gpu_1.yaml"])
@every_case("folder", [".", "training"])
def test_only_recipes_are_offered_wherever_one_stands(missing, folder, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    with pytest.raises(ValueError, match=r"there is no recipe .*; available: ") as error:
        load_recipe(missing)
    names = re.findall(r"[\w./]+\.yaml", str(error.value).partition("; available: ")[2])
    assert names
    for name in names:
        assert list_recipes(Path(name)), "a recipe or a table"
    if "quickstat" in missing:
        assert names[0].endswith("configuration/quickstart.yaml")


def test_files_that_are_no_recipes_are_named(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: \xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.yaml is not UTF-8 .*: save it as UTF-8"):
        load_recipe(path)
    gpu = ROOT / "configuration" / "accelerate" / "gpu_1.yaml"
    with pytest.raises(ValueError, match=r"gpu_1\.yaml has no key 'compute_environment'"):
        load_recipe(gpu)


@every_case(
    ("changes", "message"),
    [
        (["data.source=owner/name", "data.files=a.txt"], "data.files is given, but data.source is"),
        (["tokenizer.path=nowhere"], "a tokenizer of the Hub as owner/name"),
        (["data.source=files"], r"data.files is empty: add --set data.files=PATH"),
        (["data.files=a.txt"], "data.files is given, but data.source is standard_library"),
        (["data.source=pg19"], "owner/name"),
        (["tokenizer.path=nowhere/at/all"], "does not exist"),
    ],
)
def test_files_that_are_not_named_or_not_there_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_files(load_recipe(QUICKSTART, changes))


def test_tokenizer_of_the_hub_may_be_named():
    check_files(load_recipe(QUICKSTART, ["tokenizer.path=google-t5/t5-base"]))


def test_documents_of_c4_are_tested_on_its_validation_split(monkeypatch):
    asked = []

    def read_documents(**given):
        asked.append((given["name"], given["config_name"], given["split"]))
        return iter([Document("a", "text")])

    monkeypatch.setattr("parts.recipe.read_documents", read_documents)
    for source in ("allenai/c4", "emozilla/pg19"):
        recipe = load_recipe(QUICKSTART, [f"data.source={source}", "data.subset=en"])
        for split in ("train", "validation", "test"):
            list(recipe.documents(split))
    assert asked == [
        ("allenai/c4", "en", "train"),
        ("allenai/c4", "en", "validation"),
        ("allenai/c4", "en", "validation"),
        ("emozilla/pg19", "en", "train"),
        ("emozilla/pg19", "en", "validation"),
        ("emozilla/pg19", "en", "test"),
    ]


# Tables


ROWS = {
    "as_it_is": {},
    "without_long_memory": {"model.long_memory_layers": [], "expect.perplexity": 27.5},
}


def write_table(folder, base=QUICKSTART, rows=ROWS, **others):
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump({"base": str(base), "rows": rows, **others}))
    return path


def test_row_is_its_base_with_its_own_keys(tmp_path):
    table = write_table(tmp_path)
    assert list_recipes(table) == [f"{table}:as_it_is", f"{table}:without_long_memory"]
    base = load_recipe(QUICKSTART).as_dict()
    assert load_recipe(f"{table}:as_it_is").as_dict() == base
    row = load_recipe(f"{table}:without_long_memory").as_dict()
    assert row["model"].pop("long_memory_layers") == []
    assert row["expect"].pop("perplexity") == 27.5
    del base["model"]["long_memory_layers"], base["expect"]["perplexity"]
    assert row == base


def test_set_goes_before_the_row(tmp_path):
    name = f"{write_table(tmp_path)}:without_long_memory"
    recipe = load_recipe(name, ["model.long_memory_layers=[2]", "training.seed=5"])
    assert list(recipe.model_config().long_memory_layers) == [2]
    assert (recipe.training.seed, recipe.expect.perplexity) == (5, 27.5)


def test_base_is_looked_for_beside_the_table(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.yaml").write_text(QUICKSTART.read_text())
    assert load_recipe(f"{write_table(tmp_path, 'recipes/a.yaml')}:as_it_is").training.steps == 800


def test_rows_run_under_names_of_their_own():
    assert run_name("configuration/quickstart.yaml") == "quickstart"
    assert run_name(Path("configuration/ablations.yaml:S8_L0")) == "ablations_S8_L0"


@every_case(
    ("given", "row", "message"),
    [
        ({}, ":without_long_memroy", "no row 'without_long_memroy'.*:without_long_memory"),
        ({}, "", "is a table: choose one of its rows, .*:as_it_is, .*:without_long_memory"),
        ({}, ":", "is a table: choose one of its rows"),
        ({"basis": 1}, ":as_it_is", "has no key 'basis': did you mean 'base'"),
        ({"base": "missing.yaml"}, ":as_it_is", "there is no recipe .*missing.yaml"),
        ({"base": "table.yaml"}, ":as_it_is", "the base of .* is a table, table.yaml"),
        ({"rows": ["a"]}, ":a", "should hold rows, each {section.key: value}"),
        ({"rows": {"a": None}}, ":a", "should hold rows, each {section.key: value}"),
        ({"rows": {"a": {"steps": 1}}}, ":a", "row a: write section.key"),
        ({"rows": {"a": {"trains.steps": 1}}}, ":a", "row a: .* did you mean 'training'"),
        ({"rows": {"a": {"training.step": 1}}}, ":a", "did you mean 'steps'"),
    ],
)
def test_tables_and_rows_that_cannot_be_read_are_refused(tmp_path, given, row, message):
    table = write_table(tmp_path, **given)
    with pytest.raises(ValueError, match=message):
        load_recipe(f"{table}{row}")


def test_recipe_has_no_rows():
    with pytest.raises(ValueError, match="is a recipe, not a table: leave out :S8_L0"):
        load_recipe(f"{QUICKSTART}:S8_L0")


def test_recipe_that_is_nearly_there_is_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"available: configuration/quickstart\.yaml"):
        load_recipe("configuration/quikstart.yaml")
