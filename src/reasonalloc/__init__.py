"""reasonalloc: hierarchical, decode-time KV-cache budgets for reasoning language models.

Importing the package costs next to nothing: the home of a name is imported when the name is first used. It registers
the attention implementation "reasonalloc" with transformers, or has it registered once somebody imports transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reasonalloc.engines.registration import register_attention
from reasonalloc.version import __version__ as __version__

if TYPE_CHECKING:  # the names of _NAMES, for type checkers and editors
    from reasonalloc.cache.recorder import Recorder as Recorder
    from reasonalloc.cache.stats import CacheStats as CacheStats
    from reasonalloc.calibration import CalibrationSettings as CalibrationSettings
    from reasonalloc.calibration import ProbePrompt as ProbePrompt
    from reasonalloc.calibration.calibrate import calibrate as calibrate
    from reasonalloc.engines.models import UnsupportedModelError as UnsupportedModelError
    from reasonalloc.engines.transformers import Cache as Cache
    from reasonalloc.engines.transformers import decoding_loop as decoding_loop
    from reasonalloc.engines.transformers.enabling import enable as enable
    from reasonalloc.engines.transformers.enabling import generate as generate
    from reasonalloc.pages import Comparison as Comparison
    from reasonalloc.pages import compare as compare
    from reasonalloc.pages import view as view
    from reasonalloc.policies.allocation import HEAD_ALLOCATORS as HEAD_ALLOCATORS
    from reasonalloc.policies.allocation import LAYER_ALLOCATORS as LAYER_ALLOCATORS
    from reasonalloc.policies.allocation import AdaKVHeads as AdaKVHeads
    from reasonalloc.policies.allocation import DemandProfile as DemandProfile
    from reasonalloc.policies.allocation import DynamicLayers as DynamicLayers
    from reasonalloc.policies.allocation import FixedHeads as FixedHeads
    from reasonalloc.policies.allocation import HeadAllocator as HeadAllocator
    from reasonalloc.policies.allocation import HeadSplit as HeadSplit
    from reasonalloc.policies.allocation import LayerAllocator as LayerAllocator
    from reasonalloc.policies.allocation import LossCurveHeads as LossCurveHeads
    from reasonalloc.policies.allocation import LossCurveLayers as LossCurveLayers
    from reasonalloc.policies.allocation import MissCurveHeads as MissCurveHeads
    from reasonalloc.policies.allocation import MissCurveLayers as MissCurveLayers
    from reasonalloc.policies.allocation import ModelShape as ModelShape
    from reasonalloc.policies.allocation import PyramidLayers as PyramidLayers
    from reasonalloc.policies.allocation import RandomHeads as RandomHeads
    from reasonalloc.policies.allocation import RandomLayers as RandomLayers
    from reasonalloc.policies.allocation import SensitivityHeads as SensitivityHeads
    from reasonalloc.policies.allocation import SensitivityLayers as SensitivityLayers
    from reasonalloc.policies.allocation import ThresholdHeads as ThresholdHeads
    from reasonalloc.policies.allocation import UniformHeads as UniformHeads
    from reasonalloc.policies.allocation import UniformLayers as UniformLayers
    from reasonalloc.policies.allocation import WaveLayers as WaveLayers
    from reasonalloc.policies.allocation import register_head_allocator as register_head_allocator
    from reasonalloc.policies.allocation import register_layer_allocator as register_layer_allocator
    from reasonalloc.policies.allocation import robustify as robustify
    from reasonalloc.policies.compression import Compression as Compression
    from reasonalloc.policies.methods import METHODS as METHODS
    from reasonalloc.policies.scoring import H2O as H2O
    from reasonalloc.policies.scoring import RKV as RKV
    from reasonalloc.policies.scoring import SCORERS as SCORERS
    from reasonalloc.policies.scoring import TOVA as TOVA
    from reasonalloc.policies.scoring import Knorm as Knorm
    from reasonalloc.policies.scoring import Observation as Observation
    from reasonalloc.policies.scoring import QueryFreeVaSE as QueryFreeVaSE
    from reasonalloc.policies.scoring import Random as Random
    from reasonalloc.policies.scoring import Scorer as Scorer
    from reasonalloc.policies.scoring import SnapKV as SnapKV
    from reasonalloc.policies.scoring import StreamingLLM as StreamingLLM
    from reasonalloc.policies.scoring import VaSE as VaSE
    from reasonalloc.policies.scoring import register_scorer as register_scorer
    from reasonalloc.policies.scoring.tokens import LayerTokens as LayerTokens

_NAMES = {  # where each public name lives
    "reasonalloc.cache.recorder": ("Recorder",),
    "reasonalloc.cache.stats": ("CacheStats",),
    "reasonalloc.calibration": ("CalibrationSettings", "ProbePrompt"),
    "reasonalloc.calibration.calibrate": ("calibrate",),
    "reasonalloc.engines.models": ("UnsupportedModelError",),
    "reasonalloc.engines.transformers": ("Cache", "decoding_loop"),
    "reasonalloc.engines.transformers.enabling": ("enable", "generate"),
    "reasonalloc.pages": ("Comparison", "compare", "view"),
    "reasonalloc.policies.allocation": (
        "HEAD_ALLOCATORS",
        "LAYER_ALLOCATORS",
        "AdaKVHeads",
        "DemandProfile",
        "DynamicLayers",
        "FixedHeads",
        "HeadAllocator",
        "HeadSplit",
        "LayerAllocator",
        "LossCurveHeads",
        "LossCurveLayers",
        "MissCurveHeads",
        "MissCurveLayers",
        "ModelShape",
        "PyramidLayers",
        "RandomHeads",
        "RandomLayers",
        "SensitivityHeads",
        "SensitivityLayers",
        "ThresholdHeads",
        "UniformHeads",
        "UniformLayers",
        "WaveLayers",
        "register_head_allocator",
        "register_layer_allocator",
        "robustify",
    ),
    "reasonalloc.policies.compression": ("Compression",),
    "reasonalloc.policies.methods": ("METHODS",),
    "reasonalloc.policies.scoring": (
        "H2O",
        "RKV",
        "SCORERS",
        "TOVA",
        "Knorm",
        "Observation",
        "QueryFreeVaSE",
        "Random",
        "Scorer",
        "SnapKV",
        "StreamingLLM",
        "VaSE",
        "register_scorer",
    ),
    "reasonalloc.policies.scoring.tokens": ("LayerTokens",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = sorted(_HOMES)

if not TYPE_CHECKING:  # a type checker would take any name at all for one of ours

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(_HOMES[name]), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


register_attention()
