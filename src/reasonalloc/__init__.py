"""reasonalloc: hierarchical, decode-time KV-cache budgets for reasoning language models.

Importing the package registers the attention implementation "reasonalloc" with transformers.
"""

from reasonalloc.cache.recorder import Recorder
from reasonalloc.cache.stats import CacheStats
from reasonalloc.calibration import CalibrationSettings, ProbePrompt
from reasonalloc.calibration.calibrate import calibrate
from reasonalloc.engines.models import UnsupportedModelError
from reasonalloc.engines.transformers import Cache, drop_finished
from reasonalloc.policies.allocation import (
    DemandProfile,
    DynamicLayers,
    HeadAllocator,
    LayerAllocator,
    MissCurveHeads,
    MissCurveLayers,
    ModelShape,
    PyramidLayers,
    SensitivityHeads,
    SensitivityLayers,
    ThresholdHeads,
    UniformHeads,
    UniformLayers,
    WaveLayers,
    robustify,
)
from reasonalloc.policies.allocation.heads import HEAD_ALLOCATORS, AdaKVHeads
from reasonalloc.policies.allocation.layers import LAYER_ALLOCATORS
from reasonalloc.policies.compression import Compression
from reasonalloc.policies.methods import METHODS
from reasonalloc.policies.scoring import RKV, SCORERS, Observation, Scorer, register_scorer

__version__ = "0.1.0"

register_layer_allocator = LAYER_ALLOCATORS.register
register_head_allocator = HEAD_ALLOCATORS.register

__all__ = [
    "METHODS",
    "RKV",
    "SCORERS",
    "AdaKVHeads",
    "Cache",
    "CacheStats",
    "CalibrationSettings",
    "Compression",
    "DemandProfile",
    "DynamicLayers",
    "HeadAllocator",
    "LayerAllocator",
    "MissCurveHeads",
    "MissCurveLayers",
    "ModelShape",
    "Observation",
    "ProbePrompt",
    "PyramidLayers",
    "Recorder",
    "Scorer",
    "SensitivityHeads",
    "SensitivityLayers",
    "ThresholdHeads",
    "UniformHeads",
    "UniformLayers",
    "UnsupportedModelError",
    "WaveLayers",
    "calibrate",
    "drop_finished",
    "register_head_allocator",
    "register_layer_allocator",
    "register_scorer",
    "robustify",
]
