"""Change one place of the code at a time and note which test finds it.

    python tests/mutations.py                     # about 150 mutations, in tests/mutations.json
    python tests/mutations.py --resume            # continue a run that was interrupted
    python tests/mutations.py --summary           # found per kind and file, and what was missed
    python tests/mutations.py --number 20 --list  # print mutations without running anything

Mutations are generated from the syntax tree, with a seed, so the script needs no list of places:
it applies to any version of the code. Errors, annotations, docstrings and code that only checks
its arguments are left alone. The files of `LOW_WEIGHT` get a quarter of their share.

The tests of `FILES` (at most `--count` of each, chosen at random) first run once on unchanged code,
under coverage, to see which test executes which line and how many seconds it takes. A mutation then
runs the tests that execute its line, in the order of `FILES`, and stops at the first failure. Tests
that take longer than `--slowest` are left out, and where the rest would take more than `--budget` a
random part of it runs. All of them run in processes forked from one that has imported torch and
transformers, in a copy of the tree. `--again` runs other tests on what was not found so far.

Seconds are those of the processor, so other work on the machine does not change what is found.
"""

import argparse
import ast
import collections
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path(__file__).with_suffix(".json")
SOURCES = ("melodi_hf/models/*.py", "melodi_hf/trainer.py", "melodi_hf/data/segments.py")
# Little or no computation: checks, versions, text and sizes.
LOW_WEIGHT = re.compile(
    r"/(configuration_\w+|validation|refusals|versions|memory_file|costs|adapters|meliad|"
    r"faiss_search)\.py$"
)
FILES = (  # fast and sharp ones first; those that do not exist are skipped
    "parity",
    "generation",
    "segments",
    "forgetting",
    "training_forward",
    "crop",
    "trainer",
    "memory",
    "continue",
    "recurrent_state",
    "compression",
    "elastic_memory",
    "retrieval",
    "legs",
    "reading",
    "read_document",
    "causality",
    "dropout",
    "head",
    "initialisation",
    "kernels",
    "static",
    "attention_maps",
    "memory_files",
    "empty",
    "bad_input",
    "generate_more",
    "conversion",
    "wavefront",
    "systems",
    "costs",
    "versions",
)
PRELOADED = (
    "numpy",
    "safetensors.torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "transformers.trainer",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.masking_utils",
)
MEMORY = 6 * 2**30  # bytes that a process may hold: a mutation may never stop to append
ENOUGH = 30  # seconds to measure per file of tests
WALL = 8  # seconds on the clock allowed per second of the processor, on a machine that is shared


# ------------------------------------------------------------------------------------------------
# What can be mutated.
# ------------------------------------------------------------------------------------------------

KINDS = (
    "off by one",
    "dropped reset",
    "wrong axis",
    "swapped order",
    "missing detach",
    "wrong scale",
    "wrong condition",
)
AXIS_METHODS = {  # name -> positions of the arguments of a method that are axes
    **dict.fromkeys(("unsqueeze", "squeeze", "softmax", "size", "cumsum", "unbind"), (0,)),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "argmax", "any", "all", "flip"), (0,)),
    **dict.fromkeys(("index_select", "gather", "scatter", "index_copy", "index_add"), (0,)),
    **dict.fromkeys(("narrow", "select", "norm", "cummax"), (0,)),
    **dict.fromkeys(("transpose", "swapaxes", "movedim", "flatten"), (0, 1)),
    **dict.fromkeys(("split", "chunk", "topk", "roll", "repeat_interleave", "unflatten"), (1,)),
}
AXIS_FUNCTIONS = dict.fromkeys(("cat", "stack", "concatenate", "softmax"), (1,))
RESET_NAME = re.compile(r"^(?!is_|has_)(.*_)?(reset|restart|clear|forget|zero|emptied|drop)(_|s?$)")
DETACH_NAME = re.compile(r"(^|_)(detach|detached|stop_gradient)(_|s?$)")
NO_GRAD = ("no_grad", "inference_mode")
NO_MUTATION_CALLS = {"isinstance", "issubclass", "hasattr", "getattr", "warn", "warning", "debug"}
NO_MUTATION_CALLS |= {"warning_once", "info", "TypeVar", "namedtuple", "NamedTuple", "range_error"}
NO_MUTATION_FUNCTIONS = re.compile(
    r"^(__repr__|__str__|extra_repr|_?(refuse|require|check|validate)(_.*)?)$"
)
OPERATORS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),  # codespell:ignore notin
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Mutation(NamedTuple):
    """One change of one file."""

    file: str  # relative to the root
    line: int  # of the first change
    kind: str
    before: str  # the lines that change, without indentation
    after: str
    lines: tuple  # first and last line of the statement, as coverage counts them
    whole_file: bool  # the statement runs at import, so any test of the file may find it
    text: str  # of the whole file, changed


def name_of(node):
    """Return the last name of what is called: `cat` of `torch.cat(...)`."""
    node = node.func if isinstance(node, ast.Call) else node
    return getattr(node, "attr", getattr(node, "id", ""))


def is_integer(node):
    """Tell whether a node is an integer, perhaps with a minus."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int


def integer_of(node):
    return ast.literal_eval(node)


def is_text(node):
    """Tell whether a node is made of strings or lists, for which + means something else."""
    if isinstance(node, ast.BinOp):
        return is_text(node.left) or is_text(node.right)
    if isinstance(node, (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp)):
        return True
    return isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))


def only_complains(statements):
    """Tell whether statements do nothing but raise, assert or warn."""
    return all(
        isinstance(statement, (ast.Raise, ast.Assert, ast.Pass))
        or (isinstance(statement, ast.If) and only_complains(statement.body + statement.orelse))
        or (
            isinstance(statement, ast.Expr)
            and (isinstance(statement.value, ast.Constant) or name_of(statement.value) == "warn")
        )
        for statement in statements
    )


def only_validates(function):
    """Tell whether a function raises and neither returns nor changes anything."""
    if NO_MUTATION_FUNCTIONS.match(function.name):
        return True
    inner = list(ast.walk(ast.Module(function.body, [])))
    changes = (ast.Return, ast.Yield, ast.YieldFrom)
    if any(isinstance(node, changes) and node.value is not None for node in inner):
        return False
    stores = [n for n in inner if isinstance(getattr(n, "ctx", None), ast.Store)]
    if any(not isinstance(n, (ast.Name, ast.Tuple)) for n in stores):
        return False
    return any(isinstance(node, ast.Raise) for node in inner)


class Places:
    """All places of one file that can be mutated, as (kind, node, statement, function, edits).

    An edit is (start, end, new text), in bytes of the file.
    """

    def __init__(self, text):
        self.source = text.encode()
        lines = self.source.splitlines(keepends=True)
        self.starts = [0]
        for line in lines:
            self.starts.append(self.starts[-1] + len(line))
        self.found = []
        self.statement = self.function = None
        self.axes = set()  # nodes that are axes, so not counts
        self.visit(ast.parse(text))

    # -- positions and texts

    def start(self, node):
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node):
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node):
        return self.source[self.start(node) : self.end(node)].decode()

    def operand(self, node):
        """The text of a node, in parentheses unless it is a single term."""
        simple = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant)
        return self.text(node) if isinstance(node, simple) else f"({self.text(node)})"

    # -- edits

    def add(self, kind, node, *edits):
        self.found.append((kind, node, self.statement, self.function, edits))

    def replace(self, kind, node, new):
        self.add(kind, node, (self.start(node), self.end(node), new))

    def replace_between(self, kind, node, left, right, old, new):
        """Replace an operator that stands between two nodes."""
        start, end = self.end(left), self.start(right)
        between = self.source[start:end].decode()
        if "#" in between or between.count(old) != 1:
            return
        at = start + between.index(old)
        self.add(kind, node, (at, at + len(old), new))

    def swap(self, kind, node, one, other):
        if ast.dump(one) != ast.dump(other):
            self.add(
                kind,
                node,
                (self.start(one), self.end(one), self.text(other)),
                (self.start(other), self.end(other), self.text(one)),
            )

    # -- which nodes are looked at

    def visit(self, node):
        if self.is_left_alone(node):
            return
        before = self.statement, self.function
        if isinstance(node, ast.stmt):
            self.statement = node
        getattr(self, f"on_{type(node).__name__}", lambda node: None)(node)
        for field, child in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_comment"):
                continue
            if isinstance(node, FUNCTIONS):
                self.function = node if field == "body" else before[1]
            for each in child if isinstance(child, list) else [child]:
                if isinstance(each, ast.AST):
                    self.visit(each)
        self.statement, self.function = before

    def is_left_alone(self, node):
        if isinstance(node, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)):
            return True
        if isinstance(node, ast.keyword):
            return node.arg in ("stacklevel", "maxsize")
        if isinstance(node, FUNCTIONS):
            return only_validates(node)
        if isinstance(node, ast.If):
            return only_complains(node.body) and not node.orelse
        if isinstance(node, ast.Assign):
            return any(name_of(target).startswith("__") for target in node.targets)
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant)
        return isinstance(node, ast.Call) and name_of(node) in NO_MUTATION_CALLS

    # -- kinds

    def on_FunctionDef(self, node):
        for decorator in node.decorator_list:
            # Initial values are written with torch.nn.init, which computes no gradient anyway.
            if name_of(decorator) in NO_GRAD and node.name != "_init_weights":
                start = self.source.rindex(b"@", 0, self.start(decorator))
                self.add("missing detach", node, (start, self.end(decorator), ""))

    def on_With(self, node):
        for item in node.items:
            if name_of(item.context_expr) in NO_GRAD and len(node.items) == 1:
                edit = (self.start(node), self.end(item.context_expr), "if True")
                self.add("missing detach", node, edit)

    def on_Constant(self, node):
        is_count = type(node.value) is int and id(node) not in self.axes and node.value <= 1000
        is_setting = self.function is None and isinstance(self.statement, ast.Assign)
        if is_count and not is_setting:
            self.replace("off by one", node, str(node.value + 1))

    def on_UnaryOp(self, node):
        if isinstance(node.op, (ast.Not, ast.Invert)):
            self.replace("wrong condition", node, self.operand(node.operand))

    def on_BoolOp(self, node):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        left, right = node.values[:2]
        if len(node.values) == 2:
            self.replace_between("wrong condition", node, left, right, f"{old} ", f"{new} ")

    def on_BinOp(self, node):
        operators = OPERATORS.get(type(node.op))
        if operators and not is_text(node):
            is_mask = isinstance(node.op, (ast.BitAnd, ast.BitOr))
            kind = "wrong condition" if is_mask else "wrong scale"
            self.replace_between(kind, node, node.left, node.right, *operators)
        if isinstance(node.op, ast.Pow) and is_integer(node.right):
            self.axes.add(id(node.right))
            self.replace_between("wrong scale", node, node.left, node.right, "**", "*")

    def on_AugAssign(self, node):
        operators = OPERATORS.get(type(node.op))
        if operators and not is_text(node.value):
            old, new = (f"{operator}=" for operator in operators)
            self.replace_between("wrong scale", node, node.target, node.value, old, new)

    def on_Compare(self, node):
        if len(node.ops) == 1:
            old, new = COMPARISONS[type(node.ops[0])]
            is_order = isinstance(node.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE))
            kind = "off by one" if is_order else "wrong condition"
            left, right = node.left, node.comparators[0]
            self.replace_between(kind, node, left, right, f" {old} ", f" {new} ")

    def on_If(self, node):
        if not isinstance(node.test, (ast.UnaryOp, ast.Compare)):
            self.replace("wrong condition", node.test, f"not ({self.text(node.test)})")

    on_IfExp = on_If

    def on_comprehension(self, node):
        for test in node.ifs:
            if not isinstance(test, (ast.UnaryOp, ast.Compare)):
                self.replace("wrong condition", test, f"not ({self.text(test)})")

    def on_Slice(self, node):
        for bound, change in ((node.lower, "+ 1"), (node.upper, "- 1")):
            if bound is not None and not is_integer(bound):
                self.replace("off by one", bound, f"{self.operand(bound)} {change}")

    def on_Subscript(self, node):
        if name_of(node.value) in ("shape", "stride") and is_integer(node.slice):
            self.wrong_axis(node.slice)

    def on_Return(self, node):
        is_pair = isinstance(node.value, ast.Tuple) and len(node.value.elts) > 1
        if is_pair and self.function is not None:
            self.swap("swapped order", node, *node.value.elts[:2])

    on_Assign = on_Return

    def on_Attribute(self, node):
        if node.attr in ("mT", "T") and isinstance(node.ctx, ast.Load):
            self.replace("wrong axis", node, self.text(node.value))

    def wrong_axis(self, node):
        axis = integer_of(node)
        self.axes.update(id(each) for each in ast.walk(node))
        new = {-1: -2, -2: -1, 0: 1}.get(axis, axis + 1)
        self.replace("wrong axis", node, str(new))

    def on_Call(self, node):
        name = name_of(node)
        self.call_on_axes(node, name)
        self.call_in_order(node, name)
        self.call_that_resets(node, name)
        if name in ("rsqrt", "sqrt"):
            end = self.end(node.func)
            other = "sqrt" if name == "rsqrt" else "rsqrt"
            self.add("wrong scale", node, (end - len(name), end, other))

    def call_on_axes(self, node, name):
        axes = [word.value for word in node.keywords if word.arg in ("dim", "axis", "dims")]
        is_function = name_of(getattr(node.func, "value", node)) in ("torch", "F", "np")
        table = AXIS_FUNCTIONS if is_function else AXIS_METHODS
        positions = table.get(name, ()) if isinstance(node.func, ast.Attribute) else ()
        axes += [node.args[i] for i in positions if i < len(node.args)]
        axes = [axis for axis in axes if is_integer(axis)]
        if name in ("transpose", "swapaxes", "movedim") and not is_function:
            for axis in axes:
                self.axes.update(id(each) for each in ast.walk(axis))
            self.replace("wrong axis", node, self.text(node.func.value))
        else:
            for axis in axes:
                self.wrong_axis(axis)
        if name == "permute" and len(node.args) > 2:
            self.swap("wrong axis", node, *node.args[1:3])

    def call_in_order(self, node, name):
        first = node.args[0] if node.args else None
        if name in ("cat", "stack", "concatenate") and isinstance(first, (ast.Tuple, ast.List)):
            if len(first.elts) > 1:
                self.swap("swapped order", node, *first.elts[:2])
        elif name in ("where", "lerp") and len(node.args) == 3:
            pair = node.args[1:] if name == "where" else node.args[:2]
            self.swap("swapped order", node, *pair)
        elif name == "lerp" and len(node.args) == 2 and isinstance(node.func, ast.Attribute):
            self.swap("swapped order", node, node.func.value, first)
        elif self.function and any(isinstance(argument, ast.Tuple) for argument in node.args):
            pair = next(argument for argument in node.args if isinstance(argument, ast.Tuple))
            if len(pair.elts) == 2:
                self.swap("swapped order", node, *pair.elts)

    def call_that_resets(self, node, name):
        kept = self.what_is_changed(node, name)
        if name == "where" and len(node.args) == 3:
            for kept in node.args[1:]:
                self.replace("dropped reset", node, self.operand(kept))
        elif name == "zeros_like" and node.args:
            self.replace("dropped reset", node, self.operand(node.args[0]))
        elif name in ("zeros", "new_zeros") and isinstance(node.func, ast.Attribute):
            end = self.end(node.func)
            self.add("dropped reset", node, (end - len("zeros"), end, "ones"))
        elif DETACH_NAME.search(name) and kept is not None:
            self.replace("missing detach", node, self.text(kept))
        elif ("masked_fill" in name or RESET_NAME.search(name)) and kept is not None:
            is_statement = isinstance(self.statement, ast.Expr) and self.statement.value is node
            self.replace("dropped reset", node, "pass" if is_statement else self.text(kept))

    def what_is_changed(self, node, name):
        """The node of which a call returns a changed value: an object, or its first argument."""
        first = node.args[0] if node.args else None
        if not isinstance(node.func, ast.Attribute):
            return first
        is_of_module = name_of(node.func.value) in ("torch", "F", "np", "self")
        is_of_others = len(node.args) > 1 and "masked_fill" not in name
        return first if is_of_module or is_of_others else node.func.value


def code_lines(text):
    """Count the lines that hold code: no comments, blanks or docstrings."""
    tree, lines = ast.parse(text), set()
    for node in ast.walk(tree):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not is_docstring:
            body = getattr(node, "body", None)
            lines.update(range(node.lineno, body[0].lineno if body else node.end_lineno + 1))
    return len(lines)


def as_mutation(file, text, place):
    """Make a `Mutation` of one of `Places`, or None where the result is no program or the same."""
    kind, _, statement, function, edits = place
    source = text.encode()
    for start, end, new in sorted(edits, reverse=True):
        source = source[:start] + new.encode() + source[end:]
    changed = source.decode()
    try:
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(text)):
            return None
    except SyntaxError:
        return None
    old, new = text.splitlines(), changed.splitlines()
    same = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    end = len(old)
    while end > same + 1 and len(old) - end < len(new) - same - 1:
        if old[end - 1] != new[end - 1 - len(old)]:
            break
        end -= 1
    parts = [
        " ".join(line.strip() for line in part)
        for part in (old[same:end], new[same : len(new) - len(old) + end])
    ]
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno
    lines = (statement.lineno, max(statement.lineno, last))
    return Mutation(file, same + 1, kind, *parts, lines, function is None, changed)


def mutations(root, number, seed):
    """Choose mutations of the sources below a folder.

    Kinds take turns. Within a kind, the next mutation lies in the file that is furthest below its
    share (code lines times weight) among those that still have a place of that kind. No line is
    changed twice.
    """
    texts = {
        str(path.relative_to(root)): path.read_text(encoding="utf-8")
        for pattern in SOURCES
        for path in sorted(root.glob(pattern))
    }
    shares, places = {}, collections.defaultdict(list)
    for file, text in texts.items():
        shares[file] = code_lines(text) * (0.25 if LOW_WEIGHT.search(file) else 1)
        for place in Places(text).found:
            places[place[0], file].append(place)
        for kind in KINDS:
            random.Random(f"{seed} {kind} {Path(file).name}").shuffle(places[kind, file])
    total, taken, used, chosen = sum(shares.values()), collections.Counter(), set(), []
    while any(places.values()) and len(chosen) < number:
        for kind in KINDS:
            files = [file for file in texts if places[kind, file]]
            if not files or len(chosen) >= number:
                continue
            file = max(files, key=lambda file: shares[file] / total * number - taken[file])
            mutation = as_mutation(file, texts[file], places[kind, file].pop())
            if mutation is not None and (file, mutation.line) not in used:
                used.add((file, mutation.line))
                taken[file] += 1
                chosen.append(mutation)
    return chosen


# ------------------------------------------------------------------------------------------------
# Running tests in forked processes.
# ------------------------------------------------------------------------------------------------


class Watch:
    """A plugin of pytest: chooses tests, and notes the first failure and what each test needs."""

    def __init__(self, chosen=None, count=None, switch=None):
        self.chosen, self.count, self.switch = chosen, count, switch
        self.failed, self.seconds, self.outcomes = None, collections.Counter(), {}

    def pytest_collection_modifyitems(self, config, items):
        if self.count is not None:
            self.chosen = sample(items, self.count)
        if self.chosen is not None:
            left_out = [item for item in items if item.nodeid not in self.chosen]
            items[:] = [item for item in items if item.nodeid in self.chosen]
            config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        before = os.times()
        try:
            return (yield)
        finally:
            spent = [after - was for after, was in zip(os.times(), before, strict=True)]
            self.seconds[item.nodeid] = sum(spent[:4])
            if self.count is not None and sum(self.seconds.values()) > ENOUGH:
                item.session.shouldstop = "enough of this file was measured"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        if self.switch:
            self.switch(f"{item.nodeid}|setup")
        result = yield
        if self.switch:
            self.switch(f"{item.nodeid}|call")
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failed is None:
            self.failed = report.nodeid
        if report.when == "call" or not report.passed:
            self.outcomes.setdefault(report.nodeid, report.outcome)

    def pytest_collectreport(self, report):
        if report.failed and self.failed is None:
            self.failed = f"{report.nodeid} (collection)"


def sample(items, count):
    """Choose tests of a file at random: functions take turns, each with its parameters shuffled."""
    by_function = collections.defaultdict(list)
    for item in items:
        by_function[item.nodeid.partition("[")[0]].append(item.nodeid)
    for name, tests in by_function.items():
        random.Random(name).shuffle(tests)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_function.values()))
    return set(itertools.islice(filter(None, turns), count))


def in_fork(tree, work, seconds):
    """Call `work()` in a forked process, in the folder `tree`, and return its JSON.

    Returns (result or None, "ok", "timeout" or "crash", seconds of the processor).
    """
    note = Path(tree).parent / f"result{os.getpid()}.json"
    note.unlink(missing_ok=True)
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            _prepare(tree, seconds)
            note.write_text(json.dumps(work()), encoding="utf-8")
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    status, usage = _wait(process, WALL * seconds)
    spent = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(status):
        is_late = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        return None, "timeout" if is_late else "crash", spent
    if not note.exists():
        return None, "crash", spent
    return json.loads(note.read_text(encoding="utf-8")), "ok", spent


def _wait(process, seconds):
    """Wait for a forked process, and end it and what it started when its time is over."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            ended, status, usage = os.wait4(process, os.WNOHANG)
            if ended:
                return status, usage
            time.sleep(0.05)
    except BaseException:
        os.killpg(process, signal.SIGKILL)
        raise
    os.killpg(process, signal.SIGKILL)
    return os.wait4(process, 0)[1:]


def _prepare(tree, seconds):
    """Make a forked process one that runs the tests of a tree."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    limit = int(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    path = Path(tree).with_name(f"log{os.getppid()}.txt")
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    here = {"", str(ROOT), str(ROOT / "tests")}
    sys.path[:] = [str(tree)] + [folder for folder in sys.path if folder not in here]


def run_pytest(files, watch, *options):
    """Run pytest in this process, which must be a forked one."""
    chosen = "not slow and not gpu and not network"
    arguments = ["-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=short", "-o"]
    arguments += ["addopts=", "--strict-markers", "-m", chosen, "--rootdir", os.getcwd()]
    arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are preloaded
    return int(pytest.main([*arguments, *options, *files], plugins=[watch]))


def measure(tree, file, count):
    """Run a file of tests on unchanged code: seconds of each test, and lines that it executes."""
    import coverage

    tracer = coverage.Coverage(
        data_file=None, config_file=False, source=[os.path.join(tree, "melodi_hf")]
    )
    # Warnings are errors in the tests; coverage warns about modules that were imported already.
    tracer._warn = lambda *given, **words: None
    tracer.start()
    watch = Watch(count=count, switch=tracer.switch_context)
    run_pytest([file], watch)
    tracer.stop()
    lines = collections.defaultdict(dict)
    data = tracer.get_data()
    for path in data.measured_files():
        name = os.path.relpath(path, tree)
        for line, contexts in data.contexts_by_lineno(path).items():
            for context in contexts:
                lines[context].setdefault(name, []).append(line)
    return {
        test: {
            "seconds": round(watch.seconds[test], 3),
            "outcome": outcome,
            "setup": lines[f"{test}|setup"],
            "call": lines[f"{test}|call"],
        }
        for test, outcome in watch.outcomes.items()
    }


def try_mutation(files, chosen):
    """Run the chosen tests until one fails: in a forked process."""
    watch = Watch(chosen=set(chosen))
    code = run_pytest(files, watch, "-x")
    if watch.failed is None and code not in (0, 5):
        watch.failed = "import" if code == 4 else f"pytest ended with {code}"
    return {"test": watch.failed, "code": code}


# ------------------------------------------------------------------------------------------------
# Which tests.
# ------------------------------------------------------------------------------------------------


def copy_tree(folder):
    """Copy what tests read into `folder`/tree."""
    tree = Path(folder) / "tree"
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "runs", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignored)
    return tree


def digest(count):
    """Name the code and tests, so that measurements are reused for the same ones only."""
    found = hashlib.sha256(str(count).encode())
    for path in sorted([*ROOT.glob("melodi_hf/**/*.py"), *ROOT.glob("tests/**/*.py")]):
        if path != Path(__file__).resolve():
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def measure_all(options, tree, bar):
    """Measure the tests of all files, or read what was measured of the same code before."""
    path = options.work / f"measured-{digest(options.count)}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for file in bar([file for file in options.tests if file not in known], "measuring"):
        work = functools.partial(measure, tree, file, options.count)
        found, state, seconds = in_fork(tree, work, 2000)
        if state != "ok":
            log = Path(tree).with_name(f"log{os.getpid()}.txt").read_text(errors="replace")
            raise RuntimeError(f"{file} ended with {state} on unchanged code: {log[-2000:]}")
        failed = [test for test, what in found.items() if what["outcome"] == "failed"]
        if failed:
            say(f"{file}: {len(failed)} tests fail unchanged and are left out: {failed[:3]}")
        known[file] = {"seconds": seconds, "tests": found}
        write(path, known)
    return known


def write(path, value, **options):
    """Write JSON whole or not at all."""
    beside = Path(f"{path}.part")
    beside.write_text(json.dumps(value, **options) + "\n", encoding="utf-8")
    beside.replace(path)


def executes(lines, mutation):
    """Tell whether a test's lines (file -> numbers) include the statement of a mutation."""
    held = lines.get(mutation.file, ())
    first, last = mutation.lines
    return bool(held) if mutation.whole_file else any(first <= line <= last for line in held)


def tests_of(mutation, measured, options):
    """Choose the tests that execute a mutation, up to `--budget` seconds.

    A fixture of a module is set up in its first test, so lines of a setup count for every test of
    the file. Where the budget is too small, files take turns, each with its tests in random order.
    """
    queues = {}
    for file, found in measured.items():
        tests = {
            test: what
            for test, what in found["tests"].items()
            if what["outcome"] == "passed" and what["seconds"] <= options.slowest
        }
        setup = any(executes(what["setup"], mutation) for what in found["tests"].values())
        names = [t for t, what in tests.items() if setup or executes(what["call"], mutation)]
        random.Random(f"{options.seed} {file}").shuffle(names)
        # Those that execute the line themselves first.
        names.sort(key=lambda test: executes(tests[test]["call"], mutation))
        queues[file] = [(test, tests[test]["seconds"]) for test in names]
    total, chosen = 0.0, {}
    while any(queues.values()) and total < options.budget:
        for file, queue in queues.items():
            if queue and total < options.budget:
                test, seconds = queue.pop()
                total += seconds
                chosen.setdefault(file, []).append(test)
    return chosen, total


# ------------------------------------------------------------------------------------------------
# The run.
# ------------------------------------------------------------------------------------------------


def say(text=""):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def key_of(mutation):
    fields = mutation if isinstance(mutation, dict) else mutation._asdict()
    return tuple(fields[name] for name in ("file", "line", "kind", "before", "after"))


def try_one(mutation, number, tree, measured, options):
    """Apply a mutation to a tree, run its tests, take it back; return its record."""
    path = Path(tree) / mutation.file
    was, times = path.read_text(encoding="utf-8"), path.stat()
    chosen, expected = tests_of(mutation, measured, options)
    tests = [test for of_file in chosen.values() for test in of_file]
    found, state, seconds = None, "ok", 0.0
    if tests:
        path.write_text(mutation.text, encoding="utf-8")
        os.utime(path, (10**9 + number, 10**9 + number))  # no compiled file of another mutation
        try:
            found, state, seconds = in_fork(
                tree, lambda: try_mutation(list(chosen), tests), options.limit
            )
        finally:
            path.write_text(was, encoding="utf-8")
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    test = found["test"] if found else None if state == "ok" else state
    if state == "timeout" and expected > options.limit / 2:
        test = None  # as slow as that without the mutation
    return {
        "file": mutation.file,
        "line": mutation.line,
        "kind": mutation.kind,
        "before": mutation.before,
        "after": mutation.after,
        "found": test is not None,
        "test": test,
        "seconds": round(seconds, 1),
        "tests": len(tests),
    }


def work_on(share, measured, options, results):
    """Try mutations one after another in a tree of one's own."""
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        tree = copy_tree(folder)
        for number, mutation in share:
            try:
                results.put(try_one(mutation, number, tree, measured, options))
            except Exception as error:
                results.put(error)


def preload():
    """Import what every test needs and what no mutation changes."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import importlib

    import torch

    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    if any(name.partition(".")[0] == "melodi_hf" for name in sys.modules):
        raise RuntimeError("melodi_hf was imported before a mutation could be applied")


def run(options):
    """Try all mutations that have no record yet, and write each record as it comes."""
    from tqdm import tqdm

    def bar(items, what, total=None):
        return tqdm(items, what, total, unit="", mininterval=5, dynamic_ncols=True)

    known = {"files": [], "mutations": []}
    if (options.resume or options.again) and options.output.exists():
        known = json.loads(options.output.read_text(encoding="utf-8"))
    chosen = mutations(ROOT, options.number, options.seed)
    records = {key_of(record): record for record in known["mutations"]}
    records = {key_of(m): records.get(key_of(m)) for m in chosen}
    options.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the tests, too
    preload()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        measured = measure_all(options, copy_tree(folder), bar)
    files = list(dict.fromkeys(known["files"] + options.tests))
    used = {file: measured[file] for file in files if file in measured}
    measured = {file: measured[file] for file in options.tests}
    todo = [
        (n, m)
        for n, m in enumerate(chosen)
        if records[key_of(m)] is None or (options.again and not records[key_of(m)]["found"])
    ]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [
        context.Process(
            target=work_on, args=(todo[i :: options.processes], measured, options, results)
        )
        for i in range(options.processes)
    ]
    try:
        for worker in workers:
            worker.start()
        for _ in bar(todo, "mutations"):
            record = results.get()
            if isinstance(record, Exception):
                raise record
            before = records[key_of(record)] or {"seconds": 0, "tests": 0}
            for name in ("seconds", "tests"):
                record[name] = round(record[name] + before[name], 1)
            records[key_of(record)] = record
            save(options, records, used)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    save(options, records, used)


def save(options, records, measured):
    tests = [w for found in measured.values() for w in found["tests"].values()]
    tests = [w for w in tests if w["outcome"] == "passed" and w["seconds"] <= options.slowest]
    value = {
        "number": options.number,
        "seed": options.seed,
        "limit": options.limit,
        "budget": options.budget,
        "slowest": options.slowest,
        "files": list(measured),
        "tests": len(tests),
        "seconds_unchanged": round(sum(what["seconds"] for what in tests)),
        "mutations": [record for record in records.values() if record],
    }
    write(options.output, value, indent=1, ensure_ascii=False)


def summarize(path):
    """Print what was found per kind and file, and the mutations that no test found."""
    records = json.loads(path.read_text(encoding="utf-8"))["mutations"]
    for field, order in (("kind", KINDS), ("file", sorted({r["file"] for r in records}))):
        for value in order:
            of_it = [record for record in records if record[field] == value]
            if of_it:
                say(f"{sum(r['found'] for r in of_it):4} of {len(of_it):3}  {value}")
        say()
    found = sum(record["found"] for record in records)
    seconds = sum(record["seconds"] for record in records)
    say(f"{found} of {len(records)} found, {seconds:.0f} seconds of the processor\n")
    for record in records:
        if not record["found"]:
            say(f"{record['file']}:{record['line']} {record['kind']}, {record['tests']} tests")
            say(f"    - {record['before']}\n    + {record['after']}")


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--number", type=int, default=150, help="mutations (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    add("--tests", nargs="+", help="files of tests in their order (default: those of FILES)")
    add("--limit", type=float, default=150, help="seconds per mutation (default: %(default)s)")
    add("--budget", type=float, default=60, help="of its unchanged tests (default: %(default)s)")
    add("--slowest", type=float, default=3, help="longer tests do not run (default: %(default)s)")
    add("--count", type=int, default=40, help="tests per file at most (default: %(default)s)")
    add("--processes", type=int, default=1, help="at a time (default: %(default)s)")
    add("--resume", action="store_true", help="keep the records that --output already holds")
    add("--again", action="store_true", help="try again what --output says was not found")
    add("--output", type=Path, default=OUTPUT, help="(default: %(default)s)")
    add("--summary", action="store_true", help="print the content of --output and stop")
    add("--list", action="store_true", help="print the mutations and stop")
    temporary = Path(tempfile.gettempdir()) / "melodi_hf_mutations"
    add("--work", type=Path, default=temporary, help="folder for copies (default: %(default)s)")
    options = parser.parse_args(arguments)
    named = options.tests or [f"tests/test_{name}.py" for name in FILES]
    options.tests = [file for file in named if (ROOT / file).exists()]
    return options


def main(arguments=None):
    options = parse(arguments)
    if options.summary:
        summarize(options.output)
    elif options.list:
        for mutation in mutations(ROOT, options.number, options.seed):
            say(f"{mutation.file}:{mutation.line} {mutation.kind}")
            say(f"    - {mutation.before}\n    + {mutation.after}")
    else:
        run(options)
        summarize(options.output)


@pytest.mark.slow
def test_recorded_mutations_are_still_found(tmp_path):
    """Of the mutations that were found when `mutations.json` was written, 14 that still apply."""
    known = json.loads(OUTPUT.read_text(encoding="utf-8"))
    current = {key_of(m) for m in mutations(ROOT, known["number"], known["seed"])}
    found = [r for r in known["mutations"] if r["found"] and key_of(r) in current]
    assert found, f"{OUTPUT.name} is of other code: run tests/mutations.py"
    program = [sys.executable, __file__, "--resume", "--tests", *known["files"]]
    program += [f"--{name}={known[name]}" for name in ("number", "seed", "limit", "budget")]
    chosen = random.Random(0).sample(found, min(14, len(found)))
    output = tmp_path / "mutations.json"
    kept = [r for r in known["mutations"] if r not in chosen]
    write(output, known | {"mutations": kept})
    subprocess.run([*program, "--output", str(output)], check=True, cwd=ROOT)
    after = {key_of(r): r for r in json.loads(output.read_text(encoding="utf-8"))["mutations"]}
    missed = [record for record in chosen if not after[key_of(record)]["found"]]
    assert not missed, missed


if __name__ == "__main__":
    main()
