"""The layers of the package point one way only, and the core knows no engine."""

import ast
from pathlib import Path

import pytest

import reasonalloc

ROOT = Path(reasonalloc.__file__).parent
# Each part may import the parts before it, never one behind it.
ORDER = [
    ("files",),
    ("policies",),
    ("tasks",),
    ("cache",),
    ("engines",),
    ("calibration", "reasoner"),
    ("evaluation",),
    ("cli", "__init__", "__main__"),
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
FILES = sorted(ROOT.rglob("*.py"))


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_every_part_has_a_place():
    assert {part_of(path) for path in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    rank = RANK[part_of(path)]
    for name in imports(path):
        if name.startswith("reasonalloc."):
            assert RANK[name.split(".")[1]] <= rank, f"{path.name} imports {name}"
        if rank < RANK["engines"]:
            assert not name.startswith(("transformers", "huggingface_hub", "tokenizers")), f"{path.name} imports {name}"
