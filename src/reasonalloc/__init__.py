"""reasonalloc: hierarchical, decode-time KV-cache budgets for reasoning language models.

Importing the package registers the attention implementation "reasonalloc" with transformers.
"""

from reasonalloc.allocation import (
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
from reasonalloc.allocation.heads import HEAD_ALLOCATORS, AdaKVHeads
from reasonalloc.allocation.layers import LAYER_ALLOCATORS
from reasonalloc.calibration import CalibrationSettings, ProbePrompt
from reasonalloc.compression import METHODS, Compression
from reasonalloc.engines.transformers import Cache, calibrate, drop_finished
from reasonalloc.engines.transformers.support import UnsupportedModelError
from reasonalloc.recorder import Recorder
from reasonalloc.scoring import RKV, SCORERS, Observation, Scorer, register_scorer
from reasonalloc.stats import CacheStats

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
