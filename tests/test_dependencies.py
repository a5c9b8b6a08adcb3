"""Libraries that are imported are declared, and one that is missing is named with the extra that brings it."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from hatchling.builders.wheel import WheelBuilder
from module_imports import Imports, within
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from reference import tiny_profile
from test_layering import MODULES, NAMES, TOP

from reasonalloc.cache.attention.backend import choose_backend
from reasonalloc.engines.transformers.loading import load
from reasonalloc.evaluation.executors import run_ray
from reasonalloc.evaluation.grading import grade_math
from reasonalloc.evaluation.plots import plot_profile
from reasonalloc.evaluation.questions import load_questions

TOOLS = {"dev", "demo", "docs"}  # extras of which the package itself imports nothing beyond the others
HOSTED = {"vllm", "lm-eval"}  # extras whose host calls us: it is there
WITH_TORCH = {"triton"}  # torch's builds for GPUs bring the one that fits them, under names of their own
PROJECT = WheelBuilder(str(Path(__file__).parents[1])).metadata.core


def named(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements} - {TOP}


BASE = named(PROJECT.dependencies)
EXTRAS = {name: named(texts) for name, texts in PROJECT.optional_dependencies.items() if name not in TOOLS}


def foreign(name):
    """The distribution of an imported module; nothing for Python's own and ours."""
    library = name.partition(".")[0]
    return set() if library in {*sys.stdlib_module_names, TOP, ""} else {canonicalize_name(library)}


IMPORTS = {module.name: Imports(module, NAMES).found for module in MODULES}
IMPORTED = {library: name for name, imports in IMPORTS.items() for found in imports for library in foreign(found.name)}


def test_every_library_that_is_imported_is_declared():
    declared = BASE.union(*EXTRAS.values(), WITH_TORCH)
    assert {library: module for library, module in IMPORTED.items() if library not in declared} == {}


def test_every_base_dependency_is_imported():
    assert set(IMPORTED) >= BASE


def test_only_some_modules_cannot_be_imported_without_an_extra():
    at_once = {
        name: {found.name for found in imports if not (found.deferred or found.typing)}
        for name, imports in IMPORTS.items()
    }
    needy = {name for name, imported in at_once.items() if set().union(*map(foreign, imported)) - BASE}
    while more := {name for name, imported in at_once.items() if imported & needy} - needy:
        needy |= more
    apart = ("kernels", "cache.attention.compiled", "cache.attention.triton_backend", "engines.vllm", "harness.model")
    assert {name for name in needy if not any(within(name, f"{TOP}.{part}") for part in apart)} == set()
    assert f"{TOP}.cache.attention.compiled" in needy


CALLS = [  # of every extra: a library that it brings, and a call that needs it
    ("cpu", "numba", lambda folder: choose_backend("compiled", torch.device("cpu"), {torch.float32}, 64)),
    ("plot", "matplotlib", lambda folder: plot_profile(tiny_profile(), None, folder / "wave.png")),
    ("eval", "datasets", lambda folder: load_questions("math500")),
    ("eval", "math-verify", lambda folder: grade_math("1", "1")),
    ("ray", "ray", lambda folder: run_ray(None, None, [], 1, 0.0, None)),
    ("gguf", "gguf", lambda folder: load(str(empty(folder / "tiny.gguf")))),
    ("gguf", "accelerate", lambda folder: load(str(empty(folder / "tiny.gguf")))),
]


def empty(path):
    path.touch()
    return path


def without(name):
    """How ``importlib.metadata.version`` answers where a distribution is missing."""

    def version(asked):
        if asked == name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return importlib.metadata.version(asked)

    return version


def test_every_extra_is_asked_for():
    assert {extra for extra, *_ in CALLS} == set(EXTRAS) - HOSTED


@pytest.mark.parametrize(("extra", "library", "call"), CALLS, ids=[library for _, library, _ in CALLS])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, tmp_path, extra, library, call):
    assert canonicalize_name(library) in EXTRAS[extra]
    missing = library.replace("-", "_")
    for name in {missing, *(name for name in sys.modules if name.startswith(missing + "."))}:
        monkeypatch.setitem(sys.modules, name, None)  # cannot be imported
    monkeypatch.setattr("reasonalloc.evaluation.grading.version", without(library))
    with pytest.raises((ImportError, ValueError), match=rf"(?i)^[^\n]*{library}[^\n]*reasonalloc\[{extra}\][^\n]*$"):
        call(tmp_path)
