"""What ``import reasonalloc`` costs, what it offers, and that transformers knows our attention after it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import reasonalloc as ra

RUN_A_MODEL = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(
    vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1,
)
model = AutoModelForCausalLM.from_config(config, attn_implementation="reasonalloc")
assert model.config._attn_implementation == "reasonalloc"
assert model(torch.arange(5)[None]).logits.shape == (1, 5, 17)
import sys
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("reasonalloc")]
loader = sys.modules["transformers.modeling_utils"].__spec__.loader
assert loader is sys.modules["transformers.modeling_utils"].__loader__
assert not type(loader).__module__.startswith("reasonalloc")
"""
BLOCK = """
import sys
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker)
"""


def fresh(code):
    """Runs code in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_imports_neither_torch_nor_transformers():
    loaded = fresh("import sys, reasonalloc; print(*sys.modules)")
    assert "reasonalloc.engines.registration" in loaded
    assert not {"torch", "numpy", "transformers", "typer", "rich"} & set(loaded)


@pytest.mark.parametrize(
    "imports",
    [
        "import reasonalloc, importlib.util; importlib.util.find_spec('transformers.modeling_utils')",
        pytest.param("from transformers import PreTrainedModel; import reasonalloc", marks=pytest.mark.slow),
        # Here transformers comes in the midst of our own imports.
        pytest.param("import reasonalloc.calibration.sensitivity", marks=pytest.mark.slow),
    ],
)
def test_transformers_knows_the_attention_whatever_is_imported_first(imports):
    fresh(imports + RUN_A_MODEL)


def test_the_package_without_transformers():
    block = BLOCK.format(blocked={"transformers"})
    fresh(block + "import reasonalloc as ra; assert ra.Compression.method('reasonalloc', 64).budget == 64")
    fresh(
        block + "import reasonalloc as ra\n"
        "try: ra.Cache\n"
        "except ModuleNotFoundError as error: assert error.name == 'transformers'\n"
        "else: raise AssertionError"
    )


def test_the_package_without_torch():
    fresh(BLOCK.format(blocked={"torch"}) + "import reasonalloc; print(dir(reasonalloc))")


def test_a_transformers_that_fails_to_load_fails_again_and_registers_when_it_loads(tmp_path):
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "modeling_utils.py").write_text("import os\nif 'BROKEN' in os.environ: raise OSError('broken')\n")
    fresh(f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
import reasonalloc
import reasonalloc.engines.registration as registration
registration.REGISTERS = "this"
os.environ["BROKEN"] = "1"
for _ in range(2):
    try: import transformers.modeling_utils
    except OSError: pass
    else: raise AssertionError
assert "this" not in sys.modules
del os.environ["BROKEN"]
import transformers.modeling_utils
assert "this" in sys.modules
""")


def test_every_public_name_is_there():
    promised = {
        "METHODS", "RKV", "SCORERS", "AdaKVHeads", "Cache", "CacheStats", "CalibrationSettings", "Compression",
        "DemandProfile", "DynamicLayers", "HeadAllocator", "HeadSplit", "LayerAllocator", "LayerTokens",
        "LossCurveHeads", "LossCurveLayers", "MissCurveHeads", "MissCurveLayers", "ModelShape",
        "Observation", "ProbePrompt", "PyramidLayers", "Recorder", "Scorer", "SensitivityHeads",
        "SensitivityLayers", "ThresholdHeads", "UniformHeads", "UniformLayers",
        "UnsupportedModelError", "WaveLayers", "calibrate", "decoding_loop", "register_head_allocator",
        "register_layer_allocator", "register_scorer", "robustify", "HEAD_ALLOCATORS", "LAYER_ALLOCATORS",
    }  # fmt: skip
    assert promised <= set(ra.__all__) < set(dir(ra))
    missing = [name for name in ra.__all__ if not hasattr(ra, name)]
    assert not missing
    with pytest.raises(AttributeError, match="module 'reasonalloc' has no attribute 'Cash'"):
        ra.Cash  # noqa: B018


def test_every_scorer_and_allocator_of_the_package_is_a_public_name():
    from reasonalloc.policies import allocation, scoring

    for home in (allocation, scoring):
        policies = {
            name
            for name, value in vars(home).items()
            if isinstance(value, type) and issubclass(value, ra.Scorer | ra.LayerAllocator | ra.HeadAllocator)
        }
        assert policies <= set(ra.__all__)


def test_type_checkers_see_the_same_names_from_the_same_homes():
    tree = ast.parse(Path(ra.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = [(alias.name, node.module) for node in block.body for alias in node.names]
    assert dict(seen) == ra._HOMES
    assert len(seen) == len(ra.__all__) == len(ra._HOMES)
