"""Names and prose of the project use the terms of PyTorch, transformers and the papers."""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folders that are not checked yet.
FOLDERS_TO_DO = {"tests"}

# Files that quote the words below.
QUOTING_FILES = {"tests/test_plain_english.py"}

# Names that say nothing to a reader of PyTorch code, and better ones. "" is: remove, or rename.
NAMES = {
    "Apart": "PerLayerModules",
    "EndedRows": "FinishedRows",
    "FLOOR": "NULL_KEY_SCORE",
    "Found": "AttentionOutput",
    "FullWindow": "WindowSnapshot",
    "HIDDEN": "MASK_VALUE",
    "KeepNothing": "EmptyMixer",
    "KeepSummaries": "IdentityMixer",
    "Kept": "LruCache",
    "LayerBeforeSide": "SlidingWindowWithSideLayer",
    "NOWHERE": "NO_POSITION",
    "OURS": "CACHE_LAYER_CLASSES",
    "OpenChunk": "MidWindowStep",
    "OpenPlan": "MidWindowPlan",
    "Past": "AttendableTokens",
    "SideBySide": "StackedParameters",
    "WritingChunk": "InPlaceChunk",
    "_anew": "_padded_copy",
    "_as_it_was": "_memory_at",
    "_is_there": "_shares_storage",
    "_ways": "_gather_scatter_indices",
    "amid": "",
    "anew": "",
    "are_within": "all_mid_window",
    "as_attended": "identity",
    "begins": "first_token_range, start",
    "behind": "append",
    "carry_forward": "fill_padding_with_last_hidden",
    "changed_by_closing": "window_end_fields",
    "consult_queue": "attend_long_term",
    "emptied": "empty_slots",
    "family_of": "common_layer_class",
    "figures": "metrics",
    "fill": "window_offset",
    "flowed": "outputs",
    "flowing": "inputs",
    "fold_empty": "merge_empty_slots",
    "from_the_beginning": "hide_empty_slots",
    "hide_blind": "mask_targets_before_first_token",
    "in_type": "cast",
    "is_plain": "has_unmodified_forward",
    "is_sealed": "is_locked_inference_tensor",
    "journal": "window_snapshots",
    "keep_newest": "zero_all_but_last",
    "knows_output": "has_last_hidden",
    "lanes": "num_packed_rows",
    "last_whole_checkpoint": "last_complete_checkpoint",
    "leave_out": "set_dropped_windows",
    "line_up": "left_align",
    "look_far": "attend_memory",
    "make_known": "register_auto_classes",
    "mark_whole": "mark_complete",
    "mean_size": "mean_rms",
    "only_one": "exclusive_lock",
    "parted": "split_rows",
    "pays": "is_expected_faster",
    "plan_unseen": "plan_for_tracing",
    "put_rows": "index_copy_rows",
    "reads_diagonally": "should_use_wavefront",
    "received": "attention_received",
    "remember": "record_snapshot",
    "restart": "reset_rows",
    "riding": "extras",
    "shut": "end_call",
    "slide": "append_fifo",
    "so_far": "open_window_slots",
    "streams": "layer_inputs",
    "summaries_of_the_past": "recurrent_fields",
    "take_off_wrappers": "unwrap_fsdp",
    "together": "group_by_position",
    "told": "metrics, message",
    "trouble": "problem",
    "trouble_of": "invalid_reason",
    "where_closed": "select_at_window_end",
    "where_opened": "select_at_window_start",
    "where_seeing": "mask_output",
    "why_not": "unsupported_reason",
    "widened": "pad_to_shape",
    "windows_held": "num_windows_in_memory",
    "within": "is_mid_window",
    "zero_if_blind": "zero_fully_masked",
}
PREFIXES = {"refuse_": "check_"}

# Names that are allowed in a file, with the reason.
ALLOWED_NAMES = {
    ("melodi_hf/models/memory_file.py", "fill"): "a key of the JSON in memory files",
    ("melodi_hf/data/prepared.py", "journal"): "the file journal.jsonl, a journal as of databases",
}

# Phrases in comments, docstrings, messages and documents, and what to write instead.
PHRASES = {
    r"whoever|whosoever|whomever": "name the user, caller or process",
    r"nobody|anybody|somebody": "name the user, or use the passive voice",
    r"amid": "within, during",
    r"anew": "again",
    r"(?:of|in) one's own": "custom, separate",
    r"(?:a|an|the) \w+ of (?:my|your|our) own": "your own ..., a custom ...",
    r"(?:go|goes|going|gone|went) on (?:by|from|with|where|behind|at)": "continue, resume",
    r"gone on|go on": "continue, resume",
    r"(?:is|are|was|were|be|being) told|told of|tells? of": "report, log, print",
    r"number for number|bit for bit": "exactly, bit-exactly, to 1e-5",
    r"(?:two )?faces of one thing": "pass only one of",
    r"(?:tear|tears|torn) (?:rows|apart|from)": "separate",
    r"dealt (?:out|over)|deals? (?:out|its rows)": "shard, split, assign",
    r"leans? on": "relies on",
    r"models? of minutes": "models trained for minutes",
    r"at hand": "available",
    r"by whatever means|however it be": "remove",
    r"of the (?:day|hour)": "current",
    r"give(?:s|n)? (?:its|their) word": "guarantee",
    r"keeps? no way back": "does not support",
    r"is not to be had": "is not supported",
    r"as it is given": "unchanged",
    r"makes? up for": "compensate",
    r"strange to": "unfamiliar to",
    r"would spoil": "must stay in float32",
    r"would rather": "remove",
}
PHRASE = re.compile(
    r"\b(?:" + "|".join(f"({phrase})" for phrase in PHRASES) + r")\b", re.IGNORECASE
)

# Phrases that are allowed in a file, with the reason.
ALLOWED_PHRASES = {
    ("benchmarks/kill_and_resume.py", "goes on from"): "a key of benchmarks/results",
}

MAX_FIRST_LINE = 90


def list_files(*suffixes):
    """Tracked and new files with one of the suffixes that are to be checked."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *(f"*{suffix}" for suffix in suffixes)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    to_do = tuple(f"{folder}/" for folder in FOLDERS_TO_DO)
    return [
        name
        for name in listed
        if not name.startswith(to_do) and name not in QUOTING_FILES and (ROOT / name).is_file()
    ]


def defined_names(tree):
    """Names that a module defines (functions, classes, arguments, variables), with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def find_names(file, source):
    """Messages about the names in a file that should be others."""
    for name, line in defined_names(ast.parse(source)):
        better = NAMES.get(name)
        for prefix, replacement in PREFIXES.items():
            if name.startswith(prefix):
                better = replacement + name.removeprefix(prefix)
        if better is not None and (file, name) not in ALLOWED_NAMES:
            yield f"{file}:{line}: rename {name!r}" + (f", for example {better}" if better else "")


def python_texts(source):
    """Comments, docstrings and messages of a module, with their first lines."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string, token.start[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value, node.lineno


def markdown_texts(source):
    """The prose of a document, without its generated tables."""
    yield re.sub(r"(<!-- table).*?(<!-- end)", blank_lines, source, flags=re.DOTALL), 1


def yaml_texts(source):
    """The comments of a YAML file."""
    for number, line in enumerate(source.splitlines(), 1):
        if "#" in line:
            yield line.partition("#")[2], number


def blank_lines(match):
    """As many line ends as a match has."""
    return "\n" * match[0].count("\n")


def find_phrases(file, texts):
    """Messages about the phrases in the texts of a file that should be others."""
    for text, first in texts:
        for match in PHRASE.finditer(re.sub(r"(?<=\w)\n(?=\s*#? ?\w)", " ", text)):
            if (file, match[0].lower()) in ALLOWED_PHRASES:
                continue
            line = first + text[: match.start()].count("\n")
            better = [*PHRASES.values()][match.lastindex - 1]
            yield f"{file}:{line}: {match[0]!r}; write: {better}"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_names_are_those_of_the_field():
    wrong = [line for file in list_files(".py") for line in find_names(file, read(file))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("suffixes", "texts"),
    [
        ((".py",), python_texts),
        ((".md",), markdown_texts),
        ((".yaml", ".yml", ".cfg", ".toml", ".sh"), yaml_texts),
    ],
)
def test_prose_is_plain(suffixes, texts):
    files = list_files(*suffixes)
    wrong = [line for file in files for line in find_phrases(file, texts(read(file)))]
    assert files
    assert not wrong, "\n".join(wrong)


def test_first_lines_of_docstrings_are_short():
    wrong = []
    for file in list_files(".py"):
        for node in ast.walk(ast.parse(read(file))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if len(first) > MAX_FIRST_LINE:
                    wrong.append(f"{file}:{getattr(node, 'lineno', 1)}: {len(first)} characters")
    assert not wrong, f"at most {MAX_FIRST_LINE} characters:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def refuse_empty(x):\n    pass",
            "a.py:1: rename 'refuse_empty', for example check_empty",
        ),
        ("x = 1\ntold = x", "a.py:2: rename 'told'"),
        ("class A:\n    def f(self, held):\n        self.shut = held", "a.py:3: rename 'shut'"),
    ],
)
def test_names_are_found(source, message):
    assert any(line.startswith(message) for line in find_names("a.py", source))


@pytest.mark.parametrize(
    ("texts", "source", "message"),
    [
        (python_texts, "x = 1\n# Whoever reads it.", "a.py:2: 'Whoever'"),
        (python_texts, '"""One.\n\nA run goes\non from it."""', "a.py:3: 'goes on from'"),
        (python_texts, 'raise ValueError("it is told")', "a.py:1: 'is told'"),
        (markdown_texts, "a\n<!-- table: x -->\nanew\n<!-- end -->\nanew", "a.py:5: 'anew'"),
        (yaml_texts, "a: amid\nb: 1  # amid", "a.py:2: 'amid'"),
    ],
)
def test_phrases_are_found(texts, source, message):
    found = list(find_phrases("a.py", texts(source)))
    assert len(found) == 1
    assert found[0].startswith(message)


@pytest.mark.parametrize(("file", "name"), ALLOWED_NAMES)
def test_allowed_names_are_there(file, name):
    assert name in {each for each, _ in defined_names(ast.parse(read(file)))}


@pytest.mark.parametrize(("file", "phrase"), ALLOWED_PHRASES)
def test_allowed_phrases_are_there(file, phrase):
    assert phrase in {
        match[0] for text, _ in python_texts(read(file)) for match in PHRASE.finditer(text)
    }
