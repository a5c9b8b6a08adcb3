"""Budgets: exact integer arithmetic over layers and heads. Imports torch alone, knows no model."""

from reasonalloc.allocation.apportion import apportion, robustify
from reasonalloc.allocation.demand import DemandProfile, attention_demand
from reasonalloc.allocation.heads import (
    HEAD_ALLOCATORS,
    AdaKVHeads,
    HeadAllocator,
    HeadSplit,
    ThresholdHeads,
    UniformHeads,
)
from reasonalloc.allocation.layers import (
    LAYER_ALLOCATORS,
    DynamicLayers,
    LayerAllocator,
    PyramidLayers,
    UniformLayers,
    WaveLayers,
)
from reasonalloc.allocation.shape import ModelShape

__all__ = [
    "HEAD_ALLOCATORS",
    "LAYER_ALLOCATORS",
    "AdaKVHeads",
    "DemandProfile",
    "DynamicLayers",
    "HeadAllocator",
    "HeadSplit",
    "LayerAllocator",
    "ModelShape",
    "PyramidLayers",
    "ThresholdHeads",
    "UniformHeads",
    "UniformLayers",
    "WaveLayers",
    "apportion",
    "attention_demand",
    "robustify",
]
