"""The size that the design promises: what travels to the Hub, and the length of functions."""

import ast
from inspect import unwrap
from pathlib import Path

import pytest

from melodi_hf.models.layer import MemoryLayer

MODELS = Path(__file__).resolve().parents[1] / "melodi_hf" / "models"
SEAM = {"memory_fields", "project", "recall", "attend", "close", "metrics"}
LINES, FILES = 5000, 15  # that travel with a MELODI; the aim is 3000 in 14
LONGEST = 50  # lines of a function


def travelling(name, found):
    """The files that a module of models/ imports, itself included."""
    if name not in found:
        found.add(name)
        tree = ast.parse((MODELS / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                travelling(node.module, found)
    return found


def test_a_melodi_travels_in_few_files():
    names = travelling("modeling_melodi", set())
    lines = {n: (MODELS / f"{n}.py").read_text(encoding="utf-8").count("\n") for n in names}
    assert len(lines) <= FILES, sorted(lines)
    assert sum(lines.values()) <= LINES, lines


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.py")), ids=lambda path: path.stem)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= LONGEST, f"{path.name}:{node.lineno} {node.name} has {size} lines"


def layer_classes():
    """All layers of all systems."""
    found = [MemoryLayer]
    for kind in found:  # which grows
        found += kind.__subclasses__()
    return found[1:]


@pytest.mark.parametrize("kind", layer_classes(), ids=lambda kind: kind.__name__)
def test_layers_override_nothing_but_the_seam(kind):
    shared = {name for name, value in vars(MemoryLayer).items() if callable(value)}
    allowed = SEAM | {"__init__"}
    if kind.__name__ == "SlidingWindowWithSideLayer":  # two layers, one behind the other
        allowed = allowed | {"forward"}
    # transformers wraps forward() again in each subclass.
    own = {name for name, value in vars(kind).items() if value is not vars(MemoryLayer).get(name)}
    if unwrap(vars(kind).get("forward")) is unwrap(MemoryLayer.forward):
        own.discard("forward")
    assert not own & shared - allowed
