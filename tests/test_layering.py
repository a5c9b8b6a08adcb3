"""The layers of the package point one way, without circles, and foreign libraries have their places."""

import sys
from pathlib import Path

import pytest
from module_imports import Imports, Module, circles, within

import reasonalloc

TOP = "reasonalloc"
ROOT = Path(reasonalloc.__file__).parent
# Each part may import itself and the parts before it, neither its neighbours nor those behind. The longest name counts.
ORDER = [
    ("files", "version"),
    ("kernels",),
    ("policies",),
    ("tasks",),
    ("mathematics",),
    ("cache.table",),
    ("cache.spans",),
    ("cache.attention",),
    ("cache",),
    ("pages",),
    ("engines",),
    ("engines.transformers", "engines.vllm"),
    ("calibration", "reasoner"),
    ("evaluation",),
    ("harness",),
    ("cli",),
    ("__init__", "__main__"),
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
ARRAYS = ("kernels", "policies", "cache", "pages", "engines", "calibration", "reasoner", "evaluation", "harness", "cli")
MODELS = ("engines.transformers", "calibration", "reasoner", "evaluation", "harness", "cli")
LIBRARIES = {  # which parts may import what is not Python's own
    "torch": ARRAYS,
    "numpy": ARRAYS,
    "jaxtyping": ARRAYS,
    "scipy": ("calibration", "evaluation"),
    "numba": ("cache.attention",),
    "llvmlite": ("cache.attention",),
    "triton": ("kernels",),
    "transformers": MODELS,
    "tokenizers": MODELS,
    "huggingface_hub": MODELS,
    "packaging": ("engines.transformers.names",),
    "vllm": ("engines.vllm",),
    "prometheus_client": ("engines.vllm",),
    "safetensors": ("reasoner.train",),
    "typer": ("cli", "reasoner.train"),
    "rich": ("cli",),
    "matplotlib": ("evaluation.plots",),
    "datasets": ("evaluation",),
    "math_verify": ("mathematics",),
    "sympy": ("mathematics",),
    "ray": ("evaluation",),
    "lm_eval": ("harness",),
    "tqdm": ("harness",),
}
IMPORTERS = ("__init__", "engines.registration")  # of modules whose names are not written in the call


def module_of(path):
    package = path.stem == "__init__"
    names = path.relative_to(ROOT).with_suffix("").parts
    return Module(".".join((TOP, *(names[:-1] if package else names))), package, path.read_text())


MODULES = [module_of(path) for path in sorted(ROOT.rglob("*.py"))]
NAMES = {module.name for module in MODULES}


def inside(name):
    """A module's name below the top."""
    return "__init__" if name == TOP else name.removeprefix(f"{TOP}.")


def part_of(name):
    parts = [part for part in RANK if within(inside(name), part)]
    return max(parts, key=len, default=None)


def violations(module):
    """What is wrong with a module's imports, a sentence each."""
    own = part_of(module.name)
    if own is None:
        yield f"{module.name} has no place in ORDER"
        return
    for found in Imports(module, NAMES).found:
        where = f"{module.name}, line {found.line}"
        if not found.name:
            if inside(module.name) not in IMPORTERS:
                yield f"{where}: imports a module whose name is not written there"
        elif within(found.name, TOP):
            part = part_of(found.name)
            if part is None:
                yield f"{where}: {found.name} has no place in ORDER"
            elif part != own and RANK[part] >= RANK[own]:
                yield f"{where}: {own} must not import {found.name}"
        elif (library := found.name.partition(".")[0]) not in sys.stdlib_module_names:
            if library not in LIBRARIES:
                yield f"{where}: {library} has no place in LIBRARIES"
            elif not any(within(inside(module.name), part) for part in LIBRARIES[library]):
                yield f"{where}: only {', '.join(LIBRARIES[library])} may import {library}"


def test_every_place_is_taken():
    assert [part for part in RANK if not any(within(inside(name), part) for name in NAMES)] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_imports_point_one_way(module):
    assert list(violations(module)) == []


@pytest.mark.parametrize("deferred", [False, True], ids=["at the top of files", "anywhere"])
def test_no_modules_import_each_other_in_a_circle(deferred):
    assert circles(MODULES, deferred) == []


# ---- the checker itself ----


@pytest.mark.parametrize(
    "source",
    [
        "import vllm",
        "import os, vllm.config",
        "from vllm.config import VllmConfig",
        "from reasonalloc import Cache",
        "from reasonalloc import cli",
        "import reasonalloc",
        "import reasonalloc.files",  # binds the top
        "import reasonalloc.cli as x",
        "from reasonalloc.cli.app import app",
        "from .. import cli",
        "from .. import Cache",
        "from ..engines import models",
        "from ..cache.stats import CacheStats",
        "from reasonalloc.engines import transformers",
        "def f():\n    from reasonalloc.cache.stats import CacheStats",
        "class A:\n    async def f(self):\n        import transformers",
        "try:\n    import transformers\nexcept ImportError:\n    pass",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from reasonalloc.engines.transformers import Cache",
        "import importlib\nimportlib.import_module('reasonalloc.cli')",
        "from importlib import import_module\nx = lambda: import_module('..cli', __package__)",
        "from importlib import import_module\nimport_module(name='vllm')",
        "__import__('typer')",
        "__import__(name)",
        "import pandas",
    ],
)
def test_bad_imports_are_seen_in_a_low_layer(source):
    assert list(violations(Module(f"{TOP}.policies.made_up", False, source)))


@pytest.mark.parametrize(
    ("name", "package", "source"),
    [
        ("files", False, "from . import cli"),
        ("files", False, "from .policies import registry"),
        ("files", False, "import torch"),
        ("policies", True, "from .. import cli"),
        ("policies", True, "from ..engines.models import model_shape"),
        ("policies.scoring", True, "from ... import Cache"),
        ("tasks.made_up", False, "import torch"),
        ("cache.made_up", False, "import transformers"),
        ("cache.made_up", False, "import numba"),
        ("engines.made_up", False, "from reasonalloc.engines.transformers import Cache"),
        ("engines.vllm.made_up", False, "import transformers"),
        ("engines.vllm.made_up", False, "from reasonalloc.engines.transformers import cache"),
        ("engines.transformers.made_up", False, "import vllm"),
        ("calibration.made_up", False, "from ..reasoner import text"),
        ("evaluation.made_up", False, "import rich"),
        ("cli.made_up", False, "from reasonalloc import Cache"),
        ("made_up", False, "import os"),
    ],
)
def test_bad_imports_are_seen_in_other_places(name, package, source):
    assert list(violations(Module(f"{TOP}.{name}", package, source)))


@pytest.mark.parametrize(
    ("name", "package", "source"),
    [
        ("policies.made_up", False, "import torch, os.path\nfrom reasonalloc.files import write_atomically"),
        ("policies.made_up", False, "import reasonalloc.files as files"),
        ("policies.made_up", False, "from .registry import Registry\nfrom . import scoring\nfrom ..files import read"),
        ("policies.made_up", False, "from importlib import import_module\nimport_module('.registry', __package__)"),
        ("policies", True, "from . import registry\nfrom .registry import Registry\nfrom ..files import read"),
        ("engines.vllm.made_up", False, "import vllm\nfrom reasonalloc.engines.models import UnsupportedModelError"),
        (
            "evaluation.made_up",
            False,
            "from reasonalloc.reasoner import text\nimport reasonalloc.calibration as x",
        ),
        ("cli.made_up", False, "import typer, rich.table\nfrom reasonalloc.cli import console"),
        ("__main__", False, "from reasonalloc.cli.app import app"),
        ("engines.registration", False, "from importlib import import_module\nimport_module(NAME)"),
    ],
)
def test_good_imports_are_let_through(name, package, source):
    assert list(violations(Module(f"{TOP}.{name}", package, source))) == []


def test_when_an_import_happens_is_known():
    source = """
import a
if TYPE_CHECKING:
    import b
else:
    import c
class A:
    import d
    def f(self):
        import e
try:
    import f
except ImportError:
    def g(): __import__("g")
"""
    found = Imports(Module(f"{TOP}.files", False, source), NAMES).found
    assert "".join(i.name for i in found) == "abcdefg"
    assert "".join(i.name for i in found if i.deferred) == "eg"
    assert "".join(i.name for i in found if i.typing) == "b"


def test_circles_are_found():
    def found(deferred, *sources):
        return circles([Module(name, package, source) for name, package, source in sources], deferred)

    a = ("a", True, "from a.x import one")
    x = ("a.x", False, "from b.y import two")
    y = ("b.y", False, "two = 2")
    assert found(True, a, x, ("b", True, "from b.y import two"), y) == []
    assert found(False, a, x, ("b", True, "from a import one"), y) == [["a", "a.x", "b"]]  # importing b.y runs b
    assert found(False, a, ("a.x", False, "import a"), y) == [["a", "a.x"]]
    late = (a, ("a.x", False, "def f(): import a"))
    assert (found(False, *late), found(True, *late)) == ([], [["a", "a.x"]])
    assert found(True, a, ("a.x", False, "if TYPE_CHECKING:\n    import a")) == []
