"""Budgets: exact integer arithmetic over layers and heads. Imports torch alone, knows no model."""

from reasonalloc.allocation.apportion import apportion, robustify
from reasonalloc.allocation.demand import attention_demand, attention_demands
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
from reasonalloc.allocation.miss import MissCurveHeads, MissCurveLayers, marginal_gain
from reasonalloc.allocation.offline_heads import FixedHeads
from reasonalloc.allocation.profile import DemandProfile, MissGrid, PromptDemand, merge
from reasonalloc.allocation.random_split import RandomHeads, RandomLayers
from reasonalloc.allocation.sensitivity import SensitivityHeads, SensitivityLayers
from reasonalloc.allocation.shape import ModelShape

__all__ = [
    "HEAD_ALLOCATORS",
    "LAYER_ALLOCATORS",
    "AdaKVHeads",
    "DemandProfile",
    "DynamicLayers",
    "FixedHeads",
    "HeadAllocator",
    "HeadSplit",
    "LayerAllocator",
    "MissCurveHeads",
    "MissCurveLayers",
    "MissGrid",
    "ModelShape",
    "PromptDemand",
    "PyramidLayers",
    "RandomHeads",
    "RandomLayers",
    "SensitivityHeads",
    "SensitivityLayers",
    "ThresholdHeads",
    "UniformHeads",
    "UniformLayers",
    "WaveLayers",
    "apportion",
    "attention_demand",
    "attention_demands",
    "marginal_gain",
    "merge",
    "robustify",
]
