"""Load and check recipes: YAML files that state everything a run depends on, in sections.

    model       `type`, and fields of that type's configuration
    data        documents, and the length of a segment
    tokenizer   path of a tokenizer, or vocabulary size of a new one
    training    steps, rows, optimiser, schedule, precision, seed
    evaluation  measurements at the end
    expect      the perplexity that the run must reach, and the tolerance

Only fields of the model have defaults. Missing and unknown keys raise an error, so that the file
alone documents the run. Everything is checked when the file is read; errors are `ValueError`s.

Overriding `training.steps` also lowers `training.log_every` to it, so that short runs are logged.

Experiments that differ in a few keys are rows of a table file; each row is a recipe,
`table.yaml:row`:

    base        the recipe to start from, relative to the table
    rows        for each row the keys in which it differs: {section.key: value}
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

import melodi_hf  # noqa: F401  registers the models in CONFIG_MAPPING
from melodi_hf.data.text import Source, read_documents, standard_library_documents
from melodi_hf.evaluation.command_line import MAX_SEED, read_text
from melodi_hf.evaluation.systems import read_systems

WITHOUT_TEST_SPLIT = ("allenai/c4",)  # datasets that are evaluated on their validation split


@dataclass(frozen=True)
class Data:
    """The documents."""

    source: str  # standard_library, files, or the name of a dataset on the Hub, owner/name
    subset: str | None  # configuration of the Hub dataset, e.g. en of allenai/c4
    files: tuple[str, ...]  # to train on
    validation_files: tuple[str, ...]  # for evaluation during training, if evaluate_every is not 0
    test_files: tuple[str, ...]
    max_documents: int | None  # for training; null: all
    min_tokens: int  # shorter documents are skipped; 0: none
    segment_length: int  # tokens per row and step


@dataclass(frozen=True)
class Tokenizer:
    """Loaded, or trained as byte-level BPE on the training documents."""

    path: str | None  # a folder, or owner/name on the Hub; null: train one
    vocab_size: int  # of a tokenizer that is trained


@dataclass(frozen=True)
class Training:
    """Steps, rows, optimiser and schedule."""

    steps: int
    num_rows: int  # batch size per device, in documents
    gradient_accumulation_steps: int
    optimizer: Literal["adamw", "adafactor"]
    schedule: Literal["cosine", "linear", "paper"]
    learning_rate: float  # the peak
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float  # 0: no clipping
    precision: Literal["float32", "bfloat16"]
    gradient_checkpointing: bool
    log_every: int  # steps
    save_every: int  # steps
    evaluate_every: int  # steps between evaluations on the validation documents; 0: none
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of test documents, and the continuation of the longest of them."""

    max_documents: int | None  # null: all
    segment_windows: int  # windows per forward
    num_rows: int  # batch size, in documents
    read_tokens: int  # tokens read before the continuation; 0: none
    new_tokens: int


@dataclass(frozen=True)
class Expect:
    """The result that the run must reach."""

    perplexity: float | None  # per token, memory carried; null: not known yet
    spread: float | None  # tolerance


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    model: dict[str, Any]
    data: Data
    tokenizer: Tokenizer
    training: Training
    evaluation: Evaluation
    expect: Expect

    def model_config(self, **from_tokenizer: Any) -> PreTrainedConfig:
        """Make the model's configuration; the recipe takes precedence over the tokenizer."""
        return make_config({**from_tokenizer, **self.model})

    def documents(self, split: Literal["train", "validation", "test"]) -> Source:
        """Return the documents of one split."""
        data, train = self.data, split == "train"
        limit = data.max_documents if train else self.evaluation.max_documents
        limits: dict[str, Any] = {"limit": limit, "min_tokens": data.min_tokens}
        if data.source == "standard_library":  # too small for a validation split
            return standard_library_documents("train" if train else "test", **limits)
        if data.source == "files":
            files = {"train": data.files, "validation": data.validation_files}
            return read_documents(files.get(split, data.test_files), **limits)
        if split == "test" and data.source in WITHOUT_TEST_SPLIT:
            split = "validation"
        return read_documents(name=data.source, config_name=data.subset, split=split, **limits)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


SECTIONS = {
    "data": Data,
    "tokenizer": Tokenizer,
    "training": Training,
    "evaluation": Evaluation,
    "expect": Expect,
}
NAMES = ["model", *SECTIONS]
BASE, ROWS = "base", "rows"  # the keys of a table
NAMES_OF_FILES = {"data.files", "data.validation_files", "data.test_files", "tokenizer.path"}
CONFIGURATION = Path(__file__).resolve().parents[2] / "configuration"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name


class Loader(yaml.SafeLoader):
    """YAML loader that reads 1e-3 as a number and raises for duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} occurs twice in one section")
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_recipe(name: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe, or a row as `table.yaml:row`, and apply `section.key=value` changes."""
    given = read_sections(name)
    for change in changes:
        apply_change(given, change)
    check_keys(given, NAMES, f"the recipe {name}")
    for section, value in given.items():
        if not isinstance(value, dict):
            raise ValueError(f"{section} should be a section with keys, not {value!r}")
    sections = {key: read_section(kind, given[key], key) for key, kind in SECTIONS.items()}
    recipe = Recipe(model=check_model(given["model"]), **sections)
    keys = changed_keys(changes)
    if "training.steps" in keys and "training.log_every" not in keys:
        training = recipe.training
        log_every = min(training.log_every, training.steps)
        recipe = replace(recipe, training=replace(training, log_every=log_every))
    check_together(recipe)
    return recipe


def changed_keys(changes: Sequence[str]) -> set[str]:
    return {change.partition("=")[0].strip() for change in changes}


def without_expectation(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """Remove the expected perplexity if the changes make the recipe another experiment.

    Changing file names or `expect` itself keeps it.
    """
    keys = changed_keys(changes)
    if keys <= NAMES_OF_FILES or any(key.startswith("expect.") for key in keys):
        return recipe
    return replace(recipe, expect=Expect(None, None))


def split_name(name: str | Path) -> tuple[Path, str]:
    """Split `table.yaml:row` into file and row; the row of a plain recipe is empty."""
    file, suffix, row = str(name).rpartition(".yaml:")
    return (Path(f"{file}.yaml"), row) if suffix else (Path(name), "")


def run_name(name: str | Path) -> str:
    """Return a unique run name for a recipe or row."""
    file, row = split_name(name)
    return f"{file.stem}_{row}" if row else file.stem


def list_recipes(file: Path) -> list[str]:
    """List the recipes of a file: the file itself, or every row of a table."""
    given = read_file(file)
    return [f"{file}:{row}" for row in given[ROWS]] if ROWS in given else [str(file)]


def read_sections(name: str | Path) -> dict[str, Any]:
    """Read the sections of a recipe without checks; a row overrides keys of its base."""
    file, row = split_name(name)
    given = read_file(file)
    if ROWS not in given:
        if row:
            raise ValueError(f"{file} is a recipe, not a table: leave out :{row}")
        return given
    changes = row_changes(given, file, row)
    base = read_file(file.parent / str(given[BASE]))
    if ROWS in base:
        raise ValueError(f"the base of {file} is a table, {given[BASE]}: use a recipe as base")
    for key, value in changes.items():
        set_key(base, str(key), value, f"{file}, row {row}")
    return base


def row_changes(table: dict[str, Any], file: Path, row: str) -> dict[str, Any]:
    """Return the keys in which a row differs from its base; raise if the row does not exist."""
    check_keys(table, [BASE, ROWS], f"the table {file}")
    rows = table[ROWS]
    if not isinstance(rows, dict) or not all(isinstance(keys, dict) for keys in rows.values()):
        raise ValueError(f"{file}: {ROWS} should hold rows, each {{section.key: value}}")
    if row in rows:
        return rows[row]
    near = get_close_matches(row, map(str, rows), n=3) or [str(known) for known in rows]
    problem = f"has no row {row!r}" if row else "is a table"
    raise ValueError(
        f"{file} {problem}: choose one of its rows, {format_names(f'{file}:{x}' for x in near)}"
    )


def read_file(file: Path) -> dict[str, Any]:
    if not file.is_file():
        known = known_recipes()
        near = format_names(get_close_matches(str(file), known, n=3) or known)
        raise ValueError(f"there is no recipe {file}; available: {near}")
    given = parse(read_text(file), str(file))
    if not isinstance(given, dict):
        raise ValueError(f"{file} should hold sections: {', '.join(NAMES)}")
    return given


def known_recipes() -> list[str]:
    """List recipes and tables of the repository as relative paths, the shortest first."""
    files = [file for file in CONFIGURATION.rglob("*.yaml") if file.parent.name != "accelerate"]
    return sorted(map(os.path.relpath, files), key=lambda path: (path.count(os.sep), path))


def format_names(names: Iterable[str], most: int = 5) -> str:
    """Join the first few of many names."""
    names = list(names)
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")


def parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error


def apply_change(given: dict[str, Any], change: str) -> None:
    """Set one key of the recipe; the value is YAML."""
    key, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"--set {change}: write section.key=value, for example training.steps=100")
    set_key(given, key.strip(), parse(value, f"--set {change}"), f"--set {change}")


def set_key(given: dict[str, Any], key: str, value: Any, where: str) -> None:
    section, dot, name = key.partition(".")
    if not (dot and name):
        raise ValueError(f"{where}: write section.key=value, for example training.steps=100")
    check_keys([section], NAMES, f"{where}: the recipe", complete=False)
    if isinstance(given.setdefault(section, {}), dict):
        given[section][name] = value


def check_keys(given: Iterable[str], allowed: Sequence[str], where: str, complete=True) -> None:
    """Raise for unknown keys and, if `complete`, for missing keys."""
    given = list(given)
    for key in given:
        if key not in allowed:
            near = get_close_matches(str(key), allowed, n=1)
            remedy = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{where} has no key {key!r}: {remedy}allowed are {', '.join(allowed)}"
            )
    missing = [key for key in allowed if key not in given]
    if complete and missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: a recipe states every key")


def read_section(kind: Any, given: Mapping[str, Any], name: str) -> Any:
    """Convert a section to its dataclass, with values of the declared types."""
    check_keys(given, [field.name for field in fields(kind)], name)
    return kind(
        **{f.name: convert_value(given[f.name], f.type, f"{name}.{f.name}") for f in fields(kind)}
    )


def convert_value(value: Any, kind: Any, key: str) -> Any:
    """Convert a value to its declared type: int to float, a single file to a list."""
    if isinstance(kind, UnionType):  # X | None
        return None if value is None else convert_value(value, get_args(kind)[0], key)
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(convert_value(item, str, key) for item in items)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{key} is {value!r}: allowed are {', '.join(get_args(kind))}")
        return value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{key} is {value!r}: it should be of type {kind.__name__}")
    if kind in (int, float) and not value >= 0:
        raise ValueError(f"{key} is {value}: it should be 0 or more")
    return value


def check_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """Raise for unknown fields; the configuration checks the values."""
    kind = given.get("type")
    known = list(read_systems())
    if kind not in known:
        near = get_close_matches(str(kind), known, n=1)
        remedy = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"model.type is {kind!r}: {remedy}allowed are {', '.join(known)}")
    names = [field.name for field in fields(CONFIG_MAPPING[kind])]
    check_keys(given, ["type", *names], f"model (type {kind})", complete=False)
    make_config(given)
    return dict(given)


def make_config(given: Mapping[str, Any]) -> PreTrainedConfig:
    values = {key: value for key, value in given.items() if key != "type"}
    try:
        return CONFIG_MAPPING[given["type"]](**values)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"model: {error}") from error


def check_together(recipe: Recipe) -> None:
    """Raise for values that conflict or have no effect."""
    data, training, evaluation = recipe.data, recipe.training, recipe.evaluation
    at_least_one = {
        "data.segment_length": data.segment_length,
        "training.steps": training.steps,
        "training.num_rows": training.num_rows,
        "training.gradient_accumulation_steps": training.gradient_accumulation_steps,
        "training.log_every": training.log_every,
        "training.save_every": training.save_every,
        "evaluation.segment_windows": evaluation.segment_windows,
        "evaluation.num_rows": evaluation.num_rows,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{key} is {value}: it should be 1 or more")
    window = recipe.model_config().window_length
    if data.segment_length % window:
        raise ValueError(
            f"data.segment_length is {data.segment_length}, which is not a multiple of "
            f"model.window_length, {window}: use {max(1, data.segment_length // window) * window}"
        )
    if training.log_every > training.steps:
        raise ValueError(
            f"training.log_every is {training.log_every}, but there are only {training.steps} "
            "training.steps: nothing would be logged; add --set training.log_every=N with N from 1 "
            f"to {training.steps}"
        )
    if training.seed > MAX_SEED:
        raise ValueError(f"training.seed is {training.seed}: it should be {MAX_SEED} or less")


def is_on_hub(name: str) -> bool:
    """Tell whether a name is owner/name and not a local folder."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def check_files(recipe: Recipe) -> None:
    """Raise if files are not named or do not exist."""
    data = recipe.data
    given = {"files": data.files, "test_files": data.test_files}
    if data.validation_files or recipe.training.evaluate_every:
        given["validation_files"] = data.validation_files
    for key, files in given.items():
        if data.source == "files" and not files:
            raise ValueError(f"data.{key} is empty: add --set data.{key}=PATH")
        if data.source != "files" and files:
            raise ValueError(f"data.{key} is given, but data.source is {data.source}, not files")
    if data.source not in ("files", "standard_library") and "/" not in data.source:
        raise ValueError(
            f"data.source is {data.source!r}: it should be standard_library, files, "
            "or a dataset of the Hub, owner/name"
        )
    if data.subset is not None and data.source in ("files", "standard_library"):
        raise ValueError(
            f"data.subset is {data.subset!r}, but data.source is {data.source}: "
            "only datasets of the Hub have subsets"
        )
    path = recipe.tokenizer.path
    if path is not None and not (Path(path).exists() or is_on_hub(path)):
        raise ValueError(
            f"tokenizer.path is {path}, which does not exist: "
            "pass a folder, or a tokenizer of the Hub as owner/name"
        )
    check_files_exist(recipe)


def check_files_exist(recipe: Recipe) -> None:
    """Check that the files exist, without reading them."""
    recipe.documents("train")
    recipe.documents("test")
    if recipe.training.evaluate_every:
        recipe.documents("validation")
